"""Images: rows of a folder and of parquet files, pictures opened when they are needed, and what can be wrong."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from deft_ray.errors import SetupError
from deft_ray.models.base import load_base
from deft_ray.spec.catalog import TASKS
from deft_ray.spec.schema import DataSection
from deft_ray.tasks.encoding import EncodedTask, Example
from deft_ray.tasks.images import Picture, class_names, make_pictures
from deft_ray.tasks.rows import check_data_folder, load_rows
from deft_ray.train.batches import source_mask, source_tensors, training_batch
from deft_ray.train.loading import load_task
from tests.tiny import make_image, png, write_cifar10, write_images

CPU = torch.device("cpu")
PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path, rows=9, validation_rows=6)


def check(folder: Path) -> list[str]:
    with pytest.raises(SetupError) as caught:
        check_data_folder([TASKS["images"]], folder)
    with pytest.raises(SetupError) as again:
        load_rows(TASKS["images"], "train", str(folder), None)
    assert [line.replace(": data.dir: ", ": ") for line in str(again.value).splitlines()] == [
        line.replace(": data.dir: ", ": ") for line in str(caught.value).splitlines()
    ]
    return [line.removeprefix(f"{folder}/images/") for line in str(caught.value).splitlines()]


def test_rows_are_the_files_by_class_and_name(folder: Path) -> None:
    rows = load_rows(TASKS["images"], "train", str(folder), None)

    assert class_names(folder) == ("blue", "green", "red")
    assert [(Path(row["img"]["path"]).parent.name, row["label"]) for row in rows] == [
        *[("blue", 0)] * 3,
        *[("green", 1)] * 3,
        *[("red", 2)] * 3,
    ]
    assert [Path(row["img"]["path"]).name for row in rows[:3]] == ["001.png", "004.png", "007.png"]
    assert all(row["img"]["bytes"] is None for row in rows)
    assert len(load_rows(TASKS["images"], "validation", str(folder), None)) == 6
    assert load_rows(TASKS["images"], "train", str(folder), 4) == load_rows(TASKS["images"], "train", str(folder), 4)
    assert len(load_rows(TASKS["images"], "train", str(folder), 4)) == 4


def test_other_files_are_passed_over_and_other_suffixes_are_not(folder: Path) -> None:
    place = folder / "images" / "train" / "red"
    (place / "notes.txt").write_text("no image")
    (place / "folder.png").mkdir()
    (folder / "images" / "train" / ".thumbnails").mkdir()
    make_image("train", 99).save(place / "big.JPG", format="JPEG")
    make_image("train", 98).save(place / "other.jpeg", format="JPEG")

    rows = load_rows(TASKS["images"], "train", str(folder), None)
    assert {Path(row["img"]["path"]).name for row in rows if row["label"] == 2} == {
        "000.png",
        "003.png",
        "006.png",
        "big.JPG",
        "other.jpeg",
    }


def test_a_good_folder_passes_the_check(tiny_data: Path) -> None:
    check_data_folder([TASKS["images"], TASKS["cifar10"]], tiny_data)


def test_missing_splits_are_named(folder: Path) -> None:
    shutil.rmtree(folder / "images" / "validation")
    assert check(folder) == ["validation: data.dir: no such folder; the task 'images' needs this split"]
    shutil.rmtree(folder / "images")
    assert check(folder) == [
        f"{split}: data.dir: no such folder; the task 'images' needs this split" for split in ("train", "validation")
    ]


def test_a_split_without_classes_is_named(folder: Path) -> None:
    for name in ("red", "green", "blue"):
        shutil.rmtree(folder / "images" / "train" / name)
    assert check(folder) == ["train: data.dir: no classes; needs a subfolder with images for each class"]


def test_a_single_class_is_refused(folder: Path) -> None:
    """A head with one output is a regression's."""
    for split, name in ((split, name) for split in ("train", "validation") for name in ("green", "blue")):
        shutil.rmtree(folder / "images" / split / name)
    assert check(folder) == ["train: data.dir: one class, red; needs a subfolder for each of two or more"]


def test_a_class_that_training_lacks_is_named(folder: Path) -> None:
    shutil.copytree(folder / "images" / "validation" / "red", folder / "images" / "validation" / "pink")
    assert check(folder) == [
        "validation/pink: data.dir: a class that images/train lacks; classes there: blue, green, red"
    ]


def test_a_class_without_images_is_named(folder: Path) -> None:
    for file in (folder / "images" / "train" / "green").iterdir():
        file.unlink()
    assert check(folder) == ["train/green: data.dir: no images; needs .png, .jpg, .jpeg"]


def test_a_folder_has_to_be_given() -> None:
    message = r"^images: needs data\.dir, a folder that holds images/<split>/<class>/<file>$"
    with pytest.raises(SetupError, match=message):
        load_rows(TASKS["images"], "train", None, None)


@pytest.mark.parametrize("content", [b"", b"no image at all", png(make_image("train", 0))[:10]])
def test_a_file_that_is_no_image_is_named_at_once(folder: Path, content: bytes) -> None:
    broken = folder / "images" / "train" / "red" / "003.png"
    broken.write_bytes(content)

    with pytest.raises(SetupError) as caught:
        make_pictures(load_rows(TASKS["images"], "train", str(folder), None), PROCESSOR, 17)
    assert str(caught.value).startswith(f"{broken}: cannot be read as an image (")
    assert str(caught.value).endswith("); needs .png, .jpg, .jpeg")


def test_an_image_that_ends_too_soon_is_named_when_it_is_opened(folder: Path) -> None:
    broken = folder / "images" / "train" / "red" / "003.png"
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)).save(file, format="PNG")
    broken.write_bytes(file.getvalue()[:4000])
    pictures = make_pictures(load_rows(TASKS["images"], "train", str(folder), None), PROCESSOR, 17)

    with pytest.raises(SetupError, match=f"^{broken}: cannot be read as an image"):
        next(picture for picture in pictures if picture.path == str(broken)).pixels()


def test_a_column_without_images_is_named() -> None:
    message = "^image 0: the column 'img' holds no images; needs structs of bytes and path$"
    with pytest.raises(SetupError, match=message):
        make_pictures([{"img": b"raw", "label": 0}], PROCESSOR, 17)


def test_a_nameless_image_is_named_by_its_number() -> None:
    with pytest.raises(SetupError, match=r"^image 1: cannot be read as an image"):
        make_pictures(
            [{"img": {"bytes": content, "path": None}} for content in (png(make_image("train", 0)), b"x")],
            PROCESSOR,
            17,
        )


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "I;16"])
def test_pixels_are_resized_and_normalised_whatever_the_mode(mode: str) -> None:
    """Against Pillow's resize and the arithmetic of the ViT: (x / 255 - 0.5) / 0.5."""
    image = make_image("train", 3).convert("L" if mode == "I;16" else mode)
    image = image.convert("I").convert("I;16") if mode == "I;16" else image
    picture = Picture(png(image), "x.png", PROCESSOR, 17)
    resized = image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    want = (torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255 - 0.5) / 0.5

    assert picture.pixels().dtype == torch.float32
    torch.testing.assert_close(picture.pixels(), want, atol=1e-5, rtol=0)
    assert torch.equal(picture.pixels(), picture.pixels()), "no augmentation"


def test_a_batch_of_images_has_every_token_real() -> None:
    made = [Picture(png(make_image("train", index)), f"{index}", PROCESSOR, 17) for index in range(3)]
    examples = [Example([], [], float(index), picture=picture) for index, picture in enumerate(made)]
    batch = training_batch(examples, pad_id=0, text_to_text=False, regression=False, device=CPU, source_length=128)

    assert {name: tuple(tensor.shape) for name, tensor in batch.inputs.items()} == {
        "pixel_values": (3, 3, 32, 32),
        "labels": (3,),
    }
    assert all(torch.equal(batch.inputs["pixel_values"][index], made[index].pixels()) for index in range(3))
    assert torch.equal(batch.masks["encoder"], torch.ones(3, 17, dtype=torch.int64))
    assert (batch.tokens, batch.items) == ({"encoder": 51}, 3)
    inputs = source_tensors(examples[:2], 0, None, CPU)
    assert source_mask(inputs, examples[:2]).shape == (2, 17)


def loaded(model: Path, data: Path | None, task: str) -> EncodedTask:
    section = DataSection(tasks=[task], dir=None if data is None else str(data))
    return load_task(task, section, load_base(str(model), "vit"))


@pytest.mark.parametrize(("task", "classes"), [("cifar10", 10), ("images", 3)])
def test_a_task_keeps_files_not_pixels(tiny_models: dict[str, Path], tiny_data: Path, task: str, classes: int) -> None:
    data = loaded(tiny_models["vit"], tiny_data, task)

    assert (len(data.train), len(data.validation), data.outputs) == (30, 14, classes)
    assert {example.source_tokens for example in data.train} == {17}
    assert all(len(example.picture.data or b"") < 1000 for example in data.train if example.picture is not None)
    assert {example.label for example in data.train} == set(map(float, range(classes)))


def test_the_hubs_cifar10_is_taken_undecoded(
    tiny_models: dict[str, Path], tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the hub's: features say that the column holds images, which would be opened one and all."""
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str) -> Any:
        asked.append((name, config, split))
        rows = load_rows(TASKS["cifar10"], "train" if split == "train" else "validation", str(tiny_data), None)
        labels = datasets.ClassLabel(num_classes=10)
        features = datasets.Features({"img": datasets.Image(), "label": labels})
        return datasets.Dataset.from_list(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub, folder = (loaded(tiny_models["vit"], data, "cifar10") for data in (None, tiny_data))

    assert asked == [("uoft-cs/cifar10", None, "train"), ("uoft-cs/cifar10", None, "test")]
    for one, other in zip([*hub.train, *hub.validation], [*folder.train, *folder.validation], strict=True):
        assert one.picture is not None
        assert other.picture is not None
        assert (one.picture.data, one.label) == (other.picture.data, other.label)


@pytest.mark.parametrize("label", [10, -2])
def test_a_class_that_cifar10_has_not_is_named(tmp_path: Path, label: int) -> None:
    file = write_cifar10(tmp_path) / "cifar10" / "train.parquet"
    table = pq.read_table(file)
    labels = table["label"].to_pylist()
    labels[2] = label
    pq.write_table(table.set_column(table.schema.get_field_index("label"), "label", pa.array(labels)), file)
    with pytest.raises(
        SetupError, match=rf"^cifar10: train: row 3: unknown label \(got {label}\); allowed: airplane, "
    ):
        load_rows(TASKS["cifar10"], "train", str(tmp_path), None)
