"""The record and its file: round trip, forward compatibility, torn lines, durability."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deft_ray.errors import RecordsError
from deft_ray.results.files import file_stem, write_aside
from deft_ray.results.records import REQUIRED, Record, RecordLog


def make_record(**changes: Any) -> Record:
    values: dict[str, Any] = {
        "trial": "t0007",
        "task": "squad",
        "seed": 3,
        "baseline": False,
        "status": "complete",
        "score": 0.875,
        "score_metric": "f1",
        "extra_scores": {"exact_match": 0.75},
        "density": 0.125,
        "density_encoder": 0.25,
        "density_decoder": None,
        "density_paper": 0.5,
        "density_at_tau": {"0.001": 0.0625},
        "density_layers": {"encoder.0": 0.1},
        "config": {"deft.alpha": 0.1, "model.name": "größe\n|\u2028", "train.resume": None, "deft.on": True},
        "steps": 100,
        "wall_s": 12.5,
        "dtype": "bfloat16",
        "activation": "gelu_new",
        "versions": {"torch": "2.9"},
        "times": {"startup_s": 1.0},
        "adapter": "checkpoints/t0007",
        "started_at": 1.0,
        "ended_at": 2.0,
        "host": "h0",
    }
    return Record(**{**values, **changes})


def test_round_trip_is_exact() -> None:
    record = make_record()
    line = record.to_json()
    assert "\n" not in line
    assert Record.from_json(line) == record


def test_every_required_key_is_written() -> None:
    assert set(REQUIRED) <= set(json.loads(make_record().to_json()))


def test_unknown_keys_are_left_out() -> None:
    values = json.loads(make_record().to_json())
    assert Record.from_json(json.dumps({**values, "from_the_future": [1]})) == make_record()


def test_optional_keys_may_be_absent() -> None:
    values = json.loads(make_record().to_json())
    record = Record.from_json(json.dumps({key: values[key] for key in REQUIRED}))
    assert (record.cause, record.times, record.host) == (None, {}, "")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_becomes_null(bad: float) -> None:
    record = make_record(score=bad, wall_s=bad, config={"deft.alpha": bad}, density_layers={"a": bad, "b": 0.5})
    values = json.loads(record.to_json(), parse_constant=pytest.fail)
    assert (values["score"], values["wall_s"], values["config"]) == (None, None, {"deft.alpha": None})
    read = Record.from_json(record.to_json())
    assert read.score is None
    assert math.isnan(read.wall_s)
    assert read.density_layers == {"b": 0.5}


def test_numpy_numbers_and_lists_are_written() -> None:
    record = make_record(score=np.float32(0.5), steps=np.int64(7), config={"adapter.target_modules": ("q", "v")})
    read = Record.from_json(record.to_json())
    assert (read.score, read.steps, read.config) == (0.5, 7, {"adapter.target_modules": ["q", "v"]})


def test_a_traceback_with_undecodable_bytes_is_written(tmp_path: Path) -> None:
    record = make_record(status="failed", cause="no file \udcff")
    log = RecordLog(tmp_path / "records.jsonl")
    log.append(record)
    assert log.read() == [record]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "3"}, "'seed' must be int (got \"3\")"),
        ({"seed": True}, "'seed' must be int (got true)"),
        ({"baseline": 0}, "'baseline' must be bool (got 0)"),
        ({"score": "high"}, "'score' must be float | None (got \"high\")"),
        ({"wall_s": "long"}, "'wall_s' must be float (got \"long\")"),
        ({"versions": {"torch": 2}}, "'versions' must be dict[str, str] (got {\"torch\": 2})"),
        ({"times": [1]}, "'times' must be dict[str, float] (got [1])"),
        ({"config": None}, "'config' must be dict[str, Scalar] (got null)"),
        ({"trial": None}, "'trial' must be str (got null)"),
        ({"status": "done"}, "'status' must be one of complete, failed, diverged, pruned, stopped (got \"done\")"),
    ],
)
def test_wrong_kinds_are_named(changes: dict[str, Any], message: str) -> None:
    line = json.dumps({**json.loads(make_record().to_json()), **changes})
    with pytest.raises(RecordsError) as caught:
        Record.from_json(line)
    assert str(caught.value) == message


def test_all_faults_of_a_line_come_together() -> None:
    values = json.loads(make_record().to_json())
    del values["task"], values["versions"]
    with pytest.raises(RecordsError) as caught:
        Record.from_json(json.dumps({**values, "steps": None}))
    assert str(caught.value) == "missing key 'task'; missing key 'versions'; 'steps' must be int (got null)"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[1]", "must be a JSON object (got list)"),
        ("[" * 100_000, "not JSON: maximum recursion depth exceeded"),
    ],
)
def test_what_is_no_object_is_refused(line: str, message: str) -> None:
    with pytest.raises(RecordsError) as caught:
        Record.from_json(line)
    assert str(caught.value).startswith(message)


def test_append_then_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "run" / "records.jsonl"
    records = [make_record(trial=f"t{index:04d}") for index in (2, 0, 1)]
    assert RecordLog(path).read() == []
    log = RecordLog(path)
    for record in records:
        log.append(record)
    assert RecordLog(path).read() == records
    assert len(path.read_bytes().splitlines()) == 3


def test_a_second_record_of_a_trial_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    log = RecordLog(path)
    log.append(make_record())
    for writer in (log, RecordLog(path)):
        with pytest.raises(RecordsError) as caught:
            writer.append(make_record(status="failed"))
        assert str(caught.value) == f"{path}: trial t0007 already has a record; a record is final"
    assert len(log.read()) == 1


def test_append_sees_what_another_writer_added(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    log = RecordLog(path)
    log.append(make_record(trial="t0000"))
    RecordLog(path).append(make_record(trial="t0001"))
    with pytest.raises(RecordsError, match="t0001 already has a record"):
        log.append(make_record(trial="t0001"))


def test_two_lines_of_one_trial_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text((make_record().to_json() + "\n") * 2)
    with pytest.raises(RecordsError) as caught:
        RecordLog(path).read()
    assert str(caught.value) == f"{path}:2: trial t0007 already has a record on line 1"


def test_append_refuses_what_could_not_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with pytest.raises(RecordsError, match="'status' must be one of complete, failed, diverged, pruned, stopped"):
        RecordLog(path).append(make_record(status="done"))
    assert not path.exists()


def test_killed_at_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever prefix of the file a crash leaves: whole lines are read, and the next append leaves a whole file."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a thousand of them are slow, and tested below
    path = tmp_path / "records.jsonl"
    small = {"config": {"a": "é"}, "density_layers": {}, "versions": {}}
    records = [make_record(trial=f"t{index}", **small) for index in range(2)]
    whole = b"".join((record.to_json() + "\n").encode() for record in records)
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        assert RecordLog(path).read() == records[:kept], cut
        if kept < 2 and (cut % 8 == 0 or any(abs(cut - end) < 3 for end in ends)):
            RecordLog(path).append(records[kept])
            assert path.read_bytes() == whole[: ends[kept]], cut


@pytest.mark.parametrize("torn", [b"{\n", b"\n", b"\xff\xfe\n", b'{"trial": "t1"}', b"\x00" * 50])
def test_a_torn_last_line_is_no_record(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes((make_record(trial="t0").to_json() + "\n").encode() + torn)
    log = RecordLog(path)
    assert [record.trial for record in log.read()] == ["t0"]
    log.append(make_record(trial="t1"))
    assert [record.trial for record in RecordLog(path).read()] == ["t0", "t1"]
    assert torn.strip(b"\n") == b"" or torn not in path.read_bytes()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (b"{", "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (b"", "not JSON: Expecting value: line 1 column 1 (char 0)"),
        (b"\xff", "not UTF-8 (invalid start byte at byte 0)"),
        (b"3", "must be a JSON object (got int)"),
    ],
)
def test_a_broken_line_in_the_middle_says_where(tmp_path: Path, broken: bytes, message: str) -> None:
    path = tmp_path / "records.jsonl"
    lines = [make_record(trial="t0").to_json().encode(), broken, make_record(trial="t1").to_json().encode()]
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(RecordsError) as caught:
        RecordLog(path).read()
    assert str(caught.value) == f"{path}:2: {message}"


def test_a_last_line_that_lacks_keys_is_not_torn(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"trial": "t0"}\n')
    with pytest.raises(RecordsError, match=r"records\.jsonl:1: missing key 'task'; missing key 'seed'"):
        RecordLog(path).read()


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(RecordsError) as caught:
        RecordLog(tmp_path).read()
    assert str(caught.value) == f"{tmp_path}: cannot be read: Is a directory"


def test_a_full_disk_leaves_no_torn_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "records.jsonl"
    log = RecordLog(path)
    log.append(make_record(trial="t0"))
    before = path.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:10]))
    with pytest.raises(RecordsError, match=r"no room for the record of trial t1 \(\d+ bytes\)"):
        log.append(make_record(trial="t1"))
    monkeypatch.undo()
    assert path.read_bytes() == before
    log.append(make_record(trial="t1"))
    assert len(log.read()) == 2


def test_an_append_is_one_write_and_one_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RecordLog(tmp_path / "records.jsonl")
    log.append(make_record(trial="t0"))
    calls: list[str] = []
    write, fsync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda *a: calls.append("write") or write(*a))
    monkeypatch.setattr(os, "fsync", lambda *a: calls.append("fsync") or fsync(*a))
    log.append(make_record(trial="t1"))
    assert calls == ["write", "fsync"]


def test_a_record_is_frozen_and_hashable() -> None:
    record = make_record()
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.score = 1.0  # type: ignore[misc]
    assert hash(record) == hash(make_record())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "front.csv"
    path.write_text("old")

    def fail(aside: Path) -> None:
        aside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_aside(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["front.csv"]


def test_a_task_name_is_safe_in_a_file_name() -> None:
    assert file_stem("pareto", "glue/sst2") == "pareto-glue-sst2"
    assert file_stem("pareto", "../my data") == "pareto-..-my-data"
