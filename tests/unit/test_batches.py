"""The order of the data, and how examples become tensors."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from deft_ray.tasks.encoding import Example
from deft_ray.train.batches import IGNORED, BatchOrder, pad, source_tensors, training_batch

CPU = torch.device("cpu")


def epoch(count: int, seed: int, number: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + number)).tolist()


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (7, 7), (3, 8), (12, 5), (1, 2)])
def test_order_is_the_documented_permutations_end_to_end(count: int, batch_size: int) -> None:
    order = BatchOrder(count, batch_size, seed=3)
    steps = 9
    stream = [index for number in range(steps * batch_size // count + 1) for index in epoch(count, 3, number)]
    got = [order.indices(step) for step in range(steps)]

    assert got == [stream[step * batch_size : (step + 1) * batch_size] for step in range(steps)]


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (9, 6), (3, 8)])
def test_every_example_comes_once_per_epoch(count: int, batch_size: int) -> None:
    order = BatchOrder(count, batch_size, seed=0)
    seen = [index for step in range(count) for index in order.indices(step)]

    assert all(sorted(seen[start : start + count]) == list(range(count)) for start in range(0, len(seen), count))


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (9, 6), (3, 8), (400, 8), (1009, 7), (64, 16), (5, 5)])
def test_grouping_by_length_keeps_every_example_once_per_epoch(count: int, batch_size: int) -> None:
    dice = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 100, (count,), generator=dice).tolist()
    order = BatchOrder(count, batch_size, 1, lengths)
    seen = [index for step in range(3 * count // batch_size) for index in order.indices(step)]

    epochs = [seen[start : start + count] for start in range(0, len(seen) - count + 1, count)]
    assert all(sorted(one) == list(range(count)) for one in epochs)
    assert count < 100 or len({tuple(one) for one in epochs}) == len(epochs), "each epoch has its own order"


@pytest.mark.parametrize("batch_size", [4, 16, 30])
def test_grouping_by_length_leaves_little_padding(batch_size: int) -> None:
    dice = torch.Generator().manual_seed(3)
    count = 2000
    lengths = torch.randint(4, 60, (count,), generator=dice).tolist()

    def real_share(order: BatchOrder, epochs: int) -> float:
        batches = [order.indices(step) for step in range(epochs * count // batch_size)]
        computed = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
        return sum(lengths[i] for batch in batches for i in batch) / computed

    assert real_share(BatchOrder(count, batch_size, 0), 3) < 0.75
    assert real_share(BatchOrder(count, batch_size, 0, lengths), 3) > 0.95


def test_long_and_short_batches_come_in_no_order() -> None:
    lengths = list(range(800))
    order = BatchOrder(800, 8, 0, lengths)
    means = [sum(order.indices(step)) / 8 for step in range(100)]
    rises = sum(later > earlier for earlier, later in pairwise(means))

    assert 30 < rises < 70


def test_order_is_a_function_of_the_step_alone() -> None:
    forward, backward = BatchOrder(11, 4, seed=1), BatchOrder(11, 4, seed=1)
    want = [forward.indices(step) for step in range(8)]

    assert [backward.indices(step) for step in reversed(range(8))] == want[::-1]
    assert want != [BatchOrder(11, 4, seed=2).indices(step) for step in range(8)]


def test_no_seed_repeats_the_epochs_of_another() -> None:
    assert epoch(50, 0, 1) != epoch(50, 1, 0)
    assert BatchOrder(50, 50, 0).indices(1) != BatchOrder(50, 50, 1).indices(0)


def test_padding_goes_right_to_the_longest_or_further() -> None:
    assert pad([[1, 2, 3], [4]], 9).tolist() == [[1, 2, 3], [4, 9, 9]]
    assert pad([[1, 2, 3], [4]], 9, length=5).tolist() == [[1, 2, 3, 9, 9], [4, 9, 9, 9, 9]]
    assert pad([[1, 2, 3], [4]], 9, length=2).tolist() == [[1, 2, 3], [4, 9, 9]], "nothing is cut"
    assert pad([[1]], 0).dtype == torch.int64


def test_a_text_to_text_batch_masks_both_sides() -> None:
    examples = [Example([5, 6, 1], [7, 1], 0), Example([8, 1], [9, 9, 9, 1], 1)]
    batch = training_batch(examples, pad_id=0, text_to_text=True, regression=False, device=CPU)

    assert batch.inputs["input_ids"].tolist() == [[5, 6, 1], [8, 1, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.inputs["labels"].tolist() == [[7, 1, IGNORED, IGNORED], [9, 9, 9, 1]]
    assert batch.masks["encoder"].tolist() == batch.inputs["attention_mask"].tolist()
    assert batch.masks["decoder"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.tokens == {"encoder": 5, "decoder": 6}
    assert batch.items == 6


def test_a_padding_token_inside_a_text_is_still_real() -> None:
    batch = training_batch([Example([0, 5], [0, 1], 0)], pad_id=0, text_to_text=True, regression=False, device=CPU)

    assert batch.masks["encoder"].tolist() == [[1, 1]]
    assert batch.masks["decoder"].tolist() == [[1, 1]]


@pytest.mark.parametrize(("regression", "dtype"), [(False, torch.int64), (True, torch.float32)])
def test_an_encoder_batch_has_one_label_a_row(regression: bool, dtype: torch.dtype) -> None:
    examples = [Example([2, 5, 3], [], 1.0), Example([2, 3], [], 2.0)]
    batch = training_batch(examples, pad_id=7, text_to_text=False, regression=regression, device=CPU)

    assert batch.inputs["labels"].tolist() == [1, 2]
    assert batch.inputs["labels"].dtype == dtype
    assert batch.inputs["input_ids"].tolist() == [[2, 5, 3], [2, 3, 7]]
    assert list(batch.masks) == list(batch.tokens) == ["encoder"]
    assert (batch.tokens["encoder"], batch.items) == (5, 2)
    assert "token_type_ids" not in batch.inputs


def test_type_ids_are_padded_too() -> None:
    examples = [Example([2, 5, 3], [], 0, type_ids=(0, 1, 1)), Example([2, 3], [], 0, type_ids=(0, 0))]

    assert source_tensors(examples, 0, 4, CPU)["token_type_ids"].tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]


def test_a_decoder_is_padded_left_and_told_the_positions() -> None:
    """Position i belongs to the i-th real token; what padding gets is masked."""
    examples = [Example([5, 6, 8], [], 1.0), Example([9], [], 0.0)]
    batch = training_batch(
        examples, pad_id=6, text_to_text=False, regression=False, device=CPU, source_length=4, side="decoder"
    )

    assert batch.inputs["input_ids"].tolist() == [[6, 5, 6, 8], [6, 6, 6, 9]]
    assert batch.inputs["attention_mask"].tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert batch.inputs["position_ids"].tolist() == [[0, 0, 1, 2], [0, 0, 0, 0]]
    assert batch.masks["decoder"].tolist() == batch.inputs["attention_mask"].tolist()
    assert list(batch.masks) == list(batch.tokens) == ["decoder"]
    assert (batch.tokens["decoder"], batch.items) == (4, 2)


def test_fixed_lengths() -> None:
    batch = training_batch(
        [Example([5, 1], [7, 1], 0)],
        pad_id=0,
        text_to_text=True,
        regression=False,
        device=CPU,
        source_length=6,
        target_length=4,
    )

    assert {name: tuple(tensor.shape) for name, tensor in batch.inputs.items()} == {
        "input_ids": (1, 6),
        "attention_mask": (1, 6),
        "labels": (1, 4),
    }
    assert batch.tokens == {"encoder": 2, "decoder": 2}


def test_a_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^a batch needs at least one example \(got none\)$"):
        source_tensors([], 0, None, CPU)
