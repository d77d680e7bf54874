"""The paper's settings as specs: each is checked and planned, and says what the tables say."""

from __future__ import annotations

from pathlib import Path

import pytest

from deft_ray.spec.catalog import PUBLISHED_ADAPTERS, PublishedAdapter
from deft_ray.spec.domains import Domain
from deft_ray.spec.loading import load_spec
from deft_ray.spec.machine import Machine
from deft_ray.spec.plan import build_plan

FOLDER = Path(__file__).parents[2] / "search_spaces" / "paper"
APPROXIMATIONS = ("tanh", "l0", "sigmoid", "l1", "l2")
GLUE = {"mnli", "qqp", "qnli", "sst2", "stsb", "mrpc", "rte", "cola"}

#: File: (tasks, sampled points a task and seed, batch size, learning rate), from Runwal et al. (arXiv:2402.01911).
PUBLISHED = {
    **{f"roberta_large_{kind}": (GLUE, 1, 64, 3e-4) for kind in ("adapter", "lora", "prefix", "prompt")},
    **{f"bert_base_relu_{kind}": (GLUE, 1, 64, 3e-4) for kind in ("adapter", "lora", "prefix", "prompt")},
    "bert_base_relu_approximations": ({"sst2"}, 5, 64, 3e-4),
    **{f"t5_{size}_{kind}": ({"squad"}, 1, 64, 3e-5) for size in ("small", "base") for kind in ("adapter", "lora")},
    "flan_t5_xl_adapter": ({"squad"}, 1, 64, 3e-5),
    "flan_t5_xxl_qlora": ({"squad"}, 1, 4, 3e-5),
    "ada_flan_t5_base_lora": ({"squad"}, 1, 64, 3e-5),
    "ada_flan_t5_xl_qlora": ({"squad"}, 1, 8, 3e-5),
    "ada_flan_t5_xxl_qlora": ({"squad"}, 1, 4, 3e-5),
    "gpt2_adapter": ({"sst2"}, 1, 32, 3e-4),
    "opt_125m_lora": ({"sst2"}, 1, 32, 3e-4),
    "opt_350m_lora": ({"sst2"}, 1, 32, 3e-4),
    "vit_base_adapter": ({"cifar10"}, 1, 64, 2e-5),
    "vit_large_adapter": ({"cifar10"}, 1, 32, 2e-5),
}


def test_there_is_one_file_per_row_group() -> None:
    assert {file.stem for file in FOLDER.iterdir()} == PUBLISHED.keys()


@pytest.mark.parametrize("stem", PUBLISHED)
def test_each_is_checked_and_planned(stem: str) -> None:
    tasks, points, batch_size, learning_rate = PUBLISHED[stem]
    machine = Machine(cpus=16, gpus=1)
    spec = load_spec(FOLDER / f"{stem}.yaml", machine=machine)
    plan = build_plan(spec, "runs/paper", machine)

    assert set(spec.data.tasks) == tasks
    assert spec.space == ({"deft.approximation": Domain("choice", APPROXIMATIONS)} if points == 5 else {})
    assert len(spec.search.seeds) == 3
    assert (plan.baselines, plan.sampled) == (3 * len(tasks), 3 * len(tasks) * points)
    assert (spec.train.batch_size, spec.train.learning_rate, spec.train.epochs) == (batch_size, learning_rate, 10)
    assert spec.deft.alpha == 1.0
    assert spec.deft.count_padding
    assert spec.deft.adaptive == stem.startswith("ada_")
    assert not spec.deft.adaptive or (spec.deft.lambda_init, spec.deft.lambda_noise) == (0.8, 0.05)
    train, data = spec.train, spec.data
    squad, images = tasks == {"squad"}, tasks == {"cifar10"}
    how = (0.0, 0.0, 1.0) if squad else (0.06, 0.01, 0.0)
    assert (train.schedule, train.warmup_share, train.weight_decay, train.max_grad_norm) == ("linear", *how)
    assert images or (data.padding, data.grouping, data.max_source_tokens) == (
        "max_length",
        "none",
        384 if squad else 128,
    )
    assert not squad or data.max_target_tokens == 30
    assert spec.adapter.kind != "bottleneck" or spec.adapter.reads == "sum"
    qlora = stem.endswith("qlora")
    assert (spec.model.quantization, spec.train.optimizer) == (("nf4", "paged_adamw") if qlora else ("none", "adamw"))
    assert not qlora or (spec.model.double_quant, spec.model.dtype) == (True, "bfloat16")
    last = stem.rsplit("_", 1)[-1]
    kinds = {"qlora": "lora", "adapter": "bottleneck", "approximations": "bottleneck"}
    assert spec.adapter.kind == kinds.get(last, last)
    relu = stem.startswith(("bert", "t5", "opt"))
    assert spec.deft.approximation == ("tanh" if relu else "l0")
    assert (spec.deft.beta if relu else spec.deft.epsilon) == (20.0 if relu else 1e-7)


@pytest.mark.parametrize("published", PUBLISHED_ADAPTERS, ids=lambda p: f"{p.model}-{p.settings['kind']}")
def test_adapters_are_those_that_meet_the_printed_shares(published: PublishedAdapter) -> None:
    model, settings = published.model, published.settings
    specs = [load_spec(file, machine=Machine(16, 1)) for file in FOLDER.iterdir()]
    fits = [
        spec
        for spec in specs
        if spec.model.name.rsplit("/", 1)[-1] == model
        and all(getattr(spec.adapter, leaf) == value for leaf, value in settings.items())
    ]
    assert fits, f"no spec of {model} has {settings}"
