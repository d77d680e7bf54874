"""The page of the search says what was measured."""

from __future__ import annotations

import importlib
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
#: Problems that have been measured; ``search_cost`` and ``search_path`` are something else.
MEASURED = sorted(
    file.stem.removeprefix("search_")
    for file in RESULTS.glob("search_*.json")
    if "references" in json.loads(file.read_text())
)


def test_the_recorded_table_is_measured() -> None:
    assert "nano" in MEASURED


@pytest.mark.parametrize("which", ["whole", "near"])
@pytest.mark.parametrize("name", MEASURED)
def test_the_tables_are_what_was_measured(name: str, which: str) -> None:
    result = json.loads((RESULTS / f"search_{name}.json").read_text())
    runs = {run["method"]: run[which] for run in result["runs"]}
    text = (ROOT / "docs" / "search.md").read_text().split(f"\n### {name}, {which}: ")[1]
    part = re.split(r"\n##|\n!", text)[0]
    assert part.startswith("reference score {:.3g}, density {:.3g}\n".format(*result["references"][which]))
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]
    assert {row[0] for row in rows[2:]} == runs.keys()
    assert len(rows) - 2 == len(runs) == 11
    assert result["seeds"] >= 20

    def median(method: str) -> float:
        reached = runs[method]["steps_to_enough"]
        assert len(reached) == result["seeds"]
        return statistics.median([float("inf") if steps is None else steps for steps in reached])

    assert [median(row[0]) for row in rows[2:]] == sorted(map(median, runs))
    for method, _, last, to_enough, of_random, of_tpe in rows[2:]:
        mean, half = map(float, last.split(" ± "))
        assert mean == pytest.approx(runs[method]["mean"][-1], abs=6e-4)
        assert half == pytest.approx(runs[method]["half_interval"][-1], abs=6e-4)
        reached = sum(steps is not None for steps in runs[method]["steps_to_enough"])
        assert to_enough.endswith(f"({reached} of {result['seeds']})")
        if median(method) == float("inf"):
            assert (to_enough[:3], of_random, of_tpe) == ("not", "", "")
            continue
        assert float(re.sub("[,]", "", to_enough.split(" ")[0])) == pytest.approx(median(method), abs=1)
        for cell, other in ((of_random, "random"), (of_tpe, "tpe")):
            if median(other) == float("inf"):
                assert cell == ""
            else:
                assert float(cell) == pytest.approx(median(method) / median(other), abs=6e-3)
    assert (ROOT / "docs" / "images" / f"search-{name}.png").is_file()


def table_of(heading: str) -> list[list[str]]:
    """Cells of the table under a heading, without its own."""
    part = (ROOT / "docs" / "search.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def measured(name: str) -> dict[str, Any]:
    """A result; empty where it has not been measured, which the page says."""
    file = RESULTS / f"{name}.json"
    content: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"tasks": [], "runs": []}
    return content


def test_what_early_stopping_saves_and_loses_is_what_was_measured() -> None:
    rows = table_of("Early stopping on real trainings")
    found = measured("early_stopping")["tasks"]
    assert [row[0] for row in rows] == [task["task"] for task in found]
    for (_, here, there, saved, *points, area, whole, lost, _, _), task in zip(rows, found, strict=True):
        mine, other = task["with"], task["without"]
        own = [one["steps"] - one["front_seed_steps"] for one in (mine, other)]
        assert [int(cell.replace(",", "")) for cell in points[:2]] == own
        assert float(points[2].rstrip("%")) == pytest.approx(100 - 100 * own[0] / own[1], abs=0.06)
        assert [int(cell.replace(",", "")) for cell in (here, there)] == [mine["steps"], other["steps"]]
        assert [float(area), float(whole)] == pytest.approx([mine["hypervolume"], other["hypervolume"]], abs=6e-5)
        share = 100 * (other["steps"] - mine["steps"]) / other["steps"]
        assert float(saved.rstrip("%")) == pytest.approx(share, abs=0.06)
        share = 100 * (other["hypervolume"] - mine["hypervolume"]) / other["hypervolume"]
        assert float(lost.rstrip("%")) == pytest.approx(share, abs=0.006)


def test_what_a_path_finds_is_what_was_measured() -> None:
    found = {(run["task"], run["way"]): run for run in measured("search_path")["runs"]}
    rows = table_of("Along a path")
    assert {(row[0], row[1]) for row in rows} == found.keys()
    assert len(rows) == 2 * 2, "two tasks, two ways"
    for task, way, steps, area, near, _ in rows:
        run = found[task, way]
        assert int(steps.replace(",", "")) == run["steps_beside_baselines"]
        assert [float(area), float(near)] == pytest.approx([run["hypervolume"], run["hypervolume_near"]], abs=6e-5)


def test_what_asking_costs_is_what_was_measured() -> None:
    found = {run["method"]: run for run in measured("search_cost")["runs"]}
    rows = table_of("What asking costs")
    assert {row[0] for row in rows} == found.keys()
    for method, trials, _, each, last in rows:
        assert int(trials.replace(",", "")) == found[method]["trials"]
        assert float(each) == pytest.approx(found[method]["ms_per_trial"], abs=0.06)
        if (late := found[method].get("ms_per_trial_last_100")) is not None:
            assert float(last) == pytest.approx(late, abs=0.06)


def test_who_asks_for_more_than_was_allowed_is_named() -> None:
    """A minute for 1,000 trials, 20 ms for each of the last hundred: ours are below, with halving and without."""
    found = {run["method"]: run for run in measured("search_cost")["runs"]}
    slow = [
        f"{name} ({run['ms_per_trial_last_100']:.0f} ms)"
        for name, run in found.items()
        if run["seconds"] >= 60.0 or run["ms_per_trial_last_100"] >= 20.0
    ]
    assert not {"mo_tpe", "mo_tpe, mo_asha"} & {name.split(" (")[0] for name in slow}
    text = " ".join((ROOT / "docs" / "search.md").read_text().split())
    assert f"Slower than that in the end: {'; '.join(slow)}." in text


def test_the_page_is_what_its_command_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "search"))
    page = importlib.import_module("page")
    results = {name: found for name in page.PROBLEMS if (found := page._read(f"search_{name}"))}
    by_problem = {name: {run["method"]: run for run in result["runs"]} for name, result in results.items()}
    assert page.page(results, by_problem) == (ROOT / "docs" / "search.md").read_text()


def test_what_of_the_aims_is_reached_is_said() -> None:
    runs = {run["method"]: run["whole"]["steps_to_enough"] for run in measured("search_nano")["runs"]}
    steps = {method: statistics.median(step or float("inf") for step in found) for method, found in runs.items()}
    text = (ROOT / "docs" / "search.md").read_text()
    for method in ("mo_tpe, mo_asha", "mo_tpe"):
        shares = [steps[method] / steps[other] for other in ("random", "tpe")]
        assert f"`{method}`, *whole*: {shares[0]:.2f} and {shares[1]:.2f};" in text
