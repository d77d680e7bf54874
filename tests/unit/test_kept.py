"""Tokenised tasks in files: what is read is what was tokenised, once for all who need it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from deft_ray.errors import SetupError
from deft_ray.models.base import Base
from deft_ray.spec.catalog import TASKS
from deft_ray.spec.schema import TrialSpec
from deft_ray.tasks.encoding import EncodedTask, Example
from deft_ray.tasks.kept import KeptExamples, KeptTasks, labels_of, source_lengths, target_lengths
from deft_ray.train.host import Host
from deft_ray.train.loading import load_task
from deft_ray.train.ranks import Ranks
from tests.tiny import GLUE_TASKS
from tests.unit.test_host import Inbox

Trial = Callable[..., TrialSpec]
BaseOf = Callable[[TrialSpec], Base]
TASK = TASKS["sst2"]


def made(count: int = 5) -> EncodedTask:
    return EncodedTask(TASK, [Example([1, place], [2], float(place)) for place in range(count)], [], [[3]], [0.5])


def encoded(trial: TrialSpec, base: Base) -> EncodedTask:
    return load_task(trial.task, trial.data, base, calibration=7)


@pytest.mark.parametrize(
    ("model", "task", "leaves"),
    [
        *(("t5", task, {}) for task in (*GLUE_TASKS, "squad")),
        *(("bert", task, {}) for task in ("mrpc", "stsb", "mnli")),
        ("opt", "sst2", {}),
        ("t5", "squad", {"data__max_source_tokens": 24, "data__window_overlap_tokens": 4}),
    ],
)
def test_what_is_read_is_what_was_tokenised(
    trial: Trial, base_of: BaseOf, tmp_path: Path, model: str, task: str, leaves: dict[str, Any]
) -> None:
    spec = trial(model, task, **leaves)
    want = encoded(spec, base_of(spec))
    for _ in range(2):  # written, then found
        got = KeptTasks(tmp_path).get("key", want.task, lambda: want)
        assert isinstance(got.train, KeptExamples)
        assert (got.task, got.candidates, got.values) == (want.task, want.candidates, want.values)
        assert got.beside.keys() == want.beside.keys()
        splits = [(mine.train, mine.validation, mine.calibration, *mine.beside.values()) for mine in (got, want)]
        for mine, theirs in zip(*splits, strict=True):
            assert list(mine) == list(theirs)
            assert source_lengths(mine) == source_lengths(theirs)
            assert target_lengths(mine) == target_lengths(theirs)
            assert labels_of(mine) == labels_of(theirs)
    (file,) = tmp_path.glob("*.arrow")
    assert str(file) in Path("/proc/self/maps").read_text(), "the file is mapped, not read"


def test_a_split_is_a_sequence(tmp_path: Path) -> None:
    want, got = made(10_000).train, KeptTasks(tmp_path).get("key", TASK, lambda: made(10_000)).train
    assert len(got) == 10_000, "more than are written at once"
    for place in (0, 4095, 4096, -1, -10_000):
        assert got[place] == want[place]
    assert got[4090:4100] == list(want[4090:4100])
    assert got[-3:] == list(want[-3:])
    for place in (10_000, -10_001):
        with pytest.raises(IndexError, match="of 10000"):
            got[place]


def test_another_key_is_another_file_and_no_folder_is_none(tmp_path: Path) -> None:
    tasks = KeptTasks(tmp_path)
    assert [
        len(tasks.get(key, TASK, lambda count=count: made(count)).train) for key, count in (("a", 3), ("b", 4))
    ] == [
        3,
        4,
    ]
    assert len(tasks.get("a", TASK, lambda: made(9)).train) == 3
    assert isinstance(KeptTasks(None).get("a", TASK, made).train, list)


def test_pictures_stay_where_they_are(trial: Trial, base_of: BaseOf, tmp_path: Path) -> None:
    spec = trial("vit", "cifar10")
    want = encoded(spec, base_of(spec))
    assert KeptTasks(tmp_path).get("key", want.task, lambda: want) is want
    assert not list(tmp_path.glob("*.arrow"))


def test_a_task_that_cannot_be_had_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> EncodedTask:
        raise SetupError("no rows")

    for _ in range(2):
        with pytest.raises(SetupError, match="no rows"):
            KeptTasks(tmp_path).get("key", TASK, fail)
    assert not list(tmp_path.glob("*.arrow"))
    assert len(KeptTasks(tmp_path).get("key", TASK, made).train) == 5, "nobody holds the lock"


def test_where_nothing_can_be_written_tokens_are_not_shared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    got = KeptTasks(tmp_path / "file" / "folder").get("key", TASK, made)
    assert isinstance(got.train, list)
    assert "tokens are not shared" in caplog.text

    def full(*_given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deft_ray.tasks.kept._write", full)
    assert isinstance(KeptTasks(tmp_path / "other").get("key", TASK, made).train, list)
    assert "No space left" in caplog.text


def slowly(folder: Path, told: Path, seconds: float) -> None:
    """Tokenise, and tell that it was done."""

    def encode() -> EncodedTask:
        with told.open("a") as file:
            file.write("x")
        time.sleep(seconds)
        return made()

    assert list(KeptTasks(folder).get("key", TASK, encode).train) == made().train


def test_of_several_processes_one_tokenises(tmp_path: Path) -> None:
    told = tmp_path / "told"
    workers = [get_context("fork").Process(target=slowly, args=(tmp_path / "kept", told, 0.3)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert told.read_text() == "x"


def test_one_that_is_killed_while_it_tokenises_holds_nobody_up(tmp_path: Path) -> None:
    told = tmp_path / "told"
    doomed = get_context("fork").Process(target=slowly, args=(tmp_path / "kept", told, 600.0))
    doomed.start()
    while not told.is_file():
        time.sleep(0.01)
    assert doomed.pid is not None
    os.kill(doomed.pid, signal.SIGKILL)
    doomed.join(60)
    slowly(tmp_path / "kept", told, 0.0)
    assert told.read_text() == "xx"


def test_a_host_leaves_the_same_with_tokens_from_a_file(
    trial: Trial, base_of: BaseOf, ranks: Ranks, tmp_path: Path
) -> None:
    dial = {"dial": {"taus": [0.1], "calibration_examples": 6}}
    trials = [
        trial("dry-t5", "mrpc", deft__alpha=1.0, trial="t0", data__grouping="length"),
        trial("dry-t5", "squad", data__max_source_tokens=32, trial="t1"),
        trial("dry-t5", "stsb", trial="t2"),
    ]
    trials[0] = TrialSpec.model_validate({**trials[0].model_dump(), **dial})
    sent = []
    for name, tokens in (("own", None), ("kept", tmp_path / "tokens")):
        inbox = Inbox(*trials)
        Host(base_of(trials[0]), ranks, inbox, str(tmp_path / name), "h0", tokens=tokens).serve()
        sent.append(inbox.sent)
    assert len(list((tmp_path / "tokens").glob("*.arrow"))) == 3
    own, kept = sent
    assert [(name, row["kind"]) for name, row in own] == [(name, row["kind"]) for name, row in kept]
    for (_, row), (_, other) in zip(own, kept, strict=True):
        for key in ("loss", "score", "density", "predictions", "dial", "steps"):
            assert row.get(key) == other.get(key)
