"""What the tests of a search share: made-up results, running a schedule without training, killing it, its study."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial

from deft_ray.results.records import Record
from deft_ray.spec.schema import TrialSpec
from deft_ray.sweep import searcher
from deft_ray.sweep.schedule import Schedule


def made_up(trial: TrialSpec, score: float, density: float, status: str = "complete") -> Record:
    """The record of a trial that nobody trained."""
    measured = status == "complete"
    return Record(
        trial=trial.trial,
        task=trial.task,
        seed=trial.seed,
        baseline=trial.baseline,
        setting=trial.setting,
        status=status,
        score=score if measured else None,
        density=density if measured else None,
        score_metric="accuracy",
        dtype="float32",
        activation="NewGELUActivation",
        config=dict(trial.flat()),
    )


def run_into(
    records: list[Record], schedule: Schedule, result: Callable[[TrialSpec], Record], stop_after: int = 10**9
) -> list[TrialSpec]:
    """Run trials one at a time; their records go to ``records``."""
    done: list[TrialSpec] = []
    while len(done) < stop_after and isinstance(trial := schedule.next(), TrialSpec):
        records.append(result(trial))
        schedule.ended(records[-1])
        done.append(trial)
    return done


@contextmanager
def killed_while_asking(monkeypatch: pytest.MonkeyPatch, leaves: int) -> Iterator[None]:
    """Inside, whoever asks a study gets a KeyboardInterrupt after so many leaves."""
    real, left = searcher._suggest, leaves

    def suggest(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(searcher, "_suggest", suggest)
        yield


def told(folder: Path, name: str) -> list[FrozenTrial]:
    """What lies in a study's journal, as anybody opens it with Optuna."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backend = optuna.storages.journal.JournalFileBackend(str(folder / f"{name}.log"))
        return optuna.load_study(study_name=name, storage=optuna.storages.JournalStorage(backend)).trials
