"""Trainable shares of the published models, built without weights from their public configurations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from deft_ray.models.adapters import attach_adapter, trainable_share
from deft_ray.models.base import Base
from deft_ray.models.families import FAMILIES, find_sites
from deft_ray.spec.catalog import PUBLISHED_ADAPTERS, PublishedAdapter
from deft_ray.spec.schema import AdapterSection
from deft_ray.train.slot import adapter_of


def t5(d_model: int, d_ff: int, layers: int, heads: int, *, flan: bool) -> PreTrainedModel:
    """The first T5 has ReLU and one matrix for its embeddings and output, Flan-T5 a gated GELU and two."""
    config = T5Config(
        vocab_size=32128,
        d_model=d_model,
        d_kv=64,
        d_ff=d_ff,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu" if flan else "relu",
        tie_word_embeddings=not flan,
    )
    model = T5ForConditionalGeneration(config)
    if flan:
        model.lm_head.weight = torch.nn.Parameter(torch.empty(32128, d_model))
    else:
        model.lm_head.weight = model.shared.weight
    for stack in (model.encoder, model.decoder):
        stack.embed_tokens.weight = model.shared.weight
    return model


def bert() -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(vocab_size=30522))


def roberta_large() -> PreTrainedModel:
    config = RobertaConfig(
        vocab_size=50265,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=514,
        type_vocab_size=1,
    )
    return RobertaForSequenceClassification(config)


def gpt2() -> PreTrainedModel:
    return GPT2ForSequenceClassification(GPT2Config())


def opt(width: int, d_ff: int, layers: int, heads: int, embedded: int) -> PreTrainedModel:
    """The one of 350 M parameters has narrower embeddings and normalises behind its blocks."""
    config = OPTConfig(
        vocab_size=50272,
        hidden_size=width,
        ffn_dim=d_ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        word_embed_proj_dim=embedded,
        do_layer_norm_before=embedded == width,
    )
    return OPTForSequenceClassification(config)


def vit_base() -> PreTrainedModel:
    return ViTForImageClassification(ViTConfig())


#: Model, and its parameters without a task head as they are known.
MODELS: dict[str, tuple[str, Any, int]] = {
    "roberta-large": ("roberta", roberta_large, 354_310_144),
    "bert-base-uncased": ("bert", bert, 109_482_240),
    "t5-small": ("t5", lambda: t5(512, 2048, 6, 8, flan=False), 60_506_624),
    "t5-base": ("t5", lambda: t5(768, 3072, 12, 12, flan=False), 222_903_552),
    "flan-t5-base": ("t5", lambda: t5(768, 2048, 12, 12, flan=True), 247_577_856),
    "flan-t5-xl": ("t5", lambda: t5(2048, 5120, 24, 32, flan=True), 2_849_757_184),
    "flan-t5-xxl": ("t5", lambda: t5(4096, 10240, 24, 64, flan=True), 11_135_332_352),
    "gpt2": ("gpt2", gpt2, 124_439_808),
    "opt-125m": ("opt", lambda: opt(768, 3072, 12, 12, 768), 125_239_296),
    "opt-350m": ("opt", lambda: opt(1024, 4096, 24, 16, 512), 331_196_416),
    "vit-base-patch16-224-in21k": ("vit", vit_base, 85_798_656),
}


#: Outputs of a head, where they are not two: T5 answers in words, and ViT tells the ten classes of CIFAR-10.
OUTPUTS = {"t5": None, "vit": 10}


def build(name: str) -> Base:
    family, make, _ = MODELS[name]
    with torch.device("meta"):
        model = make()
    model.requires_grad_(False)
    return Base(model, None, FAMILIES[family], find_sites(model, FAMILIES[family]), "float32", "")  # type: ignore[arg-type]


def share_of(row: PublishedAdapter) -> float:
    base = build(row.model)
    adapter = adapter_of(AdapterSection(**row.settings))
    two_layers = row.settings.get("head") == "two-layer"
    with torch.device("meta"):
        model = attach_adapter(base, adapter, outputs=OUTPUTS.get(base.family.name, 2), two_layer_head=two_layers)
    return 100 * trainable_share(model)


def truncated(percent: float) -> str:
    return f"{math.floor(percent * 100) / 100:.2f}"


@pytest.mark.parametrize("name", MODELS)
def test_the_models_are_the_published_ones(name: str) -> None:
    parameters = [p for key, p in build(name).model.named_parameters() if not key.startswith(("classifier", "score"))]
    assert sum(p.numel() for p in parameters) == MODELS[name][2]


def ids(row: PublishedAdapter) -> str:
    return f"{row.model}-{row.settings['kind']}"


@pytest.mark.parametrize("row", PUBLISHED_ADAPTERS, ids=ids)
def test_shares_are_those_of_the_papers_column(row: PublishedAdapter) -> None:
    """The column is cut off after two digits; three entries are rounded, and three are counted in another way."""
    percent = share_of(row)
    assert percent == pytest.approx(row.percent_here, abs=6e-6)
    if row.met == "truncated":
        assert truncated(percent) == row.percent_printed
    elif row.met == "rounded":
        assert f"{percent:.2f}" == row.percent_printed
        assert truncated(percent) != row.percent_printed
    else:
        assert row.percent_printed not in (truncated(percent), f"{percent:.2f}")


def test_bottlenecks_beside_heads_of_two_layers_by_hand() -> None:
    """BERT's pooler counts as a part of the model, though such a head passes it over."""
    width, layers = 768, 12
    two_layer_head = width * width + width + 2 * width + 2
    for model, inner, parameters in (("bert-base-uncased", 48, 109_482_240), ("gpt2", 96, 124_439_808)):
        trained = layers * (2 * width * inner + inner + width) + two_layer_head
        share = 100 * trained / (parameters + trained)
        assert share_of(by_row(model, "bottleneck")) == pytest.approx(share, rel=1e-9)
        assert truncated(share) == by_row(model, "bottleneck").percent_printed


def by_row(model: str, kind: str) -> PublishedAdapter:
    return next(row for row in PUBLISHED_ADAPTERS if (row.model, row.settings["kind"]) == (model, kind))


def test_what_the_printed_shares_that_are_not_met_count() -> None:
    """RoBERTa's pooler, which its classifier has not; packed bytes."""
    head = 1024 * 1024 + 1024 + 2 * 1024 + 2
    trained = 24 * 2 * 32 * 2048 + head
    printed = by_row("roberta-large", "lora")
    assert truncated(100 * trained / (355_359_744 + trained)) == printed.percent_printed == "1.16"

    for model, adapters, parameters, share in (
        ("flan-t5-xl", 35_389_440, 2_849_757_184, "1.99"),
        ("flan-t5-xxl", 70_778_880, 11_135_332_352, "1.04"),
    ):
        base = build(model).model
        linear = {key: p.numel() for key, p in base.named_parameters() if "block" in key and p.dim() == 2}
        packed = sum(count for key, count in linear.items() if ".wo." not in key and "relative" not in key)
        lora = 16 * sum(sum(p.shape) for key, p in base.named_parameters() if key in linear and "relative" not in key)
        assert lora == adapters
        assert (
            truncated(100 * lora / (parameters - packed / 2 + lora)) == by_row(model, "lora").percent_printed == share
        )
