"""Load a frozen base: weights, tokenizer or image processor, quantisation, and where its activations are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from deft_ray.density.sites import Site
from deft_ray.models.families import FAMILIES, Family, activation_name, find_sites
from deft_ray.models.quantised import check_logits, four_bit_layers
from deft_ray.models.wo import check_wo, loading_wo, resolve_wo, settle_wo
from deft_ray.nano import MODEL_DIR
from deft_ray.spec.catalog import NANO


@dataclass(frozen=True)
class Base:
    """One frozen base, loaded once per host.

    Args:
        model: Frozen, on its device.
        tokenizer: Its tokenizer, with a padding token; None for a model that reads images.
        family: Its family.
        sites: Where its MLP activations are.
        dtype: Compute dtype by name, as it stands in records.
        activation: Activation module's class name, as it stands in records.
        image_processor: Resizes and normalises images; None for a model that reads text.
    """

    model: PreTrainedModel
    tokenizer: Any
    family: Family
    sites: list[Site]
    dtype: str
    activation: str
    image_processor: Any = None

    @property
    def pad_id(self) -> int:
        """What fills up token ids; masked everywhere."""
        pad_id = None if self.tokenizer is None else self.tokenizer.pad_token_id
        return 0 if pad_id is None else int(pad_id)

    @property
    def image_tokens(self) -> int:
        """Tokens that the model makes of an image: its patches and the class token."""
        patches: Any = self.model.get_submodule("vit.embeddings.patch_embeddings")
        return int(patches.num_patches) + 1


def load_base(
    name: str,
    family: str,
    *,
    quantization: str = "none",
    double_quant: bool = True,
    dtype: str = "float32",
    wo: str | None = None,
    relu: bool = False,
    revision: str | None = None,
    device: torch.device | None = None,
) -> Base:
    """Load and, if asked, quantise a base; every parameter is frozen.

    Args:
        name: ``nano``, a local folder, or a hub name.
        family: Key of :data:`~deft_ray.models.families.FAMILIES`.
        quantization: ``none`` or ``nf4``; GPT-2's ``Conv1D`` layers count as linear.
        double_quant: Whether NF4's scales are quantised too.
        dtype: ``float32`` or ``bfloat16``: compute dtype, and storage dtype of what is not quantised.
        wo: How T5's ``wo`` lies in memory under ``nf4``: ``nf4``, ``bfloat16``, ``float32``; None is
            ``bfloat16`` on a GPU that computes in it, else ``dtype``.
        relu: Put ReLU in the place of the MLPs' own activation; whoever opens an adapter trained so has to do the same.
        revision: Hub revision.
        device: Where to; the CPU if None.

    Raises:
        OSError: From transformers, if the model is not to be had.
        ValueError: If the dtype is another one, the model is of no known family or not of this one, weights are
            missing, there is nothing to quantise, a quantised layer computes wrongly, or images come out in a size that
            the model does not take.
    """
    if dtype not in ("float32", "bfloat16"):
        cause = "float16 overflows in T5 and in the density loss"
        raise ValueError(f"dtype: {dtype!r}: float32 or bfloat16; {cause}")
    known = FAMILIES[family]
    source = str(MODEL_DIR) if name == NANO else name
    device = device or torch.device("cpu")
    torch_dtype, wo = getattr(torch, dtype), resolve_wo(wo, device)
    options: dict[str, Any] = {"dtype": torch_dtype, "revision": revision, "output_loading_info": True}
    if quantization == "nf4":
        options["device_map"] = {"": device}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=torch_dtype,
            llm_int8_skip_modules=["classifier", "score", "lm_head"],
        )
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)  # a pooler that the checkpoint lacks is made up: alike on every worker and host
        model, info = _load(source, name, known, options, wo)
    _require_weights(info, name, known)
    if quantization != "nf4":
        model.to(device)
    model.requires_grad_(False)
    model.config.use_cache = False
    sites = find_sites(model, known)
    if quantization == "nf4":
        _settle_quantised(model, name)
        if known.name == "t5":
            settle_wo(sites, wo)
            if wo == "nf4":
                check_wo(model, sites)
        check_logits(model)
    for site in sites if relu else ():
        site.put(nn.ReLU())
    tokenizer = None if known.images else _load_tokenizer(source, revision, model, known)
    processor = _load_image_processor(source, revision, model) if known.images else None
    return Base(model, tokenizer, known, sites, dtype, activation_name(sites), processor)


def _load(source: str, name: str, family: Family, options: dict[str, Any], wo: str | None) -> Any:
    auto: Any = AutoModelForSequenceClassification
    if family.text_to_text:
        auto = AutoModelForSeq2SeqLM
    elif family.images:
        auto = AutoModelForImageClassification
    try:
        with loading_wo(wo if "quantization_config" in options else None):
            return auto.from_pretrained(source, **options)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        known = ", ".join(FAMILIES)
        raise ValueError(f"{name}: is not a model of the family '{family.name}'; families known: {known}") from None


def _settle_quantised(model: PreTrainedModel, name: str) -> None:
    layers = four_bit_layers(model)
    if not layers:
        what = f"NF4 on a model without linear layers to quantise ({type(model).__name__})"
        raise ValueError(f"{name}: model.quantization: {what}; use 'none'")
    for layer in layers.values():
        # Some CPUs lay 4-bit weights out anew in the first evaluation; after that they pass no gradient in training.
        layer.support_avx512bf16_for_cpu = False


def _load_tokenizer(source: str, revision: str | None, model: PreTrainedModel, family: Family) -> Any:
    """Load the tokenizer; a decoder's head finds the last token by the padding token, so there has to be one."""
    tokenizer: Any = AutoTokenizer.from_pretrained(source, revision=revision)
    if family.side == "decoder":
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise ValueError(f"{source}: the tokenizer has neither a padding token nor an end-of-text token")
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def _load_image_processor(source: str, revision: str | None, model: PreTrainedModel) -> Any:
    """Load the image processor, in the kind that needs nothing but pillow, and try it on a grey image."""
    from PIL import Image

    processor: Any = AutoImageProcessor.from_pretrained(source, revision=revision, backend="pil")
    patches: Any = model.get_submodule("vit.embeddings.patch_embeddings")
    height, width = patches.image_size
    got = tuple(processor(Image.new("RGB", (50, 40), "grey"), return_tensors="pt")["pixel_values"].shape[1:])
    if got != (patches.num_channels, height, width):
        want = f"{patches.num_channels} x {height} x {width}"
        raise ValueError(f"{source}: the image processor makes {' x '.join(map(str, got))}, the model takes {want}")
    return processor


def _require_weights(info: dict[str, Any], name: str, family: Family) -> None:
    """Refuse a base whose weights are partly made up; the task head is fresh in any case."""
    missing = [key for key in info["missing_keys"] if not key.startswith(f"{family.head}.") and "pooler" not in key]
    if missing:
        shown = ", ".join(sorted(missing)[:3])
        raise ValueError(f"{name}: {len(missing)} weights are not in the checkpoint, first: {shown}")
