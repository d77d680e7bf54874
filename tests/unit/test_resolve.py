"""From a spec and a sample to a trial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from deft_ray.spec.loading import check_tree, load_spec
from deft_ray.spec.resolve import resolve_baseline, resolve_trial, to_tree
from deft_ray.spec.schema import SweepSpec

TREE: dict[str, Any] = {
    "name": "try",
    "model": {"name": "google/flan-t5-xl"},
    "data": {"tasks": ["rte", "cola"]},
    "adapter": {"r": {"choice": [4, 8]}, "target_modules": ["q", "v"]},
    "deft": {
        "approximation": {"choice": ["tanh", "l0"]},
        "alpha": {"uniform": [0.5, 2]},
        "alpha_decoder": 0.25,
        "epsilon": {"loguniform": [1e-9, 1e-3]},
        "beta": 20,
    },
    "train": {"epochs": 2, "learning_rate": {"loguniform": [1e-5, 1e-2]}, "batch_size": {"randint": [8, 64]}},
    "search": {"seeds": [3, 4], "try_first": [{"adapter.r": 8}]},
    "baseline": {"adapter.r": 8, "train.learning_rate": 3e-4, "train.batch_size": 32},
}
SAMPLE = {
    "adapter.r": 4,
    "deft.approximation": "l0",
    "deft.alpha": 1.5,
    "deft.epsilon": 1e-6,
    "train.learning_rate": 1e-3,
    "train.batch_size": 16,
}


@pytest.fixture
def spec() -> SweepSpec:
    spec, faults = check_tree(TREE)
    assert faults == []
    assert spec is not None
    return spec


def test_a_trial_holds_the_sample_and_else_the_spec(spec: SweepSpec) -> None:
    trial = resolve_trial(spec, "t0007", "cola", 4, SAMPLE)
    assert (trial.trial, trial.task, trial.seed, trial.baseline) == ("t0007", "cola", 4, False)
    flat = trial.flat()
    assert {dotted: flat[dotted] for dotted in SAMPLE} == SAMPLE
    assert (trial.model, trial.data) == (spec.model, spec.data)
    unsearched = {"deft.alpha_decoder": 0.25, "deft.beta": 20.0, "train.epochs": 2.0, "train.weight_decay": 0.0}
    assert {dotted: flat[dotted] for dotted in unsearched} == unsearched
    assert flat["adapter.target_modules"] == "q,v"


def test_the_baseline_has_no_density_loss_and_its_own_values(spec: SweepSpec) -> None:
    trial = resolve_baseline(spec, "b", "rte", 3)
    assert trial.baseline
    assert (trial.deft.alpha, trial.deft.alpha_decoder) == (0.0, None)
    assert (trial.adapter.r, trial.train.learning_rate, trial.train.batch_size) == (8, 3e-4, 32)
    assert trial.adapter.target_modules == ["q", "v"]


def test_a_flat_trial_is_complete_and_survives_json(spec: SweepSpec) -> None:
    flat = resolve_trial(spec, "t", "rte", 3, SAMPLE).flat()
    assert json.loads(json.dumps(flat)) == flat
    assert {dotted.partition(".")[0] for dotted in flat} == {"model", "data", "adapter", "deft", "dial", "train"}


def test_values_that_are_lacking_are_named(spec: SweepSpec) -> None:
    with pytest.raises(ValueError, match=r"no value for adapter\.r, deft\.alpha$"):
        resolve_trial(spec, "t", "rte", 3, {k: v for k, v in SAMPLE.items() if k not in ("deft.alpha", "adapter.r")})


@pytest.mark.parametrize(
    ("dotted", "value", "message"),
    [
        ("adapter.r", 4.5, r"adapter\.r\n.*valid integer"),
        ("adapter.r", 0, r"adapter\.r\n.*greater than 0"),
        ("deft.epsilon", float("nan"), r"deft\.epsilon\n.*(finite|greater than or equal)"),
        ("deft.no_such", 1, r"deft\.no_such\n.*not permitted"),
    ],
)
def test_a_sample_is_checked_again(spec: SweepSpec, dotted: str, value: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        resolve_trial(spec, "t", "rte", 3, {**SAMPLE, dotted: value})


def test_resolving_changes_nothing_in_the_spec(spec: SweepSpec) -> None:
    before = spec.model_dump_json()
    resolve_trial(spec, "t", "rte", 3, SAMPLE)
    resolve_baseline(spec, "b", "rte", 3)
    assert spec.model_dump_json() == before


def test_a_trial_is_frozen(spec: SweepSpec) -> None:
    trial = resolve_trial(spec, "t", "rte", 3, SAMPLE)
    with pytest.raises(ValidationError, match="frozen"):
        trial.deft.alpha = 2.0


def test_the_resolved_tree_loads_to_the_same_spec(spec: SweepSpec, tmp_path: Path) -> None:
    """What a run directory's spec.yaml holds is a spec, equal to the one it was written from."""
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(json.loads(json.dumps(to_tree(spec))), sort_keys=False))
    assert load_spec(file) == spec


def test_the_resolved_tree_keeps_what_was_asked_and_fills_in_the_rest(spec: SweepSpec) -> None:
    tree = to_tree(spec)
    assert tree["adapter"]["r"] == {"choice": [4, 8]}
    assert tree["deft"]["alpha"] == {"uniform": [0.5, 2.0]}
    assert (tree["model"]["family"], tree["adapter"]["lora_alpha"], tree["storage"]) == ("t5", 32.0, None)
    assert "space" not in tree


def test_a_baseline_has_layer_scales_only_where_every_trial_has() -> None:
    def baseline(deft: dict[str, Any]) -> bool:
        tree = {"name": "x", "data": {"tasks": ["nano-sentiment"]}, "train": {"steps": 1}, "deft": deft}
        spec, faults = check_tree(tree)
        assert faults == []
        assert spec is not None
        return resolve_baseline(spec, "t0000", "nano-sentiment", 0).deft.adaptive

    assert baseline({"adaptive": True})
    assert not baseline({"adaptive": {"choice": [True, False]}})
    assert not baseline({})
