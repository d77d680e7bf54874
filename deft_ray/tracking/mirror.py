"""Mirror of a sweep in MLflow: one parent run, one nested run per ended trial, the fronts on the parent.

Every write is idempotent. Runs are found again by their tags, metrics carry the record's own times, so that writing the
same record twice, or all records after a crash, leaves what writing them once leaves. A value of the hypervolume's
history is written once: live, as the front was known then; replayed, as all records judge it.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deft_ray.metrics import METRICS
from deft_ray.results.front import REFERENCE, hypervolume, points
from deft_ray.results.points import of_first
from deft_ray.results.records import Record
from deft_ray.tracking.client import connect

SWEEP_TAG = "deft_ray.sweep"
TRIAL_TAG = "deft_ray.trial"
FRONT_TAG = "on_front"
_PARENT_TAG = "mlflow.parentRunId"

_METRICS_A_CALL = 1000
_PARAMS_A_CALL = 100
_PARAM_LENGTH = 6000
_TAG_LENGTH = 5000
_KEY_LENGTH = 250

_NO_METRICS = ("step", "time", "steps", "rung", "started_at")
"""Numbers of a row that are no measurements."""

_RUN_STATUS = {
    "complete": "FINISHED", "failed": "FAILED", "diverged": "FAILED", "pruned": "KILLED", "stopped": "KILLED"
}  # fmt: skip

_OWN_METRICS = [metric.key for metric in METRICS if metric.key in Record.__dataclass_fields__]

Row = Mapping[str, Any]


@dataclass
class _Nested:
    """What is known of one trial's run."""

    run_id: str
    task: str
    on_front: bool


class Mirror:
    """Writes one sweep to MLflow; every method may raise what MLflow raises and may be called again.

    Args:
        tracking_uri: Where MLflow keeps its runs.
        experiment: Name of the experiment; found or created.
        artifact_root: Where a new experiment keeps its artifacts; None leaves it to the server.
        sweep_id: Identity of the sweep: the same id finds the same parent run.
        sweep_name: Name of the parent run.
        started_at: Start of the sweep, unix seconds; now if not given.
    """

    def __init__(
        self,
        tracking_uri: str,
        experiment: str,
        artifact_root: str | None,
        sweep_id: str,
        sweep_name: str,
        started_at: float | None = None,
    ) -> None:
        self._client = connect(tracking_uri)
        self._experiment_id = self._find_or_create_experiment(experiment, artifact_root)
        self.parent_id = self._find_or_create_parent(_key(sweep_id), sweep_name, started_at)
        self._nested: dict[str, _Nested] = {}
        self._fronts: dict[str, frozenset[str]] = {}
        self._logged_steps: dict[str, set[int]] = {}
        self.reload()

    def reload(self) -> None:
        """Look again at what MLflow has; needed after a failure, when a write may have happened without an answer.

        Of several nested runs of one trial only the oldest stays.
        """
        self._logged_steps = {}
        self._nested = {}
        for run in self._search(_PARENT_TAG, self.parent_id):
            tags = run.data.tags
            if tags.get(TRIAL_TAG) in self._nested:
                self._client.delete_run(run.info.run_id)
            elif TRIAL_TAG in tags:
                nested = _Nested(run.info.run_id, tags.get("task", ""), tags.get(FRONT_TAG) == "true")
                self._nested[tags[TRIAL_TAG]] = nested

    def record(
        self,
        record: Record,
        score_drop: float | None = None,
        density_change: float | None = None,
        rows: Sequence[Row] = (),
    ) -> str:
        """Create or complete the nested run of a trial.

        Args:
            record: The trial's record.
            score_drop: Baseline score minus score, if there is a baseline.
            density_change: (baseline density - density) / baseline density, if there is a baseline.
            rows: Metric rows of the trial: ``step``, ``time`` (unix seconds) and numbers.

        Returns:
            The id of the nested run.
        """
        run_id = self._find_or_create_nested(record)
        compared = {"score_drop": score_drop, "density_change": density_change}
        self._log(run_id, _metrics(record, compared, rows), _params(record.config), _tags(record))
        self._client.set_terminated(run_id, status=_RUN_STATUS[record.status], end_time=_ms(record.ended_at))
        return run_id

    def front(
        self,
        task: str,
        trials_on_front: Collection[str],
        hypervolume: float,
        step: int,
        files: Sequence[Path] = (),
        at: float | None = None,
    ) -> None:
        """Say which nested runs stand on a task's front, and keep its hypervolume and files with the parent run.

        Args:
            task: The task.
            trials_on_front: Names of the trials on its front.
            hypervolume: Its hypervolume; logged once for each step.
            step: Number of trials of the sweep that have ended.
            files: Plots and tables to copy to the parent run.
            at: Time of the metric, unix seconds; now if not given.
        """
        self._fronts[task] = frozenset(trials_on_front)
        for trial in self._nested:
            self._mark(trial)
        key = _key(f"hypervolume/{task}")
        if math.isfinite(hypervolume) and step not in self._steps_of(key):
            stamp = _ms(time.time() if at is None else at)
            self._client.log_metric(self.parent_id, key, hypervolume, timestamp=stamp, step=step)
            self._logged_steps[key].add(step)
        for file in files:
            self.add_file(file)

    def add_file(self, file: Path) -> None:
        """Copy a file to the parent run's artifacts, in place of an earlier one of its name."""
        self._client.log_artifact(self.parent_id, str(file))

    def finish(self, status: str = "complete", at: float | None = None) -> None:
        """End the parent run.

        Args:
            status: ``complete``, ``failed`` or ``stopped``.
            at: End of the sweep, unix seconds; now if not given.

        Raises:
            ValueError: If the status is none of a record's.
        """
        if status not in _RUN_STATUS:
            raise ValueError(f"status must be one of {', '.join(_RUN_STATUS)} (got {status!r})")
        self._client.set_tag(self.parent_id, "status", status)
        end = _ms(time.time() if at is None else at)
        self._client.set_terminated(self.parent_id, status=_RUN_STATUS[status], end_time=end)

    # ---- runs

    def _find_or_create_experiment(self, name: str, artifact_root: str | None) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            return str(self._client.create_experiment(name, artifact_location=artifact_root))
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _find_or_create_parent(self, sweep_id: str, sweep_name: str, started_at: float | None) -> str:
        found = self._search(SWEEP_TAG, sweep_id)
        if found:
            run_id = found[0].info.run_id
            self._client.update_run(run_id, status="RUNNING")
            return str(run_id)
        start = _ms(time.time() if started_at is None else started_at)
        tags = {SWEEP_TAG: sweep_id}
        run = self._client.create_run(self._experiment_id, start_time=start, tags=tags, run_name=sweep_name)
        return str(run.info.run_id)

    def _find_or_create_nested(self, record: Record) -> str:
        if record.trial not in self._nested:
            tags = {_PARENT_TAG: self.parent_id, TRIAL_TAG: record.trial, FRONT_TAG: "false", "task": record.task}
            run = self._client.create_run(
                self._experiment_id,
                start_time=_ms(record.started_at),
                tags=tags,
                run_name=f"{record.trial} {record.task}",
            )
            self._nested[record.trial] = _Nested(run.info.run_id, record.task, on_front=False)
        self._mark(record.trial)
        return self._nested[record.trial].run_id

    def _search(self, tag: str, value: str) -> list[Any]:
        """Runs of the experiment with the tag, oldest first."""
        found: list[Any] = []
        token = None
        while True:
            where = f"tags.`{tag}` = '{value}'"
            page = self._client.search_runs([self._experiment_id], filter_string=where, page_token=token)
            found += page
            token = page.token
            if not token:
                return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))

    # ---- content

    def _mark(self, trial: str) -> None:
        """Bring the front tag of a trial's run up to date, where the front of its task is known."""
        nested = self._nested[trial]
        stands = trial in self._fronts.get(nested.task, ())
        if nested.task in self._fronts and nested.on_front != stands:
            self._client.set_tag(nested.run_id, FRONT_TAG, str(stands).lower())
            nested.on_front = stands

    def _steps_of(self, key: str) -> set[int]:
        if key not in self._logged_steps:
            history = self._client.get_metric_history(self.parent_id, key)
            self._logged_steps[key] = {metric.step for metric in history}
        return self._logged_steps[key]

    def _log(
        self,
        run_id: str,
        metrics: Sequence[tuple[str, float, int, int]],
        params: Mapping[str, str],
        tags: Mapping[str, str],
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        for some_params in _chunks(list(params.items()), _PARAMS_A_CALL):
            self._client.log_batch(run_id, params=[Param(key, value) for key, value in some_params])
        for some_tags in _chunks(list(tags.items()), _PARAMS_A_CALL):
            self._client.log_batch(run_id, tags=[RunTag(key, value) for key, value in some_tags])
        for some_metrics in _chunks(metrics, _METRICS_A_CALL):
            self._client.log_batch(run_id, metrics=[Metric(*metric) for metric in some_metrics])


def replay(
    mirror: Mirror,
    records: Iterable[Record],
    max_score_drop: float | None = None,
    rows: Mapping[str, Sequence[Row]] | None = None,
    files: Sequence[Path] = (),
    status: str = "complete",
    ref: tuple[float, float] = REFERENCE,
) -> None:
    """Rebuild a sweep's runs from its records.

    Args:
        mirror: Mirror of the sweep; its store may be empty or hold any part of the sweep.
        records: All records, in the order in which the trials ended.
        max_score_drop: Score limit of the sweep, or None.
        rows: Metric rows of each trial, where they were kept.
        files: Plots and tables to copy to the parent run.
        status: How the sweep ended.
        ref: Reference point of the hypervolume, score and density.

    Raises:
        RecordsError: If one task was measured in more than one dtype.
    """
    records = list(records)
    found = points(records, max_score_drop)
    trained = [point for point in found if point.tau == 0.0]
    for step, (record, point) in enumerate(zip(records, trained, strict=True), start=1):
        mirror.record(record, point.score_drop, point.density_change, (rows or {}).get(record.trial, ()))
        so_far = [p for p in of_first(found, step) if p.task == record.task]
        chosen = [p.trial for p in found if p.on_front and p.task == record.task]
        mirror.front(record.task, chosen, hypervolume(so_far, ref), step, at=record.ended_at)
    for file in files:
        mirror.add_file(file)
    mirror.finish(status, at=max((record.ended_at for record in records), default=None))


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _key(name: str) -> str:
    """A name that MLflow takes as a key."""
    return re.sub(r"[^\w\-./: ]", "_", name, flags=re.ASCII)[:_KEY_LENGTH]


def _ms(seconds: float) -> int:
    return round(seconds * 1000) if math.isfinite(seconds) else 0


def _params(config: Mapping[str, Any]) -> dict[str, str]:
    return {_key(name): str(value)[:_PARAM_LENGTH] for name, value in config.items()}


def _tags(record: Record) -> dict[str, str]:
    tags = {
        "status": record.status,
        "baseline": str(record.baseline).lower(),
        "task": record.task,
        "seed": str(record.seed),
        "steps": str(record.steps),
        "score_metric": record.score_metric,
        "dtype": record.dtype,
        "activation": record.activation,
        "adapter": record.adapter or "",
        "started_from": record.started_from,
        "host": record.host,
        "mlflow.note.content": f"```\n{record.cause[-_TAG_LENGTH + 8 :]}\n```" if record.cause else "",
    }
    tags.update({f"version.{name}": version for name, version in record.versions.items()})
    return {_key(name): value[:_TAG_LENGTH] for name, value in tags.items() if value}


def _metrics(
    record: Record, compared: Mapping[str, float | None], rows: Sequence[Row]
) -> list[tuple[str, float, int, int]]:
    """(key, value, milliseconds, step), one value for each key and step; the record's own values win over the rows'."""
    last = max([record.steps, *(int(row["step"]) for row in rows)])
    values: dict[tuple[str, int], tuple[str, float, int, int]] = {}
    for row in rows:
        step, stamp = int(row["step"]), _ms(float(row["time"]))
        for name, value in _numbers(row, leave_out=_NO_METRICS):
            values[name, step] = (name, value, stamp, step)
    for name, value in _numbers(_final(record, compared)):
        values[name, last] = (name, value, _ms(record.ended_at), last)
    return list(values.values())


def _final(record: Record, compared: Mapping[str, float | None]) -> dict[str, Any]:
    groups = {
        "extra_scores": record.extra_scores,
        "density_at_tau": record.density_at_tau,
        "density_layers": record.density_layers,
        **{f"dial/{tau}": found for tau, found in record.dial.items()},
    }
    grouped = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
    own = {name: getattr(record, name) for name in _OWN_METRICS}
    return {**grouped, **record.times, **own, **compared}


def _numbers(values: Mapping[str, Any], leave_out: Collection[str] = ()) -> Iterator[tuple[str, float]]:
    """The finite numbers among the values; MLflow would turn a NaN into 0 and an infinity into 1.8e308."""
    for name, value in values.items():
        if name in leave_out or isinstance(value, (bool, str)) or value is None:
            continue
        if isinstance(number := _to_float(value), float) and math.isfinite(number):
            yield _key(name), number


def _to_float(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
