"""Every shipped spec runs to the end, with a tiny model of its family and made-up rows in place of the real ones."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

from tests.integration.sweeps import ROOT, mlflow_runs, records, sweep
from tests.tiny import (
    write_cifar10,
    write_glue,
    write_squad,
    write_tiny_bert,
    write_tiny_gpt2,
    write_tiny_opt,
    write_tiny_roberta,
    write_tiny_t5,
    write_tiny_vit,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own, when its database is read

SHRUNK = (
    "train.steps=2",
    "train.epochs=null",
    "search.trials=1",
    "resources.hosts=1",
    "resources.gpus_per_worker=0",
    "dial.calibration_examples=6",
)

#: Published setting: (tiny model in its place, task, activation, approximation).
OTHERS: dict[str, tuple[Callable[[Path], Path], str, str, str]] = {
    "vit_base_adapter": (write_tiny_vit, "cifar10", "GELUActivation", "l0"),
    "gpt2_adapter": (write_tiny_gpt2, "sst2", "NewGELUActivation", "l0"),
    "opt_125m_lora": (write_tiny_opt, "sst2", "ReLU", "tanh"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_glue(folder)
    write_cifar10(folder)
    return write_squad(folder)


def overrides(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def test_all_shipped_specs_are_here() -> None:
    shipped = {file.name for file in (ROOT / "search_spaces").glob("*.yaml")}
    assert shipped == {"quickstart.yaml", "glue.yaml", "squad.yaml", "glue_roberta.yaml"}
    quickstart = yaml.safe_load((ROOT / "search_spaces" / "quickstart.yaml").read_text())
    assert quickstart["resources"]["slots_per_host"] == "auto"


def test_the_quickstart_shares_passes_and_says_what_that_saved(tmp_path: Path) -> None:
    """One task of it on one host, with fewer steps."""
    local = overrides(
        "data.tasks=[nano-sentiment]", "data.validation_examples=64", "train.steps=30", "resources.hosts=1"
    )
    done = sweep(ROOT / "search_spaces" / "quickstart.yaml", tmp_path / "run", *local)

    assert done.returncode == 0, done.stdout + done.stderr
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("slots   ")]
    assert "up to " in said
    found = records(tmp_path / "run")
    assert [record["status"] for record in found] == ["complete"] * 5
    assert max(record["packing"]["slots"] for record in found) > 1
    assert all(record["packing"]["passes"] == 30 for record in found)
    assert sum(record["packing"]["shared"] for record in found) > 0
    alone_s, part_s = (sum(record["packing"][name] for record in found) for name in ("alone_s", "part_s"))
    assert alone_s > 0, "it is known by then what passes cost"
    assert f"{abs(alone_s - part_s):,.0f} s {'of passes saved' if alone_s >= part_s else 'lost'}" in said
    assert "- Packing: up to " in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize(
    ("name", "family", "tasks"),
    [("glue", "t5", 8), ("squad", "t5", 1), ("glue_roberta", "roberta", 8)],
)
def test_shipped_spec_runs_to_the_end(name: str, family: str, tasks: int, data: Path, tmp_path: Path) -> None:
    model = (write_tiny_t5 if family == "t5" else write_tiny_roberta)(tmp_path / "model")
    output = tmp_path / "run"
    shared = name == "glue_roberta"  # one of them with points for all tasks
    local = overrides(*SHRUNK, f"model.name={model}", f"data.dir={data}", *["search.scope=shared"] * shared)

    done = sweep(ROOT / "search_spaces" / f"{name}.yaml", output, *local)

    assert done.returncode == 0, done.stdout + done.stderr
    found = records(output)
    assert len(found) == 2 * tasks
    assert {record["status"] for record in found} == {"complete"}
    assert all(0 <= record["density"] <= 1 for record in found)
    assert all(0 <= at["density"] <= record["density"] for record in found for at in record["dial"].values())
    assert {len(record["dial"]) for record in found} == {3 if name == "squad" else 5}, "0 and the spec's thresholds"
    with (output / "front.csv").open() as stream:
        together = {"all-tasks"} if shared else set()
        assert {row["task"] for row in csv.DictReader(stream)} == {record["task"] for record in found} | together
    assert (output / "pareto-all-tasks.png").is_file() is shared
    assert len({record["setting"] for record in found}) == (2 if shared else 2 * tasks)
    for record in found:
        assert all((output / f"pareto-{record['task']}.{kind}").is_file() for kind in ("html", "png", "csv"))
    parents, nested = mlflow_runs(output)
    assert (len(parents), len(nested)) == (1, 2 * tasks)


def test_a_published_setting_runs_to_the_end_with_the_authors_head_and_bottleneck(data: Path, tmp_path: Path) -> None:
    model, output = write_tiny_bert(tmp_path / "model"), tmp_path / "run"
    local = overrides(*SHRUNK[:-1], f"model.name={model}", f"data.dir={data}", "data.tasks=[rte]", "search.seeds=[42]")
    done = sweep(ROOT / "search_spaces" / "paper" / "bert_base_relu_adapter.yaml", output, *local)

    assert done.returncode == 0, done.stdout + done.stderr
    found = records(output)
    assert [(record["status"], record["activation"], record["approximation"]) for record in found] == [
        ("complete", "ReLU", "tanh")
    ] * 2
    for record in found:
        with safe_open(Path(record["adapter"]) / "adapter_model.safetensors", "np") as saved:
            shapes = {key.split(".", 2)[-1]: saved.get_slice(key).get_shape() for key in saved.keys()}  # noqa: SIM118
        assert shapes["classifier.dense.weight"] == [64, 64]
        assert shapes["classifier.out_proj.weight"] == [2, 64]
        assert json.loads((Path(record["adapter"]) / "adapter_config.json").read_text())["reads"] == "sum"


@pytest.mark.parametrize("name", OTHERS)
def test_a_published_setting_of_the_other_families_runs_to_the_end(name: str, data: Path, tmp_path: Path) -> None:
    write, task, activation, approximation = OTHERS[name]
    model, output = write(tmp_path / "model"), tmp_path / "run"
    local = overrides(*SHRUNK[:-1], f"model.name={model}", f"data.dir={data}", "search.seeds=[42]")
    done = sweep(ROOT / "search_spaces" / "paper" / f"{name}.yaml", output, *local)

    assert done.returncode == 0, done.stdout + done.stderr
    found = records(output)
    assert sorted(record["baseline"] for record in found) == [False, True]
    for record in found:
        assert (record["task"], record["status"], record["steps"]) == (task, "complete", 2)
        assert (record["activation"], record["approximation"]) == (activation, approximation)
        assert 0 < record["density"] < 1
        assert (Path(record["adapter"]) / "adapter_model.safetensors").is_file()
