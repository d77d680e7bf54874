"""Rules that look at more than one leaf: tasks and families, files, batches, baselines, machines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deft_ray.spec.catalog import ADAPTER_LEAVES, FAMILY_ADAPTERS, FAMILY_KINDS, TASKS
from deft_ray.spec.loading import check_tree
from deft_ray.spec.machine import Machine, this_machine
from deft_ray.spec.resolve import to_tree
from deft_ray.spec.schema import AdapterSection
from deft_ray.spec.view import touches
from deft_ray.spec.yaml_tree import Fault

SMALL = Machine(cpus=4, gpus=0)


def faults_of(machine: Machine | None = SMALL, **sections: Any) -> list[Fault]:
    """Check a small valid spec with some sections replaced."""
    tree = {"name": "try", "data": {"tasks": ["nano-sentiment"]}, "train": {"steps": 10}, **sections}
    return check_tree(tree, machine)[1]


def test_the_small_spec_has_no_fault() -> None:
    assert faults_of() == []


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((), ("a",), True),
        (("a",), ("a",), True),
        (("a",), ("a", "b", 0), True),
        (("a", "b", 0), ("a",), True),
        (("a", 0), ("a", 1), False),
        (("a",), ("b",), False),
    ],
)
def test_paths_touch_if_one_lies_on_the_way_to_the_other(one: Any, other: Any, expected: bool) -> None:
    assert touches(one, other) is expected


@pytest.mark.parametrize("family", ["bert", "roberta", "opt", "gpt2"])
def test_a_model_with_a_head_answers_no_questions(family: str) -> None:
    found = faults_of(model={"name": "x", "family": family}, data={"tasks": ["rte", "squad", "stsb", "nano-question"]})
    what = f"a question task cannot be done by the model family '{family}'"
    assert found == [
        (("data", "tasks", 1), f'{what} (got "squad"); families that can: t5'),
        (("data", "tasks", 3), f'{what} (got "nano-question"); families that can: t5'),
    ]


@pytest.mark.parametrize("family", ["t5", "bert", "roberta", "opt", "gpt2", "vit"])
def test_images_are_for_vit_and_text_is_not(tmp_path: Path, family: str) -> None:
    data = {"tasks": ["cifar10", "rte"], "dir": str(tmp_path)}
    wrong = 1 if family == "vit" else 0
    kind, able = (("image", "vit"), ("classification", "t5, bert, roberta, opt, gpt2"))[wrong]
    message = f"a {kind} task cannot be done by the model family '{family}'"
    want = f'{message} (got "{data["tasks"][wrong]}"); families that can: {able}'
    assert faults_of(model={"name": "x", "family": family}, data=data) == [(("data", "tasks", wrong), want)]


def test_a_folder_of_images_has_to_be_given(tmp_path: Path) -> None:
    model = {"name": "google/vit-base-patch16-224"}
    message = "is required by the task 'images' (got nothing); holds images/<split>/<class>/<file>"
    assert faults_of(model=model, data={"tasks": ["images"]}) == [(("data", "dir"), message)]
    assert faults_of(model=model, data={"tasks": ["images"], "dir": str(tmp_path)}) == []
    assert faults_of(model=model, data={"tasks": ["cifar10"]}) == []


@pytest.mark.parametrize("wo", ["nf4", "bfloat16", "float32"])
def test_wo_is_for_a_quantised_t5(wo: str) -> None:
    message = f"is only for a T5 under quantization 'nf4' (got \"{wo}\"); leave it out, or set model.quantization"
    fault = [(("model", "wo"), message)]
    assert faults_of(model={"wo": wo, "quantization": "nf4"}) == []
    assert faults_of(model={"wo": wo}) == fault
    assert faults_of(model={"wo": wo, "quantization": "nf4", "name": "bert-base-uncased"}) == fault


def test_wo_has_three_ways() -> None:
    message = "must be 'nf4', 'bfloat16' or 'float32' (got \"float16\")"
    assert faults_of(model={"wo": "float16", "quantization": "nf4"}) == [(("model", "wo"), message)]


@pytest.mark.parametrize("alpha", [0.5, {"uniform": [0.5, 2.0]}])
def test_a_decoder_has_its_own_weight_only_beside_an_encoder(alpha: Any) -> None:
    assert faults_of(deft={"alpha_decoder": alpha}) == []
    message = (
        "is only for models with an encoder and a decoder (got 0.5); "
        "deft.alpha weighs the one stack of the family 'gpt2'"
    )
    assert faults_of(model={"name": "gpt2"}, deft={"alpha_decoder": alpha}) == [(("deft", "alpha_decoder"), message)]


def test_t5_does_every_kind_of_text_task() -> None:
    assert faults_of(model={"name": "google/flan-t5-xl"}, data={"tasks": ["cola", "stsb", "mnli", "squad"]}) == []


def test_unknown_and_repeated_tasks_are_all_told() -> None:
    tasks = ", ".join(TASKS)
    assert faults_of(data={"tasks": ["sst-2", "rte", "rte", "zzz", 5]}) == [
        (("data", "tasks", 4), "must be a text (got 5)"),
        (("data", "tasks", 0), f"unknown task (got \"sst-2\"); did you mean 'sst2'? allowed: {tasks}"),
        (("data", "tasks", 2), 'task stands twice (got "rte")'),
        (("data", "tasks", 3), f'unknown task (got "zzz"); allowed: {tasks}'),
    ]


@pytest.mark.parametrize(
    ("leaf", "bad"), [("score", 1.0), ("score", -1.5), ("score", "low"), ("density", 0.0), ("density", 1.5)]
)
def test_a_reference_point_lies_where_points_can_be_better(leaf: str, bad: Any) -> None:
    assert [path for path, _ in faults_of(reference={leaf: bad})] == [("reference", leaf)]
    assert faults_of(reference={"score": -0.5, "density": 0.9}) == []


def test_a_folder_that_is_named_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t5").mkdir()
    assert faults_of(data={"tasks": ["rte"], "dir": str(tmp_path)}, model={"name": "~/t5"}) == []
    assert faults_of(data={"tasks": ["rte"], "dir": "~/t5"}, model={"name": str(tmp_path / "t5")}) == []
    for missing in ("/no/such", str(file), "a" * 5000, "~nobody-here/x"):
        shown = missing if len(missing) < 77 else "a" * 76 + "..."
        quoted = f'"{shown}"' if len(missing) < 77 else f'"{shown}'
        assert faults_of(data={"tasks": ["rte"], "dir": missing}) == [
            (("data", "dir"), f"no such folder (got {quoted})")
        ]


@pytest.mark.parametrize(
    ("data", "length"),
    [
        ({"window_overlap_tokens": 128}, 128),
        ({"window_overlap_tokens": 64, "max_source_tokens": 64}, 64),
        ({"window_overlap_tokens": 200, "max_source_tokens": 64}, 64),
        ({"window_overlap_tokens": 127}, None),
        ({"window_overlap_tokens": 0, "max_source_tokens": 8}, None),
        ({"max_source_tokens": 8}, None),
    ],
)
def test_windows_overlap_by_less_than_a_source(data: dict[str, Any], length: int | None) -> None:
    message = f"must be below data.max_source_tokens = {length} (got {data.get('window_overlap_tokens')})"
    found = faults_of(data={"tasks": ["nano-question"], **data})
    assert found == ([] if length is None else [(("data", "window_overlap_tokens"), message)])


@pytest.mark.parametrize("name", ["/no/such/t5", "./t5", "../no-such/t5", "~/no-such/t5"])
def test_a_model_that_is_plainly_a_folder_must_be_there(name: str) -> None:
    message = f"no such folder (got \"{name}\"); allowed: 'nano', a folder, or a hub name"
    assert faults_of(model={"name": name, "family": "t5"}) == [(("model", "name"), message)]


def test_a_family_that_no_name_tells_must_be_given() -> None:
    message = 'cannot be told from "org/model"; allowed: t5, bert, roberta, opt, gpt2, vit'
    assert faults_of(model={"name": "org/model"}) == [(("model", "family"), message)]
    assert faults_of(model={"name": "org/model", "family": "bert"}) == []
    assert faults_of(model={"name": 5}) == [(("model", "name"), "must be a text (got 5)")]


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "bottleneck", "prefix", "prompt"])
@pytest.mark.parametrize("family", ["t5", "bert", "roberta"])
def test_every_family_takes_every_kind_of_adapter(family: str, kind: str) -> None:
    assert faults_of(model={"name": "x", "family": family}, data={"tasks": ["rte"]}, adapter={"kind": kind}) == []


def test_the_tables_know_the_same_families_and_kinds() -> None:
    assert FAMILY_ADAPTERS.keys() == FAMILY_KINDS.keys()
    assert {kind for kinds in FAMILY_ADAPTERS.values() for kind in kinds} == ADAPTER_LEAVES.keys()
    assert {"kind", "head", *(leaf for leaves in ADAPTER_LEAVES.values() for leaf in leaves)} == set(
        AdapterSection.model_fields
    )


def test_what_answers_in_words_has_no_head() -> None:
    what = "the model family 't5' answers in words and has no head"
    fault = f'{what} (got "two-layer"); leave it out; families with one: bert, roberta, opt, gpt2, vit'
    assert faults_of(adapter={"head": "two-layer"}) == [(("adapter", "head"), fault)]
    assert faults_of(adapter={"head": "own"}) == []
    searched = faults_of(adapter={"head": {"choice": ["own", "two-layer"]}}, baseline={"adapter.head": "own"})
    assert searched == [(("adapter", "head"), fault)]
    for family in ("bert", "roberta", "opt", "gpt2"):
        model = {"name": "x", "family": family}
        assert faults_of(model=model, data={"tasks": ["rte"]}, adapter={"head": "two-layer"}) == []


def test_a_family_may_take_some_kinds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILY_ADAPTERS, "t5", ("lora", "bottleneck"))
    what = "the model family 't5' takes no such adapter"
    fault = f'{what} (got "prefix"); allowed: lora, bottleneck'
    assert faults_of(adapter={"kind": "prefix"}) == [(("adapter", "kind"), fault)]
    assert faults_of(adapter={"kind": "lora"}) == []
    searched = {"kind": {"choice": ["lora", "prompt"]}}
    fault = f'{what} (got "prompt"); allowed: lora, bottleneck'
    assert faults_of(adapter=searched, baseline={"adapter.kind": "lora"}) == [(("adapter", "kind"), fault)]
    searched = {"kind": {"choice": ["lora", "bottleneck"]}}
    faults = faults_of(adapter=searched, baseline={"adapter.kind": "prompt"})
    assert faults == [(("baseline", "adapter.kind"), fault)]


@pytest.mark.parametrize("family", ["opt", "gpt2", "vit"])
@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_what_reads_its_last_token_or_patches_takes_no_virtual_tokens(family: str, kind: str) -> None:
    fault = f"the model family '{family}' takes no such adapter (got \"{kind}\"); allowed: lora, bottleneck"
    task = "cifar10" if family == "vit" else "sst2"
    model = {"name": "somebody/model", "family": family}
    found = faults_of(model=model, data={"tasks": [task]}, adapter={"kind": kind})
    assert (("adapter", "kind"), fault) in found


@pytest.mark.parametrize("kind", ["deft", ["lora"], {"a": 1, "b": 2}, 5, None])
def test_a_kind_that_is_none_is_told_once(kind: Any) -> None:
    faults = faults_of(adapter={"kind": kind, "virtual_tokens": 3})
    assert [path for path, _ in faults] == [("adapter", "kind")]


LORA_LEAVES = "r, lora_alpha, lora_dropout, target_modules"


@pytest.mark.parametrize(
    ("adapter", "leaf", "message"),
    [
        (
            {"virtual_tokens": 30},
            "virtual_tokens",
            f"means nothing to the kind lora (got 30), whose leaves are {LORA_LEAVES}",
        ),
        (
            {"reduction_factor": 8},
            "reduction_factor",
            f"means nothing to the kind lora (got 8), whose leaves are {LORA_LEAVES}",
        ),
        (
            {"kind": "bottleneck", "target_modules": ["q"]},
            "target_modules",
            'means nothing to the kind bottleneck (got ["q"]), whose leaves are reduction_factor, reads',
        ),
        (
            {"reads": "sum"},
            "reads",
            f'means nothing to the kind lora (got "sum"), whose leaves are {LORA_LEAVES}',
        ),
        ({"kind": "prefix", "r": 4}, "r", "means nothing to the kind prefix (got 4), whose leaves are virtual_tokens"),
        (
            {"kind": "prompt", "lora_alpha": {"uniform": [1, 64]}},
            "lora_alpha",
            "means nothing to the kind prompt (got searched), whose leaves are virtual_tokens",
        ),
        (
            {"kind": {"choice": ["prefix", "prompt"]}, "reduction_factor": {"choice": [8, 16]}},
            "reduction_factor",
            "means nothing to the kind prefix or prompt (got searched), whose leaves are virtual_tokens",
        ),
    ],
)
def test_a_leaf_that_no_trial_reads_is_told(adapter: dict[str, Any], leaf: str, message: str) -> None:
    baseline = {
        f"adapter.{key}": next(iter(value.values()))[0] for key, value in adapter.items() if isinstance(value, dict)
    }
    assert faults_of(adapter=adapter, baseline=baseline) == [(("adapter", leaf), message)]


@pytest.mark.parametrize(
    "adapter",
    [
        {"kind": {"choice": ["lora", "prompt"]}, "virtual_tokens": 5, "r": 4},
        {"kind": {"choice": ["lora", "prompt"]}, "virtual_tokens": {"choice": [5, 6]}},
        {"kind": "prompt", "r": 16, "reduction_factor": 16},  # at their defaults, as in a spec that was written back
    ],
)
def test_a_leaf_that_some_trial_reads_may_stand(adapter: dict[str, Any]) -> None:
    baseline = {"adapter.kind": "lora", "adapter.virtual_tokens": 5}
    searched = {key: value for key, value in baseline.items() if isinstance(adapter.get(key.split(".")[1]), dict)}
    assert faults_of(adapter=adapter, baseline=searched) == []


@pytest.mark.parametrize("kind", ["lora", "bottleneck", "prefix", "prompt"])
def test_a_spec_with_its_defaults_written_out_is_the_same_spec(kind: str) -> None:
    tree = {"name": "try", "data": {"tasks": ["rte"]}, "train": {"steps": 10}, "adapter": {"kind": kind}}
    spec, _ = check_tree(tree)
    assert spec is not None
    assert check_tree(to_tree(spec)) == (spec, [])


def test_a_prefix_does_not_go_with_gradient_checkpointing() -> None:
    what = "does not go with the adapter kind 'prefix': a block that runs twice would see its keys twice"
    message = f"{what} (got true); allowed: false, or one of lora, bottleneck, prompt as adapter.kind"
    on = {"steps": 10, "gradient_checkpointing": True}
    assert faults_of(adapter={"kind": "prefix"}, train=on) == [(("train", "gradient_checkpointing"), message)]
    searched = {"kind": {"choice": ["lora", "prefix"]}}
    faults = faults_of(adapter=searched, train=on, baseline={"adapter.kind": "lora"})
    assert faults == [(("train", "gradient_checkpointing"), message)]
    for kind in ("lora", "bottleneck", "prompt"):
        assert faults_of(adapter={"kind": kind}, train=on) == []
    assert faults_of(adapter={"kind": "prefix"}) == []


@pytest.mark.parametrize(
    ("deft", "complete"),
    [
        ({"approximation": "l0"}, True),
        ({"approximation": "tanh"}, False),
        ({"approximation": "tanh", "beta": None}, False),
        ({"approximation": {"choice": ["l0", "tanh"]}}, False),
        ({"approximation": "tanh", "beta": 20}, True),
        ({"approximation": {"choice": ["l0", "tanh"]}, "beta": {"uniform": [5, 50]}}, True),
    ],
)
def test_tanh_needs_its_slope(deft: dict[str, Any], complete: bool) -> None:
    message = "is required with approximation 'tanh' (got nothing); a number above 0, for example 20"
    assert faults_of(deft=deft) == ([] if complete else [(("deft", "beta"), message)])


def test_a_loss_that_is_never_switched_on_is_refused() -> None:
    message = "must be below 1, or the loss is never switched on (got 1)"
    assert faults_of(deft={"alpha_delay": 1.0}) == [(("deft", "alpha_delay"), message)]
    assert faults_of(deft={"alpha_delay": {"uniform": [0.5, 1.0]}}) == [(("deft", "alpha_delay"), message)]


@pytest.mark.parametrize(
    ("deft", "leaf", "got", "needs"),
    [
        ({"approximation": "l1", "epsilon": 1e-3}, "epsilon", "0.001", "approximation l0"),
        ({"approximation": "l0", "beta": {"uniform": [1, 2]}}, "beta", "searched", "approximation tanh or sigmoid"),
        ({"approximation": "tanh", "beta": 2, "epsilon_end": 1e-6}, "epsilon_end", "1e-06", "approximation l0"),
        ({"lambda_init": 0.5}, "lambda_init", "0.5", "adaptive: true"),
        ({"approximation": "l0", "epsilon": 1e-3, "epsilon_end": 1e-6}, None, "", ""),
        ({"approximation": {"choice": ["l1", "l0"]}, "epsilon": {"loguniform": [1e-7, 1e-3]}}, None, "", ""),
        ({"adaptive": {"choice": [True, False]}, "lambda_init": {"uniform": [0, 1]}}, None, "", ""),
        ({"approximation": "l1", "epsilon": 1e-7, "lambda_init": 0.8}, None, "", ""),
    ],
)
def test_a_leaf_of_the_loss_that_no_trial_reads_is_a_misunderstanding(
    deft: dict[str, Any], leaf: str | None, got: str, needs: str
) -> None:
    message = f"is read by no trial (got {got}); needs {needs}"
    assert faults_of(deft=deft) == ([] if leaf is None else [(("deft", leaf), message)])


def test_the_baseline_of_ada_deft_names_its_searched_scales() -> None:
    deft = {"adaptive": True, "lambda_init": {"uniform": [0.0, 1.0]}}
    message = "is searched, so the baseline needs its own value: add 'deft.lambda_init: …' under 'baseline:'"
    assert faults_of(deft=deft) == [(("deft", "lambda_init"), message)]
    assert faults_of(deft=deft, baseline={"deft.lambda_init": 0.8}) == []
    either = {**deft, "adaptive": {"choice": [True, False]}}
    assert faults_of(deft=either) == []


@pytest.mark.parametrize(
    ("batch", "micro", "baseline", "fault"),
    [
        (32, {"choice": [8, 16]}, {"train.micro_batch_size": 5}, "5 (got 32)"),
        (32, {"choice": [8, 16]}, {"train.micro_batch_size": 8}, None),
        ({"choice": [8, 32]}, 16, {"train.batch_size": 8}, None),
    ],
)
def test_micro_batches_fit_of_the_baseline_too(batch: Any, micro: Any, baseline: dict[str, Any], fault: str) -> None:
    train = {"steps": 1, "batch_size": batch, "micro_batch_size": micro}
    message = f"must be a multiple of workers_per_host x micro_batch_size = {fault}"
    assert faults_of(train=train, baseline=baseline) == ([] if fault is None else [(("train", "batch_size"), message)])


def test_sigmoid_needs_its_slope_too() -> None:
    message = "is required with approximation 'sigmoid' (got nothing); a number above 0, for example 20"
    assert faults_of(deft={"approximation": "sigmoid"}) == [(("deft", "beta"), message)]
    assert faults_of(deft={"approximation": "sigmoid", "beta": 5}) == []
    assert faults_of(deft={"approximation": "auto"}) == faults_of(deft={"approximation": "l1"}) == []


@pytest.mark.parametrize(
    ("deft", "late"),
    [
        ({"alpha_delay": 0.5, "alpha_ramp": 0.5}, None),
        ({"alpha_delay": 0.6, "alpha_ramp": 0.5}, "1.1"),
        ({"alpha_delay": {"uniform": [0.0, 0.7]}, "alpha_ramp": 0.5}, "1.2"),
        ({"alpha_delay": 0.7, "alpha_ramp": {"choice": [0.1, 0.6]}}, "1.3"),
        ({"alpha_delay": {"choice": [0.9, 0.1]}, "alpha_ramp": 0.5}, "1.4"),
    ],
)
def test_alpha_reaches_its_value_within_the_training(deft: dict[str, Any], late: str | None) -> None:
    message = f"alpha_delay + alpha_ramp must be at most 1, or alpha never reaches its value (got {late})"
    assert faults_of(deft=deft) == ([] if late is None else [(("deft", "alpha_ramp"), message)])


@pytest.mark.parametrize(
    ("train", "fault"),
    [
        ({}, (("train", "steps"), "give either steps or epochs (got neither)")),
        ({"steps": None}, (("train", "steps"), "give either steps or epochs (got neither)")),
        ({"steps": 1, "epochs": 1}, (("train", "epochs"), "give either steps or epochs (got steps and epochs)")),
        ({"steps": "x"}, (("train", "steps"), 'must be a whole number (got "x")')),
        ({"epochs": 0}, (("train", "epochs"), "must be above 0 (got 0)")),
    ],
)
def test_a_trial_has_one_length(train: dict[str, Any], fault: Fault) -> None:
    assert faults_of(train=train) == [fault]


@pytest.mark.parametrize(
    ("train", "workers", "fault"),
    [
        ({"batch_size": 8, "micro_batch_size": 2}, 4, None),
        ({"batch_size": 9}, 1, None),
        ({"batch_size": 9}, 2, "must be a multiple of workers_per_host = 2 (got 9)"),
        (
            {"batch_size": 12, "micro_batch_size": 4},
            2,
            "must be a multiple of workers_per_host x micro_batch_size = 8 (got 12)",
        ),
        ({"batch_size": {"choice": [8, 6]}}, 4, "must be a multiple of workers_per_host = 4 (got 6)"),
        (
            {"batch_size": 8, "micro_batch_size": {"choice": [2, 3]}},
            1,
            "must be a multiple of workers_per_host x micro_batch_size = 3 (got 8)",
        ),
        ({"batch_size": {"randint": [8, 16]}}, 2, "must be a multiple of workers_per_host = 2 (got 9)"),
        ({"batch_size": {"randint": [8, 16]}}, 1, None),
        (
            {"batch_size": 8, "micro_batch_size": {"randint": [1, 4]}},
            1,
            "must be a multiple of workers_per_host x micro_batch_size = 3 (got 8)",
        ),
    ],
)
def test_a_batch_is_cut_into_equal_parts(train: dict[str, Any], workers: int, fault: str | None) -> None:
    searched = {f"train.{key}": 8 for key, value in train.items() if isinstance(value, dict)}
    found = faults_of(train={"steps": 1, **train}, resources={"workers_per_host": workers}, baseline=searched)
    found = [(path, message) for path, message in found if path[0] != "baseline"]
    assert found == ([] if fault is None else [(("train", "batch_size"), fault)])


def test_the_baselines_batch_is_cut_too() -> None:
    found = faults_of(
        train={"steps": 1, "batch_size": {"choice": [8, 16]}},
        resources={"workers_per_host": 2},
        baseline={"train.batch_size": 9},
    )
    assert found == [(("baseline", "train.batch_size"), "must be a multiple of workers_per_host = 2 (got 9)")]


def test_a_searched_leaf_outside_deft_needs_a_value_of_the_baseline() -> None:
    searched = {"r": {"choice": [4, 8]}, "lora_dropout": {"uniform": [0, 0.1]}}
    deft = {"epsilon": {"loguniform": [1e-7, 1e-3]}}
    assert faults_of(adapter=searched, deft=deft, baseline={"adapter.r": 8}) == [
        (
            ("adapter", "lora_dropout"),
            "is searched, so the baseline needs its own value: add 'adapter.lora_dropout: …' under 'baseline:'",
        )
    ]
    assert faults_of(adapter=searched, deft=deft, baseline={"adapter.r": 8, "adapter.lora_dropout": 0.0}) == []


@pytest.mark.parametrize(
    ("baseline", "fault"),
    [
        ({"adapter.r": 0}, (("baseline", "adapter.r"), "must be above 0 (got 0)")),
        ({"adapter.r": 4.0}, (("baseline", "adapter.r"), "must be a whole number (got 4.0)")),
        ({"adapter.r": None}, (("baseline", "adapter.r"), "must be a whole number (got null)")),
        ({"adapter.r": 32}, None),
        (
            {"adapter.r": 8, "train.steps": 5},
            (
                ("baseline", "train.steps"),
                "is no searched leaf of adapter or train; the baseline takes it from the spec",
            ),
        ),
        (
            {"adapter.r": 8, "deft.alpha": 0.0},
            (
                ("baseline", "deft.alpha"),
                "is no searched leaf of adapter or train; the baseline takes it from the spec",
            ),
        ),
        (
            {"adapter.r": 8, "x": True},
            (("baseline", "x"), "is no searched leaf of adapter or train; the baseline takes it from the spec"),
        ),
    ],
)
def test_the_baselines_values_are_checked_like_the_leaf(baseline: dict[str, Any], fault: Fault | None) -> None:
    found = faults_of(adapter={"r": {"choice": [4, 8]}}, deft={"alpha": {"uniform": [0, 1]}}, baseline=baseline)
    assert found == ([] if fault is None else [fault])


@pytest.mark.parametrize(("seeds", "index", "shown"), [([0, 1, 0], 2, "0"), ([7, 7], 1, "7")])
def test_a_seed_stands_once(seeds: list[int], index: int, shown: str) -> None:
    assert faults_of(search={"seeds": seeds}) == [(("search", "seeds", index), f"seed stands twice (got {shown})")]


@pytest.mark.parametrize(
    ("point", "fault"),
    [
        ({"deft.alpha": 2, "deft.epsilon": 1e-7}, None),
        ({"deft.alpha": 0.5}, None),
        ({}, None),
        ({"deft.alpha": 2.5}, "deft.alpha: lies outside the domain uniform 0, 2 (got 2.5)"),
        ({"deft.alpha": "1"}, 'deft.alpha: lies outside the domain uniform 0, 2 (got "1")'),
        ({"deft.epsilon": 1e-8}, "deft.epsilon: lies outside the domain loguniform 1e-07, 0.001 (got 1e-08)"),
        ({"adapter.r": 8}, "adapter.r: is not searched; searched are: deft.alpha, deft.epsilon"),
    ],
)
def test_points_to_try_first_lie_in_the_search_space(point: dict[str, Any], fault: str | None) -> None:
    deft = {"alpha": {"uniform": [0, 2]}, "epsilon": {"loguniform": [1e-7, 1e-3]}}
    found = faults_of(deft=deft, search={"try_first": [{"deft.alpha": 1}, point]})
    told = [f"{path[3]}: {message}" for path, message in found if path[:3] == ("search", "try_first", 1)]
    assert (told, len(found)) == ([] if fault is None else [fault], len(told))


FOUR = "this machine has 4; give --address for a cluster"


@pytest.mark.parametrize(
    ("resources", "machine", "faults"),
    [
        ({"workers_per_host": 4}, SMALL, []),
        ({"workers_per_host": 8}, SMALL, [f"1 host(s) x 8 worker(s) x 1 CPU(s) = 8 CPUs, {FOUR} (got 8)"]),
        (
            {"workers_per_host": 2, "cpus_per_worker": 4},
            SMALL,
            [f"1 host(s) x 2 worker(s) x 4 CPU(s) = 8 CPUs, {FOUR} (got 2)"],
        ),
        ({"hosts": 5}, SMALL, [f"5 host(s) x 1 worker(s) x 1 CPU(s) = 5 CPUs, {FOUR} (got 1)"]),
        ({"hosts": "auto", "workers_per_host": 4}, SMALL, []),
        (
            {"hosts": "auto", "workers_per_host": 8},
            SMALL,
            [f"1 host(s) x 8 worker(s) x 1 CPU(s) = 8 CPUs, {FOUR} (got 8)"],
        ),
        (
            {"gpus_per_worker": 1},
            SMALL,
            ["1 host(s) x 1 worker(s) x 1 GPU(s) = 1 GPUs, this machine has 0; give --address for a cluster (got 1)"],
        ),
        (
            {"gpus_per_worker": 2, "workers_per_host": 8},
            Machine(4, 4),
            [
                f"1 host(s) x 8 worker(s) x 2 GPU(s) = 16 GPUs, {FOUR} (got 8)",
                f"1 host(s) x 8 worker(s) x 1 CPU(s) = 8 CPUs, {FOUR} (got 8)",
            ],
        ),
        (
            {"workers_per_host": 2},
            Machine(4, 1),
            ["1 host(s) x 2 worker(s) x 1 GPU(s) = 2 GPUs, this machine has 1; give --address for a cluster (got 2)"],
        ),
        ({"workers_per_host": 2, "gpus_per_worker": 0}, Machine(4, 1), []),
        ({"hosts": 100, "workers_per_host": 8, "gpus_per_worker": 8}, None, []),
    ],
)
def test_no_more_workers_than_the_machine_has(
    resources: dict[str, Any], machine: Machine | None, faults: list[str]
) -> None:
    found = faults_of(machine, resources=resources, train={"steps": 1, "batch_size": 64})
    assert found == [(("resources", "workers_per_host"), message) for message in faults]


@pytest.mark.parametrize(("visible", "gpus"), [("", 0), ("0", 1), ("0,1", 2), ("-1", 0), ("GPU-a,GPU-b", 2)])
def test_hidden_gpus_do_not_count(monkeypatch: pytest.MonkeyPatch, visible: str, gpus: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert this_machine().gpus == gpus
    assert this_machine().cpus >= 1


def test_points_for_all_tasks_have_no_front_seeds_and_no_warm_start() -> None:
    found = faults_of(search={"scope": "shared", "front_seeds": 3, "warm_start": ["tasks"]})
    assert (("search", "front_seeds"), "is for scope per-task (got 3); leave it out") in found
    assert [where for where, message in found if "is for scope per-task" in message] == [
        ("search", "front_seeds"),
        ("search", "warm_start"),
    ]


def test_a_grid_is_of_single_values_all_of_which_are_tried() -> None:
    deft = {"alpha": {"loguniform": [0.1, 1.0]}, "epsilon": {"choice": [1e-5, 1e-3]}}
    search = {"sampler": "grid", "try_first": [{"deft.alpha": 0.5}], "trials": 5}
    assert faults_of(deft=deft, search=search) == [
        (("search", "try_first"), "means nothing to the grid sampler, which tries every point; leave it out"),
        (("search", "trials"), "means nothing to the grid sampler, which tries every point; leave it out"),
        (("deft", "alpha"), "the grid sampler takes single values (got loguniform 0.1, 1); allowed: choice, randint"),
    ]
    deft["alpha"] = {"choice": [0.1, 1.0]}
    assert faults_of(deft=deft, search={"sampler": "grid"}) == []


def test_a_grid_that_nobody_would_list_is_refused() -> None:
    leaves = {"r": {"randint": [1, 400]}, "lora_alpha": {"choice": [1.0, 2.0]}}
    found = faults_of(
        adapter=leaves,
        train={"steps": {"randint": [1, 200]}},
        baseline={"adapter.r": 1, "adapter.lora_alpha": 1.0, "train.steps": 1},
        search={"sampler": "grid"},
    )
    what = "a grid has at most 100,000 points (got 160,000); take 'random' or 'mo_tpe'"
    assert found == [(("search", "sampler"), what)]


# --- the threshold dial, and what the search is about -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("dial", "fault"),
    [
        ({"taus": [0.1, 0.2, 0.1]}, (("dial", "taus", 2), "threshold stands twice (got 0.1)")),
        ({"taus": [0.1, 0.10000001]}, (("dial", "taus", 1), "threshold stands twice (got 0.10000001)")),
        ({"taus": [0.0]}, (("dial", "taus", 0), "must be above 0 (got 0.0)")),
        (
            {"taus": [0.1], "calibration_examples": 300},
            (
                ("dial", "calibration_examples"),
                "must be below data.train_examples = 300, from which they are held out (got 300)",
            ),
        ),
    ],
)
def test_a_dial_that_cannot_be_is_named(dial: dict[str, Any], fault: Fault) -> None:
    assert faults_of(dial=dial, data={"tasks": ["nano-sentiment"], "train_examples": 300}) == [fault]


def test_without_thresholds_nothing_is_held_out() -> None:
    assert faults_of(data={"tasks": ["nano-sentiment"], "train_examples": 50}) == []


NAMES = "score, density, density@0.1, density@0.25"


@pytest.mark.parametrize(
    ("objectives", "path", "message"),
    [
        (["score", "density"], (), "every objective needs its direction: {score: max, density: min}"),
        ({"score": None, "density": "min"}, (), "every objective needs its direction: {score: max, density: min}"),
        ({"score": "up", "density": "min"}, ("score",), "must be 'max' or 'min' (got \"up\")"),
        (
            {"scores": "max", "density": "min"},
            ("scores",),
            f"unknown objective; did you mean 'score'? allowed: {NAMES}",
        ),
        (
            {"score": "max", "density@0.2": "min"},
            ("density@0.2",),
            f"unknown objective; did you mean 'density@0.25'? allowed: {NAMES}",
        ),
        ({"score": "max", "density": "max"}, ("density",), "can only be 'min' (got \"max\")"),
        ({"score": "max"}, (), f"must be the score and one density (got score); one of {NAMES}"),
        (
            {"density": "min", "density@0.1": "min"},
            (),
            f"must be the score and one density (got density, density@0.1); one of {NAMES}",
        ),
    ],
)
def test_objectives_are_a_score_and_a_density(objectives: Any, path: tuple[str, ...], message: str) -> None:
    found = faults_of(dial={"taus": [0.1, 0.25]}, search={"objectives": objectives})
    assert [fault[0] for fault in found] == [("search", "objectives", *path)]
    assert message in found[0][1]


def test_a_thresholded_density_needs_the_dial() -> None:
    found = faults_of(search={"objectives": {"score": "max", "density@0.1": "min"}})
    assert found == [
        (
            ("search", "objectives", "density@0.1"),
            "unknown objective; did you mean 'density'? allowed: score, density; density@τ needs dial.taus",
        )
    ]
    assert faults_of(dial={"taus": [0.1]}, search={"objectives": {"score": "max", "density@0.1": "min"}}) == []


# --- rungs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("leaf", "value"), [("first_rung", 0.25), ("reduction_factor", 2.0)])
def test_rungs_without_a_scheduler_are_a_misunderstanding(leaf: str, value: float) -> None:
    what = f"is read by no trial (got {value:g}); needs scheduler mo_asha or asha"
    assert faults_of(search={leaf: value}) == [(("search", leaf), what.replace("2)", "2.0)"))]
    assert faults_of(search={leaf: value, "scheduler": "asha"}) == []


@pytest.mark.parametrize(("steps", "first"), [(1, 1 / 9), (2, 0.9), (10, 0.96)])
def test_a_first_rung_that_no_trial_reaches_is_named(steps: int, first: float) -> None:
    message = f"a trial of {steps} steps ends before the first rung, {first:g} of them (got {steps}); give more steps, "
    message += "a smaller search.first_rung, or scheduler none"
    search = {"scheduler": "mo_asha", "first_rung": first}
    assert faults_of(search=search, train={"steps": steps}) == [(("train", "steps"), message)]
    assert faults_of(search=search | {"first_rung": 0.5}, train={"steps": max(steps, 2)}) == []


def test_rungs_that_are_none_are_their_own_fault() -> None:
    """A leaf that is refused already is not counted up to one."""
    for leaf, value in (("first_rung", 0), ("first_rung", -1), ("reduction_factor", 1.0), ("reduction_factor", 1e-9)):
        ((path, _),) = faults_of(search={"scheduler": "mo_asha", leaf: value}, train={"steps": 90})
        assert path == ("search", leaf)


@pytest.mark.parametrize("steps", [3, 4])
def test_two_rungs_at_one_step_are_named(steps: int) -> None:
    message = f"a trial of {steps} steps has two rungs at one step: 1, 1 (got {steps}); give more steps, "
    message += "a larger search.first_rung, or scheduler none"
    search = {"scheduler": "mo_asha"}
    found = faults_of(search=search, train={"steps": steps})
    assert found == [(("train", "steps"), message)]
    assert faults_of(search=search, train={"steps": 5}) == []


def test_hours_of_gpus_without_one_are_named() -> None:
    message = "is never spent without a GPU (got 2.0); take wall_hours or steps"
    for machine, resources in ((Machine(4, 0), {}), (Machine(4, 1), {"gpus_per_worker": 0})):
        found = faults_of(budget={"gpu_hours": 2.0}, resources=resources, machine=machine)
        assert found == [(("budget", "gpu_hours"), message)]
    assert faults_of(budget={"gpu_hours": 2.0}, machine=Machine(4, 1)) == []
    assert faults_of(budget={"gpu_hours": 2.0}, machine=None) == [], "a cluster has what it has"


def test_front_seeds_are_for_points_of_one_seed() -> None:
    assert faults_of(search={"seeds": [3], "front_seeds": 3}) == []
    message = "is for points of one seed (got 3); search.seeds trains every point with 2"
    assert faults_of(search={"seeds": [0, 1], "front_seeds": 3}) == [(("search", "front_seeds"), message)]
