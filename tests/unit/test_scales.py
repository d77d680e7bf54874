"""Layer scales of ADA-DEFT: λ = 0 is a skipped block, and the loss's slope in λ is the block's density."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deft_ray.density.probe import DensityProbe, Penalty
from deft_ray.density.scales import LayerScales
from deft_ray.models.adapters import Adapter, Bottleneck, Lora, attach_adapter
from deft_ray.models.base import load_base
from tests.unit.test_families import inputs_of
from tests.unit.test_probe import (
    APPROXIMATIONS,
    KINDS,
    WIDE,
    Kind,
    TwoStacks,
    assert_gradients_close,
    build,
    smooth,
    twin,
)

CPU = torch.device("cpu")


def scales_of(model: TwoStacks, init: float = 0.7, noise: float = 0.1) -> LayerScales:
    return LayerScales(model.sites, init=init, noise=noise, device=CPU)


def reference(
    model: TwoStacks,
    scales: LayerScales,
    inputs: Any,
    weights: dict[str, float],
    masks: dict[str, Tensor],
    kind: str,
    *,
    feature_map: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients of task loss + Σ_side weight / L Σ_l λ_l D_l in float64, by parameter and by block."""
    model, layers = model.double(), {s.name: s for s in model.sites}
    lambdas = {n: torch.tensor([v], dtype=torch.float64, requires_grad=True) for n, v in scales.by_layer().items()}
    acts: dict[str, Tensor] = {}
    for name, site in layers.items():
        site.module.register_forward_hook(lambda _m, _i, out, name=name: acts.update({name: out}))
        site.block.second.register_forward_hook(lambda _m, _i, out, name=name: out * lambdas[name])  # type: ignore[union-attr]
    loss = model(*(part.double() for part in inputs))
    for side, mask in masks.items():
        mine = [name for name in acts if name.startswith(side)]
        for name in mine:
            values = smooth(acts[name], kind, mask, feature_map=feature_map)
            term = lambdas[name] * (values.mean() if values.numel() else 0.0)
            loss = loss + weights[side] / len(mine) * term.sum()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return grads, {name: value.grad for name, value in lambdas.items() if value.grad is not None}


@pytest.mark.parametrize("feature_map", [False, True])
@pytest.mark.parametrize("recompute", ["none", "reentrant", "non-reentrant"])
@pytest.mark.parametrize(("seed", "kind"), list(enumerate(KINDS)))
def test_gradients_in_lambda_and_weights_are_those_of_the_built_loss(
    seed: int, kind: Kind, recompute: str, feature_map: bool
) -> None:
    model, inputs, masks = build(seed, kind)
    approximation = APPROXIMATIONS[seed % len(APPROXIMATIONS)]
    weights = {"encoder": 0.7, "decoder": 2.5}
    torch.manual_seed(seed)
    ours = twin(model, recompute)
    scales = scales_of(ours)

    want, want_lambda = reference(
        twin(model), scales, inputs, weights, masks, approximation.kind, feature_map=feature_map
    )
    probe = DensityProbe(ours.sites, fused=kind.fused)
    with probe.penalising(Penalty(approximation, weights, masks, scales=scales, feature_map=feature_map)):
        ours(*inputs).backward()

    got = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None and "stock" not in name}
    assert_gradients_close(got, want, 2e-6)
    by_name = dict(zip(probe.names, scales.parameters(), strict=True))
    for name, grad in want_lambda.items():
        assert by_name[name].grad is not None
        torch.testing.assert_close(by_name[name].grad.double(), grad, rtol=1e-4, atol=1e-6)


def test_a_scale_of_zero_is_a_skipped_block() -> None:
    model, inputs, _ = build(5)
    skipped = twin(model)
    for stack in (skipped.encoder, skipped.decoder):
        stack[0] = torch.nn.Identity()
    scales = scales_of(model, init=1.0, noise=0.0)
    with torch.no_grad():
        for name, scale in zip([site.name for site in model.sites], scales.parameters(), strict=True):
            scale.fill_(0.0 if name.endswith(".0") else 1.0)

    assert torch.equal(model(*inputs), skipped(*inputs))


@pytest.mark.parametrize("adapter", [Lora(4, 8.0, 0.0, "all-linear"), Bottleneck(16)], ids=["lora", "bottleneck"])
@pytest.mark.parametrize("name", ["t5", "bert", "roberta", "opt", "gpt2", "vit"])
@torch.no_grad()
def test_in_every_family_a_scale_of_zero_is_a_block_that_adds_nothing(
    tiny_models: dict[str, Path], name: str, adapter: Adapter
) -> None:
    """Nor does an adapter in it: its last layer and all that the adapter has there are set to zero beside."""
    base = load_base(str(tiny_models[name]), name)
    model = attach_adapter(base, adapter, outputs=None if name == "t5" else 3).eval()
    dice = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_" in key or "bottleneck_" in key:
            parameter.normal_(std=0.3, generator=dice)
    inputs = inputs_of(name, 3, 7)
    if name == "t5":
        inputs["labels"] = torch.full((3, 4), 9)
    whole = model(**inputs).logits
    scales = LayerScales(base.sites, init=1.0, noise=0.0, device=CPU)
    assert torch.equal(model(**inputs).logits, whole), "1 changes nothing"
    removed = [site for site in base.sites if site.name.endswith(".1")]
    for site, scale in zip(base.sites, scales.parameters(), strict=True):
        scale.fill_(0.0 if site in removed else 1.0)
    scaled = model(**inputs).logits
    scales.remove()

    for site in removed:
        for parameter in site.block.get_submodule(site.output).parameters():
            parameter.zero_()
    assert torch.equal(scaled, model(**inputs).logits)
    assert not torch.equal(scaled, whole)


def test_a_frozen_block_still_tells_its_lambda_how_dense_it_is() -> None:
    torch.manual_seed(0)
    model = TwoStacks(4, 6, 1, 1)
    model.requires_grad_(False)
    inputs = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    masks = {"encoder": torch.ones(2, 3), "decoder": torch.ones(2, 5)}
    scales = scales_of(model, init=0.5, noise=0.0)
    probe = DensityProbe(model.sites)
    penalty = Penalty(WIDE, {"encoder": 1e6, "decoder": 1e6}, masks, measure=True, scales=scales)
    with probe.penalising(penalty):
        model(*inputs).backward()

    grads = [float(scale.grad) for scale in scales.parameters() if scale.grad is not None]
    assert len(grads) == 2, "the encoder's feels the decoder's density too"
    assert grads[1] / 1e6 == pytest.approx(penalty.density("decoder"), rel=1e-3)


def test_scales_start_around_their_mean_and_within_bounds() -> None:
    torch.manual_seed(0)
    model = TwoStacks(2, 2, 150, 150)
    values = torch.tensor(list(scales_of(model, init=0.8, noise=0.05).by_layer().values()))

    assert float(values.mean()) == pytest.approx(0.8, abs=0.01)
    assert float(values.std()) == pytest.approx(0.05, abs=0.01)
    wide = torch.tensor(list(scales_of(model, init=0.9, noise=0.5).by_layer().values()))
    assert float(wide.min()) >= 0.0
    assert float(wide.max()) == 1.0


def test_removed_scales_leave_no_trace() -> None:
    model, inputs, _ = build(6)
    before = model(*inputs)
    scales = scales_of(model, init=0.3)
    assert not torch.equal(model(*inputs), before)

    scales.remove()

    assert torch.equal(model(*inputs), before)


@pytest.mark.parametrize(
    ("init", "noise", "message"),
    [
        (1.2, 0.0, r"lambda_init must be in \[0, 1\] \(got 1\.2\)"),
        (-0.1, 0.0, r"lambda_init must be in \[0, 1\] \(got -0\.1\)"),
        (0.5, -1.0, r"lambda_noise must be at least 0 \(got -1\.0\)"),
    ],
)
def test_bad_starts_are_refused(init: float, noise: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        LayerScales([], init=init, noise=noise, device=CPU)
