"""The host loop with a list for an inbox: rows in order, failures as data, nothing lost and nothing left."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deft_ray.models.base import Base, load_base
from deft_ray.results.records import RecordLog
from deft_ray.spec.schema import TrialSpec
from deft_ray.sweep.books import to_record
from deft_ray.train.batches import BatchOrder
from deft_ray.train.course import evaluation_steps
from deft_ray.train.host import Host, Taken, fingerprint
from deft_ray.train.loading import load_task
from deft_ray.train.pack import Found
from deft_ray.train.ranks import Ranks
from deft_ray.train.slot import Slot
from tests.tiny import tiny_trial

Trial = Callable[..., TrialSpec]
Row = dict[str, Any]


class Killed(BaseException):
    """The worker is gone: nobody handles this."""


def kill(*_given: Any, **_options: Any) -> None:
    raise Killed


class Inbox:
    """Trials from a list, rows into a list.

    Args:
        trials: What to run; a text is answered as it is, once.
        stop_at: Ask to stop after so many steps of the host.
        kill_at: Die after so many.
        stops: Ask a trial to stop at this number of its own steps.
    """

    def __init__(
        self,
        *trials: TrialSpec | Taken | str,
        stop_at: int | None = None,
        kill_at: int | None = None,
        stops: dict[str, int] | None = None,
    ) -> None:
        self.trials: list[TrialSpec | Taken | str] = [*trials, "closed"]
        self.stop_at, self.kill_at, self.stops = stop_at, kill_at, stops or {}
        self.steps, self.followed = 0, list[str]()
        self.stepped = Counter[str]()
        self.sent: list[tuple[str, Row]] = []
        self.slots: list[int] = []
        self.limits: list[int | None] = []

    def next_trial(self, wait: bool) -> Taken | str:
        found = self.trials.pop(0)
        return Taken(found) if isinstance(found, TrialSpec) else found

    def no_room(self) -> None:
        pass

    def follow(self, taken: Taken) -> None:
        self.followed.append(taken.trial.trial)

    def stop_requested(self, trial: str) -> bool:
        self.steps += 1
        self.stepped[trial] += 1
        if self.steps == self.kill_at:
            raise Killed
        return self.steps == self.stop_at or self.stepped[trial] == self.stops.get(trial)

    def send(self, trial: str, row: Row) -> None:
        assert trial in self.followed
        self.sent.append((trial, row))

    def has_slots(self, slots: int, limit: int | None) -> None:
        self.slots.append(slots)
        self.limits.append(limit)

    @property
    def rows(self) -> list[Row]:
        return [row for _, row in self.sent]

    def rows_of(self, trial: str) -> list[Row]:
        return [row for sender, row in self.sent if sender == trial]

    @property
    def kinds(self) -> list[str]:
        return [row["kind"] for row in self.rows]


@pytest.fixture(scope="module")
def base(tiny_models: dict[str, Path]) -> Base:
    return load_base(str(tiny_models["t5"]), "t5")


@pytest.fixture
def trial(tiny_models: dict[str, Path], tiny_data: Path) -> Trial:
    def make(**leaves: Any) -> TrialSpec:
        return tiny_trial(tiny_models["t5"], "t5", tiny_data, leaves.pop("task", "mrpc"), **leaves)

    return make


@pytest.fixture
def serve(base: Base, ranks: Ranks, tmp_path: Path) -> Callable[..., list[Row]]:
    def run(inbox: Inbox) -> list[Row]:
        Host(base, ranks, inbox, str(tmp_path / "checkpoints"), "h0").serve()
        return inbox.rows

    return run


def numbers(row: Row) -> Row:
    """What an end row says of the trial itself."""
    said = ("steps", "predictions")
    return {key: value for key, value in row.items() if key in said or key.startswith(("score", "extra", "density"))}


def test_rows_come_in_order_and_say_what_a_record_needs(trial: Trial, serve: Any) -> None:
    rows = serve(Inbox(trial(train__steps=4, train__evaluations=2, deft__alpha=1.0)))

    assert [(row["kind"], row.get("step", row.get("steps"))) for row in rows if row["kind"] != "end"] == [
        ("train", 1),
        ("train", 2),
        ("eval", 2),
        ("train", 3),
        ("train", 4),
        ("eval", 4),
    ]
    train, evaluation, end = rows[0], rows[-2], rows[-1]
    assert train.keys() == {"kind", "step", "time", "loss", "task_loss", "density_loss", "learning_rate"}
    assert train["loss"] == pytest.approx(train["task_loss"] + 2 * train["density_loss"], rel=1e-6)
    assert (end["kind"], end["status"], end["steps"], end["host"]) == ("end", "complete", 4, "h0")
    assert numbers(end) == {**numbers(evaluation), "steps": 4, "predictions": end["predictions"]}
    assert end["predictions"].keys() == {"0", "label"}
    right = [said == true for said, true in zip(*end["predictions"].values(), strict=True)]
    assert end["score"] == sum(right) / len(right)
    assert end["score_metric"] == "accuracy"
    assert list(end["extra_scores"]) == ["f1"]
    assert 0 < end["density"] < 1
    assert len(end["density_layers"]) == 4
    assert (end["dtype"], end["activation"]) == ("float32", "NewGELUActivation")
    assert end["wall_s"] == end["ended_at"] - end["started_at"] >= sum(end["times"].values()) - 0.05
    assert end["times"].keys() == {"startup_s", "train_s", "eval_s", "save_s"}
    assert end["peak_memory_gib"] > 0.1
    assert {"torch", "peft", "deepspeed", "python"} <= end["versions"].keys()
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)


@pytest.mark.parametrize(("activation", "name"), [("stock", "NewGELUActivation"), ("fused", "GELUTanh")])
def test_the_end_says_which_activation_was_computed(trial: Trial, serve: Any, activation: str, name: str) -> None:
    """Exact zeros differ between the two."""
    end = serve(Inbox(trial(train__steps=1, deft__alpha=1.0, model__activation=activation)))[-1]
    assert (end["status"], end["activation"]) == ("complete", name)


def test_the_end_says_what_is_doubtful(trial: Trial, serve: Any) -> None:
    leaves = {"deft__approximation": "tanh", "deft__beta": 20.0}
    doubtful, off = (serve(Inbox(trial(train__steps=1, deft__alpha=alpha, **leaves)))[-1] for alpha in (1.0, 0.0))
    assert doubtful["warning"].startswith("deft.approximation 'tanh' on NewGELUActivation: ")
    assert off["warning"] is None


def test_the_end_says_what_was_used_and_how_much_was_trained(
    base: Base, trial: Trial, serve: Any, tmp_path: Path
) -> None:
    """LoRA of rank r on a matrix of m x n has r (m + n) parameters. The record that is kept says the same."""
    spec = trial(train__steps=2, deft__alpha=1.0, deft__adaptive=True, deft__approximation="auto")
    rows = serve(Inbox(spec))
    end = rows[-1]
    assert (end["approximation"], end["beta"]) == ("l0", None)
    assert end["lambda_layers"].keys() == end["density_layers"].keys() == {site.name for site in base.sites}
    assert all(0.0 <= value <= 1.0 for value in end["lambda_layers"].values())
    assert len(set(end["lambda_layers"].values())) > 1, "drawn with noise"
    assert end["lambda_layers"] == json.loads((Path(end["adapter"]) / "layer_scales.json").read_text())
    stacks = (base.model.encoder, base.model.decoder)  # the output layer has no adapter
    matrices = [m for stack in stacks for m in stack.modules() if isinstance(m, torch.nn.Linear)]
    trained = sum(4 * sum(m.weight.shape) for m in matrices)  # the adapter's, layer scales aside
    whole = trained + sum(p.numel() for p in base.model.parameters())
    assert end["trainable_share"] == pytest.approx(trained / whole, rel=1e-9)
    log = RecordLog(tmp_path / "records.jsonl")
    log.append(to_record(spec, rows))
    (kept,) = log.read()
    for name in ("approximation", "beta", "lambda_layers", "density_layers", "trainable_share", "activation"):
        assert getattr(kept, name) == end[name], name


def test_the_end_says_which_beta_tanh_had_where_none_was_asked_for(
    tiny_models: dict[str, Path], tiny_data: Path, ranks: Ranks, tmp_path: Path
) -> None:
    base = load_base(str(tiny_models["relu-t5"]), "t5")
    spec = tiny_trial(tiny_models["relu-t5"], "t5", tiny_data, "mrpc", train__steps=2, deft__loss_of="feature_map")
    inbox = Inbox(spec)
    Host(base, ranks, inbox, str(tmp_path / "checkpoints"), "h0").serve()
    record = to_record(spec, inbox.rows)
    assert (record.approximation, record.beta) == ("tanh", 20.0)


def test_long_trials_report_about_twenty_losses(trial: Trial, serve: Any) -> None:
    rows = serve(Inbox(trial(train__steps=44, train__batch_size=1, data__validation_examples=2)))

    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(2, 45, 2))


def test_the_finished_adapter_is_stored_and_the_checkpoints_are_gone(trial: Trial, serve: Any, tmp_path: Path) -> None:
    end = serve(Inbox(trial(trial="t0007", train__checkpoint_every_s=0.0)))[-1]
    folder = tmp_path / "checkpoints" / "t0007"

    assert end["adapter"] == str(folder / "adapter")
    assert [path.name for path in folder.iterdir()] == ["adapter"]
    assert {path.name for path in (folder / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert len(load_file(folder / "adapter" / "adapter_model.safetensors")) == 2 * (4 * 6 + 3 * 4)


@pytest.mark.parametrize(
    ("leaves", "error"),
    [
        ({"adapter__target_modules": ["query"]}, "ValueError: adapter.target_modules: no module is named query"),
        ({"data__dir": "/nowhere"}, "SetupError: /nowhere/glue/mrpc/train.parquet: no such file"),
    ],
)
def test_a_trial_that_raises_is_a_row_and_the_next_one_runs(
    trial: Trial, serve: Any, leaves: dict[str, Any], error: str
) -> None:
    good = trial(trial="t0002", adapter__lora_dropout=0.1)
    want = serve(Inbox(good))[-1]
    rows = serve(Inbox(trial(trial="t0001", **leaves), good))

    assert (rows[0]["kind"], rows[0]["status"]) == ("end", "failed")
    assert rows[0]["cause"].startswith("Traceback")
    assert error in rows[0]["cause"]
    assert "score" not in rows[0]
    assert rows[0]["wall_s"] >= 0
    assert rows[-1]["status"] == "complete"
    assert numbers(rows[-1]) == numbers(want)


def test_a_trial_that_breaks_in_a_step_is_a_row_and_the_next_one_runs(
    trial: Trial, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = trial(trial="t0002", adapter__lora_dropout=0.1)
    want = serve(Inbox(good))[-1]
    take = Slot.take

    def breaks(slot: Slot, found: Found) -> Any:
        if slot.trial.trial == "t0001" and slot.done == 2:
            raise RuntimeError("CUDA out of memory")
        return take(slot, found)

    monkeypatch.setattr(Slot, "take", breaks)
    rows = serve(Inbox(trial(trial="t0001"), good))

    failed = next(row for row in rows if row["kind"] == "end")
    assert failed["status"] == "failed"
    assert "RuntimeError: CUDA out of memory" in failed["cause"]
    assert rows[-1]["status"] == "complete"
    assert numbers(rows[-1]) == numbers(want)


@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_a_loss_that_is_no_number_is_a_divergence(trial: Trial, serve: Any, steps: int, zero_stage: int) -> None:
    """Also where the last step breaks the model, and no later loss tells."""
    wild = trial(
        trial="t0001",
        train__learning_rate=1e30,
        train__steps=steps,
        train__warmup_share=0.0,
        train__zero_stage=zero_stage,
    )
    rows = serve(Inbox(wild, trial(trial="t0002")))
    ends = [row for row in rows if row["kind"] == "end"]

    assert [row["status"] for row in ends] == ["diverged", "complete"]
    assert "not finite" in ends[0]["cause"]
    assert "score" not in ends[0]


def test_a_trial_that_is_out_of_time_fails_and_the_next_one_runs(trial: Trial, serve: Any) -> None:
    """Unless it was its last step."""
    late = trial(trial="t0007", train__steps=4, train__max_time_s=1e-6)
    rows = serve(Inbox(late, trial(trial="t0008", train__steps=1, train__max_time_s=1e-6)))
    first, second = (row for row in rows if row["kind"] == "end")
    assert (first["status"], second["status"]) == ("failed", "complete")
    assert first["cause"].endswith("TimeoutError: train.max_time_s: 1e-06 s are over after step 1 of 4\n")


def test_a_trials_time_is_that_of_all_its_lives(trial: Trial, serve: Any, tmp_path: Path) -> None:
    spec = trial(train__steps=6, train__checkpoint_every_s=0.0, train__max_time_s=1000.0)
    with pytest.raises(Killed):
        serve(Inbox(spec, kill_at=3))
    (latest,) = tmp_path.glob("**/latest.json")
    saved = json.loads(latest.read_text())
    saved["clock"]["train_s"] += 1000.0
    latest.write_text(json.dumps(saved))
    end = serve(Inbox(spec))[-1]
    assert end["status"] == "failed"
    assert "1000 s are over after step 3 of 6" in end["cause"]


def test_a_stopped_trial_ends_after_its_step(trial: Trial, serve: Any) -> None:
    inbox = Inbox(trial(trial="t0001", train__evaluations=4), trial(trial="t0002"), stop_at=2)
    rows = serve(inbox)
    first = rows[: inbox.kinds.index("end") + 1]

    assert [row["kind"] for row in first] == ["train", "eval", "train", "end"]
    assert (first[-1]["status"], first[-1]["steps"], first[-1]["adapter"]) == ("stopped", 2, None)
    assert first[-1]["score"] == first[1]["score"], "what it had reached"
    assert rows[-1]["status"] == "complete"


@pytest.mark.parametrize(("zero_stage", "task"), [(0, "mrpc"), (2, "squad")])
def test_a_killed_trial_resumes_and_ends_as_the_undisturbed_one(
    trial: Trial, serve: Any, tmp_path: Path, zero_stage: int, task: str
) -> None:
    leaves: dict[str, Any] = {
        "task": task,
        "adapter__lora_dropout": 0.1,
        "deft__alpha": 1.0,
        "data__max_target_tokens": 4,
        "train__steps": 6,
        "train__evaluations": 3,
        "train__zero_stage": zero_stage,
        "train__checkpoint_every_s": 0.0,
    }
    calm = serve(Inbox(trial(trial="t0001", **leaves)))
    want = load_file(Path(calm[-1]["adapter"]) / "adapter_model.safetensors")
    killed = Inbox(trial(trial="t0002", **leaves), kill_at=4)
    with pytest.raises(Killed):
        serve(killed)
    again = Inbox(trial(trial="t0002", **leaves))
    rows = serve(again)

    assert "end" not in killed.kinds
    assert [row["step"] for row in rows if row["kind"] == "train"] == [4, 5, 6]
    assert rows[-1]["status"] == "complete"
    assert numbers(rows[-1]) == numbers(calm[-1])
    got = load_file(Path(rows[-1]["adapter"]) / "adapter_model.safetensors")
    assert all((got[key] == want[key]).all() for key in want)
    losses = {row["step"]: row["loss"] for row in killed.rows + rows if row["kind"] == "train"}
    assert losses == {row["step"]: row["loss"] for row in calm if row["kind"] == "train"}


def test_a_resumed_trial_tells_of_every_rung_again(trial: Trial, serve: Any) -> None:
    """Killed after its second rung: the scheduler may not have seen the first, and may stop it for that one."""
    leaves = {"train__steps": 8, "train__checkpoint_every_s": 0.0, "rungs": (0.25, 0.5)}
    killed = Inbox(trial(**leaves), kill_at=6)
    with pytest.raises(Killed):
        serve(killed)
    rows = serve(Inbox(trial(**leaves)))
    before = [row for row in killed.rows if row.get("rung") is not None]
    assert [(row["rung"], row["step"]) for row in before] == [(0, 2), (1, 4)]
    assert rows[:2] == before
    assert not any(row.get("rung") is not None for row in rows[2:])


def test_rungs_of_a_trial_in_epochs_are_shares_of_its_steps(trial: Trial, serve: Any) -> None:
    """Thirty examples, twice over, in batches of six: ten steps."""
    rows = serve(Inbox(trial(train__steps=None, train__epochs=2.0, rungs=(1 / 9, 1 / 3))))
    assert rows[-1]["steps"] == 10
    assert [(row["rung"], row["step"]) for row in rows if row.get("rung") is not None] == [(0, 1), (1, 3)]
    assert rows[-1]["warning"] is None


def test_a_rung_is_a_share_of_the_data(trial: Trial, serve: Any, monkeypatch: Any) -> None:
    """One epoch of thirty examples: at a fifth of the steps six of them were seen, and none twice."""
    seen: list[int] = []
    real = BatchOrder.indices

    def indices(order: BatchOrder, step: int) -> list[int]:
        seen.extend(found := real(order, step))
        return found

    monkeypatch.setattr(BatchOrder, "indices", indices)
    at_rung: list[int] = []
    inbox = Inbox(trial(train__steps=None, train__epochs=1.0, rungs=(0.2, 0.6)))
    send = inbox.send

    def noting(name: str, row: dict[str, Any]) -> None:
        if row.get("rung") is not None:
            at_rung.append(len(set(seen)))
        send(name, row)

    monkeypatch.setattr(inbox, "send", noting)
    serve(inbox)
    assert at_rung == [6, 18]
    assert sorted(seen) == list(range(30))


def test_a_rung_that_falls_on_another_is_said(trial: Trial, serve: Any) -> None:
    rows = serve(Inbox(trial(train__steps=None, train__epochs=0.4, rungs=(1 / 9, 1 / 3))))
    assert rows[-1]["steps"] == 2
    assert rows[-1]["warning"] == "1 of 2 rungs fall on another one or on the last step"


def test_predictions_outlive_a_kill_after_the_last_evaluation(trial: Trial, serve: Any, monkeypatch: Any) -> None:
    leaves = {"train__steps": 3, "train__checkpoint_every_s": 0.0}
    calm = serve(Inbox(trial(trial="t0001", **leaves)))
    with monkeypatch.context() as patch:
        patch.setattr("deft_ray.train.course.Run._end", kill)
        with pytest.raises(Killed):
            serve(Inbox(trial(trial="t0002", **leaves)))
    rows = serve(Inbox(trial(trial="t0002", **leaves)))
    assert [row["kind"] for row in rows] == ["end"]
    assert numbers(rows[0]) == numbers(calm[-1])


def test_a_checkpoint_of_another_configuration_is_not_taken(trial: Trial, serve: Any) -> None:
    with pytest.raises(Killed):
        serve(Inbox(trial(train__checkpoint_every_s=0.0), kill_at=3))
    rows = serve(Inbox(trial(train__checkpoint_every_s=0.0, deft__alpha=2.0)))

    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4]


def test_waiting_is_not_the_end(trial: Trial, serve: Any) -> None:
    inbox = Inbox(trial(trial="t0001"), trial(trial="t0002"))
    inbox.trials.insert(1, "wait")
    inbox.trials.insert(0, "wait")
    serve(inbox)

    assert inbox.followed == ["t0001", "t0002"]
    assert inbox.kinds.count("end") == 2


def test_five_trials_leave_nothing_on_the_base(base: Base, trial: Trial, serve: Any) -> None:
    names = {name for name, _ in base.model.named_modules()}
    attributes = set(vars(base.model))
    kinds: list[dict[str, Any]] = [
        {},
        {"train__gradient_checkpointing": True, "deft__alpha": 1.0},
        {"adapter__target_modules": ["query"]},
        {"train__learning_rate": 1e30},
        {"train__zero_stage": 2, "task": "squad", "data__max_target_tokens": 3},
    ]
    before = hook_count(base)
    serve(Inbox(*(trial(trial=f"t{number:04d}", **leaves) for number, leaves in enumerate(kinds))))

    assert hook_count(base) == before
    assert all(not site.module._forward_hooks and not site.module._forward_pre_hooks for site in base.sites)
    assert {name for name, _ in base.model.named_modules()} == names
    assert set(vars(base.model)) - attributes <= {"_require_grads_hooks"}
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in base.model.parameters())


def hook_count(base: Base) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in base.model.modules() for kind in kinds)


def test_a_task_is_read_once_per_host(base: Base, ranks: Ranks, trial: Trial, tmp_path: Path, monkeypatch: Any) -> None:
    read: list[str] = []

    def counted(task: str, *arguments: Any) -> Any:
        read.append(task)
        return load_task(task, *arguments)

    monkeypatch.setattr("deft_ray.train.loading.load_task", counted)
    trials = [trial(trial="t0001"), trial(trial="t0002", seed=1), trial(trial="t0003", task="rte")]
    Host(base, ranks, Inbox(*trials), str(tmp_path), "h0").serve()

    assert read == ["mrpc", "rte"]


@pytest.mark.parametrize(
    ("steps", "evaluations", "want"),
    [(10, 1, {10}), (10, 2, {5, 10}), (10, 4, {2, 5, 8, 10}), (3, 9, {1, 2, 3}), (1, 1, {1}), (7, 3, {2, 5, 7})],
)
def test_evaluations_are_spread_and_the_last_step_has_one(steps: int, evaluations: int, want: set[int]) -> None:
    assert evaluation_steps(steps, evaluations) == want


def test_fingerprints_tell_configurations_apart(trial: Trial) -> None:
    specs = [trial(), trial(seed=1), trial(trial="t0001"), trial(deft__alpha=1.0), trial(train__learning_rate=0.02)]

    assert fingerprint(trial()) == fingerprint(trial())
    assert len({fingerprint(spec) for spec in specs}) == len(specs)


def test_the_dial_is_turned_at_the_end_and_at_rungs_where_it_is_judged(trial: Trial, serve: Any) -> None:
    dial = {"dial__taus": [0.01, 0.1], "dial__calibration_examples": 5}
    judged = {"rungs": (0.25,), "judged_at": 0.1, **dial}
    rows = serve(Inbox(trial(train__steps=4, train__evaluations=2, deft__alpha=1.0, **judged)))
    turned = {row["step"]: list(row["dial"]) for row in rows if row["kind"] == "eval"}
    assert turned == {1: ["0", "0.1"], 2: ["0", "0.1"], 4: ["0", "0.01", "0.1"]}
    end = rows[-1]
    assert end["dial"]["0"]["score"] == end["score"]
    assert {"score", "density", "calibration_score", "calibration_density"} == end["dial"]["0.1"].keys()
    assert all(row["dial"]["0.1"].keys() == {"score", "density"} for row in rows if row.get("rung") is not None)

    exact = serve(Inbox(trial(train__steps=4, trial="t0001", rungs=(0.25,), **dial)))
    assert {row["step"]: list(row["dial"]) for row in exact if row["kind"] == "eval"} == {
        1: [],
        4: ["0", "0.01", "0.1"],
    }

    baseline = serve(Inbox(trial(train__steps=4, trial="t0002", **judged)))
    assert [list(row["dial"]) for row in baseline if row["kind"] == "eval"] == [[], ["0", "0.01", "0.1"]]
