"""Which examples a step sees, and how they become tensors.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deft_ray.tasks.encoding import Example

IGNORED = -100


class BatchOrder:
    """The order of the training data: a seeded permutation per epoch, cut into batches across epoch borders.

    A pure function of the step, so that a resumed trial needs no state: epoch e is
    ``torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + e))``.

    Args:
        count: Examples.
        batch_size: Examples per step over all workers.
        seed: The trial's seed.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self._cached: tuple[int, list[int]] = (-1, [])

    def indices(self, step: int) -> list[int]:
        """Return the step's examples, over all workers."""
        first = step * self.batch_size
        return [self._at(position) for position in range(first, first + self.batch_size)]

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if self._cached[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._cached = (epoch, torch.randperm(self.count, generator=generator).tolist())
        return self._cached[1][place]


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Args:
        inputs: Keyword arguments of the model: ``input_ids`` and ``attention_mask`` (B, T), or ``pixel_values``
            (B, 3, height, width); ``labels``.
        masks: (B, T) real tokens by side.
        tokens: Number of real tokens by side.
        items: What the task loss is a mean over: answer tokens, or rows where there is a head.
    """

    inputs: dict[str, Tensor]
    masks: dict[str, Tensor]
    tokens: dict[str, int]
    items: int


def pad(sequences: Sequence[Sequence[int]], value: int, length: int | None = None, *, left: bool = False) -> Tensor:
    """Pad on the right, or left, to the longest, or to ``length`` if that is more: (B, T) int64."""
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
    """
    inputs = source_tensors(examples, pad_id, source_length, device, side=side)
    masks = {side: source_mask(inputs, examples)}
    tokens = {side: sum(example.source_tokens for example in examples)}
    if not text_to_text:
        labels = torch.tensor([example.label for example in examples])
        inputs["labels"] = (labels.float() if regression else labels.long()).to(device)
        return Batch(inputs, masks, tokens, len(examples))
    labels = pad([example.target_ids for example in examples], IGNORED, target_length).to(device)
    inputs["labels"] = labels
    masks["decoder"] = (labels != IGNORED).long()
    tokens["decoder"] = sum(len(example.target_ids) for example in examples)
    return Batch(inputs, masks, tokens, tokens["decoder"])
