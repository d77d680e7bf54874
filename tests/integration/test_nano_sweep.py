"""The embedded model through the real command: what it leaves, and that plain PEFT agrees with it."""

from __future__ import annotations

import csv
import json
from itertools import product
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from deft_ray.nano import MODEL_DIR
from deft_ray.nano.tasks import LABELS, generate
from deft_ray.spec.schema import AdapterSection, DataSection, DeftSection, ModelSection, TrainSection, TrialSpec
from tests.integration.sweeps import ROOT, mlflow_runs, records, sweep
from tests.plain_peft import PlainCounts, train_plain

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own, when its database is read

PROMPT = "nano sentiment sentence: {sentence}"
STEPS, TRAIN, VALIDATION = 12, 200, 100
SPEC = f"""
name: nano
data: {{tasks: [nano-sentiment], train_examples: {TRAIN}, validation_examples: {VALIDATION}, grouping: none}}
adapter: {{lora_dropout: 0.1}}
deft: {{alpha: {{loguniform: [0.1, 1]}}, epsilon: 1e-7}}
train: {{steps: {STEPS}, learning_rate: 2e-3, warmup_share: 0, max_grad_norm: 0}}
search: {{trials: 1, seeds: [7]}}
"""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano")
    (folder / "spec.yaml").write_text(SPEC)
    done = sweep(folder / "spec.yaml", folder / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "run" / "screen.txt").write_text(done.stdout)
    return folder / "run"


def test_alpha_zero_is_plain_peft_bit_for_bit(output: Path) -> None:
    baseline = records(output)[0]
    assert baseline["baseline"]
    torch.set_num_threads(1)
    spec = TrialSpec(
        trial="plain",
        task="nano-sentiment",
        seed=7,
        baseline=True,
        model=ModelSection(),
        data=DataSection(tasks=["nano-sentiment"]),
        adapter=AdapterSection(lora_dropout=0.1),
        deft=DeftSection(alpha=0.0),
        train=TrainSection(steps=STEPS, learning_rate=2e-3),
    )
    spec = spec.model_copy(update={"train": spec.train.model_copy(update={"max_grad_norm": 0.0})})
    rows = generate("nano-sentiment", "train", TRAIN)
    sources, answers = [PROMPT.format(**r) for r in rows], [LABELS["nano-sentiment"][r["label"]] for r in rows]
    _, want = train_plain(MODEL_DIR, sources, answers, spec)
    got = load_file(Path(baseline["adapter"]) / "adapter_model.safetensors")
    assert {name.replace(".default", "") for name in want} == got.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name.replace(".default", "")], tensor), name


@pytest.mark.parametrize("index", [0, 1])
def test_a_saved_adapter_opened_with_plain_peft_has_the_recorded_density_and_score(output: Path, index: int) -> None:
    record = records(output)[index]
    base = AutoModelForSeq2SeqLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, record["adapter"]).eval()
    tokenizer, counts, right = AutoTokenizer.from_pretrained(MODEL_DIR), PlainCounts(model), 0
    words = LABELS["nano-sentiment"]
    for row in generate("nano-sentiment", "validation", VALIDATION):
        source = tokenizer(PROMPT.format(**row), return_tensors="pt")
        losses = []
        for label, word in enumerate(words):
            counts.on = label == row["label"]
            labels = tokenizer(word, return_tensors="pt").input_ids
            loss = model(input_ids=source.input_ids, attention_mask=source.attention_mask, labels=labels).loss
            losses.append(float(loss) * labels.numel())
        right += losses.index(min(losses)) == row["label"]
    density = sum(counts.nonzero.values()) / sum(counts.total.values())
    assert record["density"] == pytest.approx(density, abs=1e-4)
    assert record["score"] == right / VALIDATION


def test_what_a_sweep_leaves(output: Path) -> None:
    for name in ("spec.yaml", "plan.json", "records.jsonl", "front.csv", "report.md", "mlflow.db"):
        assert (output / name).is_file(), name
    for kind in ("html", "png", "csv"):
        assert (output / f"pareto-nano-sentiment.{kind}").stat().st_size > 0
    found = records(output)
    assert [(r["trial"], r["baseline"], r["status"], r["steps"]) for r in found] == [
        ("t0000", True, "complete", STEPS),
        ("t0001", False, "complete", STEPS),
    ]
    assert found[0]["config"]["deft.alpha"] == 0
    assert 0.1 <= found[1]["config"]["deft.alpha"] <= 1
    assert found[0]["dtype"] == "float32"
    assert found[0]["activation"] == "NewGELUActivation"
    with (output / "front.csv").open() as stream:
        header = next(csv.reader(stream))
    for column in ("task", "trial", "seed", "score", "density", "score_drop", "density_change"):
        assert column in header
    for record in found:
        said = pq.read_table(output / "predictions" / f"{record['trial']}.parquet").to_pydict()
        assert sum(s == t for s, t in zip(said["0"], said["label"], strict=True)) / VALIDATION == record["score"]
    rows = [json.loads(line) for line in (output / "curves" / "t0001.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, STEPS + 1))


def test_what_the_screen_shows(output: Path) -> None:
    lines = (output / "screen.txt").read_text().splitlines()
    assert len([line for line in lines if line.startswith("[")]) == 2
    assert "left" in next(line for line in lines if line.startswith("[1/2]"))
    assert any(line.startswith("front") and line.endswith("front.csv") for line in lines)
    assert lines[-1].startswith("MLflow  mlflow ui --backend-store-uri sqlite:///")
    assert len(lines) < 30, "a wall of output"


def test_mlflow_has_a_parent_and_nested_runs(output: Path) -> None:
    parents, nested = mlflow_runs(output)
    assert len(parents) == 1
    assert parents[0].info.status == "FINISHED"
    assert "hypervolume/nano-sentiment" in parents[0].data.metrics
    assert {run.data.tags["deft_ray.trial"] for run in nested} == {"t0000", "t0001"}
    for run in nested:
        record = next(r for r in records(output) if r["trial"] == run.data.tags["deft_ray.trial"])
        assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        assert run.data.metrics["score"] == record["score"]
        assert run.data.metrics["density"] == record["density"]
        assert run.data.params["deft.alpha"] == str(record["config"]["deft.alpha"])


def test_quickstart_with_two_workers_and_zero_stages_0_to_2(tmp_path: Path) -> None:
    settings = (
        "train.steps=3",
        "data.train_examples=100",
        "data.validation_examples=40",
        "resources.workers_per_host=2",
        "resources.hosts=1",
        "baseline={train.zero_stage: 0}",
        "train.zero_stage={choice: [1, 2]}",
        "search.trials=2",
        "search.try_first=[{train.zero_stage: 1}, {train.zero_stage: 2}]",
    )
    overrides = [word for setting in settings for word in ("--set", setting)]
    done = sweep(ROOT / "search_spaces" / "quickstart.yaml", tmp_path / "run", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    found = records(tmp_path / "run")
    assert {record["status"] for record in found} == {"complete"}
    assert {record["config"]["model.quantization"] for record in found} == {"nf4"}
    tasks = ("nano-sentiment", "nano-entailment", "nano-question")  # who ends first is the clock's affair
    trained = sorted((record["task"], record["config"]["train.zero_stage"]) for record in found)
    assert trained == sorted(product(tasks, range(3)))
