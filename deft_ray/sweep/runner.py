"""Run a sweep: check the surroundings, start Ray and the hosts, let Tune serve the schedule, close the books."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from deft_ray.errors import BaselineError, SetupError
from deft_ray.models.folder import check_model_folder
from deft_ray.models.footprint import predict_footprint
from deft_ray.spec.catalog import FAMILY_KINDS, NANO, find_task, own_file
from deft_ray.spec.machine import Machine, this_machine
from deft_ray.spec.plan import (
    MOST_SLOTS,
    Plan,
    build_plan,
    count_hosts,
    gpus_per_worker,
    packing_of,
    planned_packing,
)
from deft_ray.spec.schema import SweepSpec
from deft_ray.sweep.run_dir import RunDir
from deft_ray.tasks.own import check_own_files
from deft_ray.tasks.rows import check_calibration, check_data_folder

#: Set before Ray is imported: quiet, no usage reports, nothing that needs the network.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",
    "TUNE_WARN_THRESHOLD_S": "3600",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a host's thread that outlives Ray must not start another
}

#: Also, where Ray starts for this sweep alone: nobody takes its node away with a warning.
_OWN_RAY = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}

_HEAD = "node:__internal_head__"
_OBJECT_STORE_BYTES = 256 * 2**20

#: How long hosts have to end after the last trial, or after Ctrl-C.
_END_S = 30.0

_log = logging.getLogger(__name__)


def preflight(spec: SweepSpec, run_dir: RunDir, resume: bool, extend: bool = False) -> None:
    """Check what the spec points at, before anything is started or written.

    Args:
        spec: A checked spec.
        run_dir: Where to; new, or with ``resume`` or ``extend`` the sweep to continue.
        resume: Continue the sweep there.
        extend: Continue it with more trials.

    Raises:
        SetupError: With all faults found in the output folder, the model folder and the data folder.
    """
    faults = []
    checks = [lambda: run_dir.check_same(spec, extend, resume) if resume or extend else run_dir.check_new()]
    if spec.model.name != NANO and os.path.isdir(spec.model.name):
        checks.append(lambda: check_model_folder(Path(spec.model.name), images=FAMILY_KINDS[spec.family] == ("image",)))
    tasks = [find_task(name, spec.data) for name in spec.data.tasks]
    if spec.data.dir is not None:
        checks.append(lambda: check_data_folder(tasks, Path(str(spec.data.dir))))
    checks.append(lambda: check_own_files(tasks))
    checks.append(lambda: check_calibration(spec, tasks))
    if not all((run_dir.search / f"{task}.warm.jsonl").is_file() for task in spec.data.tasks):  # else it is kept there
        checks.append(lambda: _check_warm_start(spec))
    for check in checks:
        try:
            check()
        except SetupError as error:
            faults.append(str(error))
    if faults:
        raise SetupError("\n".join(faults))


def _check_warm_start(spec: SweepSpec) -> None:
    if not spec.search.warm_start:
        return
    from deft_ray.sweep.warm_start import check_warm_start  # numpy and moocore, which few sweeps need this early

    check_warm_start(spec)


def with_absolute_paths(spec: SweepSpec) -> SweepSpec:
    """Return the spec with folders absolute, as workers run elsewhere."""
    model, data, storage = spec.model, spec.data, spec.storage
    if model.name != NANO and os.path.isdir(os.path.expanduser(model.name)):
        model = model.model_copy(update={"name": _absolute(model.name)})
    own = {
        name: entry.model_copy(
            update={key: _absolute(own_file(getattr(entry, key), data.dir)) for key in ("train", "validation")}
        )
        for name, entry in data.own.items()
    }
    data = data.model_copy(update={"dir": None if data.dir is None else _absolute(data.dir), "own": own})
    if storage is not None and "://" not in storage:
        storage = _absolute(storage)
    known = [name if name == "tasks" else _absolute(name) for name in spec.search.warm_start]
    search = spec.search.model_copy(update={"warm_start": known})
    return spec.model_copy(update={"model": model, "data": data, "search": search, "storage": storage})


def _absolute(path: str) -> str:
    return str(Path(os.path.expanduser(path)).resolve())


def run_sweep(
    spec: SweepSpec, output: Path, *, resume: bool = False, extend: bool = False, address: str | None = None
) -> RunDir:
    """Run a sweep to its end.

    Args:
        spec: A checked spec.
        output: Run directory; new, or with ``resume`` or ``extend`` the one to continue.
        resume: Continue the sweep in ``output``.
        extend: Continue it with more ``search.trials`` than it began with.
        address: Ray cluster to run on (``auto``, or host:port); None starts Ray on this machine.

    Returns:
        The run directory.

    Raises:
        SetupError: If the surroundings are wrong; nothing is lost.
        BaselineError: If a task has no usable baseline; everything else has run.
        KeyboardInterrupt: After Ctrl-C; what has ended is on disk, ``resume`` continues.
    """
    spec = with_absolute_paths(spec)
    run_dir = RunDir(output)
    preflight(spec, run_dir, resume, extend)
    machine = this_machine() if address is None else this_machine().without_memory()
    plan = build_plan(spec, str(output), machine, predict_footprint(spec, machine))
    if not run_dir.begun:
        run_dir.create(spec, plan)
    else:
        run_dir.continue_with(spec, plan)
    for name, value in (_ENVIRONMENT | ({} if address else _OWN_RAY)).items():
        os.environ.setdefault(name, value)
    return _Sweep(spec, run_dir, plan, address).run()


class _Sweep:
    """One sweep in this process."""

    def __init__(self, spec: SweepSpec, run_dir: RunDir, plan: Plan, address: str | None) -> None:
        from deft_ray.results.records import RecordLog
        from deft_ray.sweep.books import Books
        from deft_ray.sweep.budget import Budget
        from deft_ray.sweep.schedule import Schedule

        self.spec, self.run_dir, self.plan, self.address = spec, run_dir, plan, address
        known = RecordLog(run_dir.records).read()
        self.schedule = Schedule(spec, run_dir.search, known)
        self._clock = "wall time since it was resumed" if known else "wall time"
        self.books = Books(spec, run_dir, self.schedule, plan.slots)
        self.failure: str | None = None
        self.spent: str | None = None
        self.stalled: str | None = None
        self.misplaced: list[str] = []
        self._tuned = threading.Event()
        self._slots: int | None = None
        """Trials that all hosts take at once, where they find it out; one more is asked for, so that none waits."""
        self.began = time.time()
        self._budget = Budget(spec, self.began)

    def run(self) -> RunDir:
        reason, status = "all trials have ended", "complete"
        try:
            self._check_budget()
            self.misplaced = self.books.misplaced_reference()
            is_spent = self.spent is not None and self.schedule.has_baselines
            if self.schedule.remaining and not is_spent and not self.misplaced:
                self._run_trials()
            if self._left_out():
                reason = self.spent or self.stalled or reason
            if self.misplaced:
                reason, status = "; ".join(self.misplaced), "failed"
            if self.failure is not None:
                reason, status = f"no host could be kept: {self.failure}", "failed"
        except KeyboardInterrupt:
            reason, status = "interrupted by the user", "stopped"
            raise
        finally:
            try:
                self._close_studies()
            finally:
                facts = {self._clock: f"{time.time() - self.began:.0f} s", "Planned": planned_packing(self.plan)}
                problems = self.books.finish(reason, status, facts)
        if self.failure is not None:
            raise SetupError(f"{reason}\ncontinue with --resume once it is mended")
        if self.misplaced:
            faults = "\n".join(self.misplaced)
            raise SetupError(f"{faults}\ngive another one and continue with --resume")
        self._say_end(problems)
        if self.schedule.failed_tasks:
            tasks = ", ".join(self.schedule.failed_tasks)
            raise BaselineError(f"no usable baseline for {tasks}; see report.md for the cause")
        return self.run_dir

    def _close_studies(self) -> None:
        try:
            self.schedule.close()
        except OSError as error:  # what the sweep ended for matters more
            _log.warning("%s: points under way stay running in their studies: %s", self.run_dir.search, error)

    def _run_trials(self) -> None:
        import ray

        with ThreadPoolExecutor(1) as pool:  # Ray's processes take as long to start as Train and Tune to load
            loaded = pool.submit(lambda: [import_module(f"deft_ray.sweep.{room}") for room in ("hosts", "tuning")])
            self._start_ray(ray)
            loaded.result()
        from deft_ray.sweep.dispatcher import start_dispatcher
        from deft_ray.sweep.hosts import HostThread, storage_path

        hosts: list[HostThread] = []
        try:
            near_driver = {_HEAD: 0.001} if _HEAD in ray.cluster_resources() else {}
            dispatcher = start_dispatcher(near_driver)
            storage = storage_path(self.run_dir.storage(self.spec))
            self._probe_storage(storage)
            settings, count = self._host_settings(ray, storage)
            self._budget.gpus = settings.gpus * settings.workers
            hosts = [HostThread(index, settings, dispatcher) for index in range(count)]
            watch = threading.Thread(target=self._watch_hosts, args=(ray, dispatcher, count), daemon=True)
            for thread in (*hosts, watch):
                thread.start()
            try:
                with _terminated_as_interrupted():
                    self._slots = count if settings.slots is None else None
                    self._tune(dispatcher, near_driver, storage, count * (settings.slots or MOST_SLOTS))
            finally:
                self._tuned.set()
                watch.join()
                self._end_hosts(ray, dispatcher, hosts)
            self._drop_checkpoints(settings.checkpoints)
        finally:
            # A thread that still waits for Ray would take the whole process down with it: the command's end does then.
            if not any(host.is_alive() for host in hosts):
                ray.shutdown()

    def _end_hosts(self, ray: Any, dispatcher: Any, hosts: list[Any]) -> None:
        """Let every host end at its next step."""
        try:
            ray.get(dispatcher.close.remote(), timeout=_END_S)
        except ray.exceptions.RayError as error:
            _log.warning("the dispatcher does not answer: %s", error)
        deadline = time.monotonic() + _END_S
        for host in hosts:
            host.join(timeout=max(0.0, deadline - time.monotonic()))
        if hosts:
            hosts[0].drop_tokens()

    def _drop_checkpoints(self, root: str) -> None:
        """Delete the checkpoints of trials whose record is final and which left no adapter; the hosts have ended."""
        from deft_ray.train.storage import drop_trials

        lost = [record.trial for record in self.books.records if record.status in ("failed", "diverged", "pruned")]
        try:
            drop_trials(root, lost)
        except OSError as error:
            _log.warning("%s: the checkpoints of %s stay: %s", root, ", ".join(lost), error)

    def _start_ray(self, ray: Any) -> None:
        resources = self.spec.resources
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
        if self.address is None:
            hosts = self.plan.hosts
            options |= {
                "num_cpus": max(hosts * resources.workers_per_host * resources.cpus_per_worker, 1),
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
            }
        self._hush_raylet(ray)
        try:
            ray.init(address=self.address or "local", **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = f"--address {self.address}" if self.address else "a local Ray"
            raise SetupError(f"{where}: Ray cannot be reached or started: {error}") from error

    def _hush_raylet(self, ray: Any) -> None:
        """Send the raylet's advice to the log: ``log_to_driver`` does not cover it, and no other setting does."""

        def to_log(data: dict[str, Any], **_options: Any) -> None:
            _log.info("raylet: %s", " ".join(map(str, data.get("lines", ()))))

        if hasattr(ray._private.worker, "print_to_stdstream"):
            ray._private.worker.print_to_stdstream = to_log

    def _probe_storage(self, storage: str) -> None:
        from deft_ray.train.storage import probe_storage

        try:
            probe_storage(storage)
        except (OSError, ValueError) as error:
            raise SetupError(f"storage: {storage}: cannot be written and read: {error}") from error

    def _host_settings(self, ray: Any, storage: str) -> tuple[Any, int]:
        from deft_ray.sweep.hosts import HostSettings

        have = ray.cluster_resources()
        machine = Machine(int(have.get("CPU", 0)), int(have.get("GPU", 0)))
        resources, count = self.spec.resources, count_hosts(self.spec, machine)
        nodes = sum(1 for node in ray.nodes() if node["Alive"])
        settings = HostSettings(
            run=f"{self.run_dir.sweep_id}-{int(self.began)}",
            storage=f"{storage}/ray",
            checkpoints=f"{storage}/checkpoints",
            model=self.spec.model,
            workers=resources.workers_per_host,
            cpus=resources.cpus_per_worker,
            gpus=gpus_per_worker(self.spec, machine.gpus),
            slots=packing_of(self.spec)[0],
            memory_share=1 / (resources.workers_per_host * math.ceil(count / nodes)),
            shared_ray=self.address is not None,
        )
        return settings, count

    def _watch_hosts(self, ray: Any, dispatcher: Any, count: int) -> None:
        """End the sweep if every host has given up: nobody else would serve the waiting trials."""
        while not self._tuned.wait(1.0):
            self._look_at_slots(ray.get(dispatcher.slots.remote()), count)
            ended = ray.get(dispatcher.hosts_ended.remote())
            if len(ended) == count:
                self.failure = "; ".join(sorted({cause for cause in ended.values() if cause}))
                ray.get(dispatcher.give_up.remote(f"no host is left: {self.failure}"))
                return

    def _look_at_slots(self, found: dict[str, int], count: int) -> None:
        """Where hosts find out how many trials they take at once, heed what they have found."""
        if self._slots is not None:
            self._slots = self.books.live.slots = sum(found.values()) + count - len(found)

    def _tune(self, dispatcher: Any, near_driver: dict[str, float], storage: str, slots: int) -> None:
        from ray import tune

        from deft_ray.sweep.rungs import build_rungs
        from deft_ray.sweep.tuning import BookKeeper, RungScheduler, ScheduleSearcher, asha_lets_on, build_trainable

        rungs = build_rungs(self.spec, self.run_dir.search, asha_lets_on, self.schedule.baseline_score)
        tuner = tune.Tuner(
            build_trainable(dispatcher, {"cpu": 0, **near_driver}),
            tune_config=tune.TuneConfig(
                search_alg=ScheduleSearcher(self._next_trial, self.schedule.behind),
                scheduler=RungScheduler(rungs),
                num_samples=-1,
                reuse_actors=True,
                max_concurrent_trials=self.spec.search.max_concurrent or slots + 1,
            ),
            run_config=tune.RunConfig(
                name=f"{self.run_dir.sweep_id}-{int(self.began)}",
                storage_path=f"{storage}/ray",
                callbacks=[BookKeeper(self.books.ended, dispatcher)],
                failure_config=tune.FailureConfig(max_failures=3),
                verbose=0,
            ),
        )
        tuner.fit()

    def _next_trial(self) -> Any:
        from deft_ray.sweep.schedule import Nothing

        self._check_budget()
        self.misplaced = self.books.misplaced_reference()
        if self.failure is not None or self.misplaced:
            return Nothing.MORE
        if self._slots is not None and self.schedule.under_way > self._slots:
            return Nothing.YET
        if self.spent is not None:  # without its baselines a sweep is worth nothing, so they run in any case
            return self.schedule.next_baseline()
        return self.schedule.next(beside_baselines=True)

    def _check_budget(self) -> None:
        """Once spent, always spent. A front that grows no longer ends the sampling; front seeds still run."""
        self.spent = self.spent or self._budget.spent(self.books.records)
        if not self.schedule.has_baselines:
            return
        self.stalled = self.stalled or self._budget.stalled(self.books.records)
        if self.stalled is not None:
            self.schedule.sample_no_more()

    def _left_out(self) -> int:
        """Trials that a budget has left out."""
        return self.schedule.skipped + (self.schedule.remaining if self.spent is not None else 0)

    def _say_end(self, problems: list[str]) -> None:
        from deft_ray.results.report import packing

        say = self.books.live.say
        if self._left_out():
            say(f"ended early: {self.spent or self.stalled}; {self._left_out()} trials not run")
        for line in self.books.summary():
            say(line)
        for problem in problems:
            say(f"not in MLflow: {problem}; deft-ray report {self.run_dir.path} --replay-mlflow writes it again")
        if shared := packing(self.books.records):
            say(f"slots   {shared}")
        shown = _shortest(self.run_dir.path)
        say(f"front   {shown}/front.csv")
        for task in self.spec.data.tasks:
            say(f"plot    {shown}/pareto-{task}.html  (and .png, .csv)")
        say(f"report  {shown}/report.md")
        say(f"MLflow  mlflow ui --backend-store-uri {self.books.tracking_uri}")


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Treat SIGTERM, as a batch system or a container sends it, like Ctrl-C; Ray has a handler of its own by now."""

    def interrupt(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _shortest(path: Path) -> str:
    """Return a path relative to where the user is, if it lies below."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
