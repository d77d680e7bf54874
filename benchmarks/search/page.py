"""Make docs/search.md and its plots of results/search_*.json.

python benchmarks/search/page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS, PAGE, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "search.md", ROOT / "docs" / "images"

OURS = "mo_tpe, mo_asha"
PROBLEMS = {
    "nano": "recorded: 210 settings of α, ε, β, approximation, λ-init and learning rate, trained on the nano model's "
    "sentiment task for 81 steps; score limit 0.01; a budget of 120 trials",
    "smooth": "closed form: one good valley of ε, a learning rate; score limit 0.1; a budget of 60 trials",
    "crossing": "closed form: who leads early loses in the end",
    "conditional": "closed form: ε with l0, β with sigmoid, λ-init where adaptive",
}
METHODS = {
    "random": "random points, full length",
    "nsga2": "Optuna's NSGA-II, full length",
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
#: Okabe and Ito's colours, and two line styles.
COLOURS = ("#999999", "#E69F00", "#56B4E9", "#009E73", "#CC79A7")
STRONG = "#D55E00"

Runs = dict[str, dict[str, Any]]


def main() -> None:
    """Write the page and a plot of each problem."""
    files = {name: RESULTS / f"search_{name}.json" for name in PROBLEMS}
    results = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}
    cost = json.loads((RESULTS / "search_cost.json").read_text(encoding="utf-8"))
    by_problem = {name: {run["method"]: run for run in result["runs"]} for name, result in results.items()}
    for name, runs in by_problem.items():
        draw(name, runs, IMAGES / f"search-{name}.png")
    PAGE.write_text(page(next(iter(results.values())), by_problem, cost["runs"]), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)} and {len(by_problem)} plots")


def page(result: dict[str, Any], by_problem: dict[str, Runs], cost: list[dict[str, Any]]) -> str:
    """Return the page; what all results share is taken from one of them."""
    lines = [
        "# How fast the search finds a front",
        "",
        "Made by `python benchmarks/search/compare.py` and `python benchmarks/search/page.py`; the figures are in",
        "`benchmarks/results/search_*.json`. The real schedule, searchers and rungs run without training: a clock of",
        "steps, four workers, and an oracle in place of a model. The recorded table is",
        "`benchmarks/search/nano_trials.parquet`, which `benchmarks/search/record.py` makes.",
        "",
        f"Hypervolume of the feasible points (reference: score {result['reference'][0]:g}, density",
        f"{result['reference'][1]:g}) as a share of the best known one: means over {result['seeds']} seeds with 95 %",
        "intervals; *to 95 %*: the median over seeds of the training steps until 95 % of it is reached, and in how",
        "many of them it was. The budget counts steps, not trials.",
        f"Machine: {result['machine']['cores']} CPU cores ({result['machine']['cpu']}). Measured {result['at']}.",
        "",
        "| method | what it is |",
        "|---|---|",
        *(f"| {name} | {what} |" for name, what in METHODS.items()),
    ]
    for name, runs in by_problem.items():
        lines += ["", f"## {name}", "", f"{PROBLEMS[name]}.".capitalize(), "", *table(runs, result["seeds"]), ""]
        lines.append(f"![Hypervolume over steps, {name}](images/search-{name}.png)")
    lines += ["", "## What asking costs", "", *costs(cost), ""]
    return "\n".join(lines)


def table(runs: Runs, seeds: int) -> list[str]:
    """Return one problem's table, methods by their steps to enough, then by what they reached."""
    steps = next(iter(runs.values()))["steps"]
    budget = steps[-1]
    early = next(place for place, step in enumerate(steps) if step >= budget // 8)
    lines = [
        f"| method | at {steps[early]:,} steps | at {budget:,} steps | to 95 % | of random's | of tpe's |",
        "|---|---|---|---|---|---|",
    ]
    to_enough = {name: run["median_steps_to_enough"] for name, run in runs.items()}
    ordered = sorted(runs, key=lambda name: (to_enough[name] or float("inf"), -runs[name]["mean"][-1]))
    for name in ordered:
        run, mine = runs[name], to_enough[name]
        reached = sum(steps is not None for steps in run["steps_to_enough"])
        cells = [f"{run['mean'][place]:.3f} ± {run['half_interval'][place]:.3f}" for place in (early, -1)]
        cells.append(f"{mine:,.0f} ({reached} of {seeds})" if mine is not None else f"not ({reached} of {seeds})")
        cells += [ratio(mine, to_enough.get(other)) for other in ("random", "tpe")]
        lines.append(f"| {f'**{name}**' if name == OURS else name} | " + " | ".join(cells) + " |")
    return lines


def ratio(mine: float | None, other: float | None) -> str:
    """Return how many of another's steps these are."""
    return "" if mine is None or other is None else f"{mine / other:.2f}"


def costs(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of milliseconds per trial."""
    return [
        "Asking, telling, journals and rungs on the *conditional* problem, in one run of so many trials:",
        "",
        "| method | trials | seconds | ms per trial |",
        "|---|---|---|---|",
        *(f"| {r['method']} | {r['trials']:,} | {r['seconds']:.1f} | {r['ms_per_trial']:.1f} |" for r in rows),
    ]


def draw(name: str, runs: Runs, path: Path) -> None:
    """Draw the hypervolumes of one problem over steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.6), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.09, 0.12, 0.58, 0.8))
    halving = [method for method in runs if "asha" in method.lower()]
    for styled, style in ((halving, "-"), ([method for method in runs if method not in halving], "--")):
        for place, method in enumerate(m for m in styled if m != OURS):
            axes.plot(
                runs[method]["steps"], runs[method]["mean"], style, color=COLOURS[place % 5], lw=1.2, label=method
            )
    ours = runs[OURS]
    low = [m - h for m, h in zip(ours["mean"], ours["half_interval"], strict=True)]
    high = [m + h for m, h in zip(ours["mean"], ours["half_interval"], strict=True)]
    axes.fill_between(ours["steps"], low, high, color=STRONG, alpha=0.2, lw=0)
    axes.plot(ours["steps"], ours["mean"], "-", color=STRONG, lw=2.2, label=OURS)
    axes.axhline(0.95, color="#333333", lw=0.6, ls=":")
    axes.set(xscale="log", xlabel="training steps", ylabel="share of the best known hypervolume", title=name)
    axes.set_ylim(max(0.0, min(run["mean"][0] for run in runs.values()) - 0.05), 1.02)
    figure.legend(loc="center left", bbox_to_anchor=(0.68, 0.5), fontsize=8, frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
