"""Loading a base: frozen, in the asked dtype, quantised or not, and never with made-up weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    GPT2LMHeadModel,
    GPT2Model,
    OPTForCausalLM,
    OPTModel,
    PreTrainedModel,
    ViTModel,
)

from deft_ray.errors import SetupError
from deft_ray.models.base import load_base
from deft_ray.models.folder import check_model_folder
from deft_ray.tasks.encoding import Example
from deft_ray.train.batches import source_tensors

RELU = ("relu-t5", "opt", "narrow-opt")


@pytest.mark.parametrize("name", ["t5", "relu-t5", "bert", "roberta", "opt", "narrow-opt", "gpt2", "vit"])
def test_a_base_is_frozen_and_holds_the_weights_of_its_file(tiny_models: dict[str, Path], name: str) -> None:
    family = name.split("-")[-1]
    base = load_base(str(tiny_models[name]), family)
    stored = stored_weights(tiny_models[name])

    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.dtype == "float32"
    assert base.family.name == family
    state = base.model.state_dict()
    assert all(torch.equal(state[key], weight) for key, weight in stored.items())
    assert (base.tokenizer is None) == (base.image_processor is not None) == (name == "vit")
    activations = {"t5": "NewGELUActivation", "gpt2": "NewGELUActivation", **dict.fromkeys(RELU, "ReLU")}
    assert base.activation == activations.get(name, "GELUActivation")
    if base.tokenizer is not None:
        assert base.tokenizer.decode(base.tokenizer("the boat")["input_ids"], skip_special_tokens=True) == "the boat"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "quantised"),
    [
        # q, k, v, o of two encoder self-attentions and two decoder self- and cross-attentions; wi_0 and wi_1.
        ("t5", 4 * 6 + 2 * 4),
        # query, key, value, output, two of the MLP; BERT's pooler.
        ("bert", 6 * 2 + 1),
        ("roberta", 6 * 2),
        # query, key, value, output, two of the MLP; of GPT-2 the first three are one, and all of them are transposed.
        ("opt", 6 * 2),
        ("gpt2", 4 * 2),
        ("vit", 6 * 2),
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
    assert not any(part in key for key in four_bit for part in ("lm_head", "classifier", "score", "DenseReluDense.wo"))
    assert len(four_bit) == quantised
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not any(module.support_avx512bf16_for_cpu for module in four_bit.values())
    key, module = next(iter(four_bit.items()))
    original = stored_weights(tiny_models[name])[f"{key}.weight"]
    original = original.T if name == "gpt2" else original
    opened = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    worst = (opened - original).abs().max() / original.abs().max()
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


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("gpt2", GPT2LMHeadModel),
        ("gpt2", GPT2Model),
        ("narrow-opt", OPTForCausalLM),
        ("opt", OPTModel),
        ("vit", ViTModel),
    ],
)
def test_pretrained_checkpoints_load(
    tiny_models: dict[str, Path], tmp_path: Path, name: str, cls: type[PreTrainedModel]
) -> None:
    """As the hub has them: a language model's head in place of ours, or no head, and no prefix to the names."""
    family, folder = name.split("-")[-1], copy_folder(tiny_models[name], tmp_path / name)
    stored = cls(load_base(str(folder), family).model.config)
    stored.save_pretrained(folder)
    base = load_base(str(folder), family)

    want = {key.removeprefix(f"{stored.base_model_prefix}."): weight for key, weight in stored.state_dict().items()}
    got = base.model.base_model.state_dict()
    assert len(got) > 20
    assert all(torch.equal(weight, want[key]) for key, weight in got.items())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "narrow-opt"])
@torch.no_grad()
def test_padding_left_does_not_move_a_decoders_answer(
    tiny_models: dict[str, Path], name: str, quantization: str
) -> None:
    base = load_base(str(tiny_models[name]), name.split("-")[-1], quantization=quantization)
    short, long = [40, 41, 42], [50, 51, 52, 53, 54, 55, 56]
    padded = source_tensors(
        [Example(short, [], 0), Example(long, [], 0)], base.pad_id, 9, torch.device("cpu"), side="decoder"
    )
    together = base.model(**padded).logits

    for row, ids in enumerate((short, long)):
        alone = base.model(input_ids=torch.tensor([ids])).logits[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_a_tokenizer_without_padding_pads_with_its_end_of_text(tiny_models: dict[str, Path]) -> None:
    assert AutoTokenizer.from_pretrained(tiny_models["gpt2"]).pad_token is None
    base = load_base(str(tiny_models["gpt2"]), "gpt2")

    assert base.tokenizer.pad_token == base.tokenizer.eos_token == "<|endoftext|>"
    assert base.model.config.pad_token_id == base.pad_id == base.tokenizer.eos_token_id


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_folder(tiny_models["gpt2"], tmp_path / "gpt2")
    file = folder / "tokenizer_config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if not key.endswith("_token")}
    file.write_text(json.dumps(config))

    with pytest.raises(ValueError, match=r"the tokenizer has neither a padding token nor an end-of-text token$"):
        load_base(str(folder), "gpt2")


def test_images_come_out_in_the_size_that_the_model_takes(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    assert load_base(str(tiny_models["vit"]), "vit").image_tokens == 4 * 4 + 1
    folder = copy_folder(tiny_models["vit"], tmp_path / "vit")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "size": {"height": 48, "width": 32}}))

    message = "the image processor makes 3 x 48 x 32, the model takes 3 x 32 x 32$"
    with pytest.raises(ValueError, match=message):
        load_base(str(folder), "vit")


def test_nf4_with_nothing_to_quantise_is_refused(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    """A RoBERTa without a layer has its head alone, which stays as it is; as any model it is refused for that first."""
    config = AutoConfig.from_pretrained(tiny_models["roberta"], num_hidden_layers=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "hollow")

    message = (
        rf"^{tmp_path}/hollow: model.quantization: NF4 on a model without linear layers to quantise "
        r"\(RobertaForSequenceClassification\); use 'none'$"
    )
    with pytest.raises(ValueError, match=message):
        load_base(str(tmp_path / "hollow"), "roberta", quantization="nf4")


def test_float16_is_refused_by_the_loader_too(tiny_models: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"^dtype: 'float16': float32 or bfloat16; float16 overflows"):
        load_base(str(tiny_models["t5"]), "t5", dtype="float16")


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


@pytest.mark.parametrize(("name", "family"), [("bert", "t5"), ("t5", "vit"), ("vit", "gpt2")])
def test_a_model_of_a_wholly_other_family_is_refused(tiny_models: dict[str, Path], name: str, family: str) -> None:
    what = rf"{tiny_models[name]}: is not a model of the family '{family}'; families known: "
    with pytest.raises(ValueError, match=rf"^{what}t5, bert, roberta, opt, gpt2, vit$"):
        load_base(str(tiny_models[name]), family)


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


def test_a_vision_folder_needs_an_image_processor_and_no_tokenizer(
    tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    check_model_folder(tiny_models["vit"], images=True)
    folder = copy_folder(tiny_models["vit"], tmp_path / "vit")
    (folder / "preprocessor_config.json").unlink()

    message = f"{folder}: model.name: no image processor in this folder; needs preprocessor_config.json"
    with pytest.raises(SetupError) as caught:
        check_model_folder(folder, images=True)
    assert str(caught.value) == message


#: Names of a ViT's weights in files, which are older than the modules' names.
VIT_NAMES = {
    "vit.encoder.layer.": "vit.layers.",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def stored_weights(folder: Path) -> dict[str, torch.Tensor]:
    stored = {}
    for key, weight in load_file(folder / "model.safetensors").items():
        for old, new in VIT_NAMES.items() if key.startswith("vit.") else ():
            key = key.replace(old, new)
        stored[key] = weight
    return stored


def copy_folder(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


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


@pytest.mark.parametrize("name", ["t5", "bert", "gpt2", "vit"])
def test_relu_takes_the_place_of_the_models_own_activation(tiny_models: dict[str, Path], name: str) -> None:
    base = load_base(str(tiny_models[name]), name, relu=True)

    assert base.activation == "ReLU"
    assert all(type(site.module) is torch.nn.ReLU for site in base.sites)
    assert load_base(str(tiny_models[name]), name).activation != "ReLU"
