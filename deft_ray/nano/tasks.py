"""Seeded generator of three small text tasks with the columns of SST-2, MNLI and SQuAD.

Every text is written by a template from the word lists of ``words``, so a task needs no download and has no licence
but this package's. The templates are chosen so that single words say little: negation and "but" decide the sentiment,
the order of the same words decides the entailment, and each question has two facts of its kind to choose from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from deft_ray.nano.words import (
    ANIMALS,
    ASPECTS,
    BAD,
    COLOURS,
    COMPARED,
    CROWDS,
    DEEDS,
    DEGREES,
    GOOD,
    JOBS,
    NAMES,
    PLACES,
    STATES,
    THINGS,
    TOWNS,
    VERBS,
    WORKS,
    Dice,
)

Row = dict[str, Any]

LABELS: dict[str, tuple[str, ...]] = {
    "nano-sentiment": ("negative", "positive"),
    "nano-entailment": ("entailment", "neutral", "contradiction"),
    "nano-question": (),
}
"""Label words of each task, in the order of the ``label`` column; empty where the answer is a span of text."""

SPLITS: tuple[str, ...] = ("pretrain", "train", "validation")
"""The three splits; no text is in two of them."""

_TRIES_PER_ROW = 20_000
_ENTAILED, _NEUTRAL, _CONTRADICTED = range(3)


def split_of(text: str) -> str:
    """Return the one split that may contain ``text``.

    The text's own hash decides, so splits stay disjoint whatever the seed and the number of rows. Pretraining gets
    half of all texts, the two downstream splits a quarter each.

    Example:
        >>> split_of("the film was not dull.")
        'pretrain'
    """
    bucket = hashlib.sha256(text.encode()).digest()[0] % 4
    return ("pretrain", "pretrain", "train", "validation")[bucket]


def generate(task: str, split: str, count: int, seed: int = 0) -> list[Row]:
    """Generate the first ``count`` rows of a split.

    The rows depend on the arguments alone, and fewer rows are always the beginning of more. Labels are balanced: each
    run of ``len(LABELS[task])`` rows has each label once, in random order.

    Args:
        task: One of ``LABELS``.
        split: One of ``SPLITS``.
        count: How many rows; no two are alike.
        seed: Chooses another sample of the same split.

    Returns:
        For ``nano-sentiment`` rows of ``sentence`` and ``label``; for ``nano-entailment`` rows of ``premise``,
        ``hypothesis`` and ``label``; for ``nano-question`` rows of ``id``, ``question``, ``context`` and ``answers``,
        which holds the lists ``text`` and ``answer_start`` (characters into the context).

    Raises:
        ValueError: If the task or split is unknown, ``count`` is negative, or no further text can be found.
    """
    if task not in LABELS:
        raise ValueError(f"task: unknown task {task!r}; allowed: {', '.join(LABELS)}")
    if split not in SPLITS:
        raise ValueError(f"split: unknown split {split!r}; allowed: {', '.join(SPLITS)}")
    if count < 0:
        raise ValueError(f"count: must be 0 or more (got {count})")
    dice = Dice(f"{task}/{split}/{seed}")
    labels = _balanced(dice, len(LABELS[task]))
    seen: set[tuple[str, ...]] = set()
    rows: list[Row] = []
    for number in range(count):
        row = _new_row(dice, task, split, next(labels), seen)
        rows.append({"id": f"{split}-{seed}-{number}", **row} if task == "nano-question" else row)
    return rows


def texts_of(row: Row) -> tuple[str, ...]:
    """Return the free texts of a row, the ones that keep splits apart."""
    return tuple(row[key] for key in ("sentence", "premise", "hypothesis", "question", "context") if key in row)


def _balanced(dice: Dice, classes: int) -> Iterator[int]:
    """Yield labels for ever, each run of ``classes`` labels a random order of all."""
    while True:
        yield from dice.some(range(max(classes, 1)), max(classes, 1))


def _new_row(dice: Dice, task: str, split: str, label: int, seen: set[tuple[str, ...]]) -> Row:
    for _ in range(_TRIES_PER_ROW):
        row = _WRITERS[task](dice, label)
        texts = texts_of(row)
        alike = len(set(texts)) < len(texts)
        if not alike and texts not in seen and all(split_of(text) == split for text in texts):
            seen.add(texts)
            return row
    raise ValueError(f"count: {task} has no new text left for split {split!r} after {len(seen)} rows")


# --- nano-sentiment ---------------------------------------------------------------------------------------------------


def _sentiment(dice: Dice, label: int) -> Row:
    sentence = dice.pick(_SENTIMENT_TEMPLATES)(dice, bool(label))
    return {"sentence": sentence, "label": label}


def _word(dice: Dice, positive: bool) -> str:
    return dice.pick(GOOD if positive else BAD)


def _clause(dice: Dice, subject: str, positive: bool) -> str:
    """Say something good or bad of ``subject``, as often by denying the opposite."""
    degree = f"{dice.pick(DEGREES)} " if dice.chance(0.4) else ""
    if dice.chance(0.5):
        return f"the {subject} was {degree}{_word(dice, positive)}"
    return f"the {subject} was {dice.pick(('not', 'never'))} {degree}{_word(dice, not positive)}"


def _one_clause(dice: Dice, positive: bool) -> str:
    return _clause(dice, dice.pick(WORKS + ASPECTS), positive) + "."


def _two_clauses(dice: Dice, positive: bool) -> str:
    """The last clause wins after "but", the main clause wins beside "although"."""
    first, second = dice.some(ASPECTS, 2)
    winner, loser = _clause(dice, first, positive), _clause(dice, second, not positive)
    form = dice.pick(("{loser}, but {winner}.", "although {loser}, {winner}.", "{winner}, although {loser}."))
    return form.format(winner=winner, loser=loser)


def _comparison(dice: Dice, positive: bool) -> str:
    """The first of the two things compared is judged."""
    first, second = dice.some(WORKS, 2)
    more = dice.chance(0.5)
    measure = f"{'more' if more else 'less'} {_word(dice, positive == more)}"
    form = dice.pick(("the {0} was {2} than the {1}.", "i found the {0} {2} than the {1}."))
    return form.format(first, second, measure)


def _hearsay(dice: Dice, positive: bool) -> str:
    """Someone gives a judgement, and is right or wrong."""
    right = dice.chance(0.5)
    word, work, crowd = _word(dice, positive == right), dice.pick(WORKS), dice.pick(CROWDS)
    if dice.chance(0.5):
        return f"the {crowd} called the {work} {word}, and they were {'right' if right else 'wrong'}."
    return f"i expected a {word} {work}, and i was {'right' if right else 'wrong'}."


def _opinion(dice: Dice, positive: bool) -> str:
    """Everybody or nobody shares a judgement."""
    shared = dice.chance(0.5)
    word, work = _word(dice, positive == shared), dice.pick(WORKS)
    who = dice.pick(("all {0}", "most {0}", "many {0}") if shared else ("no {0}", "few {0}", "hardly any {0}"))
    return f"{who.format(dice.pick(CROWDS))} found the {work} {word}."


_SENTIMENT_TEMPLATES: tuple[Callable[[Dice, bool], str], ...] = (
    _one_clause,
    _two_clauses,
    _two_clauses,
    _comparison,
    _hearsay,
    _opinion,
)


# --- nano-entailment --------------------------------------------------------------------------------------------------


def _entailment(dice: Dice, label: int) -> Row:
    premise, hypothesis = dice.pick(_ENTAILMENT_TEMPLATES)(dice, label)
    return {"premise": premise, "hypothesis": hypothesis, "label": label}


def _event(dice: Dice, doer: str, verb: tuple[str, str], target: str, holds: bool) -> str:
    """Say in the active or the passive voice that ``doer`` did something to ``target``, or did not."""
    base, past = verb
    if dice.chance(0.5):
        return f"the {target} was {'' if holds else 'not '}{past} by the {doer}."
    return f"the {doer} {past if holds else f'did not {base}'} the {target}."


def _roles(dice: Dice, label: int) -> tuple[str, str]:
    """Who did it to whom: the same event follows, its denial contradicts, the reverse event is open."""
    doer, target = dice.some(JOBS, 2)
    verb, holds = dice.pick(VERBS), dice.chance(0.5)
    premise = _event(dice, doer, verb, target, holds)
    if label == _NEUTRAL:
        return premise, _event(dice, target, verb, doer, dice.chance(0.5))
    return premise, _event(dice, doer, verb, target, holds == (label == _ENTAILED))


def _quantifiers(dice: Dice, label: int) -> tuple[str, str]:
    """All implies some, no denies both, some leaves all open, and other animals or places leave anything open."""
    animals, others = dice.some(ANIMALS, 2)
    place, elsewhere = dice.some(PLACES, 2)
    state = dice.pick(STATES)
    premise_word = dice.pick(("all", "some", "no"))
    entailed, contradicted = ("no", "some") if premise_word == "no" else ("some", "no")
    premise = _quantified(dice, premise_word, animals, place, state)
    if label == _NEUTRAL and premise_word == "some" and dice.chance(0.5):
        return premise, _quantified(dice, "all", animals, place, state)
    if label == _NEUTRAL:
        animals, place = (others, place) if dice.chance(0.5) else (animals, elsewhere)
        return premise, _quantified(dice, dice.pick(("all", "some", "no")), animals, place, state)
    if label == _CONTRADICTED and premise_word == "no" and dice.chance(0.5):
        contradicted = "all"
    return premise, _quantified(dice, entailed if label == _ENTAILED else contradicted, animals, place, state)


def _quantified(dice: Dice, quantifier: str, animals: str, place: str, state: str) -> str:
    if dice.chance(0.5):
        return f"in the {place}, {quantifier} {animals} are {state}."
    return f"{quantifier} {animals} in the {place} are {state}."


def _comparatives(dice: Dice, label: int) -> tuple[str, str]:
    """A beats B: so B loses to A, never B beats A, and of a third person nothing is known."""
    first, second, third = dice.some(NAMES, 3)
    more, less = dice.pick(COMPARED)
    if dice.chance(0.5):
        more, less = less, more
    premise = f"{first} is {more} than {second}."
    if label == _NEUTRAL:
        first, second = (first, third) if dice.chance(0.5) else (third, second)
    straight, mirrored = f"{first} is {more} than {second}.", f"{second} is {less} than {first}."
    reverse, denied = f"{second} is {more} than {first}.", f"{first} is {less} than {second}."
    if label == _ENTAILED:
        return premise, mirrored
    return premise, dice.pick((reverse, denied) if label == _CONTRADICTED else (straight, mirrored, reverse, denied))


def _order(dice: Dice, label: int) -> tuple[str, str]:
    """Before and after, told from either end; with the deeds exchanged nothing is known."""
    first, second = dice.some(NAMES, 2)
    did, then = (past for _, past in dice.some(DEEDS, 2))
    premise = _sequence(dice, f"{first} {did}", f"{second} {then}")
    if label == _NEUTRAL:
        one, two = dice.some((f"{first} {then}", f"{second} {did}"), 2)
        return premise, _sequence(dice, one, two)
    events = (f"{first} {did}", f"{second} {then}")
    return premise, _sequence(dice, *(events if label == _ENTAILED else reversed(events)))


def _sequence(dice: Dice, earlier: str, later: str) -> str:
    return f"{earlier} before {later}." if dice.chance(0.5) else f"{later} after {earlier}."


def _whereabouts(dice: Dice, label: int) -> tuple[str, str]:
    """A thing is where it was put, is nowhere else, and of other things nothing is known."""
    thing, other = dice.some(THINGS, 2)
    place, elsewhere = dice.some(PLACES, 2)
    premise = f"{dice.pick(NAMES)} put the {thing} in the {place}."
    if label == _NEUTRAL:
        return premise, f"the {other} is {dice.pick(('', 'not '))}in the {dice.pick((place, elsewhere))}."
    where, denied = (place, "") if dice.chance(0.5) else (elsewhere, "not ")
    if label == _CONTRADICTED:
        denied = "" if denied else "not "
    return premise, f"the {thing} is {denied}in the {where}."


_ENTAILMENT_TEMPLATES: tuple[Callable[[Dice, int], tuple[str, str]], ...] = (
    _roles,
    _quantifiers,
    _comparatives,
    _order,
    _whereabouts,
)


# --- nano-question ----------------------------------------------------------------------------------------------------


Cast = dict[str, str]
Fact = tuple[str, tuple[tuple[str, str], ...]]


def _question(dice: Dice, _label: int) -> Row:
    """Two facts of one kind and one of another, in random order; the question is about one of the two."""
    kind, other = dice.some(_FACT_KINDS, 2)
    asked, decoy, filler = _casts(dice, 3)
    fact, questions = kind(asked)
    question, answer = dice.pick(questions)
    facts = dice.some((fact, kind(decoy)[0], other(filler)[0]), 3)
    start = sum(len(text) + 1 for text in facts[: facts.index(fact)]) + f" {fact}".index(f" {answer}")
    return {"question": question, "context": " ".join(facts), "answers": {"text": [answer], "answer_start": [start]}}


def _casts(dice: Dice, count: int) -> list[Cast]:
    """Draw the words of ``count`` facts; no two facts share one, but for the verb, which half of the time all share."""
    names, jobs = dice.some(NAMES, 2 * count), dice.some(JOBS, 2 * count)
    verbs = [dice.pick(VERBS)] * count if dice.chance(0.5) else dice.some(VERBS, count)
    singles = {
        "thing": dice.some(THINGS, count),
        "colour": dice.some(COLOURS, count),
        "place": dice.some(PLACES, count),
        "town": dice.some(TOWNS, count),
    }
    pairs = {"name": names, "other_name": names[count:], "job": jobs, "other_job": jobs[count:]}
    words = {**singles, **pairs, "base": [base for base, _ in verbs], "past": [past for _, past in verbs]}
    return [{part: choices[number] for part, choices in words.items()} for number in range(count)]


def _gave(cast: Cast) -> Fact:
    return "{name} gave the {colour} {thing} to {other_name}.".format(**cast), (
        ("who gave the {thing} to {other_name}?".format(**cast), cast["name"]),
        ("who got the {thing} from {name}?".format(**cast), cast["other_name"]),
        ("what did {name} give to {other_name}?".format(**cast), "the {colour} {thing}".format(**cast)),
    )


def _put(cast: Cast) -> Fact:
    return "{name} put the {colour} {thing} in the {place}.".format(**cast), (
        ("who put the {thing} in the {place}?".format(**cast), cast["name"]),
        ("where did {name} put the {thing}?".format(**cast), "the {place}".format(**cast)),
        ("what did {name} put in the {place}?".format(**cast), "the {colour} {thing}".format(**cast)),
    )


def _did(cast: Cast) -> Fact:
    doer, target = "the {job}".format(**cast), "the {other_job}".format(**cast)
    return f"{doer} {cast['past']} {target}.", (
        (f"who {cast['past']} {target}?", doer),
        (f"who did {doer} {cast['base']}?", target),
        (f"who was {cast['past']} by {doer}?", target),
    )


def _works(cast: Cast) -> Fact:
    return "{name} is a {job} in {town}.".format(**cast), (
        ("who is a {job} in {town}?".format(**cast), cast["name"]),
        ("where does {name} work as a {job}?".format(**cast), cast["town"]),
        ("what is the job of {name} in {town}?".format(**cast), cast["job"]),
    )


_FACT_KINDS: tuple[Callable[[Cast], Fact], ...] = (_gave, _put, _did, _works)

_WRITERS: dict[str, Callable[[Dice, int], Row]] = {
    "nano-sentiment": _sentiment,
    "nano-entailment": _entailment,
    "nano-question": _question,
}
