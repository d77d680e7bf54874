"""How much memory a host will need, told from a model's files before anything is loaded.

Sizes of weights stand in the headers of ``.safetensors`` files, the rest in ``config.json``; neither torch nor
transformers is imported. What the backward pass keeps is counted in multiples of the model's widths, as autograd keeps
it (``tests/unit/test_footprint.py`` compares it with what autograd keeps). What a pass needs for a moment beside that,
opened 4-bit weights or gradients, is not told.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deft_ray.nano import MODEL_DIR
from deft_ray.spec.catalog import NANO, TABLES, TEXT_TO_TEXT
from deft_ray.spec.machine import Machine
from deft_ray.spec.plan import Footprint, gpus_per_worker
from deft_ray.spec.schema import AdapterSection, SweepSpec

#: Bytes of a parameter that is trained: itself, its gradient and two moments of AdamW, in float32.
TRAINED_BYTES = 16
#: Bytes of the libraries that a worker has loaded before it has a model, on a CPU: measured.
LIBRARIES_BYTES = int(0.75 * 2**30)

#: Elements that a layer keeps for each token, dropout in the model and LoRA in all linear layers: multiples of d_model,
#: of d_ff, and of heads x tokens that are attended to (attention weights, where attention keeps them).
_KEPT = {"bert": (10, 2, 3), "roberta": (10, 2, 3), "vit": (10, 2, 3), "opt": (10, 1, 0), "gpt2": (10, 5, 3)}
#: The same of T5's encoder and decoder, whose MLP is gated or not: by d_ff.
_KEPT_T5 = {"encoder": (12, 3), "decoder": (15, 3)}
_KEPT_T5_MLP = {True: 8, False: 3}
#: Copies of an adapted layer's input that dropout before LoRA leaves.
_DROPPED = 1.5

_CONFIG_KEYS = {
    "t5": ("d_model", "d_ff", "num_heads", "num_layers"),
    "bert": ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"),
    "roberta": ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"),
    "vit": ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"),
    "opt": ("hidden_size", "ffn_dim", "num_attention_heads", "num_hidden_layers"),
    "gpt2": ("n_embd", "n_inner", "n_head", "n_layer"),
}
_HEADS = ("lm_head", "classifier", "score", "pooler")


@dataclass(frozen=True)
class _Shape:
    """A model's widths, and its tensors by name."""

    family: str
    d_model: int
    d_ff: int
    heads: int
    layers: int
    decoder_layers: int
    vocabulary: int
    gated: bool
    image_tokens: int
    tensors: dict[str, tuple[int, ...]]

    @property
    def linear(self) -> dict[str, tuple[int, ...]]:
        """Weights of linear layers within blocks, by the layer's name."""
        return {
            name.removesuffix(".weight"): size
            for name, size in self.tensors.items()
            if len(size) == 2 and name.endswith(".weight") and not any(word in name for word in (*_HEADS, *TABLES))
        }


def predict_footprint(spec: SweepSpec, machine: Machine) -> Footprint | None:
    """Say what a host's base takes, and each trial that it trains beside others.

    Sources count as ``data.max_source_tokens`` long, answers as ``data.max_target_tokens``; a searched leaf of the
    adapter counts with its largest value.

    Args:
        spec: A checked spec.
        machine: Whether hosts compute on a GPU; on a CPU the libraries of a worker count too.

    Returns:
        None where the model is not in a folder here, or not as safetensors.
    """
    on_gpu = bool(gpus_per_worker(spec, machine.gpus))
    folder = _folder(spec.model.name, spec.model.revision)
    shape = None if folder is None else _read(folder, spec.family)
    if shape is None:
        return None
    base = _base_bytes(shape, spec, on_gpu=on_gpu) + (0 if on_gpu else LIBRARIES_BYTES)
    return Footprint(base / 2**30, slot_bytes(shape, spec) / 2**30)


def slot_bytes(shape: _Shape, spec: SweepSpec) -> float:
    """Bytes of a trial: what it trains, and what a pass keeps for its micro-batch."""
    trained = _trained(shape, spec) * TRAINED_BYTES
    return trained + kept_elements(shape, spec) * _rows(spec) * _bytes_of(spec.model.dtype)


def kept_elements(shape: _Shape, spec: SweepSpec) -> float:
    """Elements that the backward pass keeps for each example."""
    source, target = spec.data.max_source_tokens, spec.data.max_target_tokens
    if shape.family not in TEXT_TO_TEXT:
        tokens = shape.image_tokens or source
        by_d, by_f, by_heads = _KEPT[shape.family]
        layer = tokens * (by_d * shape.d_model + by_f * shape.d_ff + by_heads * shape.heads * tokens)
        return _over_layers(layer, tokens, shape.layers, spec, shape.d_model) + _adapter_elements(
            shape, spec, tokens, 0
        )
    mlp = _KEPT_T5_MLP[shape.gated] * shape.d_ff
    (enc_d, enc_heads), (dec_d, dec_heads) = _KEPT_T5["encoder"], _KEPT_T5["decoder"]
    encoder = source * (enc_d * shape.d_model + mlp + enc_heads * shape.heads * source)
    decoder = target * (dec_d * shape.d_model + mlp + dec_heads * shape.heads * (target + source))
    logits = 2 * target * shape.vocabulary
    return (
        _over_layers(encoder, source, shape.layers, spec, shape.d_model)
        + _over_layers(decoder, target, shape.decoder_layers, spec, shape.d_model)
        + logits
        + _adapter_elements(shape, spec, source, target)
    )


def _over_layers(layer: float, tokens: int, layers: int, spec: SweepSpec, d_model: int) -> float:
    """All layers at once; with checkpointing one, and what enters each."""
    return layer + layers * tokens * d_model if spec.train.gradient_checkpointing else layers * layer


def _adapter_elements(shape: _Shape, spec: SweepSpec, source: int, target: int) -> float:
    """What LoRA keeps between its two products, and its dropout of what enters."""
    if spec.adapter.kind != "lora" or spec.train.gradient_checkpointing:
        return 0.0
    rank, drops = _largest(spec, "adapter.r"), _largest(spec, "adapter.lora_dropout") > 0
    elements = 0.0
    for name, size in _targets(shape, spec.adapter).items():
        tokens = target if name.startswith("decoder.") and target else source
        entering = size[0] if shape.family == "gpt2" else size[1]  # its Conv1D has them the other way round
        elements += tokens * (rank + (_DROPPED * entering if drops else 0))
    return elements


def _targets(shape: _Shape, adapter: AdapterSection) -> dict[str, tuple[int, ...]]:
    if adapter.target_modules == "all-linear":
        return shape.linear
    names = tuple(adapter.target_modules)
    return {name: size for name, size in shape.linear.items() if name.rsplit(".", 1)[-1] in names or name in names}


def _trained(shape: _Shape, spec: SweepSpec) -> float:
    """Parameters of the largest adapter that a trial can have.

    A head is left out, as is all that it and a bottleneck keep for the backward pass.
    """
    adapter = spec.adapter
    d_model, layers = shape.d_model, shape.layers + shape.decoder_layers
    kinds = {
        "lora": _largest(spec, "adapter.r") * sum(sum(size) for size in _targets(shape, adapter).values()),
        "bottleneck": layers
        * ((2 * d_model + 1) * math.ceil(d_model / min(_bounds(spec, "adapter.reduction_factor"))) + d_model),
        "prefix": _largest(spec, "adapter.virtual_tokens")
        * (shape.decoder_layers | 1 if shape.decoder_layers else layers)
        * 2
        * d_model,
        "prompt": _largest(spec, "adapter.virtual_tokens") * d_model,
    }
    domain = spec.space.get("adapter.kind")
    return max(kinds[str(kind)] for kind in (domain.args if domain else (adapter.kind,)))


def _largest(spec: SweepSpec, dotted: str) -> float:
    return max(_bounds(spec, dotted))


def _bounds(spec: SweepSpec, dotted: str) -> list[float]:
    """Values that a number can take, or the ends of its range."""
    domain = spec.space.get(dotted)
    section, leaf = dotted.split(".")
    return [float(value) for value in (domain.args if domain else (getattr(getattr(spec, section), leaf),))]


def _rows(spec: SweepSpec) -> int:
    """Examples of a micro-batch on one worker."""
    rows = math.ceil(_largest(spec, "train.batch_size") / spec.resources.workers_per_host)
    micro = spec.train.micro_batch_size
    return rows if micro is None else min(rows, micro)


def _base_bytes(shape: _Shape, spec: SweepSpec, *, on_gpu: bool) -> float:
    model = spec.model
    each = _bytes_of(model.dtype)
    if model.quantization == "none":
        return each * sum(math.prod(size) for size in shape.tensors.values())
    scale = 1 / 64 + 4 / (64 * 256) if model.double_quant else 4 / 64
    wo = model.wo or ("bfloat16" if on_gpu else model.dtype)
    quantised = 0.0
    for name, size in shape.tensors.items():
        if name.removesuffix(".weight") not in shape.linear:
            quantised += each * math.prod(size)
        elif shape.family == "t5" and name.endswith(".wo.weight") and wo != "nf4":
            quantised += _bytes_of(wo) * math.prod(size)
        else:
            quantised += (0.5 + scale) * math.prod(size)
    return quantised


def _bytes_of(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else 4


def _folder(name: str, revision: str | None) -> Path | None:
    """The folder of a model: as named, the embedded one's, or that of an earlier download."""
    if name == NANO:
        return MODEL_DIR
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder
    home = Path(os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface"))
    kept = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{name.replace('/', '--')}"
    try:
        commit = (kept / "refs" / (revision or "main")).read_text(encoding="utf-8").strip()
    except OSError:
        commit = revision or ""
    folder = kept / "snapshots" / commit
    return folder if commit and folder.is_dir() else None


def _read(folder: Path, family: str) -> _Shape | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors: dict[str, tuple[int, ...]] = {}
        for file in _weight_files(folder):
            tensors |= _header(file)
        return _shape(config, family, tensors) if tensors else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, struct.error):
        return None  # what is wrong with it, the checks before a sweep say


def _weight_files(folder: Path) -> list[Path]:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return []
    return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a safetensors file's tensors: eight bytes of length, then JSON."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > file.stat().st_size:
            raise ValueError(f"{file}: is no safetensors file")
        header: dict[str, Any] = json.loads(opened.read(length))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def _shape(config: dict[str, Any], family: str, tensors: dict[str, tuple[int, ...]]) -> _Shape:
    d_model, d_ff, heads, layers = (config.get(key) for key in _CONFIG_KEYS[family])
    d_model = int(d_model)  # type: ignore[arg-type]  # a config without it is told by the TypeError
    image = config.get("image_size"), config.get("patch_size")
    return _Shape(
        family=family,
        d_model=d_model,
        d_ff=int(d_ff or 4 * d_model),
        heads=int(heads),  # type: ignore[arg-type]
        layers=int(layers),  # type: ignore[arg-type]
        decoder_layers=int(config.get("num_decoder_layers") or layers) if family in TEXT_TO_TEXT else 0,  # type: ignore[arg-type]
        vocabulary=int(config.get("vocab_size") or 0),
        gated="gated" in str(config.get("feed_forward_proj", "")),
        image_tokens=(image[0] // image[1]) ** 2 + 1 if family == "vit" and all(image) else 0,  # type: ignore[operator]
        tensors=tensors,
    )
