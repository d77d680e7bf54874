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
        inputs: Keyword arguments of the model: ``input_ids`` (B, T), ``attention_mask`` (B, T), ``labels``.
        masks: (B, T) real tokens by side.
        tokens: Number of real tokens by side.
        items: What the task loss is a mean over: answer tokens, or rows of an encoder.
    """

    inputs: dict[str, Tensor]
    masks: dict[str, Tensor]
    tokens: dict[str, int]
    items: int


def pad(sequences: Sequence[Sequence[int]], value: int, length: int | None = None) -> Tensor:
    """Right-pad to the longest, or to ``length`` if that is more: (B, T) int64."""
    width = max(length or 0, *map(len, sequences))
    return torch.tensor([[*sequence, *[value] * (width - len(sequence))] for sequence in sequences], dtype=torch.int64)


def source_tensors(
    examples: Sequence[Example], pad_id: int, length: int | None, device: torch.device
) -> dict[str, Tensor]:
    """Build ``input_ids``, ``attention_mask`` and, where examples have them, ``token_type_ids``, all (B, T)."""
    tensors = {
        "input_ids": pad([example.input_ids for example in examples], pad_id, length),
        "attention_mask": pad([[1] * len(example.input_ids) for example in examples], 0, length),
    }
    if examples[0].type_ids:
        tensors["token_type_ids"] = pad([example.type_ids for example in examples], 0, length)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def training_batch(
    examples: Sequence[Example],
    *,
    pad_id: int,
    text_to_text: bool,
    regression: bool,
    device: torch.device,
    source_length: int | None = None,
    target_length: int | None = None,
) -> Batch:
    """Collate examples for training.

    Args:
        examples: At least one.
        pad_id: Padding token.
        text_to_text: Whether labels are tokens.
        regression: Whether an encoder's label is a value.
        device: Where to.
        source_length: Pad sources to this; to the longest if None.
        target_length: Pad answers to this; to the longest if None.
    """
    inputs = source_tensors(examples, pad_id, source_length, device)
    masks = {"encoder": inputs["attention_mask"]}
    tokens = {"encoder": sum(len(example.input_ids) for example in examples)}
    if not text_to_text:
        labels = torch.tensor([example.label for example in examples])
        inputs["labels"] = (labels.float() if regression else labels.long()).to(device)
        return Batch(inputs, masks, tokens, len(examples))
    labels = pad([example.target_ids for example in examples], IGNORED, target_length).to(device)
    inputs["labels"] = labels
    masks["decoder"] = (labels != IGNORED).long()
    tokens["decoder"] = sum(len(example.target_ids) for example in examples)
    return Batch(inputs, masks, tokens, tokens["decoder"])
