"""``python -m deft_ray.sweep SPEC``: the command line of a sweep."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from pathlib import Path

from deft_ray.errors import DeftRayError

_INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """Build the parser."""
    parser = argparse.ArgumentParser(
        prog="python -m deft_ray.sweep",
        description="Search for the accuracy-density front of adapter fine-tuning with a density loss.",
        epilog="exit codes: 0 done, 2 spec, 3 set-up, 4 a task without a usable baseline, 5 records, 130 interrupted",
    )
    parser.add_argument("spec", metavar="SPEC", help="YAML file, for example search_spaces/quickstart.yaml")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="key=value",
        action="append",
        default=[],
        help="override a leaf: deft.alpha=1",
    )
    parser.add_argument("--plan", action="store_true", help="print what would run, and stop")
    parser.add_argument("--resume", action="store_true", help="continue the sweep in the run directory")
    parser.add_argument("--extend", action="store_true", help="continue it with more search.trials than it began with")
    parser.add_argument("--output", metavar="DIR", type=Path, help="run directory (default: runs/<name>)")
    parser.add_argument(
        "--address", metavar="ADDR", help="Ray cluster to run on: auto, or host:port (default: this machine)"
    )
    parser.add_argument("--debug", action="store_true", help="show a traceback where an error ends the command")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        return _run(options)
    except DeftRayError as error:
        if options.debug:
            raise
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; continue with the same command and --resume", file=sys.stderr)
        return _INTERRUPTED


def _run(options: argparse.Namespace) -> int:
    # Pydantic would look through every installed package for plugins, and a plan or a fault would wait for it.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
    from deft_ray.models.footprint import predict_footprint
    from deft_ray.spec.loading import load_spec
    from deft_ray.spec.machine import this_machine
    from deft_ray.spec.plan import build_plan, format_plan

    machine = this_machine()
    spec = load_spec(options.spec, options.overrides, machine if options.address is None else None)
    output = options.output or Path("runs") / spec.name
    if options.address is not None:
        machine = machine.without_memory()
    plan = build_plan(spec, str(output), machine, predict_footprint(spec, machine))
    _print(format_plan(plan))
    if options.plan:
        return 0
    from deft_ray.sweep.runner import run_sweep

    run_sweep(spec, output, resume=options.resume, extend=options.extend, address=options.address)
    return 0


def _print(text: str) -> None:
    """Print, unless the reader has left: ``--plan SPEC | head``."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exit_now(code: int) -> None:
    """End the process, at once if a host's thread is still waiting for Ray."""
    sys.stdout.flush()
    sys.stderr.flush()
    if any(thread.name.startswith("host-") for thread in threading.enumerate()):
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    exit_now(main())
