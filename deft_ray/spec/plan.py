"""What a sweep would run, counted before anything is started."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from deft_ray.spec.catalog import TABLES, find_task
from deft_ray.spec.machine import Machine
from deft_ray.spec.points import count_points
from deft_ray.spec.schema import SweepSpec

#: Trials at once on a host at most, where it finds the number itself: more have gained nothing so far.
MOST_SLOTS = 8
#: What of the free memory they may take: the rest is left to evaluations, fragments, and whoever else is there.
FILLED = 0.9


@dataclass(frozen=True)
class Footprint:
    """What a worker's memory is expected to be asked for.

    Args:
        base_gib: By the base, and on a CPU by the libraries.
        slot_gib: By each trial at once, in the longest pass that it can have.
    """

    base_gib: float
    slot_gib: float


def slots_that_fit(free: float, slot: float) -> int:
    """Trials at once that memory holds: at least one, at most :data:`MOST_SLOTS`.

    Args:
        free: What is free beside the base, in any unit.
        slot: What a trial takes, in the same.

    >>> slots_that_fit(20, 4), slots_that_fit(20, 50), slots_that_fit(20, 0)
    (4, 1, 8)
    """
    return next((count for count in range(MOST_SLOTS, 1, -1) if FILLED * free >= count * slot), 1)


@dataclass(frozen=True)
class Plan:
    """A sweep, counted.

    Args:
        name: The sweep's name.
        model: Model, quantisation and dtype in words.
        tasks: Tasks in the order in which they are served.
        metrics: What each of them is scored by.
        seeds: Training seeds.
        front_seeds: Seeds of whoever stands on the front once all points have ended; None for no further ones.
        baselines: Trials with the density loss off: one for every task and seed.
        sampled: Trials that are sampled, or lie on a path: points x tasks x seeds.
        steps: Training steps of one trial, or None if it is given in epochs or searched.
        path_share: On a path, what each of its trials trains of that; None without.
        space: Searched leaves and their domains.
        hosts: Worker groups.
        workers: Workers of a host.
        slots: Trials that train at once; with ``slots_per_host: auto`` as many as are expected to fit, or as
            hosts take at most where that cannot be told; hosts may find fewer to be enough.
        packing: Why fewer share a base than were asked for, when they take turns, or that hosts find out how many; None
            where there is nothing to say.
        footprint: What a worker's memory is expected to be asked for; None where the model's files are not here.
        free_gib: What is free for a worker before it loads anything; 0 where that is not known.
        resources: Of one worker, in words.
        output: Run directory.
        storage: Where checkpoints go.
        tracking: MLflow's address.
    """

    name: str
    model: str
    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    seeds: tuple[int, ...]
    front_seeds: int | None
    baselines: int
    sampled: int
    steps: int | None
    path_share: float | None
    space: dict[str, str]
    hosts: int
    workers: int
    slots: int
    packing: str | None
    footprint: Footprint | None
    free_gib: float
    resources: str
    output: str
    storage: str
    tracking: str

    @property
    def trials(self) -> int:
        """Trials in all."""
        return self.baselines + self.sampled

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "trials": self.trials}


def build_plan(spec: SweepSpec, output: str, machine: Machine, footprint: Footprint | None = None) -> Plan:
    """Count what a spec would run.

    Args:
        spec: A checked spec.
        output: Run directory.
        machine: Where ``hosts: auto`` and ``gpus_per_worker`` look; a cluster may have more.
        footprint: What a worker's memory is expected to be asked for, where that can be told.
    """
    tasks, seeds, resources = tuple(spec.data.tasks), tuple(spec.search.seeds), spec.resources
    gpus = gpus_per_worker(spec, machine.gpus)
    hosts = count_hosts(spec, machine)
    free = free_gib(spec, machine)
    return Plan(
        name=spec.name,
        model=f"{spec.model.name} ({spec.model.family}, {spec.model.quantization}, {spec.model.dtype})",
        tasks=tasks,
        metrics=tuple(find_task(name, spec.data).metric for name in tasks),
        seeds=seeds,
        front_seeds=spec.search.front_seeds,
        baselines=len(tasks) * len(seeds),
        sampled=count_points(spec) * len(tasks) * len(seeds),
        steps=None if "train.steps" in spec.space else spec.train.steps,
        path_share=None if spec.search.path is None else spec.search.path_share,
        space={dotted: str(domain) for dotted, domain in spec.space.items()},
        hosts=hosts,
        workers=resources.workers_per_host,
        slots=_slots(spec, hosts, footprint, free),
        packing=packing_of(spec, memory_is_known=footprint is not None and free > 0)[1],
        footprint=footprint,
        free_gib=free,
        resources=f"{resources.cpus_per_worker} CPU" + (f", {gpus} GPU" if gpus else ""),
        output=output,
        storage=spec.storage or output,
        tracking=spec.tracking.uri or f"sqlite:///{output}/mlflow.db",
    )


def gpus_per_worker(spec: SweepSpec, gpus: float) -> int:
    """GPUs of one worker: as given, else one if there are any."""
    asked = spec.resources.gpus_per_worker
    return asked if asked is not None else int(gpus > 0)


def count_hosts(spec: SweepSpec, machine: Machine) -> int:
    """Hosts: as given, or with ``auto`` as many as there is room for."""
    resources = spec.resources
    if resources.hosts != "auto":
        return resources.hosts
    room = machine.cpus // (resources.cpus_per_worker * resources.workers_per_host)
    gpus = gpus_per_worker(spec, machine.gpus)
    if gpus:
        room = min(room, machine.gpus // (gpus * resources.workers_per_host))
    return max(1, room)


def free_gib(spec: SweepSpec, machine: Machine) -> float:
    """Memory that is free for one worker: of a GPU all of it, of the machine an equal part; 0 where it is not known."""
    if gpus_per_worker(spec, machine.gpus):
        return machine.gpu_memory_gib
    return machine.memory_gib / (count_hosts(spec, machine) * spec.resources.workers_per_host)


def packing_of(spec: SweepSpec, *, memory_is_known: bool = True) -> tuple[int | None, str | None]:
    """Say how many trials share a host's base.

    Args:
        spec: A checked spec.
        memory_is_known: Whether it can be told before the sweep how many memory holds.

    Returns:
        How many, None where hosts find it out; and what else there is to say of it, such as what stands against as many
        as were asked for, or None.
    """
    asked = None if spec.resources.slots_per_host == "auto" else spec.resources.slots_per_host
    if asked == 1:
        return 1, None
    kind = None if "adapter.kind" in spec.space else spec.adapter.kind
    stage = None if "train.zero_stage" in spec.space else spec.train.zero_stage
    if kind in ("prefix", "prompt"):
        return 1, f"one at a time on each base: {kind} tuning changes what all rows attend to"
    if stage == 3:
        return 1, "one at a time on each base: workers share out an adapter's parameters (ZeRO stage 3)"
    tables = [name for name in spec.adapter.target_modules if any(word in name for word in TABLES)]
    if kind == "lora" and spec.adapter.target_modules != "all-linear" and tables:
        return 1, f"one at a time on each base: adapters on embeddings ({', '.join(tables)}) cannot share it"
    found = None
    if asked is None:
        found = f"at most{', by memory' if memory_is_known else ''}; each host finds out"
    turns = [f"trials with unlike {what} take turns" for what in _unlike(spec)]
    return asked, "; ".join(filter(None, (found, *turns))) or None


def _unlike(spec: SweepSpec) -> list[str]:
    """In what a sweep's trials may differ so that they cannot share a base."""
    heads = {len(find_task(name, spec.data).labels) for name in spec.data.tasks}
    virtual = [kind for kind in ("prefix", "prompt") if kind in spec.space.get("adapter.kind", ())]
    each = f", and each with {' or '.join(virtual)}," if virtual else ""
    return [
        what
        for what, yes in (
            (f"adapters{each}", "adapter.kind" in spec.space),
            ("ZeRO stages, of which 3 shares none,", 3 in spec.space.get("train.zero_stage", ())),
            ("heads", spec.model.family != "t5" and (len(heads) > 1 or "adapter.head" in spec.space)),
        )
        if yes
    ]


def _slots(spec: SweepSpec, hosts: int, footprint: Footprint | None, free: float) -> int:
    """Trials at once: of a path one, however many hosts there are."""
    each = packing_of(spec)[0]
    if each is None:
        each = MOST_SLOTS
        if footprint is not None and free:
            each = slots_that_fit(free - footprint.base_gib, footprint.slot_gib)
    slots = hosts * each
    return slots if spec.search.path is None else min(slots, len(spec.data.tasks) * len(spec.search.seeds))


def planned_packing(plan: Plan) -> str:
    """What a report sets what was measured beside."""
    return f"{plan.slots} trials at once{_why(plan)} on {plan.hosts} hosts; {_memory(plan)}"


def _why(plan: Plan) -> str:
    return "" if plan.packing is None else f" ({plan.packing})"


def _memory(plan: Plan) -> str:
    """What a worker's memory is asked for."""
    if plan.footprint is None:
        return "not told: the model's weights are not here as safetensors"
    base, slot = f"{plan.footprint.base_gib:.2g} GiB for the base", f"{plan.footprint.slot_gib:.2g} GiB"
    free = f"; {plan.free_gib:.3g} GiB free" if plan.free_gib else ""
    return f"about {base} and {slot} for each trial at once, on each worker{free}"


def _further(front_seeds: int | None) -> str:
    return "" if front_seeds is None else f"; then {front_seeds} for each point on the front, beside the trials above"


def format_plan(plan: Plan) -> str:
    """Write a plan for a person."""
    length = "steps as sampled" if "train.steps" in plan.space else "by epochs"
    length = f"{plan.steps:,} steps each" if plan.steps is not None else length
    kind = "sampled"
    if plan.path_share is not None:
        kind, length = "on paths of rising α", f"{length}, on a path {plan.path_share:g} of that"
    rows = [
        ("sweep", plan.name),
        ("model", plan.model),
        ("tasks", ", ".join(f"{name} ({metric})" for name, metric in zip(plan.tasks, plan.metrics, strict=True))),
        ("trials", f"{plan.trials} = {plan.baselines} baselines + {plan.sampled} {kind}, {length}"),
        ("seeds", ", ".join(map(str, plan.seeds)) + _further(plan.front_seeds)),
        (
            "hosts",
            f"{plan.hosts} x {plan.workers} workers of {plan.resources}; {plan.slots} trials at once{_why(plan)}",
        ),
        ("memory", _memory(plan)),
        ("run directory", plan.output),
        ("checkpoints", plan.storage),
        ("MLflow", plan.tracking),
    ]
    width = max(len(label) for label, _ in rows)
    lines = [f"{label:<{width}}  {value}" for label, value in rows]
    if plan.steps is not None:
        share = 1.0 if plan.path_share is None else plan.path_share
        each = max(1, round(share * plan.steps))
        lines.insert(4, f"{'steps':<{width}}  {plan.steps * plan.baselines + each * plan.sampled:,} in all")
    lines.append("search space")
    widest = max((len(dotted) for dotted in plan.space), default=0)
    lines += [f"  {dotted:<{widest}}  {domain}" for dotted, domain in plan.space.items()] or ["  nothing is searched"]
    return "\n".join(lines)
