r"""Multi-objective asynchronous successive halving: which trials train on beyond a rung.

A rung is a share of a trial's steps. A trial that arrives is compared with all that have arrived there before it, and
trains on if it stands among the best 1/η of them, itself counted. What is best with two objectives and a score limit:
:func:`deft_ray.sweep.order.best`.

The score limit is judged against the baseline of the same task and seed *at the same rung*, since everything is worse
in the middle of its training; and it is wider by what the baseline itself still lacks there. Where the baseline has
hardly begun to learn, it says nothing of who will miss the limit in the end: a density loss delays the learning.

Every arrival is written to a journal with its decision, before anybody acts on it. So a trial that comes to a rung
again, after a resume, gets the same answer, and later ones meet the same company. Who is judged by the score alone, by
Ray Tune's ASHA, is judged with the same journal.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from deft_ray.results.points import is_feasible
from deft_ray.spec.schema import SweepSpec
from deft_ray.sweep.order import best

#: Name of the journal.
JOURNAL = "rungs.jsonl"


@dataclass(frozen=True)
class Arrival:
    """A trial at a rung.

    Args:
        task: Its task; tasks are not compared.
        trial: Its name.
        seed: Its seed.
        baseline: Whether it is a baseline, which is never stopped nor compared.
        rung: Number of the rung, from 0.
        step: Steps done.
        score: Task score there.
        density: Density there.
        missed: By how much it misses the score limit; 0 where it does not.
        goes_on: Whether it trains on.
    """

    task: str
    trial: str
    seed: int
    baseline: bool
    rung: int
    step: int
    score: float
    density: float
    missed: float
    goes_on: bool


#: Tells of an arrival whether it trains on, by those that came to the rung before it and by η.
Decide = Callable[[Sequence[Arrival], Arrival, float], bool]
#: The score of the baseline of a task and a seed when it had ended; None before.
BaselineScore = Callable[[str, int], float | None]


class Rungs:
    """Decides about every arrival of a sweep.

    Args:
        reduction_factor: η: one of so many trains on.
        max_score_drop: The score limit; None for none.
        journal: File of the arrivals so far; they are taken up.
        decide: How; by both objectives if not given.
        baseline_score: What the baselines reached in the end; nothing is known of it if not given.
    """

    def __init__(
        self,
        reduction_factor: float,
        max_score_drop: float | None,
        journal: Path,
        decide: Decide | None = None,
        baseline_score: BaselineScore = lambda _task, _seed: None,
    ) -> None:
        self._factor, self._limit, self._journal = reduction_factor, max_score_drop, journal
        self._decide, self._baseline_score = decide or is_among_the_best, baseline_score
        self._decisions: dict[tuple[str, int], bool] = {}
        self._there: dict[tuple[str, int], list[Arrival]] = {}
        self._baselines: dict[tuple[str, int, int], float] = {}
        for line in _whole_lines(journal):
            self._take(Arrival(**json.loads(line)))

    def arrive(
        self, *, task: str, trial: str, seed: int, baseline: bool, rung: int, step: int, score: float, density: float
    ) -> bool:
        """Take note of a trial at a rung; returns whether it trains on.

        A trial that was here before gets the answer that it got.
        """
        known = self._decisions.get((trial, rung))
        if known is not None:
            return known
        missed = 0.0 if baseline else self._missed(task, seed, rung, score)
        mine = Arrival(task, trial, seed, baseline, rung, step, score, density, missed, True)
        if not baseline:
            mine = replace(mine, goes_on=self._decide(self._there.get((task, rung), []), mine, self._factor))
        self._write(mine)
        self._take(mine)
        return mine.goes_on

    def _take(self, arrival: Arrival) -> None:
        self._decisions[arrival.trial, arrival.rung] = arrival.goes_on
        if arrival.baseline:
            self._baselines.setdefault((arrival.task, arrival.seed, arrival.rung), arrival.score)
        else:
            self._there.setdefault((arrival.task, arrival.rung), []).append(arrival)

    def _missed(self, task: str, seed: int, rung: int, score: float) -> float:
        if self._limit is None:
            return 0.0
        baseline = self._baselines.get((task, seed, rung))
        if baseline is None:
            return 0.0
        in_the_end = self._baseline_score(task, seed)
        limit = self._limit + max(0.0, (baseline if in_the_end is None else in_the_end) - baseline)
        return 0.0 if is_feasible(baseline - score, limit) else baseline - score - limit

    def _write(self, arrival: Arrival) -> None:
        self._journal.parent.mkdir(parents=True, exist_ok=True)
        with self._journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(arrival)) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Arrivals:
    """What the journal says of trials, read as it grows.

    Args:
        journal: File of the arrivals; there need be none.
    """

    def __init__(self, journal: Path) -> None:
        self._journal, self._read = journal, 0
        self._last: dict[str, Arrival] = {}

    def last(self, trial: str) -> Arrival | None:
        """Return a trial's last arrival."""
        if self._journal.is_file():
            with self._journal.open("rb") as file:
                file.seek(self._read)
                content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self._read += len(whole)
            for line in whole.decode("utf-8").splitlines():
                arrival = Arrival(**json.loads(line))
                self._last[arrival.trial] = arrival
        return self._last.get(trial)


def _whole_lines(journal: Path) -> list[str]:
    """Lines of a journal; what a killed process left without its end is cut off, as nobody has acted on it."""
    if not journal.is_file():
        return []
    content = journal.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(journal, len(whole))
    return whole.decode("utf-8").splitlines()


def is_among_the_best(others: Sequence[Arrival], mine: Arrival, factor: float) -> bool:
    """Tell whether an arrival is among the best 1/η of its rung, itself counted."""
    kept = max(1, int((len(others) + 1) / factor))
    return len(others) in best([*others, mine], kept)


def build_rungs(spec: SweepSpec, folder: Path, single: Decide, baseline_score: BaselineScore) -> Rungs | None:
    """Return the rungs of a sweep that has them; their journal lies in ``folder``.

    Args:
        spec: The sweep's spec.
        folder: Of the journal.
        single: How ``asha`` decides.
        baseline_score: See :class:`Rungs`.
    """
    if spec.search.scheduler == "none":
        return None
    decide = single if spec.search.scheduler == "asha" else is_among_the_best
    limit = spec.constraint.max_score_drop
    return Rungs(spec.search.reduction_factor, limit, folder / JOURNAL, decide, baseline_score)
