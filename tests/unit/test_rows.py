"""Rows from a folder: all of them, or always the same few; never without a label."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deft_ray.errors import SetupError
from deft_ray.nano.tasks import generate
from deft_ray.spec.catalog import TASKS
from deft_ray.tasks.rows import check_data_folder, load_rows, parquet_file
from tests.tiny import GLUE_TASKS, glue_rows, squad_rows


def write(folder: Path, task: str, split: str, rows: list[dict[str, object]]) -> None:
    file = parquet_file(TASKS[task], split, folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_a_folder_gives_both_splits_in_order(tiny_data: Path, task: str) -> None:
    assert load_rows(task, "train", str(tiny_data), None) == glue_rows(task, "train", 30)
    assert load_rows(task, "validation", str(tiny_data), None) == glue_rows(task, "validation", 14)


def test_mnli_is_validated_on_matched(tmp_path: Path) -> None:
    write(tmp_path, "mnli", "validation_matched", glue_rows("mnli", "validation", 2))

    assert len(load_rows("mnli", "validation", str(tmp_path), None)) == 2
    assert (tmp_path / "glue" / "mnli" / "validation_matched.parquet").is_file()


def test_squad_lies_in_its_own_folder(tiny_data: Path) -> None:
    assert load_rows("squad", "validation", str(tiny_data), None) == squad_rows("validation", 14)


def test_a_limit_takes_the_same_rows_every_time(tiny_data: Path) -> None:
    rows = glue_rows("sst2", "train", 30)
    some = load_rows("sst2", "train", str(tiny_data), 10)

    assert some == load_rows("sst2", "train", str(tiny_data), 10)
    assert len({row["idx"] for row in some}) == 10
    assert all(row in rows for row in some)
    assert some != rows[:10], "files are sorted by label now and then: the first rows would not do"
    assert load_rows("sst2", "train", str(tiny_data), 30) == load_rows("sst2", "train", str(tiny_data), 99) == rows


def test_limits_of_two_splits_and_tasks_do_not_follow_each_other(tiny_data: Path) -> None:
    picks = [
        [row["idx"] for row in load_rows(task, split, str(tiny_data), 8)]
        for task, split in (("sst2", "train"), ("rte", "train"), ("rte", "validation"))
    ]
    assert picks[0] != picks[1] != picks[2]


def test_nano_rows_are_generated() -> None:
    assert load_rows("nano-sentiment", "train", None, 5) == generate("nano-sentiment", "train", 5)
    assert len(load_rows("nano-sentiment", "validation", None, None)) == 500


@pytest.mark.parametrize("label", [-1, 2])
def test_rows_without_a_label_are_refused(tmp_path: Path, label: int) -> None:
    write(tmp_path, "sst2", "train", [{"sentence": "a boat", "label": 0}, {"sentence": "a horse", "label": label}])

    with pytest.raises(SetupError, match=r"^sst2: train: rows without a label \(label -1\); needs a labelled split$"):
        load_rows("sst2", "train", str(tmp_path), None)


@pytest.mark.parametrize("label", [-1.0, 5.2])
def test_similarities_without_a_label_are_refused(tmp_path: Path, label: float) -> None:
    write(tmp_path, "stsb", "train", [{"sentence1": "a boat", "sentence2": "a horse", "label": label}])

    with pytest.raises(SetupError, match=r"^stsb: train: rows without a label \(label -1\); needs a labelled split$"):
        load_rows("stsb", "train", str(tmp_path), None)


def test_questions_without_an_answer_are_refused(tmp_path: Path) -> None:
    row = {**squad_rows("train", 1)[0], "answers": {"text": [], "answer_start": []}}
    write(tmp_path, "squad", "train", [squad_rows("train", 1)[0], row])

    with pytest.raises(SetupError, match=r"^squad: train: rows without an answer; needs a labelled split$"):
        load_rows("squad", "train", str(tmp_path), None)


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    file = parquet_file(TASKS["sst2"], "train", tmp_path)
    file.parent.mkdir(parents=True)
    pq.write_table(pa.table({"sentence": pa.array([], pa.string()), "label": pa.array([], pa.int64())}), file)

    with pytest.raises(SetupError, match=r"^sst2: train: no rows$"):
        load_rows("sst2", "train", str(tmp_path), None)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"glue/rte/train\.parquet: no such file; the task 'rte' needs this split$"):
        load_rows("rte", "train", str(tmp_path), None)


def test_a_good_folder_passes_the_check(tiny_data: Path) -> None:
    check_data_folder([*GLUE_TASKS, "squad", "nano-question"], tiny_data)


def test_the_check_names_every_fault(tmp_path: Path) -> None:
    write(tmp_path, "sst2", "train", [{"text": "a boat"}])
    write(tmp_path, "squad", "train", [{"question": "who?", "context": "a boat"}])

    with pytest.raises(SetupError) as caught:
        check_data_folder(["sst2", "squad", "nano-sentiment"], tmp_path)

    assert str(caught.value).splitlines() == [
        f"{tmp_path}/glue/sst2/train.parquet: data.dir: lacks the column sentence, label; needs sentence, label",
        f"{tmp_path}/glue/sst2/validation.parquet: data.dir: no such file; the task 'sst2' needs this split",
        f"{tmp_path}/squad/train.parquet: data.dir: lacks the column answers; needs question, context, answers",
        f"{tmp_path}/squad/validation.parquet: data.dir: no such file; the task 'squad' needs this split",
    ]
