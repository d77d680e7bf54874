"""A slot against plain PEFT, against itself cut in pieces, and against several workers."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from deft_ray.models.base import Base, load_base
from deft_ray.spec.schema import TrialSpec
from deft_ray.train.evaluation import Evaluation
from deft_ray.train.host import load_task
from deft_ray.train.ranks import Ranks
from deft_ray.train.slot import Slot, is_paged, planned_steps, split_batch
from tests.plain_peft import PlainCounts, train_plain
from tests.tiny import glue_rows, squad_rows, tiny_trial

Row = dict[str, Any]
Trial = Callable[..., TrialSpec]

EPSILON = 1e-3


@pytest.fixture(scope="module")
def bases(tiny_models: dict[str, Path]) -> dict[str, Base]:
    return {
        name: load_base(str(tiny_models[name]), name.split("-")[-1])
        for name in ("t5", "dry-t5", "relu-t5", "bert", "roberta")
    }


@pytest.fixture(scope="module")
def trial(tiny_models: dict[str, Path], tiny_data: Path) -> Trial:
    def make(name: str, task: str = "mrpc", **leaves: Any) -> TrialSpec:
        return tiny_trial(tiny_models[name], name.split("-")[-1], tiny_data, task, **leaves)

    return make


@pytest.fixture
def open_slot(bases: dict[str, Base], ranks: Ranks) -> Iterator[Callable[[str, TrialSpec], Slot]]:
    opened: list[Slot] = []

    def make(name: str, spec: TrialSpec) -> Slot:
        if opened:
            opened.pop().close()
        base = bases[name]
        opened.append(Slot(spec, base, load_task(spec.task, spec.data, base), ranks))
        return opened[0]

    yield make
    while opened:
        opened.pop().close()


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def run(slot: Slot, steps: int | None = None) -> list[float]:
    return [slot.step().task_loss for _ in range(slot.steps if steps is None else steps)]


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest difference, in units of the largest value."""
    assert got.keys() == want.keys()
    scale = max(float(tensor.abs().max()) for tensor in want.values())
    return max(float((got[name] - want[name]).abs().max()) for name in want) / scale


# --- against plain PEFT -----------------------------------------------------------------------------------------------

MRPC = "mrpc sentence1: {sentence1} sentence2: {sentence2}"
MRPC_LABELS = ("not_equivalent", "equivalent")


@pytest.mark.parametrize(("max_grad_norm", "exact"), [(0.0, True), (1000.0, True), (0.05, False)])
def test_without_density_loss_a_trial_is_plain_peft_bit_for_bit(
    trial: Trial, open_slot: Any, tiny_models: dict[str, Path], max_grad_norm: float, exact: bool
) -> None:
    """Also where the norm is watched but not reached. Where it clips, DeepSpeed sums the norm in another order."""
    spec = trial(
        "t5",
        seed=3,
        adapter__lora_dropout=0.1,
        train__steps=7,
        train__weight_decay=0.01,
        train__warmup_share=0.0,
        train__max_grad_norm=max_grad_norm,
    )
    slot = open_slot("t5", spec)
    losses = run(slot)
    rows = glue_rows("mrpc", "train", 30)
    sources, answers = [MRPC.format(**row) for row in rows], [MRPC_LABELS[row["label"]] for row in rows]
    want_losses, want = train_plain(tiny_models["t5"], sources, answers, spec)

    got = weights(slot.model)
    if exact:
        assert losses == want_losses
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)
    else:
        assert losses == pytest.approx(want_losses, rel=1e-5)
        assert worst(got, want) < 1e-4


# --- the step's gradient ----------------------------------------------------------------------------------------------


def shaken(slot: Slot) -> Slot:
    """Move LoRA's B off zero, so that every adapter weight has a gradient."""
    dice = torch.Generator().manual_seed(0)
    for name, parameter in slot.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=dice)
    return slot


def built_gradient(slot: Slot, alpha: float, alpha_decoder: float) -> dict[str, Tensor]:
    """Gradient of task loss + α x density of the whole first batch, the density built from collected activations."""
    dice = torch.Generator().manual_seed(slot.trial.seed * 1_000_003)
    order = torch.randperm(len(slot.data.train), generator=dice).tolist()
    batch = slot._collate([slot.data.train[index] for index in order[: slot.trial.train.batch_size]])
    acts: dict[str, Tensor] = {}
    hooks = [
        s.module.register_forward_hook(lambda _m, _i, out, n=s.name: acts.update({n: out})) for s in slot.base.sites
    ]
    loss = slot.model(**batch.inputs).loss
    for hook in hooks:
        hook.remove()
    for side, weight in (("encoder", alpha), ("decoder", alpha_decoder)):
        mine = [act[batch.masks[side].bool()] for name, act in acts.items() if name.startswith(side)]
        loss = loss + weight * sum((act**2 / (act**2 + EPSILON)).mean() for act in mine) / max(1, len(mine))
    named = [(name, p) for name, p in slot.model.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [p for _, p in named])
    return {name: grad for (name, _), grad in zip(named, grads, strict=True)}


def taken_gradient(slot: Slot) -> dict[str, Tensor]:
    """What AdamW saw in its first step: a tenth of it is its first moment."""
    named = [(name, p) for name, p in slot.model.named_parameters() if p.requires_grad]
    return {name: slot.engine.optimizer.state[p]["exp_avg"] / 0.1 for name, p in named}


@pytest.mark.parametrize(
    ("task", "micro", "alpha", "alpha_decoder"),
    [
        ("mrpc", 2, 0.0, None),
        *(("mrpc", micro, 2.0, None) for micro in (None, 3, 2, 1)),
        *(("squad", micro, 3.0, 0.5) for micro in (None, 3, 1)),
        ("squad", 2, 0.0, 1.0),
        ("stsb", 2, 2.0, 0.0),
    ],
)
def test_a_step_in_pieces_has_the_gradient_of_the_built_loss(
    trial: Trial, open_slot: Any, task: str, micro: int | None, alpha: float, alpha_decoder: float | None
) -> None:
    """Rows have unlike lengths, so pieces have unlike numbers of tokens on both sides."""
    spec = trial(
        "dry-t5",
        task,
        deft__alpha=alpha,
        deft__alpha_decoder=alpha_decoder,
        deft__epsilon=EPSILON,
        train__micro_batch_size=micro,
        train__max_grad_norm=0.0,
        train__gradient_checkpointing=micro == 2,
    )
    slot = shaken(open_slot("dry-t5", spec))
    want = built_gradient(slot, alpha, alpha if alpha_decoder is None else alpha_decoder)
    slot.step()

    assert worst(taken_gradient(slot), want) < 3e-5


@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_padding_does_not_move_the_gradient(trial: Trial, open_slot: Any, padding: str) -> None:
    spec = trial("dry-t5", deft__alpha=2.0, deft__epsilon=EPSILON, data__padding=padding, train__max_grad_norm=0.0)
    wanted = shaken(
        open_slot("dry-t5", spec.model_copy(update={"data": spec.data.model_copy(update={"padding": "longest"})}))
    )
    want = built_gradient(wanted, 2.0, 2.0)
    slot = shaken(open_slot("dry-t5", spec))
    slot.step()

    assert worst(taken_gradient(slot), want) < 3e-5


@pytest.mark.parametrize(("name", "task"), [("bert", "rte"), ("roberta", "stsb")])
def test_gradient_checkpointing_changes_nothing(trial: Trial, open_slot: Any, name: str, task: str) -> None:
    adapters = []
    for checkpointing in (False, True):
        spec = trial(name, task, deft__alpha=2.0, deft__epsilon=EPSILON, train__gradient_checkpointing=checkpointing)
        slot = open_slot(name, spec)
        run(slot)
        adapters.append(weights(slot.model))

    assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_zero_stages_give_the_same_losses(trial: Trial, open_slot: Any, alpha: float) -> None:
    losses, adapters = [], []
    for stage in (0, 1, 2, 3):
        spec = trial("t5", deft__alpha=alpha, deft__epsilon=EPSILON, train__zero_stage=stage, train__micro_batch_size=3)
        slot = open_slot("t5", spec)
        losses.append(run(slot))
        with slot.whole():
            adapters.append(weights(slot.model))

    for stage in (1, 2, 3):
        assert losses[stage] == pytest.approx(losses[0], rel=1e-6)
        assert worst(adapters[stage], adapters[0]) < 1e-3, "AdamW turns roundings near zero into steps"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_paged_optimizer_is_adamw(trial: Trial, open_slot: Any, stage: int) -> None:
    """torch's is the oracle of bitsandbytes', with decay, layer scales and their own rate."""
    losses, adapters, lambdas = [], [], []
    for optimizer in ("adamw", "paged_adamw"):
        leaves = {"train__optimizer": optimizer, "train__zero_stage": stage, "train__weight_decay": 0.1}
        slot = open_slot("t5", trial("t5", deft__alpha=2.0, deft__epsilon=EPSILON, deft__adaptive=True, **leaves))
        losses.append(run(slot))
        with slot.whole():
            adapters.append(weights(slot.model))
            lambdas.append(slot.lambdas())

    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert worst(adapters[1], adapters[0]) < 1e-3
    assert lambdas[1] == pytest.approx(lambdas[0], abs=1e-4)
    assert any(abs(value - 0.8) > 0.05 for value in lambdas[0].values())


def test_nf4_on_a_gpu_pages_unless_told_otherwise(trial: Trial) -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")

    def paged(optimizer: str, quantization: str, device: torch.device) -> bool:
        return is_paged(trial("t5", train__optimizer=optimizer, model__quantization=quantization), device)

    assert paged("auto", "nf4", gpu)
    assert not any((paged("auto", "nf4", cpu), paged("auto", "none", gpu), paged("adamw", "nf4", gpu)))
    assert paged("paged_adamw", "none", cpu)


def test_the_density_loss_falls_where_it_is_asked_to(trial: Trial, open_slot: Any) -> None:
    densities = {}
    for alpha in (0.0, 20.0):
        slot = open_slot("dry-t5", trial("dry-t5", deft__alpha=alpha, deft__epsilon=0.1, train__steps=12))
        results = [slot.step(measure=True) for _ in range(12)]
        densities[alpha] = [result.density_loss for result in results]
        sides = [result.penalty for result in results]
        if alpha:
            assert sides == pytest.approx([alpha * 2 * density for density in densities[alpha]], rel=1e-6)

    assert densities[0.0][0] == densities[20.0][0]
    assert densities[20.0][-1] < 0.9 * densities[20.0][0]
    assert densities[20.0][-1] < densities[0.0][-1] - 0.05


# --- how the density loss is asked for  -------------------------------------------------------------------------------


def penalties(slot: Slot) -> list[float]:
    """α times density over the density, step by step: the weight that the loss had."""
    results = [slot.step(measure=True) for _ in range(slot.steps)]
    return [(result.penalty or 0.0) / (2 * (result.density_loss or 1.0)) for result in results]


def test_alpha_is_switched_on_late_and_rises(trial: Trial, open_slot: Any) -> None:
    leaves: dict[str, Any] = {"deft__alpha": 2.0, "train__steps": 10}
    late = open_slot("dry-t5", trial("dry-t5", deft__alpha_delay=0.3, deft__alpha_ramp=0.4, **leaves))
    assert penalties(late) == pytest.approx([0, 0, 0, 0.5, 1, 1.5, 2, 2, 2, 2], rel=1e-6)

    constant = open_slot("dry-t5", trial("dry-t5", **leaves))
    assert penalties(constant) == pytest.approx([2.0] * 10, rel=1e-6)


def test_epsilon_narrows_over_the_training(trial: Trial, open_slot: Any) -> None:
    spec = trial("dry-t5", deft__epsilon=1e-1, deft__epsilon_end=1e-5, train__steps=5)
    slot = open_slot("dry-t5", spec)
    seen = []
    for _ in range(5):
        seen.append(slot._approximation().epsilon)
        slot.step()

    assert seen == pytest.approx([1e-1, 1e-2, 1e-3, 1e-4, 1e-5], rel=1e-6)


@pytest.mark.parametrize("micro", [None, 2])
def test_padding_counts_where_the_paper_counts_it(trial: Trial, open_slot: Any, micro: int | None) -> None:
    spec = trial(
        "dry-t5",
        data__padding="max_length",
        data__max_source_tokens=40,
        data__max_target_tokens=8,
        deft__alpha=2.0,
        deft__epsilon=EPSILON,
        deft__count_padding=True,
        train__max_grad_norm=0.0,
        train__micro_batch_size=micro,
    )
    real = spec.model_copy(update={"deft": spec.deft.model_copy(update={"count_padding": False})})
    without = built_gradient(shaken(open_slot("dry-t5", real)), 2.0, 2.0)
    slot = shaken(open_slot("dry-t5", spec))
    want = built_gradient(slot, 2.0, 2.0)
    slot.step()

    assert worst(taken_gradient(slot), want) < 3e-5
    assert worst(without, want) > 1e-2, "padding must have moved something"


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_the_fused_block_trains_as_stock_with_the_tanh_gelu(
    trial: Trial, open_slot: Any, bases: dict[str, Base], alpha: float
) -> None:
    spec = trial("dry-t5", deft__alpha=alpha, deft__epsilon=EPSILON)
    fused = spec.model_copy(update={"model": spec.model.model_copy(update={"activation": "fused"})})
    stock = open_slot("dry-t5", spec)
    losses, density = run(stock), stock.evaluate().counts.density()
    slot = open_slot("dry-t5", fused)

    assert slot.activation == "GELUTanh"
    assert run(slot) == pytest.approx(losses, rel=1e-4)
    assert slot.evaluate().counts.density() == pytest.approx(density, abs=2e-2)
    slot.close()
    assert "forward" not in vars(bases["dry-t5"].sites[0].block)
    assert type(bases["dry-t5"].sites[0].module).__name__ == "NewGELUActivation"


@pytest.mark.parametrize(("name", "stage"), [("dry-t5", 0), ("dry-t5", 2), ("bert", 1), ("dry-t5", 3)])
def test_layer_scales_train_within_bounds_and_reach_zero(
    trial: Trial, open_slot: Any, tmp_path: Path, name: str, stage: int
) -> None:
    spec = trial(
        name,
        "mrpc",
        deft__adaptive=True,
        deft__alpha=50.0,
        deft__lambda_learning_rate=0.2,
        deft__lambda_init=0.5,
        train__steps=14,
        train__zero_stage=stage,
        train__schedule="constant",
    )
    slot = open_slot(name, spec)
    with slot.whole():
        start = slot.lambdas()
    run(slot)
    with slot.whole():
        end = slot.lambdas()
        slot.save_adapter(tmp_path)

    assert start.keys() == end.keys() == set(slot.probe.names)
    assert all(0.3 < value < 0.7 for value in start.values())
    assert all(value == 0.0 for value in end.values()), "a density weighed by 50 has to win"
    assert json.loads((tmp_path / "layer_scales.json").read_text()) == end


def test_the_reported_penalty_is_weighed_by_the_layer_scales(trial: Trial, open_slot: Any) -> None:
    leaves: dict[str, Any] = {"deft__adaptive": True, "deft__alpha": 2.0, "deft__lambda_noise": 0.0}
    half = open_slot("dry-t5", trial("dry-t5", deft__lambda_init=0.5, **leaves)).step(measure=True)

    assert half.penalty == pytest.approx(0.5 * 2.0 * 2 * half.density_loss, rel=1e-6)


def test_layer_scales_without_a_density_loss_are_trained_for_the_task_alone(trial: Trial, open_slot: Any) -> None:
    slot = open_slot("dry-t5", trial("dry-t5", deft__adaptive=True, deft__alpha=0.0, train__steps=8))
    start = slot.scales.by_layer()
    run(slot)

    assert slot.scales.by_layer() != start
    assert all(0.5 < value <= 1.0 for value in slot.scales.by_layer().values())


def test_a_block_of_the_nano_model_that_ends_at_zero_can_be_taken_out(ranks: Ranks) -> None:
    base = load_base("nano", "t5")
    spec = tiny_trial(
        Path("nano"),
        "t5",
        None,
        "nano-sentiment",
        data__train_examples=200,
        data__validation_examples=40,
        deft__adaptive=True,
        deft__alpha=0.5,
        deft__lambda_learning_rate=0.05,
        train__steps=40,
        train__batch_size=8,
        train__learning_rate=2e-3,
    )
    slot = Slot(spec, base, load_task(spec.task, spec.data, base), ranks)
    run(slot)
    lambdas = slot.lambdas()
    zeros = [name for name, value in lambdas.items() if value == 0.0]
    assert 0 < len(zeros) < len(lambdas), lambdas

    slot.model.eval()
    batch = slot._collate(slot.data.validation[:8]).inputs
    with torch.no_grad():
        scaled = slot.model(**batch).logits
        for name in zeros:
            side, index = name.split(".")
            base.model.get_submodule(f"{side}.block.{index}").layer[-1] = torch.nn.Identity()  # type: ignore[operator]
        removed = slot.model(**batch).logits
    assert torch.equal(scaled, removed)


def test_a_resumed_adaptive_trial_is_the_uninterrupted_one(trial: Trial, open_slot: Any, tmp_path: Path) -> None:
    spec = trial("t5", deft__adaptive=True, deft__alpha=2.0, train__steps=6, train__zero_stage=1)
    whole = open_slot("t5", spec)
    losses = run(whole)
    scales = whole.scales.by_layer()

    first = open_slot("t5", spec)
    early = run(first, 3)
    first.save(tmp_path)
    second = open_slot("t5", spec)
    second.load(tmp_path)

    assert early + run(second, 3) == losses
    assert second.scales.by_layer() == scales


def test_the_approximation_follows_the_activation(trial: Trial, open_slot: Any) -> None:
    gelu = open_slot("t5", trial("t5", deft__alpha=1.0))
    assert (gelu.kind, gelu.warning) == ("l0", None)
    relu = open_slot("relu-t5", trial("relu-t5", deft__alpha=1.0))
    assert (relu.kind, relu.warning) == ("tanh", None)
    doubtful = open_slot("t5", trial("t5", deft__alpha=1.0, deft__approximation="tanh", deft__beta=20.0))
    assert doubtful.warning is not None
    assert doubtful.warning.startswith("deft.approximation 'tanh' on NewGELUActivation: its negative activations count")
    off = open_slot("t5", trial("t5", deft__alpha=0.0, deft__approximation="tanh", deft__beta=20.0))
    assert off.warning is None


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "task", "stage", "optimizer"),
    [
        ("t5", "mrpc", 0, "adamw"),
        ("t5", "squad", 2, "adamw"),
        ("bert", "rte", 1, "adamw"),
        ("t5", "mrpc", 3, "adamw"),
        ("t5", "mrpc", 0, "paged_adamw"),
        ("t5", "mrpc", 2, "paged_adamw"),
    ],
)
def test_a_resumed_trial_is_the_uninterrupted_one(
    trial: Trial, open_slot: Any, tmp_path: Path, name: str, task: str, stage: int, optimizer: str
) -> None:
    spec = trial(
        name,
        task,
        adapter__lora_dropout=0.1,
        deft__alpha=1.0,
        data__max_target_tokens=4,
        train__steps=6,
        train__optimizer=optimizer,
        train__zero_stage=stage,
        train__micro_batch_size=3,
    )
    whole = open_slot(name, spec)
    losses = run(whole)
    with whole.whole():
        want = weights(whole.model)
    want_found = whole.evaluate()

    first = open_slot(name, spec)
    early = run(first, 3)
    first.save(tmp_path)
    first.step()  # lost with the worker
    torch.manual_seed(99)
    second = open_slot(name, spec)
    second.load(tmp_path)
    assert second.done == 3
    late = run(second, 3)
    found = second.evaluate()

    assert early + late == losses
    with second.whole():
        got = weights(second.model)
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert torch.equal(found.counts.rows, want_found.counts.rows)
    assert found.scores == want_found.scores


def test_an_evaluation_in_between_changes_nothing(trial: Trial, open_slot: Any) -> None:
    spec = trial("t5", "squad", adapter__lora_dropout=0.1, deft__alpha=1.0, data__max_target_tokens=4)
    slot = open_slot("t5", spec)
    want = run(slot)
    slot = open_slot("t5", spec)
    got = run(slot, 2)
    slot.evaluate()

    assert got + run(slot, 2) == want


def test_a_slot_that_cannot_be_built_leaves_no_trace(
    trial: Trial, open_slot: Any, bases: dict[str, Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    want = run(open_slot("t5", trial("t5")))
    modules = [name for name, _ in bases["dry-t5"].model.named_modules()]
    with monkeypatch.context() as patch:
        patch.setattr("deft_ray.train.slot.build_engine", out_of_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            open_slot("dry-t5", trial("dry-t5"))

    assert [name for name, _ in bases["dry-t5"].model.named_modules()] == modules
    assert all(type(site.module).__name__ == "NewGELUActivation" for site in bases["dry-t5"].sites)
    assert run(open_slot("t5", trial("t5"))) == want


@pytest.mark.parametrize("stage", [0, 2])
def test_a_closed_slot_is_collected(trial: Trial, bases: dict[str, Base], ranks: Ranks, stage: int) -> None:
    spec = trial("t5", train__zero_stage=stage, deft__alpha=1.0)
    slot = Slot(spec, bases["t5"], load_task(spec.task, spec.data, bases["t5"]), ranks)
    slot.step()
    adapter = [p for p in slot.model.parameters() if p.requires_grad]
    watched = [weakref.ref(thing) for thing in (slot, slot.engine, slot.model, *adapter)]
    slot.close()
    del slot, adapter
    gc.collect()

    assert [type(ref()).__name__ for ref in watched if ref() is not None] == []


def out_of_memory(*_args: Any, **_options: Any) -> None:
    raise RuntimeError("out of memory")


# --- evaluation -------------------------------------------------------------------------------------------------------


def reopened(folder: Path, adapter: Path, outputs: int | None) -> tuple[Any, Any, PlainCounts]:
    if outputs is None:
        base = AutoModelForSeq2SeqLM.from_pretrained(folder)
    else:
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=outputs)
    model = PeftModel.from_pretrained(base, adapter).eval()
    return AutoTokenizer.from_pretrained(folder), model, PlainCounts(model)


def trained(open_slot: Any, spec: TrialSpec, name: str, folder: Path) -> Evaluation:
    slot = open_slot(name, spec)
    run(slot)
    slot.save_adapter(folder)
    found: Evaluation = slot.evaluate()
    return found


def check_density(found: Evaluation, plain: PlainCounts) -> None:
    """One flipped zero at the edge of the GELU, as a padded batch rounds another way, is about 1e-5 here."""
    for side in ("encoder", "decoder"):
        if plain.total[side]:
            assert found.counts.density(side) == pytest.approx(plain.nonzero[side] / plain.total[side], abs=5e-5)
    both = sum(plain.nonzero.values()) / sum(plain.total.values())
    assert found.counts.density() == pytest.approx(both, abs=5e-5)
    assert 0.3 < both < 0.999, "a density of one would prove nothing"
    assert sum(int(row[1]) for row in found.counts.rows) == sum(plain.total.values())


LABELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "mrpc": (MRPC, MRPC_LABELS),
    "mnli": ("mnli premise: {premise} hypothesis: {hypothesis}", ("entailment", "neutral", "contradiction")),
    "stsb": ("stsb sentence1: {sentence1} sentence2: {sentence2}", tuple(f"{n / 5:.1f}" for n in range(26))),
}


@pytest.mark.parametrize("task", ["mrpc", "mnli", "stsb"])
@torch.no_grad()
def test_text_to_text_classes_as_plain_peft_finds_them(
    trial: Trial, open_slot: Any, tiny_models: dict[str, Path], tmp_path: Path, task: str
) -> None:
    spec = trial("t5", task, deft__alpha=1.0, train__steps=12, train__batch_size=10)
    with torch.enable_grad():
        found = trained(open_slot, spec, "t5", tmp_path)
    tokenizer, model, counts = reopened(tiny_models["t5"], tmp_path, None)
    prompt, words = LABELS[task]
    choices, rows = [], glue_rows(task, "validation", 14)
    for row in rows:
        source = tokenizer(prompt.format(**row), return_tensors="pt")
        gold = round(row["label"] * 5) if task == "stsb" else row["label"]
        counts.on = True
        model(**source, labels=tokenizer(words[gold], return_tensors="pt")["input_ids"])
        counts.on = False
        answers = tokenizer(list(words), padding=True, return_tensors="pt")
        labels = answers["input_ids"].masked_fill(answers["attention_mask"] == 0, -100)
        logits = model(**{key: value.expand(len(words), -1) for key, value in source.items()}, labels=labels).logits
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        likelihoods = (-losses.sum(dim=1)).tolist()
        if task == "stsb":
            shares = torch.tensor(likelihoods, dtype=torch.float64).softmax(dim=0)
            choices.append(float((shares * torch.arange(26) / 5).sum()))
        else:
            choices.append(float(max(range(len(words)), key=likelihoods.__getitem__)))
    check_density(found, counts)
    score = next(iter(found.scores.values()))
    true = [row["label"] for row in rows]
    if task == "stsb":
        assert score == pytest.approx(float(torch.corrcoef(torch.tensor([choices, true]))[0, 1]), abs=1e-4)
    else:
        assert score == sum(c == label for c, label in zip(choices, true, strict=True)) / 14


@pytest.mark.parametrize(("task", "padding"), [("mrpc", "longest"), ("stsb", "longest"), ("mrpc", "max_length")])
def test_density_paper_counts_the_padding_of_true_answers_alone(
    trial: Trial, open_slot: Any, task: str, padding: str
) -> None:
    """Other answers that a row is scored against are nobody's padding."""
    spec = trial(
        "t5", task, train__steps=1, train__eval_batch_size=1, data__padding=padding, data__max_source_tokens=40
    )
    slot = open_slot("t5", spec)
    found = slot.evaluate().row()

    plain = PlainCounts(slot.model)
    slot.model.eval()
    fixed = padding == "max_length"
    width = spec.data.max_target_tokens if fixed else max(map(len, slot.data.candidates))
    for example in slot.data.validation:
        length = spec.data.max_source_tokens if fixed else len(example.input_ids)
        ids = torch.tensor([example.input_ids + [0] * (length - len(example.input_ids))])
        mask = (torch.arange(length) < len(example.input_ids)).long().unsqueeze(0)
        labels = torch.tensor([example.target_ids + [-100] * (width - len(example.target_ids))])
        with torch.no_grad():
            slot.model(input_ids=ids, attention_mask=mask, labels=labels)
    want = sum(plain.nonzero.values()) / sum(plain.total.values())

    assert found["density_paper"] == pytest.approx(want, abs=5e-5)
    assert task == "stsb" or found["density_paper"] != found["density"], "STS-B's answers are of one length"


@torch.no_grad()
def test_generated_answers_as_plain_peft_generates_them(
    trial: Trial, open_slot: Any, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def remember(predictions: list[str], answers: Any) -> dict[str, float]:
        said.extend(predictions)
        return score_answers(predictions, answers)

    from deft_ray.tasks.scoring import score_answers

    monkeypatch.setattr("deft_ray.train.evaluation.score_answers", remember)
    spec = trial(
        "t5", "squad", train__steps=25, train__batch_size=10, train__learning_rate=0.02, data__max_target_tokens=6
    )
    with torch.enable_grad():
        found = trained(open_slot, spec, "t5", tmp_path)
    tokenizer, model, counts = reopened(tiny_models["t5"], tmp_path, None)
    writing = PlainCounts(model)
    writing.on = False
    rows, texts, points = squad_rows("validation", 14), [], []
    for row in rows:
        source = tokenizer(f"question: {row['question']} context: {row['context']}", return_tensors="pt")
        counts.on = True
        model(**source, labels=tokenizer(row["answers"]["text"][0], return_tensors="pt")["input_ids"])
        counts.on = False
        writing.on = True
        tokens = model.generate(**source, max_new_tokens=6, do_sample=False, num_beams=1)
        writing.on = False
        texts.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
        points.append(max(word_overlap(texts[-1], gold) for gold in row["answers"]["text"]))
    check_density(found, counts)
    nonzero, total = found.generated.tolist()
    assert total == writing.total["decoder"]
    assert nonzero / total == pytest.approx(writing.nonzero["decoder"] / total, abs=5e-5)
    assert found.row()["density_decoder_generated"] == nonzero / total
    assert said == texts
    assert len(set(texts)) > 1 or sum(points) > 0, "an untrained model's one answer would prove nothing"
    assert found.scores[next(iter(found.scores))] == pytest.approx(sum(points) / 14, abs=1e-6)


def word_overlap(prediction: str, gold: str) -> float:
    """F1 over words; these rows have no punctuation in their answers, and no article but 'the'."""
    p, g = ([word for word in text.split() if word not in ("a", "an", "the")] for text in (prediction, gold))
    same = sum(min(p.count(word), g.count(word)) for word in set(p))
    return 2 * same / (len(p) + len(g)) if same else 0.0


@pytest.mark.parametrize(
    ("name", "task", "columns"),
    [
        ("bert", "qnli", ("question", "sentence")),
        ("roberta", "mnli", ("premise", "hypothesis")),
        ("bert", "stsb", ("sentence1", "sentence2")),
    ],
)
@torch.no_grad()
def test_encoder_heads_as_plain_peft_reads_them(
    trial: Trial,
    open_slot: Any,
    tiny_models: dict[str, Path],
    tmp_path: Path,
    name: str,
    task: str,
    columns: tuple[str, str],
) -> None:
    spec = trial(name, task, deft__alpha=1.0, train__steps=10, train__batch_size=10)
    with torch.enable_grad():
        found = trained(open_slot, spec, name, tmp_path)
    outputs = {"qnli": 2, "mnli": 3, "stsb": 1}[task]
    tokenizer, model, counts = reopened(tiny_models[name], tmp_path, outputs)
    rows, said = glue_rows(task, "validation", 14), []
    for row in rows:
        logits = model(**tokenizer(*(row[column] for column in columns), return_tensors="pt")).logits[0]
        said.append(float(logits[0]) if outputs == 1 else float(logits.argmax()))
    check_density(found, counts)
    labels = [row["label"] for row in rows]
    score = next(iter(found.scores.values()))
    if outputs == 1:
        assert score == pytest.approx(float(torch.corrcoef(torch.tensor([said, labels]))[0, 1]), abs=1e-3)
    else:
        assert score == sum(s == label for s, label in zip(said, labels, strict=True)) / 14
    assert found.counts.density("decoder") is None


@pytest.mark.parametrize(("name", "task"), [("t5", "mrpc"), ("t5", "squad"), ("bert", "rte"), ("bert", "stsb")])
def test_outputs_that_are_no_numbers_are_not_scored(trial: Trial, open_slot: Any, name: str, task: str) -> None:
    slot = open_slot(name, trial(name, task))
    next(p for p in slot.model.parameters() if p.requires_grad).data.fill_(math.nan)
    next(p for key, p in slot.model.named_parameters() if "lora_B" in key).data.fill_(1.0)

    with pytest.raises(FloatingPointError, match=r"^the model's outputs are not finite in the evaluation$"):
        slot.evaluate()


# --- several workers --------------------------------------------------------------------------------------------------

#: (task, ZeRO stage, micro-batch, layer scales).
Case = tuple[str, int, int | None, bool]
SEVERAL_WORKERS: tuple[Case, ...] = (
    ("mrpc", 0, None, False),
    ("squad", 2, 1, False),
    ("mrpc", 3, None, False),
    ("mrpc", 0, 1, True),
    ("mrpc", 3, None, True),
)


def one_of_workers(models: dict[str, Path], data: Path, case: Case) -> TrialSpec:
    task, stage, micro, adaptive = case
    return tiny_trial(
        models["dry-t5"],
        "t5",
        data,
        task,
        deft__alpha=2.0,
        deft__epsilon=EPSILON,
        deft__adaptive=adaptive,
        train__zero_stage=stage,
        train__micro_batch_size=micro,
    )


def work(rank: int, world: int, folder: Path, models: dict[str, Path], data: Path) -> None:
    """One of several workers: train and evaluate every case, leave what came of it."""
    import os

    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    ranks = Ranks(rank, world, torch.device("cpu"))
    base = load_base(str(models["dry-t5"]), "t5")
    left = [train_and_evaluate(one_of_workers(models, data, case), base, ranks) for case in SEVERAL_WORKERS]
    torch.save(left, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


def train_and_evaluate(spec: TrialSpec, base: Base, ranks: Ranks) -> dict[str, Any]:
    slot = Slot(spec, base, load_task(spec.task, spec.data, base), ranks)
    results = [slot.step(measure=True) for _ in range(slot.steps)]
    sums = ranks.total(torch.tensor([[r.task_loss, r.density_loss, r.penalty] for r in results], dtype=torch.float64))
    found = slot.evaluate()
    with slot.whole():
        adapter = weights(slot.model) | {name: torch.tensor(value) for name, value in slot.lambdas().items()}
    left = {"losses": sums, "adapter": adapter, "counts": found.counts.rows, "scores": found.scores}
    slot.close()
    return left


@pytest.fixture(scope="module", params=[2, 3])
def workers(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_models: dict[str, Path],
    tiny_data: Path,
) -> list[list[dict[str, Any]]]:
    """What each of two workers left, and of three."""
    folder = tmp_path_factory.mktemp("workers")
    spawn(work, args=(request.param, folder, tiny_models, tiny_data), nprocs=request.param)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(request.param)]


@pytest.mark.parametrize("case", range(len(SEVERAL_WORKERS)))
def test_several_workers_are_one_to_rounding(
    workers: list[list[dict[str, Any]]],
    case: int,
    tiny_models: dict[str, Path],
    tiny_data: Path,
    bases: dict[str, Base],
    ranks: Ranks,
) -> None:
    first, *others = (left[case] for left in workers)
    alone = train_and_evaluate(one_of_workers(tiny_models, tiny_data, SEVERAL_WORKERS[case]), bases["dry-t5"], ranks)

    for other in others:
        assert all(torch.equal(first["adapter"][name], other["adapter"][name]) for name in first["adapter"])
        assert torch.equal(first["counts"], other["counts"])
        assert first["scores"] == other["scores"]
    torch.testing.assert_close(first["losses"], alone["losses"], rtol=2e-5, atol=1e-6)
    assert worst(first["adapter"], alone["adapter"]) < 5e-3
    assert torch.equal(first["counts"][:, 1], alone["counts"][:, 1])
    assert float((first["counts"] - alone["counts"])[:, 0].abs().sum() / alone["counts"][:, 1].sum()) < 1e-4
    assert first["scores"] == pytest.approx(alone["scores"], abs=1e-6)


# --- small sums -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "micro", "world", "want"),
    [(12, None, 1, (12, 1)), (12, None, 3, (4, 1)), (12, 2, 3, (2, 2)), (12, 1, 1, (1, 12)), (12, 4, 1, (4, 3))],
)
def test_batches_are_split(trial: Trial, batch: int, micro: int | None, world: int, want: tuple[int, int]) -> None:
    assert split_batch(trial("t5", train__batch_size=batch, train__micro_batch_size=micro), world) == want


@pytest.mark.parametrize(
    ("steps", "epochs", "examples", "want"),
    [(7, None, 100, 7), (None, 1.0, 100, 17), (None, 3.0, 100, 50), (None, 0.01, 100, 1), (None, 0.001, 100, 1)],
)
def test_steps_are_planned(trial: Trial, steps: int | None, epochs: float | None, examples: int, want: int) -> None:
    assert planned_steps(trial("t5", train__steps=steps, train__epochs=epochs), examples) == want
