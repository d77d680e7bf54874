"""The probe's injected gradient against a density loss that is really built, and its counts against numpy's."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers.activations import NewGELUActivation

from deft_ray.density.activation import MlpActivation
from deft_ray.density.approximations import L0, L1, L2, Approximation, Sigmoid, Tanh
from deft_ray.density.chunks import chunks
from deft_ray.density.counts import TAUS, DensityCounts
from deft_ray.density.probe import DensityProbe, Penalty, _feature_map
from deft_ray.density.sites import Site

WIDE = L0(1e-2)
APPROXIMATIONS: list[Approximation] = [WIDE, Tanh(2.0), Sigmoid(3.0), L1(), L2()]
SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "l0": lambda act: act**2 / (act**2 + 1e-2),
    "tanh": lambda act: torch.tanh(2.0 * act),
    "sigmoid": lambda act: 2 * torch.sigmoid(3.0 * act.abs()) - 1,
    "l1": lambda act: act.abs(),
    "l2": lambda act: act * act,
}


@dataclass(frozen=True)
class Kind:
    """A kind of MLP block."""

    act: Callable[[], nn.Module] = nn.GELU
    gated: bool = False
    fused: bool = False


class Block(nn.Module):
    """An MLP block whose activation is seen."""

    def __init__(self, d_model: int, d_ff: int, kind: Kind) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(d_model, d_ff), kind.act(), nn.Linear(d_ff, d_model)
        self.linear = nn.Linear(d_model, d_ff) if kind.gated else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        act_BTF = self.act(self.first(x_BTD))
        return x_BTD + self.second(act_BTF if self.linear is None else act_BTF * self.linear(x_BTD))

    def gate(self, activation: MlpActivation, x_BTD: Tensor) -> Tensor:
        assert self.linear is not None
        out: Tensor = x_BTD + self.second(activation.gate(self.first(x_BTD), self.linear(x_BTD)))
        return out


class TwoStacks(nn.Module):
    """An encoder and a decoder of blocks; the decoder sees the encoder's mean."""

    def __init__(
        self, d_model: int, d_ff: int, encoder: int, decoder: int, recompute: str = "none", kind: Kind | None = None
    ) -> None:
        super().__init__()
        self.kind = kind or Kind()
        self.encoder = nn.ModuleList([Block(d_model, d_ff, self.kind) for _ in range(encoder)])
        self.decoder = nn.ModuleList([Block(d_model, d_ff, self.kind) for _ in range(decoder)])
        self._run: Any = {
            "none": lambda block, x: block(x),
            "reentrant": partial(checkpoint, use_reentrant=True),
            "non-reentrant": partial(checkpoint, use_reentrant=False),
        }[recompute]

    @property
    def sites(self) -> list[Site]:
        return [
            Site(f"{side}.{index}", block, "act", "second", Block.gate if self.kind.gated else None)
            for side in ("encoder", "decoder")
            for index, block in enumerate(getattr(self, side))
        ]

    def forward(self, source_BTD: Tensor, target_BTD: Tensor) -> Tensor:
        source_BTD = source_BTD.clone().requires_grad_()  # reentrant checkpointing wants one input with a gradient
        for block in self.encoder:
            source_BTD = self._run(block, source_BTD)
        target_BTD = target_BTD + source_BTD.mean(dim=1, keepdim=True)
        for block in self.decoder:
            target_BTD = self._run(block, target_BTD)
        return target_BTD.square().mean() + source_BTD.sin().mean()


def reference(
    model: TwoStacks,
    inputs: tuple[Tensor, Tensor],
    kind: str,
    weights: Any,
    masks: Any,
    dtype: torch.dtype = torch.float64,
    *,
    feature_map: bool = False,
) -> dict[str, Tensor]:
    """Gradients of task loss + Σ_side weight x density loss, with the activations kept."""
    model = model.to(dtype)
    acts: dict[str, Tensor] = {}
    hooks = [s.module.register_forward_hook(lambda _m, _i, out, n=s.name: acts.update({n: out})) for s in model.sites]
    loss = model(*(part.to(dtype) for part in inputs))
    for side, mask in masks.items():
        mine = [act for name, act in acts.items() if name.startswith(side)]
        real = [smooth(act, kind, mask, feature_map=feature_map) for act in mine]
        loss = loss + weights[side] * sum(values.mean() for values in real if values.numel()) / max(1, len(mine))
    loss.backward()
    for hook in hooks:
        hook.remove()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def smooth(act: Tensor, kind: str, mask: Tensor, *, feature_map: bool) -> Tensor:
    """The approximation of each activation of the real tokens, or of each neuron's mean over them."""
    real = act[mask.bool()]
    return SMOOTH[kind](real.mean(dim=0) if feature_map and len(real) else real)


@torch.no_grad()
def built_densities(
    model: TwoStacks, inputs: tuple[Tensor, Tensor], kind: str, masks: Any, *, feature_map: bool = False
) -> dict[str, float]:
    """Smooth density of each side over its real tokens, mean over layers."""
    acts: dict[str, Tensor] = {}
    hooks = [s.module.register_forward_hook(lambda _m, _i, out, n=s.name: acts.update({n: out})) for s in model.sites]
    model(*(part.double() for part in inputs))
    for hook in hooks:
        hook.remove()
    found = {}
    for side, mask in masks.items():
        mine = [act for name, act in acts.items() if name.startswith(side)]
        real = [smooth(act, kind, mask, feature_map=feature_map) for act in mine]
        found[side] = sum(float(values.mean()) for values in real if values.numel()) / max(1, len(real))
    return found


def probed(model: TwoStacks, inputs: tuple[Tensor, Tensor], penalty: Penalty) -> dict[str, Tensor]:
    probe = DensityProbe(model.sites, fused=model.kind.fused)
    with probe.penalising(penalty):
        model(*inputs).backward()
    probe.remove()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def build(seed: int, kind: Kind | None = None) -> tuple[TwoStacks, tuple[Tensor, Tensor], dict[str, Tensor]]:
    """A model, inputs and masks of random shapes."""
    torch.manual_seed(seed)
    d_model, d_ff, rows, source, target, encoder, decoder = (int(torch.randint(1, 7, ())) for _ in range(7))
    model = TwoStacks(d_model, d_ff, encoder, decoder, kind=kind)
    inputs = torch.randn(rows, source, d_model), torch.randn(rows, target, d_model)
    masks = {
        side: (torch.rand(rows, x.shape[1]) < 0.6).long()
        for side, x in zip(("encoder", "decoder"), inputs, strict=True)
    }
    return model, inputs, masks


def twin(model: TwoStacks, recompute: str = "none") -> TwoStacks:
    """A copy, to be differentiated by itself."""
    first = model.encoder[0]
    assert isinstance(first, Block)
    sizes = first.first.in_features, first.first.out_features, len(model.encoder), len(model.decoder)
    copy = TwoStacks(*sizes, recompute, model.kind)
    copy.load_state_dict(model.state_dict())
    return copy


def assert_gradients_close(
    got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float, plain: dict[str, Tensor] | None = None
) -> None:
    """In units of the largest; where ``plain`` is given, what autograd alone is off in ``got``'s dtype is let pass."""
    assert got.keys() == want.keys()
    scale = max(float(grad.abs().max()) for grad in want.values())
    for name, grad in want.items():
        rounding = 0.0 if plain is None else apart(plain[name], grad)
        assert apart(got[name], grad) <= tolerance * scale + rounding, name


def apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


KINDS = [
    Kind(),
    Kind(nn.ReLU),
    Kind(nn.SiLU, gated=True),
    Kind(NewGELUActivation),
    Kind(NewGELUActivation, gated=True),
    Kind(NewGELUActivation, gated=True, fused=True),
    Kind(nn.ReLU, gated=True, fused=True),
    Kind(partial(nn.GELU, approximate="tanh"), fused=True),
]


@pytest.mark.parametrize("feature_map", [False, True])
@pytest.mark.parametrize("recompute", ["none", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("approximation", APPROXIMATIONS, ids=lambda a: a.kind)
@pytest.mark.parametrize(("seed", "kind"), list(enumerate(KINDS)))
def test_injected_gradient_is_that_of_the_built_loss(
    seed: int, kind: Kind, approximation: Approximation, recompute: str, feature_map: bool
) -> None:
    model, inputs, masks = build(seed, kind)
    weights = {"encoder": 0.7 + seed, "decoder": 2.5}

    want = reference(twin(model), inputs, approximation.kind, weights, masks, feature_map=feature_map)
    penalty = Penalty(approximation, weights, masks, feature_map=feature_map)
    got = probed(twin(model, recompute), inputs, penalty)

    assert_gradients_close(got, want, 2e-6)


@pytest.mark.parametrize("seed", range(100, 160))
def test_whatever_the_block_the_loss_the_shapes_and_the_padding(seed: int) -> None:
    """All of them drawn together; in every third case a row is nothing but padding, in every seventh a whole side.

    Every fifth model computes in bfloat16, which the float64 reference starts from. There two roundings of an
    activation, 2^-9 each, can bend the slope of an approximation by some percent.
    """
    dice = random.Random(seed)
    kind, approximation, feature_map = dice.choice(KINDS), dice.choice(APPROXIMATIONS), dice.random() < 0.4
    model, inputs, masks = build(seed, kind)
    dtype, close = (torch.bfloat16, 0.03) if seed % 5 == 0 else (torch.float32, 2e-6)
    model, inputs = model.to(dtype), (inputs[0].to(dtype), inputs[1].to(dtype))
    if seed % 3 == 0:
        masks["encoder"][0] = 0
    if seed % 7 == 0:
        masks["decoder"][:] = 0
    weights = {"encoder": dice.choice([0.0, 0.3, 5.0]), "decoder": dice.uniform(0.1, 9.0)}

    want, plain = (
        reference(twin(model), inputs, approximation.kind, weights, masks, precision, feature_map=feature_map)
        for precision in (torch.float64, dtype)
    )
    recompute = dice.choice(["none", "reentrant", "non-reentrant"])
    penalty = Penalty(approximation, weights, masks, measure=True, feature_map=feature_map)
    got = probed(twin(model, recompute).to(dtype), inputs, penalty)

    assert_gradients_close(got, want, close, plain)
    double = twin(model).double()
    for side, density in built_densities(double, inputs, approximation.kind, masks, feature_map=feature_map).items():
        assert penalty.density(side) == pytest.approx(density, rel=close, abs=close)


@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[5]])
def test_a_compiled_model_gets_the_same_gradient_step_after_step(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """With batches, weights and ε that change, as in a training with ``epsilon_end``."""
    torch._dynamo.reset()
    model, _, _ = build(3, kind)
    ours, theirs = twin(model), twin(model)
    compiled = torch.compile(ours, backend="aot_eager")
    probe = DensityProbe(ours.sites, fused=kind.fused)
    width = ours.encoder[0].first.in_features  # type: ignore[union-attr]
    epsilons = (1e-1, 1e-1, 1e-2, 1e-3)
    for step, (rows, tokens) in enumerate(((2, 3), (2, 3), (4, 2), (4, 2))):
        inputs = torch.randn(rows, tokens, width), torch.randn(rows, tokens + 1, width)
        masks = {"encoder": torch.ones(rows, tokens), "decoder": torch.ones(rows, tokens + 1)}
        weights = {"encoder": 0.5 + step, "decoder": 2.5}
        ours.zero_grad()
        theirs.zero_grad()
        with probe.penalising(Penalty(L0(epsilons[step]), weights, masks)):
            compiled(*inputs).backward()
        monkeypatch.setitem(SMOOTH, "l0", lambda act, eps=epsilons[step]: act**2 / (act**2 + eps))
        want = reference(twin(theirs), inputs, "l0", weights, masks)
        got = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
        assert_gradients_close(got, want, 2e-6)


@pytest.mark.parametrize("weights", [{"encoder": 3.0, "decoder": 0.0}, {"encoder": 0.0, "decoder": 3.0}])
def test_each_side_has_its_own_weight(weights: dict[str, float]) -> None:
    model, inputs, masks = build(7)

    want = reference(twin(model), inputs, "l0", weights, masks)
    got = probed(twin(model), inputs, Penalty(WIDE, weights, masks))

    assert_gradients_close(got, want, 2e-6)


def test_bfloat16_model_gets_the_same_gradient_to_its_precision() -> None:
    torch.manual_seed(3)
    model = TwoStacks(16, 32, 2, 2).bfloat16()
    inputs = torch.randn(4, 9, 16).bfloat16(), torch.randn(4, 5, 16).bfloat16()
    masks = {"encoder": torch.ones(4, 9).long(), "decoder": torch.ones(4, 5).long()}
    weights = {"encoder": 1.0, "decoder": 1.0}

    want = reference(twin(model), inputs, "l0", weights, masks)
    got = probed(model, inputs, Penalty(WIDE, weights, masks))

    assert all(grad.dtype == torch.bfloat16 for grad in got.values())
    assert_gradients_close(got, want, 0.02)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.fused])
def test_without_a_weight_outputs_and_gradients_are_bit_identical(kind: Kind) -> None:
    model, inputs, masks = build(11, kind)
    plain, silent = twin(model), twin(model)
    plain(*inputs).backward()
    output = plain(*inputs)

    got = probed(silent, inputs, Penalty(WIDE, {"encoder": 0.0, "decoder": 0.0}, masks, measure=True))

    probe = DensityProbe(silent.sites)
    with probe.penalising(Penalty(WIDE, {"encoder": 5.0, "decoder": 5.0}, masks)):
        assert torch.equal(silent(*inputs), output), "a penalty must not change what the model says"
    probe.remove()
    for name, parameter in plain.named_parameters():
        assert parameter.grad is None or torch.equal(got[name], parameter.grad)


@pytest.mark.parametrize("sizes", [(4,), (2, 2), (1, 3), (1, 1, 1, 1)])
def test_micro_batches_with_their_share_add_up_to_the_whole_batch(sizes: tuple[int, ...]) -> None:
    torch.manual_seed(5)
    model = TwoStacks(6, 10, 2, 3)
    inputs = torch.randn(4, 7, 6), torch.randn(4, 5, 6)
    lengths = torch.tensor([7, 2, 4, 1]), torch.tensor([1, 5, 3, 2])
    masks = {
        side: (torch.arange(x.shape[1]) < length.unsqueeze(1)).long()
        for side, x, length in zip(("encoder", "decoder"), inputs, lengths, strict=True)
    }
    alpha = 1.5
    whole, parts = twin(model), twin(model)
    probe = DensityProbe(parts.sites)

    # The density gradient alone: the task gradient of this toy is not a sum over rows.
    want = probed(whole, inputs, Penalty(WIDE, {"encoder": alpha, "decoder": alpha}, masks))
    task = twin(model)
    task(*inputs).backward()
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        mine = {side: mask[rows] for side, mask in masks.items()}
        weights = {side: alpha * int(mine[side].sum()) / int(masks[side].sum()) for side in masks}
        with probe.penalising(Penalty(WIDE, weights, mine)):
            (0.0 * parts(inputs[0][rows], inputs[1][rows])).backward()
        start += size

    added = {name: parameter.grad for name, parameter in parts.named_parameters() if parameter.grad is not None}
    plain = {name: parameter.grad for name, parameter in task.named_parameters() if parameter.grad is not None}
    assert_gradients_close({name: plain[name] + grad for name, grad in added.items()}, want, 2e-6)


#: Kind of block, how it is computed again, and whether the loss is of the feature map.
DISTRIBUTED = list(product((KINDS[0], KINDS[5]), ("none", "non-reentrant"), (False, True)))
ALPHAS = {"encoder": 1.5, "decoder": 4.0}


def four_rows(kind: Kind) -> tuple[TwoStacks, tuple[Tensor, Tensor], dict[str, Tensor]]:
    """Model, inputs and masks; of the real tokens the first two rows have 13 and 3, by side, the others 3 and 9."""
    torch.manual_seed(5)
    model = TwoStacks(6, 10, 2, 3, kind=kind)
    inputs = torch.randn(4, 7, 6), torch.randn(4, 5, 6)
    lengths = torch.tensor([7, 6, 1, 2]), torch.tensor([1, 2, 5, 4])
    masks = {
        side: (torch.arange(x.shape[1]) < length.unsqueeze(1)).long()
        for side, x, length in zip(("encoder", "decoder"), inputs, lengths, strict=True)
    }
    return model, inputs, masks


def two_rows(
    rank: int, inputs: tuple[Tensor, Tensor], masks: dict[str, Tensor]
) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    """The inputs and masks of one process."""
    rows = slice(2 * rank, 2 * rank + 2)
    return (inputs[0][rows], inputs[1][rows]), {side: mask[rows] for side, mask in masks.items()}


def train_two_rows(rank: int, folder: Path) -> None:
    """One of two processes: leave the gradients that torch has averaged."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = []
    for kind, recompute, feature_map in DISTRIBUTED:
        model, inputs, masks = four_rows(kind)
        inputs, mine = two_rows(rank, inputs, masks)
        weights = {side: 2 * ALPHAS[side] * int(mine[side].sum()) / int(masks[side].sum()) for side in masks}
        model = twin(model, recompute)
        probe, parallel = DensityProbe(model.sites, fused=kind.fused), DistributedDataParallel(model)
        with probe.penalising(Penalty(WIDE, weights, mine, feature_map=feature_map)):
            parallel(*inputs).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.save(found, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


def test_ranks_with_their_share_average_to_the_whole_batch(tmp_path: Path) -> None:
    """By torch's own DistributedDataParallel, where ranks have unlike numbers of real tokens.

    A loss of the feature map is of each rank's own map, by its share of the tokens.
    """
    spawn(train_two_rows, args=(tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2))
    for place, (kind, _, feature_map) in enumerate(DISTRIBUTED):
        model, inputs, masks = four_rows(kind)
        halves = [two_rows(rank, inputs, masks) for rank in range(2)]
        assert all(torch.equal(second[place][name], grad) for name, grad in first[place].items())
        if feature_map:
            weighed = [
                {side: 2 * ALPHAS[side] * int(mine[side].sum()) / int(masks[side].sum()) for side in masks}
                for _, mine in halves
            ]
            one, other = (
                reference(twin(model), half, "l0", weights, mine, feature_map=True)
                for (half, mine), weights in zip(halves, weighed, strict=True)
            )
            assert_gradients_close(first[place], {name: (one[name] + other[name]) / 2 for name in one}, 2e-6)
            continue
        want = reference(twin(model), inputs, "l0", ALPHAS, masks)
        assert_gradients_close(first[place], want, 2e-6)
        alone = [reference(twin(model), half, "l0", ALPHAS, mine) for half, mine in halves]
        unweighed = {name: sum(grads[name] for grads in alone) / 2 for name in want}
        assert max(apart(unweighed[name], grad) for name, grad in want.items()) > 0.01, "the shares have to matter"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_feature_map_of_a_layer_in_several_pieces_is_each_neurons_mean(dtype: torch.dtype) -> None:
    act = (torch.randn(80, 8, 2048, generator=torch.Generator().manual_seed(0)) + 1.0).to(dtype)
    mask = (torch.rand(80, 8, generator=torch.Generator().manual_seed(1)) < 0.6).float()
    assert len(list(chunks(act.reshape(-1, 2048)))) > 4
    got = _feature_map(act, mask.reshape(-1) / (mask.sum() * 2048))
    torch.testing.assert_close(got.double(), act.double()[mask.bool()].mean(dim=0), rtol=1e-5, atol=0.0)


def test_a_feature_map_can_vanish_where_no_activation_does() -> None:
    """Activations of both signs cancel in a neuron's mean, and the loss of the mean is content with it."""
    torch.manual_seed(0)
    model = TwoStacks(3, 4, 1, 1, kind=Kind(nn.Identity))
    first = model.encoder[0].first
    assert isinstance(first, nn.Linear)
    nn.init.zeros_(first.bias)
    row = torch.randn(1, 1, 3)
    inputs, masks = (torch.cat([row, -row], dim=1), torch.randn(1, 2, 3)), {side: torch.ones(1, 2) for side in ALPHAS}

    densities = []
    for feature_map in (False, True):
        penalty = Penalty(WIDE, {"encoder": 1.0, "decoder": 0.0}, masks, measure=True, feature_map=feature_map)
        probed(twin(model), inputs, penalty)
        densities.append(penalty.density("encoder"))

    assert densities == [pytest.approx(0.7, abs=0.3), pytest.approx(0.0, abs=1e-9)]


def test_measured_density_is_the_mean_over_layers_of_real_tokens() -> None:
    model, inputs, masks = build(2)
    penalty = Penalty(WIDE, {"encoder": 1.0, "decoder": 1.0}, masks, measure=True)
    acts: list[Tensor] = []
    probed(model, inputs, penalty)
    for site in model.sites:
        site.module.register_forward_hook(lambda _m, _i, out: acts.append(out))
    model(*inputs)

    count = len(model.encoder)
    encoder = np.mean([SMOOTH["l0"](act)[masks["encoder"].bool()].mean().item() for act in acts[:count]])
    assert penalty.density("encoder") == pytest.approx(encoder, rel=1e-5)
    assert Penalty(WIDE, {"encoder": 1.0}, masks).density("encoder") is None


def test_an_all_padding_micro_batch_adds_nothing() -> None:
    model, inputs, masks = build(4)
    empty = {side: torch.zeros_like(mask) for side, mask in masks.items()}
    plain = twin(model)
    plain(*inputs).backward()

    got = probed(twin(model), inputs, Penalty(WIDE, {"encoder": 9.0, "decoder": 9.0}, empty))

    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(got[name], parameter.grad), name


def test_frozen_activations_are_left_alone() -> None:
    model, inputs, masks = build(4)
    model.requires_grad_(False)
    probe = DensityProbe(model.sites)
    with probe.penalising(Penalty(WIDE, {"encoder": 9.0, "decoder": 9.0}, masks)), torch.no_grad():
        assert not model(*inputs).requires_grad
    probe.remove()


def numpy_counts(act: Tensor, mask: Tensor) -> list[int]:
    values, real = act.float().numpy(), mask.numpy().astype(bool)
    kept = values[real]
    row = [np.count_nonzero(kept), kept.size, np.count_nonzero(values), values.size]
    return [int(number) for number in [*row, *(np.count_nonzero(np.abs(kept) > np.float32(tau)) for tau in TAUS)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("real", [0.0, 0.5, 1.0])
def test_counts_are_numpys(real: float, dtype: torch.dtype) -> None:
    dice = torch.Generator().manual_seed(1)
    total: list[list[int]] = [[0] * 7, [0] * 7]
    used = np.zeros((2, 11), dtype=bool)
    counts = DensityCounts.empty(["encoder.0", "decoder.0"], feature_map=True)
    for rows, tokens in ((3, 5), (1, 1), (4, 2)):
        for index in range(2):
            act = torch.relu(torch.randn(rows, tokens, 11, generator=dice) * 0.05).to(dtype)
            mask = (torch.rand(rows, tokens, generator=dice) < real).long()
            counts.add(index, act, mask)
            total[index] = [a + b for a, b in zip(total[index], numpy_counts(act, mask), strict=True)]
            used[index] |= (act.float().numpy()[mask.numpy().astype(bool)] != 0).any(axis=0)

    assert counts.rows.tolist() == total
    both = [a + b for a, b in zip(*total, strict=True)]
    assert counts.density() == (both[0] / both[1] if both[1] else None)
    assert counts.density_paper() == both[2] / both[3]
    assert counts.density("encoder") == (total[0][0] / total[0][1] if total[0][1] else None)
    assert counts.density_at_tau() == (
        {f"{tau:g}": both[4 + i] / both[1] for i, tau in enumerate(TAUS)} if both[1] else {}
    )
    layers = zip(("encoder.0", "decoder.0"), total, strict=True)
    assert counts.density_layers() == {name: mine[0] / mine[1] for name, mine in layers if mine[1]}
    assert counts.density_feature_map() == (used.mean() if both[1] else None)


@pytest.mark.parametrize("seed", range(60))
def test_counts_are_numpys_whatever_the_shape_and_dtype(seed: int) -> None:
    """From one element to several pieces of a layer, strided too, and with rows laid end to end as OPT has them."""
    dice, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, tokens, width = dice.randint(1, 9), dice.randint(1, 40), dice.choice([1, 7, 64, 2048])
    act = torch.randn(rows, tokens, 2 * width, generator=noise) * dice.choice([1e-4, 0.01, 1.0])
    act[torch.rand(act.shape, generator=noise) < dice.random()] = 0.0
    act = act[..., ::2] if seed % 2 else act[..., :width].contiguous()
    act = act.to(dice.choice([torch.float32, torch.bfloat16, torch.float64]))
    mask = (torch.rand(rows, tokens, generator=noise) < dice.choice([0.0, 0.3, 1.0])).long()
    counts = DensityCounts.empty(["encoder.0"], feature_map=True)
    counts.add(0, act.reshape(-1, width) if seed % 5 == 0 else act, mask)
    assert counts.rows.tolist() == [numpy_counts(act, mask)]
    used = (act.float().numpy()[mask.numpy().astype(bool)] != 0).any(axis=0)
    assert (counts.often[0] > 0).tolist() == used.tolist()


def test_a_feature_map_is_of_the_real_tokens_of_all_batches_and_ranks() -> None:
    """A neuron that fires at padding alone is not used; one that fires once, wherever, is."""
    first, second = (DensityCounts.empty(["encoder.0", "encoder.1"], feature_map=True) for _ in range(2))
    real, act = torch.tensor([[1, 1, 0]]), torch.zeros(1, 3, 4)
    act[0, 2, 0] = act[0, 1, 1] = 1.0
    first.add(0, act, real)
    first.add(0, 0 * act, real)
    first.add(1, 0 * act, real)
    second.add(0, act.roll(1, dims=-1) * -1e-30, real)
    assert first.density_feature_map() == 1 / 8
    assert second.density_feature_map() == 1 / 4
    first.join(first.rows + second.rows, [first.often, second.often, {}])
    assert first.density_feature_map() == 2 / 8


def test_a_nan_counts_as_non_zero_and_above_no_threshold() -> None:
    act = torch.tensor([[[float("nan"), 0.0, float("inf"), -0.0]]])
    counts = DensityCounts.empty(["encoder.0"])
    counts.add(0, act, torch.ones(1, 1))

    assert counts.rows.tolist() == [numpy_counts(act, torch.ones(1, 1))]
    assert counts.rows.tolist() == [[2, 4, 2, 4, 1, 1, 1]]


def test_an_encoder_alone_has_no_decoder_density() -> None:
    model = TwoStacks(4, 6, 2, 0)
    probe = DensityProbe(model.sites)
    counts = DensityCounts.empty(probe.names)
    with probe.counting(counts, {"encoder": torch.ones(2, 3)}):
        model(torch.randn(2, 3, 4), torch.randn(2, 1, 4))
    probe.remove()

    assert counts.density("decoder") is None
    assert counts.density() == counts.density("encoder") == 1.0
    assert list(counts.density_layers()) == ["encoder.0", "encoder.1"]


def test_counting_sees_only_what_is_inside_and_only_masked_sides() -> None:
    model, inputs, masks = build(9)
    probe = DensityProbe(model.sites)
    counts = DensityCounts.empty(probe.names)
    model(*inputs)
    with probe.counting(counts, {"decoder": masks["decoder"]}):
        model(*inputs)
    model(*inputs)
    assert counts.rows[: len(model.encoder)].sum() == 0
    assert (
        counts.rows[len(model.encoder)][3]
        == inputs[1].shape[0] * inputs[1].shape[1] * model.decoder[0].first.out_features
    )  # type: ignore[union-attr]

    probe.remove()
    with probe.counting(DensityCounts.empty(probe.names), masks):
        model(*inputs)
    assert all(type(site.module) is nn.GELU for site in model.sites)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[5]])
def test_no_row_at_all_is_neither_counted_nor_a_loss(kind: Kind) -> None:
    model, inputs, masks = build(4, kind)
    none, nobody = (inputs[0][:0], inputs[1][:0]), {side: mask[:0] for side, mask in masks.items()}
    probe, counts = DensityProbe(model.sites, fused=kind.fused), DensityCounts.empty([s.name for s in model.sites])
    penalty = Penalty(WIDE, {"encoder": 9.0, "decoder": 9.0}, nobody, measure=True)
    with probe.counting(counts, nobody), torch.no_grad():
        model(*none)
    with probe.penalising(penalty):
        (0.0 * model(*none)).nan_to_num().backward()  # the toy's own mean over nothing is no number
    probe.remove()
    assert int(counts.rows.abs().sum()) == 0
    assert penalty.density("encoder") == penalty.density("decoder") == 0.0
