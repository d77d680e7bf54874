"""A bottleneck adapter against its equation, where it sits, and what PEFT does with it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from deft_ray.models.adapters import Bottleneck, attach_adapter, detach_adapter
from deft_ray.models.base import Base, load_base
from deft_ray.models.bottleneck import BottleneckConfig, BottleneckLayer, hidden_units, output_width

FAMILIES = [("t5", None), ("bert", 3), ("roberta", 1)]


@pytest.fixture(scope="module", params=["none", "nf4"])
def bases(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> Iterator[dict[str, Base]]:
    return {name: load_base(str(tiny_models[name]), name, quantization=request.param) for name, _ in FAMILIES}


#: Whether D reads the sum with the residual stream.
SUM = pytest.mark.parametrize("reads_sum", [False, True], ids=["mlp", "sum"])


def attach(base: Base, outputs: int | None, factor: int = 16, *, reads_sum: bool = False) -> PeftModel:
    torch.manual_seed(0)
    return attach_adapter(base, Bottleneck(factor, reads_sum), outputs=outputs).eval()


def shake(model: nn.Module, std: float = 0.5) -> None:
    """Give every adapter weight a value: none of them is the identity any more."""
    dice = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "bottleneck_" in name:
            parameter.data.normal_(std=std, generator=dice)


def inputs_of(base: Base) -> dict[str, Tensor]:
    ids = torch.arange(24).reshape(3, 8) + 40
    return {"input_ids": ids, **({"labels": ids[:, :3].contiguous()} if base.family.text_to_text else {})}


@torch.no_grad()
def activations(base: Base, model: Any) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    hooks = [
        site.module.register_forward_hook(lambda _m, _i, out, n=site.name: seen.update({n: out})) for site in base.sites
    ]
    model(**inputs_of(base))
    for hook in hooks:
        hook.remove()
    return seen


@SUM
@pytest.mark.parametrize(("name", "outputs"), FAMILIES)
def test_the_first_block_does_not_see_the_adapter(
    bases: dict[str, Base], name: str, outputs: int | None, reads_sum: bool
) -> None:
    """An adapter sits behind its MLP, so the first MLP's activations are the base's, bit for bit; all others move."""
    base = bases[name]
    base.model.eval()
    plain = activations(base, base.model)
    model = attach(base, outputs, reads_sum=reads_sum)
    shake(model)
    adapted = activations(base, model)
    detach_adapter(model)

    # A decoder's first block sees what the encoder's adapters did.
    assert [layer for layer in plain if torch.equal(plain[layer], adapted[layer])] == ["encoder.0"]
    assert activations(base, base.model).keys() == plain.keys()


@SUM
@pytest.mark.parametrize(("name", "outputs"), FAMILIES)
def test_a_fresh_adapter_is_the_identity(
    bases: dict[str, Base], name: str, outputs: int | None, reads_sum: bool
) -> None:
    base = bases[name]
    base.model.eval()
    plain = activations(base, base.model)
    model = attach(base, outputs, reads_sum=reads_sum)
    fresh = activations(base, model)
    detach_adapter(model)

    assert all(torch.equal(plain[layer], fresh[layer]) for layer in plain)


def bottleneck(layer: Any, hidden: Tensor) -> Tensor:
    """h + U f(D h), by hand."""
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    inside = (hidden @ down.weight.T + down.bias).clamp(min=0)
    return hidden + inside @ up.weight.T + up.bias


@pytest.mark.parametrize("name", ["t5", "bert", "roberta"])
@torch.no_grad()
def test_it_stands_between_the_mlp_and_the_residual_addition(bases: dict[str, Base], name: str) -> None:
    """T5: x + adapter(MLP(norm(x))). BERT: norm(x + adapter(MLP(x))). By hand, from the base's own layers."""
    base = bases[name]
    model = attach(base, None if name == "t5" else 2)
    shake(model, 0.1)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2))
    if name == "t5":
        block = base.model.encoder.block[1].layer[1]
        mlp = block.DenseReluDense
        normed = block.layer_norm(x)
        want = x + bottleneck(mlp.wo, mlp.wo.base_layer(mlp.act(mlp.wi_0(normed)) * mlp.wi_1(normed)))
        got = block(x)
    else:
        block = getattr(base.model, name).encoder.layer[1]
        out = block.output
        want = out.LayerNorm(x + bottleneck(out.dense, out.dense.base_layer(block.intermediate(x))))
        got = block.feed_forward_chunk(x)
    detach_adapter(model)

    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


#: Model, outputs of its head, and the module that gives out what its first MLP block gives to the residual stream.
BLOCKS = [
    ("dry-t5", None, "encoder.block.0.layer.1"),
    ("dry-bert", 2, "bert.encoder.layer.0.output"),
    ("dry-roberta", 2, "roberta.encoder.layer.0.output"),
    ("dry-opt", 2, "model.decoder.layers.0"),
    ("dry-narrow-opt", 2, "model.decoder.layers.0"),
    ("dry-gpt2", 2, "transformer.h.0"),
    ("dry-vit", 2, "vit.layers.0"),
]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "outputs", "block"), BLOCKS)
def test_the_sum_is_what_the_block_gives_out_without_it(
    tiny_models: dict[str, Path], name: str, outputs: int | None, block: str, checkpointing: bool
) -> None:
    """h' = h + U f(D y), y = x + h or, where the block normalises behind, norm(x + h): the plain block's own output."""
    base = load_base(str(tiny_models[name]), name.rsplit("-", 1)[-1])
    base.model.eval()
    wide = {"labels": torch.tensor([0, 1, 1])} if outputs else {}
    inputs = {"pixel_values": torch.rand(3, 3, 32, 32)} if name == "dry-vit" else inputs_of(base)
    layer, seen = base.sites[0].output, {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, key=key: seen.update({key: out}))
        for key, module in (("h", base.sites[0].block.get_submodule(layer)), ("y", base.model.get_submodule(block)))
    ]
    with torch.no_grad():
        base.model(**inputs)
    for hook in hooks:
        hook.remove()

    torch.manual_seed(0)
    adapter = Bottleneck(16, reads_sum=True)
    model = attach_adapter(base, adapter, outputs=outputs, gradient_checkpointing=checkpointing)
    shake(model, 0.1)
    model.eval()
    there = base.sites[0].block.get_submodule(layer)
    there.register_forward_hook(lambda _m, _i, out: seen.setdefault("got", out))
    model.train(checkpointing)  # there is no dropout
    model(**inputs, **wide).loss.backward()
    down, up = there.bottleneck_down["default"], there.bottleneck_up["default"]
    inside = (seen["y"].reshape(seen["h"].shape) @ down.weight.T + down.bias).clamp(min=0)
    want = seen["h"] + inside @ up.weight.T + up.bias

    torch.testing.assert_close(seen["got"], want, rtol=1e-4, atol=1e-5)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    detach_adapter(model)


def test_the_gradient_reaches_what_lies_before_through_the_sum(tiny_models: dict[str, Path]) -> None:
    """By finite differences, in float64: D of the second block reads what the first one has given out."""
    base = load_base(str(tiny_models["dry-t5"]), "t5")
    base.model.double()
    torch.manual_seed(0)
    model = attach_adapter(base, Bottleneck(16, reads_sum=True), outputs=None)
    model.double()
    shake(model, 0.1)
    first = base.sites[0].block.wo.bottleneck_up["default"].weight
    loss = model(**inputs_of(base)).loss
    (slope,) = torch.autograd.grad(loss, first)
    moved = torch.randn_like(first)
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            first.add_(sign * 1e-4 * moved)
            ends.append(float(model(**inputs_of(base)).loss))
            first.sub_(sign * 1e-4 * moved)

    assert float((slope * moved).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-3)
    detach_adapter(model)


@pytest.mark.parametrize(("name", "outputs"), FAMILIES)
@torch.no_grad()
def test_switched_off_it_is_the_base(bases: dict[str, Base], name: str, outputs: int | None) -> None:
    base = bases[name]
    base.model.eval()
    plain = activations(base, base.model)
    model = attach(base, outputs)
    shake(model)
    with model.disable_adapter():
        off = activations(base, model)
    on = activations(base, model)
    detach_adapter(model)

    assert all(torch.equal(plain[layer], off[layer]) for layer in plain)
    assert not all(torch.equal(plain[layer], on[layer]) for layer in plain)


@pytest.mark.parametrize(("name", "outputs"), FAMILIES)
@SUM
@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}])
@torch.no_grad()
def test_it_is_saved_and_reopened_by_plain_peft(
    tiny_models: dict[str, Path],
    tmp_path: Path,
    name: str,
    outputs: int | None,
    options: dict[str, bool],
    reads_sum: bool,
) -> None:
    base = load_base(str(tiny_models[name]), name)
    model = attach(base, outputs, reads_sum=reads_sum)
    shake(model)
    want = model(**{key: value for key, value in inputs_of(base).items()}).logits
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)

    if outputs is None:
        plain = AutoModelForSeq2SeqLM.from_pretrained(tiny_models[name])
    else:
        plain = AutoModelForSequenceClassification.from_pretrained(tiny_models[name], num_labels=outputs)
    reopened = PeftModel.from_pretrained(plain, tmp_path, **options).eval()

    assert isinstance(reopened.peft_config["default"], BottleneckConfig)
    there = dict(reopened.named_parameters())
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(torch.equal(there[key], parameter) for key, parameter in trained.items()), "saved bit for bit"
    said = reopened(**inputs_of(base)).logits
    torch.testing.assert_close(said, want, rtol=1e-5, atol=1e-6)  # some CPUs round another way
    assert not any(parameter.requires_grad for parameter in reopened.parameters())
    unloaded = reopened.unload()
    assert not any(isinstance(module, BottleneckLayer) for module in unloaded.modules())
    assert not any(module._forward_pre_hooks for module in unloaded.base_model.modules())


def test_opening_takes_no_more_than_an_import(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    base = load_base(str(tiny_models["t5"]), "t5")
    attach(base, None).save_pretrained(str(tmp_path), save_embedding_layers=False)
    program = (
        "import sys, transformers, peft; import deft_ray.models.bottleneck\n"
        "model = transformers.AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1])\n"
        "print(type(peft.PeftModel.from_pretrained(model, sys.argv[2]).base_model).__name__)"
    )
    command = [sys.executable, "-c", program, str(tiny_models["t5"]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["BottleneckModel"]


def test_two_adapters_on_one_model_stand_side_by_side(tiny_models: dict[str, Path]) -> None:
    base = load_base(str(tiny_models["t5"]), "t5")
    model = attach(base, None)
    shake(model)
    model.add_adapter("other", BottleneckConfig(target_modules=["wo"], reduction_factor=8, task_type="SEQ_2_SEQ_LM"))
    first = activations(base, model)
    model.set_adapter("other")
    second = activations(base, model)
    names = {key.split(".")[-2] for key, p in model.named_parameters() if p.requires_grad}

    assert names == {"other"}
    assert not torch.equal(first["encoder.1"], second["encoder.1"])
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(activations(base, model)["encoder.1"], first["encoder.1"])
    detach_adapter(model)


def test_it_cannot_be_merged(tiny_models: dict[str, Path]) -> None:
    model: Any = attach(load_base(str(tiny_models["bert"]), "bert"), 2)
    with pytest.raises(NotImplementedError):
        model.merge_and_unload()


def test_weights_are_float32_and_the_result_is_what_the_layer_gives_out() -> None:
    layer = BottleneckLayer(nn.Linear(8, 32, dtype=torch.bfloat16), "default", BottleneckConfig(reduction_factor=4))
    shake(layer)
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    hidden = layer.base_layer(x)

    assert {p.dtype for key, p in layer.named_parameters() if "bottleneck" in key} == {torch.float32}
    assert layer(x).dtype == torch.bfloat16
    added = bottleneck(layer, hidden.float()) - hidden.float()
    torch.testing.assert_close(layer(x), hidden + added.to(torch.bfloat16))


def test_gpt2s_convolutions_are_linear_layers_too() -> None:
    """``Conv1D(nf, nx)`` keeps its weight as (nx, nf)."""
    layer = BottleneckLayer(Conv1D(32, 8), "default", BottleneckConfig(reduction_factor=4))
    shake(layer)
    x = torch.randn(2, 3, 8)

    assert output_width(layer.base_layer) == 32
    torch.testing.assert_close(layer(x), bottleneck(layer, layer.base_layer(x)))


@pytest.mark.parametrize(("d_model", "factor", "units"), [(768, 16, 48), (1024, 16, 64), (64, 64, 1), (100, 16, 6)])
def test_hidden_units_are_rounded_down(d_model: int, factor: int, units: int) -> None:
    assert hidden_units(d_model, factor) == units


def test_a_factor_beyond_the_width_leaves_nothing() -> None:
    message = r"^adapter\.reduction_factor: leaves no hidden unit of a width of 64 \(got 100\), at most 64 is allowed$"
    with pytest.raises(ValueError, match=message):
        hidden_units(64, 100)
