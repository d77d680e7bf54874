"""The dispatcher's book: no trial is lost, doubled or credited to the wrong attempt."""

from __future__ import annotations

import random

import pytest

from deft_ray.sweep.board import MAX_ATTEMPTS, Board

END = {"kind": "end", "status": "complete"}


def claimed(board: Board, host: str, life: int = 0) -> tuple[str, int]:
    got = board.claim(host, life)
    assert got is not None
    return got[:2]


def test_trials_are_given_out_in_order_and_once() -> None:
    board = Board()
    for name in ("a", "b", "a"):
        board.submit(name, f"spec of {name}")
    assert claimed(board, "h0") == ("spec of a", 1)
    assert claimed(board, "h1") == ("spec of b", 1)
    assert board.claim("h2", 0) is None


def test_rows_are_read_from_any_number_on() -> None:
    board = Board()
    board.submit("a", "spec")
    board.claim("h0", 0)
    rows = [{"kind": "train", "step": 1}, {"kind": "eval", "step": 2}, END]
    assert all(board.add_row("a", 1, row, 0.0) for row in rows)
    assert board.rows("a", 0) == rows
    assert board.rows("a", 2) == [END]
    assert not board.add_row("a", 1, {"kind": "train", "step": 3}, 0.0), "a row after the end was taken"


def test_training_losses_are_read_with_the_row_that_follows_them() -> None:
    """Tune is told of evaluations and ends; reading each loss by itself would be a call for nothing."""
    board = Board()
    board.submit("a", "spec")
    board.claim("h0", 0)
    rows = [{"kind": kind, "step": step} for step, kind in enumerate(["train", "eval", "train", "train"], start=1)]
    for number, found in enumerate([[], rows[:2], rows[:2], rows[:2]]):
        assert board.add_row("a", 1, rows[number], 0.0)
        assert board.rows("a", 0) == found
    assert board.rows("a", 2) == []
    assert board.add_row("a", 1, END, 0.0)
    assert board.rows("a", 2) == [*rows[2:], END]


def test_a_lost_host_gives_its_trial_back_to_the_front() -> None:
    board = Board()
    for name in ("a", "b"):
        board.submit(name, name)
    assert claimed(board, "h0") == ("a", 1)
    board.release("h0", "node lost", now=1.0)
    assert claimed(board, "h1") == ("a", 2)
    assert not board.add_row("a", 1, END, 0.0), "a row of the lost attempt was taken"
    assert board.is_cancelled("a", 1)
    assert not board.is_cancelled("a", 2)
    assert board.add_row("a", 2, END, 0.0)


def test_a_trial_that_loses_its_hosts_again_and_again_has_failed() -> None:
    board = Board()
    board.submit("a", "a")
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert claimed(board, "h0", attempt - 1) == ("a", attempt)
        assert board.release("h0", "killed", now=7.0) == attempt
    assert board.claim("h0", MAX_ATTEMPTS) is None
    cause = f"its host was lost {MAX_ATTEMPTS} times, last: killed"
    assert board.rows("a", 0) == [{"kind": "end", "status": "failed", "cause": cause, "time": 7.0}]


def test_releasing_a_host_without_a_trial_changes_nothing() -> None:
    board = Board()
    board.submit("a", "a")
    life = board.release("h0", "new", now=0.0)
    assert claimed(board, "h0", life) == ("a", 1)


def test_cancelling() -> None:
    board = Board()
    for name in ("waiting", "running"):
        board.submit(name, name)
    board.cancel("unknown")
    board.cancel("waiting")
    assert claimed(board, "h0") == ("running", 1)
    board.cancel("running")
    assert board.is_cancelled("running", 1)
    board.add_row("running", 1, END, 0.0)
    board.cancel("running")
    assert board.claim("h0", 0) is None


def test_closing_stops_what_runs() -> None:
    board = Board()
    board.submit("a", "a")
    board.claim("h0", 0)
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
    board.claim("h0", 0)
    board.add_row("a", 1, {"kind": "eval"}, 0.0)
    board.forget("a")
    assert len(board.rows("a", 0)) == 1
    board.add_row("a", 1, END, 0.0)
    board.forget("a")
    assert board.rows("a", 0) == [END], "whoever asks again, started anew, learns that it has ended"


def test_a_question_of_workers_that_are_gone_takes_no_trial() -> None:
    """It may be answered long after they died, and after others took their place."""
    board = Board()
    life = board.release("h0", "first start", now=0.0)
    after = board.release("h0", "killed", now=0.0)
    board.submit("a", "a")
    assert board.claim("h0", life) is None
    assert claimed(board, "h0", after) == ("a", 1)


def test_all_trials_of_a_lost_host_wait_again_in_their_order() -> None:
    board = Board()
    for name in "abcd":
        board.submit(name, name)
    for _ in range(3):
        board.claim("h0", 0)
    board.claim("h1", 0)
    life = board.release("h0", "killed", now=0.0)
    assert [claimed(board, "h0", life) for _ in range(3)] == [("a", 2), ("b", 2), ("c", 2)]
    assert board.claim("h0", life) is None, "what another host has stays there"


def test_at_its_last_attempt_a_trial_has_a_host_to_itself() -> None:
    """Two trials lose their host together, again and again: which of them costs it is found out by one at a time."""
    board = Board()
    for name in ("guilty", "innocent"):
        board.submit(name, name)
    for life in range(MAX_ATTEMPTS - 1):
        assert [claim[1:] for claim in (board.claim("h0", life), board.claim("h0", life)) if claim] == [
            (life + 1, False),
            (life + 1, False),
        ]
        board.release("h0", "killed", now=0.0)
    assert board.claim("h0", MAX_ATTEMPTS - 1) == ("guilty", MAX_ATTEMPTS, True)
    life = board.release("h0", "killed", now=0.0)
    assert board.claim("h0", life) == ("innocent", MAX_ATTEMPTS, True)
    assert board.add_row("innocent", MAX_ATTEMPTS, {**END}, 0.0)
    assert [board.rows(name, 0)[-1]["status"] for name in ("guilty", "innocent")] == ["failed", "complete"]


def test_a_suspect_is_not_given_to_a_host_that_another_trial_may_cost() -> None:
    """Such a host gets nothing else either, so that it becomes free; an idle one takes the suspect at once."""
    board = Board()
    board.submit("suspect", "suspect")
    for life in range(MAX_ATTEMPTS - 1):
        board.claim("h0", life)
        board.release("h0", "killed", now=0.0)
    for name in ("busy", "later"):
        board.submit(name, name)
    board.entries["busy"].state, board.entries["busy"].host, board.entries["busy"].attempt = "running", "h1", 1
    board._waiting.remove("busy")
    assert board.claim("h1", 0) is None
    board.release("h1", "killed", now=0.0)
    assert board.entries["suspect"].state == "waiting", "it was not aboard"
    assert [claimed(board, "h1", 1), claimed(board, "h2")] == [("busy", 2), ("suspect", MAX_ATTEMPTS)]
    assert claimed(board, "h1", 1) == ("later", 1)


def test_a_trial_that_failed_on_one_worker_takes_no_other_along() -> None:
    """The worker is about to end; what the others say of the trials beside it, as they miss it, is not believed."""
    board = Board()
    for name in ("a", "b"):
        board.submit(name, name)
        board.claim("h0", 0)
    assert board.add_row("a", 1, {"kind": "end", "status": "failed", "alone": True}, 0.0)
    assert not board.add_row("b", 1, {"kind": "end", "status": "failed"}, 0.0)
    assert board.rows("a", 0) == [{"kind": "end", "status": "failed"}]
    assert board.claim("h0", 0) is None, "it is going"
    assert claimed(board, "h1") == ("b", 2)


@pytest.mark.parametrize("seed", range(30))
def test_whatever_dies_every_trial_ends_exactly_once(seed: int) -> None:
    """Random hosts of up to three slots claim, finish, die: each trial gets one end row, none from a lost attempt."""
    dice = random.Random(seed)
    board, ends = Board(), dict.fromkeys("abcdefgh", 0)
    busy: dict[str, list[tuple[str, int]]] = {f"h{number}": [] for number in range(3)}
    lives = dict.fromkeys(busy, 0)
    for name in ends:
        board.submit(name, name)
    for _ in range(600):
        host = dice.choice(list(busy))
        mine = busy[host]
        if len(mine) < 3 and dice.random() < 0.5:
            got = board.claim(host, lives[host])
            if got is not None:
                mine.append(got[:2])
        elif dice.random() < 0.2:
            lives[host] = board.release(host, "lost", now=0.0)
            assert not any(board.add_row(name, attempt, {**END}, 0.0) for name, attempt in mine)
            mine.clear()
        elif mine:
            name, attempt = mine.pop(dice.randrange(len(mine)))
            assert board.add_row(name, attempt, {**END, "attempt": attempt}, 0.0)
    for name in ends:
        rows = board.rows(name, 0)
        assert [row["kind"] for row in rows] == ["end"]
        assert rows[0]["status"] == "failed" or rows[0]["attempt"] == board.entries[name].attempt


def test_of_hosts_that_ask_the_one_with_fewest_trials_is_served() -> None:
    board = Board()
    for name in "abcd":
        board.submit(name, name)
    for host in ("h0", "h1"):
        board.asks(host, 0, still=True)
    assert claimed(board, "h0") == ("a", 1)
    assert board.claim("h0", 0) is None, "h1 asks too, and has none"
    assert claimed(board, "h1") == ("b", 1)
    assert claimed(board, "h0") == ("c", 1), "both have one"
    board.asks("h1", 0, still=False)
    assert claimed(board, "h0") == ("d", 1), "h1 has no room"


def test_a_question_of_workers_that_are_gone_holds_nobody_up() -> None:
    board = Board()
    for name in "ab":
        board.submit(name, name)
    board.asks("h1", 0, still=True)
    assert board.release("h1", "killed", 0.0) == 1
    assert claimed(board, "h0") == ("a", 1)
    assert claimed(board, "h0") == ("b", 1)


def test_ended_trials_do_not_count_as_a_hosts() -> None:
    board = Board()
    for name in "ab":
        board.submit(name, name)
    assert claimed(board, "h0") == ("a", 1)
    board.asks("h1", 0, still=True)
    assert board.add_row("a", 1, END, 0.0)
    assert claimed(board, "h0") == ("b", 1)


def test_what_a_host_has_no_room_for_is_the_next_again() -> None:
    board = Board()
    for name in "ab":
        board.submit(name, name)
    assert claimed(board, "h0") == ("a", 1)
    board.give_back("a", 2)
    assert claimed(board, "h1") == ("b", 1), "another attempt's word does not count"
    board.give_back("a", 1)
    assert claimed(board, "h1") == ("a", 1), "it was not begun, so it has lost no host"
    board.cancel("a")
    board.give_back("a", 1)
    assert board.claim("h0", 0) is None
    assert board.is_cancelled("a", 1)
    assert not board.add_row("a", 1, END, 0.0)


# --- behind another trial ---------------------------------------------------------------------------------------------


def test_what_waits_behind_a_trial_is_given_out_once_that_one_trains() -> None:
    board = Board()
    board.submit("point", "point", behind=["baseline"])
    assert board.claim("h0", 0) is None, "its baseline is not even here"
    board.submit("baseline", "baseline")
    board.submit("other", "other")
    assert claimed(board, "h0") == ("baseline", 1)
    assert claimed(board, "h1") == ("other", 1), "who is not held does not wait for who is"
    assert board.claim("h2", 0) is None, "it has been claimed, and does not train yet"
    assert board.add_row("baseline", 1, {"kind": "train", "step": 1}, 0.0)
    board.release("h0", "node lost", now=1.0)
    assert claimed(board, "h2") == ("baseline", 2), "what lost its host comes first"
    assert claimed(board, "h2") == ("point", 1), "it has been seen to train"


def test_every_trial_that_is_waited_for_has_to_train() -> None:
    board = Board()
    board.submit("point", "point", behind=["one", "two"])
    for name in ("one", "two"):
        board.submit(name, name)
        assert claimed(board, "h0") == (name, 1)
    assert board.add_row("one", 1, {"kind": "train", "step": 1}, 0.0)
    assert board.claim("h0", 0) is None
    assert board.add_row("two", 1, {"kind": "train", "step": 1}, 0.0)
    assert claimed(board, "h0") == ("point", 1)
    assert board.add_row("two", 1, {"kind": "end", "status": "failed"}, 0.0)
    board.give_back("point", 1)
    assert [row["status"] for row in board.rows("point", 0)] == ["abandoned"]


def test_a_baseline_that_completes_without_a_row_lets_on_who_waits_behind_it() -> None:
    board = Board()
    board.submit("baseline", "baseline")
    board.submit("point", "point", behind=["baseline"])
    assert claimed(board, "h0") == ("baseline", 1)
    assert board.add_row("baseline", 1, END, 0.0)
    board.forget("baseline")
    assert claimed(board, "h0") == ("point", 1)


@pytest.mark.parametrize("status", ["failed", "diverged", "stopped"])
def test_who_waits_behind_what_fails_is_abandoned(status: str) -> None:
    board = Board()
    board.submit("baseline", "baseline")
    for name, behind in (("runs", ["baseline"]), ("waits", ["baseline"]), ("other", [])):
        board.submit(name, name, behind)
    assert claimed(board, "h0") == ("baseline", 1)
    assert board.add_row("baseline", 1, {"kind": "train", "step": 1}, 0.0)
    assert claimed(board, "h1") == ("runs", 1)
    assert board.add_row("baseline", 1, {"kind": "end", "status": status}, 0.0)
    board.submit("late", "late", behind=["baseline"])
    for name in ("waits", "late"):
        (row,) = board.rows(name, 0)
        assert row == {
            "kind": "end",
            "status": "abandoned",
            "cause": f"it waited for what has failed: baseline ended as {status}",
        }
    assert claimed(board, "h0") == ("other", 1)
    assert board.add_row("runs", 1, END, 0.0), "who trains already goes on to its end"


@pytest.mark.parametrize("begun", ["not submitted", "waits", "given back"])
def test_who_waits_behind_what_is_cancelled_is_abandoned(begun: str) -> None:
    """Tune may give up a baseline of its own accord, whatever has become of it here."""
    board = Board()
    board.submit("point", "point", behind=["baseline"])
    if begun != "not submitted":
        board.submit("baseline", "baseline")
    if begun == "given back":
        assert claimed(board, "h0") == ("baseline", 1)
    board.cancel("baseline")
    if begun == "given back":
        assert board.rows("point", 0) == []
        board.give_back("baseline", 1)
    assert [row["status"] for row in board.rows("point", 0)] == ["abandoned"]
    board.submit("baseline", "baseline")
    assert board.claim("h0", 0) is None


def test_who_waits_behind_a_trial_that_costs_hosts_is_abandoned_with_it() -> None:
    board = Board()
    board.submit("baseline", "baseline")
    board.submit("point", "point", behind=["baseline"])
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert claimed(board, "h0", attempt - 1) == ("baseline", attempt)
        board.release("h0", "killed", now=0.0)
    assert [row["status"] for row in board.rows("point", 0)] == ["abandoned"]
    board.give_up("no host is left")
    assert len(board.rows("point", 0)) == 1
