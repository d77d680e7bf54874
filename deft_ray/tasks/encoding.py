"""From rows to examples: text-to-text for encoder-decoders, pairs and a label, or a picture, for models with a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from deft_ray.spec.catalog import TASKS, Task
from deft_ray.tasks.images import Picture, make_pictures
from deft_ray.tasks.rows import Row

#: STS-B's answers in words, as T5 was trained on them: 0.0, 0.2 … 5.0.
_STSB_STEPS = 26


@dataclass(frozen=True)
class Example:
    """One row, ready for a batch.

    Args:
        input_ids: Tokens of the source text or pair.
        target_ids: Tokens of the answer, with end of sequence; empty for encoders.
        label: Class number, regression value, or index among the candidates; -1 for questions.
        answers: Gold answers of a question.
        type_ids: Which text of a pair each token belongs to; empty where the tokenizer makes no difference.
        picture: The image, where a model reads one; there are no token ids then.
    """

    input_ids: list[int]
    target_ids: list[int]
    label: float
    answers: tuple[str, ...] = ()
    type_ids: tuple[int, ...] = ()
    picture: Picture | None = None

    @property
    def source_tokens(self) -> int:
        """Real tokens that the model reads."""
        return len(self.input_ids) if self.picture is None else self.picture.tokens


@dataclass(frozen=True)
class EncodedTask:
    """A task's two splits in tokens.

    Args:
        task: The task.
        train: Training examples.
        validation: Validation examples.
        candidates: Token ids of every possible answer of a text-to-text classification; empty elsewhere.
        values: What each candidate is worth: class numbers, or STS-B's similarities.
    """

    task: Task
    train: list[Example]
    validation: list[Example]
    candidates: list[list[int]]
    values: list[float]

    @property
    def outputs(self) -> int:
        """Outputs of an encoder's head."""
        return len(self.task.labels) or 1


def encode_images(task: Task, train: list[Row], validation: list[Row], processor: Any, tokens: int) -> EncodedTask:
    """Make pictures of both splits; pixels come when a batch needs them.

    Args:
        task: An image task, with all its labels.
        train: Training rows.
        validation: Validation rows.
        processor: The base's image processor.
        tokens: Tokens that the base makes of an image.

    Raises:
        SetupError: If a row holds no image.
    """

    def encode(rows: list[Row]) -> list[Example]:
        pictures = make_pictures(rows, processor, tokens)
        return [
            Example([], [], float(row["label"]), picture=picture) for row, picture in zip(rows, pictures, strict=True)
        ]

    return EncodedTask(task, encode(train), encode(validation), [], [])


def answer_words(task: Task) -> tuple[str, ...]:
    """Return every answer a text-to-text model may choose from; empty for questions."""
    if task.kind == "regression":
        return tuple(f"{step / 5:.1f}" for step in range(_STSB_STEPS))
    return task.labels


def encode_task(
    task_name: str,
    train: list[Row],
    validation: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_to_text: bool,
    max_source_tokens: int,
    max_target_tokens: int,
) -> EncodedTask:
    """Tokenise both splits.

    Args:
        task_name: Key of :data:`~deft_ray.spec.catalog.TASKS`.
        train: Training rows.
        validation: Validation rows.
        tokenizer: The base's tokenizer.
        text_to_text: Whether answers are words.
        max_source_tokens: Sources are cut to so many tokens.
        max_target_tokens: Answers to questions are cut to so many tokens; label words never are.
    """
    task = TASKS[task_name]
    words = answer_words(task) if text_to_text else ()
    candidates = tokenizer(list(words))["input_ids"] if words else []
    values = (
        [index / 5 for index in range(len(words))] if task.kind == "regression" else [*map(float, range(len(words)))]
    )

    def encode(rows: list[Row]) -> list[Example]:
        if not text_to_text:
            return _encode_pairs(task, rows, tokenizer, max_source_tokens)
        return _encode_words(task, rows, tokenizer, candidates, max_source_tokens, max_target_tokens)

    return EncodedTask(task, encode(train), encode(validation), candidates, values)


def _encode_pairs(task: Task, rows: list[Row], tokenizer: PreTrainedTokenizerBase, length: int) -> list[Example]:
    texts = [[row[column] for row in rows] for column in task.columns]
    encoded = tokenizer(*texts, truncation=True, max_length=length)
    blank = tokenizer(" ")["input_ids"]  # GPT-2 adds nothing to a text: an empty one would have no token to answer from
    ids = [source or blank for source in encoded["input_ids"]]
    types = encoded.get("token_type_ids", [()] * len(rows))
    return [
        Example(source, [], float(row["label"]), type_ids=tuple(kinds))
        for source, kinds, row in zip(ids, types, rows, strict=True)
    ]


def _encode_words(
    task: Task,
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    candidates: list[list[int]],
    source_length: int,
    target_length: int,
) -> list[Example]:
    prompts = [task.prompt.format(**{column: row[column] for column in task.columns}) for row in rows]
    sources = tokenizer(prompts, truncation=True, max_length=source_length)["input_ids"]
    if task.kind == "question":
        golds = [tuple(row["answers"]["text"]) for row in rows]
        firsts = tokenizer([gold[0] for gold in golds], truncation=True, max_length=target_length)["input_ids"]
        return [Example(source, first, -1.0, gold) for source, first, gold in zip(sources, firsts, golds, strict=True)]
    indices = [round(row["label"] * 5) if task.kind == "regression" else row["label"] for row in rows]
    return [
        Example(source, candidates[index], float(row["label"]))
        for source, index, row in zip(sources, indices, rows, strict=True)
    ]
