"""What a host asks of Ray Train and of the dispatcher."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deft_ray.spec.schema import ModelSection
from deft_ray.sweep import hosts
from tests.tiny import tiny_trial


@pytest.mark.parametrize(("gpus", "backend"), [(0, "gloo"), (1, "nccl")])
def test_workers_with_gpus_talk_over_nccl(monkeypatch: pytest.MonkeyPatch, gpus: int, backend: str) -> None:
    asked: dict[str, Any] = {}

    class Trainer:
        def __init__(self, loop: Any, **given: Any) -> None:
            asked.update(given, loop=loop)

        def fit(self) -> None:
            asked["fitted"] = True

    monkeypatch.setattr(hosts, "_HostTrainer", Trainer)
    settings = hosts.HostSettings(
        "run", "/s", "/c", ModelSection(), workers=3, cpus=2, gpus=gpus, slots=1, memory_share=1.0, shared_ray=False
    )
    hosts.HostThread(0, settings, dispatcher=None).run()

    assert asked["fitted"]
    assert asked["torch_config"].backend == backend
    scaling = asked["scaling_config"]
    assert (scaling.num_workers, scaling.use_gpu) == (3, gpus > 0)
    assert scaling.resources_per_worker == ({"CPU": 2, "GPU": 1} if gpus else {"CPU": 2})


class _Ray:
    """Ray with a dispatcher that answers by hand: a question is a box that is filled when ``answers`` says so."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked, self.given_back, self.ready = list(answers), list[bool](), list[Any](), True

    def claim(self, _host: str, _life: int, wait: bool) -> list[Any]:
        self.asked.append(wait)
        return [self.answers.pop(0)]

    def wait(self, boxes: list[Any], timeout: float | None) -> tuple[list[Any], list[Any]]:
        return (boxes, []) if self.ready or timeout is None else ([], boxes)

    def get(self, box: list[Any]) -> Any:
        return box[0]

    @property
    def dispatcher(self) -> Any:
        back = SimpleNamespace(remote=lambda *given: self.given_back.append(given))
        return SimpleNamespace(claim=SimpleNamespace(remote=self.claim), give_back=back)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(hosts.time, "monotonic", lambda: now[0])
    return now


def test_a_host_that_trains_asks_now_and_then_and_one_that_idles_waits(
    monkeypatch: pytest.MonkeyPatch, clock: list[float], tmp_path: Path
) -> None:
    given = (tiny_trial(tmp_path, "t5", None, "nano-sentiment").model_dump_json(), 2, False)
    fake = _Ray("wait", given, "wait", "closed")
    monkeypatch.setattr(hosts, "ray", fake)
    inbox = hosts.DispatcherInbox(fake.dispatcher, "host-0", 0)

    assert inbox.next_trial(wait=False) == "wait"
    assert inbox.next_trial(wait=False) == "wait", "it was told that there is none"
    assert fake.asked == [False]
    clock[0] += 0.3
    fake.ready = False
    assert inbox.next_trial(wait=False) == "wait", "not answered yet"
    fake.ready = True
    taken = inbox.next_trial(wait=False)
    assert not isinstance(taken, str)
    assert (taken.trial.trial, taken.attempt) == ("t0000", 2)
    assert inbox.next_trial(wait=False) == "wait", "there may be another one: asked at once"
    assert inbox.next_trial(wait=True) == "closed", "nor does an idle host lose time"
    assert fake.asked == [False, False, False, True]


def test_what_was_claimed_when_room_went_is_given_back(
    monkeypatch: pytest.MonkeyPatch, clock: list[float], tmp_path: Path
) -> None:
    fake = _Ray((tiny_trial(tmp_path, "t5", None, "nano-sentiment").model_dump_json(), 1, False), "wait")
    monkeypatch.setattr(hosts, "ray", fake)
    inbox = hosts.DispatcherInbox(fake.dispatcher, "host-0", 0)
    inbox.no_room()
    fake.ready = False
    assert inbox.next_trial(wait=False) == "wait"
    inbox.no_room()
    assert not fake.given_back, "not answered yet"
    fake.ready = True
    inbox.no_room()
    inbox.no_room()
    assert fake.given_back == [("t0000", 1)]
    clock[0] += 1.0
    assert inbox.next_trial(wait=False) == "wait"
    assert fake.asked == [False, False]


def test_a_launch_deletes_the_tokens_of_those_before_it_and_no_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hosts.tempfile, "gettempdir", lambda: str(tmp_path))
    mine = hosts.tokens_folder("glue[1]-ab12-1700000300")
    others = ["glue[1]-ab12-1700000100", "glue[1]-ab12-1700000200", "glue[1]-cd34-1700000100", "glue[1]-ab12-x-17"]
    for run in others:
        (hosts.tokens_folder(run) / "part").mkdir(parents=True)
    mine.mkdir()
    hosts.drop_older_tokens(mine)
    left = {hosts.tokens_folder(run).name for run in others[2:]} | {mine.name}
    assert {folder.name for folder in tmp_path.iterdir()} == left
