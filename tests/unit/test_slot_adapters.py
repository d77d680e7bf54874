"""A slot with each kind of adapter: one model in training and evaluation, virtual tokens counted nowhere."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from deft_ray.models.adapters import Bottleneck, Lora, Prefix, Prompt
from deft_ray.models.base import Base, load_base
from deft_ray.spec.schema import AdapterSection
from deft_ray.train.host import load_task
from deft_ray.train.ranks import Ranks
from deft_ray.train.slot import Slot, adapter_of
from tests.tiny import glue_rows, squad_rows, tiny_trial

KINDS = ("bottleneck", "prefix", "prompt")
P = 5
EPSILON = 1e-3


@pytest.fixture(scope="module")
def bases(tiny_models: dict[str, Path]) -> dict[str, Base]:
    return {
        name: load_base(str(tiny_models[name]), name.split("-")[-1]) for name in ("t5", "dry-t5", "bert", "roberta")
    }


@pytest.fixture
def open_slot(
    bases: dict[str, Base], ranks: Ranks, tiny_models: dict[str, Path], tiny_data: Path
) -> Iterator[Callable[..., Slot]]:
    opened: list[Slot] = []

    def make(name: str, kind: str, task: str = "mrpc", **leaves: Any) -> Slot:
        if opened:
            opened.pop().close()
        settings = {"adapter__kind": kind, "adapter__virtual_tokens": P, "train__learning_rate": 0.1, **leaves}
        spec = tiny_trial(tiny_models[name], name.split("-")[-1], tiny_data, task, **settings)
        opened.append(Slot(spec, bases[name], load_task(spec.task, spec.data, bases[name]), ranks))
        return opened[0]

    yield make
    while opened:
        opened.pop().close()


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def run(slot: Slot, steps: int | None = None) -> list[float]:
    return [slot.step().task_loss for _ in range(slot.steps if steps is None else steps)]


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


def shaken(slot: Slot) -> Slot:
    """Move what starts at zero, so that every weight has a gradient."""
    dice = torch.Generator().manual_seed(0)
    for name, parameter in slot.model.named_parameters():
        if "bottleneck_up" in name:
            parameter.data.normal_(std=0.1, generator=dice)
    return slot


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
        )
    )
    dice = torch.Generator().manual_seed(slot.trial.seed * 1_000_003)
    order = torch.randperm(len(slot.data.train), generator=dice).tolist()
    examples = [slot.data.train[index] for index in order[: slot.trial.train.batch_size]]
    acts: dict[str, Tensor] = {}
    hooks = [
        s.module.register_forward_hook(lambda _m, _i, out, n=s.name: acts.update({n: out})) for s in slot.base.sites
    ]
    loss = slot.model(**slot._collate(examples).inputs).loss
    for hook in hooks:
        hook.remove()
    before = P if kind == "prompt" else 0
    for side in ("encoder", "decoder"):
        mine = []
        for act in (act for name, act in acts.items() if name.startswith(side)):
            first = before if side == "encoder" else 0
            lengths = [len(e.input_ids if side == "encoder" else e.target_ids) for e in examples]
            real = torch.cat([row[first : first + length] for row, length in zip(act, lengths, strict=True)])
            mine.append((real**2 / (real**2 + EPSILON)).mean())
        loss = loss + 2.0 * torch.stack(mine).mean()
    named = [(name, p) for name, p in slot.model.named_parameters() if p.requires_grad]
    want = torch.autograd.grad(loss, [p for _, p in named])
    slot.step()

    scale = max(float(grad.abs().max()) for grad in want)
    for (name, parameter), grad in zip(named, want, strict=True):
        got = slot.engine.optimizer.state[parameter]["exp_avg"] / 0.1
        assert float((got - grad).abs().max()) / scale < 3e-5, name


@pytest.mark.parametrize("kind", ["bottleneck", "prompt"])
@pytest.mark.parametrize(("name", "task"), [("t5", "mrpc"), ("bert", "rte")])
def test_gradient_checkpointing_changes_nothing(open_slot: Any, kind: str, name: str, task: str) -> None:
    adapters = []
    for checkpointing in (False, True):
        slot = open_slot(
            name, kind, task, deft__alpha=2.0, deft__epsilon=EPSILON, train__gradient_checkpointing=checkpointing
        )
        run(slot)
        adapters.append(weights(slot.model))

    assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "task"), [("t5", "squad"), ("bert", "rte")])
def test_a_resumed_trial_is_the_uninterrupted_one(
    open_slot: Any, tmp_path: Path, kind: str, name: str, task: str
) -> None:
    leaves = {"deft__alpha": 1.0, "data__max_target_tokens": 4, "train__steps": 4, "train__zero_stage": 1}
    whole = open_slot(name, kind, task, **leaves)
    losses = run(whole)
    want, found = weights(whole.model), whole.evaluate()

    first = open_slot(name, kind, task, **leaves)
    early = run(first, 2)
    first.save(tmp_path)
    second = open_slot(name, kind, task, **leaves)
    second.load(tmp_path)

    assert early + run(second, 2) == losses
    got = weights(second.model)
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert second.evaluate().row() == found.row()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["t5", "bert"])
def test_a_closed_slot_is_collected(
    bases: dict[str, Base], ranks: Ranks, tiny_models: dict[str, Path], tiny_data: Path, kind: str, name: str
) -> None:
    task = "squad" if name == "t5" else "mrpc"
    spec = tiny_trial(tiny_models[name], name, tiny_data, task, adapter__kind=kind, deft__alpha=1.0)
    slot = Slot(spec, bases[name], load_task(spec.task, spec.data, bases[name]), ranks)
    slot.step()
    slot.evaluate()
    adapter = [p for p in slot.model.parameters() if p.requires_grad]
    watched = [weakref.ref(thing) for thing in (slot, slot.engine, slot.model, *adapter)]
    slot.close()
    del slot, adapter
    gc.collect()

    assert [type(ref()).__name__ for ref in watched if ref() is not None] == []


# --- evaluation -------------------------------------------------------------------------------------------------------


class Counts:
    """Non-zeros and totals of one unpadded row at a time, virtual tokens left out and counted."""

    def __init__(self, model: torch.nn.Module, virtual: int) -> None:
        self.real, self.every, self.on = [0, 0], [0, 0], True
        for name, module in model.named_modules():
            if name.endswith(("DenseReluDense.act", "intermediate_act_fn")):
                cut = 0 if ".decoder.block." in name else virtual
                module.register_forward_hook(lambda _m, _i, act, cut=cut: self.add(act, cut))

    def add(self, act: Tensor, cut: int) -> None:
        if self.on:
            for pair, part in ((self.real, act[:, cut:]), (self.every, act)):
                pair[0] += int((part != 0).sum())
                pair[1] += part.numel()


def reopened(folder: Path, adapter: Path, outputs: int | None, virtual: int) -> tuple[Any, Any, Counts]:
    if outputs is None:
        base = AutoModelForSeq2SeqLM.from_pretrained(folder)
    else:
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=outputs)
    model = PeftModel.from_pretrained(base, adapter).eval()
    return AutoTokenizer.from_pretrained(folder), model, Counts(model, virtual)


def check_density(found: Any, counts: Counts) -> None:
    """One flipped zero at the edge of the GELU, as a padded batch rounds another way, is about 1e-5 here."""
    assert found.counts.density() == pytest.approx(counts.real[0] / counts.real[1], abs=5e-5)
    assert 0.3 < found.counts.density() < 0.999, "a density of one would prove nothing"
    assert sum(int(row[1]) for row in found.counts.rows) == counts.real[1]


MRPC = "mrpc sentence1: {sentence1} sentence2: {sentence2}"
WORDS = ("not_equivalent", "equivalent")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_text_to_text_classes_as_plain_peft_finds_them(
    open_slot: Any, tiny_models: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    slot = open_slot("t5", kind, train__steps=12, train__batch_size=10)
    with torch.enable_grad():
        run(slot)
    slot.save_adapter(tmp_path)
    found = slot.evaluate()
    tokenizer, model, counts = reopened(tiny_models["t5"], tmp_path, None, P if kind == "prompt" else 0)
    choices, rows = [], glue_rows("mrpc", "validation", 14)
    for row in rows:
        source = tokenizer(MRPC.format(**row), return_tensors="pt")
        counts.on = True
        model(**source, labels=tokenizer(WORDS[row["label"]], return_tensors="pt")["input_ids"])
        counts.on = False
        scores = []
        for word in WORDS:
            labels = tokenizer(word, return_tensors="pt")["input_ids"]
            scores.append(-float(model(**source, labels=labels).loss) * labels.shape[1])
        choices.append(scores.index(max(scores)))
    check_density(found, counts)
    assert found.scores["accuracy"] == sum(c == row["label"] for c, row in zip(choices, rows, strict=True)) / 14


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generated_answers_as_plain_peft_generates_them(
    open_slot: Any, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from deft_ray.tasks.scoring import score_answers

    said: list[str] = []

    def remember(predictions: list[str], answers: Any) -> dict[str, float]:
        said.extend(predictions)
        return score_answers(predictions, answers)

    monkeypatch.setattr("deft_ray.train.evaluation.score_answers", remember)
    slot = open_slot("t5", kind, "squad", train__steps=12, train__batch_size=10, data__max_target_tokens=6)
    with torch.enable_grad():
        run(slot)
    slot.save_adapter(tmp_path)
    found = slot.evaluate()
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
    assert said == texts


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
    found = slot.evaluate()
    tokenizer, model, counts = reopened(tiny_models[name], tmp_path, outputs, P if kind == "prompt" else 0)
    rows, said = glue_rows(task, "validation", 14), []
    for row in rows:
        logits = model(**tokenizer(*(row[column] for column in columns), return_tensors="pt")).logits[0]
        said.append(float(logits[0]) if outputs == 1 else float(logits.argmax()))
    check_density(found, counts)
    labels = [row["label"] for row in rows]
    score = next(iter(found.scores.values()))
    if outputs == 1:
        assert score == pytest.approx(float(torch.corrcoef(torch.tensor([said, labels]))[0, 1]), abs=2e-3)
    else:
        assert score == sum(s == label for s, label in zip(said, labels, strict=True)) / 14


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
def test_virtual_tokens_that_leave_no_room_are_named(open_slot: Any, bases: dict[str, Base], padding: str) -> None:
    """The longest source counts where sources are padded to the longest, else the length they are padded to."""
    with pytest.raises(ValueError, match=r"^adapter\.virtual_tokens: 500 virtual tokens and sources of up to ") as told:
        open_slot("bert", "prompt", "rte", data__padding=padding, adapter__virtual_tokens=500)
    slot = open_slot("bert", "prompt", "rte", data__padding="longest")
    longest = max(len(example.input_ids) for example in (*slot.data.train, *slot.data.validation))
    source = 128 if padding == "max_length" else longest

    assert f" up to {source} tokens take {500 + source} positions, the model has 512; " in str(told.value)
    assert all(not site.module._forward_hooks for site in bases["roberta"].sites)
