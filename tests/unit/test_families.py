"""Where each architecture's MLP activations are, found by name and confirmed by what passes through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.activations import GELUActivation, NewGELUActivation

from deft_ray.models.families import FAMILIES, activation_name, find_sites, renew_head


def load(folders: dict[str, Path], name: str) -> PreTrainedModel:
    auto = AutoModelForSeq2SeqLM if "t5" in name else AutoModelForSequenceClassification
    model: PreTrainedModel = auto.from_pretrained(folders[name])
    return model


@pytest.mark.parametrize(
    ("name", "family", "sites", "activation"),
    [
        ("t5", "t5", ["encoder.0", "encoder.1", "decoder.0", "decoder.1"], NewGELUActivation),
        ("relu-t5", "t5", ["encoder.0", "encoder.1", "decoder.0", "decoder.1"], nn.ReLU),
        ("bert", "bert", ["encoder.0", "encoder.1"], GELUActivation),
        ("roberta", "roberta", ["encoder.0", "encoder.1"], GELUActivation),
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


@pytest.mark.parametrize(
    ("name", "family"), [("t5", "t5"), ("relu-t5", "t5"), ("bert", "bert"), ("roberta", "roberta")]
)
def test_every_site_sees_rows_by_tokens_by_d_ff_once(tiny_models: dict[str, Path], name: str, family: str) -> None:
    model = load(tiny_models, name).eval()
    seen: dict[str, list[tuple[int, ...]]] = {}

    def note(site: str) -> Any:
        return lambda _module, _inputs, act: seen.setdefault(site, []).append(tuple(act.shape))

    for site in find_sites(model, FAMILIES[family]):
        site.module.register_forward_hook(note(site.name))
    inputs: dict[str, Tensor] = {"input_ids": torch.full((3, 7), 9)}
    if "t5" in name:
        inputs["labels"] = torch.full((3, 4), 9)
    model(**inputs)

    shapes = {"encoder": (3, 7, 128), "decoder": (3, 4, 128)}
    assert seen == {site: [shapes[site.split(".")[0]]] for site in seen}
    assert len(seen) == (4 if "t5" in name else 2)


def test_blocks_are_sorted_by_number_not_by_letter(tiny_models: dict[str, Path]) -> None:
    model = load(tiny_models, "bert")
    config = model.config
    config.num_hidden_layers = 12
    deep = type(model)(config)

    assert [site.name for site in find_sites(deep, FAMILIES["bert"])] == [f"encoder.{index}" for index in range(12)]


@pytest.mark.parametrize(("name", "family", "blocks"), [("bert", "t5", 2), ("t5", "bert", 4), ("roberta", "bert", 2)])
def test_a_wrong_family_is_named(tiny_models: dict[str, Path], name: str, family: str, blocks: int) -> None:
    model = load(tiny_models, name)
    found = f"found 0 MLP activations but {blocks} MLP blocks in a {type(model).__name__}"
    with pytest.raises(ValueError, match=f"^{found}; families known: t5, bert, roberta$"):
        find_sites(model, FAMILIES[family])


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_a_new_head_has_the_asked_size_and_comes_from_the_seed(
    tiny_models: dict[str, Path], family: str, outputs: int
) -> None:
    model = load(tiny_models, family)
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        renew_head(model, FAMILIES[family], outputs)
        heads.append({name: weight.clone() for name, weight in model.classifier.state_dict().items()})
    model.eval()
    labels = torch.tensor([0.5, 1.5]) if outputs == 1 else torch.tensor([0, outputs - 1])
    result = model(input_ids=torch.full((2, 5), 9), labels=labels)

    assert result.logits.shape == (2, outputs)
    want = (
        nn.functional.mse_loss(result.logits.squeeze(-1), labels)
        if outputs == 1
        else nn.functional.cross_entropy(result.logits, labels)
    )
    torch.testing.assert_close(result.loss, want)
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert any(not torch.equal(heads[0][name], heads[2][name]) for name in heads[0])
    assert all(not weight.any() for name, weight in heads[0].items() if name.endswith("bias"))
