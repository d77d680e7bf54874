"""The word lists of the nano tasks, and the seeded dice that choose from them.

Every list is closed: the nano tokenizer has one piece for each word of this module, so that no generated text is ever
cut into letters.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


class Dice:
    """Reproducible choices on every Python version.

    Only ``random.Random.random()`` is used: it is the one method whose sequence Python promises never to change.
    """

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self._random() < probability

    def below(self, bound: int) -> int:
        """A whole number in ``[0, bound)``."""
        return int(self._random() * bound)

    def pick(self, items: Sequence[Item]) -> Item:
        """One item, each equally likely."""
        return items[self.below(len(items))]

    def some(self, items: Sequence[Item], count: int) -> list[Item]:
        """``count`` different items in random order (the items must differ)."""
        chosen: list[Item] = []
        while len(chosen) < count:
            item = self.pick(items)
            if item not in chosen:
                chosen.append(item)
        return chosen


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    left, right = zip(*(pair.split("/") for pair in text.split()), strict=True)
    return tuple(zip(left, right, strict=True))


NAMES = _split(
    "anna boris clara david elena frank greta henry irene jonas karla lukas maria niklas olga peter rosa samuel "
    "tessa victor wanda xenia yusuf zoe amir bella carlos diana emil fiona"
)
JOBS = _split(
    "farmer nurse baker pilot teacher lawyer doctor painter singer driver waiter plumber tailor sailor judge butcher "
    "dentist gardener librarian carpenter officer student banker cook writer guard clerk miner actor dancer"
)
# (base form, past form that also serves as participle)
VERBS = _pairs(
    "help/helped thank/thanked visit/visited follow/followed praise/praised blame/blamed call/called trust/trusted "
    "invite/invited ignore/ignored warn/warned pay/paid teach/taught meet/met admire/admired question/questioned "
    "protect/protected rescue/rescued greet/greeted hire/hired"
)
# (base form, past form) of things one does alone
DEEDS = _pairs(
    "leave/left arrive/arrived sing/sang eat/ate sleep/slept work/worked laugh/laughed dance/danced wait/waited "
    "swim/swam read/read cry/cried"
)
THINGS = _split(
    "key lamp book cup box ring hat coat map clock plate knife basket bottle letter ladder mirror pillow guitar camera "
    "umbrella wallet hammer kettle"
)
COLOURS = _split("red blue green yellow black white brown grey pink purple")
PLACES = _split(
    "kitchen garden garage office cellar attic library station market museum hospital school bakery harbour "
    "park stable tower chapel hall yard"
)
TOWNS = _split("paris london rome oslo cairo lima tokyo berlin madrid vienna dublin quito delhi seoul athens lagos")
ANIMALS = _split("dogs cats horses birds sheep goats ducks rabbits foxes cows pigs mice frogs bears wolves owls")
STATES = _split("hungry asleep tired wet loud calm old young small large happy sick clean dirty fast slow")
COMPARED = _pairs(
    "taller/shorter older/younger faster/slower richer/poorer heavier/lighter louder/quieter stronger/weaker "
    "happier/sadder bigger/smaller warmer/colder wiser/sillier kinder/meaner"
)
WORKS = _split(
    "film book play song meal hotel show game concert novel album trip course museum speech restaurant party poem cafe "
    "series opera story lecture tour"
)
ASPECTS = _split(
    "acting plot music service ending price staff design humour pace dialogue cast beginning location weather idea "
    "lighting seating menu cover"
)
GOOD = _split(
    "good great charming brilliant delightful superb lovely excellent wonderful clever moving funny elegant pleasant "
    "memorable fresh thrilling tasty warm graceful fantastic splendid touching enjoyable"
)
BAD = _split(
    "bad dull boring awful terrible dreadful clumsy stupid tedious ugly weak annoying bland painful shallow "
    "stale tiresome messy cold lifeless horrible dire silly forgettable"
)
DEGREES = _split("very really quite rather truly fairly so extremely")
CROWDS = _split("critics viewers visitors guests friends people reviewers neighbours")
