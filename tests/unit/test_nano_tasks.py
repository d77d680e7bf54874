"""The generated tasks are reproducible, balanced, disjoint and hard for a bag of words; the model reads them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from deft_ray.nano import MODEL_DIR
from deft_ray.nano.tasks import LABELS, SPLITS, generate, split_of, texts_of

COLUMNS = {
    "nano-sentiment": {"sentence", "label"},
    "nano-entailment": {"premise", "hypothesis", "label"},
    "nano-question": {"id", "question", "context", "answers"},
}

# Chance is 0.50 and 0.33. Measured on 2,000 training rows: 0.53, 0.36 and 0.19; a LoRA on sentiment reaches 0.99.
BAG_OF_WORDS_CEILING = {"nano-sentiment": 0.65, "nano-entailment": 0.50, "nano-question": 0.35}

FIRST_SENTIMENTS = [
    {"sentence": "the design was dreadful, but the plot was never bland.", "label": 1},
    {"sentence": "the price was not fantastic, although the design was not bad.", "label": 0},
]
FIRST_ENTAILMENTS = [
    {"premise": "all birds in the yard are loud.", "hypothesis": "all bears in the yard are loud.", "label": 1}
]
FIRST_QUESTIONS = [
    {
        "id": "train-0-0",
        "question": "who hired the nurse?",
        "context": "xenia is a clerk in tokyo. the driver hired the nurse. the carpenter hired the tailor.",
        "answers": {"text": ["the driver"], "answer_start": [27]},
    }
]


@pytest.mark.parametrize("task", LABELS)
@pytest.mark.parametrize("split", SPLITS)
def test_rows_have_the_columns_of_their_task(task: str, split: str) -> None:
    rows = generate(task, split, 30)

    assert len(rows) == 30
    assert all(set(row) == COLUMNS[task] for row in rows)
    assert all(split_of(text) == split for row in rows for text in texts_of(row))


@pytest.mark.parametrize("task", LABELS)
def test_rows_depend_on_the_arguments_alone(task: str) -> None:
    assert generate(task, "train", 40, seed=3) == generate(task, "train", 40, seed=3)
    assert generate(task, "train", 40, seed=3) != generate(task, "train", 40, seed=4)
    assert generate(task, "train", 10, seed=3) == generate(task, "train", 40, seed=3)[:10]
    assert generate(task, "train", 0) == []


def test_first_rows_are_the_same_on_every_python() -> None:
    assert generate("nano-sentiment", "train", 2) == FIRST_SENTIMENTS
    assert generate("nano-entailment", "validation", 1) == FIRST_ENTAILMENTS
    assert generate("nano-question", "train", 1) == FIRST_QUESTIONS


@pytest.mark.parametrize("task", LABELS)
def test_no_text_is_in_two_splits_or_twice_in_one(task: str) -> None:
    rows = {split: generate(task, split, 300) for split in SPLITS}
    texts = {split: {text for row in rows[split] for text in texts_of(row)} for split in SPLITS}

    assert not texts["train"] & texts["validation"]
    assert not texts["pretrain"] & (texts["train"] | texts["validation"])
    assert all(len({texts_of(row) for row in rows[split]}) == 300 for split in SPLITS)


@pytest.mark.parametrize("task", ["nano-sentiment", "nano-entailment"])
def test_labels_are_balanced(task: str) -> None:
    classes = len(LABELS[task])
    labels = [row["label"] for row in generate(task, "train", 100 * classes)]

    assert [labels.count(label) for label in range(classes)] == [100] * classes
    assert all(sorted(labels[at : at + classes]) == list(range(classes)) for at in range(0, len(labels), classes))


def test_each_answer_is_a_span_of_its_context_and_stands_there_once() -> None:
    for row in generate("nano-question", "train", 300):
        (text,), (start,) = row["answers"]["text"], row["answers"]["answer_start"]
        words = row["context"].replace(".", "").split()

        assert row["context"][start : start + len(text)] == text
        assert not row["context"][start - 1 : start].isalnum()
        assert not row["context"][start + len(text)].isalnum()
        assert words.count(text.split()[-1]) == 1


def test_texts_are_short() -> None:
    for task, longest in (("nano-sentiment", 40), ("nano-entailment", 40), ("nano-question", 64)):
        assert max(len(" ".join(texts_of(row)).split()) for row in generate(task, "train", 300)) <= longest


def test_unknown_names_are_refused_with_the_allowed_ones() -> None:
    with pytest.raises(
        ValueError, match="unknown task 'sst2'; allowed: nano-sentiment, nano-entailment, nano-question"
    ):
        generate("sst2", "train", 1)
    with pytest.raises(ValueError, match="unknown split 'test'; allowed: pretrain, train, validation"):
        generate("nano-sentiment", "test", 1)
    with pytest.raises(ValueError, match=r"count: must be 0 or more \(got -1\)"):
        generate("nano-sentiment", "train", -1)


def test_running_out_of_texts_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        generate.__globals__["_WRITERS"], "nano-sentiment", lambda dice, label: {"sentence": "so.", "label": 0}
    )
    monkeypatch.setitem(generate.__globals__, "_TRIES_PER_ROW", 5)

    with pytest.raises(ValueError, match=r"nano-sentiment has no new text left for split '.*' after 1 rows"):
        generate("nano-sentiment", split_of("so."), 2)


def test_generator_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'transformers', 'tokenizers'}"
    code = f"import sys, deft_ray.nano.tasks; print(sorted({heavy} & set(sys.modules)))"

    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize("task", LABELS)
def test_a_bag_of_words_does_badly(task: str) -> None:
    from deft_ray.nano.scoring import bag_of_words_score

    score = bag_of_words_score(task, generate(task, "train", 1000), generate(task, "validation", 300), steps=100)

    assert score <= BAG_OF_WORDS_CEILING[task]


def test_shipped_weights_are_small() -> None:
    assert sum(file.stat().st_size for file in MODEL_DIR.glob("*.safetensors")) <= 8 * 2**20


@pytest.mark.parametrize("task", LABELS)
def test_shipped_tokenizer_knows_every_generated_word(task: str) -> None:
    from transformers import AutoTokenizer

    from deft_ray.nano.scoring import prompt_of, target_of

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    rows = generate(task, "validation", 200)
    prompts = [prompt_of(task, row) for row in rows]
    encoded = tokenizer(prompts).input_ids
    targets = [target_of(task, row) for row in rows]

    assert all(tokenizer.unk_token_id not in ids and ids[-1] == tokenizer.eos_token_id for ids in encoded)
    assert tokenizer.batch_decode(encoded, skip_special_tokens=True) == prompts
    assert tokenizer.batch_decode(tokenizer(targets).input_ids, skip_special_tokens=True) == targets
    assert max(map(len, encoded)) <= 80


def test_shipped_tokenizer_gives_each_label_one_token_and_survives_foreign_text() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    labels = [label for words in LABELS.values() for label in words]
    firsts = [tokenizer(label).input_ids for label in labels]

    assert [len(ids) for ids in firsts] == [2] * len(labels)
    assert len({ids[0] for ids in firsts}) == len(labels)
    assert tokenizer.is_fast
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "</s>")
    assert tokenizer.unk_token_id in tokenizer("雪 ☃").input_ids
    assert tokenizer.unk_token_id not in tokenizer("Zebras, it's 1999: (50%) off!").input_ids


def test_shipped_model_loads_and_its_linear_layers_suit_nf4() -> None:
    import torch
    from transformers import T5ForConditionalGeneration

    model = T5ForConditionalGeneration.from_pretrained(MODEL_DIR, dtype=torch.float32)
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]

    assert model.config.feed_forward_proj == "gated-gelu"
    assert all(size % 64 == 0 for layer in linears for size in layer.weight.shape if layer.in_features != 32)
    assert 1_500_000 <= sum(weight.numel() for weight in model.parameters()) <= 4_000_000
