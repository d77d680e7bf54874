"""Rules that look at more than one leaf: each yields faults with the path they are about."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from deft_ray.metrics import tau_key
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
from deft_ray.spec.messages import did_you_mean
from deft_ray.spec.own import own_faults, own_kinds
from deft_ray.spec.schema import AdapterSection, DeftSection, SearchSection, Section
from deft_ray.spec.yaml_tree import Fault, Path, show

#: Points of a grid, all of which are listed before a sweep starts.
_LARGEST_GRID = 100_000


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
    broken: Collection[Path]

    def get(self, dotted: str, default: Any = None) -> Any:
        node: Any = self.values
        for key in dotted.split("."):
            node = node.get(key) if isinstance(node, dict) else None
        return default if node is None else node

    def options(self, dotted: str, default: Any = None) -> tuple[Any, ...]:
        """Return the values that a leaf can take: of a range of numbers the first few and the last."""
        domain = self.space.get(dotted)
        if domain is None:
            return (self.get(dotted, default),)
        if domain.kind != "randint":
            return domain.args
        low, high = (int(bound) for bound in domain.args)
        return (*range(low, min(low + 64, high)), high)

    def is_broken(self, dotted: str) -> bool:
        return any(touches(tuple(dotted.split(".")), path) for path in self.broken)


def touches(one: Path, other: Path) -> bool:
    """Tell whether two paths are about the same thing: equal, or one above the other."""
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


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
    view = _View(values, space, broken)
    model = (_family, _files, _wo, _stacks)
    data = (_tasks, _own, _windows, _images)
    adapter = (_adapter_kind, _adapter_leaves, _checkpointing)
    deft = (_approximation, _alpha_schedule, _deft_leaves)
    rules = (
        *data,
        *model,
        *adapter,
        *deft,
        _length,
        _batch,
        _baseline,
        _seeds,
        _try_first,
        _warm_start,
        _grid,
        _rungs,
        _dial,
        _objectives,
    )
    faults = [fault for rule in rules for fault in rule(view)]
    if machine is not None:
        faults += _resources(view, machine)
    return [fault for fault in faults if not any(touches(fault[0], path) for path in broken)]


def _tasks(view: _View) -> Iterator[Fault]:
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


def _own(view: _View) -> Iterator[Fault]:
    folder = view.get("data.dir")
    return own_faults(view.get("data.own"), folder if isinstance(folder, str) else None)


def _windows(view: _View) -> Iterator[Fault]:
    overlap, length = view.get("data.window_overlap_tokens"), view.get("data.max_source_tokens", 128)
    if _is_count(overlap) and _is_count(length) and overlap >= length:
        yield ("data", "window_overlap_tokens"), f"must be below data.max_source_tokens = {length} (got {overlap})"


def _family(view: _View) -> Iterator[Fault]:
    name = view.get("model.name", NANO)
    if view.get("model.family") is None and not view.is_broken("model.name"):
        yield ("model", "family"), f"cannot be told from {show(name)}; allowed: {', '.join(FAMILY_KINDS)}"


def _files(view: _View) -> Iterator[Fault]:
    """A path that is plainly meant as a file or folder must be there; whether it is complete is a set-up matter."""
    folder = view.get("data.dir")
    if isinstance(folder, str) and not _is_folder(folder):
        yield ("data", "dir"), f"no such folder (got {show(folder)})"
    name = view.get("model.name")
    if isinstance(name, str) and name.startswith(("/", "./", "../", "~")) and not _is_folder(name):
        yield ("model", "name"), f"no such folder (got {show(name)}); allowed: '{NANO}', a folder, or a hub name"


def _images(view: _View) -> Iterator[Fault]:
    tasks = view.get("data.tasks", [])
    if isinstance(tasks, list) and "images" in tasks and view.get("data.dir") is None:
        yield ("data", "dir"), "is required by the task 'images' (got nothing); holds images/<split>/<class>/<file>"


def _wo(view: _View) -> Iterator[Fault]:
    wo, family = view.get("model.wo"), view.get("model.family")
    if wo is not None and (view.get("model.quantization", "none") != "nf4" or family not in ("t5", None)):
        what = f"is only for a T5 under quantization 'nf4' (got {show(wo)})"
        yield ("model", "wo"), f"{what}; leave it out, or set model.quantization"


def _stacks(view: _View) -> Iterator[Fault]:
    family, alpha = view.get("model.family"), view.get("deft.alpha_decoder")
    if alpha is not None and family is not None and family not in TEXT_TO_TEXT:
        what = f"is only for models with an encoder and a decoder (got {show(alpha)})"
        yield ("deft", "alpha_decoder"), f"{what}; deft.alpha weighs the one stack of the family '{family}'"


def _is_folder(path: str) -> bool:
    return os.path.isdir(os.path.expanduser(path))


def _adapter_kind(view: _View) -> Iterator[Fault]:
    family = view.get("model.family")
    able = FAMILY_ADAPTERS.get(family) if isinstance(family, str) else None
    for path, kind in _kinds(view):
        if able is not None and kind not in able:
            what = f"the model family '{family}' takes no such adapter (got {show(kind)})"
            yield path, f"{what}; allowed: {', '.join(able)}"


def _kinds(view: _View) -> list[tuple[Path, str]]:
    """Every kind of adapter that a trial can have, with where it stands; none if one of them is no kind at all."""
    kinds = [] if view.is_broken("adapter.kind") else _all_values(view, "adapter.kind", "lora")
    return kinds if all(isinstance(kind, str) and kind in ADAPTER_LEAVES for _, kind in kinds) else []


def _all_values(view: _View, dotted: str, default: Any) -> list[tuple[Path, Any]]:
    """Every value that a leaf has in some trial or baseline, with where it stands."""
    values: list[tuple[Path, Any]] = [(tuple(dotted.split(".")), value) for value in view.options(dotted, default)]
    baseline = view.get("baseline")
    if isinstance(baseline, dict) and dotted in baseline:
        values.append((("baseline", dotted), baseline[dotted]))
    return values


def _adapter_leaves(view: _View) -> Iterator[Fault]:
    """A leaf that no trial reads is a misunderstanding; at its default it may stand, as in a spec written back."""
    kinds = list(dict.fromkeys(kind for _, kind in _kinds(view)))
    if not kinds:
        return
    read = list(dict.fromkeys(leaf for kind in kinds for leaf in ADAPTER_LEAVES[kind]))
    every = {leaf for leaves in ADAPTER_LEAVES.values() for leaf in leaves}
    for leaf, got in _given_in_vain(view, AdapterSection, "adapter", every - set(read)):
        what = f"means nothing to the kind {' or '.join(kinds)} (got {got})"
        yield ("adapter", leaf), f"{what}, whose leaves are {', '.join(read)}"


def _given_in_vain(view: _View, section: type[Section], name: str, unread: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the leaves that are given although nothing reads them, with what was given."""
    for leaf, field in section.model_fields.items():
        value, searched = view.get(f"{name}.{leaf}"), f"{name}.{leaf}" in view.space
        if leaf in unread and (searched or (value is not None and value != field.default)):
            yield leaf, "searched" if searched else show(value)


def _checkpointing(view: _View) -> Iterator[Fault]:
    """PEFT hands a prefix over as a cache of keys, and a block adds its own to a cache each time that it runs."""
    if any(kind == "prefix" for _, kind in _kinds(view)):
        for path, value in _all_values(view, "train.gradient_checkpointing", False):
            if value is True:
                others = ", ".join(kind for kind in ADAPTER_LEAVES if kind != "prefix")
                what = "does not go with the adapter kind 'prefix': a block that runs twice would see its keys twice"
                yield path, f"{what} (got true); allowed: false, or one of {others} as adapter.kind"
                return


def _approximation(view: _View) -> Iterator[Fault]:
    steep = [kind for kind in ("tanh", "sigmoid") if kind in view.options("deft.approximation", "auto")]
    if steep and view.get("deft.beta") is None:
        message = f"is required with approximation '{steep[0]}' (got nothing); a number above 0, for example 20"
        yield ("deft", "beta"), message


def _alpha_schedule(view: _View) -> Iterator[Fault]:
    shares = [view.options(f"deft.{key}", 0.0) for key in ("alpha_delay", "alpha_ramp")]
    if not all(isinstance(share, int | float) for options in shares for share in options):
        return
    delay, ramp = (max(options) for options in shares)
    if delay >= 1.0:
        yield ("deft", "alpha_delay"), f"must be below 1, or the loss is never switched on (got {delay:g})"
    elif delay + ramp > 1.0:
        message = f"alpha_delay + alpha_ramp must be at most 1, or alpha never reaches its value (got {delay + ramp:g})"
        yield ("deft", "alpha_ramp"), message


def _deft_leaves(view: _View) -> Iterator[Fault]:
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


def _length(view: _View) -> Iterator[Fault]:
    keys = ("steps", "epochs")
    given = [key for key in keys if view.get(f"train.{key}") is not None or view.is_broken(f"train.{key}")]
    if len(given) != 1:
        path = ("train", given[-1] if given else "steps")
        yield path, f"give either steps or epochs (got {' and '.join(given) or 'neither'})"


def _batch(view: _View) -> Iterator[Fault]:
    """A batch is cut into equal parts: one for each worker, and of them one for each micro batch."""
    workers = view.get("resources.workers_per_host", 1)
    if not _is_count(workers):
        return
    for path, batch in _batches(view):
        for _, micro in _all_values(view, "train.micro_batch_size", None):
            if not _is_count(batch):
                continue
            part = workers * (min(micro, max(1, batch // workers)) if _is_count(micro) else 1)
            if batch % part:
                what = f"workers_per_host x micro_batch_size = {part}" if micro else f"workers_per_host = {workers}"
                yield path, f"must be a multiple of {what} (got {batch})"
                return


def _batches(view: _View) -> Iterator[tuple[Path, Any]]:
    for batch in view.options("train.batch_size", 32):
        yield ("train", "batch_size"), batch
    baseline = view.get("baseline")
    if isinstance(baseline, dict) and "train.batch_size" in baseline:
        yield ("baseline", "train.batch_size"), baseline["train.batch_size"]


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _baseline(view: _View) -> Iterator[Fault]:
    baseline = view.get("baseline", {})
    if not isinstance(baseline, dict):
        return
    for dotted in view.space:
        if _shapes_baseline(view, dotted) and dotted not in baseline:
            message = f"is searched, so the baseline needs its own value: add '{dotted}: …' under 'baseline:'"
            yield tuple(dotted.split(".")), message
    for dotted in baseline:
        if not _shapes_baseline(view, dotted) or (dotted not in view.space and not view.is_broken(dotted)):
            yield ("baseline", dotted), "is no searched leaf of adapter or train; the baseline takes it from the spec"


def _shapes_baseline(view: _View, dotted: str) -> bool:
    """Whether a leaf matters where the density loss is off: of ``deft`` only layer scales', if every trial has them."""
    section, _, leaf = dotted.partition(".")
    return section != "deft" or (leaf in LAMBDA_LEAVES and view.options("deft.adaptive", False) == (True,))


def _seeds(view: _View) -> Iterator[Fault]:
    seeds = view.get("search.seeds", [])
    for index, seed in enumerate(seeds if isinstance(seeds, list) else []):
        if seed in seeds[:index]:
            yield ("search", "seeds", index), f"seed stands twice (got {show(seed)})"
    if isinstance(seeds, list) and len(seeds) > 1 and view.get("search.front_seeds") is not None:
        what = f"is for points of one seed (got {show(view.get('search.front_seeds'))})"
        yield ("search", "front_seeds"), f"{what}; search.seeds trains every point with {len(seeds)}"


def _try_first(view: _View) -> Iterator[Fault]:
    points = view.get("search.try_first", [])
    for index, point in enumerate(points if isinstance(points, list) else []):
        for dotted, value in point.items() if isinstance(point, dict) else ():
            domain = view.space.get(dotted)
            path = ("search", "try_first", index, dotted)
            if domain is None and not view.is_broken(dotted):
                yield path, f"is not searched; searched are: {', '.join(view.space) or 'none'}"
            elif domain is not None and value not in domain:
                yield path, f"lies outside the domain {domain} (got {show(value)})"


def _warm_start(view: _View) -> Iterator[Fault]:
    sampler = view.get("search.sampler", "tpe")
    if view.get("search.warm_start") and sampler in ("grid", "random"):
        message = f"means nothing to the {sampler} sampler, which learns from no point; leave it out"
        yield ("search", "warm_start"), message


def _grid(view: _View) -> Iterator[Fault]:
    """A grid is of single values, and no larger than somebody would want to list."""
    if view.get("search.sampler") != "grid":
        return
    if view.get("search.try_first"):
        yield ("search", "try_first"), "means nothing to the grid sampler, which tries every point; leave it out"
    if view.get("search.trials") not in (None, SearchSection.model_fields["trials"].default):
        yield ("search", "trials"), "means nothing to the grid sampler, which tries every point; leave it out"
    ranges = {dotted: domain for dotted, domain in view.space.items() if domain.kind in ("uniform", "loguniform")}
    for dotted, domain in ranges.items():
        yield tuple(dotted.split(".")), f"the grid sampler takes single values (got {domain}); allowed: choice, randint"
    others = (domain for dotted, domain in view.space.items() if dotted not in ranges)
    size = math.prod(
        len(domain.args) if domain.kind == "choice" else 1 + int(domain.args[1]) - int(domain.args[0])
        for domain in others
    )
    if size > _LARGEST_GRID:
        yield (
            ("search", "sampler"),
            f"a grid has at most {_LARGEST_GRID:,} points (got {size:,}); take 'random' or 'tpe'",
        )


def _rungs(view: _View) -> Iterator[Fault]:
    """Rungs are for a scheduler, and lie before a trial's last step."""
    scheduler = view.get("search.scheduler", "none")
    if scheduler == "none":
        for leaf in ("first_rung", "reduction_factor"):
            value, default = view.get(f"search.{leaf}"), SearchSection.model_fields[leaf].default
            if value not in (None, default):
                yield ("search", leaf), f"is read by no trial (got {show(value)}); needs scheduler mo_asha or asha"
        return
    first = view.get("search.first_rung", 1 / 9)
    for path, steps in _all_values(view, "train.steps", None):
        if _is_count(steps) and _is_number(first) and (steps < 2 or round(first * steps) >= steps):
            what = f"a trial of {steps} steps ends before the first rung, {first:g} of them (got {show(steps)})"
            yield path, f"{what}; give more steps, a smaller search.first_rung, or scheduler none"
            return


def _dial(view: _View) -> Iterator[Fault]:
    taus = view.get("dial.taus", [])
    for index, tau in enumerate(taus if isinstance(taus, list) else []):
        if _is_number(tau) and tau_key(tau) in map(tau_key, filter(_is_number, taus[:index])):
            yield ("dial", "taus", index), f"threshold stands twice (got {show(tau)})"
    count, rows = view.get("dial.calibration_examples", 256), view.get("data.train_examples")
    if taus and _is_count(count) and _is_count(rows) and count >= rows:
        path = ("dial", "calibration_examples")
        yield path, f"must be below data.train_examples = {rows}, from which they are held out (got {count})"


def _objectives(view: _View) -> Iterator[Fault]:
    """One score to maximise, one density to minimise; a thresholded density at a τ of the dial."""
    given = view.get("search.objectives", {})
    taus = view.get("dial.taus", [])
    if not isinstance(given, dict) or not isinstance(taus, list) or view.is_broken("dial.taus") or not given:
        return
    known = {"score": "max", "density": "min", **{f"density@{tau_key(tau)}": "min" for tau in taus}}
    for name, direction in given.items():
        path = ("search", "objectives", name)
        if name not in known:
            hint = "" if taus else "; density@τ needs dial.taus"
            yield path, f"unknown objective; {did_you_mean(str(name), known)}allowed: {', '.join(known)}{hint}"
        elif direction != known[name]:
            yield path, f"can only be '{known[name]}' (got {show(direction)})"
    if all(name in known for name in given) and sorted(known[name] for name in given) != ["max", "min"]:
        what = "must be the score and one density"
        yield ("search", "objectives"), f"{what} (got {', '.join(given)}); one of {', '.join(known)}"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _resources(view: _View, machine: Machine) -> Iterator[Fault]:
    workers = view.get("resources.workers_per_host", 1)
    cpus = view.get("resources.cpus_per_worker", 1)
    gpus = view.get("resources.gpus_per_worker", int(machine.gpus > 0))
    hosts = view.get("resources.hosts", 1)
    hosts = hosts if _is_count(hosts) else 1
    if not _is_count(workers):
        return
    for each, have, unit in ((gpus, machine.gpus, "GPU"), (cpus, machine.cpus, "CPU")):
        if _is_count(each) and hosts * workers * each > have:
            asked = f"{hosts} host(s) x {workers} worker(s) x {each} {unit}(s) = {hosts * workers * each} {unit}s"
            message = f"{asked}, this machine has {have}; give --address for a cluster (got {workers})"
            yield ("resources", "workers_per_host"), message
