"""Rows from a folder: all of them, or always the same few; never without a label."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deft_ray.errors import SetupError
from deft_ray.nano.tasks import generate
from deft_ray.spec.catalog import TASKS
from deft_ray.tasks.rows import check_data_folder, load_beside, load_rows, parquet_file
from tests.tiny import GLUE_TASKS, glue_rows, squad_rows


def write(folder: Path, task: str, split: str, rows: list[dict[str, object]]) -> None:
    file = parquet_file(TASKS[task], split, folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_a_folder_gives_both_splits_in_order(tiny_data: Path, task: str) -> None:
    assert load_rows(TASKS[task], "train", str(tiny_data), None) == glue_rows(task, "train", 30)
    assert load_rows(TASKS[task], "validation", str(tiny_data), None) == glue_rows(task, "validation", 14)


def test_mnli_is_validated_on_matched(tmp_path: Path) -> None:
    write(tmp_path, "mnli", "validation_matched", glue_rows("mnli", "validation", 2))

    assert len(load_rows(TASKS["mnli"], "validation", str(tmp_path), None)) == 2
    assert (tmp_path / "glue" / "mnli" / "validation_matched.parquet").is_file()


def test_squad_lies_in_its_own_folder(tiny_data: Path) -> None:
    assert load_rows(TASKS["squad"], "validation", str(tiny_data), None) == squad_rows("validation", 14)


def test_a_limit_takes_the_same_rows_every_time(tiny_data: Path) -> None:
    rows = glue_rows("sst2", "train", 30)
    some = load_rows(TASKS["sst2"], "train", str(tiny_data), 10)

    assert some == load_rows(TASKS["sst2"], "train", str(tiny_data), 10)
    assert len({row["idx"] for row in some}) == 10
    assert all(row in rows for row in some)
    assert some != rows[:10], "files are sorted by label now and then: the first rows would not do"
    assert (
        load_rows(TASKS["sst2"], "train", str(tiny_data), 30)
        == load_rows(TASKS["sst2"], "train", str(tiny_data), 99)
        == rows
    )


def test_limits_of_two_splits_and_tasks_do_not_follow_each_other(tiny_data: Path) -> None:
    picks = [
        [row["idx"] for row in load_rows(TASKS[task], split, str(tiny_data), 8)]
        for task, split in (("sst2", "train"), ("rte", "train"), ("rte", "validation"))
    ]
    assert picks[0] != picks[1] != picks[2]


def test_nano_rows_are_generated() -> None:
    assert load_rows(TASKS["nano-sentiment"], "train", None, 5) == generate("nano-sentiment", "train", 5)
    assert len(load_rows(TASKS["nano-sentiment"], "validation", None, None)) == 500


def test_mnli_has_mismatched_rows_beside_where_they_are(tmp_path: Path) -> None:
    assert load_beside(TASKS["mnli"], str(tmp_path), None) == {}
    write(tmp_path, "mnli", "validation_mismatched", glue_rows("mnli", "mismatched", 5))

    assert (tmp_path / "glue" / "mnli" / "validation_mismatched.parquet").is_file()
    assert load_beside(TASKS["mnli"], str(tmp_path), None) == {"mismatched": glue_rows("mnli", "mismatched", 5)}
    assert len(load_beside(TASKS["mnli"], str(tmp_path), 3)["mismatched"]) == 3
    assert all(load_beside(TASKS[task], str(tmp_path), None) == {} for task in (*GLUE_TASKS, "squad") if task != "mnli")


NAMES = "negative, positive, or 0 to 1"
GOOD = {"sentence": "a boat", "label": 0}
PAIR = {"sentence1": "a boat", "sentence2": "a horse", "label": 1}
ASKED = squad_rows("train", 1)[0]


@pytest.mark.parametrize(
    ("task", "rows", "faults"),
    [
        ("sst2", [GOOD, {**GOOD, "label": -1}], ["row 2: no label (label -1); needs a labelled split"]),
        ("sst2", [GOOD, {**GOOD, "label": 2}], [f"row 2: unknown label (got 2); allowed: {NAMES}"]),
        ("sst2", [{**GOOD, "label": None}], [f"row 1: unknown label (got null); allowed: {NAMES}"]),
        ("sst2", [{**GOOD, "label": 0.5}], [f"row 1: unknown label (got 0.5); allowed: {NAMES}"]),
        ("sst2", [GOOD, GOOD, {**GOOD, "sentence": " "}], ["row 3: the sentence must not be empty"]),
        ("sst2", [{**GOOD, "sentence": None}], ["row 1: the sentence must be a text (got null)"]),
        ("mrpc", [PAIR, {**PAIR, "sentence1": ""}], []),
        ("mrpc", [{**PAIR, "sentence1": "", "sentence2": "\t"}],
         ["row 1: the sentence1 and the sentence2 must not be empty"]),
        ("stsb", [{**PAIR, "label": float("inf")}], ["row 1: unknown label (got Infinity); allowed: 0 to 5"]),
        ("stsb", [{**PAIR, "label": -1.0}], ["row 1: no label (label -1); needs a labelled split"]),
        ("stsb", [{**PAIR, "label": 5.2}, {**PAIR, "label": 5.0}], ["row 1: unknown label (got 5.2); allowed: 0 to 5"]),
        ("stsb", [{**PAIR, "label": float("nan")}], ["row 1: unknown label (got NaN); allowed: 0 to 5"]),
        ("squad", [ASKED, {**ASKED, "answers": {"text": [], "answer_start": []}}],
         ["row 2: no answer (got []); needs a text or a list of texts"]),
        ("squad", [{**ASKED, "answers": {"text": ["red", ""], "answer_start": [0, 0]}}],
         ['row 1: an answer must be a text that is not empty (got "")']),
        ("squad", [{**ASKED, "answers": None}], ["row 1: no answer (got null); needs a text or a list of texts"]),
        ("squad", [{**ASKED, "question": ""}], ["row 1: the question must not be empty"]),
        ("squad", [{**ASKED, "context": "\n"}], ["row 1: the context must not be empty"]),
        ("sst2", [{**GOOD, "label": 9}] * 5,
         [*(f"row {n}: unknown label (got 9); allowed: {NAMES}" for n in (1, 2, 3)),
          "2 more rows that cannot be used"]),
        ("sst2", [{"sentence": "a boat"}], ["lacks the column label; needs sentence, label"]),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used_are_named(
    tmp_path: Path, task: str, rows: list[dict[str, object]], faults: list[str]
) -> None:
    write(tmp_path, task, "train", rows)
    if not faults:
        assert load_rows(TASKS[task], "train", str(tmp_path), None) == rows
        return
    with pytest.raises(SetupError) as caught:
        load_rows(TASKS[task], "train", str(tmp_path), None)

    assert str(caught.value).splitlines() == [f"{task}: train: {fault}" for fault in faults]


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    file = parquet_file(TASKS["sst2"], "train", tmp_path)
    file.parent.mkdir(parents=True)
    pq.write_table(pa.table({"sentence": pa.array([], pa.string()), "label": pa.array([], pa.int64())}), file)

    with pytest.raises(SetupError, match=r"^sst2: train: no rows$"):
        load_rows(TASKS["sst2"], "train", str(tmp_path), None)
    with pytest.raises(SetupError, match=r"sst2/train\.parquet: data\.dir: no rows; needs sentence, label\n"):
        check_data_folder([TASKS["sst2"]], tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"glue/rte/train\.parquet: no such file; the task 'rte' needs this split$"):
        load_rows(TASKS["rte"], "train", str(tmp_path), None)


def test_a_good_folder_passes_the_check(tiny_data: Path) -> None:
    check_data_folder([TASKS[name] for name in (*GLUE_TASKS, "squad", "nano-question")], tiny_data)


def test_the_check_names_every_fault(tmp_path: Path) -> None:
    write(tmp_path, "sst2", "train", [{"text": "a boat"}])
    write(tmp_path, "squad", "train", [{"question": "who?", "context": "a boat"}])

    with pytest.raises(SetupError) as caught:
        check_data_folder([TASKS[name] for name in ("sst2", "squad", "nano-sentiment")], tmp_path)

    assert str(caught.value).splitlines() == [
        f"{tmp_path}/glue/sst2/train.parquet: data.dir: lacks the column sentence, label; needs sentence, label",
        f"{tmp_path}/glue/sst2/validation.parquet: data.dir: no such file; the task 'sst2' needs this split",
        f"{tmp_path}/squad/train.parquet: data.dir: lacks the column answers; needs question, context, answers",
        f"{tmp_path}/squad/validation.parquet: data.dir: no such file; the task 'squad' needs this split",
    ]


def test_a_mismatched_file_may_be_lacking_but_not_wrong(tmp_path: Path) -> None:
    for split in ("train", "validation_matched"):
        write(tmp_path, "mnli", split, glue_rows("mnli", split, 2))
    check_data_folder([TASKS["mnli"]], tmp_path)
    write(tmp_path, "mnli", "validation_mismatched", [{"premise": "a boat"}])
    with pytest.raises(
        SetupError, match=r"validation_mismatched\.parquet: data\.dir: lacks the column hypothesis, label"
    ):
        check_data_folder([TASKS["mnli"]], tmp_path)
