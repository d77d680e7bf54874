"""A slot's score and density against plain PEFT's, one unpadded row at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deft_ray.spec.schema import TrialSpec
from deft_ray.train.evaluation import Evaluation
from deft_ray.train.slot import Slot
from tests.plain_peft import PlainCounts, answers_of_head, reopened, texts_of
from tests.slots import check_density, check_score, remember_answers, run, word_overlap
from tests.tiny import MRPC, MRPC_LABELS, glue_rows, squad_rows

Trial = Callable[..., TrialSpec]


def evaluated(slot: Slot, folder: Path) -> Evaluation:
    """Train, save the adapter, evaluate."""
    with torch.enable_grad():
        run(slot)
    slot.save_adapter(folder)
    return slot.evaluate(last=True)


LABELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "mrpc": (MRPC, MRPC_LABELS),
    "mnli": ("mnli premise: {premise} hypothesis: {hypothesis}", ("entailment", "neutral", "contradiction")),
    "stsb": ("stsb sentence1: {sentence1} sentence2: {sentence2}", tuple(f"{n / 5:.1f}" for n in range(26))),
}


@pytest.mark.parametrize("task", ["mrpc", "mnli", "stsb"])
@torch.no_grad()
def test_text_to_text_classes_as_plain_peft_finds_them(
    trial: Trial, open_slot: Any, tiny_models: dict[str, Path], tmp_path: Path, task: str
) -> None:
    spec = trial("t5", task, deft__alpha=1.0, train__steps=12, train__batch_size=10)
    found = evaluated(open_slot(spec), tmp_path)
    tokenizer, model, counts = reopened(tiny_models["t5"], tmp_path, None)
    prompt, words = LABELS[task]
    choices, rows = [], glue_rows(task, "validation", 14)
    for row in rows:
        source = tokenizer(prompt.format(**row), return_tensors="pt")
        gold = round(row["label"] * 5) if task == "stsb" else row["label"]
        counts.on = True
        model(**source, labels=tokenizer(words[gold], return_tensors="pt")["input_ids"])
        counts.on = False
        answers = tokenizer(list(words), padding=True, return_tensors="pt")
        labels = answers["input_ids"].masked_fill(answers["attention_mask"] == 0, -100)
        logits = model(**{key: value.expand(len(words), -1) for key, value in source.items()}, labels=labels).logits
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        likelihoods = (-losses.sum(dim=1)).tolist()
        if task == "stsb":
            shares = torch.tensor(likelihoods, dtype=torch.float64).softmax(dim=0)
            choices.append(float((shares * torch.arange(26) / 5).sum()))
        else:
            choices.append(float(max(range(len(words)), key=likelihoods.__getitem__)))
    check_density(found, counts)
    check_score(found, choices, [row["label"] for row in rows], 1e-4 if task == "stsb" else None)


@pytest.mark.parametrize(("task", "padding"), [("mrpc", "longest"), ("stsb", "longest"), ("mrpc", "max_length")])
def test_density_paper_counts_the_padding_of_true_answers_alone(
    trial: Trial, open_slot: Any, task: str, padding: str
) -> None:
    """Other answers that a row is scored against are nobody's padding."""
    spec = trial(
        "t5", task, train__steps=1, train__eval_batch_size=1, data__padding=padding, data__max_source_tokens=40
    )
    slot = open_slot(spec)
    found = slot.evaluate().row()

    plain = PlainCounts(slot.model)
    slot.model.eval()
    fixed = padding == "max_length"
    width = spec.data.max_target_tokens if fixed else max(map(len, slot.data.candidates))
    for example in slot.data.validation:
        length = spec.data.max_source_tokens if fixed else len(example.input_ids)
        ids = torch.tensor([example.input_ids + [0] * (length - len(example.input_ids))])
        mask = (torch.arange(length) < len(example.input_ids)).long().unsqueeze(0)
        labels = torch.tensor([example.target_ids + [-100] * (width - len(example.target_ids))])
        with torch.no_grad():
            slot.model(input_ids=ids, attention_mask=mask, labels=labels)
    want = sum(plain.nonzero.values()) / sum(plain.total.values())

    assert found["density_paper"] == pytest.approx(want, abs=5e-5)
    assert task == "stsb" or found["density_paper"] != found["density"], "STS-B's answers are of one length"


@torch.no_grad()
def test_the_decoder_reads_a_source_once(trial: Trial, open_slot: Any) -> None:
    """However many passes over it: the answer that is given, the one that is written, and how sure each window was."""
    slot = open_slot(trial("t5", "squad", data__max_source_tokens=24, data__max_target_tokens=6))
    assert any(example.windows > 1 for example in slot.data.validation)
    passes = Counter[str]()
    for name, module in slot.model.named_modules():
        if name.endswith(("EncDecAttention.k", "EncDecAttention.v", "encoder.block.0")):
            module.register_forward_hook(lambda *_, name=name: passes.update([name]))
    slot.evaluate()
    assert len(passes) > 2
    assert len(set(passes.values())) == 1, passes


@torch.no_grad()
def test_generated_answers_as_plain_peft_generates_them(
    trial: Trial, open_slot: Any, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = remember_answers(monkeypatch)
    spec = trial(
        "t5", "squad", train__steps=25, train__batch_size=10, train__learning_rate=0.02, data__max_target_tokens=6
    )
    found = evaluated(open_slot(spec), tmp_path)
    tokenizer, model, counts = reopened(tiny_models["t5"], tmp_path, None)
    writing = PlainCounts(model)
    writing.on = False
    rows, texts, points = squad_rows("validation", 14), [], []
    for row in rows:
        source = tokenizer(f"question: {row['question']} context: {row['context']}", return_tensors="pt")
        counts.on = True
        model(**source, labels=tokenizer(row["answers"]["text"][0], return_tensors="pt")["input_ids"])
        counts.on = False
        writing.on = True
        tokens = model.generate(**source, max_new_tokens=6, do_sample=False, num_beams=1)
        writing.on = False
        texts.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
        points.append(max(word_overlap(texts[-1], gold) for gold in row["answers"]["text"]))
    check_density(found, counts)
    nonzero, total = found.generated.tolist()
    assert total == writing.total["decoder"]
    assert nonzero / total == pytest.approx(writing.nonzero["decoder"] / total, abs=5e-5)
    assert found.row()["density_decoder_generated"] == nonzero / total
    assert said == 2 * texts, "scored together, then each by itself"
    assert len(set(texts)) > 1 or sum(points) > 0, "an untrained model's one answer would prove nothing"
    assert found.scores[next(iter(found.scores))] == pytest.approx(sum(points) / 14, abs=1e-6)
    assert found.scores["exact_match"] == pytest.approx(sum(point == 1.0 for point in points) / 14, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "task", "columns"),
    [
        ("bert", "qnli", ("question", "sentence")),
        ("roberta", "mnli", ("premise", "hypothesis")),
        ("bert", "stsb", ("sentence1", "sentence2")),
    ],
)
@torch.no_grad()
def test_encoder_heads_as_plain_peft_reads_them(
    trial: Trial,
    open_slot: Any,
    tiny_models: dict[str, Path],
    tmp_path: Path,
    name: str,
    task: str,
    columns: tuple[str, str],
) -> None:
    spec = trial(name, task, deft__alpha=1.0, train__steps=10, train__batch_size=10)
    found = evaluated(open_slot(spec), tmp_path)
    outputs = {"qnli": 2, "mnli": 3, "stsb": 1}[task]
    tokenizer, model, counts = reopened(tiny_models[name], tmp_path, outputs)
    rows = glue_rows(task, "validation", 14)
    said = answers_of_head(model, texts_of(tokenizer, rows, columns))
    check_density(found, counts)
    check_score(found, said, [row["label"] for row in rows], 1e-4 if outputs == 1 else None)
    assert found.counts.density("decoder") is None


@pytest.mark.parametrize("task", ["rte", "stsb"])
def test_infinite_outputs_are_not_scored(trial: Trial, open_slot: Any, task: str) -> None:
    slot = open_slot(trial("bert", task))
    head = slot.base.model.get_submodule("classifier")
    head.register_forward_hook(lambda _m, _i, out: torch.full_like(out, math.inf))
    with pytest.raises(FloatingPointError, match=r"^the model's outputs are not finite in the evaluation$"):
        slot.evaluate()


@pytest.mark.parametrize(("name", "task"), [("t5", "mrpc"), ("t5", "squad"), ("bert", "rte"), ("bert", "stsb")])
def test_outputs_that_are_no_numbers_are_not_scored(trial: Trial, open_slot: Any, name: str, task: str) -> None:
    slot = open_slot(trial(name, task))
    next(p for p in slot.model.parameters() if p.requires_grad).data.fill_(math.nan)
    next(p for key, p in slot.model.named_parameters() if "lora_B" in key).data.fill_(1.0)

    with pytest.raises(FloatingPointError, match=r"^the model's outputs are not finite in the evaluation$"):
        slot.evaluate()
