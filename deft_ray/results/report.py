"""What a sweep found, as a short Markdown page and the files that it links to."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from deft_ray.results import figures
from deft_ray.results.across import ALL_TASKS
from deft_ray.results.against import Found, compare_sweeps
from deft_ray.results.figure_html import draw_html
from deft_ray.results.figure_png import draw_png
from deft_ray.results.files import file_stem, write_text
from deft_ray.results.front import (
    REFERENCE,
    attainment,
    front,
    hypervolume,
    hypervolume_history,
    knee,
    lowest_density,
    points,
    to_csv,
    varying,
    write_front_csv,
)
from deft_ray.results.paired import with_paired_tests
from deft_ray.results.points import Point, merge
from deft_ray.results.records import STATUSES, Record

_TABLE_SETTINGS = 4
"""Settings shown in the table of a front; front.csv has them all."""

_DROPS = (0.0, 0.01)
"""Score drops within which the lowest density is named."""

_NO_BASELINE = "No usable baseline: nothing to compare these scores with."

_TIMES = (
    ("startup_s", "start-up"),
    ("train_s", "training"),
    ("eval_s", "evaluation"),
    ("rest_s", "trials beside it on its host, checkpoints"),
    ("wall_s", "whole trial"),
)


def write_results(
    run_dir: Path,
    spec_name: str,
    records: Iterable[Record],
    max_score_drop: float | None = None,
    stop_reason: str = "",
    extra: Mapping[str, Any] | None = None,
    *,
    ref: tuple[float, float] = REFERENCE,
    model: str = "",
    tracking_uri: str = "",
    against: tuple[str, Sequence[Record]] | None = None,
) -> list[Path]:
    """Write ``front.csv``, ``hypervolume.csv``, ``pareto-<task>.html|png|csv`` and ``report.md``, each all or nothing.

    Args:
        run_dir: Run directory.
        spec_name: Name of the spec, for the report's heading.
        records: All records so far; may be empty.
        max_score_drop: Score limit of the sweep, or None.
        stop_reason: Why the sweep ended.
        extra: Further facts for the report, by name.
        ref: Reference point of the hypervolume, score and density.
        model: Name of the model for the titles; taken from the records' settings if empty.
        tracking_uri: Where MLflow's data are, for the report; left out if empty.
        against: Name and records of another sweep to set this one beside, in the report.

    Returns:
        The files written, ``front.csv`` first and ``report.md`` last.

    Raises:
        RecordsError: If one task was measured in more than one dtype or activation,
            or the other sweep has no task of this one.
    """
    run_dir, records = Path(run_dir), list(records)
    found = with_paired_tests(points(records, max_score_drop), records, run_dir, max_score_drop or 0.0)
    fronts = {task: front(_of(found, task)) for task in _tasks(records)}
    written = [write_front_csv(run_dir / "front.csv", fronts, settings=varying(found))]
    attained = {task: attainment(_of(found, task)) for task in fronts}
    (run_dir / "attainment.csv").unlink(missing_ok=True)
    if any(attained.values()):
        written.append(_write_attainment(run_dir / "attainment.csv", attained))
    written.append(_write_history(run_dir / "hypervolume.csv", records, max_score_drop, ref))
    for task in fronts:
        written += write_figures(run_dir, records, task, max_score_drop, model, ref)
    report = write_report(
        run_dir,
        spec_name,
        records,
        found,
        max_score_drop,
        stop_reason,
        extra or {},
        ref=ref,
        tracking_uri=tracking_uri,
        against=against,
    )
    return [*written, report]


def _write_history(
    path: Path, records: Sequence[Record], max_score_drop: float | None, ref: tuple[float, float]
) -> Path:
    """Write each task's hypervolume after each of its trials, beside the steps that they took together."""
    rows = []
    for task in _tasks(records):
        mine, steps = [record for record in records if record.task == task], 0
        history = hypervolume_history(mine, task, max_score_drop, ref)
        for number, (record, volume) in enumerate(zip(mine, history, strict=True), start=1):
            steps += record.steps
            rows.append((task, number, record.trial, steps, volume))
    return write_text(path, to_csv(("task", "trials", "trial", "steps", "hypervolume"), rows))


def _write_attainment(path: Path, attained: Mapping[str, Mapping[int, Sequence[tuple[float, float]]]]) -> Path:
    """Write what of each task so many seeds attain."""
    rows = [
        (task, count, len(levels), density, score)
        for task, levels in attained.items()
        for count, corners in levels.items()
        for density, score in corners
    ]
    return write_text(path, to_csv(("task", "seeds_at_least", "seeds", "density", "score"), rows))


def write_figures(
    run_dir: Path,
    records: Iterable[Record],
    task: str,
    max_score_drop: float | None = None,
    model: str = "",
    ref: tuple[float, float] = REFERENCE,
) -> list[Path]:
    """Write the three files of one task's front; returns them."""
    figure = figures.front_figure_data(records, task, max_score_drop, model, ref)
    stem = file_stem("pareto", task)
    return [
        draw_html(figure, Path(run_dir) / f"{stem}.html"),
        draw_png(figure, Path(run_dir) / f"{stem}.png"),
        figures.write_csv(figure, Path(run_dir) / f"{stem}.csv"),
    ]


def write_report(
    run_dir: Path,
    spec_name: str,
    records: Sequence[Record],
    found: Sequence[Point],
    max_score_drop: float | None,
    stop_reason: str,
    extra: Mapping[str, Any],
    *,
    ref: tuple[float, float] = REFERENCE,
    tracking_uri: str = "",
    against: tuple[str, Sequence[Record]] | None = None,
) -> Path:
    """Write ``report.md`` of records and the points that were made of them; the rest as in :func:`write_results`.

    Returns:
        The file.
    """
    parts = [_heading(spec_name, records, max_score_drop, stop_reason, extra)]
    limit = max_score_drop or 0.0
    parts += [_task_part(task, _of(found, task), records, limit, ref) for task in _tasks(records)]
    if against is not None:
        parts.append(_beside(against[0], compare_sweeps(records, against[1], max_score_drop, ref), limit))
    parts += [_failures(records), _warnings(records), _time_split(records)]
    parts.append(_files(tracking_uri, (Path(run_dir) / "attainment.csv").is_file()))
    return write_text(Path(run_dir) / "report.md", "\n\n".join(part for part in parts if part) + "\n")


def first_line(cause: str | None) -> str:
    r"""The line of a cause that says what happened: its first one, or a traceback's last one.

    >>> first_line("Traceback (most recent call last):\n  File ...\nValueError: no rows\n")
    'ValueError: no rows'
    """
    lines = [line.strip() for line in (cause or "").splitlines() if line.strip()]
    if not lines:
        return "no cause recorded"
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]


def _tasks(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(record.task for record in records))


def _of(found: Iterable[Point], task: str) -> list[Point]:
    return [point for point in found if point.task == task]


def _heading(
    spec_name: str, records: Sequence[Record], max_score_drop: float | None, stop_reason: str, extra: Mapping[str, Any]
) -> str:
    counts = Counter(record.status for record in records if record.task != ALL_TASKS)
    trials = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status]) or "none"
    facts = {
        "Trials": trials,
        "Path": _path(records),
        "Score limit": _limit(max_score_drop),
        "Ended because": stop_reason,
        "Early stopping": early_stopping(records),
        "Packing": packing(records),
        "Memory of a host": host_memory(records),
        "Peak memory": _peak_memory(records),
        **extra,
    }
    lines = [f"- {_cell(name)}: {_cell(value)}" for name, value in facts.items() if value not in ("", None)]
    return "\n".join([f"# Sweep {_cell(spec_name)}", "", *lines])


def _peak_memory(records: Iterable[Record]) -> str:
    peaks = [record.peak_memory_gib for record in records if record.peak_memory_gib]
    return f"{max(peaks):.2f} GiB in the fullest worker, with all trials that it trained at once" if peaks else ""


def packing(records: Iterable[Record]) -> str:
    """Say how many trials hosts trained at once, and what passes that they shared have saved; nothing with one."""
    found = [record.packing for record in records if record.packing]
    most = max((int(mine.get("slots", 1)) for mine in found), default=1)
    passes, shared, part_s, alone_s, tokens, padding = (
        sum(mine.get(key, 0.0) for mine in found)
        for key in ("passes", "shared", "part_s", "alone_s", "tokens", "padding")
    )
    if most < 2:
        return ""
    told = f"up to {most} trials at once on a host; {shared / max(passes, 1):.0%} of {passes:,.0f} passes were shared"
    if tokens:
        told += f", with {padding / tokens:.1%} of padding to each other's length"
    if not alone_s:
        return told
    saved = f"{alone_s - part_s:,.0f} s of passes saved" if alone_s >= part_s else f"{part_s - alone_s:,.0f} s lost"
    return f"{told}, in {part_s:,.0f} s where {alone_s:,.0f} s are expected one by one ({saved})"


def host_memory(records: Iterable[Record]) -> str:
    """Say what hosts have measured: of each figure the largest, and the least of what was free."""
    found = [record.host_memory_gib for record in records if record.host_memory_gib]
    if not found:
        return ""
    base, slot, free = max(m["base"] for m in found), max(m["slot"] for m in found), min(m["free"] for m in found)
    return (
        f"{base:.2g} GiB before a trial, {slot:.2g} GiB for a trial at its longest; {free:.3g} GiB free beside the base"
    )


def early_stopping(records: Iterable[Record]) -> str:
    """Say what the scheduler saved; nothing where it stopped no trial.

    Lengths in epochs are steps by those of the task's baseline, which is never stopped.
    """
    records = list(records)
    pruned = [record for record in records if record.status == "pruned"]
    whole = {record.task: record for record in records if record.baseline and record.status == "complete"}
    saved = sum(planned - record.steps for record in pruned if (planned := _planned(record, whole)) is not None)
    trained = sum(record.steps for record in records if record.task != ALL_TASKS)
    if not saved:
        return ""
    share = saved / (saved + trained)
    return f"{len(pruned)} trials pruned: {trained:,} steps trained, {saved:,} ({share:.0%}) saved"


def _planned(record: Record, whole: Mapping[str, Record]) -> int | None:
    """Steps that a trial would have had; None if nothing tells."""
    mine: Mapping[str, Any] = record.config
    if mine.get("train.steps") is not None:
        return int(mine["train.steps"])
    baseline = whole.get(record.task)
    if baseline is None:
        return None
    its: Mapping[str, Any] = baseline.config
    epochs, batch = (mine[key] / its[key] for key in ("train.epochs", "train.batch_size"))
    return round(baseline.steps * epochs / batch)


def _beside(name: str, compared: Mapping[str, tuple[Found, Found]], limit: float) -> str:
    """Set this sweep beside another one."""
    header = ["task", "sweep", "trials", "steps", "hypervolume", f"lowest density within {limit:g}", "its score"]
    lines = [f"## Against {_cell(name)}", "", _line(header), _line(["---"] * len(header))]
    for task, (here, there) in compared.items():
        for which, found in (("this one", here), (name, there)):
            low = found.lowest
            ends = ["–", "–"] if low is None else [f"{low.density:.4f} ({low.name})", f"{low.score:.4f}"]
            lines.append(_line([task, which, found.trials, f"{found.steps:,}", f"{found.hypervolume:.4f}", *ends]))
        if there.steps and there.hypervolume:
            steps, area = here.steps / there.steps - 1, here.hypervolume / there.hypervolume - 1
            lines.append(
                _line([task, "difference", here.trials - there.trials, f"{steps:+.1%}", f"{area:+.2%}", "", ""])
            )
    return "\n".join(lines)


def _path(records: Sequence[Record]) -> str:
    onward = [record.steps for record in records if record.started_from]
    return f"{len(onward)} trials train on from another one as α rises, for up to {max(onward)} steps" if onward else ""


def _limit(max_score_drop: float | None) -> str:
    if max_score_drop is None:
        return "none"
    return f"a score may be {max_score_drop:g} below the baseline of its task and seed"


def _task_part(
    task: str, found: Sequence[Point], records: Sequence[Record], limit: float, ref: tuple[float, float]
) -> str:
    own = [record for record in records if record.task == task]
    chosen = front(found)
    trained = [point for point in found if not point.tau]
    complete = sum(point.status == "complete" for point in trained)
    shown = merge(found)
    infeasible = sum(not point.feasible for point in shown)
    points_told = f", {len(shown)} points" if len(shown) != complete else ""
    stem = file_stem("pareto", task)
    return "\n".join(
        [
            f"## {_cell(task)}",
            "",
            f"Hypervolume {hypervolume(found, ref):.4f} (reference: score {ref[0]:g}, density {ref[1]:g}). "
            f"Trials: {len(trained)}, {complete} complete{points_told}, of them {infeasible} infeasible and "
            f"{len(chosen)} on the front; {len(trained) - complete} not complete.{_landmarks(found, ref)}",
            "",
            _table(_rows_of(found, chosen), varying(found)[:_TABLE_SETTINGS], own[0].score_metric or "score", limit)
            or _why_no_rows(found),
            "",
            f"![Pareto front of {_cell(task)}]({stem}.png)",
            "",
            f"Interactive: [{stem}.html]({stem}.html) · data: [{stem}.csv]({stem}.csv)",
        ]
    )


def _landmarks(found: Sequence[Point], ref: tuple[float, float]) -> str:
    """Say which points a user will ask for first."""
    said = ""
    for drop in _DROPS:
        point = lowest_density(found, drop)
        if point is not None and not point.reference:
            said += f" Lowest density within {drop:g} of the baseline: {point.density:.4f} ({point.name})."
    bend = knee(found)
    if bend is not None:
        said += f" Knee: {bend.name} (score {bend.score:.4f}, density {bend.density:.4f})."
    return said + _rivals(found, ref)


def _rivals(found: Sequence[Point], ref: tuple[float, float]) -> str:
    """Set the whole front beside exact zeros alone, and beside the thresholded baseline."""
    if not any(point.tau for point in found):
        return ""
    exact = hypervolume((point for point in found if not point.tau), ref)
    rival = hypervolume((point for point in found if point.baseline), ref)
    return f" Hypervolume of exact zeros alone {exact:.4f}, of the baseline with thresholds alone {rival:.4f}."


def _rows_of(found: Sequence[Point], chosen: Sequence[Point]) -> list[Point]:
    """The usable baselines as they were trained, then the rest of the front by rising density."""
    baselines = [point for point in merge(found) if point.reference]
    return baselines + [point for point in chosen if not point.reference]


def _table(rows: Sequence[Point], settings: Sequence[str], metric: str, limit: float) -> str:
    """The table of a task; empty where there are no rows."""
    if not rows:
        return ""
    dialled = ["τ"] if any(point.tau for point in rows) else []
    measured = [f"{metric} ↑", "score drop ↓", "density ↓", "density change ↑", "on front"]
    several = any(point.seeds > 1 for point in rows)
    likely = ["P(front)"] if several else []
    tested = any(point.p_worse is not None for point in rows)
    paired = ["drop, 95 % of resamples", f"p(drop > {limit:g})"] if tested else []
    header = ["trial", "seeds" if several else "seed", *dialled, *measured, *likely, *paired, *settings]
    lines = [_line(header), _line(["---"] * len(header))]
    for point in rows:
        tau = [f"{point.tau:g}" if point.tau else "exact"] if dialled else []
        named, *cells = _cells(point)
        seed = str(point.seeds if several else point.seed)
        chance = [figures.short(point.front_probability)] if several else []
        varied = [figures.short(point.config.get(name)) for name in settings]
        lines.append(_line([named, seed, *tau, *cells, *chance, *(_paired_cells(point) if tested else []), *varied]))
    no_baseline = not any(point.reference for point in rows)
    return "\n".join(lines + ["", _NO_BASELINE] * no_baseline)


def _why_no_rows(found: Sequence[Point]) -> str:
    """Without a baseline a score limit admits nobody."""
    return _NO_BASELINE if any(point.measured for point in found) else "No trial has both a score and a density."


def _cells(point: Point) -> list[str]:
    return [
        f"{point.trial} (baseline)" if point.baseline else point.trial,
        f"{point.score:.4f}" + _plus_minus(point.score_std),
        "–" if point.score_drop is None else f"{point.score_drop:+.4f}",
        f"{point.density:.4f}" + _plus_minus(point.density_std),
        "–" if point.density_change is None else f"{100 * point.density_change:+.1f} %",
        "yes" if point.on_front else "no",
    ]


def _paired_cells(point: Point) -> list[str]:
    """Interval of the score drop over resampled validation examples, and the level of the test against the limit."""
    if point.drop_low is None or point.drop_high is None or point.p_worse is None:
        return ["–", "–"]
    return [f"{point.drop_low:+.4f} … {point.drop_high:+.4f}", f"{point.p_worse:.3f}"]


def _plus_minus(std: float | None) -> str:
    return "" if std is None else f" ± {std:.4f}"


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _failures(records: Sequence[Record]) -> str:
    ended = [record for record in records if record.status in ("failed", "diverged")]
    causes = [(f"{record.status}: {first_line(record.cause)}", record.trial) for record in ended]
    return _each_once("Trials that did not complete", causes)


def _warnings(records: Sequence[Record]) -> str:
    return _each_once("Warnings", [(record.warning, record.trial) for record in records if record.warning])


def _each_once(heading: str, said: Sequence[tuple[str, str]]) -> str:
    """Everything that was said of trials once, most frequent first, with the trials it was said of."""
    trials_of: dict[str, list[str]] = {}
    for text, trial in said:
        trials_of.setdefault(text, []).append(trial)
    if not trials_of:
        return ""
    ordered = sorted(trials_of.items(), key=lambda item: -len(item[1]))
    lines = [f"- {_cell(text)[:300]} ({len(trials)}×: {_some(trials)})" for text, trials in ordered]
    return "\n".join([f"## {heading}", "", *lines])


def _some(trials: Sequence[str]) -> str:
    return ", ".join(trials[:5]) + (", …" if len(trials) > 5 else "")


def _time_split(records: Sequence[Record]) -> str:
    complete = [record for record in records if record.status == "complete"]
    spent = {"wall_s": [record.wall_s for record in complete if record.wall_s == record.wall_s]}
    own = ("startup_s", "train_s", "eval_s")
    for name in own:
        spent[name] = [record.times[name] for record in complete if name in record.times]
    timed = [record for record in complete if record.times and record.wall_s == record.wall_s]
    spent["rest_s"] = [record.wall_s - sum(record.times.get(name, 0.0) for name in own) for record in timed]
    rows = [_line([words, f"{median(spent[name]):.1f}"]) for name, words in _TIMES if spent[name]]
    if not rows:
        return ""
    return "\n".join(["## Time of a trial", "", _line(["part", "median, s"]), _line(["---", "---"]), *rows])


def _files(tracking_uri: str, attained: bool) -> str:
    lines = ["## More", "", "- [front.csv](front.csv): the fronts of all tasks with every setting that varies"]
    lines += ["- [hypervolume.csv](hypervolume.csv): each task's hypervolume over trials and steps"]
    if attained:
        lines += ["- [attainment.csv](attainment.csv): what of each task so many seeds attain"]
    lines += ["- [records.jsonl](records.jsonl): one line per ended trial"]
    if tracking_uri.startswith(("http://", "https://", "databricks")):
        lines += [f"- MLflow: {tracking_uri}"]
    elif tracking_uri:
        lines += [f"- MLflow: `mlflow ui --backend-store-uri {shlex.quote(os.fspath(tracking_uri))}`"]
    return "\n".join(lines)
