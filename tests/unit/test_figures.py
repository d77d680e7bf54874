"""The figure's data by equality, its drawings by opening them again."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from deft_ray.errors import RecordsError
from deft_ray.results.figure_html import draw_html
from deft_ray.results.figure_png import draw_png
from deft_ray.results.figures import FrontFigure, Mark, front_figure_data, ranges_of, short, write_csv
from deft_ray.results.records import Record


def make_record(trial: str, score: float | None, density: float | None, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "task": "squad",
        "seed": 0,
        "baseline": False,
        "status": "complete",
        "score_metric": "f1",
        "dtype": "bfloat16",
        "activation": "gelu_new",
        "config": {"model.name": "google/flan-t5-xl"},
    }
    return Record(trial=trial, score=score, density=density, **{**values, **changes})


def alpha(value: float) -> dict[str, Any]:
    return {"model.name": "google/flan-t5-xl", "deft.alpha": value}


SWEEP = [
    make_record("t0", 0.875, 0.5, baseline=True, config=alpha(0.0)),
    make_record("t1", 0.865, 0.25, config=alpha(0.5)),
    make_record("t2", 0.5, 0.125, config=alpha(1.0)),
    make_record("t3", 0.865, 0.375, config=alpha(0.25)),
    make_record("t4", None, None, status="failed", cause="ValueError: no", config=alpha(9.0)),
    make_record("t5", 0.9, 0.1, status="stopped", config=alpha(2.0)),
    make_record("x0", 0.5, 0.5, task="rte", dtype="float32"),
]

CASES = {
    "many": (SWEEP, 0.02),
    "one": (SWEEP[:1], 0.02),
    "none": ([], None),
    "all failed": ([SWEEP[4]], 0.02),
    "all equal": ([make_record(f"t{i}", 0.5, 0.5) for i in range(3)], None),
    "seeds": ([make_record(f"t{i}", 0.5 + i / 100, 0.5, seed=i, baseline=True) for i in range(3)], 0.02),
    "odd names": ([make_record("<b>$t_1$</b></script>", 0.5, 0.5, config={"model.name": "$x_{" * 40})], None),
}


def detail(*, trial: str, score: str, density: str, drop: str, change: str, value: str) -> tuple[tuple[str, str], ...]:
    return (
        ("trial", trial),
        ("seed", "0"),
        ("score", score),
        ("density", density),
        ("score drop", drop),
        ("density change", change),
        ("deft.alpha", value),
    )


def test_data_of_a_sweep() -> None:
    assert front_figure_data(SWEEP, "squad", 0.02) == FrontFigure(
        task="squad",
        title="squad, google/flan-t5-xl, bfloat16, gelu_new",
        x_label="density, fraction of non-zero MLP activations ↓",
        y_label="f1 ↑",
        caption="4 of 6 trials drawn, 2 on the front, 1 infeasible (score drop above 0.02), 1 failed, 1 stopped. "
        "Hypervolume 0.6538.",
        marks=(
            Mark("t0", 0, 0.5, 0.875, "baseline", True, detail=detail(trial="t0", score="0.8750", density="0.5000",
                 drop="+0.0000", change="+0.0 %", value="0")),
            Mark("t1", 0, 0.25, 0.865, "front", True, detail=detail(trial="t1", score="0.8650", density="0.2500",
                 drop="+0.0100", change="+50.0 %", value="0.5")),
            Mark("t2", 0, 0.125, 0.5, "infeasible", False, detail=detail(trial="t2", score="0.5000", density="0.1250",
                 drop="+0.3750", change="+75.0 %", value="1")),
            Mark("t3", 0, 0.375, 0.865, "dominated", False, detail=detail(trial="t3", score="0.8650", density="0.3750",
                 drop="+0.0100", change="+25.0 %", value="0.25")),
        ),
        stairs=((0.25, 0.865), (0.5, 0.865), (0.5, 0.875)),
        exact_stairs=(),
        rival_stairs=(),
        attained_stairs=(),
        score_limit=0.875 - 0.02,
        table=(
            ("task", "trial", "seed", "density", "score", "density_change", "score_drop", "tau", "on_front", "role",
             "deft.alpha"),
            ("squad", "t0", 0, 0.5, 0.875, 0.0, 0.0, 0.0, True, "baseline", 0.0),
            ("squad", "t1", 0, 0.25, 0.865, 0.5, 0.875 - 0.865, 0.0, True, "front", 0.5),
            ("squad", "t2", 0, 0.125, 0.5, 0.75, 0.375, 0.0, False, "infeasible", 1.0),
            ("squad", "t3", 0, 0.375, 0.865, 0.25, 0.875 - 0.865, 0.0, False, "dominated", 0.25),
        ),
    )  # fmt: skip


def test_data_of_nothing() -> None:
    figure = front_figure_data([], "squad")
    assert (figure.title, figure.y_label, figure.marks, figure.stairs) == ("squad", "score ↑", (), ())
    assert figure.caption == "0 of 0 trials drawn, 0 on the front. Hypervolume 0.0000."


def test_several_baselines_have_no_common_limit() -> None:
    records, limit = CASES["seeds"]
    assert front_figure_data(records, "squad", limit).score_limit is None


def test_a_task_without_a_baseline_says_so() -> None:
    caption = front_figure_data([make_record("t0", 0.5, 0.5)], "squad", 0.01).caption
    assert caption.endswith("No usable baseline: the score limit is not applied.")


def test_a_complete_trial_without_a_number_is_counted() -> None:
    caption = front_figure_data([make_record("t0", None, 0.5)], "squad").caption
    assert "0 of 1 trials drawn" in caption
    assert "1 without a finite score or density" in caption


def test_equal_points_make_one_corner() -> None:
    records, _ = CASES["all equal"]
    figure = front_figure_data(records, "squad")
    assert figure.stairs == ((0.5, 0.5),)
    assert len(figure.marks) == 3


def test_a_local_model_is_named_by_its_folder() -> None:
    records = [make_record("t0", 0.5, 0.5, config={"model.path": "/models/flan-t5-xl"})]
    assert front_figure_data(records, "squad").title == "squad, flan-t5-xl, bfloat16, gelu_new"
    assert front_figure_data(records, "squad", model="mine").title == "squad, mine, bfloat16, gelu_new"


def test_two_dtypes_are_refused() -> None:
    records = [make_record("t0", 0.5, 0.5), make_record("t1", 0.5, 0.5, dtype="float32")]
    with pytest.raises(RecordsError, match="task squad: measured in more than one dtype"):
        front_figure_data(records, "squad")


@pytest.mark.parametrize("case", CASES)
def test_png_opens_and_is_not_blank(case: str, tmp_path: Path) -> None:
    from matplotlib import image

    records, limit = CASES[case]
    path = draw_png(front_figure_data(records, "squad", limit), tmp_path / "pareto.png")
    pixels = image.imread(path)
    assert pixels.shape == (810, 1080, 4)
    assert pixels.std() > 0.01
    assert [p.name for p in tmp_path.iterdir()] == ["pareto.png"]


@pytest.mark.parametrize("height", [0.9, 0.925, 0.9275, 0.93, 0.95])
def test_no_name_is_crossed_by_the_front(height: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the front's line running above, through, and below the place that the baseline's name would have first."""
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *at, **how: [drawn.append(self), save(self, *at, **how)])
    records = [
        make_record("t0", 0.92, 0.9, baseline=True, config=alpha(0.0)),
        make_record("t1", height, 0.3, config=alpha(0.5)),
        make_record("t2", 0.8, 0.2, config=alpha(1.0)),
    ]
    draw_png(front_figure_data(records, "squad"), tmp_path / "p.png")
    (axes,) = drawn[0].axes
    front = axes.lines[0].get_path().transformed(axes.lines[0].get_transform())
    names = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert {"baseline", "t1"} <= names.keys()
    assert [name for name, box in names.items() if front.intersects_bbox(box, filled=False)] == []


def test_png_leaves_no_global_state(tmp_path: Path) -> None:
    import matplotlib
    from matplotlib import _pylab_helpers

    before = dict(matplotlib.rcParams)
    draw_png(front_figure_data(SWEEP, "squad", 0.02), tmp_path / "pareto.png")
    assert dict(matplotlib.rcParams) == before
    assert not _pylab_helpers.Gcf.figs


def test_png_is_the_same_each_time(tmp_path: Path) -> None:
    figure = front_figure_data(SWEEP, "squad", 0.02)
    assert draw_png(figure, tmp_path / "a.png").read_bytes() == draw_png(figure, tmp_path / "b.png").read_bytes()


def plot_json(page: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Traces and layout of the ``Plotly.newPlot(id, data, layout, ...)`` call of a page."""
    start = re.search(r'Plotly\.newPlot\(\s*"front",\s*', page)
    assert start
    traces, end = json.JSONDecoder().raw_decode(page, start.end())
    layout, _ = json.JSONDecoder().raw_decode(page, page.index("{", end))
    return traces, layout


@pytest.mark.parametrize("case", CASES)
def test_html_holds_every_mark(case: str, tmp_path: Path) -> None:
    records, limit = CASES[case]
    figure = front_figure_data(records, "squad", limit)
    traces, layout = plot_json(draw_html(figure, tmp_path / "pareto.html").read_text())
    drawn = {
        (x, y) for trace in traces if "markers" in trace["mode"] for x, y in zip(trace["x"], trace["y"], strict=True)
    }
    assert drawn == {(mark.density, mark.score) for mark in figure.marks}
    assert layout["xaxis"]["title"]["text"] == figure.x_label
    assert layout["yaxis"]["title"]["text"] == figure.y_label
    assert bool(layout.get("annotations")) is (not figure.marks)


def test_html_opens_without_a_network(tmp_path: Path) -> None:
    page = draw_html(front_figure_data(SWEEP, "squad", 0.02), tmp_path / "pareto.html").read_text()
    assert len(page) > 1_000_000
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    assert "4 of 6 trials drawn" in page


def test_html_shows_settings_and_escapes_names(tmp_path: Path) -> None:
    traces, _ = plot_json(draw_html(front_figure_data(SWEEP, "squad", 0.02), tmp_path / "a.html").read_text())
    (own,) = (trace for trace in traces if trace["name"] == "on the front")
    assert "deft.alpha: <b>0.5</b>" in own["hovertext"][0]
    page = draw_html(front_figure_data(CASES["odd names"][0], "squad"), tmp_path / "b.html").read_text()
    assert "</b></script>" not in page
    assert "&lt;b&gt;$t_1$&lt;/b&gt;" in plot_json(page)[0][-1]["hovertext"][0]


def test_csv_is_the_table(tmp_path: Path) -> None:
    figure = front_figure_data(SWEEP, "squad", 0.02)
    rows = list(csv.reader(write_csv(figure, tmp_path / "pareto.csv").read_text().splitlines()))
    assert rows == [[str(cell) for cell in row] for row in figure.table]


def test_a_figure_is_a_value() -> None:
    figure = front_figure_data(SWEEP, "squad", 0.02)
    assert figure == front_figure_data(list(SWEEP), "squad", 0.02)
    assert figure != dataclasses.replace(figure, caption="")
    assert isinstance(hash(figure), int)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.123456, "0.1235"), (1e-05, "1e-05"), (None, "–"), (True, "True"), (8, "8"), ("a " * 50, "a " * 28 + "a a…")],
)
def test_short(value: Any, expected: str) -> None:
    assert len(short(value)) <= 60
    assert short(value) == expected


# --- the threshold dial -----------------------------------------------------------------------------------------------


def dial(*points: tuple[float, float, float]) -> dict[str, dict[str, float]]:
    """(τ, score, density), in calibration the same."""
    return {
        f"{tau:g}": {"score": s, "density": d, "calibration_score": s, "calibration_density": d} for tau, s, d in points
    }


DIALLED = [
    make_record("t0", 0.9, 0.9, baseline=True, config=alpha(0.0), dial=dial((0, 0.9, 0.9), (0.1, 0.8, 0.5))),
    make_record("t1", 0.85, 0.6, config=alpha(1.0), dial=dial((0, 0.85, 0.6), (0.1, 0.82, 0.4), (0.2, 0.1, 0.3))),
]


def test_thresholded_points_are_told_apart_from_exact_zeros(tmp_path: Path) -> None:
    figure = front_figure_data(DIALLED, "squad", 0.2)
    assert [(mark.trial, mark.tau, mark.role) for mark in figure.marks] == [
        ("t0", 0.0, "baseline"),
        ("t0", 0.1, "dominated"),
        ("t1", 0.0, "front"),
        ("t1", 0.1, "front"),
    ]
    assert figure.stairs == ((0.4, 0.82), (0.6, 0.82), (0.6, 0.85), (0.9, 0.85), (0.9, 0.9))
    assert figure.exact_stairs == ((0.6, 0.85), (0.9, 0.85), (0.9, 0.9))
    assert figure.rival_stairs == ((0.5, 0.8), (0.9, 0.8), (0.9, 0.9))
    assert figure.caption.startswith("2 of 2 trials drawn: 2 points of exact zeros, 2 thresholded, 3 on the front")
    assert dict(figure.marks[1].detail)["trial"] == "t0 (baseline)"
    assert dict(figure.marks[3].detail)["threshold τ"] == "0.1"

    page = draw_html(figure, tmp_path / "pareto.html").read_text()
    traces = {trace["name"]: trace for trace in plot_json(page)[0]}
    symbols = {name: trace["marker"]["symbol"] for name, trace in traces.items() if "marker" in trace}
    assert symbols == {
        "dominated, thresholded": "diamond",
        "on the front": "circle",
        "on the front, thresholded": "diamond",
        "baseline (α = 0)": "star",
    }
    assert {"front of exact zeros", "baseline with thresholds", "score limit"} < traces.keys()
    assert draw_png(figure, tmp_path / "p.png").stat().st_size > 10_000


def test_what_misses_the_limit_is_a_hollow_mark(tmp_path: Path) -> None:
    figure = front_figure_data(SWEEP, "squad", 0.02)
    traces = {trace["name"]: trace for trace in plot_json(draw_html(figure, tmp_path / "p.html").read_text())[0]}
    missed = [mark for mark in figure.marks if mark.role == "infeasible"]
    assert traces["infeasible"]["marker"]["symbol"] == "circle-open"
    assert not any(
        "open" in trace["marker"]["symbol"]
        for name, trace in traces.items()
        if "marker" in trace and name != "infeasible"
    )
    assert (list(traces["infeasible"]["x"]), list(traces["infeasible"]["y"])) == (
        [mark.density for mark in missed],
        [mark.score for mark in missed],
    )


# --- several seeds ----------------------------------------------------------------------------------------------------


def test_seeds_of_a_setting_are_one_mark_with_bars(tmp_path: Path) -> None:
    records = [
        make_record("t0", 0.90, 0.9, baseline=True, seed=0, setting="t0", config=alpha(0.0)),
        make_record("t1", 0.92, 0.9, baseline=True, seed=1, setting="t0", config=alpha(0.0)),
        make_record("t2", 0.80, 0.4, seed=0, setting="t2", config=alpha(1.0)),
        make_record("t3", 0.84, 0.6, seed=1, setting="t2", config=alpha(1.0)),
        make_record("t4", 0.70, 0.7, seed=0, setting="t4", config=alpha(2.0)),
    ]
    figure = front_figure_data(records, "squad", 0.2)
    assert [(mark.trial, mark.role) for mark in figure.marks] == [
        ("t0", "baseline"), ("t2", "front"), ("t4", "dominated")
    ]  # fmt: skip
    mark = figure.marks[1]
    assert (mark.density, mark.score) == pytest.approx((0.5, 0.82))
    assert mark.spread == pytest.approx((0.2 / 2**0.5, 0.04 / 2**0.5))
    assert dict(mark.detail)["seeds"] == "2, score ± 0.0283, density ± 0.1414"
    assert figure.score_limit == pytest.approx(0.91 - 0.2)
    assert "5 of 5 trials drawn, 2 on the front, bars are standard deviations over seeds" in figure.caption
    traces = {trace["name"]: trace for trace in plot_json(draw_html(figure, tmp_path / "p.html").read_text())[0]}
    assert traces["on the front"]["error_x"]["array"] == pytest.approx([0.2 / 2**0.5])
    assert traces["on the front"]["error_y"]["visible"] is True
    assert traces["dominated"]["error_y"]["visible"] is False
    assert draw_png(figure, tmp_path / "p.png").stat().st_size > 10_000


@pytest.mark.parametrize("taus", [(0.0,), (0.0, 0.1)], ids=["exact", "dialled"])
@pytest.mark.parametrize("settings", [3, 4], ids=["feasible", "infeasible"])
def test_nothing_of_a_png_is_cut_at_its_edge(taus: tuple[float, ...], settings: int, tmp_path: Path) -> None:
    """Two seeds: with thresholds and an infeasible point, every name that a legend can hold."""
    from matplotlib import image

    points = [("t0", 0.9, 0.9, 0.0), ("t1", 0.88, 0.5, 0.1), ("t2", 0.86, 0.7, 0.5), ("t3", 0.5, 0.3, 1.0)][:settings]
    records = [
        make_record(
            f"{trial}-s{seed}", score, density, baseline=weight == 0.0, seed=seed, setting=trial, config=alpha(weight),
            dial=dial(*((tau, score - tau / 20, density - tau * weight - tau / 20) for tau in taus)),
        )
        for trial, score, density, weight in points
        for seed in (0, 1)
    ]  # fmt: skip
    figure = front_figure_data(records, "squad", 0.05)
    assert len({mark.role for mark in figure.marks}) == settings
    pixels = image.imread(draw_png(figure, tmp_path / "p.png"))[:, :, :3]
    assert (pixels[:, -10:] == 1.0).all()
    assert (pixels[:, :10] == 1.0).all()


def test_a_model_in_a_folder_is_named_without_it() -> None:
    assert (
        front_figure_data(SWEEP, "squad", model="/home/me/flan-t5-xl").title == "squad, flan-t5-xl, bfloat16, gelu_new"
    )
    assert front_figure_data(SWEEP, "squad", model="google/flan-t5-xl").title.startswith("squad, google/flan-t5-xl, ")


def test_the_ranges_hold_the_bars() -> None:
    records = [
        make_record(f"t1-s{seed}" if seed else "t1", score, density, seed=seed, setting="t1")
        for seed, (score, density) in enumerate([(0.5, 0.2), (0.9, 0.6)])
    ]
    (low, high), (bottom, top) = ranges_of(front_figure_data(records, "squad"))
    spread = 0.4 / 2**0.5
    assert low < 0.4 - spread
    assert high > 0.4 + spread
    assert bottom < 0.7 - spread
    assert top > 0.7 + spread
