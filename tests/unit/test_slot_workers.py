"""Slots on two and three workers against the same on one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from deft_ray.models.base import Base, load_base
from deft_ray.spec.schema import TrialSpec
from deft_ray.train.ranks import Ranks
from tests.slots import EPSILON, new_slot, start_worker, weights, worst

Row = dict[str, Any]
#: (task, ZeRO stage, micro-batch, layer scales).
CASES: tuple[tuple[str, int, int | None, bool], ...] = (
    ("mrpc", 0, None, False),
    ("squad", 2, 1, False),
    ("mrpc", 3, None, False),
    ("mrpc", 0, 1, True),
    ("mrpc", 3, None, True),
)


@pytest.fixture(scope="module")
def specs(trial: Callable[..., TrialSpec]) -> list[TrialSpec]:
    return [
        trial(
            "dry-t5",
            task,
            deft__alpha=2.0,
            deft__epsilon=EPSILON,
            deft__adaptive=adaptive,
            train__zero_stage=stage,
            train__micro_batch_size=micro,
        )
        for task, stage, micro, adaptive in CASES
    ]


def work(rank: int, world: int, folder: Path, specs: list[TrialSpec]) -> None:
    """One of several workers: train and evaluate every trial, leave what came of it."""
    ranks = start_worker(rank, world, folder)
    base = load_base(specs[0].model.name, "t5")
    left = [train_and_evaluate(spec, base, ranks) for spec in specs]
    torch.save(left, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


def train_and_evaluate(spec: TrialSpec, base: Base, ranks: Ranks) -> Row:
    slot = new_slot(spec, base, ranks)
    results = [slot.step(measure=True) for _ in range(slot.steps)]
    sums = ranks.total(torch.tensor([[r.task_loss, r.density_loss, r.penalty] for r in results], dtype=torch.float64))
    found = slot.evaluate()
    with slot.whole():
        adapter = weights(slot.model) | {name: torch.tensor(value) for name, value in slot.lambdas().items()}
    left = {"losses": sums, "adapter": adapter, "counts": found.counts.rows, "scores": found.scores}
    slot.close()
    return left


@pytest.fixture(scope="module", params=[2, 3])
def workers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, specs: list[TrialSpec]
) -> list[list[Row]]:
    """What each of two workers left, and of three."""
    folder = tmp_path_factory.mktemp("workers")
    spawn(work, args=(request.param, folder, specs), nprocs=request.param)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(request.param)]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_several_workers_are_one_to_rounding(
    workers: list[list[Row]],
    case: int,
    specs: list[TrialSpec],
    base_of: Callable[[TrialSpec], Base],
    ranks: Ranks,
) -> None:
    first, *others = (left[case] for left in workers)
    alone = train_and_evaluate(specs[case], base_of(specs[case]), ranks)

    for other in others:
        assert all(torch.equal(first["adapter"][name], other["adapter"][name]) for name in first["adapter"])
        assert torch.equal(first["counts"], other["counts"])
        assert first["scores"] == other["scores"]
    torch.testing.assert_close(first["losses"], alone["losses"], rtol=2e-5, atol=1e-6)
    assert worst(first["adapter"], alone["adapter"]) < 5e-3
    assert torch.equal(first["counts"][:, 1], alone["counts"][:, 1])
    assert float((first["counts"] - alone["counts"])[:, 0].abs().sum() / alone["counts"][:, 1].sum()) < 1e-4
    assert first["scores"] == pytest.approx(alone["scores"], abs=1e-6)
