"""Scores of a whole validation set, by torchmetrics: loaded when first needed, as it costs more than a second."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Answer:
    """What a model wrote for one window of a question.

    Args:
        text: The answer.
        sureness: Mean log-probability of its tokens, end of sequence included; ≤ 0. Any number where the question has
            one window only.
    """

    text: str
    sureness: float


def surest_answers(rows: Sequence[int], answers: Sequence[Answer]) -> dict[int, str]:
    r"""Take one answer per question: that of the window in which the model was surest of what it wrote.

    .. math:: \hat w = \arg\max_w \frac{1}{|y_w|} \sum_t \log p(y_{w,t} \mid y_{w,<t}, x_w)

    with x_w the source that shows window w and y_w the answer written for it. The mean, not the sum, as a sum would
    favour the shortest answer; nothing of the gold answer is looked at. The authors' code takes the last window's.

    Args:
        rows: The question that each answer belongs to.
        answers: One per window; the earlier of two that are equally sure wins.

    Returns:
        The answer's text by question, in the order in which the questions come.

    Example:
        >>> surest_answers([0, 0, 1], [Answer("a boat", -0.9), Answer("boat", -0.2), Answer("red", -3.0)])
        {0: 'boat', 1: 'red'}
    """
    surest: dict[int, Answer] = {}
    for row, answer in zip(rows, answers, strict=True):
        if row not in surest or answer.sureness > surest[row].sureness:
            surest[row] = answer
    return {row: answer.text for row, answer in surest.items()}


def score_labels(metrics: Sequence[str], predictions: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """Score classes or values.

    Args:
        metrics: Any of ``accuracy``, ``f1``, ``matthews``, ``pearson``, ``spearman``.
        predictions: Class numbers or values.
        labels: The same, true.

    Returns:
        Fractions by metric. A correlation that does not exist, as one side is constant, is 0; Matthews' is one.
    """
    predicted, true = torch.tensor(predictions, dtype=torch.float64), torch.tensor(labels, dtype=torch.float64)
    constant = bool((predicted == predicted[0]).all() or (true == true[0]).all())
    scores: dict[str, float] = {}
    for metric in metrics:
        if metric == "accuracy":
            scores[metric] = int((predicted == true).sum()) / len(predicted)
        elif constant and metric != "f1":
            scores[metric] = 0.0
        else:
            scores[metric] = _library_score(metric, predicted, true)
    return {metric: value if math.isfinite(value) else 0.0 for metric, value in scores.items()}


def _library_score(metric: str, predicted: torch.Tensor, true: torch.Tensor) -> float:
    from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef
    from torchmetrics.functional.classification import binary_f1_score, binary_matthews_corrcoef

    if metric == "f1":
        return float(binary_f1_score(predicted.long(), true.long()))
    if metric == "matthews":
        return float(binary_matthews_corrcoef(predicted.long(), true.long()))
    return float({"pearson": pearson_corrcoef, "spearman": spearman_corrcoef}[metric](predicted, true))


def score_answers(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Score answers to questions as SQuAD v1.1 does.

    Args:
        predictions: One answer per question.
        answers: Gold answers per question; the best match counts.

    Returns:
        ``f1`` and ``exact_match``, fractions.
    """
    from torchmetrics.functional.text import squad

    found: list[Any] = [{"prediction_text": text, "id": str(index)} for index, text in enumerate(predictions)]
    wanted: list[Any] = [
        {"answers": {"text": list(gold), "answer_start": [0] * len(gold)}, "id": str(index)}
        for index, gold in enumerate(answers)
    ]
    result = squad(found, wanted)
    return {"f1": float(result["f1"]) / 100, "exact_match": float(result["exact_match"]) / 100}
