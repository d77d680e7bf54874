"""Look at a local model folder without loading it."""

from __future__ import annotations

from pathlib import Path

from deft_ray.errors import SetupError

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = ("tokenizer.json", "spiece.model", "vocab.txt", "vocab.json", "sentencepiece.bpe.model")


def check_model_folder(folder: Path) -> None:
    """Check that a folder holds all that ``from_pretrained`` will want.

    Raises:
        SetupError: Naming every kind of file that is missing.
    """
    wanted = {"config": ("config.json",), "weights": _WEIGHTS, "tokenizer": _TOKENIZERS}
    missing = [
        f"{folder}: model.name: no {what} in this folder; needs {' or '.join(names)}"
        for what, names in wanted.items()
        if not any((folder / name).is_file() for name in names)
    ]
    if missing:
        raise SetupError("\n".join(missing))
