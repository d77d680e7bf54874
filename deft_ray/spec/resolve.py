"""From a spec and a sample to a trial: every leaf a value, checked again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from deft_ray.spec.catalog import ADAPTER_LEAVES, DEFT_LEAVES, LAMBDA_LEAVES, TRIAL_SECTIONS
from deft_ray.spec.domains import Scalar
from deft_ray.spec.schema import SweepSpec, TrialSpec

#: Leaves whose value decides whether others are read.
DECIDING = ("adapter.kind", "deft.adaptive", "deft.approximation")


def is_read(spec: SweepSpec, sample: Mapping[str, Scalar], dotted: str) -> bool:
    """Whether a trial reads a leaf: ε only with l0, β only with tanh and sigmoid, λ only where adaptive, and so on.

    Args:
        spec: The sweep's spec.
        sample: Sampled values by dotted name, those of searched :data:`DECIDING` leaves among them.
        dotted: The leaf.
    """

    def value(leaf: str) -> Any:
        section, key = leaf.split(".")
        return sample[leaf] if leaf in spec.space else getattr(getattr(spec, section), key)

    section, key = dotted.split(".")
    if section == "adapter" and any(key in leaves for leaves in ADAPTER_LEAVES.values()):
        return key in ADAPTER_LEAVES[value("adapter.kind")]
    if section == "deft" and key in LAMBDA_LEAVES:
        return value("deft.adaptive") is True
    if section == "deft" and key in DEFT_LEAVES["auto"]:
        return key in DEFT_LEAVES[value("deft.approximation")]
    return True


def resolve_trial(
    spec: SweepSpec,
    trial: str,
    task: str,
    seed: int,
    sample: Mapping[str, Scalar],
    setting: str = "",
    start_from: str = "",
    place: int = 0,
) -> TrialSpec:
    """Return the trial of a sampled point, or of a point of a path.

    Args:
        spec: The sweep's spec.
        trial: Id.
        task: Task.
        seed: Training seed.
        sample: A value for every searched leaf that the trial reads, by dotted name; the others have their defaults.
        setting: Id of the trial of the same point with the first seed; the trial's own if empty.
        start_from: On a path the trial that it goes on from.
        place: Its place on the path, from 0.

    Raises:
        ValueError: If a searched leaf has no value, or pydantic refuses one.
    """
    lacking = {leaf for leaf in DECIDING if leaf in spec.space and leaf not in sample}
    lacking |= {leaf for leaf in spec.space if not lacking and leaf not in sample and is_read(spec, sample, leaf)}
    if lacking:
        raise ValueError(f"no value for {', '.join(sorted(lacking))}")
    unread = {leaf: _default(spec, leaf) for leaf in spec.space if leaf not in sample}
    found = _build(spec, trial, task, seed, {**unread, **sample}, baseline=False, setting=setting)
    return _on_path(found, spec.search.path_share, start_from, place) if start_from else found


def _on_path(trial: TrialSpec, share: float, start_from: str, place: int) -> TrialSpec:
    """Shorten a trial to its part of a path: a baseline's whole training and ``place`` such parts went before."""
    steps, epochs = trial.train.steps, trial.train.epochs
    if steps is not None:
        part = max(1, round(share * steps))
        train = trial.train.model_copy(update={"steps": part})
        return trial.model_copy(update={"train": train, "start_from": start_from, "steps_before": steps + place * part})
    assert epochs is not None
    train = trial.train.model_copy(update={"epochs": share * epochs})
    before = epochs * (1.0 + place * share)
    return trial.model_copy(update={"train": train, "start_from": start_from, "epochs_before": before})


def rung_shares(spec: SweepSpec) -> tuple[float, ...]:
    """Return the shares of a trial's steps at which the scheduler judges it."""
    return () if spec.search.scheduler == "none" else shares_of(spec.search.first_rung, spec.search.reduction_factor)


def shares_of(first: float, factor: float) -> tuple[float, ...]:
    """Return rungs as shares of a trial's steps: the first, times η, and so on, below 1.

    >>> shares_of(0.1, 3)
    (0.1, 0.3, 0.9)
    """
    shares, share = list[float](), first
    while share < 1.0 - 1e-9:
        shares.append(round(share, 9))
        share *= factor
    return tuple(shares)


def rung_places(shares: Iterable[float], steps: int) -> list[int]:
    """Return the step at which each rung of a trial of so many steps lies.

    >>> rung_places((1 / 9, 1 / 3), 90)
    [10, 30]
    """
    return [max(1, round(share * steps)) for share in shares]


def judged_at(objectives: Iterable[str]) -> float:
    """Return the threshold of the density objective: 0 for exact zeros, 0.1 for ``density@0.1``.

    Raises:
        ValueError: If it is no number.
    """
    density = next((name for name in objectives if name.startswith("density@")), None)
    return 0.0 if density is None else float(density.removeprefix("density@"))


def _default(spec: SweepSpec, dotted: str) -> Any:
    section, key = dotted.split(".")
    return type(getattr(spec, section)).model_fields[key].default


def resolve_baseline(spec: SweepSpec, trial: str, task: str, seed: int, setting: str = "") -> TrialSpec:
    """Return the baseline of a task and seed: the density loss off, other searched leaves as ``baseline`` says.

    Where the spec asks for layer scales, the baseline has them too (ADA-PEFT); where it searches for them, it has none.
    """
    values: dict[str, Scalar | None] = {**spec.baseline, "deft.alpha": 0.0, "deft.alpha_decoder": None}
    if "deft.adaptive" in spec.space:
        values["deft.adaptive"] = False
    return _build(spec, trial, task, seed, values, baseline=True, setting=setting)


def _build(
    spec: SweepSpec,
    trial: str,
    task: str,
    seed: int,
    values: Mapping[str, Scalar | None],
    *,
    baseline: bool,
    setting: str,
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
            "rungs": rung_shares(spec),
            "setting": setting or trial,
            "judged_at": judged_at(spec.search.objectives),
            "dial": spec.dial.model_dump(),
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
