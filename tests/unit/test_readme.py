"""The README's tables and figures are those that were measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
TASKS = ("nano-sentiment", "nano-question")


def test_the_table_of_what_goes_together_is_what_was_measured() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "support.json").read_text())["rows"]
    text = (ROOT / "README.md").read_text()
    table = text.split("<!-- support: made by benchmarks/support.py -->")[1].split("<!-- end of support -->")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
    kinds = [heading.split(",")[0] for heading in lines[0][2:]]

    assert len(rows) == 5 * 4 * 4 * 2, "approximations, adapters, stages, quantisations"
    assert all(len(row["baseline"]) == 2 for row in rows), "two seeds"
    seen = 0
    for adapter, base, *cells in lines[2:]:
        for kind, cell in zip(kinds, cells, strict=True):
            mine = [
                row
                for row in rows
                if (row["adapter"], row["approximation"], row["quantization"])
                == (adapter, kind, {"NF4": "nf4", "float32": "none"}[base])
            ]
            trained = [row for row in mine if row["density"] is not None]
            pairs = [pair for row in trained for pair in zip(row["density"], row["baseline"], strict=True)]
            falls = [1 - density / before for density, before in pairs]
            seen += len(mine)
            if all(fall > 0 for fall in falls) and len(falls) == 4 * 2:
                assert cell == f"0 to 3 (-{100 * min(falls):.1f} %)"
            else:
                assert not cell.startswith("0 to 3")
    assert seen == len(rows)


def result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def figures(row: str) -> list[float]:
    """The numbers of the README's row that begins so, shapes and counts among them."""
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| {row}"))
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", line.removeprefix(f"| {row}"))]


#: Blocks as they are and in one function; kinds of checkpointing, and of evaluations.
BLOCKS = ("deft", "fused_deft")
ASKED = (*BLOCKS, "ada_deft")
KINDS, EVALUATIONS = ("none", "non-reentrant", "reentrant"), ("forward", "likelihood", "generation")


def percents(ways: list[dict[str, float]]) -> list[float]:
    """What is added, of ratios of the whole over the rest."""
    return [round(100 * (way["median"] - 1), 1) for way in ways]


def highest(ways: list[dict[str, float]]) -> float:
    """The highest upper quartile of what is added, in percent."""
    return round(100 * (max(way["upper_quartile"] for way in ways) - 1), 1)


def test_what_the_density_loss_costs_is_what_was_measured() -> None:
    found = result("density_loss_base_none_float32_cpu")
    saved, added = found["saved_for_backward"], found["added_to_steps"]
    more = [saved[kind]["bytes_per_activation_beyond_peft"] for kind in KINDS]
    assert all(kind["deft"] == kind["fused_deft"] - kind["fused_peft"] == 0 for kind in more)
    ways, adaptive = ([added[kind][way] for kind in KINDS for way in which] for which in (BLOCKS, ("ada_deft",)))
    assert figures("computing added to a step by the density loss, Flan-T5-base shape, 4 x 128 tokens") == [
        *percents(ways), 15, *percents(adaptive), 3, more[0]["naive"], more[1]["naive"]
    ]  # fmt: skip
    assert all(way["count"] == 15 for way in (*ways, *adaptive))
    assert max(way["upper_quartile"] for way in (*ways, *adaptive)) <= 1.03, "as was asked"
    fused, stock, naive = figures("kept for the backward pass per activation of a gated MLP, float")[1:]
    assert (fused - stock, naive - stock) == (more[0]["fused_deft"], more[0]["naive"])

    whole = [found["steps"][kind]["over_alpha_0"] for kind in KINDS]
    steps = [kind[block] for kind in whole for block in BLOCKS]
    control, adaptive = ([round(kind[way]["median"], 2) for kind in whole] for way in ("peft_again", "ada_deft"))
    naive_way = [round(kind[way]["median"], 2) for kind in whole for way in ("naive", "naive_float32")]
    assert figures("whole steps with the density loss over those without, in turn") == [
        *(round(step["median"], 2) for step in steps), 15, *ends(steps), 1.03, *control, *adaptive, min(naive_way),
        max(naive_way),
    ]  # fmt: skip
    assert all(step["count"] == 15 for step in steps)
    assert max(kind[way]["median"] for kind in whole for way in ASKED) <= 1.03, "as was asked"


def test_what_exact_counts_cost_is_what_was_measured() -> None:
    found = result("density_loss_base_none_float32_cpu")
    added, whole = ([found[part][kind] for kind in EVALUATIONS] for part in ("added_to_evaluation", "evaluation"))
    ways, mapped = ([kind[way] for kind in added] for way in ("counting", "counting_with_map"))
    question = found["added_to_evaluation"]["measured"]["shape"]["question"]
    assert figures("computing added to an evaluation by exact counts") == [
        *percents(ways), 15, *percents(mapped), highest(mapped), 5, question
    ]  # fmt: skip
    assert all(way["count"] == 15 for way in (*ways, *mapped))
    assert max(way["median"] for way in mapped) <= 1.05, "as was asked"
    assert max(way["upper_quartile"] for way in ways) <= 1.05, "as was asked"
    above = [kind for kind, way in zip(EVALUATIONS, mapped, strict=True) if way["upper_quartile"] > 1.05]
    assert above == ["generation"], "as the README says"
    ways, mapped, control = (
        [kind[f"{way}_over_plain"] for kind in whole] for way in ("counting", "counting_with_map", "plain_again")
    )
    assert figures("whole evaluations with exact counts over those without, in turn") == [
        *(round(way["median"], 2) for way in (*ways, *mapped)), 28, *ends(ways), 1.05,
        *(round(way["median"], 2) for way in control),
    ]  # fmt: skip
    assert {way["count"] for way in (*ways, *mapped)} == {28}
    assert max(way["median"] for way in (*ways, *mapped)) <= 1.05, "as was asked"


def ends(ways: list[dict[str, float]]) -> list[float]:
    """The lowest lower and the highest upper quartile."""
    return [
        round(min(way["lower_quartile"] for way in ways), 2), round(max(way["upper_quartile"] for way in ways), 2)
    ]  # fmt: skip


def test_what_padding_and_starting_cost_is_what_was_measured() -> None:
    tasks = [result("padding")["tasks"][name] for name in ("squad", "rte", "sst2")]
    said = figures("real tokens per second, batches of like length over fixed length")
    ratios = [round(task["grouped_over_fixed"]["median"], 1) for task in tasks]
    shares = [round(100 * task["real_share_grouped"]) for task in tasks]
    assert said == [*ratios[:2], 2, ratios[2], 12, *shares]  # the 2 is SST-2's
    assert min(ratios) >= 2, "as was asked, and the shares"
    assert min(shares) >= 90
    start = result("start_up")
    host, fit = start["host_startup_s"], start["fit_per_trial_startup_s"]
    assert figures("from the end of a trial to the first step of the next, two workers") == [
        round(host["median"], 2), host["count"], round(fit["median"], 1), round(start["ratio_of_medians"])
    ]  # fmt: skip
    walls = result("command")["wall_s"]
    medians = [round(walls[name]["median"], 2) for name in ("help", "plan", "spec_error")]
    assert figures("`--help`, `--plan`, a faulty spec")[:4] == [*medians, walls["help"]["count"]]
    many, quick = result("orchestration_with_overrides"), result("orchestration")
    ends = quick["before_first_trial_s"] + quick["after_last_trial_s"]
    assert figures("wall time over training and evaluation, nano sweep of")[0] == many["trials"]
    assert figures("wall time over training and evaluation, nano sweep of")[1:] == [
        round(many["wall_over_work"], 2), quick["trials"], round(quick["wall_over_work"], 2), round(ends),
        round(quick["wall_s"]),
    ]  # fmt: skip


def test_what_a_path_finds_is_what_was_measured() -> None:
    runs = {(run["task"], run["way"]): run for run in result("search_path")["runs"]}
    whole, near = (
        [round(100 * runs[task, "along a path"][key] / runs[task, "from scratch"][key]) for task in TASKS]
        for key in ("hypervolume", "hypervolume_near")
    )
    key = "steps_beside_baselines"
    steps = {runs[task, "from scratch"][key] // runs[task, "along a path"][key] for task in TASKS}
    text = " ".join((ROOT / "README.md").read_text().split())
    assert steps == {4}
    assert f"it found {whole[0]} and {whole[1]} % of the hypervolume, and {near[0]} and {near[1]} % of the part" in text


def test_slots_in_one_pass_are_as_fast_as_measured() -> None:
    found = result("packing_base_nf4_float32_cpu")
    over = {row["slots"]: row["one_by_one_over_together"] for row in found["slots"]["steps"]}
    wanted = [over[4]["median"], over[4]["count"], over[4]["lower_quartile"], over[4]["upper_quartile"]]
    wanted += [over[2]["median"], over[8]["median"], found["routing"]["four_quarters_over_one_whole"]["median"], 1.15]
    wanted.append(result("packing_nano_nf4_float32_cpu")["routing"]["four_quarters_over_one_whole"]["median"])
    # "Flan-T5", "NF4" and "4 x 64" have figures of their own
    assert figures("four slots in one pass")[4:] == [round(figure, 2) for figure in wanted]


def test_what_others_wait_for_an_evaluation_is_what_was_measured() -> None:
    base, nano = (result(f"packing_{shape}_nf4_float32_cpu")["evaluation"] for shape in ("base", "nano"))
    parts = [base["nano-sentiment"], nano["nano-sentiment"], nano["nano-question"]]
    pieces, whole = ([part[way]["piece_over_step"] for part in parts] for way in ("pieces", "whole_batches"))
    wanted = [piece[which] for piece in pieces for which in ("median", "most")]
    longer = [
        part["pieces"]["evaluation_s"]["median"] / part["whole_batches"]["evaluation_s"]["median"] for part in parts
    ]
    said = figures("what three trials in training wait for one that is evaluated")
    # "Flan-T5", "NF4", "4 x 64" and batches of 64 have figures of their own
    assert said[4:10] == [round(figure, 2) for figure in wanted]
    assert said[11:] == [round(figure, 2) for figure in (*(batch["most"] for batch in whole), *longer)]
    assert max(piece["median"] for piece in pieces) <= 1, "no longer than a step, as was asked"


def test_memory_of_slots_is_what_was_measured() -> None:
    found = result("packing_xl_nf4_float32_checkpointed_cpu")
    one, eight = found["slots"]["steps"]
    each = {row["slots"]: row["peak_gib"]["together"] / row["slots"] for row in (one, eight)}
    assert each[8] / each[1] <= 1 / 3
    wanted = [round(each[8] / each[1], 2), round(each[8], 1), round(each[1], 1)]
    wanted.append(round(eight["one_by_one_over_together"]["median"], 2))
    # "Flan-T5", "NF4" and "4 x 64" have figures of their own
    assert figures("peak memory per trial, eight slots")[4:] == wanted


def test_the_makespan_of_a_larger_shape_is_what_was_measured() -> None:
    found = result("makespan_base")
    (one, four), fits = found["sweeps"], found["fits"]
    assert [one["slots"], four["slots"], len(fits["each_s"])] == [1, 4, 4]
    wanted = [round(one["makespan_s"]), round(four["makespan_s"]), round(four["one_slot_over_this"], 2), 1.4]
    wanted += [round(fits["makespan_s"]), 4, round(found["sweep_over_fits"]["4"], 2)]
    wanted += [round(one["peak_gib"], 1), round(four["peak_gib"], 1)]
    # "20 steps", "Flan-T5", "NF4" and "4 x 64" have figures of their own
    assert figures(f"a sweep of {found['trials']} trials of")[5:] == wanted


def test_a_sweeps_makespan_is_what_was_measured() -> None:
    found = result("makespan")
    seconds = [round(each["makespan_s"]) for each in found["sweeps"]]
    assert [each["slots"] for each in found["sweeps"]] == [1, 2, 4, 8]
    share = round(found["sweep_over_fits"]["4"], 3)
    wanted = [4, *seconds, round(found["fits"]["makespan_s"]), share, 0.125]
    # the last figure is of the run before, which docs/log.md has
    assert figures(f"a sweep of {found['trials']} nano trials")[:-1] == wanted
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"batches of 4 take {seconds[2]} s in place of {seconds[0]}" in text


def test_what_slots_do_to_the_quickstart_is_what_was_measured() -> None:
    found = result("quickstart_slots")
    one, shipped = (round(median(run["wall_s"] for run in found["rounds"][way])) for way in ("one", "shipped"))
    told, count = found["told_saved_s"], found["told_saved_s"]["count"]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"it takes {shipped} s where it takes {one} with `slots_per_host: 1` (medians of {count})" in text
    assert f"for the {round(told['median'])} s of passes that it tells it has saved" in text


def test_what_early_stopping_saves_and_loses_is_what_was_measured() -> None:
    tasks = result("early_stopping")["tasks"]
    saved = [round(100 * (1 - task["with"]["steps"] / task["without"]["steps"])) for task in tasks]
    lost = [100 * (1 - task["with"]["hypervolume"] / task["without"]["hypervolume"]) for task in tasks]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"saved {saved[0]} and {saved[1]} % of the steps and lost {lost[0]:.1f} and {lost[1]:.0f} %" in text
