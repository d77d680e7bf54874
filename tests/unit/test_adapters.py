"""Adapters come from the seed, train alone, and leave the base as it was."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from deft_ray.models.adapters import (
    Adapter,
    Bottleneck,
    Lora,
    Prefix,
    Prompt,
    attach_adapter,
    detach_adapter,
    trainable_share,
    virtual_positions,
)
from deft_ray.models.base import Base, load_base
from deft_ray.spec.catalog import FAMILY_ADAPTERS

R, P, FACTOR = 4, 5, 16
LORA = Lora(R, 8.0, 0.0, "all-linear")
KINDS: dict[str, Adapter] = {
    "lora": LORA,
    "bottleneck": Bottleneck(FACTOR),
    "prefix": Prefix(P),
    "prompt": Prompt(P),
}

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
EVERY = [(kind, name, outputs) for kind in KINDS for name, outputs in FAMILIES if kind in FAMILY_ADAPTERS[name]]


@pytest.fixture(scope="module", params=["none", "nf4"])
def bases(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> Iterator[dict[str, Base]]:
    return {name: load_base(str(tiny_models[name]), name, quantization=request.param) for name, _ in FAMILIES}


def attach(base: Base, outputs: int | None, adapter: Adapter = LORA, *, seed: int = 0, **options: Any) -> PeftModel:
    torch.manual_seed(seed)
    return attach_adapter(base, adapter, outputs=outputs, **options)


def inputs_of(base: Base) -> dict[str, Tensor]:
    if base.family.images:
        return {"pixel_values": torch.linspace(-1, 1, 3 * 3 * 32 * 32).reshape(3, 3, 32, 32)}
    ids = torch.arange(24).reshape(3, 8) + 40
    return {"input_ids": ids, **({"labels": ids[:, :3].contiguous()} if base.family.text_to_text else {})}


def answers(base: Base) -> Tensor:
    """What the base says without any head of a trial: logits of the T5, or an encoder's hidden states."""
    base.model.eval()
    with torch.no_grad():
        if base.family.text_to_text:
            return base.model(**inputs_of(base)).logits
        return base.model(**inputs_of(base), output_hidden_states=True).hidden_states[-1]


def logits(base: Base, model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(**inputs_of(base)).logits


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


@pytest.mark.parametrize(
    ("kind", "name", "outputs", "checkpointing"),
    [(*case, on) for case in EVERY for on in (False, True) if not (on and case[0] == "prefix")],  # refused by a rule
)
def test_base_is_bit_identical_after_a_trained_adapter(
    bases: dict[str, Base], kind: str, name: str, outputs: int | None, checkpointing: bool
) -> None:
    base = bases[name]
    before, said, modules = state(base), answers(base), [key for key, _ in base.model.named_modules()]
    hooks = hook_count(base)
    model = attach(base, outputs, KINDS[kind], gradient_checkpointing=checkpointing)
    fresh = logits(base, model)
    model.train()
    train_a_little(base, model, outputs)
    assert not torch.equal(logits(base, model), fresh), "the adapter must have done something"
    if base.family.text_to_text:
        ids = inputs_of(base)["input_ids"]
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
    detach_adapter(model)

    after = state(base)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(answers(base), said)
    assert hook_count(base) == hooks
    assert "prepare_inputs_for_generation" not in vars(base.model)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.is_activation_checkpointing
    without_head = [key for key in modules if not key.startswith(HEADS)]
    assert [key for key, _ in base.model.named_modules() if not key.startswith(HEADS)] == without_head
    assert not any("modules_to_save" in key for key, _ in base.model.named_modules())


def hook_count(base: Base) -> int:
    """Hooks on all but the head, which every trial brings along."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for name, module in base.model.named_modules()
        if not name.startswith(HEADS)
    )


@pytest.mark.parametrize(("kind", "name", "outputs"), EVERY)
def test_a_second_adapter_does_not_see_the_first(
    bases: dict[str, Base], kind: str, name: str, outputs: int | None
) -> None:
    base = bases[name]
    alone = attach(base, outputs, KINDS[kind], seed=5)
    train_a_little(base, alone, outputs)
    want = trained(alone)
    detach_adapter(alone)

    others = (Lora(2, 8.0, 0.0, QUERY_AND_VALUE[name]), Bottleneck(4), Prefix(3), Prompt(2))
    for other in (other for kind, other in zip(KINDS, others, strict=True) if kind in FAMILY_ADAPTERS[name]):
        first = attach(base, outputs, other, seed=1)
        train_a_little(base, first, outputs)
        detach_adapter(first)
    second = attach(base, outputs, KINDS[kind], seed=5)
    train_a_little(base, second, outputs)
    got = trained(second)
    names = list(second.peft_config)
    detach_adapter(second)

    assert names == ["default"]
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)


def trained(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("kind", "name", "outputs"), EVERY)
def test_the_seed_alone_decides_the_start(bases: dict[str, Base], kind: str, name: str, outputs: int | None) -> None:
    starts = []
    for seed in (3, 3, 4):
        model = attach(bases[name], outputs, KINDS[kind], seed=seed)
        starts.append(trained(model))
        detach_adapter(model)

    assert all(torch.equal(starts[0][key], starts[1][key]) for key in starts[0])
    assert any(not torch.equal(starts[0][key], starts[2][key]) for key in starts[0])
    zero = [key for key in starts[0] if "lora_B" in key or "bottleneck_up" in key]
    assert bool(zero) == (kind in ("lora", "bottleneck"))
    assert not any(start[key].any() for start in starts for key in zero)


@pytest.mark.parametrize(("kind", "name", "outputs"), EVERY)
def test_only_adapter_and_head_train_in_float32_and_are_counted(
    bases: dict[str, Base], kind: str, name: str, outputs: int | None
) -> None:
    """The share is of the parameters that the tiny models have by their shapes, NF4 or not."""
    model = attach(bases[name], outputs, KINDS[kind])
    names = [key for key, p in model.named_parameters() if p.requires_grad]
    share = trainable_share(model)
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    detach_adapter(model)

    own = {"lora": "lora_", "bottleneck": "bottleneck_"}.get(kind, "prompt_encoder.")
    assert all(own in key or ".modules_to_save" in key for key in names)
    assert dtypes == {torch.float32}
    adapter, frozen, head = own_count(kind, name, outputs)
    assert share == pytest.approx((adapter + head) / (adapter + frozen + head), rel=1e-12)


def own_count(kind: str, name: str, outputs: int | None) -> tuple[int, int, int]:
    """(adapter, frozen base, head) parameters of the tiny models, from their shapes."""
    vocabulary, d, ff, width = 512, 64, 128, 64 // FACTOR
    lora = {"square": R * (d + d), "up": R * (d + ff), "down": R * (ff + d)}
    bottleneck = d * width + width + width * d + d
    layers = 3 if name == "t5" else 2  # two, and what is left over of an odd ring
    virtual = {"prefix": P * 2 * layers * d, "prompt": P * d}  # keys and values; embeddings
    if name == "t5":
        attentions, mlps, norms = 6, 4, 2 * 2 + 2 * 3 + 2
        adapter = {
            "lora": attentions * 4 * lora["square"] + mlps * (2 * lora["up"] + lora["down"]),
            "bottleneck": mlps * bottleneck,
            **virtual,
        }
        biases = 2 * 32 * 4
        return adapter[kind], 2 * vocabulary * d + attentions * 4 * d * d + mlps * 3 * d * ff + norms * d + biases, 0
    assert outputs is not None
    layer_lora = 4 * lora["square"] + lora["up"] + lora["down"]
    if name == "gpt2":  # query, key and value are one layer
        layer_lora += R * (d + 3 * d) - 3 * lora["square"]
    layer = 4 * (d * d + d) + (d * ff + ff) + (ff * d + d) + 2 * 2 * d
    if name in ("opt", "gpt2"):
        embeddings, norm = (vocabulary + (514 if name == "opt" else 512)) * d, 2 * d
        adapter = {"lora": 2 * layer_lora, "bottleneck": 2 * bottleneck}
        return adapter[kind], embeddings + 2 * layer + norm, d * outputs
    if name == "vit":
        embeddings, norm = 3 * 8 * 8 * d + d + d + 17 * d, 2 * d
        adapter = {"lora": 2 * layer_lora, "bottleneck": 2 * bottleneck}
        return adapter[kind], embeddings + 2 * layer + norm, d * outputs + outputs
    positions, types = (512, 2) if name == "bert" else (514, 1)
    embeddings = (vocabulary + positions + types) * d + 2 * d
    head = d * outputs + outputs if name == "bert" else d * d + d + d * outputs + outputs
    pooler, pooler_lora = (d * d + d, lora["square"]) if name == "bert" else (0, 0)
    adapter = {"lora": 2 * layer_lora + pooler_lora, "bottleneck": 2 * bottleneck, **virtual}
    return adapter[kind], embeddings + 2 * layer + pooler, head


@pytest.mark.parametrize(
    ("kind", "name"),
    [(k, n) for k in KINDS for n in ("bert", "roberta", "opt", "gpt2", "vit") if k in FAMILY_ADAPTERS[n]],
)
def test_every_trial_has_a_fresh_head_of_its_size(bases: dict[str, Base], kind: str, name: str) -> None:
    base = bases[name]
    for outputs in (2, 3, 1):
        model = attach(base, outputs, KINDS[kind])
        assert logits(base, model).shape == (3, outputs)
        detach_adapter(model)


@pytest.mark.parametrize(("kind", "name", "outputs"), EVERY)
def test_every_part_of_an_adapter_has_a_gradient(
    bases: dict[str, Base], kind: str, name: str, outputs: int | None
) -> None:
    """Every virtual token, and of a prefix the key and value in every layer."""
    base = bases[name]
    model = attach(base, outputs, KINDS[kind])
    dice = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_B" in key or "bottleneck_up" in key:
            parameter.data.normal_(std=0.05, generator=dice)
    inputs = inputs_of(base)
    if outputs is not None:
        inputs["labels"] = torch.tensor([0.0, 1.0, 2.0] if outputs == 1 else [0, 1, 2])
    model.eval()
    loss = model(**inputs).loss
    loss.backward()
    grads = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    detach_adapter(model)

    assert torch.isfinite(loss)
    # BERT reads its first token alone: of the last layer's queries and MLP that is enough for every weight.
    for key, grad in grads.items():
        assert grad is not None, key
        assert torch.isfinite(grad).all(), key
        assert grad.any(), key
    if kind in ("prefix", "prompt"):
        by_token = grads["prompt_encoder.default.embedding.weight"].reshape(P, -1, 64)  # type: ignore[union-attr]
        # A key and a value for each of two layers; a T5's ring of three layers has a third that nobody reads.
        used = {"prompt": [True]}.get(kind, [True, True, False, False, True, True] if name == "t5" else [True] * 4)
        assert by_token.any(dim=-1).tolist() == [used] * P


@pytest.mark.parametrize("name", ["bert", "roberta", "t5"])
def test_a_prefix_does_not_see_padding(tiny_models: dict[str, Path], name: str) -> None:
    """A row says the same in a padded batch and by itself, so virtual tokens and padding are kept apart."""
    base = load_base(str(tiny_models[name]), name)
    for adapter in (Prefix(P), Prompt(P)):
        model = attach(base, None if name == "t5" else 3, adapter).eval()
        ids = torch.arange(24).reshape(3, 8) + 40
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        labels = {"labels": ids[:, :3].contiguous()} if name == "t5" else {}
        with torch.no_grad():
            together = model(input_ids=ids.where(mask.bool(), 1), attention_mask=mask, **labels).logits[1]
            alone = model(
                input_ids=ids[1:2, :5], attention_mask=mask[1:2, :5], **{key: v[1:2] for key, v in labels.items()}
            ).logits[0]
        detach_adapter(model)
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "layers"), [("t5", 2), ("t5", 3), ("t5", 4), ("bert", 2), ("roberta", 2)])
@torch.no_grad()
def test_every_layer_has_a_prefix_of_its_own(tiny_models: dict[str, Path], name: str, layers: int) -> None:
    """What PEFT hands to the model, layer by layer, is all different."""
    base = load_base(str(tiny_models[name]), name)
    if name == "t5":
        base = deeper_decoder(base, layers)
    model = attach(base, None if name == "t5" else 2, Prefix(P))
    cache = model.get_prompt(batch_size=1)
    own = getattr(cache, "self_attention_cache", cache).layers
    tensors = [tensor for layer in own[:layers] for tensor in (layer.keys, layer.values)]

    assert len(tensors) == 2 * layers
    assert all(tensor.shape == (1, 4, P, 16) for tensor in tensors)
    assert not any(torch.equal(a, b) for i, a in enumerate(tensors) for b in tensors[:i])


def deeper_decoder(base: Base, layers: int) -> Base:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(**{**base.model.config.to_dict(), "num_decoder_layers": layers}))
    model.config.use_cache = False
    return Base(model, base.tokenizer, base.family, [], "float32", "x")


def test_a_prefix_is_as_deep_as_the_decoder_and_as_wide_as_its_keys(tiny_models: dict[str, Path]) -> None:
    """Not as the encoder, and not as d_model: T5 has models where these differ."""
    from transformers import T5Config, T5ForConditionalGeneration

    base = load_base(str(tiny_models["t5"]), "t5")
    config = T5Config(
        **{**base.model.config.to_dict(), "num_layers": 1, "num_decoder_layers": 3, "d_kv": 8, "num_heads": 2}
    )
    odd = T5ForConditionalGeneration(config)
    odd.config.use_cache = False
    model = attach(Base(odd, base.tokenizer, base.family, [], "float32", "x"), None, Prefix(P))

    assert model.prompt_encoder["default"].embedding.weight.shape == (P, 3 * 2 * 16)
    assert model(**inputs_of(base)).logits.shape == (3, 3, 512)


def test_only_a_prompt_takes_positions_before_the_input(bases: dict[str, Base]) -> None:
    for kind, adapter in KINDS.items():
        model = attach(bases["t5"], None, adapter)
        assert virtual_positions(model) == (P if kind == "prompt" else 0)
        detach_adapter(model)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "adapter", "source_tokens", "message"),
    [
        (
            "t5",
            Lora(R, 8.0, 0.0, ["query"]),
            0,
            r"^adapter\.target_modules: no module is named query; linear layers here: k, ",
        ),
        (
            "t5",
            Bottleneck(65),
            0,
            r"^adapter\.reduction_factor: leaves no hidden unit of a width of 64 \(got 65\), at most 64 is allowed$",
        ),
        (
            "bert",
            Prompt(13),
            500,
            r"^adapter\.virtual_tokens: 13 virtual tokens and sources of up to 500 tokens take 513 positions, the "
            r"model has 512; take fewer virtual tokens or lower data\.max_source_tokens$",
        ),
        (
            "roberta",
            Prefix(13),
            500,
            r"^adapter\.virtual_tokens: 13 virtual tokens and sources of up to 500 tokens take 513 positions, the "
            r"model has 512; take fewer virtual tokens or lower data\.max_source_tokens$",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_leaves_the_base_usable(
    bases: dict[str, Base], name: str, adapter: Adapter, source_tokens: int, message: str
) -> None:
    base = bases[name]
    outputs = None if name == "t5" else 2
    said, hooks = answers(base), hook_count(base)
    with pytest.raises(ValueError, match=message):
        attach(base, outputs, adapter, source_tokens=source_tokens)

    assert torch.equal(answers(base), said)
    assert hook_count(base) == hooks
    model = attach(base, outputs)
    assert list(model.peft_config) == ["default"]
    detach_adapter(model)


@pytest.mark.parametrize("name", ["bert", "roberta"])
@pytest.mark.parametrize("adapter", [Prefix(12), Prompt(12)])
def test_virtual_tokens_and_source_may_fill_all_positions(
    tiny_models: dict[str, Path], name: str, adapter: Adapter
) -> None:
    base = load_base(str(tiny_models[name]), name)
    model = attach(base, 2, adapter, source_tokens=500).eval()
    ids = torch.full((1, 500), 40)
    assert torch.isfinite(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits).all()
    with pytest.raises((IndexError, RuntimeError)):  # one more and the model itself fails, without saying why
        model(input_ids=torch.full((1, 501), 40), attention_mask=torch.ones(1, 501))
    detach_adapter(model)


@pytest.mark.parametrize(("name", "there"), [("bert", 512), ("roberta", 512), ("opt", 512), ("gpt2", 512)])
@pytest.mark.parametrize("adapter", [Lora(2, 4.0, 0.0, "all-linear"), Bottleneck(16)])
def test_a_source_may_fill_all_positions_and_no_more(
    tiny_models: dict[str, Path], name: str, there: int, adapter: Adapter
) -> None:
    base = load_base(str(tiny_models[name]), name)
    model = attach(base, 2, adapter, source_tokens=there).eval()
    ids = torch.full((1, there), 40)
    assert torch.isfinite(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits).all()
    detach_adapter(model)
    message = f"data.max_source_tokens: there are sources of {there + 1} tokens, the model has {there} positions; "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        attach(base, 2, adapter, source_tokens=there + 1)
    assert not hasattr(base.model, "peft_config")


def test_relative_positions_do_not_end(bases: dict[str, Base]) -> None:
    detach_adapter(attach(bases["t5"], None, Prompt(P), source_tokens=100_000))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(("kind", "name", "outputs"), EVERY)
def test_a_bfloat16_base_trains_with_a_float32_adapter(
    tiny_models: dict[str, Path], kind: str, name: str, outputs: int | None, quantization: str
) -> None:
    base = load_base(str(tiny_models[name]), name, dtype="bfloat16", quantization=quantization)
    model = attach(base, outputs, KINDS[kind])
    before = trained(model)
    train_a_little(base, model, outputs)
    after = trained(model)

    assert {weight.dtype for weight in after.values()} == {torch.float32}
    assert all(torch.isfinite(weight).all() for weight in after.values())
    own = [key for key in before if "classifier" not in key]
    assert any(not torch.equal(before[key], after[key]) for key in own)
