"""What a sweep would run, counted by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deft_ray.spec.loading import check_tree
from deft_ray.spec.machine import Machine
from deft_ray.spec.plan import (
    Footprint,
    Plan,
    build_plan,
    count_hosts,
    format_plan,
    gpus_per_worker,
    planned_packing,
)
from deft_ray.spec.schema import SweepSpec

LAPTOP = Machine(cpus=8, gpus=0)


def spec_of(**sections: Any) -> SweepSpec:
    tree = {"name": "try", "data": {"tasks": ["nano-sentiment"]}, "train": {"steps": 10}, **sections}
    spec, faults = check_tree(tree)
    assert faults == []
    assert spec is not None
    return spec


def plan_of(machine: Machine = LAPTOP, **sections: Any) -> Plan:
    return build_plan(spec_of(**sections), "runs/try", machine)


@pytest.mark.parametrize(
    ("tasks", "seeds", "trials", "baselines", "sampled"),
    [
        (["rte"], [0], 8, 1, 8),
        (["rte", "cola", "sst2"], [0, 1], 5, 6, 30),
        (["rte"], [0, 1, 2], 0, 3, 0),
    ],
)
def test_every_task_and_seed_has_a_baseline_and_every_point_a_trial_for_each(
    tasks: list[str], seeds: list[int], trials: int, baselines: int, sampled: int
) -> None:
    plan = plan_of(data={"tasks": tasks}, search={"seeds": seeds, "trials": trials})
    assert (plan.baselines, plan.sampled, plan.trials) == (baselines, sampled, baselines + sampled)
    assert (plan.tasks, plan.seeds) == (tuple(tasks), tuple(seeds))


@pytest.mark.parametrize(
    ("resources", "machine", "gpus", "hosts"),
    [
        ({}, LAPTOP, 0, 1),
        ({"hosts": 3}, LAPTOP, 0, 3),
        ({"hosts": "auto"}, LAPTOP, 0, 8),
        ({"hosts": "auto", "workers_per_host": 2, "cpus_per_worker": 2}, LAPTOP, 0, 2),
        ({"hosts": "auto", "workers_per_host": 3}, LAPTOP, 0, 2),
        ({"hosts": "auto", "workers_per_host": 16}, LAPTOP, 0, 1),
        ({"hosts": "auto"}, Machine(32, 4), 1, 4),
        ({"hosts": "auto", "workers_per_host": 2}, Machine(32, 4), 1, 2),
        ({"hosts": "auto", "workers_per_host": 2, "gpus_per_worker": 2}, Machine(32, 4), 2, 1),
        ({"hosts": "auto", "gpus_per_worker": 0}, Machine(32, 4), 0, 32),
        ({"hosts": "auto", "cpus_per_worker": 16}, Machine(32, 4), 1, 2),
    ],
)
def test_hosts_fill_the_scarcer_of_cpus_and_gpus(
    resources: dict[str, Any], machine: Machine, gpus: int, hosts: int
) -> None:
    spec = spec_of(resources=resources, train={"steps": 1, "batch_size": 96})
    assert gpus_per_worker(spec, machine.gpus) == gpus
    assert count_hosts(spec, machine) == hosts
    plan = build_plan(spec, "out", machine)
    assert (plan.hosts, plan.slots) == (hosts, hosts)


@pytest.mark.parametrize(
    ("sections", "slots", "why"),
    [
        ({}, 8, None),
        ({"adapter": {"kind": "bottleneck"}}, 8, None),
        (
            {"adapter": {"kind": "prefix"}},
            2,
            "one at a time on each base: prefix tuning changes what all rows attend to",
        ),
        (
            {"adapter": {"kind": "prompt"}},
            2,
            "one at a time on each base: prompt tuning changes what all rows attend to",
        ),
        (
            {"adapter": {"kind": {"choice": ["lora", "prompt"]}}, "baseline": {"adapter.kind": "lora"}},
            8,
            "trials with unlike adapters, and each with prompt, take turns",
        ),
        (
            {"train": {"steps": 1, "zero_stage": {"choice": [0, 3]}}, "baseline": {"train.zero_stage": 0}},
            8,
            "trials with unlike ZeRO stages, of which 3 shares none, take turns",
        ),
        (
            {"train": {"steps": 1, "zero_stage": {"choice": [0, 2]}}, "baseline": {"train.zero_stage": 0}},
            8,
            None,
        ),
        (
            {"train": {"steps": 1, "zero_stage": 3}},
            2,
            "one at a time on each base: workers share out an adapter's parameters (ZeRO stage 3)",
        ),
        (
            {"adapter": {"kind": {"choice": ["lora", "bottleneck"]}}, "baseline": {"adapter.kind": "lora"}},
            8,
            "trials with unlike adapters take turns",
        ),
        (
            {"adapter": {"kind": {"choice": ["lora", "prefix", "prompt"]}}, "baseline": {"adapter.kind": "lora"}},
            8,
            "trials with unlike adapters, and each with prefix or prompt, take turns",
        ),
        (
            {"adapter": {"target_modules": ["q", "decoder.embed_tokens", "shared"]}},
            2,
            "one at a time on each base: adapters on embeddings (decoder.embed_tokens, shared) cannot share it",
        ),
        ({"adapter": {"target_modules": ["q", "wo"]}}, 8, None),
        ({"data": {"tasks": ["sst2", "mnli"]}}, 8, None),
        (
            {"data": {"tasks": ["sst2", "mnli"]}, "model": {"name": "b", "family": "bert"}},
            8,
            "trials with unlike heads take turns",
        ),
        ({"data": {"tasks": ["sst2", "rte"]}, "model": {"name": "b", "family": "bert"}}, 8, None),
    ],
)
def test_slots_of_a_host_and_what_cannot_share_it(sections: dict[str, Any], slots: int, why: str | None) -> None:
    plan = plan_of(resources={"hosts": 2, "slots_per_host": 4}, **sections)
    assert (plan.slots, plan.packing) == (slots, why)
    assert f"; {slots} trials at once" + (f" ({why})" if why else "") + "\n" in format_plan(plan)
    assert plan_of(resources={"hosts": 2}, **sections).packing is None, "nobody asked"


GIB = Footprint(base_gib=2.0, slot_gib=1.0)
BY_MEMORY, AS_FOUND = "at most, by memory; each host finds out", "at most; each host finds out"


@pytest.mark.parametrize(
    ("machine", "footprint", "slots", "why", "memory"),
    [
        (
            Machine(8, 0, 24.0),
            GIB,
            2 * 8,
            BY_MEMORY,
            "about 2 GiB for the base and 1 GiB for each trial at once, on each worker",
        ),
        (Machine(8, 0, 12.0), GIB, 2 * 3, BY_MEMORY, "; 6 GiB free"),
        (Machine(8, 0, 3.0), GIB, 2 * 1, BY_MEMORY, "; 1.5 GiB free"),
        (Machine(8, 2, 3.0, 7.0), GIB, 2 * 4, BY_MEMORY, "; 7 GiB free"),
        (Machine(8, 0), GIB, 2 * 8, AS_FOUND, "on each worker\n"),
        (Machine(8, 0, 24.0), None, 2 * 8, AS_FOUND, "not told"),
    ],
)
def test_slots_are_expected_by_what_is_free(
    machine: Machine, footprint: Footprint | None, slots: int, why: str, memory: str
) -> None:
    """Two hosts share a machine's memory; each has a GPU to itself. A tenth is left. Else it is what hosts take."""
    spec = spec_of(resources={"hosts": 2, "slots_per_host": "auto"})
    plan = build_plan(spec, "runs/try", machine, footprint)
    assert (plan.slots, plan.packing) == (slots, why)
    text = format_plan(plan)
    assert f"; {slots} trials at once ({why})\n" in text
    assert memory in text
    assert planned_packing(plan).startswith(f"{slots} trials at once ({why}) on 2")


def test_what_cannot_share_a_base_has_nothing_to_find_out() -> None:
    resources = {"hosts": 2, "slots_per_host": "auto"}
    plan = plan_of(resources=resources, adapter={"kind": "prompt"})
    assert (plan.slots, plan.packing) == (
        2,
        "one at a time on each base: prompt tuning changes what all rows attend to",
    )
    heads = plan_of(resources=resources, data={"tasks": ["sst2", "mnli"]}, model={"name": "b", "family": "bert"})
    assert heads.packing == "at most; each host finds out; trials with unlike heads take turns"


@pytest.mark.parametrize(
    ("train", "steps", "words"),
    [
        ({"steps": 1200}, 1200, "1,200 steps each"),
        ({"epochs": 3}, None, "by epochs"),
        ({"steps": {"choice": [10, 20]}}, None, "steps as sampled"),
    ],
)
def test_the_length_of_a_trial_is_given_only_where_it_is_known(
    train: dict[str, Any], steps: int | None, words: str
) -> None:
    plan = plan_of(train=train, baseline={"train.steps": 10} if isinstance(train.get("steps"), dict) else {})
    text = format_plan(plan)
    assert plan.steps == steps
    assert f"9 = 1 baselines + 8 sampled, {words}\n" in text
    assert ("steps          10,800 in all\n" in text) == (steps is not None)


def test_addresses_default_to_the_run_directory() -> None:
    here = plan_of()
    assert (here.output, here.storage, here.tracking) == ("runs/try", "runs/try", "sqlite:///runs/try/mlflow.db")
    there = plan_of(storage="s3://bucket/sweeps", tracking={"uri": "http://tracking:5000"})
    assert (there.output, there.storage, there.tracking) == ("runs/try", "s3://bucket/sweeps", "http://tracking:5000")


def test_a_plan_survives_json() -> None:
    plan = plan_of(deft={"alpha": {"uniform": [0, 2]}})
    content = json.loads(json.dumps(plan.to_json()))
    assert content["trials"] == 9
    assert content["space"] == {"deft.alpha": "uniform 0, 2"}
    fields = {
        key: tuple(value) if isinstance(value, list) else value for key, value in content.items() if key != "trials"
    }
    assert Plan(**fields) == plan


def test_the_text_names_what_a_user_wants_to_know() -> None:
    plan = plan_of(
        Machine(32, 4),
        model={"name": "google/flan-t5-xl", "quantization": "nf4", "dtype": "bfloat16"},
        data={"tasks": ["cola", "squad"]},
        deft={"alpha": {"uniform": [0, 2]}, "epsilon": {"loguniform": [1e-7, 1e-3]}},
        search={"trials": 3, "seeds": [0, 1]},
        resources={"hosts": 2, "workers_per_host": 2, "cpus_per_worker": 4},
    )
    assert format_plan(plan).splitlines() == [
        "sweep          try",
        "model          google/flan-t5-xl (t5, nf4, bfloat16)",
        "tasks          cola (matthews), squad (f1)",
        "trials         16 = 4 baselines + 12 sampled, 10 steps each",
        "steps          160 in all",
        "seeds          0, 1",
        "hosts          2 x 2 workers of 4 CPU, 1 GPU; 2 trials at once",
        "memory         not told: the model's weights are not here as safetensors",
        "run directory  runs/try",
        "checkpoints    runs/try",
        "MLflow         sqlite:///runs/try/mlflow.db",
        "search space",
        "  deft.alpha    uniform 0, 2",
        "  deft.epsilon  loguniform 1e-07, 0.001",
    ]
    assert format_plan(plan_of()).endswith("search space\n  nothing is searched")
