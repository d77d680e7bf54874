"""Hosts: Ray Train runs that load the base once and serve trials until the sweep ends."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from deft_ray.spec.schema import ModelSection, TrialSpec

#: How often a host's worker group may be started anew over a sweep; preempted nodes do not count.
MAX_RESTARTS = 50


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
        shared_ray: Whether Ray was there before the sweep, and stays after it.
    """

    run: str
    storage: str
    checkpoints: str
    model: ModelSection
    workers: int
    cpus: int
    gpus: int
    shared_ray: bool


class _ReleaseOnFailure(UserCallback):
    """Tells the dispatcher at once that a host has lost workers, so that another host can take its trial."""

    def __init__(self, dispatcher: Any, host: str) -> None:
        self._dispatcher, self._host = dispatcher, host

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        lines = {rank: (str(error).strip() or "lost").splitlines()[-1] for rank, error in worker_exceptions.items()}
        cause = "; ".join(f"worker {rank}: {line}" for rank, line in lines.items())
        ray.get(self._dispatcher.release.remote(self._host, cause))


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
    if rank == 0:
        ray.get(dispatcher.release.remote(host, "its workers were started anew"))
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
    Host(base, ranks, DispatcherInbox(dispatcher, host), settings.checkpoints, host).serve()


class DispatcherInbox:
    """A host's side of the dispatcher.

    Args:
        dispatcher: Handle of the dispatcher.
        host: Name of the host.
    """

    def __init__(self, dispatcher: Any, host: str) -> None:
        self._dispatcher, self._host = dispatcher, host
        self._trial, self.attempt = "", 0
        self._stop: Any = None

    def next_trial(self) -> TrialSpec | str:
        """Wait a while for a trial; ``wait`` if there is none yet, ``closed`` if there will be none."""
        claimed = ray.get(self._dispatcher.claim.remote(self._host))
        if isinstance(claimed, str):
            return claimed
        trial = TrialSpec.model_validate_json(claimed[0])
        self.follow(trial.trial, claimed[1])
        return trial

    def follow(self, trial: str, attempt: int) -> None:
        """Send rows under this trial and attempt from now on."""
        self._trial, self.attempt, self._stop = trial, attempt, None

    def stop_requested(self) -> bool:
        """Tell at once whether the running trial is to stop: one question is always under way."""
        if self._stop is None:
            self._stop = self._dispatcher.wait_cancelled.remote(self._trial, self.attempt)
        ready, _ = ray.wait([self._stop], timeout=0)
        if not ready:
            return False
        answer, self._stop = ray.get(self._stop), None
        return bool(answer)

    def send(self, row: dict[str, Any]) -> None:
        """Send a row; waits for the last one, so that a row that ends a trial has arrived."""
        sent = self._dispatcher.add_row.remote(self._trial, self.attempt, row)
        if row["kind"] == "end":
            ray.get(sent)


def storage_path(storage: str) -> str:
    """Return storage as Ray wants it: an URI as it is, a folder absolute."""
    return storage if "://" in storage else str(Path(storage).resolve())
