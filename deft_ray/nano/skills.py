"""What the nano model is taught before anyone fine-tunes it: span corruption and simple text-to-text skills.

Every skill has many easy examples (plain statements, one fact to search) beside the hard ones (denials, two facts):
when two words decide together and neither tells anything alone, a small model finds no way in.

The skills are relatives of the nano tasks, never the tasks themselves: other prompts, other answer words, and mostly
other sentence patterns. All sentences belong to the "pretrain" split, so no sentence here occurs in the rows that the
product trains or scores on.
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


_CORRUPTED_SHARE = 0.06
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


def _common(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    """Say the word that two lists share: practice in matching, on which most other skills rest."""
    nouns = dice.pick((words.NAMES, words.JOBS, words.THINGS, words.PLACES, words.ANIMALS, words.TOWNS, words.ASPECTS))
    shared, *others = dice.some(nouns, 3 + dice.below(4))
    half = len(others) // 2
    first, second = (dice.some(some, len(some)) for some in ([shared, *others[:half]], [shared, *others[half:]]))
    return (f"common: {' '.join(first)} text: {' '.join(second)}", shared), ()


# --- judging ----------------------------------------------------------------------------------------------------------


def _judge(dice: Dice, text: str, positive: bool) -> Example:
    prompt, verdicts = dice.pick((("tone", ("bad", "good")), ("mood", ("sad", "happy")), ("praise", ("no", "yes"))))
    return f"{prompt}: {text}", verdicts[positive]


def _tone_word(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    positive, denied = dice.chance(0.5), dice.chance(_DENIED_SHARE)
    word = dice.pick(words.GOOD if positive else words.BAD)
    return _judge(dice, f"{'not ' if denied else ''}{word}", positive != denied), ()


def _seemed(dice: Dice, subject: str, positive: bool) -> str:
    degree = dice.pick(("", "", f"{dice.pick(words.DEGREES)} "))
    if dice.chance(_DENIED_SHARE):
        verb = dice.pick(("did not seem", "never seemed", "is not", "was not", "was never", "did not look"))
        return f"the {subject} {verb} {degree}{dice.pick(words.BAD if positive else words.GOOD)}"
    verb = dice.pick(("seemed", "is", "was", "looked"))
    return f"the {subject} {verb} {degree}{dice.pick(words.GOOD if positive else words.BAD)}"


def _tone_clauses(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    """The last clause wins after "but" and "yet", the main clause beside "although" and "while"."""
    positive = dice.chance(0.5)
    first, second = dice.some(words.ASPECTS + words.WORKS, 2)
    winner = _seemed(dice, first, positive)
    loser = _seemed(dice, second, dice.chance(0.5))
    text = dice.pick(_CLAUSE_FORMS).format(winner, loser)
    return _judge(dice, text, positive), (text,)


_CLAUSE_FORMS = (
    "{0}.",
    "{0}.",
    "{0}.",
    "{1}, yet {0}.",
    "{1}, but {0}.",
    "while {1}, {0}.",
    "although {1}, {0}.",
    "{0}, while {1}.",
    "{0}, although {1}.",
)


def _tone_relative(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    more, positive = not dice.chance(_DENIED_SHARE), dice.chance(0.5)
    first, second = dice.some(words.WORKS, 2)
    measure = f"{'more' if more else 'less'} {dice.pick(words.GOOD if positive else words.BAD)}"
    form = dice.pick(("next to the {1}, the {0} seemed {2}.", "the {0} looked {2} than the {1}.", "the {0} is {2}."))
    text = form.format(first, second, measure)
    return _judge(dice, text, more == positive), (text,)


def _tone_rumour(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    right, positive = not dice.chance(_DENIED_SHARE), dice.chance(0.5)
    word, work = dice.pick(words.GOOD if positive else words.BAD), dice.pick(words.WORKS)
    form = dice.pick(("they say the {0} is {1}, which is {2}.", "i called the {0} {1}, and that was {2}."))
    text = form.format(work, word, "right" if right else "wrong")
    return _judge(dice, text, right == positive), (text,)


def _tone_crowd(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    shared, positive = not dice.chance(_DENIED_SHARE), dice.chance(0.5)
    word, work = dice.pick(words.GOOD if positive else words.BAD), dice.pick(words.WORKS)
    who = dice.pick(("all", "most", "many") if shared else ("no", "few", "hardly any"))
    text = f"{who} {dice.pick(words.CROWDS)} say the {work} was {word}."
    return _judge(dice, text, shared == positive), (text,)


# --- comparing statements ---------------------------------------------------------------------------------------------


def _opposite(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    first, second = dice.some(dice.pick((*words.COMPARED, ("all", "no"), ("before", "after"))), 2)
    return (f"opposite: {first}", second), ()


def _has_done(dice: Dice, tense: str, event: tuple[str, str, str], holds: bool) -> str:
    """Say in either voice that ``event`` (doer, past form, target) happened, or did not."""
    doer, past, target = event
    denial = "" if holds else " not"
    if dice.chance(0.5):
        return f"the {target} {f'has{denial} been' if tense == 'has' else f'was{denial}'} {past} by the {doer}."
    if tense == "has":
        return f"the {doer} has{denial} {past} the {target}."
    return f"the {doer} {past if holds else f'never {past}'} the {target}."


def _draw_event(dice: Dice) -> tuple[str, str, str]:
    doer, target = dice.some(words.JOBS, 2)
    return doer, dice.pick(words.VERBS)[1], target


def _rewrite(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    """Say the same in other words."""
    tense, event, holds = dice.pick(("has", "past")), _draw_event(dice), not dice.chance(_DENIED_SHARE)
    first, second = dice.some(words.NAMES, 2)
    more, less = dice.some(dice.pick(words.COMPARED), 2)
    source, result = dice.pick(
        (
            (_has_done(dice, tense, event, holds), _has_done(dice, tense, event, holds)),
            (f"{first} looks {more} than {second}.", f"{second} looks {less} than {first}."),
        )
    )
    return (f"rewrite: {source}", result), (source, result)


_YES, _MAYBE, _NO = range(3)


def _check(dice: Dice, first: str, second: str, verdict: int) -> tuple[Example, tuple[str, ...]]:
    form, verdicts = dice.pick(
        (("fact: {0} claim: {1}", ("yes", "maybe", "no")), ("known: {0} said: {1}", ("true", "unknown", "false")))
    )
    return (form.format(first, second), verdicts[verdict]), (first, second)


def _check_roles(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    event, tense, holds = _draw_event(dice), dice.pick(("has", "past")), not dice.chance(_DENIED_SHARE)
    verdict = dice.below(3)
    fact = _has_done(dice, tense, event, holds)
    if verdict == _MAYBE:
        claim = _has_done(dice, tense, event[::-1], not dice.chance(_DENIED_SHARE))
    else:
        claim = _has_done(dice, tense, event, holds == (verdict == _YES))
    return _check(dice, fact, claim, verdict)


def _check_compared(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    first, second, third = dice.some(words.NAMES, 3)
    more, less = dice.some(dice.pick(words.COMPARED), 2)
    verb, verdict = dice.pick(("is", "looks")), dice.below(3)
    fact = f"{first} {verb} {more} than {second}."
    if verdict == _MAYBE:
        first, second = dice.pick(((first, third), (third, second)))
    if verdict == _NO or (verdict == _MAYBE and dice.chance(0.5)):
        first, second = second, first
    claim = dice.pick((f"{first} {verb} {more} than {second}.", f"{second} {verb} {less} than {first}."))
    return _check(dice, fact, claim, verdict)


def _check_order(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    first, second = dice.some(words.NAMES, 2)
    did, then = (past for _, past in dice.some(words.DEEDS, 2))
    verdict = dice.below(3)
    fact = _in_order(dice, f"{first} {did}", f"{second} {then}")
    if verdict == _MAYBE:
        did, then = then, did
    early, late = f"{first} {did}", f"{second} {then}"
    if verdict == _NO or (verdict == _MAYBE and dice.chance(0.5)):
        early, late = late, early
    return _check(dice, fact, _in_order(dice, early, late), verdict)


def _in_order(dice: Dice, early: str, late: str) -> str:
    return dice.pick(_ORDER_FORMS).format(early, late)


_ORDER_FORMS = ("{0} earlier than {1}.", "{1} later than {0}.", "first {0}, then {1}.", "{0}, and after that {1}.")


def _check_quantities(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    animals, others = dice.some(words.ANIMALS, 2)
    state, place, elsewhere = dice.pick(words.STATES), *dice.some(words.PLACES, 2)
    known, claimed = dice.pick(("all", "some", "no")), dice.pick(("all", "some", "no"))
    form = dice.pick(("{0} {1} at the {2} look {3}.", "{0} {1} in the {2} look {3}.", "in the {2} are {0} {3} {1}."))
    fact = form.format(known, animals, place, state)
    verdict = _QUANTITY_VERDICTS[known, claimed]
    if dice.chance(0.3):
        verdict = _MAYBE
        animals, place = dice.pick(((others, place), (animals, elsewhere)))
    return _check(dice, fact, form.format(claimed, animals, place, state), verdict)


_QUANTITY_VERDICTS = {
    ("all", "all"): _YES,
    ("all", "some"): _YES,
    ("all", "no"): _NO,
    ("some", "all"): _MAYBE,
    ("some", "some"): _YES,
    ("some", "no"): _NO,
    ("no", "all"): _NO,
    ("no", "some"): _NO,
    ("no", "no"): _YES,
}


def _check_whereabouts(dice: Dice) -> tuple[Example, tuple[str, ...]]:
    thing, other = dice.some(words.THINGS, 2)
    place, elsewhere = dice.some(words.PLACES, 2)
    moved, there = dice.pick((("took the {0} to the {1}", "at"), ("left the {0} in the {1}", "in")))
    fact = f"{dice.pick(words.NAMES)} {moved.format(thing, place)}."
    verdict, same = dice.below(3), dice.chance(0.5)
    denied = "not " if same == (verdict == _NO) else ""
    if verdict == _MAYBE:
        thing, denied = other, dice.pick(("", "not "))
    return _check(dice, fact, f"the {thing} is {denied}{there} the {place if same else elsewhere}.", verdict)


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
        people = {
            "name": names[one],
            "friend": names[other],
            "doer": f"the {jobs[one]}",
            "target": f"the {jobs[other]}",
        }
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
            ("who {past} {target}?", "doer"),
            ("who has been {past} by {doer}?", "target"),
            ("who was {past} by {doer}?", "target"),
        ),
    ),
    (
        "{name} was once a {job} in {town}.",
        (
            ("who was a {job} in {town}?", "name"),
            ("where was {name} a {job}?", "town"),
            ("what was {name} in {town}?", "job"),
        ),
    ),
)

_SKILLS: tuple[Skill, ...] = (
    _repeat,
    *[_common] * 4,
    _tone_word,
    *[_tone_clauses] * 3,
    _tone_relative,
    _tone_rumour,
    _tone_crowd,
    _opposite,
    _rewrite,
    *[_check_roles] * 2,
    *[_check_compared] * 2,
    *[_check_order] * 2,
    _check_quantities,
    _check_whereabouts,
    *[_find] * 6,
)
"""Each skill as often as it is practised."""

_OTHER_WORDS = (
    "nano sentiment entailment sentence premise hypothesis question context repeat common tone mood praise "
    "known sad opposite rewrite fact claim find text the a an is was are were be been has have had do did does "
    "not never no all some most many few hardly any nobody everybody in on at to by of from with than then that "
    "this these they she he it i we you and or but yet while although though because if so as before after "
    "earlier later first next more less right wrong called found expected say seemed seem looks look looked "
    "took take put gave give got hand handed who what where when why which how job work works once which yes "
    "maybe unknown said positive negative neutral contradiction acceptable unacceptable equivalent duplicate "
    "different same true false answer one two three four five six seven eight nine ten"
)


def _all_words() -> tuple[str, ...]:
    lists = [value for name, value in vars(words).items() if name.isupper()]
    flat = [item for items in lists for item in items]
    single = [word for item in flat for word in ((item,) if isinstance(item, str) else item)]
    return tuple(sorted({*_OTHER_WORDS.split(), *single}))


VOCABULARY: tuple[str, ...] = _all_words()
"""Every word that the tasks, prompts and skills use, in alphabetical order."""
