"""T5's ``wo`` under NF4: in the dtype that was asked for, and right where it is quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.t5.modeling_t5 import T5PreTrainedModel

from deft_ray.density.probe import DensityProbe
from deft_ray.models.adapters import Lora, attach_adapter, detach_adapter
from deft_ray.models.base import Base, load_base
from deft_ray.models.families import FAMILIES, find_sites
from deft_ray.models.wo import check_wo, loading_wo, resolve_wo, settle_wo
from tests.plain_peft import PlainCounts

IDS = torch.arange(3, 13).unsqueeze(0)


def load(folder: Path, wo: str | None, dtype: str = "float32") -> Base:
    return load_base(str(folder), "t5", quantization="nf4", dtype=dtype, wo=wo)


@pytest.mark.parametrize(
    ("wo", "device", "want"),
    [(None, "cuda:1", "bfloat16"), (None, "cpu", None), ("float32", "cuda", "float32"), ("nf4", "cpu", "nf4")],
)
def test_left_to_us_it_is_short_where_short_is_fast(
    monkeypatch: pytest.MonkeyPatch, wo: str | None, device: str, want: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    assert resolve_wo(wo, torch.device(device)) == want
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert resolve_wo(wo, torch.device(device)) == wo


def test_what_is_left_to_us_is_what_is_loaded(tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deft_ray.models.base.resolve_wo", lambda _wo, _device: "bfloat16")
    base = load(tiny_models["t5"], None)
    assert {output.weight.dtype for output in outputs_of(base).values()} == {torch.bfloat16}


def outputs_of(base: Base) -> dict[str, Any]:
    return {site.name: site.block.get_submodule("wo") for site in base.sites}


def opened(base: Base) -> T5ForConditionalGeneration:
    """The same model with every 4-bit weight opened into a plain layer: what it should compute."""
    model = T5ForConditionalGeneration(base.model.config)
    model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))  # not the embeddings' own
    model.to(base.model.dtype)
    weights = {}
    for name, weight in base.model.named_parameters():
        if weight.dtype == torch.uint8:
            weight = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        weights[name] = weight.detach().to(base.model.dtype)
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert set(missing) <= {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, decoder_input_ids=IDS[:, :4]).logits.float()


def distance(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wo", [None, "float32", "bfloat16", "nf4"])
@pytest.mark.parametrize("name", ["t5", "relu-t5"])
def test_wo_lies_in_memory_as_asked(tiny_models: dict[str, Path], name: str, wo: str | None, dtype: str) -> None:
    base = load(tiny_models[name], wo, dtype)

    outputs = outputs_of(base)
    assert len(outputs) == 4
    assert {isinstance(module, bnb.nn.Linear4bit) for module in outputs.values()} == {wo == "nf4"}
    want = torch.uint8 if wo == "nf4" else getattr(torch, wo or dtype)
    assert {module.weight.dtype for module in outputs.values()} == {want}
    stored = load_file(tiny_models[name] / "model.safetensors")
    if wo not in ("nf4", None):
        for number, module in enumerate(outputs.values()):
            key = f"{('encoder', 'decoder')[number // 2]}.block.{number % 2}.layer.{1 + number // 2}.DenseReluDense.wo"
            assert torch.equal(module.weight, stored[f"{key}.weight"].to(want)), "no detour over a narrower dtype"
    assert {p.dtype for p in base.model.parameters() if p.is_floating_point()} <= {want, getattr(torch, dtype)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wo", ["float32", "bfloat16", "nf4"])
@pytest.mark.parametrize("name", ["dry-t5", "relu-t5"])
def test_a_quantised_base_says_what_its_opened_weights_say(
    tiny_models: dict[str, Path], name: str, wo: str, dtype: str
) -> None:
    """Also in the second and third evaluation, in training mode, and with a gradient."""
    base = load(tiny_models[name], wo, dtype)
    want = logits(opened(base))
    limit = 1e-4 if "bfloat16" not in (dtype, wo) else 0.03

    for _ in range(3):
        assert distance(logits(base.model), want) < limit
    if name == "dry-t5":
        base.model.train()
        base.model.get_input_embeddings().weight.requires_grad_(True)
        said = base.model(input_ids=IDS, decoder_input_ids=IDS[:, :4]).logits
        assert distance(said.detach().float(), want) < limit
        assert said.requires_grad
    base.model.eval()
    assert distance(logits(base.model), want) < limit


def test_as_transformers_loads_it_a_quantised_wo_is_wrong_and_is_caught(tiny_models: dict[str, Path]) -> None:
    """The fault that this is all about: T5's own forward pass cuts activations to whole numbers."""
    base = load(tiny_models["dry-t5"], "nf4")
    want = logits(opened(base))
    for site in base.sites:
        del site.block.forward

    assert distance(logits(base.model), want) > 0.2
    with pytest.raises(ValueError, match=MESSAGE) as caught:
        check_wo(base.model, base.sites)
    assert ": encoder.0: pass 1 is off by " in str(caught.value)
    assert str(caught.value).endswith("; use 'bfloat16' or 'float32'")


MESSAGE = r"^model\.wo: 'nf4' does not compute rightly here: "


def test_a_block_that_changes_after_its_first_pass_is_caught(tiny_models: dict[str, Path]) -> None:
    base = load(tiny_models["dry-t5"], "nf4")
    block: Any = base.sites[2].block
    honest, passes = block.forward, []

    def forward(hidden: Tensor) -> Tensor:
        passes.append(1)
        return honest(hidden) * (1 if len(passes) == 1 else 1.5)

    block.forward = forward
    with pytest.raises(ValueError, match=MESSAGE + r"decoder\.0: pass 2 is off by 0\.5 of what its weights say;"):
        check_wo(base.model, base.sites)


@pytest.mark.parametrize("wo", [None, "float32", "bfloat16"])
def test_a_wo_that_is_quantised_although_nobody_asked_is_refused(tiny_models: dict[str, Path], wo: str | None) -> None:
    """As a transformers that no longer leaves it out would load it: T5 would cut what enters it to whole numbers."""
    base = load(tiny_models["dry-t5"], "nf4")
    with pytest.raises(ValueError, match=r"^model\.wo: encoder\.0 is loaded as torch\.uint8; ask for 'nf4'$"):
        settle_wo(base.sites, wo)


def test_a_wo_that_is_not_quantised_although_asked_is_refused(tiny_models: dict[str, Path]) -> None:
    base = load(tiny_models["dry-t5"], None)

    with pytest.raises(ValueError, match=r"^model\.wo: cannot be 'nf4' here: encoder\.0 has a Linear$"):
        settle_wo(base.sites, "nf4")


@pytest.mark.parametrize(("wo", "fused"), [("nf4", False), ("nf4", True), ("float32", True)])
def test_an_integer_never_enters_wo(tiny_models: dict[str, Path], wo: str, fused: bool) -> None:
    """In the forward passes that are ours; T5's own casts to the dtype of `wo`, which is made sure of at load."""
    base = load(tiny_models["dry-t5"], wo)
    if fused:
        DensityProbe(base.sites, fused=True)
    block: Any = base.sites[0].block
    block.dropout.register_forward_hook(lambda _m, _i, act: act.to(torch.uint8))

    with pytest.raises(AssertionError, match=r"torch\.uint8"):
        block(torch.ones(1, 2, 64))


@pytest.mark.parametrize("wo", [None, "nf4", "float32", "bfloat16"])
def test_other_loads_are_left_alone(wo: str | None) -> None:
    before = (T5PreTrainedModel._keep_in_fp32_modules, T5PreTrainedModel._keep_in_fp32_modules_strict)
    with pytest.raises(KeyError), loading_wo(wo):
        raise KeyError
    assert before == (T5PreTrainedModel._keep_in_fp32_modules, T5PreTrainedModel._keep_in_fp32_modules_strict)
    assert before[0] == ["wo"]


def test_an_unquantised_load_does_not_heed_wo(tiny_models: dict[str, Path]) -> None:
    base = load_base(str(tiny_models["t5"]), "t5", dtype="bfloat16", wo="float32")

    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("wo", ["nf4", "float32"])
def test_an_adapter_over_a_quantised_wo_has_the_gradient_of_opened_weights(
    tiny_models: dict[str, Path], wo: str, fused: bool
) -> None:
    """Also with the gated block as one function, which replaces the settled forward pass for a while."""
    base = load(tiny_models["dry-t5"], wo)
    plain = opened(base)
    probe = DensityProbe(base.sites, fused=True) if fused else None
    torch.manual_seed(0)
    ours = attach_adapter(base, Lora(4, 8.0, 0.0, "all-linear"), outputs=None)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type=TaskType.SEQ_2_SEQ_LM)
    theirs = get_peft_model(plain, config)
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    theirs.load_state_dict({name: p.detach() for name, p in trained.items()}, strict=False)
    for model in (ours, theirs):
        model.train()
        model(input_ids=IDS, labels=IDS[:, :4]).loss.backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}

    assert trained.keys() == wanted.keys()
    assert sum("DenseReluDense.wo." in name for name in wanted) == 4 * 2
    assert all(distance(p.grad, wanted[name]) < 1e-3 for name, p in trained.items() if p.grad is not None)
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    detach_adapter(ours)
    if probe is not None:
        probe.remove()
    if wo == "nf4":
        check_wo(base.model, base.sites)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("wo", [None, "float32", "bfloat16", "nf4"])
def test_every_wo_trains_under_an_adapter(tiny_models: dict[str, Path], wo: str | None, checkpointing: bool) -> None:
    base = load(tiny_models["dry-t5"], wo, "bfloat16")
    torch.manual_seed(0)
    model = attach_adapter(base, Lora(4, 8.0, 0.0, "all-linear"), outputs=None, gradient_checkpointing=checkpointing)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.02)
    model.train()
    losses = []
    for _ in range(6):
        loss = model(input_ids=IDS, labels=IDS[:, :4]).loss
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    assert losses[-1] < 0.8 * losses[0]
    assert all(p.isfinite().all() for p in trained.values())
    assert all(p.any() for name, p in trained.items() if "lora_B" in name), "every layer had a gradient"
    detach_adapter(model)


@torch.no_grad()
def test_activations_are_seen_once_behind_a_quantised_wo(tiny_models: dict[str, Path]) -> None:
    base = load(tiny_models["dry-t5"], "nf4")
    ours, theirs = PlainCounts(base.model), PlainCounts(plain := opened(base))
    for model in (base.model, plain):
        logits(model)

    assert ours.total == theirs.total == {"encoder": 2 * 10 * 128, "decoder": 2 * 4 * 128}
    for side, total in ours.total.items():
        assert 0.3 < ours.nonzero[side] / total < 0.999
        assert abs(ours.nonzero[side] - theirs.nonzero[side]) <= 2, "one at the edge of the GELU may flip"


def flan_t5(size: str) -> PreTrainedModel:
    """Shapes of Flan-T5, without any memory."""
    d_model, d_ff, heads = {"xl": (2048, 5120, 32), "xxl": (4096, 10240, 64)}[size]
    config = T5Config(
        vocab_size=32128,
        d_model=d_model,
        d_kv=64,
        d_ff=d_ff,
        num_layers=24,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return T5ForConditionalGeneration(config)


def nf4_bytes_per_weight() -> float:
    """Measured on one quantised layer, scales and their scales included."""
    weight = bnb.nn.Params4bit(torch.randn(512, 1024), requires_grad=False, quant_type="nf4").to("cpu")
    state = weight.quant_state
    parts = (weight.data, state.absmax, state.state2.absmax)
    return sum(part.numel() * part.element_size() for part in parts) / (512 * 1024)


@pytest.mark.parametrize(
    ("size", "parameters", "gigabytes"),
    [
        ("xl", 503_316_480, {"float32": 2.01, "bfloat16": 1.01, "nf4": 0.26}),
        ("xxl", 2_013_265_920, {"float32": 8.05, "bfloat16": 4.03, "nf4": 1.04}),
    ],
)
def test_what_wo_takes_of_a_large_flan_t5(size: str, parameters: int, gigabytes: dict[str, float]) -> None:
    """The figures of the README."""
    sites = find_sites(flan_t5(size), FAMILIES["t5"])
    outputs: list[Any] = [site.block.get_submodule(site.output) for site in sites]
    per_weight = {"float32": 4.0, "bfloat16": 2.0, "nf4": nf4_bytes_per_weight()}

    assert len(sites) == 48
    assert sum(module.weight.numel() for module in outputs) == parameters
    assert {wo: round(parameters * each / 1e9, 2) for wo, each in per_weight.items()} == gigabytes


def test_what_plain_transformers_does_today(tiny_models: dict[str, Path]) -> None:
    """Were ``wo`` quantised by itself one day, ``model.wo`` would have to be thought over."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForSeq2SeqLM.from_pretrained(
        tiny_models["t5"], quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    found = {type(module) for name, module in model.named_modules() if name.endswith("DenseReluDense.wo")}

    assert found == {nn.Linear}
