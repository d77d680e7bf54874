"""Hosts: Ray Train runs that load the base once and serve trials until the sweep ends."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import OutOfMemoryError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from deft_ray.spec.schema import ModelSection, TrialSpec

if TYPE_CHECKING:
    from deft_ray.train.host import Taken

#: How often a host's worker group may be started anew over a sweep; preempted nodes do not count.
MAX_RESTARTS = 50

#: How long a host that trains does not ask for a further trial again when there was none.
_ASK_AGAIN_S = 0.25


@dataclass(frozen=True)
class HostSettings:
    """What every host of a sweep is made of.

    Args:
        run: Unique name of this launch; Train runs are named after it.
        storage: Folder or URI below which Train keeps its state.
        checkpoints: Folder or URI of trials' checkpoints.
        model: The base.
        workers: Workers of a host.
        cpus: CPUs of a worker.
        gpus: GPUs of a worker.
        slots: Trials that train at once on a host; None where it finds that out.
        memory_share: Which part of its machine's free memory each worker may take.
        shared_ray: Whether Ray was there before the sweep, and stays after it.
    """

    run: str
    storage: str
    checkpoints: str
    model: ModelSection
    workers: int
    cpus: int
    gpus: int
    slots: int | None
    memory_share: float
    shared_ray: bool


class _ReleaseOnFailure(UserCallback):
    """Tells the dispatcher at once that a host has lost workers, so that another host can take its trials, and why."""

    def __init__(self, dispatcher: Any, host: str) -> None:
        self._dispatcher, self._host = dispatcher, host

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        lines = {rank: (str(error).strip() or "lost").splitlines()[-1] for rank, error in worker_exceptions.items()}
        cause = "; ".join(f"worker {rank}: {line}" for rank, line in lines.items())
        failures = [getattr(error, "health_check_failure", error) for error in worker_exceptions.values()]
        lacked_memory = any(isinstance(failure, OutOfMemoryError) for failure in failures)
        ray.get(self._dispatcher.release.remote(self._host, cause, lacked_memory))


class _HostTrainer(TorchTrainer):
    """A Train run without the two actors that a host has no use for; each costs seconds of the machine at its start.

    ``DatasetsCallback`` serves Ray Data, which hosts do not read. ``PlacementGroupCleanerCallback`` frees a cluster's
    resources if the run's controller dies: needed only where Ray outlives the sweep.
    """

    outlived = True

    def _create_default_callbacks(self) -> list[Any]:
        unused = {"DatasetsCallback"} if self.outlived else {"DatasetsCallback", "PlacementGroupCleanerCallback"}
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]  # mypy sees Train's older face
        return [callback for callback in callbacks if type(callback).__name__ not in unused]


class HostThread(threading.Thread):
    """Keeps one host running; ends when the dispatcher closes, or when the host cannot be kept.

    Args:
        index: Number of the host.
        settings: See :class:`HostSettings`.
        dispatcher: Handle of the dispatcher.
    """

    def __init__(self, index: int, settings: HostSettings, dispatcher: Any) -> None:
        self.host = f"host-{index}"
        super().__init__(name=self.host, daemon=True)
        self._settings, self._dispatcher = settings, dispatcher

    def run(self) -> None:
        """Run the host's Train run to its end and report how it ended."""
        settings = self._settings
        trainer = _HostTrainer(
            serve,
            train_loop_config={"host": self.host, "settings": settings, "dispatcher": self._dispatcher},
            torch_config=TorchConfig(backend="nccl" if settings.gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=settings.workers,
                use_gpu=bool(settings.gpus),
                resources_per_worker={"CPU": settings.cpus, **({"GPU": settings.gpus} if settings.gpus else {})},
                placement_strategy="STRICT_PACK",
            ),
            run_config=RunConfig(
                name=f"{settings.run}-{self.host}",
                storage_path=settings.storage,
                failure_config=FailureConfig(max_failures=MAX_RESTARTS),
                callbacks=[_ReleaseOnFailure(self._dispatcher, self.host)],  # type: ignore[list-item]  # Ray's own kind
            ),
        )
        trainer.outlived = settings.shared_ray
        cause: str | None = None
        try:
            trainer.fit()
        except Exception as error:
            cause = str(error).strip() or type(error).__name__
        # At the very end of a sweep, or after Ctrl-C, Ray may be gone already.
        if ray.is_initialized():
            self._dispatcher.host_ended.remote(self.host, cause)

    def drop_tokens(self) -> None:
        """Delete what hosts that were killed have left of their tokenised tasks on this node."""
        shutil.rmtree(tokens_folder(self._settings.run), ignore_errors=True)


def serve(config: dict[str, Any]) -> None:
    """Run on every worker of a host: load the base, then serve trials."""
    import torch

    from deft_ray.models.base import load_base
    from deft_ray.train.host import Host
    from deft_ray.train.ranks import Ranks
    from deft_ray.train.streams import quiet_libraries

    quiet_libraries()
    settings: HostSettings = config["settings"]
    host, dispatcher = config["host"], config["dispatcher"]
    context = ray.train.get_context()
    rank = context.get_world_rank()
    os.environ.setdefault("LOCAL_RANK", str(context.get_local_rank()))
    life = ray.get(dispatcher.release.remote(host, "its workers were started anew")) if rank == 0 else 0
    model = settings.model
    try:
        base = load_base(
            model.name,
            str(model.family),
            quantization=model.quantization,
            double_quant=model.double_quant,
            dtype=model.dtype,
            wo=model.wo,
            relu=model.activation == "relu",
            revision=model.revision,
            device=ray.train.torch.get_device() if settings.gpus else torch.device("cpu"),
        )
    except Exception as error:  # a border: whatever transformers raises, no restart helps; end in peace, and say why
        if rank == 0:
            cause = f"model.name: {model.name} cannot be loaded: {type(error).__name__}: {error}"
            ray.get(dispatcher.host_ended.remote(host, cause))
        return
    ranks = Ranks(rank, context.get_world_size(), base.model.device)
    inbox = DispatcherInbox(dispatcher, host, life)
    tokens = tokens_folder(settings.run)
    drop_older_tokens(tokens)
    limit = ray.get(dispatcher.limit.remote(host)) if rank == 0 else None
    how = settings.checkpoints, host, settings.slots, settings.memory_share, tokens, limit
    try:
        Host(base, ranks, inbox, *how).serve()
    finally:
        shutil.rmtree(tokens, ignore_errors=True)  # who has mapped a file keeps it; who comes later writes it again


def tokens_folder(run: str) -> Path:
    """Where the hosts of a launch keep their tokenised tasks, on each node."""
    return Path(tempfile.gettempdir()) / f"deft_ray-{run}"


def drop_older_tokens(tokens: Path) -> None:
    """Delete what launches of the same sweep have left that were killed.

    Args:
        tokens: Of :func:`tokens_folder`, of this launch.
    """
    sweep = tokens.name.rsplit("-", 1)[0]
    for folder in tokens.parent.glob(f"{glob.escape(sweep)}-*"):
        if folder != tokens and folder.name.removeprefix(f"{sweep}-").isdigit():
            shutil.rmtree(folder, ignore_errors=True)


class DispatcherInbox:
    """A host's side of the dispatcher.

    Args:
        dispatcher: Handle of the dispatcher.
        host: Name of the host.
        life: Which of its lives this is; see :meth:`~deft_ray.sweep.board.Board.release`.
    """

    def __init__(self, dispatcher: Any, host: str, life: int) -> None:
        self._dispatcher, self._host, self._life = dispatcher, host, life
        self._attempts: dict[str, int] = {}
        self._stops: dict[str, Any] = {}
        self._claim: Any = None
        self._ask_at = 0.0

    def next_trial(self, wait: bool) -> Taken | str:
        """Take a trial; ``wait`` if there is none yet, ``closed`` if there will be none.

        Without ``wait`` the question is answered at a later call, and is not asked again for a while if there was none.
        """
        if self._claim is None and (wait or time.monotonic() >= self._ask_at):
            self._claim = self._dispatcher.claim.remote(self._host, self._life, wait)
        if self._claim is None or not ray.wait([self._claim], timeout=None if wait else 0)[0]:
            return "wait"
        claimed, self._claim = ray.get(self._claim), None
        if isinstance(claimed, str):
            self._ask_at = time.monotonic() + _ASK_AGAIN_S
            return claimed
        from deft_ray.train.host import Taken  # who asks has loaded torch; the driver, which imports this, has not

        trial, attempt, apart = claimed
        return Taken(TrialSpec.model_validate_json(trial), attempt, apart)

    def no_room(self) -> None:
        """Give back what was claimed before the host had no room any more."""
        if self._claim is not None and ray.wait([self._claim], timeout=0)[0]:
            claimed, self._claim = ray.get(self._claim), None
            if not isinstance(claimed, str):
                trial = TrialSpec.model_validate_json(claimed[0]).trial
                self._dispatcher.give_back.remote(trial, claimed[1])

    def follow(self, taken: Taken) -> None:
        """Send a trial's rows under this attempt from now on."""
        self._attempts[taken.trial.trial] = taken.attempt

    def stop_requested(self, trial: str) -> bool:
        """Tell at once whether a running trial is to stop: one question is always under way for each."""
        if trial not in self._stops:
            self._stops[trial] = self._dispatcher.wait_cancelled.remote(trial, self._attempts[trial])
        ready, _ = ray.wait([self._stops[trial]], timeout=0)
        return bool(ray.get(self._stops.pop(trial))) if ready else False

    def send(self, trial: str, row: dict[str, Any]) -> None:
        """Send a row; waits for the last one, so that a row that ends a trial has arrived."""
        sent = self._dispatcher.add_row.remote(trial, self._attempts[trial], row)
        if row["kind"] == "end":
            self._stops.pop(trial, None)
            ray.get(sent)

    def has_slots(self, slots: int, limit: int | None) -> None:
        """Tell the sweep how many trials this host takes at once, and how many memory was found to hold in a pass."""
        ray.get(self._dispatcher.has_slots.remote(self._host, slots, limit))


def storage_path(storage: str) -> str:
    """Return storage as Ray wants it: an URI as it is, a folder absolute."""
    return storage if "://" in storage else str(Path(storage).resolve())
