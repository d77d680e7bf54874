"""The picture of one task's front: first as data that can be compared with ``==``, then drawn as HTML, PNG and CSV."""

from __future__ import annotations

import html
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deft_ray.results.files import write_aside, write_text
from deft_ray.results.front import Point, front, hypervolume, points, to_csv, varying
from deft_ray.results.records import STATUSES, Record

FRONT, DOMINATED, INFEASIBLE, BASELINE = "front", "dominated", "infeasible", "baseline"

X_LABEL = "density, fraction of non-zero MLP activations ↓"

_BLUE, _VERMILION, _GREY, _DARK = "#0072B2", "#D55E00", "#8C8C8C", "#333333"
"""Blue and vermilion of Okabe and Ito's palette for all forms of colour vision; the rest is told by shape and fill."""

_MODEL_KEYS = ("model.name", "model.path", "model.id", "model")
_HOVER_SETTINGS = 20
_NOTHING = "No trial of this task has both a score and a density."


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
        detail: What a reader sees when pointing at it: (name, value) pairs.
    """

    trial: str
    seed: int
    density: float
    score: float
    role: str
    on_front: bool
    tau: float = 0.0
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
    score_limit: float | None
    table: tuple[tuple[Any, ...], ...]


def front_figure_data(
    records: Iterable[Record], task: str, max_score_drop: float | None = None, model: str = ""
) -> FrontFigure:
    """Say what the picture of one task shows.

    Only complete trials are drawn: a stopped one has part-trained values that compare with nothing.

    Args:
        records: Records of one sweep, any number of tasks.
        task: The task to draw.
        max_score_drop: Score limit of the sweep, or None.
        model: Name of the model for the title; taken from the records' settings if empty.

    Raises:
        RecordsError: If the task was measured in more than one dtype.
    """
    own = [record for record in records if record.task == task]
    found = points(own, max_score_drop)
    shown = [point for point in found if point.status == "complete" and point.measured]
    dialled = any(point.tau for point in shown)
    settings = varying(found) or [name for name in (own[0].config if own else {}) if name.startswith("deft.")]
    return FrontFigure(
        task=task,
        title=_title(own, task, model),
        x_label=X_LABEL,
        y_label=f"{_joined(record.score_metric for record in own) or 'score'} ↑",
        caption=_caption(found, max_score_drop),
        marks=tuple(_mark(point, settings) for point in shown),
        stairs=_stairs(front(shown)),
        exact_stairs=_stairs(front(point for point in shown if not point.tau)) if dialled else (),
        rival_stairs=_stairs(front(point for point in shown if point.baseline)) if dialled else (),
        score_limit=_score_limit(shown, max_score_drop),
        table=_table(shown, settings),
    )


def write_csv(figure: FrontFigure, path: Path) -> Path:
    """Write the data of the figure, one row per drawn trial; returns ``path``."""
    return write_text(path, to_csv(figure.table[0], figure.table[1:]))


def draw_html(figure: FrontFigure, path: Path) -> Path:
    """Write a page that opens without a network and shows a trial's settings when pointed at; returns ``path``."""
    import pandas  # noqa: F401 - plotly takes whatever pandas is there, half-loaded by the mirror's thread too: wait
    import plotly.graph_objects as go

    ranges = _ranges(figure)
    plot = go.Figure(data=[go.Scatter(**trace) for trace in _traces(figure, ranges)], layout=_layout(figure, ranges))
    body = plot.to_html(
        full_html=False, include_plotlyjs=True, div_id="front", config={"displaylogo": False, "responsive": True}
    )
    title, caption = html.escape(figure.title), html.escape(figure.caption)
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{title}</title>\n<style>body {{ font-family: sans-serif; max-width: 72em; margin: 2em auto; "
        f"padding: 0 1em; color: {_DARK}; }} h1 {{ font-size: 1.2em; }} p {{ line-height: 1.4; }}</style>\n"
        f"</head>\n<body>\n<h1>{title}</h1>\n{body}\n<p>{caption}</p>\n</body>\n</html>\n"
    )
    return write_text(path, page)


def draw_png(figure: FrontFigure, path: Path) -> Path:
    """Write the picture as PNG, with no display and no global state; returns ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(7.2, 5.4), dpi=150)
    FigureCanvasAgg(canvas)
    axes = canvas.add_axes((0.11, 0.27, 0.855, 0.63))
    _draw_frame(canvas, axes, figure)
    if figure.marks:
        _draw_front(axes, figure)
        _draw_marks(axes, figure)
        _draw_legend(canvas, axes)
        _draw_names(canvas, axes, figure.marks)
    else:
        axes.text(0.5, 0.5, _NOTHING, ha="center", va="center", color=_DARK, transform=axes.transAxes)
    return write_aside(path, lambda aside: canvas.savefig(aside, metadata={"Software": None}))


# ---- data


def _joined(values: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(value for value in values if value))


def _title(records: Sequence[Record], task: str, model: str) -> str:
    measured = [record for record in records if record.density is not None] or list(records)
    models = model or _joined(_model_name(record) for record in measured)
    dtypes = _joined(record.dtype for record in measured)
    activations = _joined(record.activation for record in measured)
    return ", ".join(part for part in (task, models, dtypes, activations) if part)


def _model_name(record: Record) -> str:
    name = next((str(record.config[key]) for key in _MODEL_KEYS if record.config.get(key)), "")
    return Path(name).name if name.startswith(("/", ".", "~")) else name


def _caption(found: Sequence[Point], max_score_drop: float | None) -> str:
    shown = [point for point in found if point.status == "complete" and point.measured]
    trained, exact = (sum(not point.tau for point in some) for some in (found, shown))
    parts = [f"{exact} of {trained} trials drawn", f"{sum(p.on_front for p in shown)} on the front"]
    if exact < len(shown):
        parts[0] += f": {exact} points of exact zeros, {len(shown) - exact} thresholded"
    if max_score_drop is not None:
        infeasible = sum(not p.feasible for p in shown)
        parts.append(f"{infeasible} infeasible (score drop above {max_score_drop:g})")
    parts += _missing(found)
    text = ", ".join(parts) + f". Hypervolume {hypervolume(shown):.4f}."
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
    if point.score_drop is not None:
        detail.append(("score drop", f"{point.score_drop:+.4f}"))
    if point.density_change is not None:
        detail.append(("density change", f"{100 * point.density_change:+.1f} %"))
    detail += [(name, short(point.config.get(name))) for name in settings[:_HOVER_SETTINGS]]
    shape = (point.trial, point.seed, point.density, point.score, _role(point), point.on_front, point.tau)
    return Mark(*shape, tuple(detail))


def short(value: Any) -> str:
    """A setting as a reader wants it: four significant digits, a dash for None, at most 60 characters."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return textwrap.shorten(str(value), 60, placeholder="…")


def _stairs(chosen: Sequence[Point]) -> tuple[tuple[float, float], ...]:
    corners: list[tuple[float, float]] = []
    for point in chosen:
        here = (float(point.density or 0.0), float(point.score or 0.0))
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

_Ranges = tuple[tuple[float, float], tuple[float, float]]

_LEGEND = {
    FRONT: "on the front",
    DOMINATED: "dominated",
    INFEASIBLE: "infeasible",
    BASELINE: "baseline (α = 0)",
}

_LINES = {"exact_stairs": "front of exact zeros", "rival_stairs": "baseline with thresholds"}


def _legend(role: str, dialled: bool) -> str:
    """Exact zeros and thresholded density are different things: told apart by shape, and named."""
    return f"{_LEGEND[role]}, thresholded" if dialled else _LEGEND[role]


def _groups(figure: FrontFigure, roles: Iterable[str]) -> Iterator[tuple[str, bool, list[Mark]]]:
    """Marks by role and by whether they are thresholded."""
    for role in roles:
        for dialled in (False, True):
            marks = [mark for mark in figure.marks if (mark.role, mark.tau > 0.0) == (role, dialled)]
            if marks:
                yield role, dialled, marks


def _ranges(figure: FrontFigure) -> _Ranges:
    """Horizontal and vertical range with room around the marks; the unit square without any."""
    if not figure.marks:
        return (0.0, 1.0), (0.0, 1.0)
    heights = [mark.score for mark in figure.marks]
    return _padded([mark.density for mark in figure.marks]), _padded(heights, figure.score_limit)


def _padded(values: Sequence[float], extra: float | None = None) -> tuple[float, float]:
    values = [*values, extra] if extra is not None else values
    low, high = min(values), max(values)
    pad = 0.1 * (high - low) or max(0.05 * abs(low), 0.01)
    return low - pad, high + pad


def _outline(stairs: Sequence[tuple[float, float]], ranges: _Ranges) -> tuple[list[float], list[float]]:
    """The stairs continued to the lower and the right edge: the border of all that the front dominates."""
    (_, right), (bottom, _) = ranges
    corners = [(stairs[0][0], bottom), *stairs, (right, stairs[-1][1])]
    return [x for x, _ in corners], [y for _, y in corners]


# ---- HTML


def _traces(figure: FrontFigure, ranges: _Ranges) -> list[dict[str, Any]]:
    traces = []
    if figure.stairs:
        x, y = _outline(figure.stairs, ranges)
        traces.append(_line_trace("front", x, y, {"color": _BLUE, "width": 2}, in_legend=False))
    for name, colour in (("exact_stairs", _BLUE), ("rival_stairs", _VERMILION)):
        if stairs := getattr(figure, name):
            traces.append(_line_trace(_LINES[name], *_outline(stairs, ranges), {"color": colour, "dash": "dash"}))
    if figure.score_limit is not None:
        x, y = list(ranges[0]), [figure.score_limit] * 2
        traces.append(_line_trace("score limit", x, y, {"color": _DARK, "width": 1, "dash": "dot"}))
    return traces + [_mark_trace(*group) for group in _groups(figure, (DOMINATED, INFEASIBLE, FRONT, BASELINE))]


def _line_trace(
    name: str, x: list[float], y: list[float], line: dict[str, Any], in_legend: bool = True
) -> dict[str, Any]:
    return {"name": name, "x": x, "y": y, "mode": "lines", "line": line, "hoverinfo": "skip", "showlegend": in_legend}


def _mark_trace(role: str, dialled: bool, marks: Sequence[Mark]) -> dict[str, Any]:
    styles: dict[str, dict[str, Any]] = {
        FRONT: {"symbol": "circle", "size": 10, "color": _BLUE},
        DOMINATED: {"symbol": "circle", "size": 8, "color": _GREY, "opacity": 0.7},
        INFEASIBLE: {"symbol": "circle-open", "size": 9, "color": _GREY, "line": {"width": 1.5}},
        BASELINE: {"symbol": "star", "size": 16, "color": _VERMILION, "line": {"width": 1, "color": _DARK}},
    }
    marker = {**styles[role], **({"symbol": styles[role]["symbol"].replace("circle", "diamond")} if dialled else {})}
    lone = role == BASELINE and len(marks) == 1
    return {
        "x": [mark.density for mark in marks],
        "y": [mark.score for mark in marks],
        "mode": "markers+text" if lone else "markers",
        "text": ["baseline"] if lone else None,
        "textposition": "bottom center",
        "marker": marker,
        "name": _legend(role, dialled),
        "hovertext": [_hover(mark) for mark in marks],
        "hovertemplate": "%{hovertext}<extra></extra>",
    }


def _hover(mark: Mark) -> str:
    lines = [f"{html.escape(name)}: <b>{html.escape(value)}</b>" for name, value in mark.detail]
    return "<br>".join([f"<i>{html.escape(_legend(mark.role, mark.tau > 0.0))}</i>", *lines])


def _layout(figure: FrontFigure, ranges: _Ranges) -> dict[str, Any]:
    axis = {"showline": True, "linecolor": _DARK, "gridcolor": "#E6E6E6", "zeroline": False, "ticks": "outside"}
    empty = {"text": _NOTHING, "x": 0.5, "y": 0.5, "xref": "paper", "yref": "paper", "showarrow": False}
    return {
        "template": "none",
        "height": 560,
        "margin": {"l": 80, "r": 20, "t": 20, "b": 60},
        "xaxis": {**axis, "title": {"text": html.escape(figure.x_label)}, "range": list(ranges[0])},
        "yaxis": {**axis, "title": {"text": html.escape(figure.y_label)}, "range": list(ranges[1])},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hoverlabel": {"align": "left"},
        "annotations": [] if figure.marks else [empty],
    }


# ---- PNG


def _draw_frame(canvas: Any, axes: Any, figure: FrontFigure) -> None:
    x_range, y_range = _ranges(figure)
    axes.set_xlim(*x_range)
    axes.set_ylim(*y_range)
    axes.set_xlabel(figure.x_label, color=_DARK, parse_math=False)
    axes.set_ylabel(figure.y_label, color=_DARK, parse_math=False)
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_DARK)
    title = _wrapped(figure.title, 66, 2)
    canvas.text(0.02, 0.975, title, fontsize=11, fontweight="bold", color=_DARK, va="top", parse_math=False)
    caption = _wrapped(figure.caption, 122, 3)
    canvas.text(0.02, 0.02, caption, fontsize=8, color=_DARK, va="bottom", linespacing=1.3, parse_math=False)


def _wrapped(text: str, width: int, lines: int) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))


def _draw_front(axes: Any, figure: FrontFigure) -> None:
    ranges = _ranges(figure)
    if figure.stairs:
        x, y = _outline(figure.stairs, ranges)
        axes.plot(x, y, color=_BLUE, linewidth=1.8, zorder=2)
        axes.fill_between(x, y, ranges[1][0], color=_BLUE, alpha=0.06, linewidth=0, zorder=1)
    for name, colour in (("exact_stairs", _BLUE), ("rival_stairs", _VERMILION)):
        if stairs := getattr(figure, name):
            x, y = _outline(stairs, ranges)
            axes.plot(x, y, color=colour, linewidth=1.1, linestyle="--", zorder=1.8, label=_LINES[name])
    if figure.score_limit is not None:
        axes.axhline(figure.score_limit, color=_DARK, linewidth=1, linestyle=":", zorder=1.5, label="score limit")


def _draw_marks(axes: Any, figure: FrontFigure) -> None:
    styles: dict[str, dict[str, Any]] = {
        DOMINATED: {"s": 30, "color": _GREY, "alpha": 0.7, "linewidths": 0, "zorder": 3},
        INFEASIBLE: {"s": 34, "facecolors": "none", "edgecolors": _GREY, "linewidths": 1.3, "zorder": 3},
        FRONT: {"s": 46, "color": _BLUE, "edgecolors": "white", "linewidths": 0.8, "zorder": 4},
        BASELINE: {"s": 190, "marker": "*", "color": _VERMILION, "edgecolors": _DARK, "linewidths": 0.7, "zorder": 5},
    }
    for role, dialled, own in _groups(figure, styles):
        style = styles[role] | ({"marker": "D", "s": 0.7 * styles[role]["s"]} if dialled else {})
        axes.scatter([m.density for m in own], [m.score for m in own], label=_legend(role, dialled), **style)


def _draw_legend(canvas: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    canvas.legend(
        handles, labels, loc="upper left", bbox_to_anchor=(0.1, 0.165), ncols=5 if len(labels) < 6 else 4,
        frameon=False, fontsize=8.5 if len(labels) < 6 else 7.5,
        handletextpad=0.4, columnspacing=1.6, borderaxespad=0.0,
    )  # fmt: skip


def _draw_names(canvas: Any, axes: Any, marks: Sequence[Mark]) -> None:
    """Name the baselines and the front's trials where the name touches neither the frame, a mark, nor another name."""
    renderer = canvas.canvas.get_renderer()
    taken = [_box(axes, mark) for mark in marks]
    frame = axes.get_window_extent(renderer)
    baselines = [mark for mark in marks if mark.role == BASELINE]
    for mark in baselines + [mark for mark in marks if mark.role == FRONT]:
        text = mark.trial + (f", τ {mark.tau:g}" if mark.tau else "")
        if mark.role == BASELINE:
            text = "baseline" + f", seed {mark.seed}" * (len(baselines) > 1)
        box = _place(axes, renderer, mark, text, lambda box: _fits(box, frame, taken))
        if box is not None:
            taken.append(box)


_PLACES = ((-7, 5, "right", "bottom"), (0, 9, "center", "bottom"), (7, 5, "left", "bottom"), (9, -2, "left", "top"),
           (0, -10, "center", "top"), (-9, -5, "right", "top"))  # fmt: skip
"""Where a name may stand, best first: above and left of a front's point nothing eligible can lie."""


def _place(axes: Any, renderer: Any, mark: Mark, text: str, fits: Callable[[Any], bool]) -> Any:
    for x, y, horizontal, vertical in _PLACES:
        label = axes.annotate(
            text, (mark.density, mark.score), xytext=(x, y), textcoords="offset points", ha=horizontal, va=vertical,
            fontsize=8, color=_DARK, zorder=6, parse_math=False,
        )  # fmt: skip
        box = label.get_window_extent(renderer)
        if fits(box):
            return box
        label.remove()
    return None


def _box(axes: Any, mark: Mark) -> Any:
    from matplotlib.transforms import Bbox

    x, y = axes.transData.transform((mark.density, mark.score))
    half = 14 if mark.role == BASELINE else 7
    return Bbox.from_extents(x - half, y - half, x + half, y + half)


def _fits(box: Any, frame: Any, taken: Sequence[Any]) -> bool:
    inside = box.x0 >= frame.x0 and box.x1 <= frame.x1 and box.y0 >= frame.y0 and box.y1 <= frame.y1
    return inside and not any(box.overlaps(other) for other in taken)
