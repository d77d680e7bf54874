"""Look at a local model folder without loading it."""

from __future__ import annotations

import json
from pathlib import Path

from deft_ray.errors import SetupError

#: In the order in which transformers looks for them.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_IMAGE_PROCESSORS = ("preprocessor_config.json",)
_TOKENIZERS = ("tokenizer.json", "spiece.model", "vocab.txt", "vocab.json", "sentencepiece.bpe.model")


def check_model_folder(folder: Path, *, images: bool = False) -> None:
    """Check that a folder holds all that ``from_pretrained`` will want.

    Args:
        folder: The model's folder.
        images: Whether the model reads images: it needs an image processor, where others need a tokenizer.

    Raises:
        SetupError: Naming every kind of file that is missing, and every shard that an index names in vain.
    """
    wanted = {"config": ("config.json",), "weights": _WEIGHTS}
    wanted |= {"image processor": _IMAGE_PROCESSORS} if images else {"tokenizer": _TOKENIZERS}
    faults = [
        f"{folder}: model.name: no {what} in this folder; needs {' or '.join(names)}"
        for what, names in wanted.items()
        if not any((folder / name).is_file() for name in names)
    ]
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is not None and weights.suffix == ".json":
        faults += [f"{weights}: model.name: {fault}" for fault in _index_faults(weights)]
    if faults:
        raise SetupError("\n".join(faults))


def _index_faults(index: Path) -> list[str]:
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ["is no index of weights; needs a 'weight_map'"]
    return [f"names {shard}, which is not there" for shard in shards if not (index.parent / shard).is_file()]
