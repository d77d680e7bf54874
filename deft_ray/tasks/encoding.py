"""From rows to examples: text-to-text for encoder-decoders, pairs and a label, or a picture, for models with a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from deft_ray.errors import SetupError
from deft_ray.spec.catalog import Task
from deft_ray.tasks.checks import Row
from deft_ray.tasks.images import Picture, make_pictures
from deft_ray.tasks.windows import Window, cut_windows, find_answer, windows_with

#: STS-B's answers in words, as T5 was trained on them: 0.0, 0.2 … 5.0.
_STSB_STEPS = 26


@dataclass(frozen=True)
class Example:
    """One row, or one window of a question's context, ready for a batch.

    Args:
        input_ids: Tokens of the source text or pair.
        target_ids: Tokens of the answer, with end of sequence; empty for encoders.
        label: Class number, regression value, or index among the candidates; -1 for questions.
        answers: Gold answers of a question.
        type_ids: Which text of a pair each token belongs to; empty where the tokenizer makes no difference.
        row: Number of the row in its split, from 0; told for questions only.
        windows: How many windows the row's context was cut into; 1 where it fits.
        picture: The image, where a model reads one; there are no token ids then.
    """

    input_ids: list[int]
    target_ids: list[int]
    label: float
    answers: tuple[str, ...] = ()
    type_ids: tuple[int, ...] = ()
    row: int = -1
    windows: int = 1
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
        validation: Validation examples; of a question every window.
        candidates: Token ids of every possible answer of a text-to-text classification; empty elsewhere.
        values: What each candidate is worth: class numbers, or STS-B's similarities.
        beside: Further validation examples by the suffix of their metric's name; see ``Task.beside``.
        calibration: Examples held out from training, to choose thresholds by; empty without the dial.
    """

    task: Task
    train: Sequence[Example]
    validation: Sequence[Example]
    candidates: list[list[int]]
    values: list[float]
    beside: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    calibration: Sequence[Example] = ()

    @property
    def outputs(self) -> int:
        """Outputs of an encoder's head."""
        return len(self.task.labels) or 1


def encode_images(
    task: Task,
    train: list[Row],
    validation: list[Row],
    processor: Any,
    tokens: int,
    calibration: Sequence[Row] = (),
) -> EncodedTask:
    """Make pictures of both splits; pixels come when a batch needs them.

    Args:
        task: An image task, with all its labels.
        train: Training rows.
        validation: Validation rows.
        processor: The base's image processor.
        tokens: Tokens that the base makes of an image.
        calibration: Rows held out from training.

    Raises:
        SetupError: If a row holds no image.
    """

    def encode(rows: Sequence[Row]) -> list[Example]:
        pictures = make_pictures(rows, processor, tokens)
        return [
            Example([], [], float(row["label"]), picture=picture) for row, picture in zip(rows, pictures, strict=True)
        ]

    return EncodedTask(task, encode(train), encode(validation), [], [], calibration=encode(calibration))


def answer_words(task: Task) -> tuple[str, ...]:
    """Return every answer a text-to-text model may choose from; empty for questions."""
    if task.kind == "regression":
        return tuple(f"{step / 5:.1f}" for step in range(_STSB_STEPS))
    return task.labels


def encode_task(
    task: Task,
    train: list[Row],
    validation: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_to_text: bool,
    max_source_tokens: int,
    max_target_tokens: int,
    window_overlap_tokens: int | None = None,
    beside: Mapping[str, list[Row]] | None = None,
    calibration: Sequence[Row] = (),
) -> EncodedTask:
    """Tokenise both splits.

    Args:
        task: The task.
        train: Training rows.
        validation: Validation rows.
        tokenizer: The base's tokenizer.
        text_to_text: Whether answers are words.
        max_source_tokens: Sources are cut to so many tokens; the context of a question into windows.
        max_target_tokens: Answers to questions are cut to so many tokens; label words never are.
        window_overlap_tokens: Tokens that neighbouring windows share; None for a third of ``max_source_tokens``.
        beside: Rows of the task's further validation splits.
        calibration: Rows held out from training.

    Raises:
        SetupError: If a text has no tokens, a question leaves no room for its context, or two labels are the same
            tokens.
    """
    words = answer_words(task) if text_to_text else ()
    candidates = tokenizer(list(words))["input_ids"] if words else []
    _require_different(task, words, candidates)
    overlap = max_source_tokens // 3 if window_overlap_tokens is None else window_overlap_tokens
    values = (
        [index / 5 for index in range(len(words))] if task.kind == "regression" else [*map(float, range(len(words)))]
    )

    def encode(rows: Sequence[Row], split: str) -> list[Example]:
        if task.kind == "question":
            examples = _encode_questions(task, rows, tokenizer, max_source_tokens, max_target_tokens, overlap, split)
        elif text_to_text:
            examples = _encode_words(task, rows, tokenizer, candidates, max_source_tokens)
        else:
            examples = _encode_pairs(task, rows, tokenizer, max_source_tokens)
        _require_tokens(task, split, examples)
        return examples

    more = {suffix: encode(rows, suffix) for suffix, rows in (beside or {}).items()}
    held_out = encode(calibration, "calibration") if calibration else []
    return EncodedTask(
        task, encode(train, "train"), encode(validation, "validation"), candidates, values, more, held_out
    )


def _require_different(task: Task, words: Sequence[str], candidates: list[list[int]]) -> None:
    for index, ids in enumerate(candidates):
        if ids in candidates[:index]:
            same = f"'{words[candidates.index(ids)]}' and '{words[index]}'"
            raise SetupError(f"{task.name}: the labels {same} are the same tokens to this model; give other names")


def _require_tokens(task: Task, split: str, examples: list[Example]) -> None:
    """A source of padding alone would divide by zero, or answer from nothing."""
    for number, example in enumerate(examples, start=1):
        if not example.input_ids:
            raise SetupError(f"{task.name}: {split}: row {number}: this model's tokenizer leaves nothing of its text")


def _encode_pairs(task: Task, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, length: int) -> list[Example]:
    texts = [[row[column] for row in rows] for column in task.columns]
    encoded = tokenizer(*texts, truncation=True, max_length=length)
    ids = encoded["input_ids"]
    types = encoded.get("token_type_ids", [()] * len(rows))
    return [
        Example(source, [], float(row["label"]), type_ids=tuple(kinds))
        for source, kinds, row in zip(ids, types, rows, strict=True)
    ]


def _encode_words(
    task: Task,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    candidates: list[list[int]],
    source_length: int,
) -> list[Example]:
    sources = tokenizer(_prompts(task, rows), truncation=True, max_length=source_length)["input_ids"]
    indices = [round(row["label"] * 5) if task.kind == "regression" else row["label"] for row in rows]
    return [
        Example(source, candidates[index], float(row["label"]))
        for source, index, row in zip(sources, indices, rows, strict=True)
    ]


def _prompts(task: Task, rows: Sequence[Row]) -> list[str]:
    return [task.prompt.format(**{column: row[column] for column in task.columns}) for row in rows]


def _encode_questions(
    task: Task,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    source_length: int,
    target_length: int,
    overlap: int,
    split: str,
) -> list[Example]:
    """One example per window; for training only of those windows that show the first answer."""
    prompts, golds = _prompts(task, rows), [tuple(row["answers"]["text"]) for row in rows]
    firsts = tokenizer([gold[0] for gold in golds], truncation=True, max_length=target_length)["input_ids"]
    sources = tokenizer(prompts, verbose=False)
    examples: list[Example] = []
    cramped = 0
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        whole = Example(sources["input_ids"][number], firsts[number], -1.0, golds[number], row=number)
        if len(whole.input_ids) <= source_length:
            examples.append(whole)
            continue
        cut = _Cut(sources[number], len(prompt) - len(row["context"]), source_length)
        if cut.room < 1:
            cramped += 1
            continue
        windows = cut_windows(cut.spans, cut.room, overlap)
        kept = range(len(windows)) if split != "train" else windows_with(windows, _places(row))
        examples += [replace(whole, input_ids=cut.source(windows[index]), windows=len(windows)) for index in kept]
    if cramped:
        what = f"{cramped} of {len(rows)} questions leave no room for their context"
        raise SetupError(f"{task.name}: {split}: {what} (data.max_source_tokens: {source_length}); give it more")
    return examples


def _places(row: Row) -> list[tuple[int, int]]:
    """Where the first answer stands; its place is believed only where one is told."""
    starts = row["answers"].get("answer_start")
    start = starts[0] if isinstance(starts, list) and starts and type(starts[0]) is int else None
    return find_answer(row["context"], row["answers"]["text"][0], start)


class _Cut:
    """A prompt whose context, at its end, does not fit: the tokens before, of and after it.

    A token that begins before the context and ends in it, as one with the blank between, is the context's.

    Args:
        prompt: The whole prompt's tokens, with the characters that each of them is.
        start: Character at which the context begins.
        length: Tokens that a source may have.
    """

    def __init__(self, prompt: Encoding, start: int, length: int) -> None:
        ids, places, special = prompt.ids, prompt.offsets, prompt.special_tokens_mask
        inside = [place for place in range(len(ids)) if not special[place] and places[place][1] > start]
        first, last = (inside[0], inside[-1] + 1) if inside else (len(ids), len(ids))
        self._before, self._ids, self._after = ids[:first], ids[first:last], ids[last:]
        self.spans = [(max(begin - start, 0), end - start) for begin, end in places[first:last]]
        self.room = length - len(self._before) - len(self._after) if inside else 0

    def source(self, window: Window) -> list[int]:
        """Return the source that shows one window."""
        return [*self._before, *self._ids[window.first : window.last], *self._after]
