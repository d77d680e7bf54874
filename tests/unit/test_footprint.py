"""What memory a plan says a host will need: against what loaded models, adapters and autograd really keep."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deft_ray.models.adapters import FIRST, adapter_parameters
from deft_ray.models.base import Base, load_base
from deft_ray.models.footprint import LIBRARIES_BYTES, TRAINED_BYTES, predict_footprint
from deft_ray.spec.loading import check_tree
from deft_ray.spec.machine import Machine
from deft_ray.spec.plan import Footprint
from deft_ray.spec.schema import SweepSpec, TrialSpec
from deft_ray.train.slot import Slot
from tests.tiny import write_tiny_t5

LAPTOP, SERVER = Machine(4, 0), Machine(4, 1)
FAMILIES = ("t5", "relu-t5", "bert", "roberta", "opt", "gpt2", "vit")
ROWS, SOURCE, TARGET = 6, 24, 8

Trial = Callable[..., TrialSpec]


def spec_of(name: Path | str, family: str, **sections: Any) -> SweepSpec:
    tree = {
        "name": "try",
        "model": {"name": str(name), "family": family, **sections.pop("model", {})},
        "data": sections.pop("data", None)
        or {
            "tasks": ["cifar10" if family == "vit" else "mrpc"],
            "max_source_tokens": SOURCE,
            "max_target_tokens": TARGET,
            "padding": "max_length",
        },
        "train": {"steps": 1, "batch_size": ROWS, **sections.pop("train", {})},
        **sections,
    }
    spec, faults = check_tree(tree)
    assert spec is not None, faults
    return spec


def footprint_of(spec: SweepSpec, machine: Machine = SERVER) -> Footprint:
    found = predict_footprint(spec, machine)
    assert found is not None
    return found


def kept_bytes(slot: Slot, base: Base) -> int:
    """What autograd keeps in a pass, weights aside, each storage once."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*base.model.parameters(), *base.model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        slot.step()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_a_trial_takes_is_what_it_trains_and_what_autograd_keeps(
    tiny_models: dict[str, Path],
    trial: Trial,
    open_slot: Any,
    base_of: Callable[[TrialSpec], Base],
    name: str,
    dropout: float,
) -> None:
    family = name.split("-")[-1]
    lengths = {"data__max_source_tokens": SOURCE, "data__max_target_tokens": TARGET, "data__padding": "max_length"}
    task = "cifar10" if family == "vit" else "mrpc"
    mine = trial(name, task, deft__alpha=1.0, deft__epsilon=1e-3, adapter__lora_dropout=dropout, **lengths)
    slot = open_slot(mine)
    kept = kept_bytes(slot, base_of(mine))
    trained = sum(p.numel() for key, p in adapter_parameters(slot.model, FIRST) if "lora" in key) * TRAINED_BYTES

    spec = spec_of(tiny_models[name], family, adapter={"r": 4, "lora_dropout": dropout})
    predicted = footprint_of(spec).slot_gib * 2**30
    assert predicted == pytest.approx(kept + trained, rel=0.15)


def test_checkpointing_keeps_one_layer_and_what_enters_the_others(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    model = write_tiny_t5(tmp_path)
    config = json.loads((model / "config.json").read_text())
    config["num_layers"] = config["num_decoder_layers"] = 12
    (model / "config.json").write_text(json.dumps(config))
    whole, again = (
        footprint_of(spec_of(model, "t5", train={"gradient_checkpointing": again}, adapter={"r": 1})).slot_gib
        for again in (False, True)
    )
    assert again < whole / 4
    shallow = footprint_of(
        spec_of(tiny_models["t5"], "t5", train={"gradient_checkpointing": True}, adapter={"r": 1})
    ).slot_gib
    assert 1.0 < again / shallow < 1.6


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("quantization", "double"), [("none", True), ("nf4", True), ("nf4", False)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_base_takes_is_what_its_tensors_take(
    tiny_models: dict[str, Path], name: str, quantization: str, double: bool, dtype: str
) -> None:
    family = name.split("-")[-1]
    base = load_base(str(tiny_models[name]), family, quantization=quantization, double_quant=double, dtype=dtype)
    weights = sum(parameter.nbytes for parameter in base.model.parameters())
    states = [getattr(parameter, "quant_state", None) for parameter in base.model.parameters()]
    scales = sum(
        state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
        for state in states
        if state is not None
    )
    leaves = {"quantization": quantization, "double_quant": double, "dtype": dtype}
    spec = spec_of(tiny_models[name], family, model=leaves, resources={"gpus_per_worker": 0})
    on_cpu = footprint_of(spec, LAPTOP).base_gib * 2**30 - LIBRARIES_BYTES
    assert on_cpu == pytest.approx(weights + scales, rel=0.1)
    assert footprint_of(spec_of(tiny_models[name], family, model={**leaves, "wo": None})).base_gib * 2**30 <= on_cpu + 1


@pytest.mark.parametrize(
    ("adapter", "named"),
    [
        ({"r": 8, "target_modules": ["q", "v"]}, "lora"),
        ({"kind": "bottleneck", "reduction_factor": 8}, "bottleneck"),
        ({"kind": "prefix", "virtual_tokens": 5}, "prompt_encoder"),
        ({"kind": "prompt", "virtual_tokens": 5}, "prompt_encoder"),
    ],
)
def test_every_adapter_is_counted(
    tiny_models: dict[str, Path], trial: Trial, open_slot: Any, adapter: dict[str, Any], named: str
) -> None:
    slot = open_slot(trial("t5", **{f"adapter__{key}": value for key, value in adapter.items()}))
    trained = sum(p.numel() for key, p in adapter_parameters(slot.model, FIRST) if named in key) * TRAINED_BYTES
    smaller, share = {
        "lora": ({"r": 4}, 1 / 2),
        "bottleneck": ({"reduction_factor": 64}, 7 / 8),
        "prompt_encoder": ({"virtual_tokens": 1}, 4 / 5),
    }[named]
    # gradients of few rows and tokens: what is left is what is trained
    sections = {"train": {"batch_size": 1}, "data": {"tasks": ["mrpc"], "max_source_tokens": 8, "max_target_tokens": 2}}
    large, small = (
        footprint_of(spec_of(tiny_models["t5"], "t5", adapter=leaves, **sections)).slot_gib * 2**30
        for leaves in (adapter, {**adapter, **smaller})
    )
    assert large - small == pytest.approx(share * trained, rel=0.07)


def test_of_what_is_searched_the_largest_counts(tiny_models: dict[str, Path]) -> None:
    fixed = footprint_of(spec_of(tiny_models["t5"], "t5", adapter={"r": 32}, train={"batch_size": 12})).slot_gib
    searched = spec_of(
        tiny_models["t5"],
        "t5",
        adapter={"r": {"choice": [4, 32, 8]}},
        train={"batch_size": {"choice": [12, 6]}},
        baseline={"adapter.r": 4, "train.batch_size": 6},
    )
    assert footprint_of(searched).slot_gib == pytest.approx(fixed)
    small, either = (
        footprint_of(
            spec_of(
                tiny_models["t5"],
                "t5",
                adapter={"kind": "bottleneck", "reduction_factor": factor},
                baseline={} if isinstance(factor, int) else {"adapter.reduction_factor": 16},
            )
        ).slot_gib
        for factor in (4, {"choice": [16, 4]})
    )
    assert either == small
    halves = spec_of(tiny_models["t5"], "t5", adapter={"r": 32}, train={"batch_size": 12, "micro_batch_size": 3})
    assert footprint_of(halves).slot_gib < fixed / 2


def test_a_model_of_the_hub_is_known_once_it_is_here(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    spec = spec_of("some/t5-model", "t5")
    assert predict_footprint(spec, SERVER) is None
    kept = tmp_path / "hub" / "models--some--t5-model"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("abc\n")
    (kept / "snapshots").mkdir()
    (kept / "snapshots" / "abc").symlink_to(tiny_models["t5"])
    assert predict_footprint(spec, SERVER) == predict_footprint(spec_of(tiny_models["t5"], "t5"), SERVER)
    revision = spec_of("some/t5-model", "t5", model={"revision": "abc"})
    assert predict_footprint(revision, SERVER) == predict_footprint(spec, SERVER)
    assert predict_footprint(spec_of("some/t5-model", "t5", model={"revision": "v2"}), SERVER) is None


@pytest.mark.parametrize("fault", ["weights", "config", "torn", "no numbers", "no mapping", "index"])
def test_what_cannot_be_told_is_not_told(tmp_path: Path, fault: str) -> None:
    model = write_tiny_t5(tmp_path)
    if fault == "weights":
        (model / "model.safetensors").rename(model / "pytorch_model.bin")
    elif fault == "config":
        (model / "config.json").write_text("[")
    elif fault == "torn":
        (model / "model.safetensors").write_bytes(b"\xff" * 12)
    elif fault == "no mapping":
        (model / "config.json").write_text("[]")
    elif fault == "no numbers":
        (model / "config.json").write_text(json.dumps({"model_type": "t5"}))
    else:
        (model / "model.safetensors").rename(model / "part.safetensors")
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert predict_footprint(spec_of(model, "t5"), SERVER) is None


def test_weights_in_parts_are_added_up(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, tensors = write_tiny_t5(tmp_path), load_file(tiny_models["t5"] / "model.safetensors")
    names = sorted(tensors)
    (model / "model.safetensors").unlink()
    for part, mine in (("a", names[::2]), ("b", names[1::2])):
        save_file({name: tensors[name] for name in mine}, model / f"{part}.safetensors")
    parts = {name: f"{'ab'[index % 2]}.safetensors" for index, name in enumerate(names)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    whole, found = (predict_footprint(spec_of(folder, "t5"), SERVER) for folder in (tiny_models["t5"], model))
    assert found == whole
