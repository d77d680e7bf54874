"""Slots on two and three workers against the same on one: every family with every adapter that it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from deft_ray.models.base import Base, load_base
from deft_ray.spec.catalog import FAMILY_ADAPTERS
from deft_ray.spec.schema import TrialSpec
from deft_ray.train.evaluation import Evaluation
from deft_ray.train.ranks import Ranks
from deft_ray.train.slot import Slot
from tests.slots import EPSILON, new_slot, same, start_worker, taken_gradient, weights, worst

Leaves = dict[str, Any]
Left = dict[str, Any]
#: Model, kind of adapter, task, ZeRO stage, further leaves.
Case = tuple[str, str, str, int, Leaves]

#: Passes of one example each: they have unlike numbers of tokens.
SINGLES: Leaves = {"train__micro_batch_size": 1}
#: Passes of two, padded to the longer: three in a step on two workers, two on three.
PAIRS: Leaves = {"train__batch_size": 12, "train__micro_batch_size": 2}
ADAPTIVE: Leaves = {"deft__adaptive": True}
CHECKPOINTING: Leaves = {"train__gradient_checkpointing": True}
NF4: Leaves = {"model__quantization": "nf4"}
BF16: Leaves = {"model__dtype": "bfloat16"}

CASES: tuple[Case, ...] = (
    ("t5", "lora", "mrpc", 0, {}),
    ("t5", "lora", "squad", 2, SINGLES),
    ("t5", "lora", "mrpc", 3, {}),
    ("t5", "lora", "mrpc", 0, SINGLES | ADAPTIVE),
    ("t5", "lora", "mrpc", 3, ADAPTIVE),
    ("t5", "lora", "mrpc", 2, {"train__optimizer": "paged_adamw"}),
    ("t5", "lora", "mrpc", 3, CHECKPOINTING),
    ("t5", "lora", "squad", 2, SINGLES | CHECKPOINTING),
    ("t5", "lora", "mrpc", 2, NF4),
    ("t5", "lora", "mrpc", 2, NF4 | ADAPTIVE),
    ("t5", "lora", "mrpc", 3, NF4 | CHECKPOINTING),
    ("t5", "lora", "mrpc", 2, BF16 | SINGLES),
    ("t5", "bottleneck", "mrpc", 1, SINGLES),
    ("t5", "prefix", "squad", 2, PAIRS),
    ("t5", "prompt", "stsb", 3, {}),
    ("bert", "lora", "stsb", 0, SINGLES),
    ("bert", "bottleneck", "rte", 2, PAIRS),
    ("bert", "prefix", "mnli", 1, {}),
    ("bert", "prompt", "qnli", 3, {}),
    ("bert", "lora", "rte", 3, CHECKPOINTING),
    ("bert", "lora", "mrpc", 1, NF4 | SINGLES),
    ("bert", "bottleneck", "rte", 2, BF16),
    ("roberta", "lora", "stsb", 3, {}),
    ("roberta", "bottleneck", "qnli", 0, {**SINGLES, "adapter__reads": "sum"}),
    ("roberta", "prefix", "rte", 0, PAIRS),
    ("roberta", "prompt", "mrpc", 2, {}),
    ("opt", "lora", "sst2", 1, PAIRS),
    ("opt", "bottleneck", "rte", 3, {}),
    ("narrow-opt", "lora", "qnli", 2, {}),
    ("narrow-opt", "bottleneck", "mrpc", 0, SINGLES),
    ("gpt2", "lora", "qnli", 2, PAIRS),
    ("gpt2", "bottleneck", "stsb", 1, {**SINGLES, "adapter__head": "two-layer"}),
    ("vit", "lora", "cifar10", 3, SINGLES),
    ("vit", "bottleneck", "images", 0, {}),
)

RATES = {"lora": 0.01, "bottleneck": 0.01, "prefix": 0.05, "prompt": 0.1}
#: How far the adapters of several workers and of one may lie apart, in units of their largest value: all entries but
#: one of ten thousand, whose gradient is rounding alone.
APART = {"lora": 5e-3, "bottleneck": 1e-3, "prefix": 1e-4, "prompt": 1e-4}
#: The same of all but one of a thousand.
MOST = 5e-4
#: The same of the first gradient and, as a share, of the losses: bfloat16 rounds every product to 8 bits, and a batch
#: that is split otherwise has others. A loss or a gradient scaled by the number of workers is off by 1 or more.
CLOSE = {"float32": (1e-4, 2e-5), "bfloat16": (5e-2, 5e-2)}


def title(case: Case) -> str:
    """For example ``t5-lora-squad-zero2-micro_batch_size=1``."""
    model, kind, task, stage, leaves = case
    return "-".join([model, kind, task, f"zero{stage}", *(f"{k.split('__')[1]}={v}" for k, v in leaves.items())])


@pytest.fixture(scope="module")
def specs(trial: Callable[..., TrialSpec]) -> list[TrialSpec]:
    """The cases as trials; dropout would draw other numbers on other workers."""
    common = {"deft__alpha": 2.0, "deft__epsilon": EPSILON, "adapter__virtual_tokens": 5}
    return [
        trial(
            f"dry-{model}",
            task,
            **common,
            adapter__kind=kind,
            train__learning_rate=RATES[kind],
            train__zero_stage=stage,
            train__max_grad_norm=float(place % 2),  # every other one without clipping, which hides how long it is
            **leaves,
        )
        for place, (model, kind, task, stage, leaves) in enumerate(CASES)
    ]


def work(rank: int, world: int, folder: Path, specs: list[TrialSpec]) -> None:
    """One of several workers: train and evaluate every trial, leave what came of it."""
    ranks, bases = start_worker(rank, world, folder), {}
    for spec in specs:
        if spec.model not in bases:
            name, family, leaves = spec.model.name, str(spec.model.family), spec.model
            bases[spec.model] = load_base(name, family, quantization=leaves.quantization, dtype=leaves.dtype)
    left = [train_and_evaluate(spec, bases[spec.model], ranks) for spec in specs]
    torch.save(left, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


def train_and_evaluate(spec: TrialSpec, base: Base, ranks: Ranks) -> Left:
    slot = new_slot(spec, base, ranks)
    results = [slot.step(measure=True)]
    gradient = first_gradient(slot)
    results += [slot.step(measure=True) for _ in range(slot.steps - 1)]
    sums = ranks.total(torch.tensor([[r.task_loss, r.density_loss, r.penalty] for r in results], dtype=torch.float64))
    found = slot.evaluate()
    with slot.whole():
        adapter = weights(slot.model) | {name: torch.tensor(value) for name, value in slot.lambdas().items()}
    slot.close()
    return {"losses": sums, "adapter": adapter, "found": found, "gradient": gradient}


def first_gradient(slot: Slot) -> dict[str, Tensor]:
    """What AdamW saw in the first step, whole however it is sharded: a tenth of it is its first moment."""
    named = [(name, p) for name, p in slot.model.named_parameters() if p.requires_grad]
    if slot.trial.train.zero_stage == 0:
        return taken_gradient(slot)
    moment = "state1" if slot.trial.train.optimizer == "paged_adamw" else "exp_avg"
    return {name: safe_get_full_optimizer_state(p, moment).clone() / 0.1 for name, p in named}


@pytest.fixture(scope="module", params=[2, 3])
def workers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, specs: list[TrialSpec]
) -> list[list[Left]]:
    """What each of two workers left, and of three."""
    folder = tmp_path_factory.mktemp("workers")
    spawn(work, args=(request.param, folder, specs), nprocs=request.param)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(request.param)]


@pytest.fixture(scope="module")
def one_worker(
    specs: list[TrialSpec], base_of: Callable[[TrialSpec], Base], ranks: Ranks
) -> Iterator[Callable[[int], Left]]:
    """Tells what one worker leaves of a case, trained once: every step one pass, on one thread as the others are."""
    threads, left = torch.get_num_threads(), {}
    torch.set_num_threads(1)

    def get(case: int) -> Left:
        if case not in left:
            left[case] = train_and_evaluate(with_train(specs[case], micro_batch_size=None), base_of(specs[case]), ranks)
        return left[case]

    yield get
    torch.set_num_threads(threads)


def with_train(spec: TrialSpec, **leaves: Any) -> TrialSpec:
    return spec.model_copy(update={"train": spec.train.model_copy(update=leaves)})


def evaluate_with(adapter: dict[str, Tensor], spec: TrialSpec, base: Base, ranks: Ranks) -> Evaluation:
    """Evaluate with this adapter and these layer scales; ZeRO has no part in it."""
    slot = new_slot(with_train(spec, zero_stage=0), base, ranks)
    held = {name: p.data for name, p in slot.model.named_parameters() if p.requires_grad}
    held |= {name: slot.scales.value(name) for name in slot.lambdas()}
    assert held.keys() == adapter.keys()
    for name, tensor in held.items():
        tensor.copy_(adapter[name])
    found = slot.evaluate()
    slot.close()
    return found


def test_every_family_is_here_with_every_adapter_that_it_takes() -> None:
    takes = {(family, kind) for family, kinds in FAMILY_ADAPTERS.items() for kind in kinds}
    assert {(model.split("-")[-1], kind) for model, kind, *_ in CASES} == takes


@pytest.mark.parametrize("case", range(len(CASES)), ids=map(title, CASES))
def test_several_workers_are_one_to_rounding(
    workers: list[list[Left]],
    case: int,
    specs: list[TrialSpec],
    one_worker: Callable[[int], Left],
    base_of: Callable[[TrialSpec], Base],
    ranks: Ranks,
) -> None:
    """Sums over workers round another way, and AdamW turns roundings near zero into steps.

    So adapters differ by a little, and of what is counted with them a few zeros: float32's exact GELU (BERT, RoBERTa,
    ViT) is zero and not zero by turns, thousands of times between -5.55 and -5.48. With the very same adapter, one
    worker finds to the bit what several found together.
    """
    model, kind, task, *_ = CASES[case]
    short = specs[case].model.dtype == "bfloat16"
    gradient, losses = CLOSE[specs[case].model.dtype]
    first, *others = (left[case] for left in workers)
    alone, found = one_worker(case), first["found"]

    for other in others:
        assert same(first["adapter"], other["adapter"])
        assert_same_evaluation(found, other["found"])
    assert worst(first["gradient"], alone["gradient"]) < gradient, "AdamW's own steps would not tell its length"
    torch.testing.assert_close(first["losses"], alone["losses"], rtol=losses, atol=1e-6)
    apart = differences(first["adapter"], alone["adapter"])
    assert apart[-1 - len(apart) // 10_000] < (0.5 if short else APART[kind])
    assert short or apart[-1 - len(apart) // 1000] < min(APART[kind], MOST)

    want = alone["found"]
    assert torch.equal(found.counts.rows[:, [1, 3]], want.counts.rows[:, [1, 3]]), "real activations, and with padding"
    flipped = (found.counts.rows - want.counts.rows)[:, 0].abs().sum() / want.counts.rows[:, 1].sum()
    assert float(flipped) < (5e-3 if short else 5e-4 if model in ("bert", "roberta", "vit") else 1e-4)
    # Pearson's correlation of answers that are nearly one; any other score moves by a whole row of 14, or not at all
    assert found.scores == pytest.approx(want.scores, abs=5e-3 if task == "stsb" else 1e-6)

    assert_same_evaluation(found, evaluate_with(first["adapter"], specs[case], base_of(specs[case]), ranks))


def differences(got: dict[str, Tensor], want: dict[str, Tensor]) -> Tensor:
    """Return how far entries lie apart, in units of the largest value, the largest last."""
    assert got.keys() == want.keys()
    scale = max(float(tensor.abs().max()) for tensor in want.values())
    apart = torch.cat([(got[name] - want[name]).abs().flatten() for name in want])
    return apart.sort().values / scale  # NaN comes last


def assert_same_evaluation(one: Evaluation, other: Evaluation) -> None:
    assert torch.equal(one.counts.rows, other.counts.rows)
    assert torch.equal(one.generated, other.generated)
    assert one.scores == other.scores
