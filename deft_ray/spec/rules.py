"""Rules that look at more than one leaf: each yields faults with the path they are about."""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from deft_ray.spec.catalog import FAMILY_KINDS, NANO, TASKS
from deft_ray.spec.domains import Domain
from deft_ray.spec.yaml_tree import Path

Fault = tuple[Path, str]


@dataclass(frozen=True)
class Machine:
    """What one machine offers to a sweep.

    Args:
        cpus: Logical processors.
        gpus: GPUs.
    """

    cpus: int
    gpus: int


def this_machine() -> Machine:
    """Count this machine's processors and NVIDIA GPUs, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    else:
        gpus = len(glob.glob("/dev/nvidia[0-9]*"))
    return Machine(cpus=os.cpu_count() or 1, gpus=gpus)


@dataclass(frozen=True)
class _View:
    """The tree with defaults by hand: what the rules need, whatever is broken elsewhere."""

    values: dict[str, Any]
    space: dict[str, Domain]

    def get(self, dotted: str, default: Any = None) -> Any:
        node: Any = self.values
        for key in dotted.split("."):
            node = node.get(key) if isinstance(node, dict) else None
        return default if node is None else node

    def options(self, dotted: str, default: Any = None) -> tuple[Any, ...]:
        domain = self.space.get(dotted)
        return domain.args if domain is not None else (self.get(dotted, default),)


def check_rules(
    values: dict[str, Any], space: dict[str, Domain], broken: set[Path], machine: Machine | None
) -> list[Fault]:
    """Check what single fields cannot.

    Args:
        values: Sections with a stand-in value for each domain.
        space: Domains by dotted name.
        broken: Paths (section, key) that already have a fault; rules about them stay silent.
        machine: What this machine has; None where the sweep runs on a cluster.
    """
    view = _View(values, space)
    rules = (_tasks, _family, _files, _approximation, _length, _batch, _baseline, _try_first)
    faults = [fault for rule in rules for fault in rule(view)]
    if machine is not None:
        faults += _resources(view, machine)
    return [fault for fault in faults if fault[0][:2] not in broken]


def _tasks(view: _View) -> Iterator[Fault]:
    tasks = view.get("data.tasks", [])
    if not isinstance(tasks, list):
        return
    family = view.get("model.family")
    for index, name in enumerate(tasks):
        path = ("data", "tasks", index)
        task = TASKS.get(name) if isinstance(name, str) else None
        if task is None:
            nearest = difflib.get_close_matches(str(name), TASKS, n=1)
            hint = f"did you mean '{nearest[0]}'? " if nearest else ""
            yield path, f"unknown task (got {name!r}); {hint}allowed: {', '.join(TASKS)}"
        elif family in FAMILY_KINDS and task.kind not in FAMILY_KINDS[family]:
            able = ", ".join(other for other, kinds in FAMILY_KINDS.items() if task.kind in kinds)
            yield path, f"a {task.kind} task cannot be done by the model family '{family}' (got {name!r}); families that can: {able}"
        elif name in tasks[:index]:
            yield path, f"task stands twice (got {name!r})"


def _family(view: _View) -> Iterator[Fault]:
    if view.get("model.family") is None:
        name = view.get("model.name", NANO)
        yield ("model", "family"), f"cannot be told from {name!r}; allowed: {', '.join(FAMILY_KINDS)}"


def _files(view: _View) -> Iterator[Fault]:
    """A path that is plainly meant as a file or folder must be there; whether it is complete is a set-up matter."""
    folder = view.get("data.dir")
    if isinstance(folder, str) and not FilePath(folder).is_dir():
        yield ("data", "dir"), f"no such folder (got {folder!r})"
    name = view.get("model.name")
    if isinstance(name, str) and name.startswith(("/", "./", "../", "~")) and not FilePath(name).is_dir():
        yield ("model", "name"), f"no such folder (got {name!r}); allowed: '{NANO}', a folder, or a hub name"


def _approximation(view: _View) -> Iterator[Fault]:
    if "tanh" in view.options("deft.approximation", "l0") and view.get("deft.beta") is None:
        yield ("deft", "beta"), "is required with approximation 'tanh'; a number above 0, for example 20"


def _length(view: _View) -> Iterator[Fault]:
    given = [key for key in ("steps", "epochs") if view.get(f"train.{key}") is not None]
    if len(given) != 1:
        yield ("train", given[-1] if given else "steps"), f"give either steps or epochs (got {' and '.join(given) or 'neither'})"


def _batch(view: _View) -> Iterator[Fault]:
    workers = view.get("resources.workers_per_host", 1)
    for batch in view.options("train.batch_size", 32):
        for micro in view.options("train.micro_batch_size"):
            if not isinstance(batch, int) or not isinstance(workers, int) or workers < 1:
                continue
            part = workers * (micro if isinstance(micro, int) and micro > 0 else 1)
            if batch % part:
                what = f"workers_per_host x micro_batch_size = {part}" if micro else f"workers_per_host = {workers}"
                yield ("train", "batch_size"), f"must be a multiple of {what} (got {batch})"


def _baseline(view: _View) -> Iterator[Fault]:
    baseline = view.get("baseline", {})
    if not isinstance(baseline, dict):
        return
    for dotted in view.space:
        if not dotted.startswith("deft.") and dotted not in baseline:
            message = f"is searched, so the baseline needs its own value: add it under 'baseline:', for example '{dotted}: …'"
            yield tuple(dotted.split(".")), message
    for dotted in baseline:
        if dotted not in view.space or dotted.startswith("deft."):
            yield ("baseline", dotted), "is no searched leaf of adapter or train; the baseline takes it from the spec"


def _try_first(view: _View) -> Iterator[Fault]:
    points = view.get("search.try_first", [])
    for index, point in enumerate(points if isinstance(points, list) else []):
        for dotted, value in point.items() if isinstance(point, dict) else ():
            domain = view.space.get(dotted)
            path = ("search", "try_first", index, dotted)
            if domain is None:
                yield path, f"is not searched; searched are: {', '.join(view.space) or 'none'}"
            elif not contains(domain, value):
                yield path, f"lies outside the domain {domain} (got {value!r})"


def contains(domain: Domain, value: Any) -> bool:
    """Tell whether a value lies in a domain, bounds included."""
    if domain.kind == "choice":
        return any(value == arg and isinstance(value, bool) == isinstance(arg, bool) for arg in domain.args)
    low, high = domain.args
    assert isinstance(low, int | float) and isinstance(high, int | float)
    number = isinstance(value, int if domain.kind == "randint" else int | float) and not isinstance(value, bool)
    return number and low <= value <= high


def _resources(view: _View, machine: Machine) -> Iterator[Fault]:
    hosts = view.get("resources.hosts", 1)
    workers = view.get("resources.workers_per_host", 1)
    cpus = view.get("resources.cpus_per_worker", 1)
    gpus = view.get("resources.gpus_per_worker")
    if not all(isinstance(number, int) and number > 0 for number in (workers, cpus)):
        return
    hosts = hosts if isinstance(hosts, int) and hosts > 0 else 1
    asked = hosts * workers
    if isinstance(gpus, int) and gpus > 0 and asked * gpus > machine.gpus:
        text = f"{hosts} host(s) x {workers} worker(s) x {gpus} GPU(s) = {asked * gpus} GPUs, this machine has {machine.gpus}"
        yield ("resources", "workers_per_host"), f"{text}; give --address for a cluster (got {workers})"
    elif asked * cpus > machine.cpus:
        text = f"{hosts} host(s) x {workers} worker(s) x {cpus} CPU(s) = {asked * cpus} CPUs, this machine has {machine.cpus}"
        yield ("resources", "workers_per_host"), f"{text}; give --address for a cluster (got {workers})"
