"""From a spec and a sample to a trial: every leaf a value, checked again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deft_ray.spec.catalog import TRIAL_SECTIONS
from deft_ray.spec.domains import Scalar
from deft_ray.spec.schema import SweepSpec, TrialSpec


def resolve_trial(spec: SweepSpec, trial: str, task: str, seed: int, sample: Mapping[str, Scalar]) -> TrialSpec:
    """Return the trial of a sampled point.

    Args:
        spec: The sweep's spec.
        trial: Id.
        task: Task.
        seed: Training seed.
        sample: A value for every searched leaf, by dotted name.

    Raises:
        ValueError: If a searched leaf has no value, or pydantic refuses one.
    """
    lacking = spec.space.keys() - sample.keys()
    if lacking:
        raise ValueError(f"no value for {', '.join(sorted(lacking))}")
    return _build(spec, trial, task, seed, dict(sample), baseline=False)


def resolve_baseline(spec: SweepSpec, trial: str, task: str, seed: int) -> TrialSpec:
    """Return the baseline of a task and seed: the density loss off, other searched leaves as ``baseline`` says.

    Where the spec asks for layer scales, the baseline has them too (ADA-PEFT); where it searches for them, it has none.
    """
    values: dict[str, Scalar | None] = {**spec.baseline, "deft.alpha": 0.0, "deft.alpha_decoder": None}
    if "deft.adaptive" in spec.space:
        values["deft.adaptive"] = False
    return _build(spec, trial, task, seed, values, baseline=True)


def _build(
    spec: SweepSpec, trial: str, task: str, seed: int, values: Mapping[str, Scalar | None], *, baseline: bool
) -> TrialSpec:
    sections: dict[str, dict[str, Any]] = {name: getattr(spec, name).model_dump() for name in TRIAL_SECTIONS}
    for dotted, value in values.items():
        section, key = dotted.split(".")
        sections[section][key] = value
    return TrialSpec.model_validate(
        {
            "trial": trial,
            "task": task,
            "seed": seed,
            "baseline": baseline,
            "model": spec.model.model_dump(),
            "data": spec.data.model_dump(),
            **sections,
        }
    )


def to_tree(spec: SweepSpec) -> dict[str, Any]:
    """Return the spec as the plain tree it could be loaded from, defaults filled in, domains in place."""
    tree = spec.model_dump(exclude={"space"})
    for dotted, domain in spec.space.items():
        section, key = dotted.split(".")
        tree[section][key] = domain.to_json()
    return tree
