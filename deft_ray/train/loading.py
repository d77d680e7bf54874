"""The tokenised tasks of a host's trials: each is loaded once, and on a thread where trials train meanwhile."""

from __future__ import annotations

import copy
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Lock, Thread

from deft_ray.models.base import Base
from deft_ray.spec.catalog import find_task
from deft_ray.spec.schema import DataSection, TrialSpec
from deft_ray.tasks.encoding import EncodedTask, encode_images, encode_task
from deft_ray.tasks.images import class_names
from deft_ray.tasks.kept import KeptTasks
from deft_ray.tasks.rows import hold_out, load_beside, load_rows


class LoadedTasks:
    """Tasks of trials on one base.

    Args:
        base: Whose tokens.
        folder: Of tokenised tasks that all workers of this node share; None to tokenise them here.
    """

    def __init__(self, base: Base, folder: Path | None) -> None:
        self._base, self._kept = base, KeptTasks(folder)
        # The base's tokenizer is in use while a thread tells its own how long texts may be.
        self._spare = replace(base, tokenizer=copy.deepcopy(base.tokenizer))
        self._one_thread = Lock()
        self._tasks: dict[str, Future[EncodedTask]] = {}

    def begin(self, trial: TrialSpec) -> bool:
        """Load a trial's task on a thread if nobody has asked for it before; one task at a time.

        Returns:
            Whether :meth:`get` has an answer at once, which may be that it cannot be loaded.
        """
        key = _key(trial)
        if key not in self._tasks:
            self._tasks[key] = found = Future[EncodedTask]()
            thread = Thread(target=self._load_beside, args=(found, trial), daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system has no more threads
                found.set_exception(error)
        return self._tasks[key].done()

    def get(self, trial: TrialSpec) -> EncodedTask:
        """Return a trial's task; load it here, or wait for the thread that does.

        Raises:
            SetupError: If its rows cannot be had or used; who asks again has it loaded again.
        """
        key = _key(trial)
        if key not in self._tasks:
            self._tasks[key] = Future[EncodedTask]()
            self._load(self._tasks[key], trial, self._base)
        try:
            return self._tasks[key].result()
        except Exception:  # raised again; forgotten, so that who asks next has it loaded anew
            del self._tasks[key]
            raise

    def _load_beside(self, found: Future[EncodedTask], trial: TrialSpec) -> None:
        with self._one_thread:
            self._load(found, trial, self._spare)

    def _load(self, found: Future[EncodedTask], trial: TrialSpec, base: Base) -> None:
        try:
            task, calibration = find_task(trial.task, trial.data), _calibration(trial)
            loaded = self._kept.get(_key(trial), task, lambda: load_task(trial.task, trial.data, base, calibration))
        except BaseException as error:  # whatever it was, it is raised by who asks
            found.set_exception(error)
        else:
            found.set_result(loaded)


def load_task(name: str, data: DataSection, base: Base, calibration: int = 0) -> EncodedTask:
    """Load and tokenise a task's splits, or make pictures of them.

    Args:
        name: Of the task.
        data: Where its rows are, and how long they may be.
        base: Whose tokens.
        calibration: Rows to hold out from training.

    Raises:
        SetupError: If the rows cannot be had or used.
    """
    task = find_task(name, data)
    train = load_rows(task, "train", data.dir, data.train_examples)
    train, held_out = hold_out(task, train, calibration) if calibration else (train, [])
    validation = load_rows(task, "validation", data.dir, data.validation_examples)
    if base.family.images:
        known = task if task.labels else replace(task, labels=class_names(Path(str(data.dir))))
        return encode_images(known, train, validation, base.image_processor, base.image_tokens, held_out)
    return encode_task(
        task,
        train,
        validation,
        base.tokenizer,
        text_to_text=base.family.text_to_text,
        max_source_tokens=data.max_source_tokens,
        max_target_tokens=data.max_target_tokens,
        window_overlap_tokens=data.window_overlap_tokens,
        beside=load_beside(task, data.dir, data.validation_examples),
        calibration=held_out,
    )


def _key(trial: TrialSpec) -> str:
    """What is loaded, and how."""
    return f"{trial.task} {_calibration(trial)} {trial.data.model_dump_json()}"


def _calibration(trial: TrialSpec) -> int:
    return trial.dial.calibration_examples if trial.dial.taus else 0
