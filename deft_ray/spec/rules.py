"""Rules that look at more than one leaf: each yields faults with the path they are about."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from typing import Any

from deft_ray.spec.catalog import (
    ADAPTER_LEAVES,
    DEFT_LEAVES,
    FAMILY_ADAPTERS,
    FAMILY_KINDS,
    LAMBDA_LEAVES,
    NANO,
    TASKS,
    TEXT_TO_TEXT,
)
from deft_ray.spec.domains import Domain
from deft_ray.spec.machine import Machine
from deft_ray.spec.messages import did_you_mean
from deft_ray.spec.own import own_faults, own_kinds
from deft_ray.spec.schema import AdapterSection, DeftSection, Section
from deft_ray.spec.search_rules import SEARCH_RULES
from deft_ray.spec.view import View, all_values, is_count, touches
from deft_ray.spec.yaml_tree import Fault, Path, show


def check_rules(
    values: dict[str, Any], space: dict[str, Domain], broken: Collection[Path], machine: Machine | None
) -> list[Fault]:
    """Check what single fields cannot.

    Args:
        values: Sections with a stand-in value for each domain.
        space: Domains by dotted name.
        broken: Paths that already have a fault; rules about them stay silent.
        machine: What this machine has; None where the sweep runs on a cluster.
    """
    view = View(values, space, broken)
    model = (_family, _files, _wo, _stacks)
    data = (_tasks, _own, _windows, _images)
    adapter = (_adapter_kind, _adapter_leaves, _head, _checkpointing)
    deft = (_approximation, _alpha_schedule, _deft_leaves)
    rules = (*data, *model, *adapter, *deft, _length, _batch, *SEARCH_RULES)
    faults = [fault for rule in rules for fault in rule(view)]
    if machine is not None:
        faults += _resources(view, machine)
    return [fault for fault in faults if not any(touches(fault[0], path) for path in broken)]


def _tasks(view: View) -> Iterator[Fault]:
    tasks = view.get("data.tasks", [])
    family = view.get("model.family")
    kinds = FAMILY_KINDS.get(family) if isinstance(family, str) else None
    known = {**own_kinds(view.get("data.own")), **{name: task.kind for name, task in TASKS.items()}}
    for index, name in enumerate(tasks if isinstance(tasks, list) else []):
        path = ("data", "tasks", index)
        if not isinstance(name, str) or name not in known:
            yield path, f"unknown task (got {show(name)}); {did_you_mean(str(name), known)}allowed: {', '.join(known)}"
        elif kinds is not None and known[name] is not None and known[name] not in kinds:
            able = ", ".join(other for other, kinds in FAMILY_KINDS.items() if known[name] in kinds)
            what = f"a {known[name]} task cannot be done by the model family '{family}'"
            yield path, f"{what} (got {show(name)}); families that can: {able}"
        elif family in TEXT_TO_TEXT and known[name] == "regression" and name not in TASKS:
            able = ", ".join(name for name in FAMILY_KINDS if name not in TEXT_TO_TEXT)
            what = f"the model family '{family}' does a regression by the likelihood of STS-B's answers"
            yield path, f"{what}, so none of your own (got {show(name)}); families that can: {able}"
        elif name in tasks[:index]:
            yield path, f"task stands twice (got {show(name)})"


def _own(view: View) -> Iterator[Fault]:
    folder = view.get("data.dir")
    return own_faults(view.get("data.own"), folder if isinstance(folder, str) else None)


def _windows(view: View) -> Iterator[Fault]:
    overlap, length = view.get("data.window_overlap_tokens"), view.get("data.max_source_tokens", 128)
    if is_count(overlap) and is_count(length) and overlap >= length:
        yield ("data", "window_overlap_tokens"), f"must be below data.max_source_tokens = {length} (got {overlap})"


def _family(view: View) -> Iterator[Fault]:
    name = view.get("model.name", NANO)
    if view.get("model.family") is None and not view.is_broken("model.name"):
        yield ("model", "family"), f"cannot be told from {show(name)}; allowed: {', '.join(FAMILY_KINDS)}"


def _files(view: View) -> Iterator[Fault]:
    """A path that is plainly meant as a file or folder must be there; whether it is complete is a set-up matter."""
    folder = view.get("data.dir")
    if isinstance(folder, str) and not _is_folder(folder):
        yield ("data", "dir"), f"no such folder (got {show(folder)})"
    name = view.get("model.name")
    if isinstance(name, str) and name.startswith(("/", "./", "../", "~")) and not _is_folder(name):
        yield ("model", "name"), f"no such folder (got {show(name)}); allowed: '{NANO}', a folder, or a hub name"


def _images(view: View) -> Iterator[Fault]:
    tasks = view.get("data.tasks", [])
    if isinstance(tasks, list) and "images" in tasks and view.get("data.dir") is None:
        yield ("data", "dir"), "is required by the task 'images' (got nothing); holds images/<split>/<class>/<file>"


def _wo(view: View) -> Iterator[Fault]:
    wo, family = view.get("model.wo"), view.get("model.family")
    if wo is not None and (view.get("model.quantization", "none") != "nf4" or family not in ("t5", None)):
        what = f"is only for a T5 under quantization 'nf4' (got {show(wo)})"
        yield ("model", "wo"), f"{what}; leave it out, or set model.quantization"


def _stacks(view: View) -> Iterator[Fault]:
    family, alpha = view.get("model.family"), view.get("deft.alpha_decoder")
    if alpha is not None and family is not None and family not in TEXT_TO_TEXT:
        what = f"is only for models with an encoder and a decoder (got {show(alpha)})"
        yield ("deft", "alpha_decoder"), f"{what}; deft.alpha weighs the one stack of the family '{family}'"


def _is_folder(path: str) -> bool:
    return os.path.isdir(os.path.expanduser(path))


def _adapter_kind(view: View) -> Iterator[Fault]:
    family = view.get("model.family")
    able = FAMILY_ADAPTERS.get(family) if isinstance(family, str) else None
    for path, kind in _kinds(view):
        if able is not None and kind not in able:
            what = f"the model family '{family}' takes no such adapter (got {show(kind)})"
            yield path, f"{what}; allowed: {', '.join(able)}"


def _kinds(view: View) -> list[tuple[Path, str]]:
    """Every kind of adapter that a trial can have, with where it stands; none if one of them is no kind at all."""
    kinds = [] if view.is_broken("adapter.kind") else all_values(view, "adapter.kind", "lora")
    return kinds if all(isinstance(kind, str) and kind in ADAPTER_LEAVES for _, kind in kinds) else []


def _adapter_leaves(view: View) -> Iterator[Fault]:
    """A leaf that no trial reads is a misunderstanding; at its default it may stand, as in a spec written back."""
    kinds = list(dict.fromkeys(kind for _, kind in _kinds(view)))
    if not kinds:
        return
    read = list(dict.fromkeys(leaf for kind in kinds for leaf in ADAPTER_LEAVES[kind]))
    every = {leaf for leaves in ADAPTER_LEAVES.values() for leaf in leaves}
    for leaf, got in _given_in_vain(view, AdapterSection, "adapter", every - set(read)):
        what = f"means nothing to the kind {' or '.join(kinds)} (got {got})"
        yield ("adapter", leaf), f"{what}, whose leaves are {', '.join(read)}"


def _head(view: View) -> Iterator[Fault]:
    family = view.get("model.family")
    for path, head in all_values(view, "adapter.head", "own") if family in TEXT_TO_TEXT else ():
        if head == "two-layer":
            able = ", ".join(other for other in FAMILY_KINDS if other not in TEXT_TO_TEXT)
            what = f"the model family '{family}' answers in words and has no head (got {show(head)})"
            yield path, f"{what}; leave it out; families with one: {able}"


def _given_in_vain(view: View, section: type[Section], name: str, unread: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the leaves that are given although nothing reads them, with what was given."""
    for leaf, field in section.model_fields.items():
        value, searched = view.get(f"{name}.{leaf}"), f"{name}.{leaf}" in view.space
        if leaf in unread and (searched or (value is not None and value != field.default)):
            yield leaf, "searched" if searched else show(value)


def _checkpointing(view: View) -> Iterator[Fault]:
    """PEFT hands a prefix over as a cache of keys, and a block adds its own to a cache each time that it runs."""
    if any(kind == "prefix" for _, kind in _kinds(view)):
        for path, value in all_values(view, "train.gradient_checkpointing", False):
            if value is True:
                others = ", ".join(kind for kind in ADAPTER_LEAVES if kind != "prefix")
                what = "does not go with the adapter kind 'prefix': a block that runs twice would see its keys twice"
                yield path, f"{what} (got true); allowed: false, or one of {others} as adapter.kind"
                return


def _approximation(view: View) -> Iterator[Fault]:
    steep = [kind for kind in ("tanh", "sigmoid") if kind in view.options("deft.approximation", "auto")]
    if steep and view.get("deft.beta") is None:
        message = f"is required with approximation '{steep[0]}' (got nothing); a number above 0, for example 20"
        yield ("deft", "beta"), message


def _alpha_schedule(view: View) -> Iterator[Fault]:
    shares = [view.options(f"deft.{key}", 0.0) for key in ("alpha_delay", "alpha_ramp")]
    if not all(isinstance(share, int | float) for options in shares for share in options):
        return
    delay, ramp = (max(options) for options in shares)
    if delay >= 1.0:
        yield ("deft", "alpha_delay"), f"must be below 1, or the loss is never switched on (got {delay:g})"
    elif delay + ramp > 1.0:
        message = f"alpha_delay + alpha_ramp must be at most 1, or alpha never reaches its value (got {delay + ramp:g})"
        yield ("deft", "alpha_ramp"), message


def _deft_leaves(view: View) -> Iterator[Fault]:
    """As of the adapter: a leaf that no trial reads."""
    kinds = view.options("deft.approximation", "auto")
    adaptive = view.options("deft.adaptive", False)
    if view.is_broken("deft.approximation") or not all(isinstance(kind, str) for kind in kinds):
        return
    reads = {leaf for kind in kinds for leaf in DEFT_LEAVES.get(kind, ())}
    reads |= set(LAMBDA_LEAVES) if True in adaptive else set()
    for leaf, got in _given_in_vain(view, DeftSection, "deft", {*DEFT_LEAVES["auto"], *LAMBDA_LEAVES} - reads):
        needs = "adaptive: true" if leaf in LAMBDA_LEAVES else f"approximation {_readers(leaf)}"
        yield ("deft", leaf), f"is read by no trial (got {got}); needs {needs}"


def _readers(leaf: str) -> str:
    return " or ".join(kind for kind, leaves in DEFT_LEAVES.items() if leaf in leaves and kind != "auto")


def _length(view: View) -> Iterator[Fault]:
    keys = ("steps", "epochs")
    given = [key for key in keys if view.get(f"train.{key}") is not None or view.is_broken(f"train.{key}")]
    if len(given) != 1:
        path = ("train", given[-1] if given else "steps")
        yield path, f"give either steps or epochs (got {' and '.join(given) or 'neither'})"


def _batch(view: View) -> Iterator[Fault]:
    """A batch is cut into equal parts: one for each worker, and of them one for each micro batch."""
    workers = view.get("resources.workers_per_host", 1)
    if not is_count(workers):
        return
    for path, batch in _batches(view):
        for _, micro in all_values(view, "train.micro_batch_size", None):
            if not is_count(batch):
                continue
            part = workers * (min(micro, max(1, batch // workers)) if is_count(micro) else 1)
            if batch % part:
                what = f"workers_per_host x micro_batch_size = {part}" if micro else f"workers_per_host = {workers}"
                yield path, f"must be a multiple of {what} (got {batch})"
                return


def _batches(view: View) -> Iterator[tuple[Path, Any]]:
    for batch in view.options("train.batch_size", 32):
        yield ("train", "batch_size"), batch
    baseline = view.get("baseline")
    if isinstance(baseline, dict) and "train.batch_size" in baseline:
        yield ("baseline", "train.batch_size"), baseline["train.batch_size"]


def _resources(view: View, machine: Machine) -> Iterator[Fault]:
    workers = view.get("resources.workers_per_host", 1)
    cpus = view.get("resources.cpus_per_worker", 1)
    gpus = view.get("resources.gpus_per_worker", int(machine.gpus > 0))
    hosts = view.get("resources.hosts", 1)
    hosts = hosts if is_count(hosts) else 1
    budget = view.get("budget.gpu_hours")
    if budget is not None and gpus == 0:
        yield (
            ("budget", "gpu_hours"),
            f"is never spent without a GPU (got {show(budget)}); take wall_hours or steps",
        )
    if not is_count(workers):
        return
    for each, have, unit in ((gpus, machine.gpus, "GPU"), (cpus, machine.cpus, "CPU")):
        if is_count(each) and hosts * workers * each > have:
            asked = f"{hosts} host(s) x {workers} worker(s) x {each} {unit}(s) = {hosts * workers * each} {unit}s"
            message = f"{asked}, this machine has {have}; give --address for a cluster (got {workers})"
            yield ("resources", "workers_per_host"), message
