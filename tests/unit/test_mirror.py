"""The MLflow mirror against real SQLite stores, and its writer thread against a server that fails."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deft_ray.results.front import hypervolume_history, points
from deft_ray.results.records import Record
from deft_ray.tracking.client import connect, default_tracking
from deft_ray.tracking.mirror import FRONT_TAG, SWEEP_TAG, TRIAL_TAG, Mirror, replay
from deft_ray.tracking.thread import MirrorThread

START = 1_700_000_000.0


def make_record(trial: str = "t0", score: float | None = 0.75, density: float | None = 0.5, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "task": "rte",
        "seed": 0,
        "baseline": False,
        "status": "complete",
        "score_metric": "accuracy",
        "dtype": "bfloat16",
        "activation": "relu",
        "config": {"deft.alpha": 0.1, "adapter.r": 8, "train.resume": None},
        "extra_scores": {"exact_match": 0.25},
        "density_encoder": 0.625,
        "density_at_tau": {"0.001": 0.375},
        "density_layers": {"encoder.0": 0.125},
        "steps": 100,
        "wall_s": 60.0,
        "versions": {"torch": "2.9"},
        "times": {"train_s": 50.0},
        "started_at": START,
        "ended_at": START + 60.0,
        "host": "h0",
    }
    return Record(trial=trial, score=score, density=density, **{**values, **changes})


ROWS = [{"step": step, "time": START + step, "loss": 1.0 / (step + 1), "phase": "train"} for step in range(3)]

SWEEP = [
    make_record("t0", 0.75, 0.5, baseline=True),
    make_record("t1", 0.745, 0.25, ended_at=START + 70),
    make_record("s0", 0.5, 0.5, task="sst2", baseline=True, ended_at=START + 80),
    make_record("t2", 0.5, 0.125, ended_at=START + 90),
    make_record("t3", None, None, status="failed", cause="ValueError: no", ended_at=START + 100),
]


@pytest.fixture(scope="module")
def first_start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A store made by a process of its own, with no network, and what that process said."""
    folder = tmp_path_factory.mktemp("store") / "with space"
    code = f"""
        import socket, threading
        from pathlib import Path
        def refuse(*a, **k):
            print("network", a)
            raise OSError
        socket.getaddrinfo = socket.create_connection = refuse
        from deft_ray.tracking.client import default_tracking
        from deft_ray.tracking.mirror import Mirror
        uri, artifacts = default_tracking(Path({str(folder)!r}))
        Mirror(uri, "another", artifacts, "s", "n").finish()
        print([thread.name for thread in threading.enumerate()])
    """
    return folder, run_python(code, CI="", PYTEST_CURRENT_TEST="", GITHUB_ACTIONS="")


@pytest.fixture(scope="module")
def empty_store(first_start: tuple[Path, Any]) -> Path:
    """A store with its tables made, which takes seconds; tests copy it."""
    return first_start[0]


@pytest.fixture
def output(empty_store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(empty_store, tmp_path / "out put"))


def open_mirror(output: Path, sweep_id: str = "s1") -> Mirror:
    uri, artifacts = default_tracking(output)
    return Mirror(uri, "deft-ray", artifacts, sweep_id, "glue", started_at=START)


def stored(output: Path) -> dict[str, Any]:
    """Everything that a store holds of its runs, without their random ids."""
    client = connect(default_tracking(output)[0])
    experiment = client.get_experiment_by_name("deft-ray")
    runs = client.search_runs([experiment.experiment_id])
    names = {run.info.run_id: run.info.run_name for run in runs}
    content = {}
    for run in runs:
        history = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
        assert run.info.run_name not in content
        content[run.info.run_name] = {
            "info": (run.info.status, run.info.start_time, run.info.end_time),
            "params": run.data.params,
            "tags": {key: names.get(value, value) for key, value in run.data.tags.items()},
            "metrics": {key: sorted((m.step, m.timestamp, m.value) for m in found) for key, found in history.items()},
            "artifacts": sorted(file.path for file in client.list_artifacts(run.info.run_id)),
        }
    return content


def test_one_trial_in_full(output: Path) -> None:
    open_mirror(output).record(make_record(), score_drop=0.01, density_change=0.5, rows=ROWS)
    content = stored(output)
    assert set(content) == {"glue", "t0 rte"}
    run = content["t0 rte"]
    ended = round((START + 60) * 1000)
    assert run["info"] == ("FINISHED", round(START * 1000), ended)
    assert run["params"] == {"deft.alpha": "0.1", "adapter.r": "8", "train.resume": "None"}
    assert run["tags"] == {
        "mlflow.parentRunId": "glue",
        "mlflow.runName": "t0 rte",
        TRIAL_TAG: "t0",
        FRONT_TAG: "false",
        "task": "rte",
        "status": "complete",
        "baseline": "false",
        "seed": "0",
        "steps": "100",
        "score_metric": "accuracy",
        "dtype": "bfloat16",
        "activation": "relu",
        "host": "h0",
        "version.torch": "2.9",
    }
    final = {
        "score": 0.75,
        "score_drop": 0.01,
        "density": 0.5,
        "density_change": 0.5,
        "density_encoder": 0.625,
        "wall_s": 60.0,
        "train_s": 50.0,
        "extra_scores/exact_match": 0.25,
        "density_at_tau/0.001": 0.375,
        "density_layers/encoder.0": 0.125,
    }
    loss = [(row["step"], round(row["time"] * 1000), row["loss"]) for row in ROWS]
    assert run["metrics"] == {**{key: [(100, ended, value)] for key, value in final.items()}, "loss": loss}
    assert content["glue"]["tags"] == {SWEEP_TAG: "s1", "mlflow.runName": "glue"}
    assert content["glue"]["info"] == ("RUNNING", round(START * 1000), None)


def test_twice_is_once(output: Path) -> None:
    mirror = open_mirror(output)
    mirror.record(make_record(), 0.01, 0.5, ROWS)
    once = stored(output)
    mirror.record(make_record(), 0.01, 0.5, ROWS)
    assert stored(output) == once
    open_mirror(output).record(make_record(), 0.01, 0.5, ROWS)
    assert stored(output) == once


def test_what_an_interrupted_write_left_is_completed(output: Path) -> None:
    mirror = open_mirror(output)
    mirror.record(make_record())
    mirror.record(make_record(), 0.01, 0.5, ROWS)
    completed = stored(output)["t0 rte"]
    assert completed["metrics"]["score_drop"][0][2] == 0.01
    assert len(completed["metrics"]["loss"]) == 3


def test_limits_of_a_call(output: Path) -> None:
    config = {f"group.p{index}": index for index in range(250)} | {"long": "x" * 7000, "what? is#this": 1}
    versions = {f"package{index}": "1" for index in range(150)}
    rows = [{"step": step, "time": START + step, "loss": 1.0, "task_loss": 2.0} for step in range(1300)]
    open_mirror(output).record(make_record(config=config, versions=versions, cause="c" * 9000), rows=rows)
    run = stored(output)["t0 rte"]
    assert len(run["params"]) == 252
    assert run["params"]["long"] == "x" * 6000
    assert run["params"]["what_ is_this"] == "1"
    assert sum(tag.startswith("version.") for tag in run["tags"]) == 150
    assert (len(run["metrics"]["loss"]), len(run["metrics"]["task_loss"])) == (1300, 1300)
    assert 4000 < len(run["tags"]["mlflow.note.content"]) <= 5000


def test_only_finite_numbers_are_metrics(output: Path) -> None:
    rows = [{"step": 0, "time": START, "loss": bad, "on": True, "x": "7", "y": [1]} for bad in (math.nan, math.inf)]
    open_mirror(output).record(
        make_record(score=None, density=math.nan, times={"eval_s": -math.inf}), math.nan, rows=rows
    )
    metrics = stored(output)["t0 rte"]["metrics"]
    assert not {"loss", "on", "x", "y", "score", "density", "score_drop", "eval_s"} & set(metrics)


def test_the_record_has_the_last_word(output: Path) -> None:
    rows = [{"step": 50, "time": START, "score": 0.1}, {"step": 100, "time": START + 1, "score": 0.2}]
    open_mirror(output).record(make_record(score=0.75), rows=rows)
    scores = stored(output)["t0 rte"]["metrics"]["score"]
    assert [(step, value) for step, _, value in scores] == [(50, 0.1), (100, 0.75)]


@pytest.mark.parametrize(
    ("status", "expected"),
    [("complete", "FINISHED"), ("failed", "FAILED"), ("diverged", "FAILED"), ("stopped", "KILLED")],
)
def test_status(output: Path, status: str, expected: str) -> None:
    open_mirror(output).record(make_record(status=status, cause=None if status == "complete" else "why"))
    run = stored(output)["t0 rte"]
    assert (run["info"][0], run["tags"]["status"]) == (expected, status)
    assert run["tags"].get("mlflow.note.content") == (None if status == "complete" else "```\nwhy\n```")


def test_front_tags_follow_the_front(output: Path) -> None:
    mirror = open_mirror(output)
    for record in SWEEP:
        mirror.record(record)
    mirror.front("rte", ["t0", "t1"], 0.4, step=4)
    mirror.front("sst2", ["s0"], 0.25, step=4)
    mirror.front("rte", ["t1", "t2"], 0.5, step=5)
    mirror = open_mirror(output)
    mirror.front("rte", ["t1"], 0.6, step=6)
    on_front = {name: run["tags"].get(FRONT_TAG) for name, run in stored(output).items() if name != "glue"}
    assert on_front == {"t0 rte": "false", "t1 rte": "true", "t2 rte": "false", "t3 rte": "false", "s0 sst2": "true"}


def test_a_front_known_before_its_trial(output: Path) -> None:
    mirror = open_mirror(output)
    mirror.front("rte", ["t0"], 0.4, step=1)
    mirror.record(make_record("t0"))
    mirror.record(make_record("t1"))
    assert [stored(output)[name]["tags"][FRONT_TAG] for name in ("t0 rte", "t1 rte")] == ["true", "false"]


def test_hypervolume_has_one_value_for_each_step(output: Path) -> None:
    mirror = open_mirror(output)
    mirror.front("rte", [], 0.25, step=1, at=START)
    mirror.front("rte", [], 0.25, step=1)
    mirror.front("rte", [], math.nan, step=2)
    open_mirror(output).front("rte", [], 0.5, step=1)
    open_mirror(output).front("rte", [], 0.5, step=3, at=START + 3)
    history = stored(output)["glue"]["metrics"]["hypervolume/rte"]
    assert history == [(1, round(START * 1000), 0.25), (3, round((START + 3) * 1000), 0.5)]


def test_files_go_beside_the_database(output: Path, tmp_path: Path) -> None:
    file = tmp_path / "front.csv"
    file.write_text("old")
    mirror = open_mirror(output)
    mirror.front("rte", [], 0.25, step=1, files=[file])
    file.write_text("new")
    mirror.front("rte", [], 0.25, step=2, files=[file])
    assert stored(output)["glue"]["artifacts"] == ["front.csv"]
    (copied,) = (output / "mlartifacts").rglob("front.csv")
    assert copied.read_text() == "new"


def test_sweeps_share_an_experiment(output: Path) -> None:
    first, second = open_mirror(output, "s1"), open_mirror(output, "s'2")
    assert first.parent_id != second.parent_id
    assert open_mirror(output, "s1").parent_id == first.parent_id
    assert open_mirror(output, "s'2").parent_id == second.parent_id


def test_finish_and_resume(output: Path) -> None:
    open_mirror(output).finish("stopped", at=START + 5)
    assert stored(output)["glue"]["info"] == ("KILLED", round(START * 1000), round((START + 5) * 1000))
    mirror = open_mirror(output)
    assert stored(output)["glue"]["info"][0] == "RUNNING"
    mirror.finish(at=START + 9)
    assert stored(output)["glue"]["info"] == ("FINISHED", round(START * 1000), round((START + 9) * 1000))


def test_finish_refuses_an_unknown_status(output: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^status must be one of complete, failed, diverged, pruned, stopped \(got 'done'\)$"
    ):
        open_mirror(output).finish("done")


def test_of_two_runs_of_a_trial_one_stays(output: Path) -> None:
    mirror = open_mirror(output)
    mirror.record(make_record())
    client = connect(default_tracking(output)[0])
    experiment = client.get_experiment_by_name("deft-ray").experiment_id
    tags = {"mlflow.parentRunId": mirror.parent_id, TRIAL_TAG: "t0", "task": "rte"}
    client.create_run(experiment, start_time=round(START * 1000) + 1, tags=tags, run_name="double")
    mirror.reload()
    mirror.record(make_record())
    assert set(stored(output)) == {"glue", "t0 rte"}


def test_a_deleted_experiment_comes_back(output: Path) -> None:
    mirror = open_mirror(output)
    client = connect(default_tracking(output)[0])
    client.delete_experiment(client.get_experiment_by_name("deft-ray").experiment_id)
    assert open_mirror(output).parent_id == mirror.parent_id


def live(mirror: Mirror | MirrorThread) -> None:
    found = points(SWEEP, 0.01)
    for step, (record, point) in enumerate(zip(SWEEP, found, strict=True), start=1):
        mirror.record(record, point.score_drop, point.density_change, ROWS if record.trial == "t0" else ())
        ended = [r for r in SWEEP[:step] if r.task == record.task]
        chosen = [p.trial for p in points(ended, 0.01) if p.on_front]
        volume = hypervolume_history(ended, record.task, 0.01)[-1]
        mirror.front(record.task, chosen, volume, step, at=record.ended_at)
    mirror.finish("complete", at=START + 100)


def test_replay_equals_live(output: Path, empty_store: Path, tmp_path: Path) -> None:
    live(open_mirror(output))
    rebuilt = Path(shutil.copytree(empty_store, tmp_path / "rebuilt"))
    replay(open_mirror(rebuilt), SWEEP, 0.01, rows={"t0": ROWS})
    assert stored(rebuilt) == stored(output)
    replay(open_mirror(output), SWEEP, 0.01, rows={"t0": ROWS})
    assert stored(rebuilt) == stored(output)
    assert [value for _, _, value in stored(output)["glue"]["metrics"]["hypervolume/rte"]] == pytest.approx(
        hypervolume_history(SWEEP, "rte", 0.01)
    )


def test_replay_of_nothing(output: Path) -> None:
    replay(open_mirror(output), [])
    assert stored(output)["glue"]["info"][0] == "FINISHED"


def test_nothing_global_is_touched(output: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    open_mirror(output).record(make_record())
    import mlflow

    assert mlflow.active_run() is None
    assert str(output) not in mlflow.get_tracking_uri()
    assert {path.name for path in tmp_path.iterdir()} == {"out put"}


# ---- the writer thread


class Flaky:
    """A real mirror behind a server that goes away for the calls that ``fails`` names."""

    def __init__(self, mirror: Any, fails: Iterator[bool]) -> None:
        self.mirror, self.fails = mirror, fails
        self.reloads = 0

    def reload(self) -> None:
        self.reloads += 1
        self.mirror.reload()

    def __getattr__(self, name: str) -> Any:
        def call(**arguments: Any) -> Any:
            if next(self.fails, False):
                raise ConnectionError("server away\nsecond line")
            return getattr(self.mirror, name)(**arguments)

        return call


class Recorder:
    """A mirror that remembers its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def reload(self) -> None: ...

    def record(self, record: Record, **_: Any) -> None:
        self.calls.append(("record", record.trial))

    def front(self, task: str, step: int, **_: Any) -> None:
        self.calls.append(("front", (task, step)))

    def finish(self, status: str, at: float) -> None:
        self.calls.append(("finish", status))


def quick(make_mirror: Any, **changes: Any) -> MirrorThread:
    return MirrorThread(make_mirror, **{"attempts": 2, "backoff_s": 0.01, **changes})


def test_the_thread_writes_the_same(output: Path, empty_store: Path, tmp_path: Path) -> None:
    live(open_mirror(output))
    other = Path(shutil.copytree(empty_store, tmp_path / "other"))
    thread = quick(lambda: open_mirror(other))
    live(thread)
    assert thread.close(30) == []
    assert stored(other) == stored(output)
    assert not [t for t in threading.enumerate() if t.name == "mlflow-mirror"]


def test_a_flaky_server_loses_nothing(output: Path, empty_store: Path, tmp_path: Path) -> None:
    """One call in three fails, and the first four: what was put by is written at the end."""
    live(open_mirror(output))
    other = Path(shutil.copytree(empty_store, tmp_path / "other"))
    fails = iter([True] * 4 + [False, False, True] * 3)
    flaky = Flaky(open_mirror(other), fails)
    thread = quick(lambda: flaky)
    live(thread)
    assert thread.close(30) == []
    assert flaky.reloads > 0
    with_steps, expected = stored(other), stored(output)
    for content in (with_steps, expected):  # of two fronts of a task that both fail only the later is written
        content["glue"]["metrics"].pop("hypervolume/rte")
    assert with_steps == expected


def test_connecting_is_tried_again() -> None:
    recorder = Recorder()
    outcomes = iter([OSError("no route"), recorder])

    def make() -> Any:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    thread = quick(make)
    thread.record(make_record())
    assert thread.close(10) == []
    assert recorder.calls == [("record", "t0")]


def test_what_fails_for_good_is_named_and_never_raises(caplog: pytest.LogCaptureFixture) -> None:
    def make() -> Any:
        raise ConnectionError("server away\nsecond line")

    thread = quick(make)
    thread.record(make_record("t0"))
    thread.front("rte", ["t0"], 0.5, step=1)
    thread.front("rte", ["t0"], 0.5, step=2)
    thread.finish()
    assert sorted(thread.close(10)) == [
        "end of the sweep: ConnectionError: server away",
        "front of rte: ConnectionError: server away",
        "trial t0: ConnectionError: server away",
    ]
    assert "MLflow: trial t0 not written: server away" in caplog.text


def test_one_bad_job_does_not_stop_the_others() -> None:
    class Picky(Recorder):
        def record(self, record: Record, **arguments: Any) -> None:
            if record.trial == "bad":
                raise ValueError("value refused")
            super().record(record, **arguments)

    recorder = Picky()
    thread = quick(lambda: recorder)
    for trial in ("t0", "bad", "t1"):
        thread.record(make_record(trial))
    assert thread.close(10) == ["trial bad: ValueError: value refused"]
    assert recorder.calls == [("record", "t0"), ("record", "t1")]


def test_a_later_front_replaces_one_that_failed() -> None:
    recorder = Recorder()
    thread = quick(lambda: Flaky(recorder, iter([True, True, False])), attempts=2)
    thread.front("rte", [], 0.5, step=1)
    thread.front("rte", [], 0.5, step=2)
    assert thread.close(10) == []
    assert recorder.calls == [("front", ("rte", 2))]


def test_close_does_not_wait_for_a_server_that_hangs() -> None:
    release = threading.Event()

    class Hanging(Recorder):
        def record(self, record: Record, **_: Any) -> None:
            release.wait(30)

    thread = quick(Hanging)
    for trial in ("t0", "t1"):
        thread.record(make_record(trial))
    start = time.monotonic()
    assert thread.close(0.2) == ["trial t0: not written in time", "trial t1: not written in time"]
    assert time.monotonic() - start < 5
    release.set()


def test_close_ends_a_pause() -> None:
    thread = quick(lambda: Flaky(Recorder(), iter([True])), backoff_s=60.0)
    thread.record(make_record())
    time.sleep(0.1)
    start = time.monotonic()
    assert thread.close(30) == []
    assert time.monotonic() - start < 5


def test_close_twice() -> None:
    thread = quick(Recorder)
    assert (thread.close(10), thread.close(10)) == ([], [])


def test_queued_values_do_not_change_later() -> None:
    seen: list[Any] = []

    class Slow(Recorder):
        def record(self, record: Record, **arguments: Any) -> None:
            seen.append(arguments["rows"])

    thread = quick(Slow)
    rows = [{"step": 1, "time": START}]
    gate = dataclasses.replace(make_record())
    thread.record(gate, rows=rows)
    rows.clear()
    thread.close(10)
    assert seen == [[{"step": 1, "time": START}]]


# ---- whole processes


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )


def test_importing_is_light() -> None:
    code = """
        import sys
        import deft_ray.results.report, deft_ray.tracking.mirror, deft_ray.tracking.thread
        heavy = {"torch", "ray", "deepspeed", "transformers", "peft", "mlflow", "matplotlib", "pandas", "plotly"}
        print(sorted(heavy & set(sys.modules)))
    """
    assert run_python(code).stdout == "[]\n"


def test_a_dead_server_is_quiet_and_keeps_no_process_alive() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    code = f"""
        import time
        from deft_ray.tracking.mirror import Mirror
        from deft_ray.tracking.thread import MirrorThread

        thread = MirrorThread(lambda: Mirror("http://127.0.0.1:{port}", "e", None, "s", "n"))
        thread.finish()
        start = time.monotonic()
        problems = thread.close(3.0)
        print(len(problems), time.monotonic() - start < 4)
    """
    start = time.monotonic()
    done = run_python(code)
    assert (done.returncode, done.stdout) == (0, "1 True\n")
    assert time.monotonic() - start < 60
    assert "Traceback" not in done.stderr


def test_a_first_start_prints_nothing_and_phones_nobody(first_start: tuple[Path, Any]) -> None:
    folder, done = first_start
    assert (done.returncode, done.stdout, done.stderr) == (0, "['MainThread']\n", "")
    assert (folder / "mlflow.db").exists()
