"""What the nano model is taught before anyone fine-tunes it: span corruption and simple text-to-text skills.

Every skill has many easy examples (plain statements, one fact to search) beside the hard ones (denials, two facts): when
two words decide together and neither tells anything alone, a small model finds no way in.

The skills are relatives of the nano tasks, never the tasks themselves: other prompts, other answer words, other templates.
All sentences belong to the "pretrain" split, so nothing here occurs in the rows that the product trains or scores on.
"""

from __future__ import annotations

from collections.abc import Callable

from deft_ray.nano import words
from deft_ray.nano.tasks import LABELS, generate, split_of, texts_of
from deft_ray.nano.words import Dice

Example = tuple[str, str]
"""Input text and target text."""

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'\"-()[]/%&$+=*#@_<>"
"""What a text outside the vocabulary may be spelled with."""

SENTINELS: tuple[str, ...] = tuple(f"<extra_id_{number}>" for number in range(16))
"""Stand-ins for hidden spans, as in T5."""


def write_examples(count: int, seed: int) -> list[Example]:
    """Write pretraining examples, each of a randomly chosen skill.

    Args:
        count: How many.
        seed: Chooses the sample.

    Returns:
        Pairs of input and target text.
    """
    dice = Dice(f"skills/{seed}")
    corpus = [text for task in LABELS for row in generate(task, "pretrain", count // 8, seed) for text in texts_of(row)]
    examples: list[Example] = []
    while len(examples) < count:
        if dice.chance(_CORRUPTED_SHARE):
            examples.append(corrupt(dice, dice.pick(corpus)))
            continue
        example, sentences = dice.pick(_SKILLS)(dice)
        if all(split_of(sentence) == "pretrain" for sentence in sentences):
            examples.append(example)
    return examples


def corrupt(dice: Dice, text: str) -> Example:
    """Hide a fifth of the words, at least one, behind sentinels; the target spells them out.

    Neighbours share a sentinel, and the target ends with the next unused one, as in T5.
    """
    pieces = text.split()
    hidden = dice.some(range(len(pieces)), max(1, len(pieces) // 5))
    source: list[str] = []
    target: list[str] = []
    spans = 0
    for place, piece in enumerate(pieces):
        if place not in hidden:
            source.append(piece)
            continue
        if place - 1 not in hidden:
            source.append(SENTINELS[spans])
            target.append(SENTINELS[spans])
            spans += 1
        target.append(piece)
    return " ".join(source), " ".join([*target, SENTINELS[spans]])


_CORRUPTED_SHARE = 0.1
_DENIED_SHARE = 0.3
_TWO_FACTS_SHARE = 0.65

Skill = Callable[[Dice], tuple[Example, tuple[str, ...]]]
"""Writes one example and names the sentences in it that must belong to the pretraining split."""


def _repeat(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    """Say some words again: gives every word of the vocabulary a use, the label words among them."""
    text = " ".join(dice.pick(VOCABULARY) for _ in range(1 + dice.below(2)))
    if dice.chance(0.1):
        text = "".join(dice.pick(CHARACTERS) for _ in range(1 + dice.below(6)))
    return (f"repeat: {text}", text), ()


# --- judging ----------------------------------------------------------------------------------------------------------

_VERDICTS = ("bad", "good")


def _tone_word(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    positive = dice.chance(0.5)
    degree = "not " if dice.chance(_DENIED_SHARE) else ""
    word = dice.pick(words.GOOD if positive else words.BAD)
    return (f"tone: {degree}{word}", _VERDICTS[positive == (degree == "")]), ()


def _seemed(dice: Dice, subject: str, positive: bool) -> str:
    degree = dice.pick(("", "", f"{dice.pick(words.DEGREES)} "))
    if dice.chance(_DENIED_SHARE):
        return f"the {subject} did not seem {degree}{dice.pick(words.BAD if positive else words.GOOD)}"
    return f"the {subject} seemed {degree}{dice.pick(words.GOOD if positive else words.BAD)}"


def _tone_clauses(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    """The clause before "despite" or after "yet" gives the tone."""
    positive = dice.chance(0.5)
    first, second = dice.some(words.ASPECTS + words.WORKS, 2)
    winner = _seemed(dice, first, positive)
    loser = _seemed(dice, second, dice.chance(0.5))
    form = dice.pick(("{0}.", "{0}.", "{1}, yet {0}.", "while {1}, {0}.", "{0}, while {1}."))
    text = form.format(winner, loser)
    return (f"tone: {text}", _VERDICTS[positive]), (text,)


def _tone_relative(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    more, positive = not dice.chance(_DENIED_SHARE), dice.chance(0.5)
    first, second = dice.some(words.WORKS, 2)
    word = dice.pick(words.GOOD if positive else words.BAD)
    text = f"next to the {second}, the {first} seemed {'more' if more else 'less'} {word}."
    return (f"tone: {text}", _VERDICTS[more == positive]), (text,)


def _tone_rumour(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    right, positive = not dice.chance(_DENIED_SHARE), dice.chance(0.5)
    word, work = dice.pick(words.GOOD if positive else words.BAD), dice.pick(words.WORKS)
    text = f"they say the {work} is {word}, which is {'right' if right else 'wrong'}."
    return (f"tone: {text}", _VERDICTS[right == positive]), (text,)


# --- comparing statements ---------------------------------------------------------------------------------------------


def _opposite(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    first, second = dice.some(dice.pick(words.COMPARED + (("all", "no"), ("before", "after"))), 2)
    return (f"opposite: {first}", second), ()


def _has_done(dice: Dice, doer: str, past: str, target: str, holds: bool, active: bool) -> str:
    denial = "" if holds else " not"
    if active:
        return f"the {doer} has{denial} {past} the {target}."
    return f"the {target} has{denial} been {past} by the {doer}."


def _rewrite(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    """Say the same from the other end."""
    active, holds = dice.chance(0.5), dice.chance(0.5)
    doer, target = dice.some(words.JOBS, 2)
    past = dice.pick(words.VERBS)[1]
    first, second = dice.some(words.NAMES, 2)
    more, less = dice.some(dice.pick(words.COMPARED), 2)
    source, result = dice.pick(
        (
            (
                _has_done(dice, doer, past, target, holds, active),
                _has_done(dice, doer, past, target, holds, not active),
            ),
            (f"{first} looks {more} than {second}.", f"{second} looks {less} than {first}."),
        )
    )
    return (f"rewrite: {source}", result), (source, result)


def _check(first: str, second: str, verdict: str) -> tuple[Example, tuple[str, ...]]:
    return (f"fact: {first} claim: {second}", verdict), (first, second)


def _check_roles(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    doer, target = dice.some(words.JOBS, 2)
    past, holds, verdict = dice.pick(words.VERBS)[1], not dice.chance(_DENIED_SHARE), dice.pick(("yes", "no", "maybe"))
    first = _has_done(dice, doer, past, target, holds, dice.chance(0.5))
    if verdict == "maybe":
        second = _has_done(dice, target, past, doer, dice.chance(0.5), dice.chance(0.5))
    else:
        second = _has_done(dice, doer, past, target, holds == (verdict == "yes"), dice.chance(0.5))
    return _check(first, second, verdict)


def _check_compared(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    first, second, third = dice.some(words.NAMES, 3)
    more, less = dice.some(dice.pick(words.COMPARED), 2)
    fact = f"{first} looks {more} than {second}."
    verdict = dice.pick(("yes", "no", "maybe"))
    if verdict == "maybe":
        first, second = dice.pick(((first, third), (third, second)))
    elif verdict == "no":
        first, second = second, first
    claim = dice.pick((f"{first} looks {more} than {second}.", f"{second} looks {less} than {first}."))
    if verdict == "maybe" and dice.chance(0.5):
        claim = f"{first} looks {less} than {second}."
    return _check(fact, claim, verdict)


def _check_order(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    first, second = dice.some(words.NAMES, 2)
    did, then = (past for _, past in dice.some(words.DEEDS, 2))
    fact = f"first {first} {did}, then {second} {then}."
    verdict = dice.pick(("yes", "no", "maybe"))
    if verdict == "maybe":
        did, then = then, did
    early, late = f"{first} {did}", f"{second} {then}"
    if verdict == "no" or (verdict == "maybe" and dice.chance(0.5)):
        early, late = late, early
    claim = dice.pick((f"{early} earlier than {late}.", f"{late} later than {early}.", f"first {early}, then {late}."))
    return _check(fact, claim, verdict)


def _check_quantities(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    animals, others = dice.some(words.ANIMALS, 2)
    state, place, elsewhere = dice.pick(words.STATES), *dice.some(words.PLACES, 2)
    known, claimed = dice.pick(("all", "some", "no")), dice.pick(("all", "some", "no"))
    fact = f"{known} {animals} at the {place} look {state}."
    verdict = _QUANTITY_VERDICTS[known, claimed]
    if dice.chance(0.3):
        verdict = "maybe"
        animals, place = dice.pick(((others, place), (animals, elsewhere)))
    return _check(fact, f"{claimed} {animals} at the {place} look {state}.", verdict)


_QUANTITY_VERDICTS = {
    ("all", "all"): "yes",
    ("all", "some"): "yes",
    ("all", "no"): "no",
    ("some", "all"): "maybe",
    ("some", "some"): "yes",
    ("some", "no"): "no",
    ("no", "all"): "no",
    ("no", "some"): "no",
    ("no", "no"): "yes",
}


def _check_whereabouts(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    thing, other = dice.some(words.THINGS, 2)
    place, elsewhere = dice.some(words.PLACES, 2)
    fact = f"{dice.pick(words.NAMES)} took the {thing} to the {place}."
    verdict, same = dice.pick(("yes", "no", "maybe")), dice.chance(0.5)
    denied = "not " if same == (verdict == "no") else ""
    if verdict == "maybe":
        thing, denied = other, dice.pick(("", "not "))
    return _check(fact, f"the {thing} is {denied}at the {place if same else elsewhere}.", verdict)


# --- finding words ----------------------------------------------------------------------------------------------------


def _find(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    """Name the hidden part of one of two sentences."""
    names, things = dice.some(words.NAMES, 4), dice.some(words.THINGS, 2)
    colours, places, jobs = dice.some(words.COLOURS, 2), dice.some(words.PLACES, 2), dice.some(words.JOBS, 4)
    past = dice.pick(words.VERBS)[1]
    towns = dice.some(words.TOWNS, 2)
    form = dice.pick(_FIND_FORMS)
    facts = []
    for one in range(2):
        other = one + 2
        parts = {"thing": f"the {colours[one]} {things[one]}", "place": f"the {places[one]}", "town": towns[one]}
        people = {"name": names[one], "friend": names[other], "doer": f"the {jobs[one]}", "target": f"the {jobs[other]}"}
        facts.append({**parts, **people, "past": past, "noun": things[one], "job": jobs[one]})
    shown = dice.some(facts, 2 if dice.chance(_TWO_FACTS_SHARE) else 1)
    text = " ".join(form[0].format(**fact) for fact in shown)
    request, answer = dice.pick(form[1])
    fact = dice.pick(shown)
    return (f"find: {request.format(**fact)} text: {text}", fact[answer]), (text,)


_FIND_FORMS = (
    (
        "{name} handed {thing} to {friend}.",
        (
            ("who handed the {noun} to {friend}?", "name"),
            ("who got the {noun} of {name}?", "friend"),
            ("what did {name} hand to {friend}?", "thing"),
        ),
    ),
    (
        "{name} took {thing} to {place}.",
        (
            ("who took the {noun} to {place}?", "name"),
            ("where did {name} take the {noun}?", "place"),
            ("what did {name} take to {place}?", "thing"),
        ),
    ),
    (
        "{doer} has {past} {target}.",
        (
            ("who has {past} {target}?", "doer"),
            ("who has {doer} {past}?", "target"),
            ("who has been {past} by {doer}?", "target"),
        ),
    ),
    (
        "{name} was once a {job} at {town}.",
        (
            ("who was a {job} at {town}?", "name"),
            ("where was {name} a {job}?", "town"),
            ("what was {name} at {town}?", "job"),
        ),
    ),
)

_SKILLS: tuple[Skill, ...] = (
    _repeat,
    _tone_word,
    _tone_clauses,
    _tone_clauses,
    _tone_relative,
    _tone_rumour,
    _opposite,
    _rewrite,
    _check_roles,
    _check_roles,
    _check_compared,
    _check_compared,
    _check_order,
    _check_quantities,
    _check_whereabouts,
    _find,
    _find,
    _find,
    _find,
)

_OTHER_WORDS = (
    "nano sentiment entailment sentence premise hypothesis question context repeat tone opposite rewrite fact claim find text "
    "the a an is was are were be been has have had do did does not never no all some most many few hardly any nobody "
    "everybody in on at to by of from with than then that this these they she he it i we you and or but yet while although "
    "though because if so as before after earlier later first next more less right wrong called found expected say seemed "
    "seem looks look took take put gave give got hand handed who what where when why which how job work works once which "
    "yes maybe positive negative neutral contradiction acceptable unacceptable equivalent duplicate different same true "
    "false answer one two three four five six seven eight nine ten"
)



def _all_words() -> tuple[str, ...]:
    lists = [value for name, value in vars(words).items() if name.isupper()]
    flat = [item for items in lists for item in items]
    single = [word for item in flat for word in ((item,) if isinstance(item, str) else item)]
    return tuple(sorted({*_OTHER_WORDS.split(), *single}))


VOCABULARY: tuple[str, ...] = _all_words()
"""Every word that the tasks, prompts and skills use, in alphabetical order."""
