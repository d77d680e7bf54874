"""Which positions of an activation hold real tokens.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def with_virtual_positions(masks: Mapping[str, Tensor], virtual: int, *, counted: bool = False) -> dict[str, Tensor]:
    """Widen the encoder's mask by positions that a prompt puts before its input.

    Virtual tokens are no real tokens: density and density loss leave them out. The activations have them all the same,
    (B, virtual + T, d_ff), and ``density_paper`` counts them, as the authors' code does.

    Args:
        masks: (B, T) by side, 1 at real tokens.
        virtual: Positions before the encoder's input; 0 for adapters without a prompt.
        counted: Whether they count, as they do where padding does.

    Returns:
        The masks by side, the encoder's (B, virtual + T) with zeros (ones if ``counted``) on the left.
    """
    mask_BT = masks.get("encoder")
    if mask_BT is None:
        return dict(masks)
    widened = mask_BT.new_full((mask_BT.shape[0], virtual + mask_BT.shape[1]), int(counted))
    widened[:, virtual:] = mask_BT
    return {**masks, "encoder": widened}
