"""Tasks in the user's own files: what a spec must say, what the files must hold, what comes of them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from deft_ray.errors import SetupError, SpecError
from deft_ray.spec.catalog import FAMILY_KINDS, TEXT_TO_TEXT, Task, find_task
from deft_ray.spec.loading import load_spec
from deft_ray.spec.resolve import resolve_baseline, to_tree
from deft_ray.spec.schema import SweepSpec
from deft_ray.tasks.own import check_own_files, read_own_rows
from deft_ray.tasks.rows import load_rows

Row = dict[str, Any]

REVIEWS: Row = {
    "train": "train.csv",
    "validation": "dev.csv",
    "text": "body",
    "label": "stars",
    "labels": ["bad", "good"],
}
PAIRS: Row = {**REVIEWS, "text": ["one", "two"], "label": "same", "labels": ["no", "yes", "unclear"]}
PRICES: Row = {"train": "train.csv", "validation": "dev.csv", "text": "body", "label": "price", "metric": "pearson"}
ASKED: Row = {"train": "train.csv", "validation": "dev.csv", "question": "q", "context": "c", "answer": "a"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user is: two files stand there."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.csv", "dev.csv"):
        (tmp_path / name).touch()
    return tmp_path


def load(own: Any, **data: Any) -> SweepSpec:
    """Load a spec of one own task, or of those given, for the tiny encoder family unless told otherwise."""
    family = data.pop("family", "bert")
    own = own if "train" not in own else {"mine": own}
    content = {
        "name": "try",
        "model": {"name": "org/model", "family": family},
        "data": {"tasks": list(own), "own": own, **data},
        "train": {"steps": 1},
    }
    Path("spec.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return load_spec("spec.yaml")


def faults_of(own: Any, **data: Any) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load(own, **data)
    return [fault.partition(": data.")[2] for fault in caught.value.faults]


def task_of(own: Row, **data: Any) -> Task:
    return find_task("mine", load(own, **data).data)


# --- what a spec says -------------------------------------------------------------------------------------------------


def test_an_entry_is_a_task() -> None:
    task = task_of(REVIEWS)
    assert (task.kind, task.source, task.columns, task.labels) == ("classification", "own", ("text",), ("bad", "good"))
    assert task.prompt.format(text="a boat") == "mine body: a boat"
    assert (task.metric, task.extra_metrics) == ("accuracy", ())
    pair = task_of({**PAIRS, "text": ["the {one}", "two"]})
    assert pair.prompt.format(text1="a", text2="b") == "mine the {one}: a two: b"
    regression = task_of(PRICES)
    assert (regression.kind, regression.labels, regression.extra_metrics) == ("regression", (), ("spearman",))
    question = task_of(ASKED, family="t5")
    assert (question.kind, question.metric, question.extra_metrics) == ("question", "f1", ("exact_match",))
    assert question.prompt.format(question="who?", context="me") == "question: who? context: me"


@pytest.mark.parametrize(
    ("metric", "beside"),
    [("accuracy", ()), ("f1", ("accuracy",)), ("matthews", ("accuracy",))],
)
def test_a_classes_metric_is_the_score(metric: str, beside: tuple[str, ...]) -> None:
    task = task_of({**REVIEWS, "metric": metric})
    assert (task.metric, task.extra_metrics) == (metric, beside)


def test_spearman_has_pearson_beside() -> None:
    task = task_of({**PRICES, "metric": "spearman"})
    assert (task.metric, task.extra_metrics) == ("spearman", ("pearson",))


def test_files_are_relative_to_the_data_folder_or_to_the_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "train.csv").touch()
    monkeypatch.setenv("HOME", str(folder))
    own = {**REVIEWS, "validation": "~/dev.csv"}
    assert task_of(own, dir="data").files == ("data/train.csv", f"{folder}/dev.csv")
    assert task_of(own).files == ("train.csv", f"{folder}/dev.csv")
    assert faults_of({**REVIEWS, "train": str(folder / "train.csv")}, dir="data") == [
        'own.mine.validation: no such file in data.dir (got "dev.csv")'
    ]


@pytest.mark.parametrize(
    ("own", "faults"),
    [
        ({**REVIEWS, "lable": "x"}, [
            "own.mine.lable: unknown key; did you mean 'label'? allowed: train, validation, text, label, labels, "
            "question, context, answer, metric"
        ]),
        ({**REVIEWS, "text": 5}, ["own.mine.text: must be a text or a list (got 5)"]),
        ({**PAIRS, "text": ["one", 5]}, ["own.mine.text.1: must be a text (got 5)"]),
        ({**PAIRS, "text": []}, ["own.mine.text: must be one column, or two of a pair (got [])"]),
        ({**PAIRS, "text": ["a", "b", "c"]},
         ['own.mine.text: must be one column, or two of a pair (got ["a", "b", "c"])']),
        ({key: value for key, value in REVIEWS.items() if key != "validation"}, ["own.mine.validation: is required"]),
        ({**REVIEWS, **ASKED}, [
            "own.mine.text: give either text and label, or question, context and answer "
            "(got text, label, question, context, answer)"
        ]),
        ({"train": "train.csv", "validation": "dev.csv"}, [
            "own.mine.text: give either text and label, or question, context and answer (got none of them)"
        ]),
        ({**REVIEWS, "label": None}, [
            "own.mine.label: is required beside text (got nothing); the name of a column"
        ]),
        ({**ASKED, "answer": None, "context": None}, [
            "own.mine.context: is required beside question (got nothing); the name of a column",
            "own.mine.answer: is required beside question (got nothing); the name of a column",
        ]),
        ({**ASKED, "labels": ["a", "b"]}, [
            'own.mine.labels: means nothing where questions are asked (got ["a", "b"])'
        ]),
        ({**REVIEWS, "labels": None}, [
            "own.mine.labels: is required (got nothing): the class names in order; "
            "only with metric pearson or spearman there are none"
        ]),
        ({**REVIEWS, "labels": ["good"]}, ['own.mine.labels: must name two classes or more (got ["good"])']),
        ({**REVIEWS, "labels": [False, "yes"]}, ["own.mine.labels.0: must be a text (got false)"]),
        ({**REVIEWS, "labels": ["a", "b", "a"]}, ['own.mine.labels: class stands twice (got "a")']),
        ({**REVIEWS, "labels": ["a", " b"]}, [
            'own.mine.labels: the name of a class is not empty and has no blank around it (got " b")'
        ]),
        ({**REVIEWS, "metric": "pearson"}, [
            'own.mine.metric: does not score a classification task (got "pearson"); allowed: accuracy, f1, matthews'
        ]),
        ({**REVIEWS, "metric": "recall"}, [
            "own.mine.metric: must be 'accuracy', 'f1', 'matthews', 'pearson' or 'spearman' (got \"recall\")"
        ]),
        ({**PAIRS, "metric": "f1"}, [
            "own.mine.metric: needs two classes, of which the second is the positive one "
            '(got "f1" with 3); allowed: accuracy'
        ]),
        ({**REVIEWS, "train": "no.csv"}, ['own.mine.train: no such file (got "no.csv")']),
        ({**REVIEWS, "train": "no\0.csv"}, ['own.mine.train: no such file (got "no\\u0000.csv")']),
        ({**REVIEWS, "train": "train.tsv"}, [
            'own.mine.train: is no file that can be read (got "train.tsv"); allowed: .parquet, .jsonl, .csv'
        ]),
        ({**REVIEWS, "train": "no.jsonl", "label": None, "labels": ["a"]}, [
            'own.mine.train: no such file (got "no.jsonl")',
            "own.mine.label: is required beside text (got nothing); the name of a column",
            'own.mine.labels: must name two classes or more (got ["a"])',
        ]),
        ({"sst2": REVIEWS}, ['own.sst2: is the name of a known task (got "sst2"); give yours another one']),
        ({"a/b": REVIEWS}, [
            "own.a/b: a task's name may hold up to 100 letters, digits, '_' and '-' only (got \"a/b\")"
        ]),
        ({"mine": 5}, [
            "own.mine: must be a mapping of train, validation, text, label, labels, question, context, answer, metric "
            "(got 5)"
        ]),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_spec_is_told_at_once(own: Any, faults: list[str]) -> None:
    assert sorted(faults_of(own, tasks=["rte"])) == sorted(faults)


def test_a_fault_stands_on_the_line_of_its_key() -> None:
    with pytest.raises(SpecError) as caught:
        load({**REVIEWS, "labels": ["good"], "metric": "pearson"})
    lines = Path("spec.yaml").read_text().splitlines()
    told = [int(fault.split(":")[1]) for fault in caught.value.faults]
    assert [lines[number - 1].split(":")[0].strip() for number in told] == ["labels", "metric"]


def test_a_task_may_be_named_like_a_domain() -> None:
    assert load({"choice": REVIEWS}).data.tasks == ["choice"]


def test_no_list_of_tasks_but_a_mapping() -> None:
    assert faults_of([REVIEWS], tasks=["rte"]) == [f"own: must be a mapping (got {json.dumps([REVIEWS])[:77]}...)"]


def test_a_task_that_is_nowhere_is_told_with_the_own_ones() -> None:
    (fault,) = faults_of(REVIEWS, tasks=["mien"])
    assert fault.startswith("tasks.0: unknown task (got \"mien\"); did you mean 'mine'? allowed: ")
    assert set(fault.partition("allowed: ")[2].split(", ")) >= {"mine", "sst2"}


def test_a_family_does_what_it_can() -> None:
    (fault,) = faults_of(ASKED)
    assert fault.startswith("tasks.0: a question task cannot be done by the model family 'bert' (got \"mine\")")
    (fault,) = faults_of(PRICES, family="t5")
    head, _, able = fault.partition("; families that can: ")
    assert head == (
        "tasks.0: the model family 't5' does a regression by the likelihood of STS-B's answers, "
        'so none of your own (got "mine")'
    )
    assert set(able.split(", ")) == set(FAMILY_KINDS) - set(TEXT_TO_TEXT)
    assert load(PRICES).data.tasks == ["mine"]
    assert load(REVIEWS, family="t5").data.tasks == ["mine"]


def test_families_that_answer_in_words_are_those_of_the_models() -> None:
    from deft_ray.models.families import FAMILIES

    assert {name for name, family in FAMILIES.items() if family.text_to_text} == set(TEXT_TO_TEXT)


def test_a_spec_with_an_own_task_survives_its_run_directory() -> None:
    spec = load({"mine": REVIEWS, "pairs": PAIRS})
    Path("again.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(to_tree(spec)))))
    assert load_spec("again.yaml") == spec
    flat = resolve_baseline(spec, "t0000", "pairs", 0).flat()
    assert flat["data.own.pairs.text"] == "one,two"
    assert flat["data.own.mine.labels"] == "bad,good"
    assert all(value is None or isinstance(value, str | int | float) for value in flat.values())
    assert not [key for key in resolve_baseline(load({}, tasks=["rte"]), "t", "rte", 0).flat() if "own" in key]


# --- what files hold --------------------------------------------------------------------------------------------------


def write_csv(file: Path, rows: list[Row]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(file: Path, rows: list[Row]) -> None:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def write_parquet(file: Path, rows: list[Row]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), file)


WRITERS: dict[str, Callable[[Path, list[Row]], None]] = {
    "csv": write_csv,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
}

every_format = pytest.mark.parametrize("suffix", list(WRITERS))


def task_on(own: Row, suffix: str, rows: list[Row], family: str = "bert") -> Task:
    """A task whose training file holds these rows."""
    WRITERS[suffix](Path(f"rows.{suffix}"), rows)
    return task_of({**own, "train": f"rows.{suffix}"}, family=family)


def told(task: Task) -> list[str]:
    with pytest.raises(SetupError) as caught:
        read_own_rows(task, "train")
    place = f"{task.files[0]}: data.own.mine.train: "
    lines = str(caught.value).splitlines()
    assert all(line.startswith(place) for line in lines)
    return [line.removeprefix(place) for line in lines]


@every_format
def test_texts_and_labels_by_name_or_number(suffix: str) -> None:
    texts = ['a "boat", red', "un été\nlong", "null", "12", " NA "]
    want = [{"text": text, "label": index % 2} for index, text in enumerate(texts)]
    for labels in (["bad", "good"], [0, 1], ["0", "1"], [0.0, 1.0]):
        rows = [{"id": i, "body": text, "stars": labels[i % 2]} for i, text in enumerate(texts)]
        assert read_own_rows(task_on(REVIEWS, suffix, rows), "train") == want


@every_format
def test_pairs(suffix: str) -> None:
    rows = [{"two": "b", "same": "unclear", "one": "a"}, {"two": "", "same": "no", "one": "c"}]
    assert read_own_rows(task_on(PAIRS, suffix, rows), "train") == [
        {"text1": "a", "text2": "b", "label": 2},
        {"text1": "c", "text2": "", "label": 0},
    ]


@every_format
def test_values(suffix: str) -> None:
    rows = [{"body": "a", "price": 12.5}, {"body": "b", "price": -3.0}, {"body": "c", "price": 1e6}]
    assert [row["label"] for row in read_own_rows(task_on(PRICES, suffix, rows), "train")] == [12.5, -3.0, 1e6]


@pytest.mark.parametrize(
    ("suffix", "answer", "texts"),
    [
        ("csv", "red", ["red"]),
        ("jsonl", "red", ["red"]),
        ("parquet", "red", ["red"]),
        ("jsonl", ["red", "rosy"], ["red", "rosy"]),
        ("parquet", ["red", "rosy"], ["red", "rosy"]),
        ("jsonl", {"text": ["red"], "answer_start": [3]}, ["red"]),
        ("parquet", {"text": ["red"], "answer_start": [3]}, ["red"]),
    ],
)
def test_questions_with_one_answer_or_some(suffix: str, answer: Any, texts: list[str]) -> None:
    rows = [{"q": "which?", "c": "it is red", "a": answer}]
    (row,) = read_own_rows(task_on(ASKED, suffix, rows, "t5"), "train")
    assert (row["question"], row["context"], row["answers"]["text"]) == ("which?", "it is red", texts)
    assert row["answers"].get("answer_start") == ([3] if isinstance(answer, dict) else None)


def test_names_that_are_numbers_are_names_everywhere() -> None:
    """The column of a file with stars holds 1 to 3; a 0 there must be no first class."""
    own = {**REVIEWS, "labels": ["1", "2", "3"]}
    for suffix, stars in (("csv", 2), ("jsonl", 2), ("jsonl", "2"), ("parquet", 2.0)):
        (row,) = read_own_rows(task_on(own, suffix, [{"body": "a", "stars": stars}]), "train")
        assert row["label"] == 1
    for stars in (0, "0", 4):
        shown = json.dumps(str(stars))
        assert told(task_on(own, "jsonl", [{"body": "a", "stars": stars}])) == [
            f"row 1: unknown label (got {shown}); allowed: 1, 2, 3"
        ]


def test_true_and_false_are_names() -> None:
    own = {**REVIEWS, "labels": ["false", "true"]}
    for suffix in ("jsonl", "parquet"):
        assert [
            row["label"]
            for row in read_own_rows(
                task_on(own, suffix, [{"body": "a", "stars": True}, {"body": "b", "stars": False}]), "train"
            )
        ] == [1, 0]
    assert told(task_on(REVIEWS, "jsonl", [{"body": "a", "stars": True}])) == [
        "row 1: unknown label (got true); allowed: bad, good, or 0 to 1"
    ]


@every_format
@pytest.mark.parametrize(
    ("own", "rows", "faults"),
    [
        (REVIEWS, [{"body": "a", "stars": "bad"}, {"body": "b", "stars": "meh"}],
         ['row 2: unknown label (got "meh"); allowed: bad, good, or 0 to 1']),
        (REVIEWS, [{"body": "  ", "stars": "bad"}], ["row 1: the text must not be empty"]),
        (PAIRS, [{"one": "", "two": " ", "same": "no"}], ["row 1: the text1 and the text2 must not be empty"]),
        (ASKED, [{"q": "who?", "c": "", "a": "me"}], ["row 1: the context must not be empty"]),
        (ASKED, [{"q": "who?", "c": "me", "a": ""}],
         ['row 1: an answer must be a text that is not empty (got "")']),
        (PRICES, [{"body": "a", "price": "cheap"}],
         ['row 1: unknown label (got "cheap"); allowed: any finite number']),
        (PRICES, [{"body": "a", "price": math.inf}],
         ["row 1: unknown label (got Infinity); allowed: any finite number"]),
        (REVIEWS, [{"body": "a", "star": "bad"}], ["lacks the column stars; has body, star"]),
        (ASKED, [{"q": "a"}], ["lacks the column c, a; has q"]),
        (REVIEWS, [{"body": "a", "stars": "x"}] * 9,
         [*(f'row {n}: unknown label (got "x"); allowed: bad, good, or 0 to 1' for n in (1, 2, 3)),
          "6 more rows that cannot be used"]),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used_are_named(suffix: str, own: Row, rows: list[Row], faults: list[str]) -> None:
    assert told(task_on(own, suffix, rows, "t5" if own is ASKED else "bert")) == faults


@pytest.mark.parametrize(
    ("own", "row", "fault"),
    [
        (REVIEWS, {"body": 5, "stars": 0}, "the text must be a text (got 5)"),
        (REVIEWS, {"stars": 0}, "the text must be a text (got null)"),
        (REVIEWS, {"body": "a"}, "unknown label (got null); allowed: bad, good, or 0 to 1"),
        (REVIEWS, {"body": "a", "stars": 2}, "unknown label (got 2); allowed: bad, good, or 0 to 1"),
        (REVIEWS, {"body": "a", "stars": -1}, "unknown label (got -1); allowed: bad, good, or 0 to 1"),
        (REVIEWS, {"body": "a", "stars": 0.5}, "unknown label (got 0.5); allowed: bad, good, or 0 to 1"),
        (PRICES, {"body": "a", "price": True}, "unknown label (got true); allowed: any finite number"),
        (PRICES, {"body": "a", "price": None}, "unknown label (got null); allowed: any finite number"),
        (ASKED, {"q": "a", "c": "b", "a": []}, "no answer (got []); needs a text or a list of texts"),
        (ASKED, {"q": "a", "c": "b", "a": None}, "no answer (got null); needs a text or a list of texts"),
        (ASKED, {"q": "a", "c": "b", "a": 7}, "no answer (got 7); needs a text or a list of texts"),
        (ASKED, {"q": "a", "c": "b", "a": ["x", 7]}, "an answer must be a text that is not empty (got 7)"),
        (ASKED, {"q": "a", "c": "b", "a": {"texts": 1}}, "no answer (got null); needs a text or a list of texts"),
    ],
)
def test_values_of_the_wrong_kind_are_named(own: Row, row: Row, fault: str) -> None:
    good = {"body": "a", "stars": 0, "price": 1, "q": "a", "c": "b", "a": "b"}
    assert told(task_on(own, "jsonl", [good, row], "t5" if own is ASKED else "bert")) == [f"row 2: {fault}"]


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("rows.csv", b"", "no rows"),
        ("rows.csv", b"body,stars\n", "no rows"),
        ("rows.csv", b"body,stars\na, b,bad\n",
         "row 1: has 3 fields, the header 2; a text that holds a comma stands in quotes"),
        ("rows.csv", b"body,stars\na,bad\nb\n",
         "row 2: has 1 fields, the header 2; a text that holds a comma stands in quotes"),
        ("rows.csv", b"body,stars,body\na,bad,b\n", "the column body stands twice"),
        ("rows.csv", b'body,stars\n"a,bad\n', "unexpected end of data"),
        ("rows.jsonl", b"\n", "no rows"),
        ("rows.jsonl", b'{"body": "a", "stars": 0}\n[1]\n', "line 2: is no JSON object"),
        ("rows.jsonl", b'{"body": "a"', "line 1: is no JSON object"),
        ("rows.jsonl", b'{"text": "a"}', "lacks the column body, stars; has text"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named(name: str, content: bytes, fault: str) -> None:
    Path(name).write_bytes(content)
    assert told(task_of({**REVIEWS, "train": name})) == [fault]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_a_file_that_is_no_utf8_is_named(name: str) -> None:
    Path(name).write_bytes(b"body,stars\n\xff\xfe,bad\n")
    (fault,) = told(task_of({**REVIEWS, "train": name}))
    assert "codec can't decode byte 0xff" in fault


def test_a_file_that_is_no_parquet_is_named() -> None:
    Path("rows.parquet").write_bytes(b"body,stars\n")
    (fault,) = told(task_of({**REVIEWS, "train": "rows.parquet"}))
    assert fault.startswith("is no parquet file (")
    write_parquet(Path("rows.parquet"), [{"body": "a", "stars": "bad"}])
    pq.write_table(pq.read_table("rows.parquet").slice(0, 0), "rows.parquet")
    assert told(task_of({**REVIEWS, "train": "rows.parquet"})) == ["no rows"]


def test_a_byte_order_mark_is_no_column() -> None:
    Path("rows.csv").write_bytes(b"\xef\xbb\xbfbody,stars\r\na,good\r\n\r\n")
    assert read_own_rows(task_of({**REVIEWS, "train": "rows.csv"}), "train") == [{"text": "a", "label": 1}]


def test_a_file_that_is_gone_since_is_named(folder: Path) -> None:
    task = task_of(REVIEWS)
    (folder / "train.csv").unlink()
    assert told(task) == ["no such file"]


def test_faults_of_all_files_come_together() -> None:
    write_csv(Path("train.csv"), [{"body": "a", "stars": "meh"}])
    write_csv(Path("dev.csv"), [{"body": "a"}])
    spec = load({"mine": REVIEWS, "pairs": PAIRS})
    with pytest.raises(SetupError) as caught:
        check_own_files([find_task(name, spec.data) for name in ("mine", "pairs")])

    assert str(caught.value).splitlines() == [
        'train.csv: data.own.mine.train: row 1: unknown label (got "meh"); allowed: bad, good, or 0 to 1',
        "dev.csv: data.own.mine.validation: lacks the column stars; has body",
        "train.csv: data.own.pairs.train: lacks the column one, two, same; has body, stars",
        "dev.csv: data.own.pairs.validation: lacks the column one, two, same; has body",
    ]


def test_a_limit_takes_the_same_rows_every_time() -> None:
    rows = [{"body": f"text {index}", "stars": index % 2} for index in range(30)]
    write_csv(Path("train.csv"), rows)
    task = task_of(REVIEWS)
    some = load_rows(task, "train", None, 8)
    assert some == load_rows(task, "train", None, 8)
    assert len({row["text"] for row in some}) == 8
    assert load_rows(task, "train", None, None) == [{"text": row["body"], "label": row["stars"]} for row in rows]
