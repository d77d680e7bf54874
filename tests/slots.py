"""What the tests of a slot share: how one is trained and compared, its gradient by hand, what is left of it."""

from __future__ import annotations

import gc
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deft_ray.models.base import Base
from deft_ray.spec.schema import TrialSpec
from deft_ray.tasks.encoding import Example
from deft_ray.train.cost import PassCost, Size
from deft_ray.train.evaluation import Evaluation
from deft_ray.train.loading import LoadedTasks, load_task
from deft_ray.train.pack import Found, Pack, Share
from deft_ray.train.ranks import Ranks
from deft_ray.train.slot import Slot
from tests.plain_peft import PlainCounts

EPSILON = 1e-3


def new_slot(spec: TrialSpec, base: Base, ranks: Ranks) -> Slot:
    """Open a slot for a trial, with its task."""
    return Slot(spec, base, load_task(spec.task, spec.data, base), ranks)


def start_worker(rank: int, world: int, folder: Path) -> Ranks:
    """Join the other processes of a host of ``world`` workers, which meet in ``folder``."""
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    return Ranks(rank, world, torch.device("cpu"))


# --- training ---------------------------------------------------------------------------------------------------------


def run(slot: Slot, steps: int | None = None) -> list[float]:
    """Train so many steps, or all; return the losses."""
    return [slot.step().task_loss for _ in range(slot.steps if steps is None else steps)]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copy what is trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def trained(slot: Slot) -> dict[str, Tensor]:
    """Train to the end; return what became of the adapter."""
    run(slot)
    with slot.whole():
        return weights(slot.model)


def shaken(slot: Slot, std: float = 0.05, seed: int = 0) -> Slot:
    """Move what starts at zero, so that every adapter weight has a gradient."""
    dice = torch.Generator().manual_seed(seed)
    for name, parameter in slot.model.named_parameters():
        if "lora_B" in name or "bottleneck_up" in name:
            parameter.data.normal_(std=std, generator=dice)
    return slot


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    """Tell whether two sets of tensors are equal bit for bit."""
    return got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest difference, in units of the largest value."""
    assert got.keys() == want.keys()
    scale = max(float(tensor.abs().max()) for tensor in want.values())
    return float(torch.stack([(got[name] - want[name]).abs().max() for name in want]).max()) / scale  # NaN stays NaN


def learnt_apart(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """How far apart two trials have come: length of the difference of LoRA's B, which begins at zero, over its own."""
    assert got.keys() == want.keys()
    mine, other = (
        torch.cat([tensor.reshape(-1) for name, tensor in left.items() if "lora_B" in name]) for left in (got, want)
    )
    return float((mine - other).norm() / other.norm())


def check_resumed(open_same: Callable[[], Slot], folder: Path) -> None:
    """A slot that is opened from another's state goes on, and is evaluated, as one that was never interrupted."""
    whole = open_same()
    half = whole.steps // 2
    losses = run(whole)
    with whole.whole():
        want, scales = weights(whole.model), whole.lambdas()
    want_found = whole.evaluate()

    first = open_same()
    early = run(first, half)
    first.save(folder)
    first.step()  # lost with the worker
    torch.manual_seed(99)
    second = open_same()
    second.load(folder)
    assert second.done == half
    late = run(second, half)
    found = second.evaluate()

    assert early + late == losses
    with second.whole():
        assert same(weights(second.model), want)
        assert second.lambdas() == scales
    assert torch.equal(found.counts.rows, want_found.counts.rows)
    assert found.row() == want_found.row()


def left_in_memory(spec: TrialSpec, base: Base, ranks: Ranks, *, evaluate: bool) -> list[str]:
    """Open a slot, train a step, evaluate if asked, close; name what is still there, of slot, engine and adapter."""
    slot = new_slot(spec, base, ranks)
    slot.step()
    if evaluate:
        slot.evaluate()
    adapter = [p for p in slot.model.parameters() if p.requires_grad]
    watched = [weakref.ref(thing) for thing in (slot, slot.engine, slot.model, *adapter)]
    slot.close()
    del slot, adapter
    gc.collect()
    return [type(ref()).__name__ for ref in watched if ref() is not None]


# --- the gradient of the first step -----------------------------------------------------------------------------------


def first_indices(slot: Slot) -> list[int]:
    """Rows of the first step: the head of the first epoch's permutation."""
    dice = torch.Generator().manual_seed(slot.trial.seed * 1_000_003)
    return torch.randperm(len(slot.data.train), generator=dice).tolist()[: slot.trial.train.batch_size]


def first_examples(slot: Slot) -> list[Example]:
    """Training examples of the first step."""
    return [slot.data.train[index] for index in first_indices(slot)]


@contextmanager
def seen_activations(slot: Slot) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what the MLP activations say, pass by pass, by layer."""
    seen: dict[str, list[Tensor]] = {site.name: [] for site in slot.base.sites}
    with ExitStack() as stack:
        for site in slot.base.sites:
            hook = site.module.register_forward_hook(lambda _m, _i, act, mine=seen[site.name]: mine.append(act))
            stack.callback(hook.remove)
        yield seen


@contextmanager
def counted_passes(slot: Slot) -> Iterator[Counter[str]]:
    """Count how often each MLP block comes to its output, by layer: each time that it is computed again too."""
    passes = Counter[str]()
    with ExitStack() as stack:
        for site in slot.base.sites:
            output = site.block.get_submodule(site.output)
            hook = output.register_forward_pre_hook(lambda *_, name=site.name: passes.update([name]))
            stack.callback(hook.remove)
        yield passes


def all_in_one_pass(_cost: PassCost, sizes: Sequence[Size]) -> list[list[int]]:
    """Stands in for :meth:`PassCost.groups`: one pass for all slots."""
    return [list(range(len(sizes)))] if sizes else []


def loaded_at_once(tasks: LoadedTasks, trial: TrialSpec) -> bool:
    """Stands in for :meth:`LoadedTasks.begin`: every trial begins in the turn in which it is taken."""
    with suppress(Exception):  # who asks for the task is told
        tasks.get(trial)
    return True


def counted_slots(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that fills with the number of slots of each training pass from now on."""
    found: list[int] = []
    run_pass = Pack.run

    def counted(pack: Pack, shares: Sequence[Share]) -> list[Found]:
        found.append(len(shares))
        return run_pass(pack, shares)

    monkeypatch.setattr(Pack, "run", counted)
    return found


def soft_density(act: Tensor) -> Tensor:
    """Mean of a² / (a² + ε)."""
    return (act**2 / (act**2 + EPSILON)).mean()


def gradient_of(slot: Slot, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of a loss with respect to what is trained."""
    named = [(name, p) for name, p in slot.model.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [p for _, p in named])
    return {name: grad for (name, _), grad in zip(named, grads, strict=True)}


def taken_gradient(slot: Slot) -> dict[str, Tensor]:
    """What AdamW saw in its first step: a tenth of it is its first moment."""
    named = [(name, p) for name, p in slot.model.named_parameters() if p.requires_grad]
    return {name: slot.engine.optimizer.state[p]["exp_avg"] / 0.1 for name, p in named}


# --- what an evaluation found, against plain PEFT ---------------------------------------------------------------------


def check_density(found: Evaluation, plain: PlainCounts) -> None:
    """One flipped zero at the edge of the GELU, as a padded batch rounds another way, is about 1e-5 here."""
    for side in ("encoder", "decoder"):
        if plain.total[side]:
            assert found.counts.density(side) == pytest.approx(plain.nonzero[side] / plain.total[side], abs=5e-5)
    both = sum(plain.nonzero.values()) / sum(plain.total.values())
    assert found.counts.density() == pytest.approx(both, abs=5e-5)
    assert 0.3 < both < 0.999, "a density of one would prove nothing"
    assert sum(int(row[1]) for row in found.counts.rows) == sum(plain.total.values())
    used = torch.cat(list(plain.used.values())).float().mean()
    assert found.counts.density_feature_map() == pytest.approx(float(used), abs=5e-3)


def check_score(found: Evaluation, said: Sequence[float], labels: Sequence[float], within: float | None) -> None:
    """The score is the share of right answers; where ``within`` is given, Pearson's correlation of values that far off.

    Values are compared one by one, as a model that has hardly learnt says nearly the same of all: a correlation of what
    then differs by rounding may be any.
    """
    score = next(iter(found.scores.values()))
    if within is None:
        assert score == sum(s == label for s, label in zip(said, labels, strict=True)) / len(labels)
        return
    values = found.predictions["0"]
    assert values == pytest.approx(list(said), abs=within)
    assert score == pytest.approx(np.corrcoef(np.array(values, np.float64), labels)[0, 1], abs=1e-9)


def remember_answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that fills with the written answers which are scored from now on."""
    from deft_ray.tasks.scoring import score_answers

    said: list[str] = []

    def remember(predictions: list[str], answers: list[list[str]]) -> dict[str, float]:
        said.extend(predictions)
        return score_answers(predictions, answers)

    monkeypatch.setattr("deft_ray.train.evaluation.score_answers", remember)
    return said


def word_overlap(prediction: str, gold: str) -> float:
    """F1 over words; these rows have no punctuation in their answers, and no article but 'the'."""
    p, g = ([word for word in text.split() if word not in ("a", "an", "the")] for text in (prediction, gold))
    same = sum(min(p.count(word), g.count(word)) for word in set(p))
    return 2 * same / (len(p) + len(g)) if same else 0.0
