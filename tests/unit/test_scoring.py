"""Scores against their textbook formulas."""

from __future__ import annotations

import math
import random
import re
import string

import pytest

from deft_ray.tasks.scoring import Answer, score_answers, score_labels, surest_answers


def cells(predicted: list[int], true: list[int]) -> tuple[int, int, int, int]:
    pairs = list(zip(predicted, true, strict=True))
    return pairs.count((1, 1)), pairs.count((1, 0)), pairs.count((0, 1)), pairs.count((0, 0))


def matthews(predicted: list[int], true: list[int]) -> float:
    tp, fp, fn, tn = cells(predicted, true)
    below = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(below) if below else 0.0


def f1(predicted: list[int], true: list[int]) -> float:
    tp, fp, fn, _ = cells(predicted, true)
    return 2 * tp / (2 * tp + fp + fn) if tp else 0.0


def pearson(x: list[float], y: list[float]) -> float:
    a, b = sum(x) / len(x), sum(y) / len(y)
    above = sum((p - a) * (q - b) for p, q in zip(x, y, strict=True))
    below = math.sqrt(sum((p - a) ** 2 for p in x) * sum((q - b) ** 2 for q in y))
    return above / below if below else 0.0


def ranks_of(values: list[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]


@pytest.mark.parametrize("seed", range(4))
def test_classes(seed: int) -> None:
    dice = random.Random(seed)
    true = [dice.randint(0, 1) for _ in range(57)]
    predicted = [label if dice.random() < 0.7 else 1 - label for label in true]
    scores = score_labels(("accuracy", "f1", "matthews"), predicted, true)

    assert list(scores) == ["accuracy", "f1", "matthews"]
    assert scores["accuracy"] == sum(p == t for p, t in zip(predicted, true, strict=True)) / 57
    assert scores["f1"] == pytest.approx(f1(predicted, true), abs=1e-6)
    assert scores["matthews"] == pytest.approx(matthews(predicted, true), abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_values(seed: int) -> None:
    dice = random.Random(seed)
    true = [dice.randint(0, 25) / 5 for _ in range(41)]
    predicted = [round(value + dice.gauss(0, 1), 1) for value in true]
    scores = score_labels(("pearson", "spearman"), predicted, true)

    assert scores["pearson"] == pytest.approx(pearson(predicted, true), abs=1e-9)
    assert scores["spearman"] == pytest.approx(pearson(ranks_of(predicted), ranks_of(true)), abs=1e-6)


def test_accuracy_of_three_classes() -> None:
    assert score_labels(("accuracy",), [0, 1, 2, 2], [0, 2, 2, 1]) == {"accuracy": 0.5}


@pytest.mark.parametrize("constant", [0, 1])
@pytest.mark.parametrize("true", [[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
def test_constant_classes_have_no_correlation(constant: int, true: list[int]) -> None:
    scores = score_labels(("matthews", "f1", "accuracy"), [constant] * 5, true)

    assert scores["accuracy"] == true.count(constant) / 5
    assert scores["f1"] == pytest.approx(f1([constant] * 5, true), abs=1e-6)
    assert scores["matthews"] == 0.0, "0/0, and a constant earns nothing"


@pytest.mark.parametrize(("predicted", "true"), [([2.5] * 4, [1.0, 2.0, 3.0, 4.0]), ([1.0, 2.0, 3.0, 4.0], [2.5] * 4)])
def test_constant_values_have_no_correlation(predicted: list[float], true: list[float]) -> None:
    assert score_labels(("pearson", "spearman"), predicted, true) == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.filterwarnings("ignore:The variance of predictions or target:UserWarning")
def test_values_that_are_no_numbers_score_nothing() -> None:
    assert score_labels(("pearson",), [1.0, math.nan, 2.0], [1.0, 2.0, 3.0]) == {"pearson": 0.0}


def normal(text: str) -> list[str]:
    """SQuAD v1.1: lower case, no punctuation, no articles, single blanks."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def overlap(prediction: str, gold: str) -> float:
    p, g = normal(prediction), normal(gold)
    same = sum(min(p.count(word), g.count(word)) for word in set(p))
    return 2 * same / (len(p) + len(g)) if same else 0.0


@pytest.mark.parametrize(
    ("prediction", "golds", "words", "exact"),
    [
        ("red", ["red"], 1, 1),
        ("The Red!", ["red"], 1, 1),
        ("an  apple", ["the apple."], 1, 1),
        ("red boat", ["red", "the red boat"], 1, 1),
        ("red boat", ["blue", "red"], 2 / 3, 0),
        ("red red boat", ["red boat"], 0.8, 0),
        ("", ["red"], 0, 0),
        ("green", ["red", "blue"], 0, 0),
        ("self-made", ["selfmade"], 1, 1),
    ],
)
def test_one_answer(prediction: str, golds: list[str], words: float, exact: float) -> None:
    scores = score_answers([prediction], [golds])

    assert scores == pytest.approx({"f1": words, "exact_match": exact}, abs=1e-6)
    assert scores["f1"] == pytest.approx(max(overlap(prediction, gold) for gold in golds), abs=1e-6)


def test_many_answers_are_averaged() -> None:
    dice = random.Random(0)
    words = ["The", "red", "boat,", "a", "blue", "kettle"]
    predictions = [" ".join(dice.choices(words, k=dice.randint(1, 4))) for _ in range(60)]
    golds = [[" ".join(dice.choices(words[1:], k=3)) + " x" for _ in range(dice.randint(1, 3))] for _ in range(60)]
    scores = score_answers(predictions, golds)

    best = [max(overlap(p, g) for g in gold) for p, gold in zip(predictions, golds, strict=True)]
    exact = [any(normal(p) == normal(g) for g in gold) for p, gold in zip(predictions, golds, strict=True)]
    assert scores["f1"] == pytest.approx(sum(best) / 60, abs=1e-6)
    assert scores["exact_match"] == pytest.approx(sum(exact) / 60, abs=1e-6)


def test_a_question_gets_the_answer_of_the_surest_window() -> None:
    """By the mean over an answer's tokens: seven sure words beat one that is less sure, though their sum is lower."""
    log_probabilities = {
        (4, "a long but sure answer of words"): [-0.1] * 8,
        (4, "short"): [-0.5],
        (2, "alone"): [-9.0, -9.0],
        (7, "unsure"): [-3.0, -1.0],
        (7, ""): [],
        (7, "surer"): [-1.0, -2.9],
    }
    rows = [row for row, _ in log_probabilities]
    answers = [
        Answer(text, sum(tokens) / len(tokens) if tokens else -math.inf)
        for (_, text), tokens in log_probabilities.items()
    ]

    assert list(surest_answers(rows, answers).items()) == [
        (4, "a long but sure answer of words"),
        (2, "alone"),
        (7, "surer"),
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_surest_window_is_found_wherever_it_stands(seed: int) -> None:
    dice = random.Random(seed)
    windows = [(row, f"{row}-{window}", dice.choice([-1.0, -2.0, -3.0])) for row in range(6) for window in range(4)]
    found = surest_answers([row for row, _, _ in windows], [Answer(text, sure) for _, text, sure in windows])

    for row in range(6):
        mine = [(text, sure) for number, text, sure in windows if number == row]
        best = max(sure for _, sure in mine)
        assert found[row] == next(text for text, sure in mine if sure == best), "the first of equals"


def test_no_answer_at_all_is_an_answer_where_there_is_no_other() -> None:
    assert surest_answers([0, 0], [Answer("", -math.inf), Answer("x", -math.inf)]) == {0: ""}
