"""A slot against plain PEFT, against a loss that is built by hand, and against itself cut in pieces."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PrefixTuningConfig, PromptTuningConfig
from torch import Tensor

from deft_ray.models.base import load_base
from deft_ray.models.bottleneck import BottleneckConfig
from deft_ray.spec.schema import TrialSpec
from deft_ray.train.batches import BatchOrder, training_batch
from deft_ray.train.ranks import Ranks
from deft_ray.train.slot import Slot, planned_steps, split_batch
from tests.plain_peft import train_plain
from tests.slots import (
    EPSILON,
    check_resumed,
    first_examples,
    gradient_of,
    left_in_memory,
    new_slot,
    run,
    same,
    seen_activations,
    shaken,
    soft_density,
    taken_gradient,
    trained,
    weights,
    worst,
)
from tests.tiny import MRPC, MRPC_LABELS, glue_rows, make_image, tiny_trial

Trial = Callable[..., TrialSpec]


# --- against plain PEFT -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05, 1000.0])
def test_without_density_loss_a_trial_is_plain_peft_bit_for_bit(
    trial: Trial, open_slot: Any, base_of: Any, tiny_models: dict[str, Path], max_grad_norm: float, micro: int | None
) -> None:
    """Also where the norm clips, or is watched but not reached; in parts of a batch sums are rounded otherwise.

    AdamW makes whole steps of any rounding, so those are compared in float64.
    """
    dry = "" if micro is None else "dry-"
    spec = trial(
        f"{dry}t5",
        seed=3,
        adapter__lora_dropout=0.0 if dry else 0.1,
        train__steps=7,
        train__weight_decay=0.01,
        train__warmup_share=0.0,
        train__max_grad_norm=max_grad_norm,
        train__micro_batch_size=micro,
    )
    body = base_of(spec).model
    body.to(torch.float64 if dry else torch.float32)
    slot = open_slot(spec)
    losses = run(slot)
    rows = glue_rows("mrpc", "train", 30)
    sources, answers = [MRPC.format(**row) for row in rows], [MRPC_LABELS[row["label"]] for row in rows]
    want_losses, want = train_plain(tiny_models[f"{dry}t5"], sources, answers, spec, double=bool(dry))

    got = weights(slot.model)
    if micro is None:
        assert losses == want_losses
        assert same(got, want)
    else:
        body.float()
        assert losses == pytest.approx(want_losses, rel=1e-10)
        assert worst(got, want) < 1e-9


#: By kind; PEFT's own guess of a prefix's depth has layers share their keys, so it is told another.
PLAIN_ADAPTERS = {
    "lora": None,
    "bottleneck": BottleneckConfig(target_modules=r".*DenseReluDense\.wo", task_type="SEQ_2_SEQ_LM"),
    "prefix": PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5, token_dim=64, num_layers=3),
    "prompt": PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5, num_transformer_submodules=1),
}


@pytest.mark.parametrize(
    ("kind", "stage", "checkpointing"),
    [
        *((kind, stage, False) for kind in PLAIN_ADAPTERS for stage in (0, 1, 2, 3)),
        *((kind, 0, True) for kind in PLAIN_ADAPTERS if kind != "prefix"),  # which is refused together
    ],
)
def test_every_adapter_without_density_loss_is_plain_peft(
    trial: Trial, open_slot: Any, tiny_models: dict[str, Path], kind: str, stage: int, checkpointing: bool
) -> None:
    """Bit for bit, sharded or not, computed again or not."""
    leaves = {"adapter__virtual_tokens": 5} if kind in ("prefix", "prompt") else {}
    spec = trial(
        "dry-t5",
        adapter__kind=kind,
        train__steps=5,
        train__warmup_share=0.0,
        train__max_grad_norm=0.0,
        train__zero_stage=stage,
        train__gradient_checkpointing=checkpointing,
        **leaves,
    )
    slot = open_slot(spec)
    losses = run(slot)
    rows = glue_rows("mrpc", "train", 30)
    sources, answers = [MRPC.format(**row) for row in rows], [MRPC_LABELS[row["label"]] for row in rows]
    plain = PLAIN_ADAPTERS[kind]
    want_losses, want = train_plain(tiny_models["dry-t5"], sources, answers, spec, plain, flat=stage > 0)
    assert losses == want_losses
    with slot.whole():
        assert same(weights(slot.model), want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_on_any_base_a_trial_without_density_loss_is_plain_peft(
    trial: Trial, open_slot: Any, tiny_models: dict[str, Path], quantization: str, dtype: str
) -> None:
    """Bit for bit."""
    leaves = {"train__warmup_share": 0.0, "train__max_grad_norm": 0.05, "adapter__lora_dropout": 0.1}
    spec = trial("t5", model__quantization=quantization, model__dtype=dtype, train__steps=7, **leaves)
    slot = open_slot(spec)
    losses = run(slot)
    rows = glue_rows("mrpc", "train", 30)
    sources, answers = [MRPC.format(**row) for row in rows], [MRPC_LABELS[row["label"]] for row in rows]
    want_losses, want = train_plain(tiny_models["t5"], sources, answers, spec)
    assert losses == want_losses
    assert same(weights(slot.model), want)


#: Behind which layer each MLP's bottleneck is.
MLP_OUTPUTS = {
    "bert": r".*layer\.\d+\.output\.dense",
    "roberta": r".*layer\.\d+\.output\.dense",
    "opt": r".*\.fc2",
    "gpt2": r".*\.mlp\.c_proj",
    "vit": r".*\.mlp\.fc2",
}


def plain_adapter(kind: str, model: str) -> PeftConfig | None:
    """What PEFT itself is told of an adapter of a model with a head; None for LoRA, which the trial describes."""
    if kind == "bottleneck":
        head = ["classifier"] if model == "vit" else None
        return BottleneckConfig(target_modules=MLP_OUTPUTS[model], task_type="SEQ_CLS", modules_to_save=head)
    if kind == "prefix":
        return PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)
    if kind == "prompt":
        return PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5, num_transformer_submodules=1)
    return None


@pytest.mark.parametrize(
    ("model", "kind", "head"),
    [
        *((model, "lora", head) for model in ("bert", "roberta", "opt", "gpt2") for head in ("own", "two-layer")),
        *((model, "bottleneck", "own") for model in ("bert", "roberta", "opt", "gpt2")),
        *((model, kind, "own") for model in ("bert", "roberta") for kind in ("prefix", "prompt")),
    ],
)
def test_a_head_without_density_loss_is_plain_peft_too(
    trial: Trial, open_slot: Any, tiny_models: dict[str, Path], model: str, kind: str, head: str
) -> None:
    """Bit for bit, from the same head and adapter; without dropout, as the head has been drawn from the same dice."""
    leaves: dict[str, Any] = {"train__warmup_share": 0.0, "train__max_grad_norm": 0.05}
    leaves |= {"lora": {"adapter__lora_dropout": 0.0}, "bottleneck": {}}.get(kind, {"adapter__virtual_tokens": 5})
    spec = trial(f"dry-{model}", "sst2", train__steps=7, adapter__kind=kind, adapter__head=head, **leaves)
    slot = open_slot(spec)
    start, losses = weights(slot.model), run(slot)
    rows = glue_rows("sst2", "train", 30)
    sources, answers = [row["sentence"] for row in rows], [row["label"] for row in rows]
    plain = plain_adapter(kind, model)
    want_losses, want = train_plain(tiny_models[f"dry-{model}"], sources, answers, spec, plain, head=start)
    assert losses == want_losses
    assert same(weights(slot.model), want)


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_images_without_density_loss_are_plain_peft_too(
    trial: Trial, open_slot: Any, tiny_models: dict[str, Path], kind: str
) -> None:
    leaves = {"train__warmup_share": 0.0, "train__max_grad_norm": 0.0}
    leaves |= {"adapter__lora_dropout": 0.0} if kind == "lora" else {}
    spec = trial("dry-vit", "cifar10", train__steps=7, adapter__kind=kind, **leaves)
    slot = open_slot(spec)
    start, losses = weights(slot.model), run(slot)
    images, labels = [make_image("train", index) for index in range(30)], [index % 10 for index in range(30)]
    plain = plain_adapter(kind, "vit")
    want_losses, want = train_plain(tiny_models["dry-vit"], images, labels, spec, plain, head=start)
    assert losses == want_losses
    assert same(weights(slot.model), want)


# --- the step's gradient ----------------------------------------------------------------------------------------------


def built_gradient(
    slot: Slot, alpha: float, alpha_decoder: float, soft: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Gradient of task loss + α x density of the whole first batch, the density built from collected activations."""
    batch = slot._collate(first_examples(slot))
    with seen_activations(slot) as acts:
        loss = slot.model(**batch.inputs).loss
    for side, weight in (("encoder", alpha), ("decoder", alpha_decoder)):
        mine = [act[batch.masks[side].bool()] for name, (act,) in acts.items() if name.startswith(side)]
        densities = map(soft_density, mine) if soft is None else (soft(act).mean() for act in mine)
        loss = loss + weight * sum(densities) / max(1, len(mine))
    return gradient_of(slot, loss)


@pytest.mark.parametrize(
    ("task", "micro", "alpha", "alpha_decoder"),
    [
        ("mrpc", 2, 0.0, None),
        *(("mrpc", micro, 2.0, None) for micro in (None, 3, 2, 1)),
        *(("squad", micro, 3.0, 0.5) for micro in (None, 3, 1)),
        ("squad", 2, 0.0, 1.0),
        ("stsb", 2, 2.0, 0.0),
    ],
)
def test_a_step_in_pieces_has_the_gradient_of_the_built_loss(
    trial: Trial, open_slot: Any, task: str, micro: int | None, alpha: float, alpha_decoder: float | None
) -> None:
    """Rows have unlike lengths, so pieces have unlike numbers of tokens on both sides."""
    spec = trial(
        "dry-t5",
        task,
        deft__alpha=alpha,
        deft__alpha_decoder=alpha_decoder,
        deft__epsilon=EPSILON,
        train__micro_batch_size=micro,
        train__max_grad_norm=0.0,
        train__gradient_checkpointing=micro == 2,
    )
    slot = shaken(open_slot(spec))
    want = built_gradient(slot, alpha, alpha if alpha_decoder is None else alpha_decoder)
    slot.step()

    assert worst(taken_gradient(slot), want) < 3e-5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("quantization", "dtype", "tolerance"),
    [("nf4", "float32", 3e-5), ("none", "bfloat16", 0.05), ("nf4", "bfloat16", 0.05)],
)
def test_a_quantised_or_half_wide_base_has_the_gradient_of_the_built_loss(
    trial: Trial, open_slot: Any, quantization: str, dtype: str, tolerance: float, checkpointing: bool
) -> None:
    spec = trial(
        "dry-t5",
        model__quantization=quantization,
        model__dtype=dtype,
        deft__alpha=20.0,
        deft__epsilon=EPSILON,
        train__micro_batch_size=3,
        train__max_grad_norm=0.0,
        train__gradient_checkpointing=checkpointing,
    )
    slot = shaken(open_slot(spec))
    want, without = built_gradient(slot, 20.0, 20.0), built_gradient(slot, 0.0, 0.0)
    slot.step()

    got = taken_gradient(slot)
    assert worst(got, want) < tolerance
    assert worst(without, want) > 5 * tolerance, "the loss is a good part of it"


@pytest.mark.parametrize(
    ("name", "approximation", "soft"),
    [
        ("relu-t5", "tanh", lambda act: torch.tanh(20.0 * act)),
        ("relu-t5", "sigmoid", lambda act: 2 * torch.sigmoid(20.0 * act.abs()) - 1),
        ("dry-t5", "sigmoid", lambda act: 2 * torch.sigmoid(20.0 * act.abs()) - 1),
        ("dry-t5", "l1", torch.abs),
        ("dry-t5", "l2", torch.square),
    ],
)
def test_every_approximation_has_the_gradient_of_its_built_loss(
    trial: Trial, open_slot: Any, name: str, approximation: str, soft: Callable[[Tensor], Tensor]
) -> None:
    leaves = {"deft__beta": 20.0} if approximation not in ("l1", "l2") else {}
    leaves |= {"train__micro_batch_size": 3, "train__max_grad_norm": 0.0, "adapter__lora_dropout": 0.0}
    slot = shaken(open_slot(trial(name, deft__alpha=5.0, deft__approximation=approximation, **leaves)))
    slot.model.eval()  # relu-t5 has dropout
    want, without = built_gradient(slot, 5.0, 5.0, soft), built_gradient(slot, 0.0, 0.0)
    slot.step()
    assert worst(taken_gradient(slot), want) < 3e-5
    assert worst(without, want) > 1e-2


def squashed(mean: Tensor) -> Tensor:
    """l0 of the feature map."""
    return mean**2 / (mean**2 + EPSILON)


@pytest.mark.parametrize("micro", [None, 3, 1])
@pytest.mark.parametrize(
    ("name", "leaves", "soft"),
    [
        ("relu-t5", {"deft__beta": 20.0, "deft__approximation": "tanh"}, lambda mean: torch.tanh(20.0 * mean)),
        ("dry-t5", {"deft__epsilon": EPSILON}, squashed),
        ("dry-t5", {"deft__epsilon": EPSILON, "model__quantization": "nf4"}, squashed),
    ],
)
def test_a_loss_of_the_feature_map_has_the_gradient_of_the_built_one(
    trial: Trial, open_slot: Any, name: str, leaves: dict[str, Any], soft: Callable[[Tensor], Tensor], micro: int | None
) -> None:
    """Of each micro-batch's own map, by its share of the tokens; activations of both signs cancel in the second."""
    leaves = leaves | {"train__micro_batch_size": micro, "train__max_grad_norm": 0.0, "adapter__lora_dropout": 0.0}
    slot = shaken(open_slot(trial(name, "squad", deft__alpha=5.0, deft__loss_of="feature_map", **leaves)))
    slot.model.eval()  # relu-t5 has dropout
    batch = slot._collate(first_examples(slot))
    without = gradient_of(slot, slot.model(**batch.inputs).loss)
    with seen_activations(slot) as acts:
        loss = slot.model(**batch.inputs).loss
    for side, mask in batch.masks.items():
        mine = [act for layer, (act,) in acts.items() if layer.startswith(side)]
        for first in range(0, len(mask), micro or len(mask)):
            rows = slice(first, first + (micro or len(mask)))
            real = mask[rows].bool()
            density = torch.stack([soft(act[rows][real].mean(dim=0)).mean() for act in mine]).mean()
            loss = loss + 5.0 * density * real.sum() / mask.sum()
    want = gradient_of(slot, loss)
    slot.step()
    assert worst(taken_gradient(slot), want) < 3e-5
    assert worst(without, want) > 1e-2


@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_padding_does_not_move_the_gradient(trial: Trial, open_slot: Any, padding: str) -> None:
    spec = trial("dry-t5", deft__alpha=2.0, deft__epsilon=EPSILON, data__padding=padding, train__max_grad_norm=0.0)
    longest = spec.model_copy(update={"data": spec.data.model_copy(update={"padding": "longest"})})
    wanted = shaken(open_slot(longest))
    want = built_gradient(wanted, 2.0, 2.0)
    slot = shaken(open_slot(spec))
    slot.step()

    assert worst(taken_gradient(slot), want) < 3e-5


@pytest.mark.parametrize(("name", "task"), [("bert", "rte"), ("roberta", "stsb")])
def test_gradient_checkpointing_changes_nothing(trial: Trial, open_slot: Any, name: str, task: str) -> None:
    leaves = {"deft__alpha": 2.0, "deft__epsilon": EPSILON}
    plain, checkpointed = (
        trained(open_slot(trial(name, task, train__gradient_checkpointing=on, **leaves))) for on in (False, True)
    )
    assert same(plain, checkpointed)


@pytest.mark.parametrize(
    ("alpha", "loss_of", "checkpointing"),
    [
        *((alpha, "activations", checkpointing) for alpha in (0.0, 2.0) for checkpointing in (False, True)),
        (2.0, "feature_map", True),
    ],
)
def test_zero_stages_give_the_same_losses(
    trial: Trial, open_slot: Any, alpha: float, loss_of: str, checkpointing: bool
) -> None:
    losses, adapters = [], []
    for stage in (0, 1, 2, 3):
        spec = trial(
            "t5",
            deft__alpha=alpha,
            deft__loss_of=loss_of,
            deft__epsilon=EPSILON,
            train__zero_stage=stage,
            train__micro_batch_size=3,
            train__gradient_checkpointing=checkpointing,
        )
        slot = open_slot(spec)
        losses.append(run(slot))
        with slot.whole():
            adapters.append(weights(slot.model))

    for stage in (1, 2, 3):
        assert losses[stage] == pytest.approx(losses[0], rel=1e-6)
        assert worst(adapters[stage], adapters[0]) < 1e-3, "AdamW turns roundings near zero into steps"


def first_gradients(slot: Slot) -> dict[str, Tensor]:
    """Train; returns each entry's first gradient that is not zero."""
    named = {name: p for name, p in slot.model.named_parameters() if p.requires_grad}
    firsts = {name: torch.zeros_like(p) for name, p in named.items()}
    step = slot.engine.optimizer.step

    def noting(*args: Any, **kwargs: Any) -> Any:
        for name, p in named.items():
            firsts[name] = torch.where(firsts[name] == 0.0, p.grad, firsts[name])
        return step(*args, **kwargs)

    slot.engine.optimizer.step = noting
    run(slot)
    return firsts


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_paged_optimizer_is_adamw(trial: Trial, open_slot: Any, stage: int) -> None:
    """torch's is the oracle of bitsandbytes', with decay, layer scales and their own rate.

    Of an entry whose first gradient is next to nothing AdamW makes a whole step all the same, in the direction of what
    was rounded; such entries are left out, and are few.
    """
    leaves = {"deft__alpha": 2.0, "deft__epsilon": EPSILON, "deft__adaptive": True, "train__weight_decay": 0.1}
    losses, adapters, lambdas = [], [], []
    for optimizer in ("adamw", "paged_adamw"):
        slot = open_slot(trial("t5", train__optimizer=optimizer, train__zero_stage=stage, **leaves))
        losses.append(run(slot))
        with slot.whole():
            adapters.append(weights(slot.model))
            lambdas.append(slot.lambdas())
    firsts = first_gradients(open_slot(trial("t5", **leaves)))
    steady = {name: firsts[name].abs() > 1e-6 for name in adapters[0]}
    torch_s, bitsandbytes_s = ({name: each * steady[name] for name, each in adapter.items()} for adapter in adapters)

    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert worst(bitsandbytes_s, torch_s) < 1e-3
    assert worst(adapters[1], adapters[0]) < 1e-2
    assert float(torch.cat([each.flatten() for each in steady.values()]).float().mean()) > 0.999
    assert lambdas[1] == pytest.approx(lambdas[0], abs=1e-4)
    assert any(abs(value - 0.8) > 0.05 for value in lambdas[0].values())


@pytest.mark.parametrize("loss_of", ["activations", "feature_map"])
def test_the_density_loss_falls_where_it_is_asked_to(trial: Trial, open_slot: Any, loss_of: str) -> None:
    densities = {}
    for alpha in (0.0, 20.0):
        leaves = {"deft__alpha": alpha, "deft__loss_of": loss_of, "train__steps": 12}
        slot = open_slot(trial("dry-t5", deft__epsilon=0.1 if loss_of == "activations" else 0.01, **leaves))
        results = [slot.step(measure=True) for _ in range(12)]
        densities[alpha] = [result.density_loss for result in results]
        sides = [result.penalty for result in results]
        if alpha:
            assert sides == pytest.approx([alpha * 2 * density for density in densities[alpha]], rel=1e-6)

    assert densities[0.0][0] == densities[20.0][0]
    assert densities[20.0][-1] < 0.9 * densities[20.0][0]
    assert densities[20.0][-1] < densities[0.0][-1] - 0.05


# --- how the density loss is asked for --------------------------------------------------------------------------------


def penalties(slot: Slot) -> list[float]:
    """α times density over the density, step by step: the weight that the loss had."""
    results = [slot.step(measure=True) for _ in range(slot.steps)]
    return [(result.penalty or 0.0) / (2 * (result.density_loss or 1.0)) for result in results]


def test_alpha_is_switched_on_late_and_rises(trial: Trial, open_slot: Any) -> None:
    leaves: dict[str, Any] = {"deft__alpha": 2.0, "train__steps": 10}
    late = open_slot(trial("dry-t5", deft__alpha_delay=0.3, deft__alpha_ramp=0.4, **leaves))
    assert penalties(late) == pytest.approx([0, 0, 0, 0.5, 1, 1.5, 2, 2, 2, 2], rel=1e-6)

    constant = open_slot(trial("dry-t5", **leaves))
    assert penalties(constant) == pytest.approx([2.0] * 10, rel=1e-6)


def test_epsilon_narrows_over_the_training(trial: Trial, open_slot: Any) -> None:
    spec = trial("dry-t5", deft__epsilon=1e-1, deft__epsilon_end=1e-5, train__steps=5)
    slot = open_slot(spec)
    seen = []
    for _ in range(5):
        seen.append(slot._approximation().epsilon)
        slot.step()

    assert seen == pytest.approx([1e-1, 1e-2, 1e-3, 1e-4, 1e-5], rel=1e-6)


def test_each_step_takes_the_gradient_of_its_own_alpha_and_epsilon(trial: Trial, open_slot: Any) -> None:
    """Every step has all examples and moves nothing, so that AdamW's first moment tells each step's gradient."""
    spec = trial(
        "dry-t5",
        deft__alpha=2.0,
        deft__alpha_delay=0.34,
        deft__alpha_ramp=0.5,
        deft__epsilon=1e-1,
        deft__epsilon_end=1e-6,
        train__steps=6,
        train__batch_size=30,
        train__learning_rate=1e-12,
        train__max_grad_norm=0.0,
    )
    slot = shaken(open_slot(spec))
    assert len(slot.data.train) == 30
    moments = {name: torch.zeros_like(p) for name, p in slot.model.named_parameters() if p.requires_grad}
    for step, alpha in enumerate((0.0, 0.0, 2 / 3, 4 / 3, 2.0, 2.0)):
        epsilon = 10.0 ** -(step + 1)
        want = built_gradient(slot, alpha, alpha, lambda act, eps=epsilon: act**2 / (act**2 + eps))
        slot.step()
        after = {name: moment * 0.1 for name, moment in taken_gradient(slot).items()}
        got = {name: (after[name] - 0.9 * before) / 0.1 for name, before in moments.items()}
        assert worst(got, want) < 1e-4, step
        moments = after


@pytest.mark.parametrize("micro", [None, 2])
def test_padding_counts_where_the_paper_counts_it(trial: Trial, open_slot: Any, micro: int | None) -> None:
    spec = trial(
        "dry-t5",
        data__padding="max_length",
        data__max_source_tokens=40,
        data__max_target_tokens=8,
        deft__alpha=2.0,
        deft__epsilon=EPSILON,
        deft__count_padding=True,
        train__max_grad_norm=0.0,
        train__micro_batch_size=micro,
    )
    real = spec.model_copy(update={"deft": spec.deft.model_copy(update={"count_padding": False})})
    without = built_gradient(shaken(open_slot(real)), 2.0, 2.0)
    slot = shaken(open_slot(spec))
    want = built_gradient(slot, 2.0, 2.0)
    slot.step()

    assert worst(taken_gradient(slot), want) < 3e-5
    assert worst(without, want) > 1e-2, "padding must have moved something"


def test_padding_changes_no_answers_loss(trial: Trial, open_slot: Any, base_of: Any) -> None:
    """In float64, where nothing but rounding is left; a T5 of random weights is off by 1e-4 in float32."""
    slot = open_slot(trial("dry-t5", "squad", data__max_target_tokens=8))
    base_of(slot.trial).model.double()
    slot.model.eval()
    examples, losses = first_examples(slot), []
    for fixed in (None, 64):
        options = {**slot._collation, "source_length": fixed, "target_length": fixed and 8}
        batch = training_batch(examples, pad_id=slot.base.pad_id, regression=False, device=slot.ranks.device, **options)
        labels = batch.inputs["labels"]
        with torch.no_grad():
            logits = slot.model(**batch.inputs).logits
        losses.append(torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none").sum(dim=-1))
        assert batch.inputs["input_ids"].shape[1] == (fixed or max(example.source_tokens for example in examples))
    base_of(slot.trial).model.float()
    assert losses[0].dtype == torch.float64
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)


PAPER = {"data__padding": "max_length", "data__max_source_tokens": 40, "deft__count_padding": True}


@pytest.mark.parametrize(
    ("model", "kind"),
    [("dry-bert", "lora"), ("dry-gpt2", "lora"), ("dry-opt", "lora"), ("dry-bert", "prompt"), ("dry-t5", "prompt")],
)
def test_padding_and_virtual_tokens_count_where_the_paper_counts_them(
    trial: Trial, open_slot: Any, model: str, kind: str
) -> None:
    """All positions that the activations have: of a model padded left, and of a prompt before its input."""
    leaves = {"adapter__kind": kind, **({"adapter__virtual_tokens": 5} if kind == "prompt" else {})}
    loss_of = {"deft__alpha": 20.0, "deft__epsilon": EPSILON, "deft__approximation": "l0"}
    options = {**loss_of, "train__max_grad_norm": 0.0, "train__micro_batch_size": 2}
    slot = shaken(open_slot(trial(model, "mrpc", **PAPER, **leaves, **options)))
    with seen_activations(slot) as acts:
        loss = slot.model(**slot._collate(first_examples(slot)).inputs).loss
    sides = {name.split(".")[0] for name in acts}
    for side in sides:
        mine = [soft_density(act) for name, (act,) in acts.items() if name.startswith(side)]
        loss = loss + 20.0 * sum(mine) / len(mine)
    want = gradient_of(slot, loss)
    positions = 40 + (5 if kind == "prompt" else 0)
    assert all(act.numel() == 6 * positions * act.shape[-1] for name, (act,) in acts.items() if name[:7] == "encoder")
    slot.step()
    assert worst(taken_gradient(slot), want) < 3e-5


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_the_fused_block_trains_as_stock_with_the_tanh_gelu(
    trial: Trial, open_slot: Any, base_of: Any, alpha: float
) -> None:
    spec = trial("dry-t5", deft__alpha=alpha, deft__epsilon=EPSILON)
    fused = spec.model_copy(update={"model": spec.model.model_copy(update={"activation": "fused"})})
    stock = open_slot(spec)
    losses, density = run(stock), stock.evaluate().counts.density()
    slot = open_slot(fused)

    assert slot.activation == "GELUTanh"
    assert run(slot) == pytest.approx(losses, rel=1e-4)
    assert slot.evaluate().counts.density() == pytest.approx(density, abs=2e-2)
    slot.close()
    assert "forward" not in vars(base_of(spec).sites[0].block)
    assert type(base_of(spec).sites[0].module).__name__ == "NewGELUActivation"


@pytest.mark.parametrize(
    ("name", "stage", "quantization"),
    [
        ("dry-t5", 0, "none"),
        ("dry-t5", 2, "none"),
        ("bert", 1, "none"),
        ("dry-t5", 3, "none"),
        ("dry-t5", 2, "nf4"),
        ("bert", 0, "nf4"),
    ],
)
def test_layer_scales_train_within_bounds_and_reach_zero(
    trial: Trial, open_slot: Any, tmp_path: Path, name: str, stage: int, quantization: str
) -> None:
    spec = trial(
        name,
        "mrpc",
        deft__adaptive=True,
        deft__alpha=50.0,
        deft__lambda_learning_rate=0.2,
        deft__lambda_init=0.5,
        model__quantization=quantization,
        train__steps=14,
        train__zero_stage=stage,
        train__schedule="constant",
    )
    slot = open_slot(spec)
    with slot.whole():
        start = slot.lambdas()
    run(slot)
    with slot.whole():
        end = slot.lambdas()
        slot.save_adapter(tmp_path)

    assert start.keys() == end.keys() == set(slot.probe.names)
    assert all(0.3 < value < 0.7 for value in start.values())
    assert all(value == 0.0 for value in end.values()), "a density weighed by 50 has to win"
    assert json.loads((tmp_path / "layer_scales.json").read_text()) == end


def test_the_reported_penalty_is_weighed_by_the_layer_scales(trial: Trial, open_slot: Any) -> None:
    leaves: dict[str, Any] = {"deft__adaptive": True, "deft__alpha": 2.0, "deft__lambda_noise": 0.0}
    half = open_slot(trial("dry-t5", deft__lambda_init=0.5, **leaves)).step(measure=True)

    assert half.penalty == pytest.approx(0.5 * 2.0 * 2 * half.density_loss, rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw"])
def test_layer_scales_move_at_their_own_rate_and_stop_at_one(trial: Trial, open_slot: Any, optimizer: str) -> None:
    """The first step of Adam is as long as the rate; weight decay has no part in it, and the schedule has."""
    leaves = {"deft__adaptive": True, "deft__alpha": 0.0, "deft__lambda_noise": 0.0, "deft__lambda_learning_rate": 0.04}
    leaves |= {"train__weight_decay": 0.5, "train__max_grad_norm": 0.0, "train__warmup_share": 0.0}
    spec = trial("dry-t5", **leaves, deft__lambda_init=0.5, train__steps=4, train__optimizer=optimizer)
    slot = open_slot(spec)
    slot.step()
    assert [abs(value - 0.5) for value in slot.lambdas().values()] == pytest.approx([0.04] * 4, rel=1e-4)
    slot.step()
    moved = [abs(value - 0.5) for value in slot.lambdas().values()]
    assert max(moved) == pytest.approx(0.04 * (1 + 3 / 4), rel=0.05), "the second, where the gradient is much the same"

    slot = open_slot(spec.model_copy(update={"deft": spec.deft.model_copy(update={"lambda_init": 0.99})}))
    slot.step()
    down, up = min(slot.lambdas().values()), max(slot.lambdas().values())
    assert (down, up) == (pytest.approx(0.95), 1.0), "who would go beyond is at the bound"


def test_layer_scales_without_a_density_loss_are_trained_for_the_task_alone(trial: Trial, open_slot: Any) -> None:
    slot = open_slot(trial("dry-t5", deft__adaptive=True, deft__alpha=0.0, train__steps=8))
    start = slot.scales.by_layer()
    run(slot)

    assert slot.scales.by_layer() != start
    assert all(0.5 < value <= 1.0 for value in slot.scales.by_layer().values())


def test_a_block_of_the_nano_model_that_ends_at_zero_can_be_taken_out(ranks: Ranks) -> None:
    base = load_base("nano", "t5")
    spec = tiny_trial(
        Path("nano"),
        "t5",
        None,
        "nano-sentiment",
        data__train_examples=200,
        data__validation_examples=40,
        deft__adaptive=True,
        deft__alpha=0.5,
        deft__lambda_learning_rate=0.05,
        train__steps=40,
        train__batch_size=8,
        train__learning_rate=2e-3,
    )
    slot = new_slot(spec, base, ranks)
    run(slot)
    lambdas = slot.lambdas()
    zeros = [name for name, value in lambdas.items() if value == 0.0]
    assert 0 < len(zeros) < len(lambdas), lambdas

    slot.model.eval()
    batch = slot._collate(slot.data.validation[:8]).inputs
    with torch.no_grad():
        scaled = slot.model(**batch).logits
        for name in zeros:
            side, index = name.split(".")
            base.model.get_submodule(f"{side}.block.{index}").layer[-1] = torch.nn.Identity()  # type: ignore[operator]
        removed = slot.model(**batch).logits
    assert torch.equal(scaled, removed)


def test_a_resumed_adaptive_trial_is_the_uninterrupted_one(trial: Trial, open_slot: Any, tmp_path: Path) -> None:
    spec = trial("t5", deft__adaptive=True, deft__alpha=2.0, train__steps=6, train__zero_stage=1)
    check_resumed(lambda: open_slot(spec), tmp_path)


def test_the_approximation_follows_the_activation(trial: Trial, open_slot: Any) -> None:
    gelu = open_slot(trial("t5", deft__alpha=1.0))
    assert (gelu.kind, gelu.warning) == ("l0", None)
    relu = open_slot(trial("relu-t5", deft__alpha=1.0))
    assert (relu.kind, relu.warning) == ("tanh", None)
    doubtful = open_slot(trial("t5", deft__alpha=1.0, deft__approximation="tanh", deft__beta=20.0))
    assert doubtful.warning is not None
    assert doubtful.warning.startswith("deft.approximation 'tanh' on NewGELUActivation: its negative activations count")
    off = open_slot(trial("t5", deft__alpha=0.0, deft__approximation="tanh", deft__beta=20.0))
    assert off.warning is None


# --- checkpoints and what is left -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "task", "stage", "optimizer"),
    [
        ("t5", "mrpc", 0, "adamw"),
        ("t5", "squad", 2, "adamw"),
        ("bert", "rte", 1, "adamw"),
        ("t5", "mrpc", 3, "adamw"),
        ("t5", "mrpc", 0, "paged_adamw"),
        ("t5", "mrpc", 2, "paged_adamw"),
    ],
)
def test_a_resumed_trial_is_the_uninterrupted_one(
    trial: Trial, open_slot: Any, tmp_path: Path, name: str, task: str, stage: int, optimizer: str
) -> None:
    spec = trial(
        name,
        task,
        adapter__lora_dropout=0.1,
        deft__alpha=1.0,
        data__max_target_tokens=4,
        train__steps=6,
        train__optimizer=optimizer,
        train__zero_stage=stage,
        train__micro_batch_size=3,
    )
    check_resumed(lambda: open_slot(spec), tmp_path)


def test_an_evaluation_in_between_changes_nothing(trial: Trial, open_slot: Any) -> None:
    spec = trial("t5", "squad", adapter__lora_dropout=0.1, deft__alpha=1.0, data__max_target_tokens=4)
    slot = open_slot(spec)
    want = run(slot)
    slot = open_slot(spec)
    got = run(slot, 2)
    slot.evaluate()

    assert got + run(slot, 2) == want


def test_a_slot_that_cannot_be_built_leaves_no_trace(
    trial: Trial, open_slot: Any, base_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = run(open_slot(trial("t5")))
    dry = trial("dry-t5")
    base = base_of(dry)
    modules = [name for name, _ in base.model.named_modules()]
    with monkeypatch.context() as patch:
        patch.setattr("deft_ray.train.slot.build_engine", out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            open_slot(dry)

    assert [name for name, _ in base.model.named_modules()] == modules
    assert all(type(site.module).__name__ == "NewGELUActivation" for site in base.sites)
    assert run(open_slot(trial("t5"))) == want


@pytest.mark.parametrize("stage", [0, 2])
def test_a_closed_slot_is_collected(trial: Trial, base_of: Any, ranks: Ranks, stage: int) -> None:
    spec = trial("t5", train__zero_stage=stage, deft__alpha=1.0)
    assert left_in_memory(spec, base_of(spec), ranks, evaluate=False) == []


def out_of_memory(*_args: Any, **_options: Any) -> None:
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("grouping", ["length", "none"])
def test_a_step_takes_the_batch_that_the_grouping_makes(trial: Trial, open_slot: Any, grouping: str) -> None:
    slot = open_slot(trial("dry-t5", "squad", data__grouping=grouping))
    train, lengths = slot.data.train, [(e.source_tokens, len(e.target_ids)) for e in slot.data.train]
    orders = {
        way: BatchOrder(len(train), slot.trial.train.batch_size, slot.trial.seed, sort_by)
        for way, sort_by in {"length": lengths, "none": None}.items()
    }
    batches = {
        way: slot._collate([train[index] for index in order.indices(0)]).inputs["input_ids"]
        for way, order in orders.items()
    }

    assert torch.equal(slot.share(measure=False).batch.inputs["input_ids"], batches[grouping])
    assert not torch.equal(batches["length"], batches["none"])


# --- small sums -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "micro", "world", "want"),
    [(12, None, 1, (12, 1)), (12, None, 3, (4, 1)), (12, 2, 3, (2, 2)), (12, 1, 1, (1, 12)), (12, 4, 1, (4, 3))],
)
def test_batches_are_split(trial: Trial, batch: int, micro: int | None, world: int, want: tuple[int, int]) -> None:
    assert split_batch(trial("t5", train__batch_size=batch, train__micro_batch_size=micro), world) == want


@pytest.mark.parametrize(
    ("steps", "epochs", "examples", "want"),
    [(7, None, 100, 7), (None, 1.0, 100, 17), (None, 3.0, 100, 50), (None, 0.01, 100, 1), (None, 0.001, 100, 1)],
)
def test_steps_are_planned(trial: Trial, steps: int | None, epochs: float | None, examples: int, want: int) -> None:
    assert planned_steps(trial("t5", train__steps=steps, train__epochs=epochs), examples) == want
