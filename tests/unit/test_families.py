"""Where each architecture's MLP activations are, found by name and confirmed by what passes through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.activations import GELUActivation, NewGELUActivation

from deft_ray.models.families import FAMILIES, activation_is_nonnegative, activation_name, find_sites

STACKS = {"t5": 2, "relu-t5": 2, "bert": 1, "roberta": 1, "opt": 1, "narrow-opt": 1, "gpt2": 1, "vit": 1}
KNOWN = "families known: t5, bert, roberta, opt, gpt2, vit"


def load(folders: dict[str, Path], name: str) -> PreTrainedModel:
    auto: Any = {"t5": AutoModelForSeq2SeqLM, "vit": AutoModelForImageClassification}.get(name.split("-")[-1])
    model: PreTrainedModel = (auto or AutoModelForSequenceClassification).from_pretrained(folders[name])
    if name == "gpt2":
        model.config.pad_token_id = 0
    return model


def inputs_of(name: str, rows: int, tokens: int) -> dict[str, Tensor]:
    if name == "vit":
        return {"pixel_values": torch.rand(rows, 3, 32, 32)}
    inputs = {"input_ids": torch.full((rows, tokens), 9)}
    return {**inputs, "attention_mask": torch.ones(rows, tokens, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("name", "family", "sites", "activation"),
    [
        ("t5", "t5", ["encoder.0", "encoder.1", "decoder.0", "decoder.1"], NewGELUActivation),
        ("relu-t5", "t5", ["encoder.0", "encoder.1", "decoder.0", "decoder.1"], nn.ReLU),
        ("bert", "bert", ["encoder.0", "encoder.1"], GELUActivation),
        ("roberta", "roberta", ["encoder.0", "encoder.1"], GELUActivation),
        ("opt", "opt", ["decoder.0", "decoder.1"], nn.ReLU),
        ("narrow-opt", "opt", ["decoder.0", "decoder.1"], nn.ReLU),
        ("gpt2", "gpt2", ["decoder.0", "decoder.1"], NewGELUActivation),
        ("vit", "vit", ["encoder.0", "encoder.1"], GELUActivation),
    ],
)
def test_sites_are_all_mlp_blocks_encoder_first(
    tiny_models: dict[str, Path], name: str, family: str, sites: list[str], activation: type[nn.Module]
) -> None:
    model = load(tiny_models, name)
    found = find_sites(model, FAMILIES[family])

    assert [site.name for site in found] == sites
    assert [site.side for site in found] == [site.split(".")[0] for site in sites]
    assert len({id(site.module) for site in found}) == len(sites)
    assert all(isinstance(site.module, activation) for site in found)
    assert activation_name(found) == activation.__name__
    assert activation_is_nonnegative(found) == (activation is nn.ReLU)


@pytest.mark.parametrize("name", STACKS)
def test_every_site_sees_rows_by_tokens_by_d_ff_once(tiny_models: dict[str, Path], name: str) -> None:
    """OPT lays rows and tokens end to end."""
    family = name.split("-")[-1]
    model = load(tiny_models, name).eval()
    seen: dict[str, list[tuple[int, ...]]] = {}

    def note(site: str) -> Any:
        return lambda _module, _inputs, act: seen.setdefault(site, []).append(tuple(act.shape))

    for site in find_sites(model, FAMILIES[family]):
        site.module.register_forward_hook(note(site.name))
    inputs = inputs_of(name, 3, 7)
    if "t5" in name:
        inputs["labels"] = torch.full((3, 4), 9)
    model(**inputs)

    shapes = {"encoder": (3, 7, 128), "decoder": (3, 4, 128)}
    shapes |= {"opt": {"decoder": (21, 128)}, "gpt2": {"decoder": (3, 7, 128)}}.get(family, {})
    shapes |= {"vit": {"encoder": (3, 17, 128)}}.get(family, {})
    assert seen == {site: [shapes[site.split(".")[0]]] for site in seen}
    assert len(seen) == 2 * STACKS[name]


@pytest.mark.parametrize("name", STACKS)
@torch.no_grad()
def test_the_output_layer_of_a_site_takes_what_leaves_the_activation(tiny_models: dict[str, Path], name: str) -> None:
    """Without a gate product the one is what enters the other, to the bit; dropout is off."""
    model, family = load(tiny_models, name).eval(), FAMILIES[name.split("-")[-1]]
    sites, left, entered = find_sites(model, family), {}, {}
    for site in sites:
        site.module.register_forward_hook(lambda _m, _i, act, key=site.name: left.update({key: act}))
        site.block.get_submodule(site.output).register_forward_pre_hook(
            lambda _m, inputs, key=site.name: entered.update({key: inputs[0]})
        )
    model(**inputs_of(name, 2, 5), **({"labels": torch.full((2, 4), 9)} if STACKS[name] == 2 else {}))

    assert len(left) == len(sites)
    assert all(torch.equal(left[key], entered[key]) == (name != "t5") for key in left)


def test_blocks_are_sorted_by_number_not_by_letter(tiny_models: dict[str, Path]) -> None:
    model = load(tiny_models, "bert")
    config = model.config
    config.num_hidden_layers = 12
    deep = type(model)(config)

    assert [site.name for site in find_sites(deep, FAMILIES["bert"])] == [f"encoder.{index}" for index in range(12)]


@pytest.mark.parametrize(
    ("name", "family", "blocks"),
    [("bert", "t5", 2), ("t5", "bert", 4), ("roberta", "bert", 2), ("gpt2", "opt", 2), ("vit", "gpt2", 2)],
)
def test_a_wrong_family_is_named(tiny_models: dict[str, Path], name: str, family: str, blocks: int) -> None:
    model = load(tiny_models, name)
    found = f"found 0 MLP activations but {blocks} MLP blocks in a {type(model).__name__}"
    with pytest.raises(ValueError, match=f"^{found}; {KNOWN}$"):
        find_sites(model, FAMILIES[family])


@pytest.mark.parametrize(("name", "family"), [("t5", "t5"), ("bert", "bert"), ("opt", "opt"), ("gpt2", "gpt2")])
def test_a_block_that_is_built_otherwise_is_missed(tiny_models: dict[str, Path], name: str, family: str) -> None:
    model = load(tiny_models, name)
    sites = find_sites(model, FAMILIES[family])
    inside, _, activation = FAMILIES[family].activation.rpartition(".")
    holder = sites[1].block.get_submodule(inside)
    setattr(holder, f"{activation}_renamed", getattr(holder, activation))
    delattr(holder, activation)
    with pytest.raises(ValueError, match=f"^found {len(sites) - 1} MLP activations but {len(sites)} MLP blocks in a "):
        find_sites(model, FAMILIES[family])
