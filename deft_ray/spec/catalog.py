"""The names a spec may use: tasks with what they are, model families with what they can do.

A plain table, so that a spec is checked without importing anything heavy.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deft_ray.spec.schema import DataSection, OwnSection


@dataclass(frozen=True)
class Task:
    """One task: where its rows lie, which columns it reads, how it is asked and scored.

    Args:
        name: Name in a spec.
        kind: ``classification``, ``regression`` or ``question``.
        source: ``glue``, ``squad``, ``nano`` or ``own``.
        columns: Text columns in the order in which they enter the prompt or the encoder.
        prompt: Text-to-text prompt with one ``{column}`` per text column.
        labels: Label words, index = label number; empty for regression and questions.
        metric: Key of the score (see ``tasks.scoring``).
        extra_metrics: Reported beside the score.
        validation: Name of the validation split.
        beside: Further validation splits that are scored beside the score, as (suffix of the metric's name, split);
            they count in no density, and may be lacking in a folder.
        files: Training and validation file of an own task; empty elsewhere.
        file_columns: An own task's names of the columns: texts in the order of ``columns``, then label or answer.
    """

    name: str
    kind: str
    source: str
    columns: tuple[str, ...]
    prompt: str
    labels: tuple[str, ...]
    metric: str
    extra_metrics: tuple[str, ...] = ()
    validation: str = "validation"
    beside: tuple[tuple[str, str], ...] = ()
    files: tuple[str, ...] = ()
    file_columns: tuple[str, ...] = ()


def _glue(
    name: str,
    columns: tuple[str, ...],
    labels: tuple[str, ...],
    metric: str = "accuracy",
    extra_metrics: tuple[str, ...] = (),
    kind: str = "classification",
    validation: str = "validation",
    beside: tuple[tuple[str, str], ...] = (),
) -> Task:
    prompt = name + "".join(f" {column}: {{{column}}}" for column in columns)
    return Task(name, kind, "glue", columns, prompt, labels, metric, extra_metrics, validation, beside)


_QUESTION_COLUMNS = ("question", "context")
_QUESTION_PROMPT = "question: {question} context: {context}"


_ALL = (
    _glue("cola", ("sentence",), ("unacceptable", "acceptable"), "matthews", ("accuracy",)),
    _glue("sst2", ("sentence",), ("negative", "positive")),
    _glue("mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), extra_metrics=("f1",)),
    _glue("stsb", ("sentence1", "sentence2"), (), "pearson", ("spearman",), kind="regression"),
    _glue("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), extra_metrics=("f1",)),
    _glue(
        "mnli",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        validation="validation_matched",
        beside=(("mismatched", "validation_mismatched"),),
    ),
    _glue("qnli", ("question", "sentence"), ("entailment", "not_entailment")),
    _glue("rte", ("sentence1", "sentence2"), ("entailment", "not_entailment")),
    Task(
        "squad",
        "question",
        "squad",
        _QUESTION_COLUMNS,
        _QUESTION_PROMPT,
        (),
        "f1",
        ("exact_match",),
    ),
    Task(
        "nano-sentiment",
        "classification",
        "nano",
        ("sentence",),
        "nano sentiment sentence: {sentence}",
        ("negative", "positive"),
        "accuracy",
    ),
    Task(
        "nano-entailment",
        "classification",
        "nano",
        ("premise", "hypothesis"),
        "nano entailment premise: {premise} hypothesis: {hypothesis}",
        ("entailment", "neutral", "contradiction"),
        "accuracy",
    ),
    Task(
        "nano-question",
        "question",
        "nano",
        _QUESTION_COLUMNS,
        _QUESTION_PROMPT,
        (),
        "f1",
        ("exact_match",),
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _ALL}

#: Kinds of task that a model family can be trained on.
FAMILY_KINDS: dict[str, tuple[str, ...]] = {
    "t5": ("classification", "regression", "question"),
    "bert": ("classification", "regression"),
    "roberta": ("classification", "regression"),
}

#: Families that answer in words: they choose among a task's answers, or write one.
TEXT_TO_TEXT = ("t5",)

#: Metrics of an own task by its kind, the default first.
OWN_METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "question": ("f1",),
}

#: Metrics that know a positive and a negative class.
TWO_CLASS_METRICS = ("f1", "matthews")

#: What a file of an own task may be.
OWN_SUFFIXES = (".parquet", ".jsonl", ".csv")

_BESIDE_OWN = {"f1": ("accuracy",), "matthews": ("accuracy",), "pearson": ("spearman",), "spearman": ("pearson",)}

#: Model name of the pretrained model that ships with the package.
NANO = "nano"

#: Sections whose leaves belong to a trial and may be searched.
TRIAL_SECTIONS = ("adapter", "deft", "train")


def find_task(name: str, data: DataSection) -> Task:
    """Return a task by its name in a spec: a known one, or one of ``data.own``.

    Raises:
        KeyError: If there is none of this name.
    """
    return _own_task(name, data.own[name], data.dir) if name in data.own else TASKS[name]


def own_file(file: str, folder: str | None) -> str:
    """Return where an own task's file lies: relative to ``data.dir`` if there is one, else to where the user is."""
    return os.path.join(os.path.expanduser(folder or ""), os.path.expanduser(file))


def _own_task(name: str, own: OwnSection, folder: str | None) -> Task:
    files = tuple(own_file(file, folder) for file in (own.train, own.validation))
    if own.question is not None:
        read = (own.question, str(own.context), str(own.answer))
        return Task(
            name,
            "question",
            "own",
            _QUESTION_COLUMNS,
            _QUESTION_PROMPT,
            (),
            "f1",
            ("exact_match",),
            files=files,
            file_columns=read,
        )
    texts = [own.text] if isinstance(own.text, str) else list(own.text or ())
    columns = ("text",) if len(texts) == 1 else ("text1", "text2")
    titles = (text.replace("{", "{{").replace("}", "}}") for text in texts)
    kind = "classification" if own.labels else "regression"
    metric = own.metric or OWN_METRICS[kind][0]
    return Task(
        name,
        kind,
        "own",
        columns,
        name + "".join(f" {title}: {{{column}}}" for title, column in zip(titles, columns, strict=True)),
        tuple(own.labels or ()),
        metric,
        _BESIDE_OWN.get(metric, ()),
        files=files,
        file_columns=(*texts, str(own.label)),
    )


def guess_family(model_name: str, model_type: str | None) -> str | None:
    """Name the family of a model.

    Args:
        model_name: Hub name or folder.
        model_type: ``model_type`` of a local ``config.json``, if there is one.

    Returns:
        A key of :data:`FAMILY_KINDS`, or None where neither argument tells.
    """
    if model_name == NANO:
        return "t5"
    if model_type is not None:
        return model_type if model_type in FAMILY_KINDS else None
    words = re.split(r"[-_.]", model_name.rsplit("/", 1)[-1].lower())
    return next((family for family in FAMILY_KINDS if family in words and "xlm" not in words), None)
