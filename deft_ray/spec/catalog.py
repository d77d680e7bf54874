"""The names a spec may use: tasks with what they are, model families with what they can do.

A plain table, so that a spec is checked without importing anything heavy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One task: where its rows lie, which columns it reads, how it is asked and scored.

    Args:
        name: Name in a spec.
        kind: ``classification``, ``regression``, ``question`` or ``image``.
        source: ``glue``, ``squad``, ``nano``, ``cifar10`` or ``images``.
        columns: Text columns in the order in which they enter the prompt or the encoder, or the column of images.
        prompt: Text-to-text prompt with one ``{column}`` per text column.
        labels: Label words, index = label number; empty for regression, questions and a folder of images.
        metric: Key of the score (see ``tasks.scoring``).
        extra_metrics: Reported beside the score.
        validation: Name of the validation split.
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


def _glue(
    name: str,
    columns: tuple[str, ...],
    labels: tuple[str, ...],
    metric: str = "accuracy",
    extra_metrics: tuple[str, ...] = (),
    kind: str = "classification",
    validation: str = "validation",
) -> Task:
    prompt = name + "".join(f" {column}: {{{column}}}" for column in columns)
    return Task(name, kind, "glue", columns, prompt, labels, metric, extra_metrics, validation)


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
    ),
    _glue("qnli", ("question", "sentence"), ("entailment", "not_entailment")),
    _glue("rte", ("sentence1", "sentence2"), ("entailment", "not_entailment")),
    Task(
        "squad",
        "question",
        "squad",
        ("question", "context"),
        "question: {question} context: {context}",
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
        ("question", "context"),
        "question: {question} context: {context}",
        (),
        "f1",
        ("exact_match",),
    ),
    Task(
        "cifar10",
        "image",
        "cifar10",
        ("img",),
        "",
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        "accuracy",
        validation="test",
    ),
    Task("images", "image", "images", ("img",), "", (), "accuracy"),
)

TASKS: dict[str, Task] = {task.name: task for task in _ALL}

#: Kinds of task that a model family can be trained on.
FAMILY_KINDS: dict[str, tuple[str, ...]] = {
    "t5": ("classification", "regression", "question"),
    "bert": ("classification", "regression"),
    "roberta": ("classification", "regression"),
    "opt": ("classification", "regression"),
    "gpt2": ("classification", "regression"),
    "vit": ("image",),
}

#: Families with an encoder and a decoder; the others have one stack.
TWO_STACKS = ("t5",)

#: Model name of the pretrained model that ships with the package.
NANO = "nano"

#: Sections whose leaves belong to a trial and may be searched.
TRIAL_SECTIONS = ("adapter", "deft", "train")


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
