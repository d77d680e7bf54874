"""A slot with each kind of adapter: one model in training and evaluation, virtual tokens counted nowhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deft_ray.models.adapters import Bottleneck, Lora, Prefix, Prompt
from deft_ray.spec.schema import AdapterSection, TrialSpec
from deft_ray.train.ranks import Ranks
from deft_ray.train.slot import Slot, adapter_of
from tests.plain_peft import answers_of_head, reopened, texts_of
from tests.slots import (
    EPSILON,
    check_density,
    check_resumed,
    check_score,
    counted_passes,
    first_examples,
    gradient_of,
    left_in_memory,
    remember_answers,
    run,
    seen_activations,
    shaken,
    soft_density,
    taken_gradient,
    weights,
    worst,
)
from tests.tiny import MRPC, MRPC_LABELS, glue_rows, squad_rows

Trial = Callable[..., TrialSpec]

KINDS = ("bottleneck", "prefix", "prompt")
P = 5


@pytest.fixture
def open_slot(open_slot: Callable[[TrialSpec], Slot], trial: Trial) -> Callable[..., Slot]:
    """Opens the slot of a model with an adapter."""

    def make(name: str, kind: str, task: str = "mrpc", **leaves: Any) -> Slot:
        settings = {"adapter__kind": kind, "adapter__virtual_tokens": P, "train__learning_rate": 0.1, **leaves}
        return open_slot(trial(name, task, **settings))

    return make


@pytest.mark.parametrize(
    ("section", "adapter"),
    [
        (AdapterSection(r=2, lora_alpha=3.0, lora_dropout=0.1, target_modules=["q"]), Lora(2, 3.0, 0.1, ["q"])),
        (AdapterSection(kind="bottleneck"), Bottleneck(16)),
        (AdapterSection(kind="prefix"), Prefix(60)),
        (AdapterSection(kind="prompt", virtual_tokens=7), Prompt(7)),
    ],
)
def test_a_section_asks_for_one_adapter(section: AdapterSection, adapter: Any) -> None:
    assert adapter_of(section) == adapter


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "task"), [("t5", "mrpc"), ("bert", "rte"), ("roberta", "stsb")])
def test_training_lowers_the_loss(open_slot: Any, kind: str, name: str, task: str) -> None:
    steps = 12
    rate = {"bottleneck": 0.01, "prefix": 0.1, "prompt": 0.3}[kind]
    slot = open_slot(name, kind, task, train__steps=steps, train__learning_rate=rate, train__batch_size=10)
    before = weights(slot.model)
    losses = run(slot)
    after = weights(slot.model)

    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-4:]) < sum(losses[:4])
    assert all(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("name", "task"),
    [("t5", "mrpc"), ("bert", "rte"), ("roberta", "stsb"), ("opt", "sst2"), ("gpt2", "mrpc"), ("vit", "cifar10")],
)
def test_no_training_moves_the_first_density_behind_a_bottleneck(open_slot: Any, name: str, task: str) -> None:
    """The first block counts the same before and after a training with the loss and without; later ones move."""
    found = []
    for steps, alpha in ((1, 0.0), (6, 0.0), (6, 20.0)):
        leaves = {"train__steps": steps, "train__learning_rate": 0.02, "deft__epsilon": EPSILON}
        slot = open_slot(name, "bottleneck", task, deft__alpha=alpha, **leaves)
        run(slot, 0 if steps == 1 else None)
        found.append(slot.evaluate().counts)
    first = [counts.rows[0].tolist() for counts in found]
    assert first[0] == first[1] == first[2]
    assert first[0][1] > 0
    assert found[1].rows[1].tolist() != found[2].rows[1].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro", [None, 2])
def test_the_density_loss_is_that_of_real_tokens(open_slot: Any, kind: str, micro: int | None) -> None:
    """Against a loss built from collected activations, cut to each row's real tokens."""
    slot = shaken(
        open_slot(
            "dry-t5",
            kind,
            "squad",
            deft__alpha=2.0,
            deft__epsilon=EPSILON,
            train__max_grad_norm=0.0,
            train__micro_batch_size=micro,
        ),
        std=0.1,
    )
    examples = first_examples(slot)
    with seen_activations(slot) as acts:
        loss = slot.model(**slot._collate(examples).inputs).loss
    before = P if kind == "prompt" else 0
    for side in ("encoder", "decoder"):
        mine = []
        for act in (act for name, (act,) in acts.items() if name.startswith(side)):
            first = before if side == "encoder" else 0
            lengths = [len(e.input_ids if side == "encoder" else e.target_ids) for e in examples]
            real = torch.cat([row[first : first + length] for row, length in zip(act, lengths, strict=True)])
            mine.append(soft_density(real))
        loss = loss + 2.0 * torch.stack(mine).mean()
    want = gradient_of(slot, loss)
    slot.step()

    assert worst(taken_gradient(slot), want) < 3e-5


@pytest.mark.parametrize("kind", ["bottleneck", "prompt"])
@pytest.mark.parametrize(("name", "task"), [("t5", "mrpc"), ("bert", "rte")])
def test_gradient_checkpointing_changes_nothing(open_slot: Any, kind: str, name: str, task: str) -> None:
    """But that every block runs twice."""
    gradients = []
    for on in (False, True):
        leaves = {"deft__alpha": 2.0, "deft__epsilon": EPSILON, "train__max_grad_norm": 0.0}
        slot = open_slot(name, kind, task, train__gradient_checkpointing=on, **leaves)
        with counted_passes(slot) as passes:
            slot.step()
        gradients.append(taken_gradient(slot))
        assert set(passes.values()) == {(1 + on) * slot.accumulation}
    assert worst(gradients[1], gradients[0]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "task"), [("t5", "squad"), ("bert", "rte")])
def test_a_resumed_trial_is_the_uninterrupted_one(
    open_slot: Any, tmp_path: Path, kind: str, name: str, task: str
) -> None:
    leaves = {"deft__alpha": 1.0, "data__max_target_tokens": 4, "train__steps": 4, "train__zero_stage": 1}
    check_resumed(lambda: open_slot(name, kind, task, **leaves), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["t5", "bert"])
def test_a_closed_slot_is_collected(trial: Trial, base_of: Any, ranks: Ranks, kind: str, name: str) -> None:
    task = "squad" if name == "t5" else "mrpc"
    spec = trial(name, task, adapter__kind=kind, deft__alpha=1.0)
    assert left_in_memory(spec, base_of(spec), ranks, evaluate=True) == []


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_text_to_text_classes_as_plain_peft_finds_them(
    open_slot: Any, tiny_models: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    slot = open_slot("t5", kind, train__steps=12, train__batch_size=10)
    with torch.enable_grad():
        run(slot)
    slot.save_adapter(tmp_path)
    found = slot.evaluate(last=True)
    tokenizer, model, counts = reopened(tiny_models["t5"], tmp_path, None, P if kind == "prompt" else 0)
    choices, rows = [], glue_rows("mrpc", "validation", 14)
    for row in rows:
        source = tokenizer(MRPC.format(**row), return_tensors="pt")
        counts.on = True
        model(**source, labels=tokenizer(MRPC_LABELS[row["label"]], return_tensors="pt")["input_ids"])
        counts.on = False
        scores = []
        for word in MRPC_LABELS:
            labels = tokenizer(word, return_tensors="pt")["input_ids"]
            scores.append(-float(model(**source, labels=labels).loss) * labels.shape[1])
        choices.append(scores.index(max(scores)))
    check_density(found, counts)
    check_score(found, choices, [row["label"] for row in rows], None)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generated_answers_as_plain_peft_generates_them(
    open_slot: Any, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    said = remember_answers(monkeypatch)
    slot = open_slot("t5", kind, "squad", train__steps=12, train__batch_size=10, data__max_target_tokens=6)
    with torch.enable_grad():
        run(slot)
    slot.save_adapter(tmp_path)
    found = slot.evaluate(last=True)
    tokenizer, model, counts = reopened(tiny_models["t5"], tmp_path, None, P if kind == "prompt" else 0)
    texts = []
    for row in squad_rows("validation", 14):
        source = tokenizer(f"question: {row['question']} context: {row['context']}", return_tensors="pt")
        counts.on = True
        model(**source, labels=tokenizer(row["answers"]["text"][0], return_tensors="pt")["input_ids"])
        counts.on = False
        tokens = model.generate(**source, max_new_tokens=6, do_sample=False, num_beams=1)
        texts.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
    check_density(found, counts)
    assert said == 2 * texts, "scored together, then each by itself"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "task", "columns"),
    [("bert", "qnli", ("question", "sentence")), ("roberta", "stsb", ("sentence1", "sentence2"))],
)
@torch.no_grad()
def test_encoder_heads_as_plain_peft_reads_them(
    open_slot: Any, tiny_models: dict[str, Path], tmp_path: Path, kind: str, name: str, task: str, columns: Any
) -> None:
    outputs = {"qnli": 2, "stsb": 1}[task]
    slot = open_slot(name, kind, task, train__steps=10, train__batch_size=10, train__learning_rate=0.02)
    with torch.enable_grad():
        run(slot)
    slot.save_adapter(tmp_path)
    found = slot.evaluate(last=True)
    tokenizer, model, counts = reopened(tiny_models[name], tmp_path, outputs, P if kind == "prompt" else 0)
    rows = glue_rows(task, "validation", 14)
    said = answers_of_head(model, texts_of(tokenizer, rows, columns))
    check_density(found, counts)
    check_score(found, said, [row["label"] for row in rows], 1e-4 if outputs == 1 else None)


@torch.no_grad()
def test_the_papers_density_counts_virtual_tokens(open_slot: Any, tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """Every source padded to the same length, as the authors do: then one pass over all rows sees what they count."""
    slot = open_slot("bert", "prompt", "rte", data__padding="max_length", data__max_source_tokens=40)
    found = slot.evaluate()
    width = int(found.counts.rows[0][3]) // 128 // 14
    nonzero = sum(int(row[2]) for row in found.counts.rows)

    assert width == 40 + P
    assert found.counts.density_paper() == nonzero / (2 * 14 * (40 + P) * 128)
    slot.save_adapter(tmp_path)
    tokenizer, model, counts = reopened(tiny_models["bert"], tmp_path, 2, P)
    for row in glue_rows("rte", "validation", 14):
        model(**tokenizer(row["sentence1"], row["sentence2"], return_tensors="pt", padding="max_length", max_length=40))
    assert found.counts.density_paper() == pytest.approx(counts.every[0] / counts.every[1], abs=5e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "task"), [("t5", "mrpc"), ("t5", "squad"), ("bert", "rte")])
def test_outputs_that_are_no_numbers_are_not_scored(open_slot: Any, kind: str, name: str, task: str) -> None:
    slot = open_slot(name, kind, task)
    for parameter in weights(slot.model):
        dict(slot.model.named_parameters())[parameter].data.fill_(math.nan)

    with pytest.raises(FloatingPointError, match=r"^the model's outputs are not finite in the evaluation$"):
        slot.evaluate()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_virtual_tokens_that_leave_no_room_are_named(open_slot: Any, base_of: Any, padding: str) -> None:
    """The longest source counts where sources are padded to the longest, else the length they are padded to."""
    with pytest.raises(ValueError, match=r"^adapter\.virtual_tokens: 500 virtual tokens and sources of up to ") as told:
        open_slot("bert", "prompt", "rte", data__padding=padding, adapter__virtual_tokens=500)
    slot = open_slot("bert", "prompt", "rte", data__padding="longest")
    longest = max(len(example.input_ids) for example in (*slot.data.train, *slot.data.validation))
    source = 128 if padding == "max_length" else longest

    assert f" up to {source} tokens take {500 + source} positions, the model has 512; " in str(told.value)
    assert all(not site.module._forward_hooks for site in slot.base.sites)
