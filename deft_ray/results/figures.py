"""The picture of one task's front as data that can be compared with ``==``, and what its drawings share."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deft_ray.results.files import write_text
from deft_ray.results.front import REFERENCE, attainment, front, hypervolume, points, to_csv, varying
from deft_ray.results.points import Point, merge
from deft_ray.results.records import STATUSES, Record

FRONT, DOMINATED, INFEASIBLE, BASELINE = "front", "dominated", "infeasible", "baseline"

X_LABEL = "density, fraction of non-zero MLP activations ↓"

BLUE, VERMILION, GREY, DARK = "#0072B2", "#D55E00", "#8C8C8C", "#333333"
"""Blue and vermilion of Okabe and Ito's palette for all forms of colour vision; the rest is told by shape and fill."""

_MODEL_KEYS = ("model.name", "model.path", "model.id", "model")
_HOVER_SETTINGS = 20
NOTHING = "No trial of this task has both a score and a density."


@dataclass(frozen=True)
class Mark:
    """One measured trial in the plane.

    Args:
        trial: Name of the trial.
        seed: Its seed.
        density: Horizontal place.
        score: Vertical place.
        role: ``front``, ``dominated``, ``infeasible`` or ``baseline``.
        on_front: Whether it stands on the front; a baseline can.
        tau: Its threshold; 0 where density is of exact zeros.
        spread: Standard deviations of density and score over seeds; zeros for one seed.
        detail: What a reader sees when pointing at it: (name, value) pairs.
    """

    trial: str
    seed: int
    density: float
    score: float
    role: str
    on_front: bool
    tau: float = 0.0
    spread: tuple[float, float] = (0.0, 0.0)
    detail: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class FrontFigure:
    """All that is drawn for one task.

    Args:
        task: The task.
        title: Task, model, dtype and activation.
        x_label: Meaning, unit and sense of the horizontal axis.
        y_label: The same of the vertical axis.
        caption: Counts of what is drawn and of what is not.
        marks: Measured trials in record order.
        stairs: Corners (density, score) of the line that separates what the front dominates, from low density to high.
        exact_stairs: The same of exact zeros alone, where there are thresholded points beside them.
        rival_stairs: The same of the baseline with thresholds, where it has some.
        attained_stairs: The same of what every seed attains, where settings have several.
        score_limit: Lowest admissible score, where there is a limit and exactly one baseline to apply it to.
        table: Header and rows of the CSV.
    """

    task: str
    title: str
    x_label: str
    y_label: str
    caption: str
    marks: tuple[Mark, ...]
    stairs: tuple[tuple[float, float], ...]
    exact_stairs: tuple[tuple[float, float], ...]
    rival_stairs: tuple[tuple[float, float], ...]
    attained_stairs: tuple[tuple[float, float], ...]
    score_limit: float | None
    table: tuple[tuple[Any, ...], ...]


def front_figure_data(
    records: Iterable[Record],
    task: str,
    max_score_drop: float | None = None,
    model: str = "",
    ref: tuple[float, float] = REFERENCE,
) -> FrontFigure:
    """Say what the picture of one task shows.

    Only complete trials are drawn: a stopped one has part-trained values that compare with nothing.

    Args:
        records: Records of one sweep, any number of tasks.
        task: The task to draw.
        max_score_drop: Score limit of the sweep, or None.
        model: Name of the model for the title; taken from the records' settings if empty.
        ref: Reference point of the hypervolume, score and density.

    Raises:
        RecordsError: If the task was measured in more than one dtype, or activation.
    """
    own = [record for record in records if record.task == task]
    found = points(own, max_score_drop)
    shown = merge(found)
    attained = attainment(found)
    dialled = any(point.tau for point in shown)
    settings = varying(found) or [name for name in (own[0].config if own else {}) if name.startswith("deft.")]
    return FrontFigure(
        task=task,
        title=_title(own, task, model),
        x_label=X_LABEL,
        y_label=f"{_joined(record.score_metric for record in own) or 'score'} ↑",
        caption=_caption(found, max_score_drop, ref),
        marks=tuple(_mark(point, settings) for point in shown),
        stairs=_front_stairs(shown),
        exact_stairs=_front_stairs(point for point in shown if not point.tau) if dialled else (),
        rival_stairs=_front_stairs(point for point in shown if point.baseline) if dialled else (),
        attained_stairs=_stairs(attained[max(attained)]) if attained else (),
        score_limit=_score_limit(shown, max_score_drop),
        table=_table(shown, settings),
    )


def write_csv(figure: FrontFigure, path: Path) -> Path:
    """Write the data of the figure, one row per drawn trial; returns ``path``."""
    return write_text(path, to_csv(figure.table[0], figure.table[1:]))


# ---- data


def _joined(values: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(value for value in values if value))


def _title(records: Sequence[Record], task: str, model: str) -> str:
    measured = [record for record in records if record.density is not None] or list(records)
    models = _without_folder(model) or _joined(_model_name(record) for record in measured)
    dtypes = _joined(record.dtype for record in measured)
    activations = _joined(record.activation for record in measured)
    return ", ".join(part for part in (task, models, dtypes, activations) if part)


def _model_name(record: Record) -> str:
    return _without_folder(next((str(record.config[key]) for key in _MODEL_KEYS if record.config.get(key)), ""))


def _without_folder(name: str) -> str:
    return Path(name).name if name.startswith(("/", ".", "~")) else name


def _caption(found: Sequence[Point], max_score_drop: float | None, ref: tuple[float, float]) -> str:
    shown = merge(found)
    trained = [point for point in found if not point.tau]
    drawn = sum(point.status == "complete" and point.measured for point in trained)
    exact = sum(not point.tau for point in shown)
    parts = [f"{drawn} of {len(trained)} trials drawn", f"{sum(p.on_front for p in shown)} on the front"]
    if exact < len(shown):
        parts[0] += f": {exact} points of exact zeros, {len(shown) - exact} thresholded"
    if any(point.seeds > 1 for point in shown):
        parts.append("bars are standard deviations over seeds")
    if max_score_drop is not None:
        infeasible = sum(not p.feasible for p in shown)
        parts.append(f"{infeasible} infeasible (score drop above {max_score_drop:g})")
    parts += _missing(found)
    text = ", ".join(parts) + f". Hypervolume {hypervolume(shown, ref):.4f}."
    if found and not any(point.reference for point in shown):
        text += " No usable baseline" + ("." if max_score_drop is None else ": the score limit is not applied.")
    return text


def _missing(found: Sequence[Point]) -> list[str]:
    counts = Counter(point.status for point in found)
    missing = [f"{counts[status]} {status}" for status in STATUSES if status != "complete" and counts[status]]
    unmeasured = sum(point.status == "complete" and not point.measured for point in found)
    return missing + ([f"{unmeasured} without a finite score or density"] if unmeasured else [])


def _role(point: Point) -> str:
    if point.reference:
        return BASELINE
    if not point.feasible:
        return INFEASIBLE
    return FRONT if point.on_front else DOMINATED


def _mark(point: Point, settings: Sequence[str]) -> Mark:
    assert point.density is not None
    assert point.score is not None
    detail = [("trial", point.trial + " (baseline)" * (point.baseline and point.tau > 0.0)), ("seed", str(point.seed))]
    detail += [("threshold τ", f"{point.tau:g}")] if point.tau else []
    detail.append(("score", f"{point.score:.4f}"))
    detail.append(("density", f"{point.density:.4f}"))
    if point.seeds > 1:
        detail.append(("seeds", f"{point.seeds}, score ± {point.score_std:.4f}, density ± {point.density_std:.4f}"))
    if point.front_probability is not None:
        detail.append(("probability of the front", f"{point.front_probability:.2f}"))
    if point.score_drop is not None:
        detail.append(("score drop", f"{point.score_drop:+.4f}"))
    if point.density_change is not None:
        detail.append(("density change", f"{100 * point.density_change:+.1f} %"))
    detail += [(name, short(point.config.get(name))) for name in settings[:_HOVER_SETTINGS]]
    shape = (point.trial, point.seed, point.density, point.score, _role(point), point.on_front, point.tau)
    return Mark(*shape, (point.density_std or 0.0, point.score_std or 0.0), tuple(detail))


def short(value: Any) -> str:
    """A setting as a reader wants it: four significant digits, a dash for None, at most 60 characters."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return textwrap.shorten(str(value), 60, placeholder="…")


def _front_stairs(shown: Iterable[Point]) -> tuple[tuple[float, float], ...]:
    return _stairs([(float(point.density or 0.0), float(point.score or 0.0)) for point in front(shown)])


def _stairs(chosen: Iterable[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Corners (density, score) of the line through what was chosen, by rising density."""
    corners: list[tuple[float, float]] = []
    for here in chosen:
        if corners and here != corners[-1]:
            corners.append((here[0], corners[-1][1]))
        if not corners or here != corners[-1]:
            corners.append(here)
    return tuple(corners)


def _score_limit(shown: Sequence[Point], max_score_drop: float | None) -> float | None:
    baselines = [point.score for point in shown if point.reference and point.score is not None]
    return baselines[0] - max_score_drop if max_score_drop is not None and len(baselines) == 1 else None


def _table(shown: Sequence[Point], settings: Sequence[str]) -> tuple[tuple[Any, ...], ...]:
    fixed = ("task", "trial", "seed", "density", "score", "density_change", "score_drop", "tau", "on_front")
    header = (*fixed, "role", *settings)
    rows = [
        (*(getattr(point, name) for name in fixed), _role(point), *(point.config.get(name) for name in settings))
        for point in shown
    ]
    return (header, *rows)


# ---- what both drawings share

Ranges = tuple[tuple[float, float], tuple[float, float]]

_LEGEND = {
    FRONT: "on the front",
    DOMINATED: "dominated",
    INFEASIBLE: "infeasible",
    BASELINE: "baseline (α = 0)",
}

#: Lines beside the front: name, colour, dash.
LINES = {
    "exact_stairs": ("front of exact zeros", BLUE, "dash"),
    "rival_stairs": ("baseline with thresholds", VERMILION, "dash"),
    "attained_stairs": ("attained by every seed", GREY, "dashdot"),
}


def legend_of(role: str, dialled: bool) -> str:
    """Exact zeros and thresholded density are different things: told apart by shape, and named."""
    return f"{_LEGEND[role]}, thresholded" if dialled else _LEGEND[role]


def groups_of(figure: FrontFigure, roles: Iterable[str]) -> Iterator[tuple[str, bool, list[Mark]]]:
    """Marks by role and by whether they are thresholded."""
    for role in roles:
        for dialled in (False, True):
            marks = [mark for mark in figure.marks if (mark.role, mark.tau > 0.0) == (role, dialled)]
            if marks:
                yield role, dialled, marks


def ranges_of(figure: FrontFigure) -> Ranges:
    """Horizontal and vertical range with room around the marks and their bars; the unit square without any."""
    if not figure.marks:
        return (0.0, 1.0), (0.0, 1.0)
    ends = [
        (mark.density + sign * mark.spread[0], mark.score + sign * mark.spread[1])
        for mark in figure.marks
        for sign in (-1.0, 1.0)
    ]
    return _padded([density for density, _ in ends]), _padded([score for _, score in ends], figure.score_limit)


def _padded(values: Sequence[float], extra: float | None = None) -> tuple[float, float]:
    values = [*values, extra] if extra is not None else values
    low, high = min(values), max(values)
    pad = 0.1 * (high - low) or max(0.05 * abs(low), 0.01)
    return low - pad, high + pad


def outline(stairs: Sequence[tuple[float, float]], ranges: Ranges) -> tuple[list[float], list[float]]:
    """The stairs continued to the lower and the right edge: the border of all that the front dominates."""
    (_, right), (bottom, _) = ranges
    corners = [(stairs[0][0], bottom), *stairs, (right, stairs[-1][1])]
    return [x for x, _ in corners], [y for _, y in corners]
