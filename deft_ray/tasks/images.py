"""Image tasks: rows from a folder of images, and pictures that are opened when a batch needs them.

A row is ``{"img": {"bytes": ..., "path": ...}, "label": n}``, as data sets with images lie in parquet files; in a
folder of images the bytes stay where they are. So a task takes the memory of its compressed files, or of their names.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deft_ray.errors import SetupError

if TYPE_CHECKING:  # folders are checked before anything heavy is imported
    from torch import Tensor

_SUFFIXES = (".png", ".jpg", ".jpeg")

#: Under ``data.dir``: ``images/train/<class>/<file>`` and ``images/validation/<class>/<file>``.
FOLDER = "images"


@dataclass(frozen=True)
class Picture:
    """One image, opened anew for every batch.

    Args:
        data: The file's content; None where it is read from ``path``.
        path: The file, or where the content came from.
        processor: The model's image processor: resizes and normalises, always alike.
        tokens: Tokens that the model makes of it.
    """

    data: bytes | None
    path: str
    processor: Any
    tokens: int

    def pixels(self) -> Tensor:
        """Return (3, H, W) float32, as the model takes it.

        Raises:
            SetupError: If this is no image, naming the file.
        """
        image = _open(self.data, self.path, whole=True)
        pixels: Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels


def make_pictures(rows: Sequence[dict[str, Any]], processor: Any, tokens: int) -> list[Picture]:
    """Look at the head of every image, and keep it for later.

    Raises:
        SetupError: If one is no image, naming its file or number.
    """
    pictures = []
    for number, row in enumerate(rows):
        image = row["img"]
        if not isinstance(image, dict) or not {"bytes", "path"} <= image.keys():
            raise SetupError(f"image {number}: the column 'img' holds no images; needs structs of bytes and path")
        data, path = image["bytes"], image["path"] or f"image {number}"
        _open(data, path, whole=False)
        pictures.append(Picture(data, path, processor, tokens))
    return pictures


def _open(data: bytes | None, path: str, *, whole: bool) -> Any:
    from PIL import Image

    try:
        with Image.open(path if data is None else io.BytesIO(data)) as image:
            return image.convert("RGB") if whole else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # damaged files raise them all
        raise SetupError(f"{path}: cannot be read as an image ({error}); needs {', '.join(_SUFFIXES)}") from None


def class_names(folder: Path) -> tuple[str, ...]:
    """Return the classes of a data folder: the subfolders of ``images/train``, sorted."""
    return _classes(folder / FOLDER / "train")


def folder_faults(folder: Path) -> list[str]:
    """List what is wrong with a data folder's images, without opening one."""
    place, train = folder / FOLDER, class_names(folder)
    faults = []
    if len(train) == 1:
        faults.append(f"{place / 'train'}: data.dir: one class, {train[0]}; needs a subfolder for each of two or more")
    for split in ("train", "validation"):
        if not (place / split).is_dir():
            faults.append(f"{place / split}: data.dir: no such folder; the task 'images' needs this split")
            continue
        classes = _classes(place / split)
        if not classes:
            faults.append(f"{place / split}: data.dir: no classes; needs a subfolder with images for each class")
        faults += [
            f"{place / split / name}: data.dir: no images; needs {', '.join(_SUFFIXES)}"
            for name in classes
            if not _files(place / split / name)
        ]
        faults += [
            f"{place / split / name}: data.dir: a class that images/train lacks; classes there: {', '.join(train)}"
            for name in classes
            if train and name not in train
        ]
    return faults


def folder_rows(folder: Path, split: str) -> list[dict[str, Any]]:
    """List the images of one split with their labels, sorted by class and file.

    Raises:
        SetupError: If the folder is not as the task needs it.
    """
    faults = folder_faults(folder)
    if faults:
        raise SetupError("\n".join(faults))
    label = {name: number for number, name in enumerate(class_names(folder))}
    place = folder / FOLDER / split
    return [
        {"img": {"bytes": None, "path": str(file)}, "label": label[name]}
        for name in _classes(place)
        for file in _files(place / name)
    ]


def _classes(place: Path) -> tuple[str, ...]:
    if not place.is_dir():
        return ()
    return tuple(sorted(entry.name for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def _files(place: Path) -> list[Path]:
    return sorted(file for file in place.iterdir() if file.suffix.lower() in _SUFFIXES and file.is_file())
