"""Task heads: their shapes and starts, what they read, and what opens them again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, PreTrainedModel

from deft_ray.models.adapters import Lora, attach_adapter, detach_adapter, trainable_share
from deft_ray.models.base import Base, load_base
from deft_ray.models.families import FAMILIES
from deft_ray.models.heads import FirstToken, renew_head
from deft_ray.spec.schema import TrialSpec
from deft_ray.train.ranks import Ranks
from tests.slots import new_slot, run, same, trained

MODELS = ("bert", "roberta", "opt", "narrow-opt", "gpt2", "vit")
LORA = Lora(4, 8.0, 0.0, "all-linear")


def load(folders: dict[str, Path], name: str) -> PreTrainedModel:
    auto: Any = AutoModelForImageClassification if name == "vit" else AutoModelForSequenceClassification
    model: PreTrainedModel = auto.from_pretrained(folders[name])
    if name == "gpt2":
        model.config.pad_token_id = 0
    return model


def inputs_of(name: str, rows: int, tokens: int) -> dict[str, Tensor]:
    if name == "vit":
        return {"pixel_values": torch.rand(rows, 3, 32, 32, generator=torch.Generator().manual_seed(5))}
    inputs = {"input_ids": torch.arange(rows * tokens).reshape(rows, tokens) + 9}
    return {**inputs, "attention_mask": torch.ones(rows, tokens, dtype=torch.int64)}


def new_base(folders: dict[str, Path], name: str) -> Base:
    return load_base(str(folders[name]), name.rsplit("-", 1)[-1])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("outputs", [1, 2, 3])
@pytest.mark.parametrize("two_layers", [False, True])
def test_a_new_head_has_the_asked_size_and_comes_from_the_seed(
    tiny_models: dict[str, Path], name: str, outputs: int, two_layers: bool
) -> None:
    model, family = load(tiny_models, name), FAMILIES[name.split("-")[-1]]
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        renew_head(model, family, outputs, two_layers=two_layers)
        heads.append({key: weight.clone() for key, weight in getattr(model, family.head).state_dict().items()})
    model.eval()
    labels = torch.tensor([0.5, 1.5]) if outputs == 1 else torch.tensor([0, outputs - 1])
    result = model(**inputs_of(name, 2, 5), labels=labels)

    assert result.logits.shape == (2, outputs)
    want = (
        nn.functional.mse_loss(result.logits.squeeze(-1), labels)
        if outputs == 1
        else nn.functional.cross_entropy(result.logits, labels)
    )
    torch.testing.assert_close(result.loss, want)
    assert all(torch.equal(heads[0][key], heads[1][key]) for key in heads[0])
    assert any(not torch.equal(heads[0][key], heads[2][key]) for key in heads[0])
    assert all(not weight.any() for key, weight in heads[0].items() if key.endswith("bias"))
    assert sum(key.endswith("weight") for key in heads[0]) == (2 if two_layers or name == "roberta" else 1)


def said_by_hand(model: Any, name: str, inputs: dict[str, Tensor]) -> Tensor:
    """W2 tanh(W1 h + b1) + b2 of the first or the last token's last hidden state."""
    family = FAMILIES[name.split("-")[-1]]
    head = getattr(model, family.head)
    hidden_BTD = model.base_model(**inputs).last_hidden_state
    read = hidden_BTD[:, -1 if family.side == "decoder" else 0]
    inside = (read @ head.dense.weight.T + head.dense.bias).tanh()
    return inside @ head.out_proj.weight.T + head.out_proj.bias


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_two_layers_read_the_first_or_last_token_past_any_pooler(tiny_models: dict[str, Path], name: str) -> None:
    model, family = load(tiny_models, name), FAMILIES[name.split("-")[-1]]
    torch.manual_seed(0)
    renew_head(model, family, 3, two_layers=True)
    model.eval()
    for parameter in getattr(model, family.head).parameters():
        parameter.data.normal_(std=0.3)
    inputs = inputs_of(name, 3, 6)

    torch.testing.assert_close(model(**inputs).logits, said_by_hand(model, name, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_two_layers_have_dropout_before_each_of_them(tiny_models: dict[str, Path], name: str) -> None:
    """0.1 of what enters the first layer and of what leaves its tanh, as transformers' RoBERTa and adapter heads."""
    model = load(tiny_models, name).train()
    renew_head(model, FAMILIES[name.split("-")[-1]], 2, two_layers=True)
    head = getattr(model, FAMILIES[name.split("-")[-1]].head)
    entered: dict[str, Tensor] = {}
    for part in ("dense", "out_proj"):
        module = head.get_submodule(part)
        module.register_forward_pre_hook(lambda _m, inputs, part=part: entered.update({part: inputs[0]}))
    torch.manual_seed(0)
    model(**inputs_of(name, 40, 6))

    for value in entered.values():
        assert 0.07 < float((value == 0).float().mean()) < 0.13


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_base_is_as_it_was_once_the_adapter_is_off(tiny_models: dict[str, Path], name: str) -> None:
    base = new_base(tiny_models, name)
    names, answers = [key for key, _ in base.model.base_model.named_modules()], []
    for two_layers in (False, True, False):
        torch.manual_seed(3)
        model = attach_adapter(base, LORA, outputs=2, two_layer_head=two_layers).eval()
        answers.append(model(**inputs_of(name, 2, 5)).logits)
        unread = any(isinstance(module, FirstToken) for module in base.model.modules())
        assert unread == (two_layers and name == "bert")
        detach_adapter(model)
        assert [key for key, _ in base.model.base_model.named_modules()] == names

    assert torch.equal(answers[0], answers[2])
    assert torch.equal(answers[0], answers[1]) == (name == "roberta"), "its own head has two layers"


def test_a_head_that_could_not_be_put_on_leaves_the_pooler_read(tiny_models: dict[str, Path]) -> None:
    base = new_base(tiny_models, "bert")
    with pytest.raises(ValueError, match=r"^No modules were targeted for adaptation"):  # PEFT's own
        attach_adapter(base, Lora(4, 8.0, 0.0, ["pooler.dense"]), outputs=2, two_layer_head=True)
    assert not any(isinstance(module, FirstToken) for module in base.model.modules())
    renew_head(base.model, base.family, 2, two_layers=True)
    renew_head(base.model, base.family, 2)
    assert not any(isinstance(module, FirstToken) for module in base.model.modules())


def test_no_adapter_is_put_on_a_pooler_that_nobody_reads(tiny_models: dict[str, Path]) -> None:
    """Else it would be counted as trained, and never have a gradient."""
    base = new_base(tiny_models, "bert")
    found = {}
    for two_layers in (False, True):
        for targets in ("all-linear", ["dense"]):
            model = attach_adapter(base, Lora(4, 8.0, 0.0, targets), outputs=2, two_layer_head=two_layers)
            adapted = [key for key, p in model.named_parameters() if "lora_" in key and p.requires_grad]
            found[two_layers, str(targets)] = sum("pooler" in key for key in adapted)
            model(**inputs_of("bert", 2, 5), labels=torch.tensor([0, 1])).loss.backward()
            assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
            detach_adapter(model)

    assert found == {(False, "all-linear"): 2, (False, "['dense']"): 2, (True, "all-linear"): 0, (True, "['dense']"): 0}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_saved_head_is_opened_by_peft_on_a_model_with_such_a_head(
    tiny_models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    base, inputs = new_base(tiny_models, name), inputs_of(name, 2, 5)
    torch.manual_seed(0)
    model = attach_adapter(base, LORA, outputs=3, two_layer_head=True).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter) * parameter.requires_grad)
    want = model(**inputs).logits
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    detach_adapter(model)

    plain = load(tiny_models, name)
    renew_head(plain, base.family, 3, two_layers=True)
    reopened = PeftModel.from_pretrained(plain, tmp_path).eval()

    torch.testing.assert_close(reopened(**inputs).logits, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_all_of_a_head_is_trained_and_counted(tiny_models: dict[str, Path], name: str) -> None:
    base = new_base(tiny_models, name)
    whole = sum(p.numel() for key, p in base.model.named_parameters() if not key.startswith(base.family.head))
    model = attach_adapter(base, LORA, outputs=3, two_layer_head=True)
    lora = sum(p.numel() for key, p in model.named_parameters() if "lora_" in key)
    width = 32 if name == "narrow-opt" else 64
    head = width * width + width + 3 * width + 3
    assert trainable_share(model) == pytest.approx((lora + head) / (whole + lora + head), rel=1e-9)
    detach_adapter(model)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_a_trial_with_such_a_head_learns(
    trial: Callable[..., TrialSpec], base_of: Any, ranks: Ranks, name: str
) -> None:
    leaves = {"train__steps": 12, "train__batch_size": 10, "adapter__head": "two-layer", "deft__alpha": 0.1}
    spec = trial(name, "cifar10" if name == "vit" else "sst2", **leaves)
    slot = new_slot(spec, base_of(spec), ranks)
    losses = run(slot)
    slot.close()

    assert sum(losses[-4:]) < sum(losses[:4])


def test_on_roberta_both_heads_are_one(trial: Callable[..., TrialSpec], base_of: Any, ranks: Ranks) -> None:
    left = []
    for head in ("own", "two-layer"):
        spec = trial("dry-roberta", "sst2", adapter__head=head)
        slot = new_slot(spec, base_of(spec), ranks)
        left.append(trained(slot))
        slot.close()

    assert same(*left)
