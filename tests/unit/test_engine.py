"""The learning rate's table, and what DeepSpeed is given to hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from deft_ray.train.engine import SlotModule, build_engine, learning_rate_at, set_learning_rate, whole
from deft_ray.train.ranks import Ranks

TABLES: list[tuple[dict[str, Any], list[float]]] = [
    # Four steps up, then down to nothing after the tenth.
    (
        {"steps": 10, "warmup_share": 0.4, "schedule": "linear"},
        [0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6],
    ),
    ({"steps": 4, "warmup_share": 0.0, "schedule": "linear"}, [1.0, 0.75, 0.5, 0.25]),
    ({"steps": 5, "warmup_share": 0.4, "schedule": "constant"}, [0.5, 1.0, 1.0, 1.0, 1.0]),
    ({"steps": 3, "warmup_share": 1.0, "schedule": "linear"}, [1 / 3, 2 / 3, 1.0]),
    # 6 % of 10 steps is no whole step.
    ({"steps": 10, "warmup_share": 0.06, "schedule": "constant"}, [1.0] * 10),
    ({"steps": 1, "warmup_share": 0.06, "schedule": "linear"}, [1.0]),
]


@pytest.mark.parametrize(("settings", "table"), TABLES)
def test_learning_rates_are_those_of_the_table(settings: dict[str, Any], table: list[float]) -> None:
    rates = [learning_rate_at(step, peak=3e-4, **settings) for step in range(len(table))]

    assert rates == pytest.approx([3e-4 * share for share in table], rel=1e-12)


class Toy(nn.Module):
    """A frozen layer and a trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.trained, self.dropout = nn.Linear(4, 4), nn.Linear(4, 1), nn.Dropout(0.5)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.trained(self.dropout(self.frozen(x))).square().mean()


def test_only_what_is_given_is_registered_and_its_stand_in_has_the_gradients() -> None:
    toy = Toy()
    module = SlotModule([toy.trained.weight, toy.trained.bias])

    assert [id(p) for p in module.parameters()] == [id(toy.trained.weight), id(toy.trained.bias)]
    assert list(module.state_dict()) == ["parameter_0", "parameter_1"]
    assert not any(isinstance(child, nn.Linear) for child in module.modules())
    gradient = torch.randn_like(toy.trained.weight)
    module([gradient, None]).backward()
    assert toy.trained.weight.grad is not None
    assert torch.equal(toy.trained.weight.grad, gradient)
    assert toy.trained.bias.grad is None


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_parameter_that_the_pass_did_not_use_stays(ranks: Ranks, zero_stage: int) -> None:
    """A layer may be left out of a pass, as OPT's layerdrop does."""
    used, unused = (nn.Parameter(torch.ones(3)) for _ in range(2))
    module = SlotModule([used, unused])
    none = {"weight_decay": 0.0, "max_grad_norm": 0.0}
    sizes = {"batch_size": 1, "micro_batch_size": 1, "accumulation": 1}
    engine = build_engine(module, learning_rate=0.5, zero_stage=zero_stage, **sizes, **none)
    engine.backward(engine([torch.ones(3), None]))
    engine.step()
    with whole(module):
        assert torch.equal(unused.detach(), torch.ones(3))
        assert used.detach().tolist() == pytest.approx([0.5] * 3), "the first step is as long as the rate"
    engine.destroy()


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_one_step_is_adamws(ranks: Ranks, zero_stage: int, accumulation: int) -> None:
    torch.manual_seed(0)
    toy, x = Toy(), torch.randn(4, 4)
    toy.eval()
    twin = Toy().eval()
    twin.load_state_dict(toy.state_dict())
    engine = build_engine(
        SlotModule([toy.trained.weight, toy.trained.bias]),
        batch_size=4,
        micro_batch_size=4 // accumulation,
        accumulation=accumulation,
        learning_rate=1.0,
        weight_decay=0.1,
        max_grad_norm=0.0,
        zero_stage=zero_stage,
    )
    optimizer = torch.optim.AdamW([twin.trained.weight, twin.trained.bias], lr=0.01, weight_decay=0.1)
    for _ in range(3):
        set_learning_rate(engine, 0.01)
        for part in x.chunk(accumulation):
            gradients = torch.autograd.grad(toy(part), [toy.trained.weight, toy.trained.bias])
            engine.backward(engine(list(gradients)))  # DeepSpeed divides by the number of passes
            engine.step()
        optimizer.zero_grad()
        twin(x).backward()
        optimizer.step()
    engine.destroy()

    torch.testing.assert_close(toy.trained.weight, twin.trained.weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(toy.trained.bias, twin.trained.bias, rtol=1e-6, atol=1e-7)
    assert torch.equal(toy.frozen.weight, twin.frozen.weight)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(("zero_stage", "exact"), [(0, True), (1, False), (2, False)])
def test_gradients_are_clipped_as_by_torch(ranks: Ranks, zero_stage: int, exact: bool, paged: bool) -> None:
    """At stage 0 bit for bit, where torch itself clips; bitsandbytes' optimizer is another in any case."""
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(size)) for size in (16, 8)]
    twins = [nn.Parameter(parameter.detach().clone()) for parameter in mine]
    optimizer = torch.optim.AdamW(twins, lr=0.01, weight_decay=0.1, fused=True)
    sizes = {"batch_size": 1, "micro_batch_size": 1, "accumulation": 1}
    how = {"learning_rate": 0.01, "weight_decay": 0.1, "max_grad_norm": 0.5, "zero_stage": zero_stage, "paged": paged}
    engine = build_engine(SlotModule(mine), **sizes, **how)
    for scale in (3.0, 0.01, 30.0):  # clipped, not clipped, clipped
        gradients = [scale * torch.randn_like(parameter) for parameter in mine]
        for twin, gradient in zip(twins, gradients, strict=True):
            twin.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_(twins, 0.5)
        optimizer.step()
        engine.backward(engine([gradient.clone() for gradient in gradients]))
        engine.step()
    engine.destroy()

    for parameter, twin in zip(mine, twins, strict=True):
        if exact and not paged:
            assert torch.equal(parameter, twin)
        torch.testing.assert_close(parameter, twin, rtol=1e-5, atol=1e-6)
