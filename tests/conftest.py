"""Tiny models and rows, written once per session; slots on them; a process group of one; warnings of libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from deft_ray.models.base import Base
    from deft_ray.spec.schema import TrialSpec
    from deft_ray.train.ranks import Ranks
    from deft_ray.train.slot import Slot

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
    """Folders: ``t5`` (gated GELU), ``relu-t5``, one of each other family; all but ``relu-t5`` without dropout too."""
    from tests import tiny

    root = tmp_path_factory.mktemp("models")
    writers: dict[str, Callable[..., Path]] = {
        "t5": tiny.write_tiny_t5,
        "bert": tiny.write_tiny_bert,
        "roberta": tiny.write_tiny_roberta,
        "opt": tiny.write_tiny_opt,
        "narrow-opt": partial(tiny.write_tiny_opt, narrow=True),
        "gpt2": tiny.write_tiny_gpt2,
        "vit": tiny.write_tiny_vit,
    }
    return {
        "relu-t5": tiny.write_tiny_t5(root / "relu-t5", gated=False),
        **{name: write(root / name) for name, write in writers.items()},
        **{f"dry-{name}": write(root / f"dry-{name}", dropout=0.0) for name, write in writers.items()},
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


@pytest.fixture(scope="session")
def trial(tiny_models: dict[str, Path], tiny_data: Path) -> Callable[..., TrialSpec]:
    """Makes the trial of a tiny model, named first, on a task; then ``section__key=value``."""
    from tests.tiny import tiny_trial

    def make(name: str, task: str = "mrpc", **leaves: Any) -> TrialSpec:
        return tiny_trial(tiny_models[name], name.split("-")[-1], tiny_data, task, **leaves)

    return make


@pytest.fixture(scope="module")
def base_of() -> Callable[[TrialSpec], Base]:
    """Gives the base of a trial, loaded once per test module."""
    from deft_ray.models.base import load_base

    loaded: dict[tuple[str, ...], Base] = {}

    def get(spec: TrialSpec) -> Base:
        model = spec.model
        key = (model.name, model.quantization, model.dtype)
        if key not in loaded:
            loaded[key] = load_base(model.name, str(model.family), quantization=model.quantization, dtype=model.dtype)
        return loaded[key]

    return get


@pytest.fixture
def open_slot(base_of: Callable[[TrialSpec], Base], ranks: Ranks) -> Iterator[Callable[[TrialSpec], Slot]]:
    """Opens the slot of a trial on one worker; the one before it, and the last at the end, are closed."""
    from tests.slots import new_slot

    opened: list[Slot] = []

    def make(spec: TrialSpec) -> Slot:
        while opened:
            opened.pop().close()
        opened.append(new_slot(spec, base_of(spec), ranks))
        return opened[0]

    yield make
    while opened:
        opened.pop().close()
