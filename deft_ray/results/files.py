"""Write whole files: a reader sees the old content or the new one, never half of it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path


def write_aside(path: Path, write: Callable[[Path], None]) -> Path:
    """Let ``write`` fill a file beside ``path``, then move it into place.

    Args:
        path: The file to create or replace; its folder is created.
        write: Fills the file it is given; its name ends as ``path`` does, because drawing libraries look at that.

    Returns:
        ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(aside)
        with aside.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write ``text`` as UTF-8, all or nothing; returns ``path``."""

    def write(aside: Path) -> None:
        aside.write_bytes(text.encode("utf-8"))

    return write_aside(path, write)


def file_stem(prefix: str, task: str) -> str:
    """``pareto-glue-sst2`` for the task ``glue/sst2``: a task's name made safe as part of a file's name."""
    return f"{prefix}-{re.sub(r'[^A-Za-z0-9._-]+', '-', task)}"
