"""Which examples a step sees, and how they become tensors.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from deft_ray.density.masks import with_virtual_positions
from deft_ray.tasks.encoding import Example

IGNORED = -100

#: Batches whose examples are sorted by length together: more leave less padding, fewer leave more of chance.
WINDOW = 50


class BatchOrder:
    """The order of the training data: a seeded permutation per epoch, cut into batches across epoch borders.

    A pure function of the step, so that a resumed trial needs no state: epoch e is
    ``torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + e))``.

    With ``lengths``, examples of like length come into one batch, so that little is padding: each stretch of
    :data:`WINDOW` batches of that permutation is sorted by length, cut into batches, and these are shuffled with the
    same generator. Every example still comes once per epoch.

    Args:
        count: Examples.
        batch_size: Examples per step over all workers.
        seed: The trial's seed.
        lengths: Something to sort each example by; None to leave the permutation as it is.
    """

    def __init__(self, count: int, batch_size: int, seed: int, lengths: Sequence[Any] | None = None) -> None:
        self.count, self.batch_size, self.seed, self.lengths = count, batch_size, seed, lengths
        self._cached: tuple[int, list[int]] = (-1, [])

    def indices(self, step: int) -> list[int]:
        """Return the step's examples, over all workers."""
        first = step * self.batch_size
        return [self._at(position) for position in range(first, first + self.batch_size)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if self._cached[0] != epoch:
            self._cached = (epoch, self._epoch(epoch))
        return self._cached[1][place]

    def _epoch(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(self.count, generator=generator).tolist()
        if self.lengths is None:
            return order
        # The batch that this epoch shares with the one before, and that with the next, stay as they are.
        first = min(-epoch * self.count % self.batch_size, self.count)
        last = first + (self.count - first) // self.batch_size * self.batch_size
        grouped: list[int] = []
        for start in range(first, last, WINDOW * self.batch_size):
            window = sorted(order[start : min(start + WINDOW * self.batch_size, last)], key=self.lengths.__getitem__)
            for batch in torch.randperm(len(window) // self.batch_size, generator=generator).tolist():
                grouped += window[batch * self.batch_size : (batch + 1) * self.batch_size]
        return [*order[:first], *grouped, *order[last:]]


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Args:
        inputs: Keyword arguments of the model: ``input_ids`` and ``attention_mask`` (B, T), or ``pixel_values``
            (B, 3, height, width); ``labels``.
        masks: (B, T) by side, 1 at the tokens that the density loss counts.
        tokens: Number of these tokens by side.
        items: What the task loss is a mean over: answer tokens, or rows where there is a head.
    """

    inputs: dict[str, Tensor]
    masks: dict[str, Tensor]
    tokens: dict[str, int]
    items: int

    @property
    def rows(self) -> int:
        """Examples."""
        return len(next(iter(self.inputs.values())))


def pad(sequences: Sequence[Sequence[int]], value: int, length: int | None = None, *, left: bool = False) -> Tensor:
    """Pad on the right, or left, to the longest, or to ``length`` if that is more: (B, T) int64.

    Raises:
        ValueError: If there is no sequence.
    """
    if not sequences:
        raise ValueError("a batch needs at least one example (got none)")
    width = max(length or 0, *map(len, sequences))
    fills = [[value] * (width - len(sequence)) for sequence in sequences]
    rows = [[*fill, *row] if left else [*row, *fill] for row, fill in zip(sequences, fills, strict=True)]
    return torch.tensor(rows, dtype=torch.int64)


def source_tensors(
    examples: Sequence[Example], pad_id: int, length: int | None, device: torch.device, *, side: str = "encoder"
) -> dict[str, Tensor]:
    """Build what a model reads.

    Args:
        examples: At least one.
        pad_id: Padding token.
        length: Pad to this; to the longest if None.
        device: Where to.
        side: The stack that reads it. A decoder's rows are padded left, so that all of them end where the head reads,
            and bring the positions that they would have alone, as GPT-2 counts padding otherwise.

    Returns:
        ``input_ids``, ``attention_mask`` and, where there are any, ``token_type_ids`` and ``position_ids``, all (B, T);
        of images ``pixel_values`` (B, 3, height, width).
    """
    pictures = [example.picture for example in examples if example.picture is not None]
    if pictures:
        return {"pixel_values": torch.stack([picture.pixels() for picture in pictures]).to(device)}
    left = side == "decoder"
    tensors = {
        "input_ids": pad([example.input_ids for example in examples], pad_id, length, left=left),
        "attention_mask": pad([[1] * len(example.input_ids) for example in examples], 0, length, left=left),
    }
    if examples[0].type_ids:
        tensors["token_type_ids"] = pad([example.type_ids for example in examples], 0, length, left=left)
    if left:
        tensors["position_ids"] = (tensors["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def source_mask(inputs: dict[str, Tensor], examples: Sequence[Example]) -> Tensor:
    """Return (B, T), 1 at real tokens: of an image every patch is one, and the class token."""
    if "attention_mask" in inputs:
        return inputs["attention_mask"]
    pixels = inputs["pixel_values"]
    return torch.ones(len(pixels), examples[0].source_tokens, dtype=torch.int64, device=pixels.device)


def training_batch(
    examples: Sequence[Example],
    *,
    pad_id: int,
    text_to_text: bool,
    regression: bool,
    device: torch.device,
    source_length: int | None = None,
    target_length: int | None = None,
    side: str = "encoder",
    count_padding: bool = False,
    virtual: int = 0,
) -> Batch:
    """Collate examples for training.

    Args:
        examples: At least one.
        pad_id: Padding token.
        text_to_text: Whether labels are tokens.
        regression: Whether a head's label is a value.
        device: Where to.
        source_length: Pad sources to this; to the longest if None.
        target_length: Pad answers to this; to the longest if None.
        side: The stack that reads the source.
        count_padding: Whether the density loss counts padding, as the authors' code does.
        virtual: Positions that a prompt puts before each source.
    """
    inputs = source_tensors(examples, pad_id, source_length, device, side=side)
    masks = {side: source_mask(inputs, examples)}
    if text_to_text:
        inputs["labels"] = pad([example.target_ids for example in examples], IGNORED, target_length).to(device)
        masks["decoder"] = (inputs["labels"] != IGNORED).long()
    else:
        labels = torch.tensor([example.label for example in examples])
        inputs["labels"] = (labels.float() if regression else labels.long()).to(device)
    if count_padding:
        masks = {side: torch.ones_like(mask) for side, mask in masks.items()}
    masks = with_virtual_positions(masks, virtual, counted=count_padding)
    sizes = batch_sizes(
        examples,
        text_to_text=text_to_text,
        source_length=source_length,
        target_length=target_length,
        side=side,
        count_padding=count_padding,
        virtual=virtual,
    )
    items = sizes.pop("items")
    return Batch(inputs, masks, sizes, items)


def padded_alike(batches: Sequence[Batch], side: str, pad_id: int) -> list[Batch]:
    """Pad batches to the longest of them, so that they can lie one behind the other.

    Args:
        batches: Of the same kind.
        side: The stack that reads the source: a decoder's is padded left.
        pad_id: Padding token.
    """
    inputs = [_alike(parts, name, side, pad_id) for name, parts in _by_name([batch.inputs for batch in batches])]
    masks = [_alike(parts, name, side, 0) for name, parts in _by_name([batch.masks for batch in batches])]
    names, sides = list(batches[0].inputs), list(batches[0].masks)
    return [
        replace(
            batch,
            inputs={name: parts[place] for name, parts in zip(names, inputs, strict=True)},
            masks={name: parts[place] for name, parts in zip(sides, masks, strict=True)},
        )
        for place, batch in enumerate(batches)
    ]


def _by_name(tensors: Sequence[dict[str, Tensor]]) -> list[tuple[str, list[Tensor]]]:
    return [(name, [mine[name] for mine in tensors]) for name in tensors[0]]


def _alike(parts: list[Tensor], name: str, side: str, pad_id: int) -> list[Tensor]:
    """Pad (B, T) tensors to one T; leave others, as classes and images, as they are."""
    if any(part.dim() != 2 for part in parts):
        return parts
    width = max(part.shape[1] for part in parts)
    left = side == "decoder"
    fill = {"input_ids": pad_id, "labels": IGNORED}.get(name, 0)
    return [
        functional.pad(part, (width - part.shape[1], 0) if left else (0, width - part.shape[1]), value=fill)
        for part in parts
    ]


def batch_sizes(
    examples: Sequence[Example],
    *,
    text_to_text: bool,
    source_length: int | None = None,
    target_length: int | None = None,
    side: str = "encoder",
    count_padding: bool = False,
    virtual: int = 0,
) -> dict[str, int]:
    """Count what :func:`training_batch` would hold: tokens that the density loss counts by side, and ``items``.

    Where padding counts, so do the ``virtual`` positions that a prompt puts before each source.
    """

    def count(lengths: list[int], fixed: int | None) -> int:
        return max(fixed or 0, *lengths) * len(lengths) if count_padding else sum(lengths)

    fixed = source_length if examples[0].picture is None else None
    sizes = {side: count([example.source_tokens for example in examples], fixed)}
    sizes[side] += virtual * len(examples) if count_padding else 0
    if not text_to_text:
        return {**sizes, "items": len(examples)}
    answers = [len(example.target_ids) for example in examples]
    return {**sizes, "decoder": count(answers, target_length), "items": sum(answers)}
