"""Loading a base: frozen, in the asked dtype, quantised or not, and never with made-up weights."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM

from deft_ray.errors import SetupError
from deft_ray.models.base import load_base
from deft_ray.models.folder import check_model_folder


@pytest.mark.parametrize(
    ("name", "family"), [("t5", "t5"), ("relu-t5", "t5"), ("bert", "bert"), ("roberta", "roberta")]
)
def test_a_base_is_frozen_and_holds_the_weights_of_its_file(
    tiny_models: dict[str, Path], name: str, family: str
) -> None:
    base = load_base(str(tiny_models[name]), family)
    stored = load_file(tiny_models[name] / "model.safetensors")

    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.dtype == "float32"
    assert base.family.name == family
    state = base.model.state_dict()
    assert all(torch.equal(state[key], weight) for key, weight in stored.items())
    assert base.tokenizer.decode(base.tokenizer("the boat")["input_ids"], skip_special_tokens=True) == "the boat"
    assert base.activation == {"t5": "NewGELUActivation", "relu-t5": "ReLU"}.get(name, "GELUActivation")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "quantised"),
    [
        # q, k, v, o of two encoder self-attentions and two decoder self- and cross-attentions; wi_0 and wi_1.
        ("t5", 4 * 6 + 2 * 4),
        # query, key, value, output, two of the MLP; BERT's pooler.
        ("bert", 6 * 2 + 1),
        ("roberta", 6 * 2),
    ],
)
def test_nf4_quantises_the_linear_layers_and_computes_in_dtype(
    tiny_models: dict[str, Path], name: str, quantised: int, dtype: str
) -> None:
    base = load_base(str(tiny_models[name]), name, quantization="nf4", dtype=dtype)
    four_bit = {key: module for key, module in base.model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}

    assert all(module.weight.quant_type == "nf4" for module in four_bit.values())
    assert all(module.weight.quant_state.nested for module in four_bit.values())
    assert all(module.weight.dtype == torch.uint8 for module in four_bit.values())
    assert not any(part in key for key in four_bit for part in ("lm_head", "classifier", "DenseReluDense.wo"))
    assert len(four_bit) == quantised
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    original = load_file(tiny_models[name] / "model.safetensors")
    key, module = next(iter(four_bit.items()))
    opened = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    worst = (opened - original[f"{key}.weight"]).abs().max() / original[f"{key}.weight"].abs().max()
    assert 0 < worst < 0.2


def test_double_quantisation_can_be_switched_off(tiny_models: dict[str, Path]) -> None:
    base = load_base(str(tiny_models["bert"]), "bert", quantization="nf4", double_quant=False)
    modules = [module for module in base.model.modules() if isinstance(module, bnb.nn.Linear4bit)]

    assert modules
    assert not any(module.weight.quant_state.nested for module in modules)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_missing_weights_are_refused_by_name(tiny_models: dict[str, Path], tmp_path: Path, quantization: str) -> None:
    folder = copy_without(tiny_models["t5"], tmp_path, "encoder.block.1.layer.1.DenseReluDense.wi_0")

    message = r"1 weights are not in the checkpoint, first: encoder\.block\.1\.layer\.1\.DenseReluDense\.wi_0\.weight$"
    with pytest.raises(ValueError, match=f"^{folder}: {message}"):
        load_base(str(folder), "t5", quantization=quantization)


def test_an_encoder_without_its_task_head_is_welcome(tiny_models: dict[str, Path]) -> None:
    stored = load_file(tiny_models["roberta"] / "model.safetensors")

    assert not any("classifier" in name for name in stored)
    assert len(load_base(str(tiny_models["roberta"]), "roberta").sites) == 2


def test_what_a_checkpoint_lacks_is_made_up_alike_on_every_host(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """A masked-language-model checkpoint has no pooler; two workers must not make up two of them."""
    folder = copy_without(tiny_models["bert"], tmp_path, "pooler")
    poolers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        poolers.append(load_base(str(folder), "bert").model.bert.pooler.dense.weight.clone())
        assert torch.equal(torch.get_rng_state(), before)

    assert torch.equal(*poolers)
    assert poolers[0].std() > 0


def test_a_model_of_another_family_is_refused(tiny_models: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="found 0 MLP activations but 2 MLP blocks in a BertForSequenceClassification"):
        load_base(str(tiny_models["bert"]), "roberta")


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        load_base(str(tmp_path / "nowhere"), "t5")


def test_model_folder_check_names_every_kind_of_file(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    check_model_folder(tiny_models["t5"])
    (tmp_path / "config.json").write_text("{}")

    with pytest.raises(SetupError) as caught:
        check_model_folder(tmp_path)

    lines = str(caught.value).splitlines()
    assert [line.split(";")[0] for line in lines] == [
        f"{tmp_path}: model.name: no weights in this folder",
        f"{tmp_path}: model.name: no tokenizer in this folder",
    ]
    assert "model.safetensors or model.safetensors.index.json" in lines[0]


def copy_without(folder: Path, target: Path, part: str) -> Path:
    """Copy a model folder, less the weights whose name contains ``part``."""
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if part not in name}
    assert len(kept) < len(weights)
    for file in folder.iterdir():
        if file.suffix == ".json":
            (target / file.name).write_text(json.dumps(json.loads(file.read_text())))
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_masked_language_model_checkpoints_load(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """As the hub has them: other heads in the file, no pooler."""
    base = load_base(str(tiny_models["bert"]), "bert")
    BertForMaskedLM(base.model.config).save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)

    assert len(load_base(str(tmp_path), "bert").sites) == 2
