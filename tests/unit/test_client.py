"""Connecting to MLflow: its SQLite file is there whole, or not at all."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from deft_ray.tracking.client import connect, default_tracking

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own


def sizes(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("wait_s", [0.0, 0.1, 0.3])
def test_killed_while_the_database_is_made_and_connected_again(tmp_path: Path, wait_s: float) -> None:
    """The kill falls while MLflow fills the first file that it makes."""
    uri, _ = default_tracking(tmp_path)
    child = multiprocessing.get_context("spawn").Process(target=connect, args=(uri,))
    child.start()
    while not any(sizes(tmp_path).values()):
        assert child.is_alive()
        time.sleep(0.001)
    time.sleep(wait_s)
    child.kill()
    child.join()

    client = connect(uri)
    experiment = client.create_experiment("again")
    assert len({client.create_run(experiment).info.run_id for _ in range(2)}) == 2
    assert len(connect(uri).search_runs([experiment])) == 2


def test_of_two_processes_that_make_it_both_can_use_it(tmp_path: Path) -> None:
    uri, _ = default_tracking(tmp_path)
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=leave_a_run, args=(uri, name)) for name in ("one", "other")]
    for child in children:
        child.start()
    for child in children:
        child.join()

    assert [child.exitcode for child in children] == [0, 0]
    assert {e.name for e in connect(uri).search_experiments()} == {"Default", "one", "other"}
    assert [file.name for file in sizes(tmp_path)] == ["mlflow.db"]


def leave_a_run(uri: str, name: str) -> None:
    client = connect(uri)
    client.create_run(client.create_experiment(name))


def test_a_folder_that_is_not_there_is_made(tmp_path: Path) -> None:
    client = connect(f"sqlite:///{tmp_path}/a b/c/runs.db")
    assert [e.name for e in client.search_experiments()] == ["Default"]
    assert (tmp_path / "a b" / "c" / "runs.db").is_file()
