"""Load a spec: YAML and overrides in, a checked SweepSpec or all of its faults out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from deft_ray.errors import SpecError
from deft_ray.spec.catalog import NANO, TRIAL_SECTIONS, guess_family
from deft_ray.spec.domains import KINDS, Domain, looks_like_domain, parse_domain
from deft_ray.spec.machine import Machine
from deft_ray.spec.messages import did_you_mean, section_model, to_faults, unknown_key
from deft_ray.spec.rules import check_rules
from deft_ray.spec.schema import SweepSpec
from deft_ray.spec.view import touches
from deft_ray.spec.yaml_tree import Fault, Path, YamlError, parse, show

#: Leaves that are mappings: their keys are the user's words, so that one named "choice" makes no domain.
_MAPPINGS = {("data", "own"), ("search", "objectives")}

#: Where a path of the spec stands: its rank among all places, and the place in words.
_Places = dict[Path, tuple[int, str]]


def load_spec(file: str | FilePath, overrides: Iterable[str] = (), machine: Machine | None = None) -> SweepSpec:
    """Read, override and check a spec.

    Args:
        file: The YAML file.
        overrides: ``dotted.key=value`` texts; the value is YAML, so domains work too.
        machine: What this machine has, to check resources against; None where the sweep runs elsewhere.

    Raises:
        SpecError: With every fault found, ``file:line: path: what (got value), what is allowed``.
    """
    try:
        tree, lines, faults = parse(_read(file))
    except YamlError as fault:
        raise SpecError([f"{file}:{fault.line}: spec: {fault}"]) from None
    if not isinstance(tree, dict):
        allowed = ", ".join(name for name in SweepSpec.model_fields if name != "space")
        raise SpecError([f"{file}:1: spec: must be a mapping of {allowed} (got {show(tree)})"])
    places: _Places = {path: (line, f"{file}:{line}") for path, line in lines.items()}
    broken_overrides: list[str] = []
    for override in overrides:
        try:
            faults += _apply_override(tree, places, override)
        except SpecError as error:
            broken_overrides += error.faults
    spec, more = check_tree(tree, machine)
    texts = _format([*faults, *more], places) + broken_overrides
    if texts or spec is None:
        raise SpecError(texts)
    return spec


def _read(file: str | FilePath) -> str:
    try:
        return FilePath(file).read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = "a spec is a YAML file such as search_spaces/quickstart.yaml"
        raise SpecError([f"{file}: no such file; {hint}"]) from None
    except (OSError, ValueError) as error:
        raise SpecError([f"{file}: cannot be read: {error}"]) from None


def check_tree(tree: dict[str, Any], machine: Machine | None = None) -> tuple[SweepSpec | None, list[Fault]]:
    """Check a spec that is already a plain value.

    Args:
        tree: Sections by name, leaves as values or ``{kind: [args]}`` domains.
        machine: See :func:`load_spec`.

    Returns:
        The spec, or None if the faults leave none; and the faults.
    """
    values, space, faults = _split_domains(tree)
    for dotted, domain in space.items():
        faults += _check_domain_values(values, dotted, domain)
    faults += _check_baseline_values(values, space)
    values = _fill_family(values)
    spec, errors = _validate({**values, "space": space})
    faults += [fault for fault in errors if not any(touches(fault[0], path) for path, _ in faults)]
    faults += check_rules(values, space, [path for path, _ in faults], machine)
    return (None if faults else spec), faults


def _fill_family(values: dict[str, Any]) -> dict[str, Any]:
    """Fill in ``model.family`` where it is not given and the name or a local config.json tells it."""
    model = values.get("model", {})
    if not isinstance(model, dict) or model.get("family") is not None:
        return values
    name = model.get("name", NANO)
    family = guess_family(name, read_model_type(name)) if isinstance(name, str) else None
    return {**values, "model": {**model, "family": family}}


def read_model_type(model_name: str) -> str | None:
    """Read ``model_type`` from the ``config.json`` of a local model folder; None if there is none."""
    try:
        file = FilePath(os.path.expanduser(model_name)) / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    model_type = config.get("model_type") if isinstance(config, dict) else None
    return model_type if isinstance(model_type, str) else None


def _split_domains(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Domain], list[Fault]]:
    """Take the domains out of the tree, leaving their first value in place."""
    values: dict[str, Any] = {}
    space: dict[str, Domain] = {}
    faults: list[Fault] = []
    for section, content in tree.items():
        if section == "space":
            faults.append((("space",), unknown_key("space", SweepSpec)))
        elif looks_like_domain(content):
            faults.append(((section,), _not_searchable(section)))
        elif section_model(section) is None or not isinstance(content, dict):
            values[section] = content
        else:
            values[section], found, more = _split_section(section, content)
            space |= found
            faults += more
    return values, space, faults


def _split_section(section: str, content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Domain], list[Fault]]:
    model = section_model(section)
    assert model is not None
    values: dict[str, Any] = {}
    space: dict[str, Domain] = {}
    faults: list[Fault] = []
    for key, value in content.items():
        if not isinstance(value, dict) or key not in model.model_fields:
            values[key] = value
        elif section not in TRIAL_SECTIONS and looks_like_domain(value) and (section, key) not in _MAPPINGS:
            faults.append(((section, key), _not_searchable(section)))
        elif section not in TRIAL_SECTIONS:
            values[key] = value
        elif not looks_like_domain(value):
            faults.append(((section, key), _no_domain(value)))
        else:
            domain, below = parse_domain(value)
            faults += [((section, key, *rest), message) for rest, message in below]
            if domain is not None:
                space[f"{section}.{key}"] = domain
                values[key] = domain.args[0]
    return values, space, faults


def _no_domain(value: dict[str, Any]) -> str:
    meant = did_you_mean(next(iter(value)), KINDS) if len(value) == 1 else ""
    return f"must be a value or one domain (got {show(value)}); {meant}domains: {', '.join(KINDS)}"


def _not_searchable(section: str) -> str:
    reason = {
        "model": "one sweep has one frozen base, and densities compare only within one dtype",
        "data": "trials compare only on the same data",
        **dict.fromkeys(TRIAL_SECTIONS, "a domain stands at a leaf"),
    }.get(section, "it belongs to the sweep, not to a trial")
    return f"cannot be searched: {reason}; allowed: leaves of {', '.join(TRIAL_SECTIONS)}"


def _check_domain_values(values: dict[str, Any], dotted: str, domain: Domain) -> Iterator[Fault]:
    """Check each bound or choice as if it stood in the spec by itself."""
    section, key = dotted.split(".")
    for index, arg in enumerate(domain.args):
        for message in _leaf_messages(values, section, key, arg):
            yield (section, key, domain.kind, index), message


def _check_baseline_values(values: dict[str, Any], space: dict[str, Domain]) -> Iterator[Fault]:
    """Check the baseline's values of searched leaves as if they stood in the spec."""
    baseline = values.get("baseline")
    for dotted, value in baseline.items() if isinstance(baseline, dict) else ():
        if dotted in space:
            section, key = dotted.split(".")
            for message in _leaf_messages(values, section, key, value):
                yield ("baseline", dotted), message


def _leaf_messages(values: dict[str, Any], section: str, key: str, value: object) -> list[str]:
    _, faults = _validate({section: {**values[section], key: value}})
    return [message for path, message in faults if path[:2] == (section, key)]


def _validate(values: dict[str, Any]) -> tuple[SweepSpec | None, list[Fault]]:
    try:
        return SweepSpec.model_validate(values), []
    except ValidationError as error:
        return None, to_faults(error, values)


def _apply_override(tree: dict[str, Any], places: _Places, override: str) -> list[Fault]:
    """Set one leaf or section of the tree.

    Raises:
        SpecError: If the override cannot be applied.
    """
    dotted, equals, text = override.partition("=")
    place = f"--set {' '.join(override.split())}"
    rank = 1 + max(rank for rank, _ in places.values())
    path: Path = tuple(dotted.strip().split("."))
    if not equals or not all(path):
        raise SpecError([f"{place}: must look like dotted.key=value, for example deft.alpha=1"])
    if path[0] == "baseline" and len(path) > 1:
        path = ("baseline", ".".join(map(str, path[1:])))
    try:
        value, _, faults = parse(text)
    except YamlError as fault:
        raise SpecError([f"{place}: {dotted.strip()}: {fault}"]) from None
    node = tree
    for depth, key in enumerate(path[:-1], 1):
        node = node.setdefault(str(key), {})
        if not isinstance(node, dict):
            raise SpecError([f"{place}: {_dotted(path)}: '{_dotted(path[:depth])}' has no keys (got {show(node)})"])
        places.setdefault(path[:depth], (rank, place))
    node[str(path[-1])] = value
    for known in [known for known in places if known[: len(path)] == path]:
        del places[known]
    places[path] = (rank, place)
    return [((*path, *rest), message) for rest, message in faults]


def _dotted(path: Path) -> str:
    return ".".join(part if part.isprintable() else repr(part) for part in map(str, path)) or "spec"


def _format(faults: list[Fault], places: _Places) -> list[str]:
    """Give each fault its place: that of its path, or of the nearest path above it; sort by place."""

    def place(path: Path) -> tuple[int, str]:
        return next(places[path[:n]] for n in range(len(path), -1, -1) if path[:n] in places)

    unique = sorted(dict.fromkeys(faults), key=lambda fault: place(fault[0])[0])
    return [f"{place(path)[1]}: {_dotted(path)}: {message}" for path, message in unique]
