"""Virtual tokens are no real tokens."""

from __future__ import annotations

import pytest
import torch

from deft_ray.density.counts import DensityCounts
from deft_ray.density.masks import with_virtual_positions


def test_virtual_positions_are_zeros_on_the_left_of_the_encoders_mask() -> None:
    masks = {"encoder": torch.tensor([[1, 1, 0], [1, 1, 1]]), "decoder": torch.tensor([[1], [1]])}
    widened = with_virtual_positions(masks, 2)

    assert widened["encoder"].tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert widened["encoder"].dtype == masks["encoder"].dtype
    assert widened["decoder"].tolist() == [[1], [1]]
    assert masks["encoder"].shape == (2, 3), "the batch's own mask stays as it is"


def test_virtual_positions_are_ones_where_padding_counts() -> None:
    masks = {"encoder": torch.ones(2, 3, dtype=torch.int64)}
    assert with_virtual_positions(masks, 2, counted=True)["encoder"].tolist() == [[1] * 5] * 2


def test_without_virtual_positions_the_masks_are_as_they_were() -> None:
    masks = {"encoder": torch.tensor([[True, False]]), "decoder": torch.tensor([[True]])}
    widened = with_virtual_positions(masks, 0)

    assert {side: mask.tolist() for side, mask in widened.items()} == {"encoder": [[True, False]], "decoder": [[True]]}
    assert widened["encoder"].dtype == torch.bool


def test_a_pass_of_the_decoder_alone_has_no_mask_to_widen() -> None:
    assert list(with_virtual_positions({"decoder": torch.ones(1, 2)}, 3)) == ["decoder"]


@pytest.mark.parametrize("virtual", [0, 1, 4])
def test_density_leaves_virtual_tokens_out_and_the_papers_counts_them(virtual: int) -> None:
    dice = torch.Generator().manual_seed(virtual)
    act = torch.randn(3, virtual + 5, 7, generator=dice).relu()
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] + [0] * 4])
    counts = DensityCounts.empty(["encoder.0"])
    counts.add(0, act, with_virtual_positions({"encoder": mask}, virtual)["encoder"])

    real = [act[row, virtual : virtual + length] for row, length in enumerate((5, 3, 1))]
    nonzero, total = sum(int((part != 0).sum()) for part in real), sum(part.numel() for part in real)
    assert counts.density() == nonzero / total
    assert counts.density_paper() == int((act != 0).sum()) / act.numel()


def test_a_mask_that_was_not_widened_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"^the mask has 8 tokens, the activations have 12$"):
        DensityCounts.empty(["encoder.0"]).add(0, torch.ones(2, 6, 3), torch.ones(2, 4))
