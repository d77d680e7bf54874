"""What pydantic has found, in a user's words: (path, message) faults."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from deft_ray.spec.schema import SweepSpec
from deft_ray.spec.yaml_tree import Fault, Path, show


def section_model(section: object) -> type[BaseModel] | None:
    """Return the model of a section, or None where the key names none."""
    field = SweepSpec.model_fields.get(section) if isinstance(section, str) else None
    annotation = field.annotation if field is not None else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def model_at(path: Path) -> type[BaseModel]:
    """Return the model whose keys stand below a path; the spec's own where the path leads to none."""
    model: Any = SweepSpec
    for step in path:
        field = getattr(model, "model_fields", {}).get(step)
        if field is not None:
            model = field.annotation
        elif get_origin(model) is dict:
            model = get_args(model)[1]
    return model if isinstance(model, type) and issubclass(model, BaseModel) else SweepSpec


def unknown_key(key: str, model: type[BaseModel]) -> str:
    """Say that a key is unknown, which one may be meant, and which are allowed."""
    known = [name for name in model.model_fields if name != "space"]
    return f"unknown key; {did_you_mean(key, known)}allowed: {', '.join(known)}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'? `` for the nearest known word; empty where none is near."""
    nearest = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{nearest[0]}'? " if nearest else ""


def to_faults(error: ValidationError, values: dict[str, Any]) -> list[Fault]:
    """Translate pydantic's errors, one fault for each place.

    Args:
        error: Raised by :class:`~deft_ray.spec.schema.SweepSpec`.
        values: What was validated.
    """
    found: dict[Path, list[Any]] = {}
    for item in error.errors():
        *above, last = item["loc"]
        lacking = item["type"] == "missing"
        path = (*_path(tuple(above), values), last) if lacking else _path(item["loc"], values)
        found.setdefault(path, []).append(item)
    told = {path: items for path, items in found.items() if not _only_the_other_member(path, items, found)}
    return [(path, _message(path, items)) for path, items in told.items()]


def _path(loc: tuple[str | int, ...], values: Any) -> Path:
    """Leave out of a pydantic location the union members that it names beside keys and items of the file."""
    path: list[str | int] = []
    for step in loc:
        if isinstance(values, dict) and (step in values or len(path) < 2):
            values = values.get(str(step))
        elif isinstance(values, list) and isinstance(step, int):
            values = values[step]
        else:
            continue
        path.append(step)
    return tuple(path)


def _only_the_other_member(path: Path, items: list[Any], found: Iterable[Path]) -> bool:
    """A list with a bad item is a bad list; that it is no 'all-linear' or text either goes without saying."""
    return all(item["type"] in ("literal_error", "string_type") for item in items) and any(
        len(other) > len(path) and other[: len(path)] == path for other in found
    )


def _message(path: Path, items: list[Any]) -> str:
    kinds = {item["type"] for item in items}
    if "extra_forbidden" in kinds:
        return unknown_key(str(path[-1]), model_at(path[:-1]))
    if "missing" in kinds:
        return "is required"
    if "float_type" in kinds:
        items = [item for item in items if item["type"] != "int_type"]
    first, *others = dict.fromkeys(_what(item, path) for item in items)
    what = " or ".join([first, *(other.removeprefix("must be ") for other in others)])
    return f"{what} (got {show(items[0]['input'])})"


def _what(item: Any, path: Path) -> str:
    context = item.get("ctx", {})
    wording: dict[str, Callable[[], str]] = {
        "greater_than": lambda: f"must be above {_number(context['gt'])}",
        "greater_than_equal": lambda: f"must be at least {_number(context['ge'])}",
        "less_than": lambda: f"must be below {_number(context['lt'])}",
        "less_than_equal": lambda: f"must be at most {_number(context['le'])}",
        "literal_error": lambda: f"must be {context['expected']}",
        "int_type": lambda: "must be a whole number",
        "float_type": lambda: "must be a number",
        "finite_number": lambda: "must be finite",
        "bool_type": lambda: "must be true or false",
        "string_type": lambda: "must be a text",
        "string_too_long": lambda: f"must have at most {context['max_length']} letters",
        "string_pattern_mismatch": lambda: "may hold letters, digits, '.', '_' and '-' only",
        "list_type": lambda: "must be a list",
        "too_short": lambda: "must not be empty",
        "dict_type": lambda: "must be a mapping",
        "model_type": lambda: f"must be a mapping of {', '.join(model_at(path).model_fields)}",
        "value_error": lambda: str(context["error"]),
    }
    return wording.get(item["type"], lambda: str(item["msg"]))()


def _number(bound: float) -> str:
    return f"{bound:g}" if float(f"{bound:g}") == bound else str(bound)
