"""The run directory: who it belongs to, where its files are, and what may be continued in it."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from deft_ray.errors import SetupError
from deft_ray.spec.loading import check_tree
from deft_ray.spec.plan import Plan
from deft_ray.spec.resolve import to_tree
from deft_ray.spec.schema import SweepSpec

#: Sections that say nothing of what is trained: a sweep may be continued with others.
_MAY_CHANGE = ("tracking", "budget", "reference")


class RunDir:
    """Paths of one sweep's files.

    Args:
        path: The folder; need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.spec = self.path / "spec.yaml"
        self.plan = self.path / "plan.json"
        self.records = self.path / "records.jsonl"
        self.search = self.path / "search"
        self.curves = self.path / "curves"
        self.end = self.path / "end.json"

    def check_new(self) -> None:
        """Check that a new sweep may be written here.

        Raises:
            SetupError: If the folder holds anything.
        """
        if self.plan.is_file():
            raise SetupError(
                f"{self.path}: holds the sweep '{self._plan()['name']}' already; "
                "continue it with --resume, or give another folder with --output"
            )
        if self._is_half_made():
            return
        if os.path.lexists(self.path) and (not self.path.is_dir() or any(self.path.iterdir())):
            raise SetupError(f"{self.path}: is not an empty folder; give another one with --output")

    def check_same(self, spec: SweepSpec, extend: bool = False, resume: bool = True) -> None:
        """Check that the sweep here is the one that is to be continued.

        Args:
            spec: What it is to be continued with.
            extend: Whether there are to be more trials than before.
            resume: Whether that may have been said before: a sweep that is extended may have been interrupted.

        Raises:
            SetupError: If there is none, or with every leaf that differs.
        """
        if self._is_half_made():
            return
        if not self.plan.is_file() or not self.spec.is_file():
            raise SetupError(f"{self.path}: holds no sweep to continue; start one without --resume")
        self._plan()
        there = _with_defaults(self.read_spec())
        faults = [
            f"{self.path}: {path}: is {here!r} now, was {before!r}; a sweep is continued with the spec it began with"
            for path, before, here in _differences(there, _plain(spec))
            if not path.startswith(_MAY_CHANGE) and not (extend and path == "search.trials")
        ]
        before, here = there.get("search", {}).get("trials"), spec.search.trials
        if extend and spec.search.path is not None:
            faults.append(f"{self.path}: search.path: a path is not extended: more trials would move its values of α")
        elif extend and (not isinstance(before, int) or here < before or (here == before and not resume)):
            faults.append(f"{self.path}: search.trials: is {here} now, was {before}; --extend needs more than before")
        if faults:
            raise SetupError("\n".join(faults))

    def create(self, spec: SweepSpec, plan: Plan) -> None:
        """Write ``spec.yaml`` and ``plan.json``; the latter, put in its place last, makes this a sweep.

        Raises:
            SetupError: If the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SetupError(f"{self.path}: cannot be made: {error}; give another folder with --output") from error
        content = {"sweep_id": f"{spec.name}-{uuid.uuid4().hex[:8]}", **plan.to_json()}
        aside = _aside(self.plan)
        aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        self._write(self.spec, yaml.safe_dump(_plain(spec), sort_keys=False, allow_unicode=True))
        os.replace(aside, self.plan)

    def continue_with(self, spec: SweepSpec, plan: Plan) -> None:
        """Write the spec and the plan with which the sweep goes on in the place of the old ones; it stays the same."""
        content = {"sweep_id": self.sweep_id, **plan.to_json()}
        self._write(self.plan, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        self._write(self.spec, yaml.safe_dump(_plain(spec), sort_keys=False, allow_unicode=True))

    @property
    def begun(self) -> bool:
        """Whether there is a sweep here; not if it was killed while it made this folder."""
        return self.plan.is_file()

    def _is_half_made(self) -> bool:
        """Tell whether :meth:`create`, and nobody else, has written here and has not come to its end."""
        mark = _aside(self.plan)
        known = {mark, _aside(self.spec), self.spec}
        return mark.is_file() and known.issuperset(self.path.iterdir())

    @property
    def sweep_id(self) -> str:
        """The sweep's identity, in MLflow and in storage."""
        return str(self._plan()["sweep_id"])

    def storage(self, spec: SweepSpec) -> str:
        """Where this sweep's checkpoints and Ray's own state go: the run directory, or its folder in ``storage``."""
        return str(self.path) if spec.storage is None else f"{spec.storage.rstrip('/')}/{self.sweep_id}"

    def write_end(self, reason: str, facts: dict[str, str]) -> None:
        """Keep why the sweep has ended, and what else its report says; goes with the next ``--resume``."""
        self._write(self.end, json.dumps({"reason": reason, "facts": facts}, indent=2, ensure_ascii=False) + "\n")

    def read_end(self) -> tuple[str, dict[str, str]]:
        """Return what :meth:`write_end` kept; nothing of a sweep that was killed, or that runs."""
        found = json.loads(self.end.read_text(encoding="utf-8")) if self.end.is_file() else {}
        return found.get("reason", ""), found.get("facts", {})

    def write_curve(self, trial: str, rows: list[dict[str, Any]]) -> None:
        """Keep a trial's metric rows, all of them or none."""
        self.curves.mkdir(exist_ok=True)
        self._write(self.curves / f"{trial}.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))

    def read_curve(self, trial: str) -> list[dict[str, Any]]:
        """Return a trial's metric rows; none if they were not kept."""
        file = self.curves / f"{trial}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    def read_spec(self) -> dict[str, Any]:
        """Return ``spec.yaml`` as a plain tree.

        Raises:
            SetupError: If it is none.
        """
        try:
            there = yaml.safe_load(self.spec.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            there = None
        if not isinstance(there, dict):
            raise SetupError(f"{self.spec}: is no spec of a sweep, so nothing can be continued; give another folder")
        return there

    def _plan(self) -> dict[str, Any]:
        try:
            plan: dict[str, Any] = json.loads(self.plan.read_text(encoding="utf-8"))
            plan["name"], plan["sweep_id"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SetupError(f"{self.plan}: is no plan of a sweep ({error!r}); give another folder") from error
        return plan

    @staticmethod
    def _write(file: Path, text: str) -> None:
        aside = _aside(file)
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, file)


def _aside(file: Path) -> Path:
    return file.with_name(f".{file.name}.new")


def _with_defaults(tree: dict[str, Any]) -> Any:
    """A spec as it was written, with the leaves that have come into being since; as it is where it is no spec now."""
    spec, _ = check_tree(tree)
    return tree if spec is None else _plain(spec)


def _plain(spec: SweepSpec) -> Any:
    return json.loads(json.dumps(to_tree(spec)))


def _differences(before: Any, here: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(here, dict):
        for key in [*before, *(key for key in here if key not in before)]:
            yield from _differences(before.get(key), here.get(key), f"{path}.{key}".lstrip("."))
    elif before != here:
        yield path, before, here
