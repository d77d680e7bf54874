"""Exact counts of non-zero activations, summed as whole numbers so that ranks and batches add up.

Shape suffixes: B batch, T tokens, F d_ff.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from deft_ray.density.chunks import chunks
from deft_ray.metrics import tau_key

#: Thresholds at which |a| > τ is counted beside the exact zeros.
TAUS = (0.001, 0.01, 0.1)

_COLUMNS = 4 + len(TAUS)


def count_row(
    act_BTF: Tensor, mask_BT: Tensor, there_BT: Tensor | None = None, often_F: Tensor | None = None
) -> Tensor:
    """Count one layer's activations.

    Comparisons are written as float32 zeros and ones and summed per row, which is exact up to a d_ff of 2^24 and
    several times faster than counting booleans. Buffers are used again: at this size an allocation costs as much as a
    comparison.

    Args:
        act_BTF: Activations after the non-linearity and before any gate product; OPT's are (B x T, F).
        mask_BT: True (or 1) at real tokens.
        there_BT: True (or 1) at real tokens and their padding, where there are further rows that nobody asked for; all
            positions if None.
        often_F: float32, to which each neuron's non-zeros at real tokens are added, where somebody asks for them; a
            ninth more work.

    Returns:
        int64 ``[non-zero, total, non-zero with padding, total with padding, |a| > τ for τ in TAUS]``, on ``act_BTF``'s
        device.

    Raises:
        ValueError: If the mask has not as many tokens as there are rows of activations.
    """
    act_NF = act_BTF.reshape(-1, act_BTF.shape[-1])
    mask_N = mask_BT.reshape(-1).to(torch.float64)
    there_N = torch.ones_like(mask_N) if there_BT is None else there_BT.reshape(-1).to(torch.float64)
    require_rows(act_NF, mask_N)
    require_rows(act_NF, there_N)
    if there_BT is not None and act_NF.device.type == "cpu":  # a GPU would have to wait to know how many these are
        asked_N = there_N > 0.0
        act_NF, mask_N, there_N = act_NF[asked_N], mask_N[asked_N], there_N[asked_N]
    counts_KN = torch.empty(1 + len(TAUS), act_NF.shape[0], dtype=torch.float32, device=act_NF.device)
    real_N = mask_N.float()
    buffers: tuple[Tensor, Tensor] | None = None
    for part in chunks(act_NF):
        act = act_NF[part].float()
        buffers = (torch.empty_like(act), torch.empty_like(act)) if buffers is None else buffers
        magnitude, above = (buffer[: act.shape[0]] for buffer in buffers)
        nonzero, *beyond = counts_KN[:, part].unbind()
        torch.sum(torch.ne(act, 0.0, out=above), dim=-1, out=nonzero)
        if often_F is not None:
            often_F.addmv_(above.T, real_N[part])
        torch.abs(act, out=magnitude)
        for tau, count in zip(TAUS, beyond, strict=True):
            torch.sum(torch.gt(magnitude, tau, out=above), dim=-1, out=count)
    counts_KN = counts_KN.double()
    real, padded = counts_KN @ mask_N, counts_KN[:1] @ there_N
    totals = torch.stack([mask_N.sum(), there_N.sum()]) * act_NF.shape[1]
    return torch.cat([real[:1], totals[:1], padded, totals[1:], real[1:]]).to(torch.int64)


def require_rows(act_NF: Tensor, mask_N: Tensor) -> None:
    """Refuse a mask that is not about these activations."""
    if act_NF.shape[0] != mask_N.shape[0]:
        raise ValueError(f"the mask has {mask_N.shape[0]} tokens, the activations have {act_NF.shape[0]}")


class Counter(Protocol):
    """Something that is shown activations."""

    def add(self, index: int, act_BTF: Tensor, mask_BT: Tensor, there_BT: Tensor | None, /) -> None:
        """Take in one layer's activations of one pass."""


@dataclass
class DensityCounts:
    """Counts of a whole evaluation, one row per layer.

    Args:
        names: Layer names, ``encoder.0`` or ``decoder.3``.
        rows: (layers, columns) int64, see :func:`count_row`.
        feature_map: Whether to note which neurons are ever non-zero.
        often: (F,) float32 by layer's index, above zero for the neurons that were non-zero at a real token; none before
            a batch came.
    """

    names: list[str]
    rows: Tensor
    feature_map: bool = False
    often: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def empty(cls, names: list[str], device: torch.device | None = None, *, feature_map: bool = False) -> DensityCounts:
        """Return zero counts for these layers, kept where the activations are."""
        return cls(names, torch.zeros(len(names), _COLUMNS, dtype=torch.int64, device=device), feature_map)

    def add(self, index: int, act_BTF: Tensor, mask_BT: Tensor, there_BT: Tensor | None = None) -> None:
        """Add one layer's activations of one batch."""
        often_F = None
        if self.feature_map:
            nothing = torch.zeros(act_BTF.shape[-1], device=act_BTF.device)
            often_F = self.often.setdefault(index, nothing)
        self.rows[index] += count_row(act_BTF.detach(), mask_BT, there_BT, often_F).to(self.rows.device)

    def join(self, rows: Tensor, often: Iterable[Mapping[int, Tensor]]) -> None:
        """Take what all ranks have counted in one's own place.

        Args:
            rows: Sum of their rows.
            often: Each one's, on the same device as ``rows``.
        """
        self.rows, self.often = rows, {}
        for theirs in often:
            for index, often_F in theirs.items():
                self.often[index] = self.often[index] + often_F if index in self.often else often_F

    def density(self, side: str | None = None) -> float | None:
        """Σ non-zero / Σ total over real tokens of all layers, or of one side's; None where there are none."""
        return self._ratio(0, 1, side)

    def density_paper(self) -> float | None:
        """The same with padding positions counted, as padded in the evaluation's batches."""
        return self._ratio(2, 3, None)

    def density_feature_map(self) -> float | None:
        """Return the share of neurons, over all layers, that any real token makes non-zero; None where none was noted.

        The paper counts a feature map, the mean over batch and sequence. Over a whole split that mean is zero where no
        token is non-zero, and only there, unless a neuron's values cancel to the last bit.
        """
        often = [often_F for index, often_F in self.often.items() if self.rows[index, 1] > 0]
        return sum(int((often_F > 0.0).sum()) for often_F in often) / sum(map(len, often)) if often else None

    def density_at_tau(self) -> dict[str, float]:
        """Fraction of |a| > τ over real tokens, by τ."""
        ratios = {tau_key(tau): self._ratio(4 + index, 1, None) for index, tau in enumerate(TAUS)}
        return {tau: ratio for tau, ratio in ratios.items() if ratio is not None}

    def density_layers(self) -> dict[str, float]:
        """Density of every layer, by name."""
        return {name: int(row[0]) / int(row[1]) for name, row in zip(self.names, self.rows, strict=True) if row[1] > 0}

    def _ratio(self, above: int, below: int, side: str | None) -> float | None:
        keep = [side is None or name.startswith(f"{side}.") for name in self.names]
        totals = self.rows[torch.tensor(keep, dtype=torch.bool, device=self.rows.device)].sum(dim=0)
        return int(totals[above]) / int(totals[below]) if totals[below] > 0 else None


@dataclass(frozen=True)
class WithFirst:
    """Counts a pass over given answers, whose first position is the first of the answers that are written too.

    Args:
        given: Takes in all of it.
        written: Takes in each row's first position.
    """

    given: DensityCounts
    written: StepCounts

    def add(self, index: int, act_BTF: Tensor, mask_BT: Tensor, there_BT: Tensor | None = None) -> None:
        """Take in one layer's activations."""
        self.given.add(index, act_BTF, mask_BT, there_BT)
        self.written.add(index, act_BTF[:, :1], mask_BT)


class StepCounts:
    """Counts of a generation, which runs token by token: which rows had ended is known only afterwards."""

    def __init__(self) -> None:
        self._nonzero: dict[int, list[Tensor]] = {}
        self._width = 0

    def add(self, index: int, act_BTF: Tensor, _mask: Tensor, _there: Tensor | None = None) -> None:
        """Note one layer's activations at one more token of each row; a finished row's are there too."""
        self._width = act_BTF.shape[-1]
        self._nonzero.setdefault(index, []).append(torch.count_nonzero(act_BTF, dim=-1).reshape(act_BTF.shape[0], -1))

    def total(self, lengths_B: Tensor) -> Tensor:
        """Sum over all layers, and over the tokens that each row has written.

        Args:
            lengths_B: Tokens written, the end of the sequence included.

        Returns:
            int64 ``[non-zero, total]``.
        """
        nonzero, total = torch.zeros(2, dtype=torch.int64, device=lengths_B.device)
        for steps in self._nonzero.values():
            nonzero_BT = torch.cat(steps, dim=1)
            written_BT = torch.arange(nonzero_BT.shape[1], device=lengths_B.device) < lengths_B.unsqueeze(1)
            nonzero = nonzero + (nonzero_BT * written_BT).sum()
            total = total + written_BT.sum() * self._width
        return torch.stack([nonzero, total])
