"""The picture of a front as a page that opens without a network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
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
    Ranges,
    groups_of,
    legend_of,
    outline,
    ranges_of,
)
from deft_ray.results.files import write_text


def draw_html(figure: FrontFigure, path: Path) -> Path:
    """Write a page that opens without a network and shows a trial's settings when pointed at; returns ``path``."""
    import pandas  # noqa: F401 - plotly takes whatever pandas is there, half-loaded by the mirror's thread too: wait
    import plotly.graph_objects as go

    ranges = ranges_of(figure)
    plot = go.Figure(data=[go.Scatter(**trace) for trace in _traces(figure, ranges)], layout=_layout(figure, ranges))
    body = plot.to_html(
        full_html=False, include_plotlyjs=True, div_id="front", config={"displaylogo": False, "responsive": True}
    )
    title, caption = escape(figure.title), escape(figure.caption)
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{title}</title>\n<style>body {{ font-family: sans-serif; max-width: 72em; margin: 2em auto; "
        f"padding: 0 1em; color: {DARK}; }} h1 {{ font-size: 1.2em; }} p {{ line-height: 1.4; }}</style>\n"
        f"</head>\n<body>\n<h1>{title}</h1>\n{body}\n<p>{caption}</p>\n</body>\n</html>\n"
    )
    return write_text(path, page)


def _traces(figure: FrontFigure, ranges: Ranges) -> list[dict[str, Any]]:
    traces = []
    if figure.stairs:
        x, y = outline(figure.stairs, ranges)
        traces.append(_line_trace("front", x, y, {"color": BLUE, "width": 2}, in_legend=False))
    for field, (name, colour, dash) in LINES.items():
        if stairs := getattr(figure, field):
            traces.append(_line_trace(name, *outline(stairs, ranges), {"color": colour, "dash": dash}))
    if figure.score_limit is not None:
        x, y = list(ranges[0]), [figure.score_limit] * 2
        traces.append(_line_trace("score limit", x, y, {"color": DARK, "width": 1, "dash": "dot"}))
    return traces + [_mark_trace(*group) for group in groups_of(figure, (DOMINATED, INFEASIBLE, FRONT, BASELINE))]


def _line_trace(
    name: str, x: list[float], y: list[float], line: dict[str, Any], in_legend: bool = True
) -> dict[str, Any]:
    return {"name": name, "x": x, "y": y, "mode": "lines", "line": line, "hoverinfo": "skip", "showlegend": in_legend}


def _mark_trace(role: str, dialled: bool, marks: Sequence[Mark]) -> dict[str, Any]:
    styles: dict[str, dict[str, Any]] = {
        FRONT: {"symbol": "circle", "size": 10, "color": BLUE},
        DOMINATED: {"symbol": "circle", "size": 8, "color": GREY, "opacity": 0.7},
        INFEASIBLE: {"symbol": "circle-open", "size": 9, "color": GREY, "line": {"width": 1.5}},
        BASELINE: {"symbol": "star", "size": 16, "color": VERMILION, "line": {"width": 1, "color": DARK}},
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
        "name": legend_of(role, dialled),
        **{f"error_{axis}": _bars([mark.spread[place] for mark in marks]) for place, axis in enumerate("xy")},
        "hovertext": [_hover(mark) for mark in marks],
        "hovertemplate": "%{hovertext}<extra></extra>",
    }


def _bars(lengths: Sequence[float]) -> dict[str, Any]:
    return {"type": "data", "array": list(lengths), "visible": any(lengths), "thickness": 1, "color": DARK}


def _hover(mark: Mark) -> str:
    lines = [f"{escape(name)}: <b>{escape(value)}</b>" for name, value in mark.detail]
    return "<br>".join([f"<i>{escape(legend_of(mark.role, mark.tau > 0.0))}</i>", *lines])


def _layout(figure: FrontFigure, ranges: Ranges) -> dict[str, Any]:
    axis = {"showline": True, "linecolor": DARK, "gridcolor": "#E6E6E6", "zeroline": False, "ticks": "outside"}
    empty = {"text": NOTHING, "x": 0.5, "y": 0.5, "xref": "paper", "yref": "paper", "showarrow": False}
    return {
        "template": "none",
        "height": 560,
        "margin": {"l": 80, "r": 20, "t": 20, "b": 60},
        "xaxis": {**axis, "title": {"text": escape(figure.x_label)}, "range": list(ranges[0])},
        "yaxis": {**axis, "title": {"text": escape(figure.y_label)}, "range": list(ranges[1])},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hoverlabel": {"align": "left"},
        "annotations": [] if figure.marks else [empty],
    }
