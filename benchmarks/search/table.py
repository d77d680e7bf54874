"""The recorded table of real trainings as a problem: every configuration of it, measured once, with its curve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from problems import STEPS, Config, Measured, Problem

from deft_ray.spec.yaml_tree import parse

HERE = Path(__file__).parent
SPEC, TABLE = HERE / "nano_trials.yaml", HERE / "nano_trials.parquet"
MAX_SCORE_DROP = 0.01

#: Settings of a trial that a row of the table tells apart; None where it does not read them.
Key = tuple[Any, ...]


def load_table() -> Problem:
    """Return the table as a problem."""
    tree, _, _ = parse(SPEC.read_text(encoding="utf-8"))
    rows = pq.read_table(TABLE).to_pylist()
    found = {(key_of(row), row["baseline"], row["step"]): (row["score"], row["density"]) for row in rows}

    def look_up(config: Config, steps: int) -> Measured:
        baseline = float(config["deft.alpha"]) == 0.0
        return found.get((key_of(config), baseline, steps), (math.nan, math.nan))

    return Problem(
        name="nano",
        deft=tree["deft"],
        train={"learning_rate": tree["train"]["learning_rate"]},
        baseline=tree["baseline"],
        max_score_drop=MAX_SCORE_DROP,
        truth=look_up,
        finite=np.array([values for (_, _, step), values in found.items() if step == STEPS]),
    )


def key_of(config: Mapping[str, Any]) -> Key:
    """Return the settings that a trial reads, the baseline's being its learning rate alone."""
    rate = config["train.learning_rate"]
    if float(config["deft.alpha"]) == 0.0:
        return (rate,)
    shape = config["deft.epsilon"] if config["deft.approximation"] == "l0" else config["deft.beta"]
    scale = config["deft.lambda_init"] if config["deft.adaptive"] else None
    return (rate, config["deft.approximation"], config["deft.alpha"], shape, config["deft.adaptive"], scale)
