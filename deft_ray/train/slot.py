"""A slot: the place on a host where one trial trains its own adapter on the shared frozen base.

The trial's random state is torch's global one, seeded when the slot is built: first the head and the adapter are
initialised, then dropout draws from the same stream on rank 0. So a trial with α = 0 is plain PEFT training.
"""

from __future__ import annotations

import random
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deft_ray.density.approximations import Approximation
from deft_ray.density.probe import DensityProbe, Penalty
from deft_ray.models.adapters import attach_adapter, detach_adapter, trainable_share
from deft_ray.models.base import Base
from deft_ray.spec.schema import DeftSection, TrialSpec
from deft_ray.tasks.encoding import EncodedTask, Example
from deft_ray.train.batches import Batch, BatchOrder, training_batch
from deft_ray.train.engine import SlotModule, build_engine, learning_rate_at, set_learning_rate
from deft_ray.train.evaluation import Evaluation, Evaluator
from deft_ray.train.ranks import Ranks


@dataclass(frozen=True)
class StepResult:
    """What one step left, on this rank.

    Args:
        task_loss: This rank's share of the step's task loss: summed over ranks it is the whole.
        density_loss: The same of the smooth density, encoder and decoder weighted alike; None unless measured.
        penalty: The same of α times the density; None unless measured.
        learning_rate: Learning rate of the step.
    """

    task_loss: float
    density_loss: float | None
    penalty: float | None
    learning_rate: float


class Slot:
    """One trial in training.

    Args:
        trial: What to train.
        base: The host's base, without an adapter.
        data: The trial's task in tokens.
        ranks: The host's workers; all of them build the same slot.
    """

    def __init__(self, trial: TrialSpec, base: Base, data: EncodedTask, ranks: Ranks) -> None:
        self.trial, self.base, self.data, self.ranks = trial, base, data, ranks
        self.steps = planned_steps(trial, len(data.train))
        self.done = 0
        self.micro, self.accumulation = split_batch(trial, ranks.world)
        self.approximation = approximation(trial.deft)
        self._order = BatchOrder(len(data.train), trial.train.batch_size, trial.seed)
        seed_everything(trial.seed)
        with ExitStack() as undo:
            self._build(undo)
            self._undo = undo.pop_all()
        if not ranks.leads:
            seed_everything(trial.seed * 1_000_003 + ranks.rank)
        self.engine.train()

    def _build(self, undo: ExitStack) -> None:
        """Put adapter, probe and engine on the base; whatever fails, ``undo`` takes off what is there."""
        adapter, train = self.trial.adapter, self.trial.train
        self.model = attach_adapter(
            self.base,
            outputs=None if self.base.family.text_to_text else self.data.outputs,
            r=adapter.r,
            lora_alpha=adapter.lora_alpha,
            lora_dropout=adapter.lora_dropout,
            target_modules=adapter.target_modules,
            gradient_checkpointing=train.gradient_checkpointing,
        )
        undo.callback(detach_adapter, self.model)
        self.trainable_share = trainable_share(self.model)
        self.probe = DensityProbe(self.base.sites)
        undo.callback(self.probe.remove)
        self.engine = build_engine(
            SlotModule(self.model),
            batch_size=train.batch_size,
            micro_batch_size=self.micro,
            accumulation=self.accumulation,
            learning_rate=train.learning_rate,
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm,
            zero_stage=train.zero_stage,
        )
        undo.callback(self.engine.destroy)

    def step(self, measure: bool = False) -> StepResult:
        """Train one step: all micro-batches of this rank, one optimizer step.

        Args:
            measure: Whether to compute the smooth density, for a report.
        """
        rate = self._learning_rate()
        set_learning_rate(self.engine, rate)
        examples = [self.data.train[index] for index in self._order.indices(self.done)]
        whole = self._batch_sizes(examples)
        task_loss = density_loss = penalty_loss = 0.0
        for part in self._my_parts(examples):
            batch = self._collate(part)
            shares = {side: batch.tokens[side] / whole[side] for side in batch.tokens}
            penalty = self._penalty(batch, shares, measure)
            item_share = batch.items / whole["items"]
            with self.probe.penalising(penalty):
                loss = self.engine(**batch.inputs).loss
                self.engine.backward(loss * (item_share * self.ranks.world * self.accumulation))
                self.engine.step()
            task_loss += float(loss.detach()) * item_share
            for side, share in shares.items():
                density = penalty.density(side) if measure else None
                density_loss += (density or 0.0) * share / len(shares)
                penalty_loss += (density or 0.0) * share * self._alpha[side]
        self.done += 1
        return StepResult(task_loss, density_loss if measure else None, penalty_loss if measure else None, rate)

    def evaluate(self) -> Evaluation:
        """Evaluate on the validation split, over all ranks."""
        data = self.trial.data
        return Evaluator(
            self.base,
            self.model,
            self.probe,
            self.data,
            self.ranks,
            self.trial.train.eval_batch_size,
            data.max_target_tokens,
            data.max_source_tokens if data.padding == "max_length" else None,
        ).evaluate()

    def save(self, folder: Path) -> None:
        """Write this rank's part of the trial's state into an empty folder."""
        self.engine.save_checkpoint(str(folder), tag="engine")
        torch.save({"done": self.done, "random": _random_state()}, folder / f"rank-{self.ranks.rank}.pt")

    def load(self, folder: Path) -> None:
        """Continue from a state that every rank has saved."""
        self.engine.load_checkpoint(str(folder), tag="engine")
        state = torch.load(folder / f"rank-{self.ranks.rank}.pt", weights_only=False)
        self.done = state["done"]
        _restore_random_state(state["random"])

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter, and the head where there is one, as PEFT does; plain PEFT opens it."""
        self.model.save_pretrained(str(folder), save_embedding_layers=False)

    def close(self) -> None:
        """Give the base back without a trace."""
        self._undo.close()

    @property
    def _alpha(self) -> dict[str, float]:
        return alpha_by_side(self.trial.deft)

    def _learning_rate(self) -> float:
        train = self.trial.train
        return learning_rate_at(
            self.done,
            peak=train.learning_rate,
            steps=self.steps,
            warmup_share=train.warmup_share,
            schedule=train.schedule,
        )

    def _batch_sizes(self, examples: list[Example]) -> dict[str, int]:
        """Real tokens by side, and items of the task loss, of the whole step over all ranks."""
        tokens = sum(example.source_tokens for example in examples)
        sizes = {self.base.family.side: tokens, "items": len(examples)}
        if self.base.family.text_to_text:
            sizes["decoder"] = sizes["items"] = sum(len(example.target_ids) for example in examples)
        return sizes

    def _my_parts(self, examples: list[Example]) -> list[list[Example]]:
        share = len(examples) // self.ranks.world
        mine = examples[self.ranks.rank * share : (self.ranks.rank + 1) * share]
        return [mine[start : start + self.micro] for start in range(0, share, self.micro)]

    def _collate(self, examples: list[Example]) -> Batch:
        data = self.trial.data
        fixed = data.padding == "max_length"
        return training_batch(
            examples,
            pad_id=self.base.pad_id,
            text_to_text=self.base.family.text_to_text,
            regression=self.data.task.kind == "regression",
            device=self.ranks.device,
            source_length=data.max_source_tokens if fixed else None,
            target_length=data.max_target_tokens if fixed else None,
            side=self.base.family.side,
        )

    def _penalty(self, batch: Batch, shares: dict[str, float], measure: bool) -> Penalty:
        """The density loss of one micro-batch: the mean over ranks undoes ``world``, nothing else scales it."""
        weights = {side: self._alpha[side] * share * self.ranks.world for side, share in shares.items()}
        return Penalty(self.approximation, weights, batch.masks, measure)


def planned_steps(trial: TrialSpec, examples: int) -> int:
    """Steps of a trial: as given, or so many epochs' worth, rounded up."""
    if trial.train.steps is not None:
        return trial.train.steps
    assert trial.train.epochs is not None
    return max(1, -(-int(trial.train.epochs * examples) // trial.train.batch_size))


def split_batch(trial: TrialSpec, world: int) -> tuple[int, int]:
    """Return (examples per forward pass and worker, forward passes per step)."""
    per_worker = trial.train.batch_size // world
    micro = min(trial.train.micro_batch_size or per_worker, per_worker)
    return micro, per_worker // micro


def approximation(deft: DeftSection) -> Approximation:
    """Return the approximation that a trial asks for."""
    if deft.approximation == "l0":
        return Approximation("l0", deft.epsilon)
    assert deft.beta is not None
    return Approximation("tanh", deft.beta)


def alpha_by_side(deft: DeftSection) -> dict[str, float]:
    """Return the density loss's weight by side."""
    return {"encoder": deft.alpha, "decoder": deft.alpha if deft.alpha_decoder is None else deft.alpha_decoder}


def seed_everything(seed: int) -> None:
    """Seed torch (CPU and GPU), numpy and random."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def _restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state_all(state["cuda"])
