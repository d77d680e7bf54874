"""A sweep whose trials are stopped at rungs, ended early by its budget, killed in the middle and continued."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path
from typing import Any

from deft_ray.cli import main
from tests.integration.sweeps import records, start, stop, sweep, wait_until
from tests.searches import told
from tests.tiny import write_glue, write_tiny_bert

SPEC = """
name: rungs
model: {{name: {model}, family: bert}}
data: {{dir: {data}, tasks: [sst2], max_source_tokens: 48}}
deft: {{alpha: {{loguniform: [0.1, 30]}}, epsilon: {{loguniform: [1e-5, 1e-1]}}}}
dial: {{taus: [0.01, 0.05], calibration_examples: 8}}
train: {{steps: 18, batch_size: 16, learning_rate: 3e-3, checkpoint_every_s: 0}}
search:
  {{trials: 7, scheduler: mo_asha, max_concurrent: 1, front_seeds: 2, objectives: {{score: max, density@0.05: min}}}}
constraint: {{max_score_drop: 0.2}}
"""
SAME = ("trial", "setting", "seed", "status", "score", "density", "dial", "steps", "config")


def test_trials_are_pruned_and_a_sweep_in_pieces_prunes_the_same(tmp_path: Path) -> None:
    model, data = write_tiny_bert(tmp_path / "model"), write_glue(tmp_path / "data", ("sst2",))
    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC.format(model=model, data=data))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = sweep(spec, whole)
    assert done.returncode == 0, done.stdout + done.stderr
    everything = records(whole)
    found, further = everything[:8], everything[8:]

    pruned = [record for record in found if record["status"] == "pruned"]
    stopped = {a["trial"]: a for a in arrivals(whole) if not a["goes_on"]}
    assert len(found) == 8
    assert {record["status"] for record in found} == {"complete", "pruned"}
    assert {record["trial"] for record in pruned} == stopped.keys()
    for record in pruned:
        last = stopped[record["trial"]]
        judged = record["dial"]["0.05"]
        assert (record["steps"], judged["score"], judged["density"]) == (last["step"], last["score"], last["density"])
        assert judged["density"] < record["density"]
        assert record["steps"] in (2, 6)
        assert record["cause"] == f"stopped by the scheduler after step {record['steps']}"
        assert record["wall_s"] > record["times"]["train_s"] + record["times"]["eval_s"] > 0
        assert (record["activation"], record["host"]) == (found[0]["activation"], found[0]["host"])
        assert record["versions"] == found[0]["versions"]
        assert not (whole / "checkpoints" / record["trial"]).exists()
    points = told(whole / "search", "sst2")
    assert len(points) == 7
    assert all(point.state.is_finished() for point in points), "none stays running"
    saved = sum(18 - record["steps"] for record in pruned)
    trained = len(everything) * 18 - saved
    assert f"{len(pruned)} trials pruned: {trained} steps trained, {saved} (" in (whole / "report.md").read_text()
    assert [(record["trial"], record["seed"], record["baseline"]) for record in further[:1]] == [("t0000-s1", 1, True)]
    assert all((r["status"], r["steps"], r["seed"]) == ("complete", 18, 1) for r in further), (
        "they are judged by no rung"
    )
    assert {r["setting"] for r in further} <= {r["trial"] for r in found if r["status"] == "complete"}
    assert not {row["trial"] for row in arrivals(whole) if row["baseline"]} & stopped.keys()

    with (whole / "front.csv").open() as stream:
        rows = list(csv.DictReader(stream))
        points = {(row["trial"], row["tau"]) for row in rows}
    assert {row["seeds"] for row in rows} == {"2"}, "whoever stands on the front has both seeds"
    assert all(0 < float(row["front_probability"]) <= 1 for row in rows)
    tested = [row for row in rows if row["baseline"] == "False" or row["tau"] != "0.0"]
    assert all(float(row["drop_low"]) <= float(row["score_drop"]) <= float(row["drop_high"]) for row in tested)
    assert all(0 <= float(row["p_worse"]) <= 1 for row in tested)
    assert {float(tau) for _, tau in points} <= {0.0, 0.01, 0.05}
    assert any(float(tau) for _, tau in points), "a threshold is on the front"
    assert "of the baseline with thresholds alone" in (whole / "report.md").read_text()

    early = sweep(spec, cut, "--set", "budget.steps=20")
    assert early.returncode == 0, early.stdout + early.stderr
    why = "budget.steps = 20 is spent (36)"
    assert f"ended early: {why}; 6 trials not run" in early.stdout
    report = (cut / "report.md").read_text()
    assert f"- Ended because: {why}\n" in report
    assert main(["report", str(cut)]) == 0
    assert (cut / "report.md").read_text() == report, "written again from what the sweep left"
    process = start(spec, cut, "--resume")
    wait_until(lambda: len(records(cut)) >= 4, process)
    stop(process, signal.SIGKILL)
    again = sweep(spec, cut, "--resume")
    assert again.returncode == 0, again.stdout + again.stderr
    same = [[record[key] for key in SAME] for record in everything]
    assert [[record[key] for key in SAME] for record in records(cut)] == same
    assert arrivals(cut) == arrivals(whole)

    more = sweep(spec, cut, "--extend", "--set", "search.trials=8")
    assert more.returncode == 0, more.stdout + more.stderr
    extended = records(cut)
    assert [[record[key] for key in SAME] for record in extended[: len(same)]] == same
    assert extended[len(same)]["trial"] == "t0008"
    assert all(record["setting"] != record["trial"] for record in extended[len(same) + 1 :])


def arrivals(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "search" / "rungs.jsonl").read_text().splitlines()]
