"""The sweep as Ray Tune sees it: a searcher that reads the schedule, a light trainable, a callback that keeps books."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from deft_ray.metrics import tau_key
from deft_ray.spec.schema import TrialSpec
from deft_ray.sweep.rungs import Arrival, Rungs
from deft_ray.sweep.schedule import Nothing

_log = logging.getLogger(__name__)


class _StaysHere:
    """Tune pickles and copies what it is given; what belongs to the driver's process stays there."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {}


class ScheduleSearcher(_StaysHere, Searcher):
    """Hands Tune the next trial of a schedule; all its state is in the run directory, so Tune has none to save.

    Args:
        next_trial: Returns the next trial, or why there is none.
        behind: Tells of a trial which others have to train before it is begun.
    """

    def __init__(self, next_trial: Callable[[], TrialSpec | Nothing], behind: Callable[[TrialSpec], list[str]]) -> None:
        super().__init__(metric=None, mode=None)
        self._next_trial, self._behind = next_trial, behind

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # Tune takes FINISHED too
        """Return the next trial's config, None for "ask again", or FINISHED."""
        trial = self._next_trial()
        if trial is Nothing.YET:
            return None
        if trial is Nothing.MORE:
            return str(Searcher.FINISHED)
        assert isinstance(trial, TrialSpec)
        return {"trial": trial.trial, "spec": trial.model_dump_json(), "behind": self._behind(trial)}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Accept whatever Tune says: objectives and space come from the schedule."""
        return True

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: the callback takes note of ended trials."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the schedule is rebuilt from records."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the schedule is rebuilt from records."""

    def get_state(self) -> dict[str, Any]:
        """Return no state."""
        return {}

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: the schedule is rebuilt from records."""


class RungScheduler(_StaysHere, FIFOScheduler):
    """Stops a trial that the rungs do not let through; all its state is in their journal.

    Args:
        rungs: Judge every arrival; None lets everything through.
    """

    def __init__(self, rungs: Rungs | None) -> None:
        super().__init__()
        self._rungs = rungs

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return whether a trial goes on, by the evaluations at rungs that came with this result."""
        rows = result.get("rows", ()) if self._rungs is not None else ()
        goes_on = [self._judge(trial, row) for row in rows if row.get("rung") is not None]
        return str(TrialScheduler.CONTINUE if all(goes_on) else TrialScheduler.STOP)

    def _judge(self, trial: Any, row: dict[str, Any]) -> bool:
        assert self._rungs is not None
        spec = TrialSpec.model_validate_json(trial.config["spec"])
        at_tau = row["dial"].get(tau_key(spec.judged_at), {}) if spec.judged_at and not spec.baseline else row
        return self._rungs.arrive(
            task=spec.task,
            trial=spec.trial,
            seed=spec.seed,
            baseline=spec.baseline,
            rung=row["rung"],
            step=row["step"],
            score=at_tau["score"],
            density=at_tau["density"],
        )


def asha_lets_on(others: Sequence[Arrival], mine: Arrival, factor: float) -> bool:
    """Ask Ray Tune's ASHA, which looks at the score alone, whether an arrival trains on.

    Asked anew for each arrival, with those before it, so that a resumed sweep needs none of its state.
    """
    scheduler = AsyncHyperBandScheduler("rung", "score", "max", max_t=2, grace_period=1, reduction_factor=factor)
    answer = ""
    for arrival in (*others, mine):
        trial: Any = SimpleNamespace(trial_id=arrival.trial)
        result = {"rung": 1, "score": arrival.score}
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]  # it asks the controller for nothing
        answer = scheduler.on_trial_result(None, trial, result)  # type: ignore[arg-type]
    return answer == TrialScheduler.CONTINUE


def build_trainable(dispatcher: Any, resources: dict[str, float]) -> Any:
    """Build the function that is one Tune trial: submit, then forward rows until the last.

    Tune is told of evaluations and of the end; training rows travel with them.

    Args:
        dispatcher: Handle of the dispatcher.
        resources: What a trial asks Tune for: a crumb of the driver's node, no CPU.
    """

    def trial(config: dict[str, Any]) -> None:
        name = config["trial"]
        ray.get(dispatcher.submit.remote(name, config["spec"], config["behind"]))
        seen, ended = 0, False
        while not ended:
            held = []
            for row in ray.get(dispatcher.rows.remote(name, seen)):
                held.append({**row, "number": seen})
                seen, ended = seen + 1, row["kind"] == "end"
                if row["kind"] != "train":
                    tune.report({"rows": held, "score": row.get("score"), "density": row.get("density")})
                    held = []

    return tune.with_resources(trial, resources)


class BookKeeper(_StaysHere, tune.Callback):
    """Collects each trial's rows and passes them on once, when the trial has ended.

    Args:
        ended: Called with the trial and all its rows; the last is of kind ``end``.
        dispatcher: Handle of the dispatcher, to free a slot whose trial Tune has stopped.
    """

    def __init__(self, ended: Callable[[TrialSpec, list[dict[str, Any]]], None], dispatcher: Any) -> None:
        self._ended, self._dispatcher = ended, dispatcher
        self._rows: dict[str, dict[int, dict[str, Any]]] = {}
        self._done: set[str] = set()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Take rows; a trial whose last row has come has ended."""
        rows = self._rows.setdefault(trial.config["trial"], {})
        rows.update({row["number"]: row for row in result.get("rows", ())})
        if rows and rows[max(rows)]["kind"] == "end":
            self._end(trial, None)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial without a last row was stopped by the scheduler: free its slot."""
        rows, now = self._rows.get(trial.config["trial"], {}), time.time()
        judged = [row for row in rows.values() if row.get("rung") is not None]
        began, step = (judged[-1]["started_at"], judged[-1]["step"]) if judged else (now, 0)
        last = {"kind": "end", "status": "pruned", "cause": f"stopped by the scheduler after step {step}"}
        self._end(trial, {**last, "ended_at": now, "wall_s": now - began})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The Tune trial itself broke, beyond Tune's retries."""
        cause = f"the Tune trial failed: {trial.get_pickled_error() or 'no reason given'}"
        self._end(trial, {"kind": "end", "status": "failed", "cause": cause})

    def _end(self, trial: Any, last: dict[str, Any] | None) -> None:
        name = trial.config["trial"]
        if name in self._done:
            return
        self._done.add(name)
        rows = [row for _, row in sorted(self._rows.pop(name, {}).items())]
        if last is not None:
            self._dispatcher.cancel.remote(name)
            rows.append(last)
        elif rows[-1]["status"] == "complete":
            rows[-1]["predictions"] = ray.get(self._dispatcher.predictions.remote(name))
        self._dispatcher.forget.remote(name)
        self._ended(TrialSpec.model_validate_json(trial.config["spec"]), rows)
