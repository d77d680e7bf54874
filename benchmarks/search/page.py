"""Make docs/search.md and its plots of results/search_*.json.

python benchmarks/search/page.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from store import machine_line  # noqa: E402

ROOT = HERE.parents[1]
RESULTS, PAGE, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "search.md", ROOT / "docs" / "images"

OURS = ("mo_tpe, mo_asha", "mo_tpe")
PROBLEMS = {
    "nano": "recorded: 210 settings of α, ε, β, approximation, λ-init and learning rate, trained on the nano model's "
    "sentiment task for 81 steps; score limit 0.01; a budget of 120 trials",
    "smooth": "closed form: one good valley of ε, a learning rate; score limit 0.1; a budget of 60 trials",
    "crossing": "closed form: who leads early loses in the end",
    "conditional": "closed form: ε with l0, β with sigmoid, λ-init where adaptive",
}
METHODS = {
    "random": "random points, full length",
    "nsga2": "Optuna's NSGA-II, full length, a population of 10 (`search.startup_trials`; Optuna's own is 50)",
    "tpe": "Optuna's TPE, full length",
    "gp": "Optuna's Gaussian process, full length",
    "mo_tpe": "ours, full length",
    "random, mo_asha": "random points, our successive halving",
    "tpe, asha": "Optuna's TPE, Ray's ASHA on the score alone",
    "tpe, mo_asha": "Optuna's TPE, our successive halving",
    "mo_tpe, mo_asha": "ours, our successive halving",
    "Ray's OptunaSearch": "as Ray ships it, full length, without the limit",
    "Syne Tune's MO-ASHA": "random points, its successive halving, without the limit",
}


def aims(runs: Runs) -> list[str]:
    """Say what was asked, and what of it is reached."""

    def of(method: str, which: str, other: str) -> str:
        mine, theirs = (runs[name][which]["median_steps_to_enough"] for name in (method, other))
        return f"{mine / theirs:.2f}" if mine is not None and theirs is not None else "not to 95 %"

    said = [
        f"`{method}`, *{which}*: {of(method, which, 'random')} and {of(method, which, 'tpe')}"
        for method in OURS
        for which in ("whole", "near")
    ]
    return [
        "Asked of the best of ours: at most 0.20 of random's steps to 95 %, and at most 0.33 of tpe's. Reached:",
        f"{'; '.join(said)}.",
        "So the fifth of random's steps is not reached. `mo_tpe` without a scheduler is the product's default;",
        "`search.scheduler: mo_asha` has to be asked for. What was tried, and where ours loses: the [log](log.md).",
    ]


#: Okabe and Ito's colours, and two line styles.
COLOURS = ("#999999", "#E69F00", "#56B4E9", "#009E73", "#CC79A7")
STRONG = "#D55E00"

Runs = dict[str, dict[str, Any]]


def main() -> None:
    """Write the page and a plot of each problem, of what has been measured."""
    results = {name: found for name in PROBLEMS if (found := _read(f"search_{name}"))}
    by_problem = {name: {run["method"]: run for run in result["runs"]} for name, result in results.items()}
    for name, runs in by_problem.items():
        draw(name, runs, IMAGES / f"search-{name}.png")
    PAGE.write_text(page(results, by_problem), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)} and {len(by_problem)} plots")


def _read(name: str) -> dict[str, Any]:
    """A result; empty where it has not been measured."""
    file = RESULTS / f"{name}.json"
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content


def page(results: dict[str, dict[str, Any]], by_problem: dict[str, Runs]) -> str:
    """Return the page; what all results share is taken from one of them."""
    result = next(iter(results.values()))
    lines = [
        "# How fast the search finds a front",
        "",
        "Made by `make bench-search`, which takes hours; Syne Tune has to be installed beside (`pip install --no-deps",
        "syne-tune`). The figures are in `benchmarks/results/search_*.json` and `early_stopping.json`, and",
        "`python benchmarks/search/page.py` makes this page of them. The real schedule, searchers and rungs run",
        "without training: a clock of steps, four workers, and an oracle in place of a model. The recorded table is",
        "`benchmarks/search/nano_trials.parquet`, which `benchmarks/search/record.py` makes.",
        "",
        "Hypervolume of the feasible points as a share of the best known one: of every configuration of the recorded",
        "table, of 200,000 random ones of the others, which is up to 2 % below what the formulas of *smooth* and",
        "*crossing* give. Means over",
        f"{result['seeds']} seeds with 95 % intervals; *to 95 %*: the median over seeds of the training steps until",
        "95 % of it is reached, and in how many of them it was. The budget counts steps, not trials. The reference",
        "point is taken in two places: *whole* is score 0, density 1, where one good point may be nearly all there is;",
        "*near* is the score limit and the baseline's density, where it takes the whole front.",
        f"Measured {days(results)}; what comes after the four problems is of real trainings or a clock, and names its",
        "machine.",
        "",
        "| method | what it is |",
        "|---|---|",
        *(f"| {name} | {what} |" for name, what in METHODS.items()),
    ]
    for name, runs in by_problem.items():
        lines += ["", f"## {name}", "", f"{PROBLEMS[name]}.".capitalize()]
        absent = [method for method in METHODS if method not in runs]
        lines += [f"Not measured here: {', '.join(absent)}."] if absent else []
        for which, point in results[name]["references"].items():
            lines += ["", f"### {name}, {which}: reference score {point[0]:.3g}, density {point[1]:.3g}", ""]
            lines += table(runs, which, result["seeds"])
        lines += ["", *aims(runs)] if name == "nano" else []
        lines += ["", f"![Hypervolume over steps, {name}](images/search-{name}.png)"]
    for name, (heading, write) in BESIDE.items():
        found = _read(name)
        lines += ["", f"## {heading}", "", *(write(found) if found else ["Not measured yet."])]
    lines.append("")
    return "\n".join(lines)


def days(results: dict[str, dict[str, Any]]) -> str:
    """Say when the problems were measured."""
    return ", ".join(sorted({run.get("at", found["at"]) for found in results.values() for run in found["runs"]}))


def table(runs: Runs, which: str, seeds: int) -> list[str]:
    """Return one problem's table, methods by their steps to enough, then by what they reached."""
    steps = next(iter(runs.values()))["steps"]
    budget = steps[-1]
    early = next(place for place, step in enumerate(steps) if step >= budget // 8)
    lines = [
        f"| method | at {steps[early]:,} steps | at {budget:,} steps | to 95 % | of random's | of tpe's |",
        "|---|---|---|---|---|---|",
    ]
    to_enough = {name: run[which]["median_steps_to_enough"] for name, run in runs.items()}
    ordered = sorted(runs, key=lambda name: (to_enough[name] or float("inf"), -runs[name][which]["mean"][-1]))
    for name in ordered:
        run, mine = runs[name][which], to_enough[name]
        reached = sum(steps is not None for steps in run["steps_to_enough"])
        cells = [f"{run['mean'][place]:.3f} ± {run['half_interval'][place]:.3f}" for place in (early, -1)]
        cells.append(f"{mine:,.0f} ({reached} of {seeds})" if mine is not None else f"not ({reached} of {seeds})")
        cells += [ratio(mine, to_enough.get(other)) for other in ("random", "tpe")]
        lines.append(f"| {f'**{name}**' if name in OURS else name} | " + " | ".join(cells) + " |")
    return lines


def stopping_table(found: dict[str, Any]) -> list[str]:
    """Return the table of one sweep with successive halving beside the same one without."""
    lines = [
        f"One nano sweep with `mo_asha`, TPE, `front_seeds: 3` and a score limit of {found['max_score_drop']:g},",
        f"and the same without a scheduler (`{found['spec']}`); {found['pruned']} trials were stopped early.",
        "*Points*: steps of baselines and sampled points alone, without those of front seeds, which are never stopped.",
        "What a stopped trial trains on until the stop reaches it is not counted.",
        machine_line(found),
        "",
        "| task | steps with | without | saved | points with | without | saved | hypervolume with | without | lost "
        "| lowest density with | without |",
        "|---" * 12 + "|",
    ]
    for row in found["tasks"]:
        mine, other = row["with"], row["without"]
        cells = [row["task"]]
        for key in ("steps", "front_seed_steps"):
            here, there = (one["steps"] - (one[key] if key != "steps" else 0) for one in (mine, other))
            cells += [f"{here:,}", f"{there:,}", f"{1 - here / there:.1%}"]
        cells += [f"{mine['hypervolume']:.4f}", f"{other['hypervolume']:.4f}"]
        cells.append(f"{1 - mine['hypervolume'] / other['hypervolume']:.2%}")
        for one in (mine, other):
            cells.append(
                "–" if one["lowest_density"] is None else f"{one['lowest_density']:.4f} @ {one['its_score']:.4f}"
            )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def path_table(paths: dict[str, Any]) -> list[str]:
    """Return the table of a path beside training from scratch."""
    alphas = sorted({point["alpha"] for row in paths["runs"] for point in row["points"]} - {0.0})
    lines = [
        f"The nano model, α of {', '.join(f'{alpha:g}' for alpha in alphas)} from scratch and along a path, three",
        f"seeds (`{paths['spec']}`); *near*: reference {paths['near']:g} below the baseline's score, at its density.",
        machine_line(paths),
        "",
        "| task | way | steps beside the baselines | hypervolume | near | score @ density by rising α |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(paths["runs"], key=lambda row: row["task"]):
        points = sorted((p for p in row["points"] if p["alpha"] > 0), key=lambda p: p["alpha"])
        said = ", ".join(f"{p['score']:.3f} @ {p['density']:.3f}" for p in points)
        areas = f"{row['hypervolume']:.4f} | {row['hypervolume_near']:.4f}"
        lines.append(f"| {row['task']} | {row['way']} | {row['steps_beside_baselines']:,} | {areas} | {said} |")
    return lines


def ratio(mine: float | None, other: float | None) -> str:
    """Return how many of another's steps these are."""
    return "" if mine is None or other is None else f"{mine / other:.2f}"


def is_slow(run: dict[str, Any]) -> bool:
    """Whether asking costs more than was allowed: a minute in all, or 20 ms for each of the last hundred trials."""
    return bool(run["seconds"] >= 60.0 or run["ms_per_trial_last_100"] >= 20.0)


def costs(found: dict[str, Any]) -> list[str]:
    """Return the table of milliseconds per trial."""
    late = {run["method"]: run["ms_per_trial_last_100"] for run in found["runs"]}
    slow = [f"{run['method']} ({late[run['method']]:.0f} ms)" for run in found["runs"] if is_slow(run)]
    return [
        "Asking, telling, journals and rungs on the *conditional* problem, in one run of so many trials, on one of",
        f"{found['machine']['cores']} CPU cores ({found['machine']['cpu']}); asked is less than 20 ms a trial. Without",
        "what a real sweep does beside at the end of each trial: records, fronts, MLflow.",
        f"Slower than that in the end: {'; '.join(slow)}.",
        f"Not measured here: {', '.join(sorted(METHODS.keys() - {r['method'] for r in found['runs']}))}.",
        "",
        "| method | trials | seconds | ms per trial | of the last 100 |",
        "|---|---|---|---|---|",
        *(
            f"| {r['method']} | {r['trials']:,} | {r['seconds']:.1f} | {r['ms_per_trial']:.1f} | "
            + (f"{last:.1f} |" if (last := r.get("ms_per_trial_last_100")) is not None else "– |")
            for r in found["runs"]
        ),
    ]


def draw(name: str, runs: Runs, path: Path) -> None:
    """Draw the hypervolumes of one problem over steps, for both reference points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 4.6), dpi=130)
    FigureCanvasAgg(figure)
    halving = [method for method in runs if "asha" in method.lower()]
    full = [method for method in runs if method not in halving]
    for panel, which in enumerate(("whole", "near")):
        axes = figure.add_axes((0.06 + 0.38 * panel, 0.12, 0.33, 0.79))
        for styled, style in ((halving, "-"), (full, "--")):
            for place, method in enumerate(m for m in styled if m not in OURS):
                curve = runs[method][which]["mean"]
                label = method if panel == 0 else None
                axes.plot(runs[method]["steps"], curve, style, color=COLOURS[place % 5], lw=1.2, label=label)
        for method, style in ((OURS[0], "-"), (OURS[1], "--")):
            if method in runs:
                _draw_ours(axes, runs[method]["steps"], runs[method][which], style, method if panel == 0 else None)
        axes.axhline(0.95, color="#333333", lw=0.6, ls=":")
        axes.set(xscale="log", xlabel="training steps", title=f"{name}, {which}")
        axes.set_ylim(max(0.0, min(run[which]["mean"][0] for run in runs.values()) - 0.05), 1.02)
        if panel == 0:
            axes.set_ylabel("share of the best known hypervolume")
    figure.legend(loc="center left", bbox_to_anchor=(0.79, 0.5), fontsize=8, frameon=False)
    figure.savefig(path)


def _draw_ours(axes: Any, steps: list[int], run: dict[str, Any], style: str, label: str | None) -> None:
    pairs = list(zip(run["mean"], run["half_interval"], strict=True))
    axes.fill_between(steps, [m - h for m, h in pairs], [m + h for m, h in pairs], color=STRONG, alpha=0.15, lw=0)
    axes.plot(steps, run["mean"], style, color=STRONG, lw=2.2, label=label)


#: Further parts of the page: their results' name, heading, and who writes them.
BESIDE = {
    "early_stopping": ("Early stopping on real trainings", stopping_table),
    "search_path": ("Along a path", path_table),
    "search_cost": ("What asking costs", costs),
}

if __name__ == "__main__":
    main()
