"""Score a model on the nano tasks, and score the linear bag-of-words that it has to beat."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from deft_ray.nano.tasks import LABELS, Row, texts_of
from deft_ray.spec.catalog import TASKS


def prompt_of(task: str, row: Row) -> str:
    """Return the input text of a row."""
    return TASKS[task].prompt.format(**row)


def target_of(task: str, row: Row) -> str:
    """Return the text that answers a row: its label word, or the first answer."""
    return LABELS[task][row["label"]] if LABELS[task] else row["answers"]["text"][0]


@torch.no_grad()
def model_score(model: Any, tokenizer: Any, task: str, rows: list[Row], batch_size: int = 250) -> float:
    """Accuracy of the likeliest label word, or exact match of the greedily generated answer.

    Args:
        model: A T5 with a language-model head.
        tokenizer: The nano tokenizer.
        task: A nano task.
        rows: Rows of that task.
        batch_size: Rows per forward.

    Returns:
        Fraction of rows answered right, in [0, 1].
    """
    model.eval()
    right = 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        inputs = tokenizer([prompt_of(task, row) for row in batch], return_tensors="pt", padding=True)
        right += (
            _right_labels(model, tokenizer, task, batch, inputs)
            if LABELS[task]
            else _right_answers(model, tokenizer, batch, inputs)
        )
    return right / len(rows)


def _right_labels(model: Any, tokenizer: Any, task: str, rows: list[Row], inputs: Any) -> int:
    words = [tokenizer(word).input_ids[0] for word in LABELS[task]]
    start = torch.full((len(rows), 1), model.config.decoder_start_token_id)
    logits = model(**inputs, decoder_input_ids=start).logits[:, 0, words]
    return int((logits.argmax(-1) == torch.tensor([row["label"] for row in rows])).sum())


def _right_answers(model: Any, tokenizer: Any, rows: list[Row], inputs: Any) -> int:
    answers = tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=8), skip_special_tokens=True)
    return sum(answer.strip() in row["answers"]["text"] for answer, row in zip(answers, rows, strict=True))


def bag_of_words_score(task: str, train: list[Row], validation: list[Row], steps: int = 300) -> float:
    """Accuracy of logistic regression on word counts, the best that a model blind to word order can hope for.

    On ``nano-question`` the classes are the answers of the training rows, and the likeliest one found in the context
    wins.

    Args:
        task: A nano task.
        train: Rows to fit.
        validation: Rows to score.
        steps: Steps of AdamW on all training rows at once.

    Returns:
        Fraction of validation rows answered right, in [0, 1].
    """
    words = sorted({word for row in train for word in _words(row)})
    targets = [target_of(task, row) for row in train]
    classes = sorted(set(targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        linear = torch.nn.Linear(len(words), len(classes))
    _fit(linear, _counts(train, words), torch.tensor([classes.index(target) for target in targets]), steps)
    logits = linear(_counts(validation, words)).detach()
    if not LABELS[task]:
        present = [[bool(re.search(rf"\b{answer}\b", row["context"])) for answer in classes] for row in validation]
        logits = logits.masked_fill(~torch.tensor(present), -torch.inf)
    guesses = [classes[index] for index in logits.argmax(-1)]
    return sum(guess == target_of(task, row) for guess, row in zip(guesses, validation, strict=True)) / len(validation)


def _words(row: Row) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", " ".join(texts_of(row)))


def _counts(rows: list[Row], words: list[str]) -> Tensor:
    place = {word: index for index, word in enumerate(words)}
    counts = torch.zeros(len(rows), len(words))
    for number, row in enumerate(rows):
        for word, count in Counter(_words(row)).items():
            if word in place:
                counts[number, place[word]] = count
    return counts


def _fit(linear: torch.nn.Linear, counts: Tensor, classes: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.05, weight_decay=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(linear(counts), classes).backward()
        optimizer.step()
