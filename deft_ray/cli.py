"""``deft-ray``: plan a sweep, report on a run directory."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from deft_ray.errors import DeftRayError, RecordsError
from deft_ray.models.footprint import predict_footprint
from deft_ray.spec.loading import load_spec
from deft_ray.spec.machine import this_machine
from deft_ray.spec.plan import build_plan, format_plan


def build_parser() -> argparse.ArgumentParser:
    """Build the parser."""
    parser = argparse.ArgumentParser(prog="deft-ray", description="Plan sweeps and report on them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser("plan", help="print what a spec would run")
    plan.add_argument("spec", metavar="SPEC")
    plan.add_argument("--set", dest="overrides", metavar="key=value", action="append", default=[])
    plan.add_argument("--elsewhere", action="store_true", help="for a cluster: do not look at this machine")
    plan.set_defaults(run=_plan)
    report = commands.add_parser("report", help="write front.csv, plots and report.md again, from records")
    report.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    report.add_argument("--replay-mlflow", action="store_true", help="write every record to MLflow again")
    report.add_argument("--against", metavar="RUN_DIR", type=Path, help="set another sweep beside it in report.md")
    report.set_defaults(run=_report)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except DeftRayError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _plan(options: argparse.Namespace) -> None:
    machine = this_machine()
    spec = load_spec(options.spec, options.overrides, None if options.elsewhere else machine)
    if options.elsewhere:
        machine = machine.without_memory()
    print(format_plan(build_plan(spec, f"runs/{spec.name}", machine, predict_footprint(spec, machine))))


def _report(options: argparse.Namespace) -> None:
    from deft_ray.results.across import across_tasks
    from deft_ray.results.records import RecordLog
    from deft_ray.results.report import write_results
    from deft_ray.spec.schema import ReferenceSection
    from deft_ray.sweep.run_dir import RunDir
    from deft_ray.tracking.client import default_tracking

    run_dir = RunDir(options.run_dir)
    if not run_dir.spec.is_file() or not run_dir.records.is_file():
        raise RecordsError(f"{options.run_dir}: is no run directory; needs spec.yaml and records.jsonl")
    spec = yaml.safe_load(run_dir.spec.read_text(encoding="utf-8"))
    records = RecordLog(run_dir.records).read()
    limit, name = spec["constraint"]["max_score_drop"], spec["name"]
    ref = ReferenceSection(**spec.get("reference", {})).point
    tasks, shared = spec["data"]["tasks"], spec["search"].get("scope") == "shared"
    together = across_tasks(records, tasks) if shared else []
    against = None
    if options.against is not None:
        other = RunDir(options.against)
        if not other.records.is_file():
            raise RecordsError(f"{options.against}: is no run directory; needs records.jsonl")
        theirs = RecordLog(other.records).read()
        against = other.path.name, [*theirs, *(across_tasks(theirs, tasks) if shared else ())]
    model = spec["model"]["name"]
    why, facts = run_dir.read_end()
    default_uri, artifacts = default_tracking(run_dir.path)
    server = spec.get("tracking", {}).get("uri")
    uri = server or default_uri
    everything = [*records, *together]
    files = write_results(
        run_dir.path, name, everything, limit, why, facts, ref=ref, model=model, tracking_uri=uri, against=against
    )
    if options.replay_mlflow:
        from deft_ray.tracking.mirror import Mirror, replay

        started = min((record.started_at for record in records), default=None)
        experiment = spec["tracking"]["experiment"]
        mirror = Mirror(uri, experiment, None if server else artifacts, run_dir.sweep_id, name, started)
        rows = {record.trial: run_dir.read_curve(record.trial) for record in records}
        replay(mirror, records, limit, rows, files, ref=ref)
    for file in files:
        print(file)


if __name__ == "__main__":
    sys.exit(main())
