"""Checkpoints and adapters on any file system that pyarrow knows: a folder, s3://, gs://.

Layout below the root: ``<trial>/step-00000120/`` (state of every rank), ``<trial>/latest.json`` (which step is whole),
``<trial>/adapter/`` (the finished adapter, as PEFT saves it).
"""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyarrow import fs

from deft_ray.train.ranks import Ranks


class TrialStorage:
    """One trial's folder.

    Args:
        root: Folder or URI that holds all trials' folders.
        trial: The trial's id.
        fingerprint: Identifies the trial's configuration; a checkpoint of another one is never loaded.
    """

    def __init__(self, root: str, trial: str, fingerprint: str) -> None:
        self._filesystem, path = resolve(root)
        self._folder = f"{path}/{trial}"
        self._fingerprint = fingerprint
        self.adapter_uri = f"{root.rstrip('/')}/{trial}/adapter"

    def save(self, step: int, write: Callable[[Path], None], meta: dict[str, Any], ranks: Ranks) -> None:
        """Save a checkpoint: every rank writes its part, then rank 0 declares it whole and drops the one before.

        Args:
            step: Steps done.
            write: Writes this rank's files into an empty folder.
            meta: JSON values kept beside it.
            ranks: All of them call this.
        """
        before = ranks.share(self.latest())
        target = f"{self._folder}/step-{step:08d}"
        self._upload(write, target)
        ranks.barrier()
        if ranks.leads:
            self._write_json("latest.json", {"step": step, "fingerprint": self._fingerprint, **meta})
            if before is not None and before["step"] != step:
                self._filesystem.delete_dir(f"{self._folder}/step-{before['step']:08d}")
        ranks.barrier()

    def latest(self) -> dict[str, Any] | None:
        """Return what was saved with the last whole checkpoint, or None."""
        try:
            with self._filesystem.open_input_stream(f"{self._folder}/latest.json") as stream:
                meta: dict[str, Any] = json.loads(stream.read())
        except (FileNotFoundError, ValueError):
            return None
        return meta if meta.get("fingerprint") == self._fingerprint else None

    def load(self, step: int, read: Callable[[Path], None]) -> None:
        """Fetch a checkpoint into a temporary folder and let ``read`` read it."""
        with tempfile.TemporaryDirectory() as folder:
            self._copy(f"{self._folder}/step-{step:08d}", self._filesystem, folder, fs.LocalFileSystem())
            read(Path(folder))

    @contextmanager
    def adapter_of(self, trial: str) -> Iterator[Path]:
        """Fetch the finished adapter of another trial into a temporary folder."""
        there = f"{self._folder.rpartition('/')[0]}/{trial}/adapter"
        with tempfile.TemporaryDirectory() as folder:
            self._copy(there, self._filesystem, folder, fs.LocalFileSystem())
            yield Path(folder)

    def publish_adapter(self, write: Callable[[Path], None]) -> str:
        """Store the finished adapter and drop the checkpoints; returns its URI. Rank 0 only."""
        self._upload(write, f"{self._folder}/adapter")
        latest = self.latest()
        if latest is not None:
            self._filesystem.delete_file(f"{self._folder}/latest.json")
            self._filesystem.delete_dir(f"{self._folder}/step-{latest['step']:08d}")
        return self.adapter_uri

    def _upload(self, write: Callable[[Path], None], target: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            self._copy(folder, fs.LocalFileSystem(), target, self._filesystem)

    @staticmethod
    def _copy(source: str, source_fs: fs.FileSystem, target: str, target_fs: fs.FileSystem) -> None:
        target_fs.create_dir(target, recursive=True)
        fs.copy_files(source, target, source_filesystem=source_fs, destination_filesystem=target_fs)

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write aside, then rename: a reader sees the old file or the new one."""
        aside = f"{self._folder}/.{name}"
        with self._filesystem.open_output_stream(aside) as stream:
            stream.write(json.dumps(value).encode())
        self._filesystem.move(aside, f"{self._folder}/{name}")


def drop_trials(root: str, trials: Iterable[str]) -> None:
    """Delete all that lies in storage of these trials; those that have nothing there are passed over.

    Args:
        root: Folder or URI that holds all trials' folders.
        trials: Their ids.

    Raises:
        OSError: If the storage does not answer.
    """
    filesystem, path = resolve(root)
    for trial in trials:
        if filesystem.get_file_info(f"{path}/{trial}").type == fs.FileType.Directory:
            filesystem.delete_dir(f"{path}/{trial}")


def resolve(root: str) -> tuple[fs.FileSystem, str]:
    """Return the file system and path of a folder or URI."""
    if "://" in root:
        filesystem, path = fs.FileSystem.from_uri(root)
        return filesystem, path.rstrip("/")
    return fs.LocalFileSystem(), str(Path(root).resolve())


def probe_storage(root: str) -> None:
    """Write, read and delete a small file.

    Raises:
        OSError: If any of it fails.
    """
    filesystem, path = resolve(root)
    filesystem.create_dir(path, recursive=True)
    name = f"{path}/.probe-{uuid.uuid4().hex}"
    with filesystem.open_output_stream(name) as stream:
        stream.write(b"deft_ray")
    with filesystem.open_input_stream(name) as stream:
        content = stream.read()
    filesystem.delete_file(name)
    if content != b"deft_ray":
        raise OSError(f"{root}: wrote b'deft_ray', read {content!r}")
