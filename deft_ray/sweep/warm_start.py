"""What is known before a search begins: the ended points of other sweeps, or of this sweep's earlier tasks.

They are told to a task's study as if they were its own, with both objectives: scores as changes against their own
baselines, so that those of another task, or of another model, say something here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from deft_ray.errors import RecordsError, SetupError
from deft_ray.results.files import write_text
from deft_ray.results.records import Record, RecordLog
from deft_ray.spec.loading import check_tree
from deft_ray.spec.schema import SweepSpec
from deft_ray.sweep.run_dir import RunDir

#: Stands in ``search.warm_start`` for the tasks of the same sweep that come before.
EARLIER_TASKS = "tasks"

#: Records of one point, one for each seed, and the baseline of each.
Known = tuple[list[Record], list[Record]]


def known_points(records: Iterable[Record], tasks: Iterable[str]) -> list[Known]:
    """Return the ended points of some tasks that have their baselines, in the order of their first records.

    A path's points are left out: what they found takes the training that went before them. A front seed that came to
    nothing is left out alone.
    """
    records, tasks = list(records), set(tasks)
    baselines = {(r.task, r.seed, r.dtype): r for r in records if r.baseline and r.status == "complete"}
    points: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        nothing = record.is_front_seed and not record.measured
        if record.task in tasks and not (record.baseline or record.started_from or nothing):
            points.setdefault((record.task, record.setting or record.trial), []).append(record)
    found = []
    for results in points.values():
        before = [baselines.get((record.task, record.seed, record.dtype)) for record in results]
        if all(record.status not in ("failed", "stopped") for record in results) and None not in before:
            found.append((results, [baseline for baseline in before if baseline is not None]))
    return found


def from_sweeps(spec: SweepSpec, task: str) -> list[Known]:
    """Read what the sweeps of ``search.warm_start`` know: of the same task, or of all theirs if they have it not."""
    found = []
    for folder in folders(spec):
        records = RecordLog(RunDir(folder).records).read()
        theirs = {record.task for record in records}
        found += known_points(records, [task] if task in theirs else theirs)
    return found


def folders(spec: SweepSpec) -> list[Path]:
    """Return the run directories of ``search.warm_start``."""
    return [Path(name) for name in spec.search.warm_start if name != EARLIER_TASKS]


def check_warm_start(spec: SweepSpec) -> None:
    """Check that every sweep to start from has the same space and objectives.

    Raises:
        SetupError: With what differs, or if there is no sweep.
    """
    faults = [fault for folder in folders(spec) for fault in _faults(spec, folder)]
    if faults:
        raise SetupError("\n".join(faults))


def _faults(spec: SweepSpec, folder: Path) -> Iterator[str]:
    run_dir = RunDir(folder)
    if not (run_dir.spec.is_file() and run_dir.records.is_file()):
        yield f"{folder}: is no run directory to start from; needs spec.yaml and records.jsonl"
        return
    try:
        RecordLog(run_dir.records).read()
        theirs, _ = check_tree(run_dir.read_spec())
    except (RecordsError, SetupError) as error:
        yield str(error)
        return
    if theirs is None:
        yield f"{run_dir.spec}: is no spec that this version knows; leave it out of search.warm_start"
        return
    for dotted in [*spec.space, *(name for name in theirs.space if name not in spec.space)]:
        here, there = (str(space.get(dotted, "not searched")) for space in (spec.space, theirs.space))
        if here != there:
            yield f"{folder}: {dotted}: is '{here}' here, '{there}' there; search.warm_start needs the same space"
    if spec.search.objectives != theirs.search.objectives:
        here, there = (", ".join(one.search.objectives) for one in (spec, theirs))
        yield f"{folder}: search.objectives: are '{here}' here, '{there}' there; search.warm_start needs the same"


def keep(file: Path, known: Iterable[Known]) -> None:
    """Write what a study starts from, so that it starts from the same after an interruption."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps([[record.to_json() for record in part] for part in one]) for one in known]
    write_text(file, "".join(f"{line}\n" for line in lines))


def kept(file: Path) -> list[Known] | None:
    """Read what :func:`keep` wrote; None if it has not."""
    if not file.is_file():
        return None
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        results, baselines = ([Record.from_json(text) for text in part] for part in json.loads(line))
        found.append((results, baselines))
    return found
