"""A four-bit base is compared with its own opened weights when it is loaded; what computes wrongly is not opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor
from transformers import T5ForConditionalGeneration

from deft_ray.models.base import Base, load_base
from deft_ray.models.families import FAMILIES
from deft_ray.models.quantised import check_logits

MESSAGE = r"^model\.quantization: 'nf4' does not compute rightly here: "


def load(tiny_models: dict[str, Path], family: str, dtype: str = "float32") -> Base:
    return load_base(str(tiny_models[f"dry-{family}"]), family, quantization="nf4", dtype=dtype)


@pytest.mark.parametrize("pass_number", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_that_is_off_from_some_pass_on_is_named(
    tiny_models: dict[str, Path], family: str, dtype: str, pass_number: int
) -> None:
    """A tenth off, the same each time: only the opened weights can tell."""
    base = load(tiny_models, family, dtype)
    check_logits(base.model)
    layers = {name: module for name, module in base.model.named_modules() if isinstance(module, Linear4bit)}
    name = list(layers)[len(layers) // 2]
    layers[name].forward = off_from(pass_number, layers[name].forward)

    with pytest.raises(ValueError, match=MESSAGE) as caught:
        check_logits(base.model)
    start, error = str(caught.value).split(" is off by ")
    assert start.endswith(f": {name}: pass {pass_number}")
    assert 0.08 < float(error.split()[0]) < 0.12
    assert error.endswith(" or model.wo") == (family == "t5")


def off_from(number: int, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    passes: list[int] = []

    def wrong(inputs: Tensor) -> Tensor:
        passes.append(1)
        return forward(inputs) * (1.1 if len(passes) >= number else 1)

    return wrong


def test_a_bias_that_is_left_out_is_seen(tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base = load(tiny_models, "bert")
    layer: Any = base.model.get_submodule("bert.encoder.layer.1.output.dense")
    layer.bias.data.fill_(0.5)
    check_logits(base.model)
    honest = layer.forward
    monkeypatch.setattr(layer, "forward", lambda inputs: honest(inputs) - layer.bias)

    with pytest.raises(ValueError, match=MESSAGE + r"bert\.encoder\.layer\.1\.output\.dense: pass 1 is off by "):
        check_logits(base.model)


def test_logits_that_are_no_numbers_or_wander_are_caught(tiny_models: dict[str, Path]) -> None:
    base = load(tiny_models, "t5")
    head = base.model.get_submodule("lm_head")
    handle = head.register_forward_hook(lambda _m, _i, out: out * float("nan"))
    with pytest.raises(ValueError, match=MESSAGE + "the logits of a fixed input are not finite;"):
        check_logits(base.model)
    handle.remove()
    factors = iter((1.0, 2.0))
    handle = head.register_forward_hook(lambda _m, _i, out: out * next(factors))
    with pytest.raises(ValueError, match=MESSAGE + "the logits of a fixed input differ between two passes;"):
        check_logits(base.model)
    handle.remove()
    check_logits(base.model)


@pytest.mark.parametrize("wo", [None, "nf4"])
def test_a_model_that_computes_wrongly_is_not_opened(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, wo: str | None
) -> None:
    honest = T5ForConditionalGeneration.forward

    def wrong(*args: Any, **kwargs: Any) -> Any:
        found = honest(*args, **kwargs)
        found.logits = found.logits * float("inf")
        return found

    monkeypatch.setattr(T5ForConditionalGeneration, "forward", wrong)
    with pytest.raises(ValueError, match=MESSAGE):
        load_base(str(tiny_models["dry-t5"]), "t5", quantization="nf4", wo=wo)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_with_a_layer_that_computes_wrongly_is_not_opened(
    tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    honest = Linear4bit.forward
    monkeypatch.setattr(Linear4bit, "forward", lambda self, inputs: torch.relu(honest(self, inputs)))
    with pytest.raises(ValueError, match=MESSAGE + r".*: pass 1 is off by "):
        load(tiny_models, family)


def test_the_check_leaves_nothing_behind(tiny_models: dict[str, Path]) -> None:
    model = load(tiny_models, "gpt2").model
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, Linear4bit))
    assert not model.training
