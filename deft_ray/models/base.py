"""Load a frozen base: weights, tokenizer, quantisation, and where its activations are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from deft_ray.density.sites import Site
from deft_ray.models.families import FAMILIES, Family, activation_name, find_sites, is_never_negative
from deft_ray.nano import MODEL_DIR
from deft_ray.spec.catalog import NANO


@dataclass(frozen=True)
class Base:
    """One frozen base, loaded once per host.

    Args:
        model: Frozen, on its device.
        tokenizer: Its tokenizer.
        family: Its family.
        sites: Where its MLP activations are.
        dtype: Compute dtype by name, as it stands in records.
        activation: Activation module's class name, as it stands in records.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    family: Family
    sites: list[Site]
    dtype: str
    activation: str

    @property
    def never_negative(self) -> bool:
        """Whether no activation can be below zero, as after ReLU."""
        return is_never_negative(self.sites)


def load_base(
    name: str,
    family: str,
    *,
    quantization: str = "none",
    double_quant: bool = True,
    dtype: str = "float32",
    revision: str | None = None,
    device: torch.device | None = None,
) -> Base:
    """Load and, if asked, quantise a base; every parameter is frozen.

    Args:
        name: ``nano``, a local folder, or a hub name.
        family: Key of :data:`~deft_ray.models.families.FAMILIES`.
        quantization: ``none`` or ``nf4``. Under ``nf4`` transformers leaves T5's ``wo`` unquantised, in ``dtype``.
        double_quant: Whether NF4's scales are quantised too.
        dtype: ``float32`` or ``bfloat16``: compute dtype, and storage dtype of what is not quantised.
        revision: Hub revision.
        device: Where to; the CPU if None.

    Raises:
        OSError: From transformers, if the model is not to be had.
        ValueError: If the MLP activations cannot be found, or weights are missing.
    """
    known = FAMILIES[family]
    source = str(MODEL_DIR) if name == NANO else name
    device = device or torch.device("cpu")
    torch_dtype = getattr(torch, dtype)
    options: dict[str, Any] = {"dtype": torch_dtype, "revision": revision, "output_loading_info": True}
    if quantization == "nf4":
        options["device_map"] = {"": device}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=torch_dtype,
            llm_int8_skip_modules=["classifier", "lm_head"],
        )
    auto = AutoModelForSeq2SeqLM if known.text_to_text else AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)  # a pooler that the checkpoint lacks is made up: alike on every worker and host
        model, info = auto.from_pretrained(source, **options)
    _require_weights(info, name)
    if quantization != "nf4":
        model.to(device)
    model.requires_grad_(False)
    model.config.use_cache = False
    sites = find_sites(model, known)
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    return Base(model, tokenizer, known, sites, dtype, activation_name(sites))


def _require_weights(info: dict[str, Any], name: str) -> None:
    """Refuse a base whose weights are partly made up; the task head is fresh in any case."""
    missing = [key for key in info["missing_keys"] if "classifier" not in key and "pooler" not in key]
    if missing:
        shown = ", ".join(sorted(missing)[:3])
        raise ValueError(f"{name}: {len(missing)} weights are not in the checkpoint, first: {shown}")
