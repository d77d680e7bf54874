"""Whatever stands in a spec, loading it gives a spec or faults that name their place, never another exception."""

from __future__ import annotations

import copy
import datetime
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deft_ray.errors import SpecError
from deft_ray.spec.loading import load_spec
from deft_ray.spec.machine import Machine
from deft_ray.spec.schema import SweepSpec

VALID: dict[str, Any] = {
    "name": "fuzz",
    "model": {"name": "google/flan-t5-xl", "quantization": "nf4"},
    "data": {
        "tasks": ["rte", "squad", "mine"],
        "max_source_tokens": 64,
        "window_overlap_tokens": 16,
        "own": {
            "mine": {"train": "a.csv", "validation": "a.csv", "text": ["a", "b"], "label": "c", "labels": ["x", "y"]},
            "faq": {"train": "a.csv", "validation": "a.csv", "question": "q", "context": "c", "answer": "a"},
        },
    },
    "adapter": {"r": {"choice": [4, 8]}, "lora_dropout": {"uniform": [0.0, 0.2]}, "target_modules": ["q", "v"]},
    "deft": {"approximation": {"choice": ["l0", "tanh"]}, "epsilon": {"loguniform": [1e-9, 1e-3]}, "beta": 20},
    "train": {"steps": 10, "batch_size": {"choice": [16, 32]}, "micro_batch_size": 4},
    "search": {"seeds": [0, 1], "try_first": [{"adapter.r": 4}]},
    "baseline": {"adapter.r": 8, "adapter.lora_dropout": 0.0, "train.batch_size": 16},
    "resources": {"workers_per_host": 2, "hosts": "auto"},
}
JUNK: list[Any] = [
    None,
    True,
    0,
    -1,
    1,
    1e-7,
    math.nan,
    math.inf,
    10**25,
    10**400,
    "",
    "l0",
    "a\nb",
    "\x7f",
    "a\0b",
    "a" * 5000,
    "~",
    "~nobody/x",
    "/no/such",
    "bert",
    [],
    {},
    [[]],
    [None],
    [{"a": 1}],
    {"a": {"b": {}}},
    {"str": 1},
    datetime.date(2024, 1, 1),
    b"bytes",
    {"choice": []},
    {"choice": [None]},
    {"choice": [True, 1]},
    {"choice": {}},
    {"choice": ["l0"], "uniform": [0, 1]},
    {"uniform": [0, 1]},
    {"uniform": [10**400, 10**401]},
    {"uniform": ["a", "b"]},
    {"randint": [1, 5]},
    {"loguniform": [-1, -2]},
]
SNIPPETS = [
    "",
    "\n",
    " ",
    ":",
    "- ",
    "[",
    "]",
    "{",
    "}",
    "!",
    "&a",
    "*a",
    "'",
    '"',
    "#",
    "\t",
    "?",
    "|",
    ">",
    "%",
    "<<: ",
    "=",
    "0x",
    "\0",
    "---\n",
    "...\n",
    "1e",
    "~",
]
OVERRIDES = [
    "deft.alpha=[",
    "deft={a: 1, a: 2}",
    "a.a.a=&a [*a]",
    "=",
    "train.steps.choice=1",
    "data.own.mine.text=[a, b, c]",
    "data.own.mine={choice: [1]}",
    "data.tasks.0.x=1",
    "search=!x 1",
    "space.x=1",
    "deft.alpha={uniform: [0, 1]}",
    "baseline.adapter.r=0x_",
    "model=null",
    "train=[[[[[[1]]]]]]",
    "name=a: b: c",
    "x",
]


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every node below the root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, child in items:
        yield (*path, key)
        yield from places(child, (*path, key))


def with_junk(rng: random.Random) -> str:
    """Return the valid spec with one to three nodes replaced, removed or added."""
    tree = copy.deepcopy(VALID)
    for _ in range(rng.randint(1, 3)):
        *above, last = rng.choice(list(places(tree)))
        node = tree
        for step in above:
            node = node[step]
        if rng.random() < 0.15 and isinstance(node, dict):
            last = rng.choice(["x", "space", "a.b", "\n", "choice", "deft"])
        if rng.random() < 0.15 and isinstance(node, dict):
            node.pop(last, None)
        else:
            node[last] = copy.deepcopy(rng.choice(JUNK))
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def with_torn_text(rng: random.Random) -> str:
    text = yaml.safe_dump(VALID, sort_keys=False)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(SNIPPETS) + text[at + rng.randint(0, 3) :]
    return text


def outcome(file: Path, text: str, overrides: list[str]) -> SweepSpec | list[str]:
    """Return the spec or its faults; any other exception is a bug."""
    file.write_text(text, encoding="utf-8")
    try:
        return load_spec(file, overrides, Machine(cpus=4, gpus=0))
    except SpecError as error:
        return error.faults


@pytest.mark.parametrize("seed", range(10))
def test_junk_gives_a_spec_or_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.csv").touch()
    rng = random.Random(seed)
    fault_line = re.compile(rf"({re.escape(str(tmp_path))}/spec\.yaml:\d+|--set .*): \S.*")
    file = tmp_path / "spec.yaml"
    assert isinstance(outcome(file, yaml.safe_dump(VALID), []), SweepSpec)
    for _ in range(20):
        text = (with_junk if rng.random() < 0.7 else with_torn_text)(rng)
        overrides = rng.sample(OVERRIDES, rng.choice([0, 0, 1]))
        found = outcome(file, text, overrides)
        assert isinstance(found, SweepSpec) or found, text
        assert isinstance(found, SweepSpec) or [fault for fault in found if not fault_line.fullmatch(fault)] == [], text
