"""A slot: the place on a host where one trial trains its own adapter on the shared frozen base.

The trial's random state is torch's, seeded when the slot is built: first the head and the adapter are initialised, then
dropout draws from the same stream on rank 0. So a trial with α = 0 is plain PEFT training. The passes that a slot has
alone draw from a stream of its own, whoever trains beside it; one that slots share draws from the first one's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from deft_ray.density.approximations import Approximation, build_approximation
from deft_ray.density.probe import Penalty
from deft_ray.density.scales import LayerScales
from deft_ray.density.schedules import alpha_share, epsilon_at
from deft_ray.models.adapters import (
    Adapter,
    Bottleneck,
    Lora,
    Prefix,
    Prompt,
    load_adapter_weights,
    save_adapter,
    trainable_share,
    virtual_positions,
)
from deft_ray.models.base import Base
from deft_ray.models.families import activation_is_nonnegative
from deft_ray.models.routing import CannotShareError
from deft_ray.spec.schema import AdapterSection, DeftSection, TrialSpec
from deft_ray.tasks.encoding import EncodedTask, Example
from deft_ray.tasks.kept import source_lengths, target_lengths
from deft_ray.train.batches import Batch, BatchOrder, batch_sizes, training_batch
from deft_ray.train.cost import Room, Size
from deft_ray.train.engine import SlotModule, build_engine, learning_rate_at, set_learning_rate, whole
from deft_ray.train.evaluation import Evaluation, Evaluator, Pieces
from deft_ray.train.pack import Found, Pack, Share
from deft_ray.train.random_state import Draws, seed_everything, seeded
from deft_ray.train.ranks import Ranks

#: Layer scales beside a saved adapter: λ by layer.
SCALES_FILE = "layer_scales.json"

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class StepResult:
    """What one step left, on this rank.

    Args:
        task_loss: This rank's share of the step's task loss: summed over ranks it is the whole.
        density_loss: The same of the smooth density, encoder and decoder weighted alike; None unless measured.
        penalty: The same of the loss's density term, α and layer scales in it; None unless measured.
        learning_rate: Learning rate of the step.
    """

    task_loss: float
    density_loss: float | None
    penalty: float | None
    learning_rate: float


@dataclass
class Packed:
    """What a slot had of passes that it shared.

    Args:
        passes: Passes in all.
        shared: Of them with other slots.
        part_s: Its part of the seconds of those of which ``alone_s`` is known.
        alone_s: Seconds that they would have taken alone, by what the host has learnt of passes.
        tokens: Tokens of its rows in shared passes.
        padding: What these were padded with beyond that, as others were longer.
    """

    passes: int = 0
    shared: int = 0
    part_s: float = 0.0
    alone_s: float = 0.0
    tokens: int = 0
    padding: int = 0

    def add(self, found: Found) -> None:
        """Count a pass."""
        self.passes += 1
        self.shared += found.beside > 1
        self.part_s += found.part_s
        self.alone_s += found.alone_s
        self.tokens += found.tokens
        self.padding += found.padding


@dataclass
class _Step:
    """A step under way.

    Args:
        measure: Whether the smooth density is computed.
        rate: Learning rate.
        alpha: Weight of the density loss by side.
        approximation: Smooth indicator.
        parts: This rank's micro-batches.
        sizes: Tokens that count by side, and items of the task loss, over all ranks.
        done: Micro-batches that are through.
        task_loss: Of those, this rank's part of the whole; so are ``density_loss`` and ``penalty``.
        under_way: Of the micro-batch in a pass: its density loss, what it is of the step's tokens, and of its items.
    """

    measure: bool
    rate: float
    alpha: dict[str, float]
    approximation: Approximation
    parts: list[list[Example]]
    sizes: dict[str, int]
    done: int = 0
    task_loss: float = 0.0
    density_loss: float = 0.0
    penalty: float = 0.0
    under_way: tuple[Penalty, dict[str, float], float] | None = None


def step_together(slots: Sequence[tuple[Slot, bool]]) -> list[StepResult | Exception | None]:
    """Pass the next micro-batch of every slot through the model, together.

    Args:
        slots: Of one pack, each with whether to measure if it begins a step.

    Returns:
        For each slot what its step left, where the step has ended with this micro-batch, or what it raised, or None. A
        slot that raises changes nothing for the others.
    """
    with ExitStack() as stack:
        for slot, _ in slots:
            stack.enter_context(slot.whole())
        shares = [_caught(partial(slot.share, measure)) for slot, measure in slots]
        sound = [share for share in shares if isinstance(share, Share)]
        found = iter(slots[0][0].pack.run_apart(sound))
        each = _agreed([next(found) if isinstance(share, Share) else share for share in shares], slots[0][0].ranks)
    return [
        mine if isinstance(mine, Exception) else _caught(partial(slot.take, mine))
        for (slot, _), mine in zip(slots, each, strict=True)
    ]


def _agreed(found: list[Found | Exception], ranks: Ranks) -> list[Found | Exception]:
    """Let a slot that has failed on one rank fail on all of them, before they reduce its gradients together."""
    if not any(ranks.maximum(*(int(isinstance(mine, Exception)) for mine in found))):
        return found
    told = ranks.gather([repr(mine) if isinstance(mine, Exception) else None for mine in found])
    causes = [
        next((f"worker {rank}: {text[place]}" for rank, text in enumerate(told) if text[place]), None)
        for place in range(len(found))
    ]
    return [
        mine if cause is None or isinstance(mine, Exception) else RuntimeError(cause)
        for mine, cause in zip(found, causes, strict=True)
    ]


def _caught(action: Callable[[], _Result]) -> _Result | Exception:
    try:
        return action()
    except Exception as error:  # whatever it was, it is one slot's
        return error


class Slot:
    """One trial in training.

    Args:
        trial: What to train.
        base: The host's base, without an adapter but those of ``pack``.
        data: The trial's task in tokens.
        ranks: The host's workers; all of them build the same slot.
        start: Folder of a saved adapter to train on, where the trial starts from one.
        pack: The slots that share the base; one of its own if None.
    """

    def __init__(
        self,
        trial: TrialSpec,
        base: Base,
        data: EncodedTask,
        ranks: Ranks,
        start: Path | None = None,
        pack: Pack | None = None,
    ) -> None:
        fused = trial.model.activation == "fused"
        self.pack = pack or Pack(base, fused=fused)
        if self.pack.fused != fused:
            raise CannotShareError(f"model.activation: {trial.model.activation!r} is not that of the slots beside it")
        self.trial, self.base, self.data, self.ranks = trial, base, data, ranks
        self.steps = planned_steps(trial, len(data.train))
        self._step: _Step | None = None
        self.packed = Packed()
        self.done, self._before = 0, trial.steps_before or steps_of(trial.epochs_before, trial, len(data.train))
        self.micro, self.accumulation = split_batch(trial, ranks.world)
        self.kind = approximation_kind(trial.deft, activation_is_nonnegative(base.sites))
        self.beta: float | None = getattr(self._approximation_at(trial.deft.epsilon), "beta", None)
        self.warning = warning_of(trial.deft, self.kind, base)
        lengths = list(zip(source_lengths(data.train), target_lengths(data.train), strict=True))
        self._order = BatchOrder(
            len(data.train), trial.train.batch_size, trial.seed, lengths if trial.data.grouping == "length" else None
        )
        with seeded(trial.seed):
            with ExitStack() as undo:
                self._build(undo, start)
                self._undo = undo.pop_all()
            if not ranks.leads:
                seed_everything(trial.seed * 1_000_003 + ranks.rank)
            self.seat.draws = Draws()
        self.model.train()

    def _build(self, undo: ExitStack, start: Path | None) -> None:
        """Put adapter, probe and engine on the base; whatever fails, ``undo`` takes off what is there."""
        train = self.trial.train
        self.seat = self.pack.take_seat(
            adapter_of(self.trial.adapter),
            outputs=None if self.base.family.text_to_text else self.data.outputs,
            two_layer_head=self.trial.adapter.head == "two-layer",
            source_tokens=self._source_tokens(),
            gradient_checkpointing=train.gradient_checkpointing,
            sharded=train.zero_stage == 3,
        )
        undo.callback(self.pack.leave, self.seat)
        assert self.pack.model is not None
        self.model, self.probe = self.pack.model, self.pack.probe
        self.trainable_share = trainable_share(self.model, self.seat.name)
        self.scales = self.seat.scales = self._build_scales()
        if start is not None:
            self._take_over(start)
        self.activation = self.probe.activation
        self.engine = build_engine(
            SlotModule(self.seat.trainable, self.scales, self.trial.deft.lambda_learning_rate),
            batch_size=train.batch_size,
            micro_batch_size=self.micro,
            accumulation=self.accumulation,
            learning_rate=train.learning_rate,
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm,
            zero_stage=train.zero_stage,
            paged=train.optimizer == "paged_adamw",
        )
        undo.callback(self.engine.destroy)

    def _take_over(self, start: Path) -> None:
        """Give adapter, head and layer scales the values of a saved adapter."""
        load_adapter_weights(self.model, start, self.seat.name)
        scales = start / SCALES_FILE
        if self.scales is not None and scales.is_file():
            self.scales.set_values(json.loads(scales.read_text(encoding="utf-8")))

    def _build_scales(self) -> LayerScales | None:
        deft = self.trial.deft
        if not deft.adaptive:
            return None
        return LayerScales(self.base.sites, init=deft.lambda_init, noise=deft.lambda_noise, device=self.ranks.device)

    def step(self, measure: bool = False) -> StepResult:
        """Train one step, alone: all micro-batches of this rank, one optimizer step.

        Args:
            measure: Whether to compute the smooth density, for a report.
        """
        while True:
            (result,) = step_together([(self, measure)])
            if isinstance(result, Exception):
                raise result
            if result is not None:
                return result

    def share(self, measure: bool) -> Share:
        """Return what the slot brings into the next pass: its next micro-batch.

        Args:
            measure: Whether to compute the smooth density, for a report.
        """
        if self._step is None:
            self._step = self._begin(measure)
        step = self._step
        batch = self._collate(step.parts[step.done])
        shares = {side: tokens / step.sizes[side] for side, tokens in batch.tokens.items()}
        weights = {side: step.alpha[side] * share * self.ranks.world for side, share in shares.items()}
        feature_map = self.trial.deft.loss_of == "feature_map"
        penalty = Penalty(step.approximation, weights, batch.masks, step.measure, self.scales, feature_map=feature_map)
        item_share = batch.items / step.sizes["items"]
        step.under_way = penalty, shares, item_share
        return Share(self.seat, batch, penalty, item_share * self.ranks.world)

    @property
    def longest(self) -> Size:
        """The largest micro-batch that the slot can have: its longest source and its longest answer in one."""
        train, data = self.data.train, self.trial.data
        source, target = max(source_lengths(train)), max(target_lengths(train))
        if data.padding == "max_length":
            source, target = max(source, data.max_source_tokens), max(target, data.max_target_tokens)
        return Size(self.micro, source, target)

    def take(self, found: Found) -> StepResult | None:
        """Take what a pass found; returns what the step left once all its micro-batches are through."""
        step = self._step
        assert step is not None
        assert step.under_way is not None
        self.packed.add(found)
        loss = self.engine(found.gradients)
        self.engine.backward(loss * self.accumulation)
        self.engine.step()
        penalty, shares, item_share = step.under_way
        step.task_loss += float(found.loss) * item_share
        for side, share in shares.items():
            if step.measure:
                step.density_loss += (penalty.density(side) or 0.0) * share / len(shares)
                step.penalty += (penalty.scaled_density(side) or 0.0) * share * step.alpha[side]
        step.done += 1
        if step.done < len(step.parts):
            return None
        self.done, self._step = self.done + 1, None
        density, penalty_loss = (step.density_loss, step.penalty) if step.measure else (None, None)
        return StepResult(step.task_loss, density, penalty_loss, step.rate)

    def _begin(self, measure: bool) -> _Step:
        rate = self._learning_rate()
        set_learning_rate(self.engine, rate)
        examples = [self.data.train[index] for index in self._order.indices(self._before + self.done)]
        parts = list(self._parts(examples, self.ranks.rank))
        return _Step(measure, rate, self._alpha(), self._approximation(), parts, self._step_sizes(examples))

    def evaluate(self, taus: Sequence[float] = (), last: bool = False) -> Evaluation:
        """Evaluate on the validation split, over all ranks; arguments as of :meth:`Evaluator.pieces`."""
        with self.whole():
            return self._evaluator().evaluate(taus, last)

    def evaluation(
        self, taus: Sequence[float] = (), last: bool = False, *, room: Callable[[], Room | None] = lambda: None
    ) -> Pieces:
        """The same in pieces, between which the slots beside this one may train.

        Args:
            taus: As of :meth:`Evaluator.pieces`.
            last: As of it too.
            room: What a piece may take, while others wait for it; as of :class:`Evaluator`.
        """
        with self.whole():
            return (yield from replace(self._evaluator(), room=room).pieces(taus, last))

    def _evaluator(self) -> Evaluator:
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
            data.max_target_tokens if data.padding == "max_length" else None,
            partial(self.pack.alone, self.seat),
        )

    def save(self, folder: Path) -> None:
        """Write this rank's part of the trial's state into an empty folder."""
        self.engine.save_checkpoint(str(folder), tag="engine")
        torch.save({"done": self.done, "random": self.seat.draws.state}, folder / f"rank-{self.ranks.rank}.pt")

    def load(self, folder: Path) -> None:
        """Continue from a state that every rank has saved."""
        self.engine.load_checkpoint(str(folder), tag="engine")
        state = torch.load(folder / f"rank-{self.ranks.rank}.pt", weights_only=False)
        self.done = state["done"]
        self.seat.draws.state = state["random"]

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter, and the head where there is one, as PEFT does; plain PEFT opens it.

        Layer scales, which PEFT does not know, lie beside it in ``layer_scales.json``: λ by layer. On one worker,
        inside :meth:`whole`.
        """
        save_adapter(self.model, folder, self.seat.name)
        if self.scales is not None:
            (folder / SCALES_FILE).write_text(json.dumps(self.lambdas(), indent=1), encoding="utf-8")

    def lambdas(self) -> dict[str, float]:
        """Return ADA-DEFT's layer scales by layer; none without. Inside :meth:`whole`."""
        return {} if self.scales is None else self.scales.by_layer()

    def whole(self) -> AbstractContextManager[None]:
        """Hold every trainable parameter in full on every worker; all workers enter and leave together."""
        return whole(self.engine.module)

    def close(self) -> None:
        """Give the base back without a trace."""
        self._undo.close()

    def _alpha(self) -> dict[str, float]:
        """Weight of the density loss by side, in this step."""
        deft = self.trial.deft
        share = alpha_share(self.done, steps=self.steps, delay=deft.alpha_delay, ramp=deft.alpha_ramp)
        return {side: alpha * share for side, alpha in alpha_by_side(deft).items()}

    def _approximation(self) -> Approximation:
        deft = self.trial.deft
        return self._approximation_at(epsilon_at(self.done, steps=self.steps, start=deft.epsilon, end=deft.epsilon_end))

    def _approximation_at(self, epsilon: float) -> Approximation:
        return build_approximation(self.kind, epsilon=epsilon, beta=self.trial.deft.beta)

    def _learning_rate(self) -> float:
        train = self.trial.train
        return learning_rate_at(
            self.done,
            peak=train.learning_rate,
            steps=self.steps,
            warmup_share=train.warmup_share,
            schedule=train.schedule,
        )

    def _step_sizes(self, examples: list[Example]) -> dict[str, int]:
        """Tokens that count by side, and items of the task loss, of the whole step over all ranks."""
        parts = [part for rank in range(self.ranks.world) for part in self._parts(examples, rank)]
        sizes = [batch_sizes(part, **self._collation) for part in parts]
        return {name: sum(size[name] for size in sizes) for name in sizes[0]}

    def _source_tokens(self) -> int:
        """Longest source that the model will see."""
        data = self.trial.data
        if data.padding == "max_length":
            return data.max_source_tokens
        splits = (self.data.train, self.data.calibration, self.data.validation, *self.data.beside.values())
        return max(length for split in splits for length in source_lengths(split))

    def _parts(self, examples: list[Example], rank: int) -> list[list[Example]]:
        """Cut a rank's part of a step into its micro-batches."""
        share = len(examples) // self.ranks.world
        mine = examples[rank * share : (rank + 1) * share]
        return [mine[start : start + self.micro] for start in range(0, share, self.micro)]

    def _collate(self, examples: list[Example]) -> Batch:
        return training_batch(
            examples,
            pad_id=self.base.pad_id,
            regression=self.data.task.kind == "regression",
            device=self.ranks.device,
            **self._collation,
        )

    @property
    def _collation(self) -> dict[str, Any]:
        data = self.trial.data
        fixed = data.padding == "max_length"
        return {
            "text_to_text": self.base.family.text_to_text,
            "side": self.base.family.side,
            "source_length": data.max_source_tokens if fixed else None,
            "target_length": data.max_target_tokens if fixed else None,
            "count_padding": self.trial.deft.count_padding,
            "virtual": virtual_positions(self.model),
        }


def adapter_of(section: AdapterSection) -> Adapter:
    """Return the adapter that a trial asks for."""
    if section.kind == "bottleneck":
        return Bottleneck(section.reduction_factor, section.reads == "sum")
    if section.kind == "prefix":
        return Prefix(section.virtual_tokens)
    if section.kind == "prompt":
        return Prompt(section.virtual_tokens)
    return Lora(section.r, section.lora_alpha, section.lora_dropout, section.target_modules)


def planned_steps(trial: TrialSpec, examples: int) -> int:
    """Steps of a trial: as given, or so many epochs' worth, rounded up."""
    if trial.train.steps is not None:
        return trial.train.steps
    assert trial.train.epochs is not None
    return max(1, steps_of(trial.train.epochs, trial, examples))


def steps_of(epochs: float, trial: TrialSpec, examples: int) -> int:
    """Steps of a trial in so many epochs, rounded up."""
    return -(-int(epochs * examples) // trial.train.batch_size)


def split_batch(trial: TrialSpec, world: int) -> tuple[int, int]:
    """Return (examples per forward pass and worker, forward passes per step)."""
    per_worker = trial.train.batch_size // world
    micro = min(trial.train.micro_batch_size or per_worker, per_worker)
    return micro, per_worker // micro


def approximation_kind(deft: DeftSection, never_negative: bool) -> str:
    """Return the approximation that a trial uses: tanh where the activation is never negative, l0 otherwise."""
    if deft.approximation != "auto":
        return deft.approximation
    return "tanh" if never_negative else "l0"


def warning_of(deft: DeftSection, kind: str, base: Base) -> str | None:
    """Say what is doubtful about a density loss on this base, or None."""
    if kind != "tanh" or activation_is_nonnegative(base.sites) or not any(alpha_by_side(deft).values()):
        return None
    return (
        f"deft.approximation 'tanh' on {base.activation}: its negative activations count below zero, so the loss falls "
        "by making them more negative instead of zero; 'l0', 'sigmoid', 'l1' and 'l2' take either sign"
    )


def alpha_by_side(deft: DeftSection) -> dict[str, float]:
    """Return the density loss's weight by side."""
    return {"encoder": deft.alpha, "decoder": deft.alpha if deft.alpha_decoder is None else deft.alpha_decoder}
