"""Windows of a long context: every token, the overlap that was asked for, and the answer in what is trained on."""

from __future__ import annotations

import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from deft_ray.errors import SetupError
from deft_ray.nano.tasks import generate
from deft_ray.nano.tokenizer import build_tokenizer
from deft_ray.spec.catalog import TASKS
from deft_ray.tasks.encoding import EncodedTask, Example, encode_task
from deft_ray.tasks.windows import Window, cut_windows, find_answer, windows_with

Row = dict[str, Any]


def spans_of(lengths: list[int]) -> list[tuple[int, int]]:
    """Tokens of so many characters, with a blank between."""
    ends = [sum(lengths[: n + 1]) + n for n in range(len(lengths))]
    return [(end - length, end) for end, length in zip(ends, lengths, strict=True)]


@pytest.mark.parametrize("seed", range(40))
def test_windows_cover_every_token_and_overlap_as_asked(seed: int) -> None:
    dice = random.Random(seed)
    tokens, room = dice.randint(1, 90), dice.randint(1, 30)
    overlap = dice.randint(0, room * 3 // 4)
    spans = spans_of([dice.randint(1, 9) for _ in range(tokens)])
    windows = cut_windows(spans, room, overlap)

    assert windows[0].first == 0
    assert windows[-1].last == tokens
    for before, after in pairwise(windows):
        assert before.last - after.first == overlap
        assert before.last - before.first == room
        assert after.last > before.last, "no window is another's part"
    assert 1 <= windows[-1].last - windows[-1].first <= room
    assert all((w.begin, w.end) == (spans[w.first][0], spans[w.last - 1][1]) for w in windows)
    assert (len(windows) == 1) == (tokens <= room)


@pytest.mark.parametrize(("room", "overlap"), [(8, 8), (8, 7), (8, 500), (1, 1), (1, 0), (3, 3)])
def test_a_quarter_of_a_window_is_new_at_least(room: int, overlap: int) -> None:
    """An overlap that the room does not have would never come to the end."""
    windows = cut_windows(spans_of([1] * 50), room, overlap)

    assert {after.first - before.first for before, after in pairwise(windows)} == {max(1, (room + 3) // 4)}
    assert windows[-1].last == 50


CONTEXT = "The red boat met the Red horse; a red kettle."


@pytest.mark.parametrize(
    ("answer", "start", "places"),
    [
        ("red", 4, [(4, 7)]),
        ("red", 34, [(34, 37)]),
        ("red", None, [(4, 7), (34, 37)]),
        ("red", 5, [(4, 7), (34, 37)]),
        ("red", -1, [(4, 7), (34, 37)]),
        ("red", 999, [(4, 7), (34, 37)]),
        (" red ", 3, [(4, 7)]),
        ("RED", None, [(4, 7), (21, 24), (34, 37)]),
        ("red kettle.", None, [(34, 45)]),
        ("a (red", None, []),
        ("blue", 4, []),
    ],
)
def test_an_answer_is_found_by_its_place_or_else_its_text(
    answer: str, start: int | None, places: list[tuple[int, int]]
) -> None:
    assert find_answer(CONTEXT, answer, start) == places


WINDOWS = [Window(0, 4, 0, 20), Window(2, 6, 10, 30), Window(4, 8, 20, 40)]


@pytest.mark.parametrize(
    ("places", "numbers"),
    [
        ([(2, 8)], [0]),
        ([(12, 18)], [0, 1]),
        ([(10, 20)], [0, 1]),
        ([(20, 30)], [1, 2]),
        ([(35, 40)], [2]),
        ([(2, 8), (35, 40)], [0, 2]),
        ([(5, 28)], [1]),
        ([(5, 22)], [0]),
        ([(18, 38)], [2]),
        ([(0, 40)], [0]),
        ([], [0]),
    ],
)
def test_windows_with_the_whole_answer_or_else_most_of_it(places: list[tuple[int, int]], numbers: list[int]) -> None:
    assert windows_with(WINDOWS, places) == numbers


# --- through a tokenizer ----------------------------------------------------------------------------------------------


def long_rows(count: int, sentences: int = 12) -> list[Row]:
    """Questions over several nano contexts after each other; the one that answers stands anywhere."""
    dice, facts = random.Random(count), generate("nano-question", "train", count * sentences)
    rows = []
    for number in range(count):
        mine = facts[number * sentences : (number + 1) * sentences]
        asked = dice.choice(mine)
        before = " ".join(row["context"] for row in mine[: mine.index(asked)])
        start = asked["answers"]["answer_start"][0] + (len(before) + 1 if before else 0)
        rows.append(
            {
                "question": asked["question"],
                "context": " ".join(row["context"] for row in mine),
                "answers": {"text": asked["answers"]["text"], "answer_start": [start]},
            }
        )
    return rows


@pytest.fixture(scope="module", params=["nano", "bytes"])
def tokenizer(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> PreTrainedTokenizerBase:
    """A tokenizer that takes a blank to the word after it, and one of bytes; T5's is of the first kind."""
    return build_tokenizer() if request.param == "nano" else AutoTokenizer.from_pretrained(tiny_models["t5"])


def encode(
    tokenizer: PreTrainedTokenizerBase, rows: list[Row], length: int, overlap: int | None = None, task: str = "squad"
) -> EncodedTask:
    return encode_task(
        TASKS[task],
        rows,
        rows,
        tokenizer,
        text_to_text=True,
        max_source_tokens=length,
        max_target_tokens=30,
        window_overlap_tokens=overlap,
    )


def squeezed(text: str) -> str:
    """Text less its blanks, which a tokenizer may move."""
    return re.sub(r"\s+", "", text)


def shown(tokenizer: PreTrainedTokenizerBase, example: Example, row: Row) -> str:
    """The context that a source shows, less blanks; it must begin with the whole question."""
    text = squeezed(tokenizer.decode(example.input_ids, skip_special_tokens=True))
    head = squeezed(f"question: {row['question']} context:").lower()
    assert text.lower().startswith(head)
    return text[len(head) :]


@pytest.mark.parametrize("task", ["squad", "nano-question"])
@pytest.mark.parametrize(("length", "overlap"), [(100, 20), (100, None), (150, 0), (80, 200)])
def test_sources_of_windows_are_the_whole_context_in_pieces(
    tokenizer: PreTrainedTokenizerBase, task: str, length: int, overlap: int | None
) -> None:
    rows = long_rows(5)
    data = encode(tokenizer, rows, length, overlap, task)

    assert {example.row for example in data.validation} == set(range(5))
    for number, row in enumerate(rows):
        mine = [example for example in data.validation if example.row == number]
        assert len(mine) == mine[0].windows > 1
        assert all(len(example.input_ids) == length for example in mine[:-1])
        assert len(mine[-1].input_ids) <= length
        assert all(example.input_ids[-1] == tokenizer.eos_token_id for example in mine)
        assert all(example.answers == tuple(row["answers"]["text"]) for example in mine)
        text = ""
        for example in mine:
            piece = shown(tokenizer, example, row)
            lap = max(n for n in range(len(piece) + 1) if n == 0 or text.endswith(piece[:n]))
            assert bool(lap) >= bool(text and overlap != 0), "neighbours share tokens"
            text += piece[lap:]
        if overlap:
            assert text.lower() == squeezed(row["context"]).lower()


def shared(first: list[int], second: list[int]) -> int:
    """How many of the one's last tokens the other repeats right after what both begin with."""
    heads = [place for place in range(len(second)) if first[:place] == second[:place]]
    return max(n for n in range(1, len(first)) for place in heads if second[place : place + n] == first[-n:])


@pytest.mark.parametrize(("overlap", "want"), [(None, 30), (17, 17)])
def test_neighbours_share_a_third_of_a_source_unless_told(
    tokenizer: PreTrainedTokenizerBase, overlap: int | None, want: int
) -> None:
    """A third is the authors' 128 of 384."""
    first, second = encode(tokenizer, long_rows(1), 90, overlap).validation[:2]

    assert shared(first.input_ids[:-1], second.input_ids[:-1]) == want


@pytest.mark.parametrize("starts", ["right", "wrong", "none", [], ["4"], 4, None])
def test_training_shows_every_answer_it_asks_for(tokenizer: PreTrainedTokenizerBase, starts: Any) -> None:
    rows = long_rows(12)
    for row in rows:
        if starts == "wrong":
            row["answers"] = {**row["answers"], "answer_start": [0]}
        elif starts == "none":
            row["answers"] = {"text": row["answers"]["text"]}
        elif starts != "right":
            row["answers"] = {**row["answers"], "answer_start": starts}
    data = encode(tokenizer, rows, 100, 40)

    assert {example.row for example in data.train} == set(range(12))
    assert len(data.train) < len(data.validation)
    for example in data.train:
        answer = squeezed(rows[example.row]["answers"]["text"][0]).lower()
        assert answer in shown(tokenizer, example, rows[example.row]).lower()
    if starts == "none":
        for example in data.validation:
            answer = rows[example.row]["answers"]["text"][0]
            seen = re.search(rf"(?<!\w){answer}(?!\w)", tokenizer.decode(example.input_ids).lower())
            context = re.search(r"context", tokenizer.decode(example.input_ids).lower())
            if seen and context and seen.start() > context.end():
                assert example in data.train, "a window that shows the answer is trained on"


def test_an_answer_in_other_words_is_trained_on_the_first_window(tokenizer: PreTrainedTokenizerBase) -> None:
    row = {**long_rows(1)[0], "answers": {"text": ["zebra crossing"]}}
    data = encode(tokenizer, [row], 100, 20)

    assert data.train == data.validation[:1]


@pytest.mark.parametrize("padded", [False, True])
def test_a_question_that_fits_is_as_its_tokenizer_makes_it(tokenizer: PreTrainedTokenizerBase, padded: bool) -> None:
    rows = generate("nano-question", "train", 20)
    prompts = [f"question: {row['question']} context: {row['context']}" for row in rows]
    want = tokenizer(prompts)["input_ids"]
    length = max(map(len, want)) + 10 * padded
    data = encode(tokenizer, rows, length, 5)

    assert [example.input_ids for example in data.train] == want
    assert [example.row for example in data.train] == list(range(20))
    assert {example.windows for example in data.train} == {1}
    assert data.validation == data.train


def test_a_question_that_leaves_no_room_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = long_rows(3)
    rows[1]["question"] *= 30
    with pytest.raises(SetupError) as caught:
        encode(tokenizer, rows, 90)

    what = "1 of 3 questions leave no room for their context"
    assert str(caught.value) == f"squad: train: {what} (data.max_source_tokens: 90); give it more"
