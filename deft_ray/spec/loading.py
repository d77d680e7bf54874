"""Load a spec: YAML and overrides in, a checked SweepSpec or all of its faults out."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable
from pathlib import Path as FilePath
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from deft_ray.errors import SpecError
from deft_ray.spec import yaml_tree
from deft_ray.spec.catalog import NANO, TRIAL_SECTIONS, guess_family
from deft_ray.spec.domains import Domain, Scalar, looks_like_domain, parse_domain
from deft_ray.spec.rules import Machine, check_rules
from deft_ray.spec.schema import SweepSpec
from deft_ray.spec.yaml_tree import Path

Fault = tuple[Path, str]


def load_spec(file: str | FilePath, overrides: Iterable[str] = (), machine: Machine | None = None) -> SweepSpec:
    """Read, override and check a spec.

    Args:
        file: The YAML file.
        overrides: ``dotted.key=value`` texts; the value is YAML, so domains work too.
        machine: What this machine has, to check resources against; None where the sweep runs elsewhere.

    Raises:
        SpecError: With every fault found, ``file:line: path: what (got value), what is allowed``.
    """
    source = FilePath(file)
    try:
        text = source.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError([f"{file}: no such file; a spec is a YAML file such as search_spaces/quickstart.yaml"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError([f"{file}: cannot be read: {error}"]) from None
    try:
        tree, lines, faults = yaml_tree.parse(text)
    except yaml_tree.YamlFault as fault:
        raise SpecError([f"{file}:{fault.line}: {fault}"]) from None
    if not isinstance(tree, dict):
        raise SpecError([f"{file}:1: must be a mapping of sections (got {_show(tree)})"])
    places = {path: f"{file}:{line}" for path, line in lines.items()}
    for override in overrides:
        faults += _apply_override(tree, places, override)
    spec, more = check_tree(tree, machine)
    faults += more
    if faults or spec is None:
        raise SpecError(_format(faults, places, str(file)))
    return spec


def check_tree(tree: dict[str, Any], machine: Machine | None = None) -> tuple[SweepSpec | None, list[Fault]]:
    """Check a spec that is already a plain value.

    Args:
        tree: Sections by name, leaves as values or ``{kind: [args]}`` domains.
        machine: See :func:`load_spec`.

    Returns:
        The spec, or None if the faults leave none; and the faults.
    """
    values, space, faults = _split_domains(tree)
    faults += [
        fault for dotted, domain in space.items() for fault in _check_domain_values(values, tuple(dotted.split(".")), domain)
    ]
    broken = {path[:2] for path, _ in faults}
    values = _fill_family(values)
    spec, errors = _validate({**values, "space": space})
    faults += [fault for fault in errors if fault[0][:2] not in broken]
    faults += check_rules(values, space, broken | {path[:2] for path, _ in faults}, machine)
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
        config = json.loads((FilePath(model_name) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    model_type = config.get("model_type") if isinstance(config, dict) else None
    return model_type if isinstance(model_type, str) else None


def _split_domains(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Domain], list[Fault]]:
    """Take the domains out of the tree, leaving their first value in place."""
    values: dict[str, Any] = {}
    space: dict[str, Domain] = {}
    faults: list[Fault] = []
    for section, content in tree.items():
        values[section] = content
        if looks_like_domain(content):
            faults.append(((section,), f"cannot be searched: only leaves of {', '.join(TRIAL_SECTIONS)} can"))
        if not isinstance(content, dict):
            continue
        values[section] = {}
        for key, value in content.items():
            if not looks_like_domain(value):
                values[section][key] = value
                continue
            path = (section, key)
            if section not in TRIAL_SECTIONS:
                faults.append((path, _not_searchable(section)))
                continue
            domain, below = parse_domain(value)
            faults += [((*path, *rest), message) for rest, message in below]
            if domain is not None:
                space[f"{section}.{key}"] = domain
                values[section][key] = domain.args[0]
    return values, space, faults


def _not_searchable(section: str) -> str:
    reason = {
        "model": "one sweep has one frozen base, and densities compare only within one dtype",
        "data": "trials compare only on the same data",
    }.get(section, "it belongs to the sweep, not to a trial")
    return f"cannot be searched: {reason}; allowed: leaves of {', '.join(TRIAL_SECTIONS)}"


def _check_domain_values(values: dict[str, Any], path: tuple[str, ...], domain: Domain) -> list[Fault]:
    """Check each bound or choice as if it stood in the spec by itself."""
    section, key = path
    model = _section_model(section)
    faults: list[Fault] = []
    for index, arg in enumerate(domain.args):
        try:
            model.model_validate({**values[section], key: arg})
        except ValidationError as error:
            for item in error.errors():
                if item["loc"][:1] != (key,):
                    continue
                if item["type"] == "extra_forbidden":
                    return [(path, _unknown_key(key, model))]
                faults.append(((*path, domain.kind, index), _message(item, model)))
    return faults


def _section_model(section: str) -> type[BaseModel]:
    annotation = SweepSpec.model_fields[section].annotation
    assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation


def _validate(values: dict[str, Any]) -> tuple[SweepSpec | None, list[Fault]]:
    try:
        return SweepSpec.model_validate(values), []
    except ValidationError as error:
        faults: dict[Fault, None] = {}
        for item in error.errors():
            model = _model_at(item["loc"])
            path, message = _path(item["loc"], values), _message(item, model)
            faults[(path, message)] = None
        return None, list(faults)


def _model_at(loc: tuple[str | int, ...]) -> type[BaseModel]:
    if len(loc) > 1 and isinstance(loc[0], str) and loc[0] in SweepSpec.model_fields:
        annotation = SweepSpec.model_fields[loc[0]].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
    return SweepSpec


def _path(loc: tuple[str | int, ...], values: Any) -> Path:
    """Cut a pydantic location down to the part that exists in the file (it names union members too)."""
    path: list[str | int] = []
    for step in loc:
        if isinstance(values, dict) and (step in values or not path or len(path) < 2):
            values = values.get(step)
        elif isinstance(values, list) and isinstance(step, int) and step < len(values):
            values = values[step]
        else:
            break
        path.append(step)
    return tuple(path)


def _message(item: Any, model: type[BaseModel]) -> str:
    kind, context, got = item["type"], item.get("ctx", {}), _show(item["input"])
    if kind == "extra_forbidden":
        return _unknown_key(str(item["loc"][-1]), model)
    wording: dict[str, Callable[[], str]] = {
        "missing": lambda: "is required",
        "greater_than": lambda: f"must be above {context['gt']:g} (got {got})",
        "greater_than_equal": lambda: f"must be at least {context['ge']:g} (got {got})",
        "less_than": lambda: f"must be below {context['lt']:g} (got {got})",
        "less_than_equal": lambda: f"must be at most {context['le']:g} (got {got})",
        "literal_error": lambda: f"must be {context['expected']} (got {got})",
        "int_type": lambda: f"must be a whole number (got {got})",
        "float_type": lambda: f"must be a number (got {got})",
        "bool_type": lambda: f"must be true or false (got {got})",
        "string_type": lambda: f"must be a text (got {got})",
        "list_type": lambda: f"must be a list (got {got})",
        "dict_type": lambda: f"must be a mapping (got {got})",
        "model_type": lambda: f"must be a mapping of {', '.join(model.model_fields)} (got {got})",
        "too_short": lambda: f"must not be empty (got {got})",
        "string_pattern_mismatch": lambda: f"may hold letters, digits, '.', '_' and '-' only (got {got})",
        "finite_number": lambda: f"must be finite (got {got})",
        "value_error": lambda: f"{context['error']} (got {got})",
    }
    return wording.get(kind, lambda: f"{item['msg']} (got {got})")()


def _unknown_key(key: str, model: type[BaseModel]) -> str:
    known = [name for name in model.model_fields if name != "space"]
    nearest = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean '{nearest[0]}'? " if nearest else ""
    return f"unknown key; {hint}allowed: {', '.join(known)}"


def _show(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _apply_override(tree: dict[str, Any], places: dict[Path, str], override: str) -> list[Fault]:
    dotted, equals, text = override.partition("=")
    path = tuple(dotted.strip().split("."))
    place = f"--set {override}"
    places[path] = place
    if not equals or not all(path):
        return [(path, "must look like dotted.key=value, for example deft.alpha=1")]
    try:
        value = yaml_tree.parse_scalar(text)
    except yaml_tree.YamlFault as fault:
        return [(path, str(fault))]
    node = tree
    for key in path[:-1]:
        child = node.setdefault(key, {})
        if child is None or not isinstance(child, dict):
            return [(path, f"'{key}' holds a value, not keys (got {_show(child)})")]
        places.setdefault(path[: path.index(key) + 1], place)
        node = child
    node[path[-1]] = value
    for known in [known for known in places if known[: len(path)] == path]:
        places[known] = place
    return []


def _format(faults: list[Fault], places: dict[Path, str], file: str) -> list[str]:
    """Give each fault its place: the line of its path, or of the nearest path above it."""

    def place(path: Path) -> str:
        return next((places[path[:n]] for n in range(len(path), -1, -1) if path[:n] in places), file)

    def order(fault: Fault) -> tuple[str, int, str]:
        head, _, line = place(fault[0]).rpartition(":")
        return (head, int(line), "") if line.isdigit() else ("~", 0, place(fault[0]))

    unique = sorted(dict.fromkeys(faults), key=order)
    return [f"{place(path)}: {'.'.join(map(str, path)) or 'spec'}: {message}" for path, message in unique]


def literal_values(section: str, key: str) -> tuple[Scalar, ...]:
    """Return the allowed words of a literal field, for messages and documentation."""
    return get_args(_section_model(section).model_fields[key].annotation)
