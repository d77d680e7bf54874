"""The books of a running sweep: an ended trial becomes a record, a row for the search, a line, and a run in MLflow.

In this order: the record is the truth, the rest can be rebuilt from it.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from deft_ray.results.across import ALL_TASKS, across_tasks
from deft_ray.results.front import front, hypervolume, mark, misplaced_reference, points, varying, write_front_csv
from deft_ray.results.points import Point, compare, merge, of_first
from deft_ray.results.predictions import write_predictions
from deft_ray.results.records import Record, RecordLog
from deft_ray.results.report import write_results
from deft_ray.spec.catalog import find_task
from deft_ray.spec.resolve import is_read
from deft_ray.spec.schema import SweepSpec, TrialSpec
from deft_ray.sweep.live import LiveLines
from deft_ray.sweep.run_dir import RunDir
from deft_ray.sweep.schedule import Schedule
from deft_ray.tracking.client import default_tracking
from deft_ray.tracking.mirror import Mirror
from deft_ray.tracking.thread import MirrorThread


class Books:
    """Keeps one sweep's records and all that hangs on them.

    Args:
        spec: The sweep's spec.
        run_dir: Its run directory, created.
        schedule: Told of every ended trial.
        slots: Trials that train at once, for the estimate of the time left.
    """

    def __init__(self, spec: SweepSpec, run_dir: RunDir, schedule: Schedule, slots: int) -> None:
        self.spec, self.run_dir, self.schedule = spec, run_dir, schedule
        run_dir.end.unlink(missing_ok=True)
        self._log = RecordLog(run_dir.records)
        self.records = self._log.read()
        self.live = LiveLines(len(self.records), slots, sys.stdout)
        default_uri, artifacts = default_tracking(run_dir.path)
        self.tracking_uri = spec.tracking.uri or default_uri
        artifact_root = artifacts if spec.tracking.uri is None else None
        started = min((record.started_at for record in self.records), default=time.time())
        self._mirror = MirrorThread(
            lambda: Mirror(
                self.tracking_uri, spec.tracking.experiment, artifact_root, run_dir.sweep_id, spec.name, started
            )
        )
        found = self._points()
        for number, record in enumerate(self.records, start=1):
            self._mirror_record(record, found, run_dir.read_curve(record.trial), number)

    def ended(self, trial: TrialSpec, rows: list[dict[str, Any]]) -> None:
        """Take an ended trial: its spec and all its rows, the last of kind ``end``.

        A trial that was given up for lack of a host leaves no record: it has not ended, ``--resume`` runs it. Nor does
        one whose baseline has failed while it waited.
        """
        if rows[-1]["status"] == "abandoned":
            self.schedule.abandoned(trial.trial)
            return
        record = to_record(trial, rows)
        self.run_dir.write_curve(record.trial, [row for row in rows if row["kind"] != "end"])
        if predictions := rows[-1].get("predictions"):
            write_predictions(self.run_dir.path, record.trial, predictions)
        self._log.append(record)
        self.records.append(record)
        self.schedule.ended(record)
        found = self._points()
        point = next(point for point in found if (point.task, point.trial) == (record.task, record.trial))
        sampled: dict[str, Any] = {leaf: record.config[leaf] for leaf in self.spec.space}
        sampled = {leaf: value for leaf, value in sampled.items() if is_read(self.spec, sampled, leaf)}
        self.live.ended(record, point, sampled, self.schedule.remaining)
        if record.baseline and record.status != "complete" and not record.is_front_seed:
            self.live.say(f"the baseline of {record.task} failed: no more trials of this task")
        write_front_csv(self.run_dir.path / "front.csv", self._fronts(found), settings=varying(found))
        if record.baseline:
            for other in self.records:
                if (other.task, other.seed, other.baseline) == (record.task, record.seed, False):  # compared only now
                    self._mirror_trial(other, found, self.run_dir.read_curve(other.trial))
        self._mirror_record(record, found, rows, len(self.records))

    def finish(self, stop_reason: str, status: str, extra: dict[str, str]) -> list[str]:
        """Write tables, plots and the report; end the MLflow run.

        Args:
            stop_reason: Why the sweep ended, for the report.
            status: ``complete``, ``failed`` or ``stopped``.
            extra: Further facts for the report.

        Returns:
            What MLflow does not have, one line each.
        """
        self.run_dir.write_end(stop_reason, extra)
        files = write_results(
            self.run_dir.path,
            self.spec.name,
            self._with_all_tasks(),
            self.spec.constraint.max_score_drop,
            stop_reason,
            extra,
            ref=self.spec.reference.point,
            model=self.spec.model.name,
            tracking_uri=self.tracking_uri,
        )
        found = self._points()
        for task in self._fronts(found):
            mine = [file for file in files if file.stem in (f"pareto-{task}", "front", "report")]
            area = hypervolume((point for point in found if point.task == task), self.spec.reference.point)
            on_front = [point.trial for point in found if point.task == task and point.on_front]
            self._mirror.front(task, on_front, area, len(self.records), mine)
        self._mirror.finish(status)
        return self._mirror.close()

    def misplaced_reference(self) -> list[str]:
        """Say where the spec's reference point lies inside the front, by the baselines once all have ended."""
        if not self.schedule.has_baselines:
            return []
        limit = self.spec.constraint.max_score_drop
        baselines = [record for record in self.records if record.baseline and not record.is_front_seed]
        return misplaced_reference(compare(baselines), limit, self.spec.reference.point)

    def summary(self) -> list[str]:
        """Say what each front is: one line per task."""
        found = self._points()
        lines = []
        for task in self._fronts(found):
            on_front = front([point for point in found if point.task == task])
            chosen = [point for point in on_front if not point.reference]
            baseline = next((p for p in merge(found) if p.task == task and p.reference), None)
            if baseline is None or not chosen:
                lines.append(f"{task}: no front beside the baseline" if baseline else f"{task}: no usable baseline")
                continue
            best = min(chosen, key=lambda point: point.density or 0.0)
            with_baseline = ", the baseline with them" if len(chosen) < len(on_front) else ""
            metric = "mean score" if task == ALL_TASKS else find_task(task, self.spec.data).metric
            lines.append(
                f"{task}: {len(on_front)} on the front{with_baseline}; lowest density {best.density:.3f} ({best.name}, "
                f"{metric} {best.score:.3f}), baseline {baseline.density:.3f} ({baseline.score:.3f})"
            )
        return lines

    def _points(self) -> list[Point]:
        return points(self._with_all_tasks(), self.spec.constraint.max_score_drop)

    def _with_all_tasks(self) -> list[Record]:
        """The records, and where points are for all tasks, those of all tasks together."""
        shared = self.spec.search.scope == "shared"
        return [*self.records, *(across_tasks(self.records, self.spec.data.tasks) if shared else ())]

    def _fronts(self, found: list[Point]) -> dict[str, list[Point]]:
        return {
            task: front([point for point in found if point.task == task])
            for task in (*self.spec.data.tasks, ALL_TASKS)
            if any(point.task == task for point in found)
        }

    def _mirror_trial(self, record: Record, found: list[Point], rows: list[dict[str, Any]]) -> None:
        point = next(point for point in found if (point.task, point.trial) == (record.task, record.trial))
        metric_rows = [row for row in rows if row["kind"] != "end"]
        self._mirror.record(record, point.score_drop, point.density_change, metric_rows)

    def _mirror_record(self, record: Record, found: list[Point], rows: list[dict[str, Any]], step: int) -> None:
        self._mirror_trial(record, found, rows)
        mine = mark(other for other in of_first(found, step) if other.task == record.task)
        on_front = [other.trial for other in mine if other.on_front]
        area = hypervolume(mine, self.spec.reference.point)
        self._mirror.front(record.task, on_front, area, step, at=record.ended_at)


def to_record(trial: TrialSpec, rows: list[dict[str, Any]]) -> Record:
    """Make a trial's record from its rows; a trial that ended before its first evaluation has no score."""
    measured: dict[str, Any] = {}
    for row in rows:
        measured.update({key: value for key, value in row.items() if value is not None or key not in measured})
    known = Record.__dataclass_fields__.keys() - {
        "trial",
        "task",
        "seed",
        "baseline",
        "setting",
        "started_from",
        "config",
    }
    now = time.time()
    defaults: dict[str, Any] = {
        "score_metric": find_task(trial.task, trial.data).metric,
        "dtype": trial.model.dtype,
        "activation": "",
        "steps": measured.get("step", 0),
        "started_at": now,
        "ended_at": now,
        "wall_s": 0.0,
        "versions": {},
    }
    fields = {key: value for key, value in measured.items() if key in known}
    return Record(
        trial=trial.trial,
        task=trial.task,
        seed=trial.seed,
        baseline=trial.baseline,
        setting=trial.setting,
        started_from=trial.start_from,
        config=dict(trial.flat()),
        **{**defaults, **fields},
    )
