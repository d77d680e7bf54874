"""A pack: the slots of one base, and the pass of the model that they share.

Each slot brings a batch; the batches are padded to one length and laid one behind the other, and the base computes once
for all of them. Every row goes through its own slot's adapter and head, is scaled by its own layer scales, and has its
own slot's density loss. Each slot's task loss is of its own rows, so no gradient crosses.

Shape suffixes: B batch, T tokens, V vocabulary or classes.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional

from deft_ray.density.probe import DensityProbe, Penalty
from deft_ray.density.rows import Rows, rows_of, split_rows
from deft_ray.density.scales import LayerScales
from deft_ray.models.adapters import (
    FIRST,
    Adapter,
    Prefix,
    Prompt,
    adapter_parameters,
    attach_adapter,
    detach_adapter,
)
from deft_ray.models.base import Base
from deft_ray.models.routing import CannotShareError, Routing, remove_routing
from deft_ray.train.batches import Batch, padded_alike
from deft_ray.train.cost import PassCost, Size, tokens_of
from deft_ray.train.random_state import Draws

_log = logging.getLogger(__name__)

#: What errors of no type of their own say: torch's allocator on a CPU, CUDA, cuBLAS and cuDNN.
_NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")


@dataclass
class Share:
    """What one slot brings into a pass.

    Args:
        seat: The slot's place in the pack.
        batch: Its rows.
        penalty: Its density loss; its rows of the pass are filled in here.
        scale: What its task loss counts in the gradient.
    """

    seat: Seat
    batch: Batch
    penalty: Penalty
    scale: float

    @property
    def size(self) -> Size:
        """What it costs."""
        inputs = self.batch.inputs
        source = next(iter(self.batch.masks.values())).shape[1]
        labels = inputs["labels"]
        return Size(self.batch.rows, source, labels.shape[1] if labels.dim() > 1 else 0)


@dataclass
class Found:
    """What a pass found for one slot.

    Args:
        loss: Its task loss, without a gradient.
        gradients: Of its parameters, in their order; None for one that the pass did not use.
        beside: Slots in the pass.
        part_s: Seconds of the pass that are its own, where it was shared and it is known what passes cost; else 0.
        alone_s: Seconds that a pass of its own would have taken, as far as that is known; else 0.
        tokens: Tokens of its rows, where the pass was shared; else 0.
        padding: Tokens that its rows were padded with beyond those, as others were longer.
    """

    loss: Tensor
    gradients: list[Tensor | None]
    beside: int = 1
    tokens: int = 0
    padding: int = 0
    part_s: float = 0.0
    alone_s: float = 0.0


@dataclass(frozen=True)
class Head:
    """The shape of a task head.

    Args:
        outputs: Classes, or 1; None for text-to-text models.
        two_layers: In place of the model's own.
    """

    outputs: int | None
    two_layers: bool = False

    def __str__(self) -> str:
        return f"{self.outputs} outputs{', two layers' if self.two_layers else ''}"


class Pack:
    """The slots of one base.

    Args:
        base: Loaded base, without an adapter.
        fused: See :class:`~deft_ray.density.probe.DensityProbe`.

    Attributes:
        limit: Slots in one pass that memory holds; None until it has not held one more.
        cost: What passes cost, as far as it is known.
    """

    def __init__(self, base: Base, *, fused: bool = False) -> None:
        self.base, self.fused = base, fused
        self.limit: int | None = None
        self.routing = Routing()
        self.cost = PassCost()
        self.seats: list[Seat] = []
        self.model: PeftModel | None = None
        self._probe: DensityProbe | None = None

    @property
    def probe(self) -> DensityProbe:
        """Counts and penalises activations; there while there is a slot."""
        assert self._probe is not None
        return self._probe

    def take_seat(
        self,
        adapter: Adapter,
        *,
        outputs: int | None,
        two_layer_head: bool,
        source_tokens: int,
        gradient_checkpointing: bool,
        sharded: bool = False,
    ) -> Seat:
        """Attach an adapter, and a head where there is one; draws from torch's global random state.

        Args:
            adapter: Which, of the same kind as those that are there.
            outputs: Of the head; None for text-to-text models.
            two_layer_head: Whether the head has two layers in place of the model's own.
            source_tokens: Longest source that it will be given.
            gradient_checkpointing: Whether passes compute blocks again; one slot's wish holds for all until the last
                one has gone, and changes no number.
            sharded: Whether workers share out the adapter's parameters (ZeRO-3).

        Raises:
            CannotShareError: If the adapter cannot share the base with those that are there.
            ValueError: If it does not fit the base.
        """
        head = Head(outputs, two_layer_head)
        self._require_fit(adapter, head, sharded)
        taken = {seat.name for seat in self.seats}
        name = next(name for name in (FIRST, *(f"slot-{n}" for n in range(1, len(taken) + 1))) if name not in taken)
        self.model = attach_adapter(
            self.base,
            adapter,
            outputs=outputs,
            two_layer_head=two_layer_head,
            source_tokens=source_tokens,
            gradient_checkpointing=gradient_checkpointing,
            beside=self.model,
            name=name,
        )
        seat = Seat(
            self, name, adapter, head, [parameter for _, parameter in adapter_parameters(self.model, name)], sharded
        )
        self.seats.append(seat)
        try:
            self.routing.install(self.model)
            if self._probe is None:
                self._probe = DensityProbe(self.base.sites, fused=self.fused)
        except Exception:  # whatever it was: the base is given back before it goes on
            self.leave(seat)
            raise
        return seat

    def _require_fit(self, adapter: Adapter, head: Head, sharded: bool) -> None:
        """Refuse an adapter that cannot share the base with those that are there."""
        for seat in self.seats:
            if isinstance(adapter, Prefix | Prompt) or isinstance(seat.adapter, Prefix | Prompt):
                cause = "an adapter of virtual tokens cannot share a base: it changes what all rows attend to"
                raise CannotShareError(cause)
            if sharded or seat.sharded:
                raise CannotShareError(
                    "an adapter whose parameters workers share out cannot share a base: ZeRO stage 3"
                )
            if type(adapter) is not type(seat.adapter):
                kinds = " and ".join(type(each).__name__.lower() for each in (seat.adapter, adapter))
                raise CannotShareError(f"adapters of two kinds cannot share a base: {kinds}")
            if head != seat.head:
                raise CannotShareError(f"heads of two shapes cannot share a base: {seat.head} and {head}")

    def leave(self, seat: Seat) -> None:
        """Take a slot's adapter off; with the last one the base is as it was."""
        assert self.model is not None
        self.seats.remove(seat)
        if seat.scales is not None:
            seat.scales.remove()
        if not self.seats:
            if self._probe is not None:
                self._probe.remove()
            remove_routing(self.model)
        detach_adapter(self.model, seat.name)
        if not self.seats:
            self.model, self._probe, self.routing = None, None, Routing()

    def run(self, shares: Sequence[Share]) -> list[Found]:
        """Compute the task loss and the gradient of every share, in one pass.

        Dropout draws from the first share's stream: how much it draws depends on all rows and what they are padded to,
        so no share of several could draw what it would draw alone.

        Args:
            shares: At least one; of different seats.
        """
        assert self.model is not None
        if len(shares) > 1:
            batches = padded_alike([share.batch for share in shares], self.base.family.side, self.base.pad_id)
            shares = [replace(share, batch=batch) for share, batch in zip(shares, batches, strict=True)]
        rows = rows_of([share.batch.rows for share in shares])
        for share, mine in zip(shares, rows, strict=True):
            share.penalty.rows, share.penalty.masks = mine, share.batch.masks
        with ExitStack() as stack:
            self._enter(stack, [share.seat for share in shares], rows)
            stack.enter_context(shares[0].seat.draws.made_global())
            stack.enter_context(self.probe.penalising(*(share.penalty for share in shares)))
            losses = self._losses(shares, rows)
            total = torch.stack([loss * share.scale for loss, share in zip(losses, shares, strict=True)]).sum()
            wanted = [parameter for share in shares for parameter in share.seat.parameters]
            gradients = iter(torch.autograd.grad(total, wanted, allow_unused=True))
        return [
            Found(loss.detach(), [next(gradients) for _ in share.seat.parameters])
            for loss, share in zip(losses, shares, strict=True)
        ]

    def run_apart(self, shares: Sequence[Share]) -> list[Found | Exception]:
        """Run shares in the passes that cost least; returns for each what was found, or why nothing was.

        A pass that memory does not hold is tried again with one share less, and no pass has as many from then on. One
        that fails otherwise is tried again share by share, as a single one may be the cause. Nothing that slots keep
        has changed by then.

        Raises:
            torch.AcceleratorError: If a pass of several slots left a GPU that computes no more.
        """
        found: dict[int, Found | Exception] = {}
        self.cost.begin_turn()
        waiting = self.cost.groups([share.size for share in shares])
        while waiting:
            group = waiting.pop(0)
            now, later = group[: self.limit], group[self.limit :] if self.limit else []
            try:
                found |= zip(now, self._timed([shares[place] for place in now]), strict=True)
            except Exception as error:  # whatever it was: it is a slot's own, or the pass is made smaller
                failed = True
                if len(now) == 1:
                    traceback.clear_frames(error.__traceback__)  # they hold the pass
                    found[now[0]] = error
                elif has_lost_gpu(error):
                    raise
                elif is_out_of_memory(error):
                    self.limit = len(now) - 1
                    _log.warning("memory holds no pass of %d slots: %d at most from now on", len(now), self.limit)
                    later = group
                else:
                    waiting[:0] = [[place] for place in now]
            else:
                failed = False
            waiting[:0] = [later] if later else []
            if failed and torch.cuda.is_available():  # the pass that failed is let go by now
                torch.cuda.empty_cache()
        return [found.pop(place) for place in range(len(shares))]  # an error that is kept here would keep this frame

    def _timed(self, shares: Sequence[Share]) -> list[Found]:
        began = _clock()
        found = self.run(shares)
        seconds, sizes = _clock() - began, [share.size for share in shares]
        self.cost.add(sizes, seconds)
        if len(shares) < 2:
            return found
        alone = [self.cost.alone_s(size) or 0.0 for size in sizes]
        part = seconds / sum(alone) if sum(alone) else 0.0
        longest = tokens_of(sizes) // sum(size.rows for size in sizes)
        return [
            replace(
                mine,
                beside=len(shares),
                part_s=part * its,
                alone_s=its if part else 0.0,
                tokens=tokens_of([size]),
                padding=longest * size.rows - tokens_of([size]),
            )
            for mine, its, size in zip(found, alone, sizes, strict=True)
        ]

    @contextmanager
    def alone(self, seat: Seat) -> Iterator[None]:
        """Run passes of one slot inside, as for an evaluation."""
        with ExitStack() as stack:
            self._enter(stack, [seat], [Rows()])
            yield

    def _enter(self, stack: ExitStack, seats: Sequence[Seat], rows: Sequence[Rows]) -> None:
        """Route rows to the adapters and layer scales of these seats."""
        stack.callback(self.routing.forget)
        if len(self.seats) > 1:
            routes = [(seat.name, mine) for seat, mine in zip(seats, rows, strict=True)]
            stack.enter_context(self.routing.routing(*routes))
        for seat in self.seats:
            if seat.scales is not None:
                mine = rows[seats.index(seat)] if seat in seats else None
                stack.callback(setattr, seat.scales, "rows", seat.scales.rows)
                seat.scales.rows = mine

    def _losses(self, shares: Sequence[Share], rows: Sequence[Rows]) -> list[Tensor]:
        """Task loss of every share: of a single one as the model itself computes it."""
        model: Any = self.model
        if len(shares) == 1:
            return [model(**shares[0].batch.inputs).loss]
        inputs = [dict(share.batch.inputs) for share in shares]
        labels = [mine.pop("labels") for mine in inputs]
        whole = {name: torch.cat([mine[name] for mine in inputs]) for name in inputs[0]}
        if self.base.family.text_to_text:
            base: Any = self.base.model
            whole["decoder_input_ids"] = base.prepare_decoder_input_ids_from_labels(labels=torch.cat(labels))
        logits = model(**whole).logits
        parts = split_rows(logits, rows)
        return [task_loss(mine, label) for mine, label in zip(parts, labels, strict=True)]


class Seat:
    """A slot's place in a pack.

    Args:
        pack: The pack.
        name: Of the slot's adapter.
        adapter: The adapter.
        head: Its head.
        trainable: What adapter and head train.
        sharded: Whether workers share them out.

    Attributes:
        scales: Its layer scales, where there are any.
        draws: What its dropout draws from.
    """

    def __init__(
        self,
        pack: Pack,
        name: str,
        adapter: Adapter,
        head: Head,
        trainable: Sequence[nn.Parameter],
        sharded: bool,
    ) -> None:
        self.pack, self.name, self.adapter, self.head, self.sharded = pack, name, adapter, head, sharded
        self.trainable = list(trainable)
        self.scales: LayerScales | None = None
        self.draws = Draws()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the slot trains, its layer scales last."""
        return [*self.trainable, *(self.scales.parameters() if self.scales is not None else ())]


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """What transformers' models compute from their labels: cross-entropy over tokens or classes, or squared error.

    Args:
        logits: (B, T, V) of a text-to-text model, else (B, V).
        labels: (B, T) token ids, -100 where there is none; or (B,) classes, or values.
    """
    if labels.is_floating_point():
        return functional.mse_loss(logits.squeeze(), labels.squeeze())
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=-100)


def _clock() -> float:
    """Seconds that tell passes apart: on a CPU those in which this process computes, as others compute beside it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether memory was asked for that there was not: by torch, by CUDA and its libraries, or by Python."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(said in str(error) for said in _NO_MEMORY)


def has_lost_gpu(error: Exception) -> bool:
    """Tell whether an error leaves a GPU that computes no more, as any that CUDA itself tells but of memory."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)
