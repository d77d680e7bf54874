"""The page of PEFT against DEFT says what was measured."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TASKS = ("sst2", "stsb", "mrpc", "rte", "cola")


def test_the_page_is_what_was_measured() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "paper_table.json").read_text())
    text = (ROOT / "docs" / "results.md").read_text()
    table = text.split("## The published rows")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    assert lines[0][2:] == ["SST-2", "STS-B", "MRPC", "RTE", "CoLA", "mean"]

    module, what, seen = "", "", 0
    baseline: list[float] = []
    for named, method, *cells in lines[2:]:
        module, what = named.split(" (")[0] or module, method if "score" in method else what
        alpha = float(re.search(r"α = ([\d.]+)", what)[1]) if "DEFT" in what else 0.0  # type: ignore[index]
        mine = [row for row in result["rows"] if row["adapter"] == module and row["config"]["deft.alpha"] == alpha]
        found = [means(mine, "score" if "score" in method else "density", task) for task in TASKS]
        if "PEFT" in what and method == "density":
            baseline = found
        if method == "change":
            found = [100 * (before - after) / before for before, after in zip(baseline, found, strict=True)]
        want = [*found, sum(found) / len(found)]
        digits = 1 if method == "change" else 2
        assert [float(cell) for cell in cells] == [round(value, digits) for value in want], (module, what, method)
        seen += len(mine) if method == "density" else 0
    assert seen == len(result["rows"]) == 2 * 3 * 5 * len({row["seed"] for row in result["rows"]})
    assert all(row["status"] == "complete" for row in result["rows"])


def test_the_published_rows_are_those_of_the_paper() -> None:
    """The file's own mean and change, where a table prints them, agree with the cells."""
    text = (ROOT / "docs" / "results.md").read_text().split("## The published rows")[1].split("\n## ")[0]
    with (ROOT / "benchmarks" / "published_table1.csv").open() as file:
        cells = {(row["module"], row["method"], row["task"]): row for row in csv.DictReader(file)}
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert len(lines) == 2 + 2 * 5
    module, method = "", ""
    for named, what, *numbers in lines[2:]:
        module, method = named or module, what.split(",")[0] if "score" in what else method
        key = {"density": "density", "change": "density_change"}.get(what, "score")
        want = [float(cells[module, method, task][key]) for task in TASKS]
        want = [round(value, 1 if what == "change" else 2) for value in want]
        assert [float(number) for number in numbers[:-1]] == want, (module, what)
        assert float(numbers[-1]) == pytest.approx(sum(want) / len(want), abs=0.051)
    for task in TASKS:
        for kind in ("bottleneck", "lora"):
            before, after = (float(cells[kind, method, task]["density"]) for method in ("PEFT", "DEFT"))
            change = float(cells[kind, "DEFT", task]["density_change"])
            assert change == pytest.approx(100 * (before - after) / before, abs=0.2), (kind, task)


def test_the_search_on_real_data_is_what_was_measured() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "real_front.json").read_text())
    text = (ROOT / "docs" / "results.md").read_text().split("\n## The search\n")[1]
    assert len(result["tasks"]) == text.count("\n### ")
    for found, part in zip(result["tasks"], text.split("\n### ")[1:], strict=True):
        tables = [
            [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]]
            for block in re.findall(r"(?:^\|.*\n)+", part, re.M)
        ]
        areas, points, beside = tables
        assert {name: float(area) for name, area in areas} == pytest.approx(found["hypervolumes"], abs=6e-5)
        known = {(p["trial"], p["tau"]): p for p in (*found["baseline"], *found["recipe"], *found["front"])}
        assert len(points) == len(known)
        assert [float(row[5].split()[0]) for row in points] == sorted(
            (float(r[5].split()[0]) for r in points), reverse=True
        )
        for trial, tau, _, seeds, score, density, drop, worse, _ in points:
            point = known[trial, 0.0 if tau == "exact" else float(tau)]
            assert int(seeds) == point["seeds"]
            assert float(score.split()[0]) == pytest.approx(point["score"], abs=6e-5)
            assert float(density.split()[0]) == pytest.approx(point["density"], abs=6e-5)
            if point["on_front"]:
                assert [float(end) for end in drop.split(" … ")] == pytest.approx(
                    [point["drop_low"], point["drop_high"]], abs=6e-5
                )
                assert float(worse) == pytest.approx(point["p_worse"], abs=6e-4)
        assert all(point["seeds"] == found["front_seeds"] == 3 for point in found["front"])
        assert len(beside) == len(found["rivals"])
        for row, rival in zip(beside, found["rivals"], strict=True):
            for place, which in ((3, "same_tau"), (5, "no_denser"), (7, "recipe")):
                other = rival[which]
                if other is None:
                    assert which == "no_denser", "every point has the same τ and the recipe beside it"
                    assert row[place : place + 2] == ["none is as sparse", "–"]
                    continue
                said = [float(number) for number in re.findall(r"[\d.]+", row[place])]
                assert said[:2] == pytest.approx([other["score"], other["density"]], abs=6e-5)
                gain = [float(number) for number in re.findall(r"[+-][\d.]+", row[place + 1])]
                assert gain == pytest.approx([other["gain"], other["low"], other["high"]], abs=6e-5)
                assert other["gain"] == pytest.approx(rival["score"] - other["score"], abs=1e-9)
                assert other["seeds"] == found["front_seeds"]
        surely = sum(rival["same_tau"]["low"] > 0 for rival in found["rivals"])
        assert f"{surely} of {len(beside)} gain more than nothing" in part


def means(rows: list[dict[str, Any]], key: str, task: str) -> float:
    values = [row[key] for row in rows if row["task"] == task]
    return 100 * float(sum(values)) / len(values)
