"""Adapters come from the seed, train alone, and leave the base as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from deft_ray.models.adapters import attach_adapter, detach_adapter, trainable_share
from deft_ray.models.base import Base, load_base

R = 4
HEADS = ("classifier", "score")
FAMILIES = [("t5", None), ("bert", 3), ("roberta", 1), ("opt", 3), ("gpt2", 1), ("vit", 3)]
QUERY_AND_VALUE = {
    "t5": ["q", "v"],
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "opt": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "vit": ["q_proj", "v_proj"],
}


@pytest.fixture(scope="module", params=["none", "nf4"])
def bases(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> Iterator[dict[str, Base]]:
    return {name: load_base(str(tiny_models[name]), name, quantization=request.param) for name, _ in FAMILIES}


def attach(base: Base, outputs: int | None, seed: int = 0, **options: Any) -> PeftModel:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"r": R, "lora_alpha": 8.0, "lora_dropout": 0.0, "target_modules": "all-linear"}
    return attach_adapter(base, outputs=outputs, **{**settings, **options})


def inputs_of(base: Base) -> dict[str, Tensor]:
    if base.family.images:
        return {"pixel_values": torch.linspace(-1, 1, 3 * 3 * 32 * 32).reshape(3, 3, 32, 32)}
    ids = torch.arange(24).reshape(3, 8) + 40
    return {"input_ids": ids, **({"labels": ids[:, :3].contiguous()} if base.family.text_to_text else {})}


def answers(base: Base, model: Any = None) -> Tensor:
    """Logits before any head: of the T5, or an encoder's hidden states."""
    model = model or base.model
    model.eval()
    with torch.no_grad():
        if base.family.text_to_text:
            return model(**inputs_of(base)).logits
        return model(**inputs_of(base), output_hidden_states=True).hidden_states[-1]


def state(base: Base) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in base.model.state_dict().items() if not name.startswith(HEADS)}


def train_a_little(base: Base, model: PeftModel, outputs: int | None) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    inputs = inputs_of(base)
    if outputs is not None:
        inputs["labels"] = torch.tensor([0.0, 1.0, 2.0] if outputs == 1 else [0, 1, 2])
    for _ in range(3):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("name", "outputs"), FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_base_is_bit_identical_after_a_trained_adapter(
    bases: dict[str, Base], name: str, outputs: int | None, checkpointing: bool
) -> None:
    base = bases[name]
    before, said, modules = state(base), answers(base), [key for key, _ in base.model.named_modules()]
    hooks = hook_count(base)
    model = attach(base, outputs, gradient_checkpointing=checkpointing)
    train_a_little(base, model, outputs)
    assert not torch.equal(answers(base), said), "the adapter must have done something"
    detach_adapter(model)

    after = state(base)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(answers(base), said)
    assert hook_count(base) == hooks
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.is_activation_checkpointing
    without_head = [key for key in modules if not key.startswith(HEADS)]
    assert [key for key, _ in base.model.named_modules() if not key.startswith(HEADS)] == without_head


def hook_count(base: Base) -> int:
    """Hooks on all but the head, which every trial brings along."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for name, module in base.model.named_modules()
        if not name.startswith(HEADS)
    )


@pytest.mark.parametrize(("name", "outputs"), FAMILIES)
def test_a_second_adapter_does_not_see_the_first(bases: dict[str, Base], name: str, outputs: int | None) -> None:
    base = bases[name]
    alone = attach(base, outputs, seed=5)
    train_a_little(base, alone, outputs)
    want = trained(alone)
    detach_adapter(alone)

    first = attach(base, outputs, seed=1, r=2, target_modules=QUERY_AND_VALUE[name])
    train_a_little(base, first, outputs)
    detach_adapter(first)
    second = attach(base, outputs, seed=5)
    train_a_little(base, second, outputs)
    got = trained(second)
    names = list(second.peft_config)
    detach_adapter(second)

    assert names == ["default"]
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)


def trained(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("name", "outputs"), FAMILIES)
def test_the_seed_alone_decides_the_start(bases: dict[str, Base], name: str, outputs: int | None) -> None:
    starts = []
    for seed in (3, 3, 4):
        model = attach(bases[name], outputs, seed=seed)
        starts.append(trained(model))
        detach_adapter(model)

    assert all(torch.equal(starts[0][key], starts[1][key]) for key in starts[0])
    assert any(not torch.equal(starts[0][key], starts[2][key]) for key in starts[0])
    assert not any(start[key].any() for start in starts for key in start if "lora_B" in key)


@pytest.mark.parametrize(("name", "outputs"), FAMILIES)
def test_only_adapter_and_head_train_in_float32_and_are_counted(
    bases: dict[str, Base], name: str, outputs: int | None
) -> None:
    model = attach(bases[name], outputs)
    names = [key for key, p in model.named_parameters() if p.requires_grad]
    share = trainable_share(model)
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    detach_adapter(model)

    assert all("lora_" in key or ".modules_to_save" in key for key in names)
    assert dtypes == {torch.float32}
    adapter, frozen = own_count(name, outputs)
    assert share == pytest.approx(adapter / (adapter + frozen), rel=1e-12)


def own_count(name: str, outputs: int | None) -> tuple[int, int]:
    """(trainable, frozen) parameters of the tiny models, from their shapes."""
    vocabulary, d, ff = 512, 64, 128
    lora = {"square": R * (d + d), "up": R * (d + ff), "down": R * (ff + d)}
    if name == "t5":
        attentions, mlps, norms = 6, 4, 2 * 2 + 2 * 3 + 2
        trainable = attentions * 4 * lora["square"] + mlps * (2 * lora["up"] + lora["down"])
        biases = 2 * 32 * 4
        return trainable, 2 * vocabulary * d + attentions * 4 * d * d + mlps * 3 * d * ff + norms * d + biases
    assert outputs is not None
    layer_lora = 4 * lora["square"] + lora["up"] + lora["down"]
    if name == "gpt2":  # query, key and value are one layer
        layer_lora += R * (d + 3 * d) - 3 * lora["square"]
    layer = 4 * (d * d + d) + (d * ff + ff) + (ff * d + d) + 2 * 2 * d
    if name in ("opt", "gpt2"):
        embeddings, norm = (vocabulary + (514 if name == "opt" else 512)) * d, 2 * d
        return 2 * layer_lora + d * outputs, embeddings + 2 * layer + norm + d * outputs
    if name == "vit":
        embeddings, norm, head = 3 * 8 * 8 * d + d + d + 17 * d, 2 * d, d * outputs + outputs
        return 2 * layer_lora + head, embeddings + 2 * layer + norm + head
    positions, types = (512, 2) if name == "bert" else (514, 1)
    embeddings = (vocabulary + positions + types) * d + 2 * d
    head = d * outputs + outputs if name == "bert" else d * d + d + d * outputs + outputs
    pooler, pooler_lora = (d * d + d, lora["square"]) if name == "bert" else (0, 0)
    # PEFT keeps the head twice: the one trained and the frozen one that it was copied from.
    return 2 * layer_lora + pooler_lora + head, embeddings + 2 * layer + pooler + head


@pytest.mark.parametrize("name", ["bert", "roberta", "opt", "gpt2", "vit"])
def test_every_trial_has_a_fresh_head_of_its_size(bases: dict[str, Base], name: str) -> None:
    base = bases[name]
    for outputs in (2, 3, 1):
        model = attach(base, outputs)
        model.eval()
        assert model(**inputs_of(base)).logits.shape == (3, outputs)
        detach_adapter(model)


def test_target_modules_that_are_not_there_leave_the_base_usable(bases: dict[str, Base]) -> None:
    base = bases["t5"]
    said, hooks = answers(base), hook_count(base)
    with pytest.raises(ValueError, match=r"target_modules: no module is named query; linear layers here: k, "):
        attach(base, None, target_modules=["query"])

    assert torch.equal(answers(base), said)
    assert hook_count(base) == hooks
    model = attach(base, None)
    assert list(model.peft_config) == ["default"]
    detach_adapter(model)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(("name", "outputs"), FAMILIES)
def test_a_bfloat16_base_trains_with_a_float32_adapter(
    tiny_models: dict[str, Path], name: str, outputs: int | None, quantization: str
) -> None:
    base = load_base(str(tiny_models[name]), name, dtype="bfloat16", quantization=quantization)
    model = attach(base, outputs)
    before = trained(model)
    train_a_little(base, model, outputs)
    after = trained(model)

    assert {weight.dtype for weight in after.values()} == {torch.float32}
    assert all(torch.isfinite(weight).all() for weight in after.values())
    assert any(not torch.equal(before[key], after[key]) for key in before)
