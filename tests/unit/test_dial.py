"""The threshold dial of a slot against plain PEFT whose small activations are set to zero by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deft_ray.models.base import Base
from deft_ray.spec.schema import TrialSpec
from deft_ray.tasks.encoding import EncodedTask, Example
from deft_ray.train.loading import load_task
from deft_ray.train.ranks import Ranks
from deft_ray.train.slot import Slot
from tests.plain_peft import answers_of_head, reopened, texts_of
from tests.slots import run, same, weights
from tests.tiny import glue_rows, squad_rows

Trial = Callable[..., TrialSpec]
TAUS, HELD_OUT = [0.02, 0.1], 6
DIAL = {"dial__taus": TAUS, "dial__calibration_examples": HELD_OUT}


@pytest.fixture
def open_dialled(base_of: Callable[[TrialSpec], Base], ranks: Ranks) -> Callable[[TrialSpec], Slot]:
    """Opens a slot whose task has a calibration split."""

    def make(spec: TrialSpec) -> Slot:
        base = base_of(spec)
        return Slot(spec, base, load_task(spec.task, spec.data, base, HELD_OUT), ranks)

    return make


def cut_below(model: torch.nn.Module, tau: float) -> list[Any]:
    """Set what an MLP's activation says to zero where it is small, before anybody counts it."""

    def cut(_module: Any, _inputs: Any, act: Tensor) -> Tensor:
        return torch.where(act.abs() > tau, act, torch.zeros_like(act))

    names = ("DenseReluDense.act", "intermediate_act_fn")
    chosen = [module for name, module in model.named_modules() if name.endswith(names)]
    return [module.register_forward_hook(cut, prepend=True) for module in chosen]


@torch.no_grad()
def test_an_encoder_at_each_threshold_as_plain_peft_finds_it(
    trial: Trial, open_dialled: Any, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    spec = trial("bert", "qnli", deft__alpha=1.0, train__steps=10, train__batch_size=10, **DIAL)
    slot = open_dialled(spec)
    with torch.enable_grad():
        run(slot)
    slot.save_adapter(tmp_path)
    plain_row, evaluation = slot.evaluate().row(), slot.evaluate(TAUS, last=True)
    row, predictions = evaluation.row(), evaluation.predictions
    split = slot.data.calibration
    slot.close()

    assert plain_row.pop("dial") == {}
    assert plain_row.pop("density_feature_map") is None, "a trial's last evaluation alone notes it"
    assert row.pop("density_feature_map") > 0.9
    dial = row.pop("dial")
    assert row == plain_row, "the dial changes nothing of what is exact"
    assert list(dial) == ["0", "0.02", "0.1"]
    assert (dial["0"]["score"], dial["0"]["density"]) == (row["score"], row["density"])
    tokenizer, model, counts = reopened(tiny_models["bert"], tmp_path, 2)
    rows = glue_rows("qnli", "validation", 14)
    for tau, found in zip((0.0, *TAUS), dial.values(), strict=True):
        hooks = cut_below(model, tau)
        counts.nonzero["encoder"], counts.total["encoder"] = 0, 0
        said = answers_of_head(model, texts_of(tokenizer, rows, ("question", "sentence")))
        assert found["density"] == pytest.approx(counts.nonzero["encoder"] / counts.total["encoder"], abs=5e-5)
        assert found["score"] == sum(s == r["label"] for s, r in zip(said, rows, strict=True)) / len(rows)
        assert predictions[f"{tau:g}"] == said
        assert predictions["label"] == [row["label"] for row in rows]

        counts.nonzero["encoder"], counts.total["encoder"] = 0, 0
        inputs = [{"input_ids": torch.tensor([e.input_ids]), "token_type_ids": segments(e)} for e in split]
        said = answers_of_head(model, inputs)
        right = sum(s == example.label for s, example in zip(said, split, strict=True))
        assert found["calibration_density"] == pytest.approx(
            counts.nonzero["encoder"] / counts.total["encoder"], abs=5e-5
        )
        assert found["calibration_score"] == right / HELD_OUT
        for hook in hooks:
            hook.remove()
    densities = [found["density"] for found in dial.values()]
    assert densities[0] > densities[1] > densities[2] > 0


def segments(example: Example) -> Tensor:
    return torch.tensor([list(example.type_ids)])


@pytest.mark.parametrize("activation", ["stock", "fused"])
@torch.no_grad()
def test_a_generating_t5_at_a_threshold_as_plain_peft_finds_it(
    trial: Trial, open_dialled: Any, tiny_models: dict[str, Path], tmp_path: Path, activation: str
) -> None:
    spec = trial("t5", "squad", train__steps=6, data__max_target_tokens=6, model__activation=activation, **DIAL)
    slot = open_dialled(spec)
    with torch.enable_grad():
        run(slot)
    slot.save_adapter(tmp_path)
    found = slot.evaluate([0.05]).row()["dial"]["0.05"]
    slot.close()

    tokenizer, model, counts = reopened(tiny_models["t5"], tmp_path, None)
    cut_below(model, 0.05)
    for row in squad_rows("validation", 14):
        source = tokenizer(f"question: {row['question']} context: {row['context']}", return_tensors="pt")
        model(**source, labels=tokenizer(row["answers"]["text"][0], return_tensors="pt")["input_ids"])
    density = sum(counts.nonzero.values()) / sum(counts.total.values())
    assert found["density"] == pytest.approx(density, abs=5e-5)
    assert 0.1 < density < 0.95


def test_held_out_rows_are_the_same_for_all_and_nobody_trains_on_them(trial: Trial, base_of: Any, ranks: Ranks) -> None:
    spec = trial("bert", "mrpc", train__steps=4)
    base = base_of(spec)
    whole = load_task("mrpc", spec.data, base)
    one, other = (load_task("mrpc", spec.data, base, HELD_OUT) for _ in range(2))
    assert len(one.calibration) == HELD_OUT
    assert not whole.calibration
    assert texts(one.calibration) == texts(other.calibration)
    assert sorted(texts(one.train) + texts(one.calibration)) == sorted(texts(whole.train))
    assert texts(one.train) == [text for text in texts(whole.train) if text in texts(one.train)], "in their order"

    adapters = []
    for seed in (0, 1):
        slot = Slot(spec.model_copy(update={"seed": seed}), base, one, ranks)
        seen = [slot._order.indices(step) for step in range(4)]
        assert max(max(indices) for indices in seen) < len(one.train)
        run(slot)
        adapters.append(weights(slot.model))
        slot.close()
    assert not same(*adapters)


def texts(examples: list[Example]) -> list[list[int]]:
    return [example.input_ids for example in examples]


def test_more_held_out_than_there_are_rows_is_named(trial: Trial, base_of: Any) -> None:
    spec = trial("bert", "mrpc")
    rows = len(load_task("mrpc", spec.data, base_of(spec)).train)
    with pytest.raises(Exception, match=rf"mrpc: dial.calibration_examples must be below the {rows} training rows"):
        load_task("mrpc", spec.data, base_of(spec), rows)


def test_a_threshold_in_training_is_a_mistake(trial: Trial, open_dialled: Any) -> None:
    slot = open_dialled(trial("bert", "mrpc", train__steps=2, **DIAL))
    with slot.probe.thresholding(0.1), pytest.raises(AssertionError, match="for evaluation"):
        slot.step()
    assert {activation.tau for activation in slot.probe._activations} == {0.0}
    slot.close()


def test_questions_are_calibrated_on_every_window(trial: Trial, base_of: Any) -> None:
    spec = trial("t5", "squad", data__max_source_tokens=24, data__window_overlap_tokens=4)
    data: EncodedTask = load_task("squad", spec.data, base_of(spec), HELD_OUT)
    assert {example.row for example in data.calibration} == set(range(HELD_OUT))
    assert len(data.calibration) > HELD_OUT
