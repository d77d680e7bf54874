"""The picture of a front as PNG."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from deft_ray.results.figures import (
    BASELINE,
    BLUE,
    DARK,
    DOMINATED,
    FRONT,
    GREY,
    INFEASIBLE,
    LINES,
    NOTHING,
    VERMILION,
    FrontFigure,
    Mark,
    groups_of,
    legend_of,
    outline,
    ranges_of,
)
from deft_ray.results.files import write_aside


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
        _draw_names(canvas, axes, figure)
    else:
        axes.text(0.5, 0.5, NOTHING, ha="center", va="center", color=DARK, transform=axes.transAxes)
    return write_aside(path, lambda aside: canvas.savefig(aside, metadata={"Software": None}))


def _draw_frame(canvas: Any, axes: Any, figure: FrontFigure) -> None:
    x_range, y_range = ranges_of(figure)
    axes.set_xlim(*x_range)
    axes.set_ylim(*y_range)
    axes.set_xlabel(figure.x_label, color=DARK, parse_math=False)
    axes.set_ylabel(figure.y_label, color=DARK, parse_math=False)
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=DARK)
    title = _wrapped(figure.title, 66, 2)
    canvas.text(0.02, 0.975, title, fontsize=11, fontweight="bold", color=DARK, va="top", parse_math=False)
    caption = _wrapped(figure.caption, 122, 3)
    canvas.text(0.02, 0.02, caption, fontsize=8, color=DARK, va="bottom", linespacing=1.3, parse_math=False)


def _wrapped(text: str, width: int, lines: int) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))


def _draw_front(axes: Any, figure: FrontFigure) -> None:
    ranges = ranges_of(figure)
    if figure.stairs:
        x, y = outline(figure.stairs, ranges)
        axes.plot(x, y, color=BLUE, linewidth=1.8, zorder=2)
        axes.fill_between(x, y, ranges[1][0], color=BLUE, alpha=0.06, linewidth=0, zorder=1)
    for field, (name, colour, dash) in LINES.items():
        if stairs := getattr(figure, field):
            x, y = outline(stairs, ranges)
            style = {"dash": "--", "dashdot": "-."}[dash]
            axes.plot(x, y, color=colour, linewidth=1.1, linestyle=style, zorder=1.8, label=name)
    if figure.score_limit is not None:
        axes.axhline(figure.score_limit, color=DARK, linewidth=1, linestyle=":", zorder=1.5, label="score limit")


def _draw_marks(axes: Any, figure: FrontFigure) -> None:
    styles: dict[str, dict[str, Any]] = {
        DOMINATED: {"s": 30, "color": GREY, "alpha": 0.7, "linewidths": 0, "zorder": 3},
        INFEASIBLE: {"s": 34, "facecolors": "none", "edgecolors": GREY, "linewidths": 1.3, "zorder": 3},
        FRONT: {"s": 46, "color": BLUE, "edgecolors": "white", "linewidths": 0.8, "zorder": 4},
        BASELINE: {"s": 190, "marker": "*", "color": VERMILION, "edgecolors": DARK, "linewidths": 0.7, "zorder": 5},
    }
    for role, dialled, own in groups_of(figure, styles):
        style = styles[role] | ({"marker": "D", "s": 0.7 * styles[role]["s"]} if dialled else {})
        spread = [mark for mark in own if any(mark.spread)]
        if spread:
            bars = [[mark.spread[place] for mark in spread] for place in (0, 1)]
            axes.errorbar(
                [m.density for m in spread], [m.score for m in spread], xerr=bars[0], yerr=bars[1], fmt="none",
                ecolor=DARK, elinewidth=0.8, capsize=2, zorder=style["zorder"] - 0.5,
            )  # fmt: skip
        axes.scatter([m.density for m in own], [m.score for m in own], label=legend_of(role, dialled), **style)


def _draw_legend(canvas: Any, axes: Any) -> None:
    """In one row where all names fit in the picture's width, else in two or three of smaller print."""
    handles, labels = axes.get_legend_handles_labels()
    for rows, size in ((1, 8.5), (2, 7.5), (3, 7.5)):
        legend = canvas.legend(
            handles, labels, loc="upper left", bbox_to_anchor=(0.02, 0.165), ncols=-(-len(labels) // rows),
            frameon=False, fontsize=size, handletextpad=0.4, columnspacing=1.2, borderaxespad=0.0,
        )  # fmt: skip
        if rows == 3 or legend.get_window_extent(canvas.canvas.get_renderer()).x1 <= 0.98 * canvas.bbox.width:
            return
        legend.remove()


def _draw_names(canvas: Any, axes: Any, figure: FrontFigure) -> None:
    """Name the baselines and the front's trials where a name touches neither frame, front, mark, nor another name."""
    renderer, marks = canvas.canvas.get_renderer(), figure.marks
    taken = [_box(axes, mark) for mark in marks] + _line_boxes(axes, figure)
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
            fontsize=8, color=DARK, zorder=6, parse_math=False,
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


def _line_boxes(axes: Any, figure: FrontFigure) -> list[Any]:
    """Return what each straight piece of the front covers."""
    from matplotlib.transforms import Bbox

    if not figure.stairs:
        return []
    points = axes.transData.transform(list(zip(*outline(figure.stairs, ranges_of(figure)), strict=True)))
    return [Bbox([start, end]).padded(1) for start, end in pairwise(points)]


def _fits(box: Any, frame: Any, taken: Sequence[Any]) -> bool:
    inside = box.x0 >= frame.x0 and box.x1 <= frame.x1 and box.y0 >= frame.y0 and box.y1 <= frame.y1
    return inside and not any(box.overlaps(other) for other in taken)
