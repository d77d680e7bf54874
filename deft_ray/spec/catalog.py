"""The names a spec may use: tasks with what they are, model families with what they can do.

A plain table, so that a spec is checked without importing anything heavy.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deft_ray.spec.schema import DataSection, OwnSection


@dataclass(frozen=True)
class Task:
    """One task: where its rows lie, which columns it reads, how it is asked and scored.

    Args:
        name: Name in a spec.
        kind: ``classification``, ``regression``, ``question`` or ``image``.
        source: ``glue``, ``squad``, ``nano``, ``cifar10``, ``images`` or ``own``.
        columns: Text columns in the order in which they enter the prompt or the encoder, or the column of images.
        prompt: Text-to-text prompt with one ``{column}`` per text column.
        labels: Label words, index = label number; empty for regression, questions and a folder of images.
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

#: Leaves of ``adapter`` that each kind of adapter reads.
ADAPTER_LEAVES: dict[str, tuple[str, ...]] = {
    "lora": ("r", "lora_alpha", "lora_dropout", "target_modules"),
    "bottleneck": ("reduction_factor", "reads"),
    "prefix": ("virtual_tokens",),
    "prompt": ("virtual_tokens",),
}

#: Leaves of ``deft`` that each approximation reads; ``auto`` may be l0 or tanh.
DEFT_LEAVES: dict[str, tuple[str, ...]] = {
    "auto": ("epsilon", "epsilon_end", "beta"),
    "l0": ("epsilon", "epsilon_end"),
    "tanh": ("beta",),
    "sigmoid": ("beta",),
    "l1": (),
    "l2": (),
}

#: Leaves of ``deft`` that are read where ``adaptive`` is true.
LAMBDA_LEAVES = ("lambda_init", "lambda_noise", "lambda_learning_rate")

#: Kinds of adapter that a model family can take.
FAMILY_ADAPTERS: dict[str, tuple[str, ...]] = {
    "t5": ("lora", "bottleneck", "prefix", "prompt"),
    "bert": ("lora", "bottleneck", "prefix", "prompt"),
    "roberta": ("lora", "bottleneck", "prefix", "prompt"),
    "opt": ("lora", "bottleneck"),
    "gpt2": ("lora", "bottleneck"),
    "vit": ("lora", "bottleneck"),
}


@dataclass(frozen=True)
class PublishedAdapter:
    """One entry of the paper's "% trainable" column (Runwal et al., arXiv:2402.01911) and what meets it.

    Ranks and targets are not printed there: those here are what the printed share leaves room for.

    Args:
        model: Public name.
        settings: Leaves of ``adapter``.
        percent_printed: As it stands in the paper.
        percent_here: What such an adapter, and two classes on an encoder's or decoder's head (ten on ViT's), come to.
        met: ``truncated`` or ``rounded`` to the printed digits, or why it is not met.
    """

    model: str
    settings: dict[str, Any]
    percent_printed: str
    percent_here: float
    met: str


def _lora(r: int, target_modules: str | list[str]) -> dict[str, Any]:
    return {"kind": "lora", "r": r, "target_modules": target_modules}


def _bottleneck(reduction_factor: int, head: str = "own") -> dict[str, Any]:
    return {"kind": "bottleneck", "reduction_factor": reduction_factor, "reads": "sum", "head": head}


PUBLISHED_ADAPTERS: tuple[PublishedAdapter, ...] = (
    PublishedAdapter("roberta-large", _bottleneck(16), "1.17", 1.17799, "truncated"),
    PublishedAdapter(
        "roberta-large", _lora(32, ["query", "value"]), "1.16", 1.17079, "a pooler is counted that is not used"
    ),
    PublishedAdapter("roberta-large", {"kind": "prefix", "virtual_tokens": 60}, "1.11", 1.11656, "truncated"),
    PublishedAdapter("roberta-large", {"kind": "prompt", "virtual_tokens": 60}, "0.31", 0.31317, "truncated"),
    PublishedAdapter("bert-base-uncased", _bottleneck(16, "two-layer"), "1.33", 1.33971, "truncated"),
    PublishedAdapter("bert-base-uncased", _lora(8, ["query", "value"]), "0.27", 0.27004, "truncated"),
    PublishedAdapter("bert-base-uncased", {"kind": "prefix", "virtual_tokens": 50}, "0.83", 0.83613, "truncated"),
    PublishedAdapter("bert-base-uncased", {"kind": "prompt", "virtual_tokens": 50}, "0.03", 0.03647, "truncated"),
    PublishedAdapter("t5-small", _bottleneck(32), "0.33", 0.33429, "truncated"),
    PublishedAdapter("t5-small", _lora(16, ["q", "v"]), "0.96", 0.9654, "truncated"),
    PublishedAdapter("t5-base", _bottleneck(32), "0.40", 0.4038, "truncated"),
    PublishedAdapter("t5-base", _lora(16, ["q", "v"]), "0.78", 0.78758, "truncated"),
    PublishedAdapter("flan-t5-base", _lora(16, "all-linear"), "2.67", 2.66667, "rounded"),
    PublishedAdapter("flan-t5-xl", _bottleneck(16), "0.87", 0.87896, "truncated"),
    PublishedAdapter("flan-t5-xl", _lora(16, "all-linear"), "1.99", 1.22661, "two 4-bit weights are counted as one"),
    PublishedAdapter("flan-t5-xxl", _lora(16, "all-linear"), "1.04", 0.63161, "two 4-bit weights are counted as one"),
    PublishedAdapter("gpt2", _bottleneck(8, "two-layer"), "1.87", 1.87047, "truncated"),
    PublishedAdapter("opt-125m", _lora(8, ["q_proj", "v_proj"]), "0.24", 0.23615, "rounded"),
    PublishedAdapter("opt-350m", _lora(8, ["q_proj", "v_proj"]), "0.24", 0.2372, "rounded"),
    PublishedAdapter("vit-base-patch16-224-in21k", _bottleneck(8), "2.04", 2.04088, "truncated"),
)

#: What is in the names of layers that look their input up in a table, in every family.
TABLES = ("shared", "embed", "wte", "wpe", "relative_attention_bias", "position")
#: Families with an encoder and a decoder, which answer in words: they choose among a task's answers, or write one.
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
