"""Tiny models and rows, written once per session; a process group of one; warnings of libraries about each other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from deft_ray.train.ranks import Ranks

#: Warnings of libraries about each other, which nothing here can mend.
LIBRARY_WARNINGS = (
    # PEFT asks transformers by the old name.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    # DeepSpeed's ZeRO pulls in torch's compiler, which still defines scripted classes.
    r"ignore:`torch\.jit\.\w+` is deprecated:DeprecationWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    for line in LIBRARY_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders: ``t5`` (gated GELU), ``dry-t5`` (the same without dropout), ``relu-t5``, one of each other family."""
    from tests import tiny

    root = tmp_path_factory.mktemp("models")
    return {
        "t5": tiny.write_tiny_t5(root / "t5"),
        "dry-t5": tiny.write_tiny_t5(root / "dry-t5", dropout=0.0),
        "relu-t5": tiny.write_tiny_t5(root / "relu-t5", gated=False),
        "bert": tiny.write_tiny_bert(root / "bert"),
        "roberta": tiny.write_tiny_roberta(root / "roberta"),
        "opt": tiny.write_tiny_opt(root / "opt"),
        "narrow-opt": tiny.write_tiny_opt(root / "narrow-opt", narrow=True),
        "gpt2": tiny.write_tiny_gpt2(root / "gpt2"),
        "vit": tiny.write_tiny_vit(root / "vit"),
    }


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with made-up rows of all GLUE tasks, SQuAD, CIFAR-10 and a folder of images."""
    from tests import tiny

    folder = tmp_path_factory.mktemp("data")
    tiny.write_glue(folder, rows=30, validation_rows=14)
    tiny.write_cifar10(folder)
    tiny.write_images(folder)
    return tiny.write_squad(folder, rows=30, validation_rows=14)


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    """One worker."""
    from deft_ray.train.ranks import start_single

    return start_single()
