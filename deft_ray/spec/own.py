"""Rules for tasks in the user's own files: what each entry of ``data.own`` gives must make one whole task.

They read the tree as it stands, since other leaves may be broken. What the files hold is a set-up matter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from deft_ray.spec.catalog import OWN_METRICS, OWN_SUFFIXES, TASKS, TWO_CLASS_METRICS, own_file
from deft_ray.spec.yaml_tree import Fault, Path, show

_Entry = dict[str, Any]
#: A fault of one key of an entry.
_KeyFault = tuple[str, str]

#: Keys of an entry, by what it is.
_LABELLED = ("text", "label")
_ASKED = ("question", "context", "answer")


def own_kinds(own: Any) -> dict[str, str | None]:
    """Return the kinds of the own tasks by name; None where an entry does not tell."""
    entries = own.items() if isinstance(own, dict) else ()
    return {name: _kind(entry) if isinstance(entry, dict) else None for name, entry in entries}


def own_faults(own: Any, folder: str | None) -> Iterator[Fault]:
    """Check ``data.own``.

    Args:
        own: What stands there.
        folder: ``data.dir``.
    """
    for name, entry in own.items() if isinstance(own, dict) else ():
        path: Path = ("data", "own", name)
        if name in TASKS:
            yield path, f"is the name of a known task (got {show(name)}); give yours another one"
        elif not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}", name):
            yield path, f"a task's name may hold up to 100 letters, digits, '_' and '-' only (got {show(name)})"
        if isinstance(entry, dict):
            found = [*_columns(entry), *_labels(entry), *_metric(entry), *_files(entry, folder)]
            yield from (((*path, key), message) for key, message in found)


def _kind(entry: _Entry) -> str | None:
    labelled, asked = _given(entry, _LABELLED), _given(entry, _ASKED)
    if bool(labelled) == bool(asked):
        return None
    return "question" if asked else "classification" if entry.get("labels") is not None else "regression"


def _given(entry: _Entry, keys: tuple[str, ...]) -> list[str]:
    return [key for key in keys if entry.get(key) is not None]


def _columns(entry: _Entry) -> Iterator[_KeyFault]:
    labelled, asked = _given(entry, _LABELLED), _given(entry, _ASKED)
    if bool(labelled) == bool(asked):
        got = ", ".join(labelled + asked) or "none of them"
        yield (labelled or _LABELLED)[0], f"give either text and label, or question, context and answer (got {got})"
        return
    for key in _LABELLED if labelled else _ASKED:
        if entry.get(key) is None:
            beside = " and ".join(labelled or asked)
            yield key, f"is required beside {beside} (got nothing); the name of a column"
    text = entry.get("text")
    if isinstance(text, list) and not 1 <= len(text) <= 2:
        yield "text", f"must be one column, or two of a pair (got {show(text)})"
    if asked and entry.get("labels") is not None:
        yield "labels", f"means nothing where questions are asked (got {show(entry['labels'])})"


def _labels(entry: _Entry) -> Iterator[_KeyFault]:
    labels, kind = entry.get("labels"), _kind(entry)
    if kind == "regression" and entry.get("metric") not in OWN_METRICS["regression"]:
        metrics = " or ".join(OWN_METRICS["regression"])
        yield (
            "labels",
            f"is required (got nothing): the class names in order; only with metric {metrics} there are none",
        )
    if not isinstance(labels, list) or kind != "classification":
        return
    if len(labels) < 2:
        yield "labels", f"must name two classes or more (got {show(labels)})"
    for index, label in enumerate(labels):
        if label in labels[:index]:
            yield "labels", f"class stands twice (got {show(label)})"
        elif isinstance(label, str) and (not label or label != label.strip()):
            yield "labels", f"the name of a class is not empty and has no blank around it (got {show(label)})"


def _metric(entry: _Entry) -> Iterator[_KeyFault]:
    metric, kind, labels = entry.get("metric"), _kind(entry), entry.get("labels")
    if metric is None or kind is None or kind == "regression":  # a regression without its metric lacks labels
        return
    allowed = OWN_METRICS[kind]
    if metric not in allowed:
        yield "metric", f"does not score a {kind} task (got {show(metric)}); allowed: {', '.join(allowed)}"
    elif kind == "classification" and metric in TWO_CLASS_METRICS and isinstance(labels, list) and len(labels) != 2:
        what = "needs two classes, of which the second is the positive one"
        yield "metric", f"{what} (got {show(metric)} with {len(labels)}); allowed: accuracy"


def _files(entry: _Entry, folder: str | None) -> Iterator[_KeyFault]:
    for key in ("train", "validation"):
        file = entry.get(key)
        if not isinstance(file, str):
            continue
        if not file.endswith(OWN_SUFFIXES):
            yield key, f"is no file that can be read (got {show(file)}); allowed: {', '.join(OWN_SUFFIXES)}"
        elif not _is_file(own_file(file, folder)):
            where = "" if folder is None or os.path.isabs(file) else " in data.dir"
            yield key, f"no such file{where} (got {show(file)})"


def _is_file(path: str) -> bool:
    try:
        return os.path.isfile(path)
    except ValueError:  # a NUL byte
        return False
