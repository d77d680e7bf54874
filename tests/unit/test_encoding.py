"""Prompts and answers, read back through the tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from deft_ray.errors import SetupError
from deft_ray.nano.tokenizer import build_tokenizer
from deft_ray.spec.catalog import TASKS
from deft_ray.tasks.encoding import EncodedTask, encode_task
from tests.tiny import GLUE_TASKS, glue_rows, squad_rows

PROMPTS = {
    "cola": "cola sentence: {sentence}",
    "sst2": "sst2 sentence: {sentence}",
    "mrpc": "mrpc sentence1: {sentence1} sentence2: {sentence2}",
    "stsb": "stsb sentence1: {sentence1} sentence2: {sentence2}",
    "qqp": "qqp question1: {question1} question2: {question2}",
    "mnli": "mnli premise: {premise} hypothesis: {hypothesis}",
    "qnli": "qnli question: {question} sentence: {sentence}",
    "rte": "rte sentence1: {sentence1} sentence2: {sentence2}",
}
ANSWERS = {
    "cola": ["unacceptable", "acceptable"],
    "sst2": ["negative", "positive"],
    "mrpc": ["not_equivalent", "equivalent"],
    "qqp": ["not_duplicate", "duplicate"],
    "mnli": ["entailment", "neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
}


def tokenizer_of(folders: dict[str, Path], name: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folders[name])


def encode(tokenizer: PreTrainedTokenizerBase, task: str, rows: list[dict[str, Any]], **options: Any) -> EncodedTask:
    settings: dict[str, Any] = {"text_to_text": True, "max_source_tokens": 512, "max_target_tokens": 30}
    return encode_task(TASKS[task], rows, rows[:3], tokenizer, **{**settings, **options})


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_a_text_to_text_row_is_its_prompt_and_its_answer(tiny_models: dict[str, Path], task: str) -> None:
    tokenizer, rows = tokenizer_of(tiny_models, "t5"), glue_rows(task, "train", 12)
    data = encode(tokenizer, task, rows)

    for row, example in zip(rows, data.train, strict=True):
        assert tokenizer.decode(example.input_ids) == PROMPTS[task].format(**row) + "</s>"
        answer = f"{np.round(row['label'] * 5) / 5:.1f}" if task == "stsb" else ANSWERS[task][row["label"]]
        assert tokenizer.decode(example.target_ids) == answer + "</s>"
        assert example.label == row["label"]
        assert example.target_ids in data.candidates
    assert data.validation == data.train[:3]


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_candidates_are_all_answers_with_their_values(tiny_models: dict[str, Path], task: str) -> None:
    tokenizer = tokenizer_of(tiny_models, "t5")
    data = encode(tokenizer, task, glue_rows(task, "train", 3))
    words = [f"{tenths / 10:.1f}" for tenths in range(0, 51, 2)] if task == "stsb" else ANSWERS[task]

    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in data.candidates] == words
    assert data.values == pytest.approx([float(word) for word in words] if task == "stsb" else range(len(words)))
    assert data.outputs == (1 if task == "stsb" else len(words))


@pytest.mark.parametrize(
    ("label", "answer"),
    [(0.0, "0.0"), (0.09, "0.0"), (2.5, "2.4"), (2.7, "2.8"), (3.333, "3.4"), (4.95, "5.0"), (5.0, "5.0")],
)
def test_similarities_are_rounded_to_fifths(tiny_models: dict[str, Path], label: float, answer: str) -> None:
    tokenizer = tokenizer_of(tiny_models, "t5")
    row = {"sentence1": "a boat", "sentence2": "a horse", "label": label}
    example = encode(tokenizer, "stsb", [row]).train[0]

    assert tokenizer.decode(example.target_ids, skip_special_tokens=True) == answer
    assert example.label == label, "scores compare with the true similarity, not with the rounded one"


def test_a_question_is_trained_on_its_first_answer_and_keeps_all(tiny_models: dict[str, Path]) -> None:
    tokenizer, rows = tokenizer_of(tiny_models, "t5"), squad_rows("train", 7)
    data = encode(tokenizer, "squad", rows)

    assert data.candidates == []
    assert data.values == []
    for row, example in zip(rows, data.train, strict=True):
        prompt = f"question: {row['question']} context: {row['context']}"
        assert tokenizer.decode(example.input_ids) == prompt + "</s>"
        assert tokenizer.decode(example.target_ids) == row["answers"]["text"][0] + "</s>"
        assert example.answers == tuple(row["answers"]["text"])
        assert example.label == -1


def test_sources_and_answers_are_cut_and_still_end(tiny_models: dict[str, Path]) -> None:
    tokenizer = tokenizer_of(tiny_models, "t5")
    row = glue_rows("mrpc", "train", 1)[0]
    source = encode(tokenizer, "mrpc", [row], max_source_tokens=8).train[0].input_ids
    whole = tokenizer(PROMPTS["mrpc"].format(**row))["input_ids"]
    asked = {**squad_rows("train", 1)[0], "answers": {"text": ["a long answer of many words"], "answer_start": [0]}}
    target = encode(tokenizer, "squad", [asked], max_target_tokens=3).train[0].target_ids

    assert source == [*whole[:7], tokenizer.eos_token_id]
    assert len(target) == 3
    assert target[-1] == tokenizer.eos_token_id


def test_labels_that_are_the_same_tokens_are_refused(tiny_models: dict[str, Path]) -> None:
    """A tokenizer that does not know the letters, as T5's does not know Chinese, makes one unknown word of each."""
    task = replace(TASKS["sst2"], labels=("bad", "坏", "好"))
    with pytest.raises(SetupError) as caught:
        encode_task(task, [], [], build_tokenizer(), text_to_text=True, max_source_tokens=64, max_target_tokens=8)

    assert str(caught.value) == ("sst2: the labels '坏' and '好' are the same tokens to this model; give other names")


def test_a_text_without_a_token_is_refused(tiny_models: dict[str, Path]) -> None:
    """As of a tokenizer that adds no token of its own, and knows a text's only character as nothing."""
    tokenizer = tokenizer_of(tiny_models, "bert")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    rows = [{"sentence": "a boat", "label": 0}, {"sentence": "\u200b", "label": 1}]
    with pytest.raises(SetupError, match=r"^sst2: train: row 2: this model's tokenizer leaves nothing of its text$"):
        encode(tokenizer, "sst2", rows, text_to_text=False)


def test_label_words_are_never_cut(tiny_models: dict[str, Path]) -> None:
    tokenizer = tokenizer_of(tiny_models, "t5")
    data = encode(tokenizer, "mrpc", glue_rows("mrpc", "train", 2), max_target_tokens=2)

    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in data.candidates] == ANSWERS["mrpc"]


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("task", GLUE_TASKS)
def test_an_encoder_reads_what_its_tokenizer_makes_of_the_texts(
    tiny_models: dict[str, Path], task: str, family: str
) -> None:
    tokenizer, rows = tokenizer_of(tiny_models, family), glue_rows(task, "train", 6)
    data = encode(tokenizer, task, rows, text_to_text=False, max_source_tokens=14)

    columns = [part[1:-1] for part in PROMPTS[task].split() if part.startswith("{")]
    for row, example in zip(rows, data.train, strict=True):
        want = tokenizer(*(row[column] for column in columns), truncation=True, max_length=14)
        assert example.input_ids == want["input_ids"]
        assert list(example.type_ids) == want.get("token_type_ids", [])
        assert example.target_ids == []
        assert example.label == row["label"]
    assert data.candidates == []
    assert any(1 in example.type_ids for example in data.train) == (family == "bert" and len(columns) == 2)
