"""The dispatcher's book: no trial is lost, doubled or credited to the wrong attempt."""

from __future__ import annotations

import random

import pytest

from deft_ray.sweep.board import MAX_ATTEMPTS, Board

END = {"kind": "end", "status": "complete"}


def claimed(board: Board, host: str) -> tuple[str, int]:
    got = board.claim(host)
    assert got is not None
    return got


def test_trials_are_given_out_in_order_and_once() -> None:
    board = Board()
    for name in ("a", "b", "a"):
        board.submit(name, f"spec of {name}")
    assert claimed(board, "h0") == ("spec of a", 1)
    assert claimed(board, "h1") == ("spec of b", 1)
    assert board.claim("h2") is None


def test_rows_are_read_from_any_number_on() -> None:
    board = Board()
    board.submit("a", "spec")
    board.claim("h0")
    rows = [{"kind": "train", "step": 1}, {"kind": "eval", "step": 2}, END]
    assert all(board.add_row("a", 1, row) for row in rows)
    assert board.rows("a", 0) == rows
    assert board.rows("a", 2) == [END]
    assert not board.add_row("a", 1, {"kind": "train", "step": 3}), "a row after the end was taken"


def test_a_lost_host_gives_its_trial_back_to_the_front() -> None:
    board = Board()
    for name in ("a", "b"):
        board.submit(name, name)
    assert claimed(board, "h0") == ("a", 1)
    assert board.release("h0", "node lost", now=1.0) == ["a"]
    assert claimed(board, "h1") == ("a", 2)
    assert not board.add_row("a", 1, END), "a row of the lost attempt was taken"
    assert board.is_cancelled("a", 1)
    assert not board.is_cancelled("a", 2)
    assert board.add_row("a", 2, END)


def test_a_trial_that_loses_its_hosts_again_and_again_has_failed() -> None:
    board = Board()
    board.submit("a", "a")
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert claimed(board, "h0") == ("a", attempt)
        board.release("h0", "killed", now=7.0)
    assert board.claim("h0") is None
    cause = f"its host was lost {MAX_ATTEMPTS} times, last: killed"
    assert board.rows("a", 0) == [{"kind": "end", "status": "failed", "cause": cause, "time": 7.0}]


def test_releasing_a_host_without_a_trial_changes_nothing() -> None:
    board = Board()
    board.submit("a", "a")
    assert board.release("h0", "new", now=0.0) == []
    assert claimed(board, "h0") == ("a", 1)


def test_cancelling() -> None:
    board = Board()
    for name in ("waiting", "running"):
        board.submit(name, name)
    board.cancel("unknown")
    board.cancel("waiting")
    assert claimed(board, "h0") == ("running", 1)
    board.cancel("running")
    assert board.is_cancelled("running", 1)
    board.add_row("running", 1, END)
    board.cancel("running")
    assert board.claim("h0") is None


def test_closing_stops_what_runs() -> None:
    board = Board()
    board.submit("a", "a")
    board.claim("h0")
    board.close()
    assert board.closed
    assert board.is_cancelled("a", 1)


def test_without_hosts_waiting_and_later_trials_are_abandoned() -> None:
    board = Board()
    board.submit("early", "early")
    board.give_up("no host is left")
    board.submit("late", "late")
    for name in ("early", "late"):
        assert board.rows(name, 0) == [{"kind": "end", "status": "abandoned", "cause": "no host is left"}]


def test_forget_drops_rows_of_ended_trials_only() -> None:
    board = Board()
    board.submit("a", "a")
    board.claim("h0")
    board.add_row("a", 1, {"kind": "train"})
    board.forget("a")
    assert len(board.rows("a", 0)) == 1
    board.add_row("a", 1, END)
    board.forget("a")
    assert board.rows("a", 0) == []


@pytest.mark.parametrize("seed", range(30))
def test_whatever_dies_every_trial_ends_exactly_once(seed: int) -> None:
    """Random hosts claim, finish, die: each trial gets one end row, none from a lost attempt."""
    dice = random.Random(seed)
    board, busy, ends = Board(), {}, dict.fromkeys("abcdefgh", 0)
    for name in ends:
        board.submit(name, name)
    for _ in range(400):
        host = f"h{dice.randrange(3)}"
        if host not in busy:
            got = board.claim(host)
            if got is not None:
                busy[host] = got
        elif dice.random() < 0.3:
            board.release(host, "lost", now=0.0)
            name, attempt = busy.pop(host)
            assert not board.add_row(name, attempt, END)
        else:
            name, attempt = busy.pop(host)
            assert board.add_row(name, attempt, {**END, "attempt": attempt})
    for name in ends:
        rows = board.rows(name, 0)
        assert [row["kind"] for row in rows] == ["end"]
        assert rows[0]["status"] == "failed" or rows[0]["attempt"] == board.entries[name].attempt
