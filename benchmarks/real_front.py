"""The search on real data: its front beside PEFT with thresholds alone, and beside the published recipe.

    python benchmarks/real_front.py --encoder FOLDER --data FOLDER [--tasks sst2,stsb]

Runs benchmarks/front_minilm.yaml once for each task through the command, and the recipe once more with as many seeds as
the front has, if it did not get them there; tests in pairs, and stores what it found as JSON;
benchmarks/results_page.py makes docs/results.md of it. Stopped in the middle it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from paper_table import TASKS
from store import RESULTS, machine_line, origin, store
from sweeps import ROOT, run_sweep

from deft_ray.metrics import tau_key
from deft_ray.results.front import front, hypervolume, points
from deft_ray.results.paired import paired_drop, with_paired_tests
from deft_ray.results.points import Point, merge
from deft_ray.results.predictions import read_predictions
from deft_ray.results.records import Record, RecordLog

SPEC = "benchmarks/front_minilm.yaml"
PLOTS = ROOT / "docs" / "images"
#: What the published recipe is, among the settings that are searched.
RECIPE = {"deft.approximation": "l0", "deft.alpha": 1.0, "deft.epsilon": 1e-7, "deft.alpha_delay": 0.0}
SETTINGS = tuple(RECIPE)


def main() -> None:
    """Run the sweeps, store what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tasks", default="sst2,stsb")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "real_front")
    given = parser.parse_args()
    file = RESULTS / "real_front.json"
    found = {part["task"]: part for part in (json.loads(file.read_text())["tasks"] if file.is_file() else ())}
    found |= {task: sweep(task, given) for task in given.tasks.split(",")}
    store("real_front", {"spec": SPEC, "tasks": list(found.values())})


def sweep(task: str, given: argparse.Namespace) -> dict[str, Any]:
    """Run one task's sweep, or the rest of it; returns what it found."""
    output = given.output / task
    settings = {"data.tasks": f"[{task}]", "model.name": given.encoder, "data.dir": given.data}
    run_sweep(SPEC, output, settings)
    (PLOTS / f"real-front-{task}.png").write_bytes((output / f"pareto-{task}.png").read_bytes())
    seeds = yaml.safe_load((output / "spec.yaml").read_text(encoding="utf-8"))["search"]["front_seeds"]
    if sum(map(is_recipe, RecordLog(output / "records.jsonl").read())) >= seeds:
        return describe(task, output, output)
    aside = given.output / f"{task}-recipe"
    alone = {"search.trials": 1, "search.front_seeds": "null", "search.seeds": list(range(seeds))}
    run_sweep(SPEC, aside, settings | alone)
    return describe(task, output, aside)


def describe(task: str, output: Path, aside: Path) -> dict[str, Any]:
    """Say what a sweep found, and the sweep that has the recipe with all its seeds."""
    spec = yaml.safe_load((output / "spec.yaml").read_text(encoding="utf-8"))
    limit, ref = spec["constraint"]["max_score_drop"], (spec["reference"]["score"], spec["reference"]["density"])
    records = RecordLog(output / "records.jsonl").read()
    found = with_paired_tests(points(records, limit), records, output, limit)
    renamed = {} if aside == output else {"trial": "recipe"}
    recipe_records = RecordLog(aside / "records.jsonl").read()
    recipe = [p for p in points(recipe_records, limit) if is_recipe(p) or p.reference]
    groups = {
        "all": found,
        "DEFT": [point for point in found if not point.baseline or point.reference],
        "PEFT + threshold": [point for point in found if point.baseline],
        "published recipe": recipe,
        "DEFT, exact zeros": [point for point in found if not point.tau],
    }
    return {
        "task": task,
        "metric": records[0].score_metric,
        "dtype": records[0].dtype,
        "steps": records[0].steps,
        "trials": len(records),
        **origin(),
        "hours": sum(record.wall_s for record in records) / 3600,
        "max_score_drop": limit,
        "front_seeds": spec["search"]["front_seeds"],
        "reference": list(ref),
        "hypervolumes": {name: hypervolume(mine, ref) for name, mine in groups.items()},
        "front": [told(point) for point in front(found)],
        "recipe": [{**told(point), **renamed} for point in merge(recipe) if is_recipe(point)],
        "baseline": [told(point) for point in merge(found) if point.baseline],
        "rivals": list(rivals(found, records, output, _dial([r for r in recipe_records if is_recipe(r)], aside))),
    }


def is_recipe(point: Point | Record) -> bool:
    """Whether a point, or a trial, is of the published setting."""
    return not point.baseline and all(point.config[name] == value for name, value in RECIPE.items())


def told(point: Point) -> dict[str, Any]:
    """What the JSON keeps of a point."""
    names = ("trial", "baseline", "tau", "seeds", "score", "score_std", "density", "density_std", "score_drop")
    tested = ("drop_low", "drop_high", "p_worse", "front_probability", "feasible", "on_front")
    config = {name: point.config[name] for name in SETTINGS}
    return {**{name: getattr(point, name) for name in (*names, *tested)}, "config": config}


def rivals(
    found: Sequence[Point], records: Sequence[Record], output: Path, recipe: Sequence[_Dialled]
) -> Iterable[dict[str, Any]]:
    """Set each DEFT point of the front beside thresholded baselines and the recipe, tested in pairs, seed by seed.

    Beside the baseline at the same τ, whose density is about the same, beside the best one of no more density, and
    beside the published recipe at the same τ, on the seeds that it was trained with.
    """
    thresholds = _dial([record for record in records if record.baseline], output)
    for point in front(found):
        if point.baseline:
            continue
        mine = [p for p in found if p.key == point.key and p.status == "complete"]
        no_denser = [rival for rival in thresholds if rival.density <= point.density]
        best = max(no_denser, key=lambda one: one.score, default=None)
        same = next(rival for rival in thresholds if rival.tau == point.tau)
        theirs = next((rival for rival in recipe if rival.tau == point.tau), None)
        beside = {
            "same_tau": _against(mine, same, output),
            "no_denser": best and _against(mine, best, output),
            "recipe": theirs and _against(mine, theirs, output),
        }
        yield {"trial": point.trial, "tau": point.tau, "score": point.score, "density": point.density, **beside}


def _against(mine: Sequence[Point], rival: _Dialled, output: Path) -> dict[str, Any]:
    """What a point's seeds gain on a rival's, on the seeds that both have."""
    theirs = {record.seed: record for record in rival.records}
    both = [point for point in mine if point.seed in theirs]
    pairs = [
        (
            read_predictions(rival.folder, theirs[point.seed].trial),
            rival.tau,
            read_predictions(output, point.trial),
            point.tau,
        )
        for point in both
    ]
    paired = paired_drop(rival.records[0].score_metric, pairs)
    assert paired is not None, "a sweep keeps what its trials said"
    beside = replace(rival, records=[theirs[point.seed] for point in both])
    told = {"tau": beside.tau, "score": beside.score, "density": beside.density, "seeds": len(both)}
    return {**told, "gain": paired.drop, "low": paired.low, "high": paired.high}


@dataclass(frozen=True)
class _Dialled:
    """One setting's seeds at a τ of the dial: a rival may take any, chosen or not.

    Args:
        tau: The threshold.
        records: Its trials.
        folder: Run directory of their sweep.
    """

    tau: float
    records: Sequence[Record]
    folder: Path

    @property
    def score(self) -> float:
        return self._mean("score")

    @property
    def density(self) -> float:
        return self._mean("density")

    def _mean(self, what: str) -> float:
        return fmean(record.dial[tau_key(self.tau)][what] for record in self.records)


def _dial(records: Sequence[Record], folder: Path) -> list[_Dialled]:
    """One setting's complete trials at every τ of the dial."""
    records = [record for record in records if record.status == "complete"]
    return [_Dialled(float(tau), records, folder) for tau in (records[0].dial if records else ())]


def part(result: dict[str, Any]) -> str:
    """Its part of the page, in Markdown."""
    lines = [
        "## The search",
        "",
        "Made by `python benchmarks/real_front.py --encoder FOLDER --data FOLDER`; the figures are in",
        f"`benchmarks/results/real_front.json`, the settings in `{result['spec']}`.",
        "",
        "A pretrained MiniLM encoder (6 layers, 22.7 M parameters, GELU), LoRA, GLUE. Searched: approximation (l0 or",
        "l1), α, ε, and whether α is on from the start. Every trained model, plain PEFT too, is measured at each τ of",
        "the dial, chosen on held-out training examples. The published recipe (l0, α = 1, ε = 1e-7) is tried first.",
        "Points on the front are trained with three seeds, and so is the recipe: where it is not on the front, in a",
        "sweep of its own, *recipe* in the tables. Intervals and p are of the paired test: validation examples",
        "drawn again, each seed beside its own baseline.",
    ]
    for found in result["tasks"]:
        lines += ["", *section(found)]
    return "\n".join(lines) + "\n"


def section(found: dict[str, Any]) -> list[str]:
    """One task's part."""
    limit, ref = found["max_score_drop"], found["reference"]
    lines = [
        f"### {TASKS[found['task']]}",
        "",
        f"{found['trials']} trials of {found['steps']} steps of 32 examples, {found['dtype']}, "
        f"{found['hours']:.1f} hours of trials; score: {found['metric']}; limit: {limit:g} below the baseline.",
        machine_line(found),
        "",
        f"| front of | hypervolume (reference: score {ref[0]:g}, density {ref[1]:g}) |",
        "|---|---|",
        *(f"| {name} | {area:.4f} |" for name, area in found["hypervolumes"].items()),
        "",
        "The front, the baseline and the published recipe as they were trained, and at the τ that stand:",
        "",
        f"| trial | τ | loss, α, ε, delay | seeds | score | density | drop, 95 % | p(drop > {limit:g}) | front |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    shown = {(p["trial"], p["tau"]): p for p in (*found["baseline"], *found["recipe"], *found["front"])}
    lines += [_row(point) for point in sorted(shown.values(), key=lambda point: -point["density"])]
    lines += [
        "",
        "Each DEFT point of the front beside the thresholded baseline at the same τ, and beside the best one of no",
        "more density, whatever its τ, and beside the published recipe at the same τ with the seeds that it has; gains",
        f"in score with 95 % intervals of the paired test. At the same τ {_surely_better(found['rivals'])} of "
        f"{len(found['rivals'])} gain more than nothing on PEFT by their interval.",
        "",
        "| trial | τ | score @ density | PEFT at the same τ | gain | PEFT of no more density | gain | recipe | gain |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_rival_row(one) for one in found["rivals"]),
        "",
        f"![The front](images/real-front-{found['task']}.png)",
    ]
    return lines


def _row(point: dict[str, Any]) -> str:
    config = point["config"]
    kind, settings = config["deft.approximation"], "PEFT"
    if not point["baseline"]:
        width = f"{config['deft.epsilon']:.2g}" if kind == "l0" else "–"
        settings = f"{kind}, {config['deft.alpha']:.3g}, {width}, {config['deft.alpha_delay']:g}"
    drop = "–" if point["drop_low"] is None else f"{point['drop_low']:+.4f} … {point['drop_high']:+.4f}"
    worse = "–" if point["p_worse"] is None else f"{point['p_worse']:.3f}"
    cells = [
        point["trial"],
        f"{point['tau']:g}" if point["tau"] else "exact",
        settings,
        str(point["seeds"]),
        f"{point['score']:.4f}" + ("" if point["score_std"] is None else f" ± {point['score_std']:.4f}"),
        f"{point['density']:.4f}" + ("" if point["density_std"] is None else f" ± {point['density_std']:.4f}"),
        drop,
        worse,
        "yes" if point["on_front"] else "no" if point["feasible"] else "infeasible",
    ]
    return f"| {' | '.join(cells)} |"


def _surely_better(rivals: Sequence[dict[str, Any]]) -> int:
    return sum(one["same_tau"]["low"] > 0 for one in rivals)


def _rival_row(one: dict[str, Any]) -> str:
    cells = [one["trial"], f"{one['tau']:g}" if one["tau"] else "exact", f"{one['score']:.4f} @ {one['density']:.4f}"]
    rivals = ((one["same_tau"], "", ""), (one["no_denser"], "τ", "none is as sparse"), (one.get("recipe"), "", "–"))
    for rival, at, absent in rivals:
        if rival is None:
            cells += [absent, "–"]
            continue
        tau = f", τ = {rival['tau']:g}" if at else ""
        cells.append(f"{rival['score']:.4f} @ {rival['density']:.4f}{tau}")
        cells.append(f"{rival['gain']:+.4f} ({rival['low']:+.4f} … {rival['high']:+.4f})")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
