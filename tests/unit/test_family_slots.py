"""OPT, GPT-2 and ViT through a slot, against transformers and PEFT by themselves, one unpadded row at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from deft_ray.spec.schema import TrialSpec
from deft_ray.train.slot import Slot
from tests.plain_peft import PlainCounts, answers_of_head, texts_of
from tests.slots import (
    EPSILON,
    check_density,
    check_score,
    first_indices,
    gradient_of,
    run,
    same,
    seen_activations,
    shaken,
    soft_density,
    taken_gradient,
    trained,
    worst,
)
from tests.tiny import glue_rows, make_image

#: Model, task, outputs of the head, text columns.
CASES = (
    ("gpt2", "mnli", 3, ("premise", "hypothesis")),
    ("gpt2", "stsb", 1, ("sentence1", "sentence2")),
    ("opt", "sst2", 2, ("sentence",)),
    ("narrow-opt", "qnli", 2, ("question", "sentence")),
    ("vit", "cifar10", 10, ()),
    ("vit", "images", 3, ()),
)


@pytest.fixture
def open_slot(open_slot: Callable[[TrialSpec], Slot], trial: Callable[..., TrialSpec]) -> Callable[..., Slot]:
    """Opens the slot of a model on a task."""
    return lambda name, task, **leaves: open_slot(trial(name, task, **leaves))


def plain_inputs(folder: Path, data: Path, task: str, columns: tuple[str, ...], split: str) -> list[dict[str, Tensor]]:
    """One input per row, as anybody would make it: unpadded text, or an image by the model's processor."""
    if columns:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        count = 30 if split == "train" else 14
        return texts_of(tokenizer, glue_rows(task, split, count), columns)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return [dict(processor(image, return_tensors="pt")) for image, _ in plain_images(data, task, split)]


def plain_images(data: Path, task: str, split: str) -> list[tuple[Image.Image, int]]:
    """Images and labels in the order in which a data set lists them."""
    if task == "images":
        numbered = [(index % 3, index) for index in range(30 if split == "train" else 14)]
        names = ("red", "blue", "green")
        named = sorted((names[colour], index) for colour, index in numbered)
        return [(make_image(split, index), ["blue", "green", "red"].index(name)) for name, index in named]
    name = "test" if split == "validation" else split
    labels = pq.read_table(data / "cifar10" / f"{name}.parquet").column("label").to_pylist()
    return [(make_image(name, index), label) for index, label in enumerate(labels)]


def plain_labels(data: Path, task: str, columns: tuple[str, ...]) -> list[float]:
    if columns:
        return [row["label"] for row in glue_rows(task, "validation", 14)]
    return [label for _, label in plain_images(data, task, "validation")]


def reopened(folder: Path, adapter: Path, outputs: int, quantization: str) -> Any:
    auto: Any = AutoModelForImageClassification if folder.name == "vit" else AutoModelForSequenceClassification
    options: dict[str, Any] = {"num_labels": outputs}
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["score", "classifier"],
        )
        options["device_map"] = {"": "cpu"}
    model = auto.from_pretrained(folder, **options)
    for layer in (module for module in model.modules() if isinstance(module, Linear4bit)):
        layer.support_avx512bf16_for_cpu = False  # some CPUs would evaluate in bfloat16, and fail below a width of 64
    return PeftModel.from_pretrained(model, adapter).eval()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(("name", "task", "outputs", "columns"), CASES)
@torch.no_grad()
def test_score_and_density_as_plain_peft_finds_them(
    open_slot: Any,
    tiny_models: dict[str, Path],
    tiny_data: Path,
    tmp_path: Path,
    name: str,
    task: str,
    outputs: int,
    columns: tuple[str, ...],
    quantization: str,
) -> None:
    with torch.enable_grad():
        slot = open_slot(
            name, task, model__quantization=quantization, deft__alpha=1.0, train__steps=10, train__batch_size=10
        )
        losses = run(slot)
        slot.save_adapter(tmp_path)
        found = slot.evaluate(last=True)
    assert len(set(losses)) == 10
    model = reopened(tiny_models[name], tmp_path, outputs, quantization)
    counts = PlainCounts(model)
    said = answers_of_head(model, plain_inputs(tiny_models[name], tiny_data, task, columns, "validation"))

    check_density(found, counts)
    side, other = ("encoder", "decoder") if name == "vit" else ("decoder", "encoder")
    assert found.counts.density(side) == found.counts.density() is not None
    assert found.counts.density(other) is None
    assert set(found.counts.density_layers()) == {f"{side}.0", f"{side}.1"}
    check_score(found, said, plain_labels(tiny_data, task, columns), 1e-4 if outputs == 1 else None)


def plain_gradient(
    slot: Slot, rows: list[dict[str, Tensor]], labels: list[float], outputs: int, alpha: float
) -> dict[str, Tensor]:
    """Gradient of task loss + α x density over these rows, passed one by one; densities weigh every token alike."""
    losses = []
    with seen_activations(slot) as acts:
        for row, label in zip(rows, labels, strict=True):
            logits = slot.model(**row).logits
            if outputs == 1:
                losses.append((logits[0, 0] - label) ** 2)
            else:
                losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([int(label)])))
    densities = [soft_density(torch.cat([act.reshape(-1, act.shape[-1]) for act in layer])) for layer in acts.values()]
    return gradient_of(slot, torch.stack(losses).mean() + alpha * torch.stack(densities).mean())


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize(("name", "task", "outputs", "columns"), CASES)
def test_a_step_has_the_gradient_of_its_rows_one_by_one(
    open_slot: Any,
    tiny_models: dict[str, Path],
    tiny_data: Path,
    name: str,
    task: str,
    outputs: int,
    columns: tuple[str, ...],
    micro: int | None,
) -> None:
    """Padding on the left moves neither the answer nor the density; nor does cutting the batch into pieces."""
    name = f"dry-{name}"
    slot = open_slot(
        name,
        task,
        deft__alpha=2.0,
        deft__approximation="l0",
        deft__epsilon=EPSILON,
        train__micro_batch_size=micro,
        train__max_grad_norm=0.0,
        train__gradient_checkpointing=micro == 2,
    )
    shaken(slot)
    inputs = plain_inputs(tiny_models[name], tiny_data, task, columns, "train")
    order = first_indices(slot)
    labels = [slot.data.train[index].label for index in order]
    want = plain_gradient(slot, [inputs[index] for index in order], labels, outputs, 2.0)
    slot.step()

    assert worst(taken_gradient(slot), want) < 3e-5


@pytest.mark.parametrize(("name", "task"), [("gpt2", "rte"), ("opt", "rte"), ("vit", "images")])
def test_gradient_checkpointing_changes_nothing(open_slot: Any, name: str, task: str) -> None:
    leaves = {"deft__alpha": 2.0, "deft__epsilon": EPSILON}
    plain, checkpointed = (
        trained(open_slot(name, task, train__gradient_checkpointing=on, **leaves)) for on in (False, True)
    )
    assert same(plain, checkpointed)


@pytest.mark.parametrize(("name", "task"), [("gpt2", "mnli"), ("opt", "mnli"), ("vit", "cifar10")])
def test_the_density_loss_falls_where_it_is_asked_to(open_slot: Any, name: str, task: str) -> None:
    last = {}
    for alpha in (0.0, 20.0):
        slot = open_slot(name, task, deft__alpha=alpha, deft__epsilon=0.1, train__steps=12)
        results = [slot.step(measure=True) for _ in range(12)]
        last[alpha] = results[-1].density_loss
        assert [r.penalty for r in results] == pytest.approx([alpha * r.density_loss for r in results], rel=1e-6)

    assert last[20.0] < last[0.0] - 0.02
