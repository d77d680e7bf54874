"""Checkpoints: whole or not there, never another trial's, gone once the adapter is published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deft_ray.train.ranks import Ranks
from deft_ray.train.storage import TrialStorage, drop_trials, probe_storage, resolve

Write = Callable[[Path], None]


@pytest.fixture(params=["folder", "uri"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "checkpoints") if request.param == "folder" else (tmp_path / "checkpoints").as_uri()


def folder_of(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / "t0001"


def writes(text: str) -> Write:
    def write(folder: Path) -> None:
        assert not list(folder.iterdir())
        (folder / "engine").mkdir()
        (folder / "engine" / "state.pt").write_text(text)
        (folder / "rank-0.pt").write_text(f"rank {text}")

    return write


def read_into(found: dict[str, str]) -> Write:
    def read(folder: Path) -> None:
        found.update({str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()})

    return read


def test_what_was_saved_is_loaded(root: str, ranks: Ranks) -> None:
    storage = TrialStorage(root, "t0001", "abc")
    assert storage.latest() is None
    storage.save(12, writes("twelve"), {"clock": {"train_s": 1.5}}, ranks)
    again = TrialStorage(root, "t0001", "abc")
    found: dict[str, str] = {}
    again.load(12, read_into(found))

    assert again.latest() == {"step": 12, "fingerprint": "abc", "clock": {"train_s": 1.5}}
    assert found == {"engine/state.pt": "twelve", "rank-0.pt": "rank twelve"}


def test_what_other_trials_left_can_be_fetched_and_dropped(root: str, ranks: Ranks, tmp_path: Path) -> None:
    for trial in ("t0001", "t0002"):
        storage = TrialStorage(root, trial, "abc")
        storage.save(3, writes("three"), {}, ranks)
    storage.publish_adapter(writes("adapter"))
    with TrialStorage(root, "t0003", "abc").adapter_of("t0002") as folder:
        assert (folder / "rank-0.pt").read_text() == "rank adapter"
    assert not folder.exists()
    with pytest.raises(FileNotFoundError), TrialStorage(root, "t0003", "abc").adapter_of("t0001"):
        pass
    drop_trials(root, ["t0001", "t0009"])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["t0002"]
    drop_trials(str(tmp_path / "never written"), ["t0001"])


def test_the_one_before_is_dropped(root: str, ranks: Ranks, tmp_path: Path) -> None:
    storage = TrialStorage(root, "t0001", "abc")
    for step in (3, 6, 9):
        storage.save(step, writes(str(step)), {}, ranks)

    assert sorted(path.name for path in folder_of(tmp_path).iterdir()) == ["latest.json", "step-00000009"]


def test_saving_a_step_again_replaces_it(root: str, ranks: Ranks) -> None:
    storage = TrialStorage(root, "t0001", "abc")
    storage.save(3, writes("old"), {}, ranks)
    storage.save(3, writes("new"), {}, ranks)
    found: dict[str, str] = {}
    storage.load(3, read_into(found))

    assert found["engine/state.pt"] == "new"


def test_a_save_that_fails_leaves_the_one_before(root: str, ranks: Ranks) -> None:
    storage = TrialStorage(root, "t0001", "abc")
    storage.save(3, writes("three"), {}, ranks)

    def broken(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        storage.save(6, broken, {}, ranks)

    assert storage.latest() == {"step": 3, "fingerprint": "abc"}
    found: dict[str, str] = {}
    storage.load(3, read_into(found))
    assert found["engine/state.pt"] == "three"


def test_files_without_a_declaration_are_no_checkpoint(root: str, ranks: Ranks, tmp_path: Path) -> None:
    (folder_of(tmp_path) / "step-00000005").mkdir(parents=True)
    (folder_of(tmp_path) / ".latest.json").write_text('{"step": 5, "fingerprint": "abc"}')

    assert TrialStorage(root, "t0001", "abc").latest() is None


def test_a_torn_declaration_is_no_checkpoint(root: str, tmp_path: Path) -> None:
    folder_of(tmp_path).mkdir(parents=True)
    (folder_of(tmp_path) / "latest.json").write_text('{"step": 5, "finge')

    assert TrialStorage(root, "t0001", "abc").latest() is None


def test_another_configurations_checkpoint_is_not_seen(root: str, ranks: Ranks) -> None:
    TrialStorage(root, "t0001", "abc").save(3, writes("three"), {}, ranks)

    assert TrialStorage(root, "t0001", "xyz").latest() is None
    assert TrialStorage(root, "t0002", "abc").latest() is None


def test_publishing_leaves_the_adapter_alone(root: str, ranks: Ranks, tmp_path: Path) -> None:
    storage = TrialStorage(root, "t0001", "abc")
    storage.save(3, writes("three"), {}, ranks)
    uri = storage.publish_adapter(lambda folder: (folder / "adapter_config.json").write_text("{}") and None)

    assert uri == storage.adapter_uri == f"{root}/t0001/adapter"
    assert [path.name for path in folder_of(tmp_path).iterdir()] == ["adapter"]
    assert (folder_of(tmp_path) / "adapter" / "adapter_config.json").read_text() == "{}"
    filesystem, path = resolve(uri)
    assert filesystem.get_file_info(f"{path}/adapter_config.json").size == 2


def test_publishing_without_a_checkpoint(root: str) -> None:
    storage = TrialStorage(root, "t0001", "abc")
    storage.publish_adapter(lambda folder: (folder / "x").write_text("x") and None)

    assert storage.latest() is None


def test_declaration_is_json_for_people(root: str, ranks: Ranks, tmp_path: Path) -> None:
    TrialStorage(root, "t0001", "abc").save(3, writes("three"), {"evaluated": {"score": 0.5}}, ranks)

    declared = json.loads((folder_of(tmp_path) / "latest.json").read_text())
    assert declared == {"step": 3, "fingerprint": "abc", "evaluated": {"score": 0.5}}


def test_probe_leaves_nothing(root: str, tmp_path: Path) -> None:
    probe_storage(root)

    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_probe_fails_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(OSError, match="file"):
        probe_storage(str(tmp_path / "file" / "checkpoints"))


def test_a_trailing_slash_changes_nothing(tmp_path: Path, ranks: Ranks) -> None:
    TrialStorage(f"{tmp_path}/checkpoints/", "t0001", "abc").save(3, writes("three"), {}, ranks)

    latest = TrialStorage(f"{tmp_path}/checkpoints", "t0001", "abc").latest()
    assert latest is not None
    assert latest["step"] == 3
    assert TrialStorage(f"file://{tmp_path}/checkpoints/", "t0001", "abc").latest() == latest
