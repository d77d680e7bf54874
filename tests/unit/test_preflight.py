"""What is wrong around a spec is told before anything is started or written: exit code 3."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from deft_ray.errors import SetupError
from deft_ray.spec.catalog import find_task
from deft_ray.spec.loading import check_tree, load_spec
from deft_ray.spec.machine import Machine
from deft_ray.spec.plan import build_plan
from deft_ray.spec.schema import SweepSpec
from deft_ray.sweep.__main__ import main
from deft_ray.sweep.run_dir import RunDir
from deft_ray.sweep.runner import preflight, run_sweep, with_absolute_paths

SST2 = {"sentence": ["good", "bad"], "label": [1, 0]}
SQUAD = {"question": ["who"], "context": ["me"], "answers": [{"text": ["me"], "answer_start": [0]}]}
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")
WEIGHTS = "model.safetensors or model.safetensors.index.json or pytorch_model.bin or pytorch_model.bin.index.json"
TOKENIZERS = "tokenizer.json or spiece.model or vocab.txt or vocab.json or sentencepiece.bpe.model"


def tree_of(**sections: Any) -> dict[str, Any]:
    return {"name": "try", "data": {"tasks": ["nano-sentiment"]}, "train": {"steps": 10}, **sections}


def spec_of(**sections: Any) -> SweepSpec:
    spec, faults = check_tree(tree_of(**sections))
    assert faults == []
    assert spec is not None
    return spec


def write_parquet(file: Path, columns: dict[str, list[Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)


def write_data(folder: Path) -> Path:
    for split in ("train", "validation"):
        write_parquet(folder / "glue" / "sst2" / f"{split}.parquet", SST2)
        write_parquet(folder / "squad" / f"{split}.parquet", SQUAD)
    return folder


def write_model(folder: Path) -> Path:
    folder.mkdir()
    for name in MODEL_FILES:
        (folder / name).write_text('{"model_type": "t5"}' if name == "config.json" else "")
    return folder


def write_sweep(folder: Path, spec: SweepSpec) -> RunDir:
    run_dir = RunDir(folder)
    run_dir.create(spec, build_plan(spec, str(folder), Machine(4, 0)))
    (folder / "records.jsonl").write_text('{"trial": "t0000"}\n')
    return run_dir


def snapshot(folder: Path) -> dict[str, str]:
    """Return every path below a folder with a digest of its content and its time of change."""
    return {
        str(path.relative_to(folder)): f"{path.stat().st_mtime_ns} "
        + (hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder")
        for path in folder.rglob("*")
    }


@pytest.fixture
def faults_of(tmp_path: Path) -> Callable[..., list[str]]:
    """Run the checks, and see that they leave every file as it was; the folder's own path is left out of the faults."""

    def check(spec: SweepSpec, output: str = "out", *, resume: bool = False, extend: bool = False) -> list[str]:
        before = snapshot(tmp_path)
        with pytest.raises(SetupError) as caught:
            preflight(spec, RunDir(tmp_path / output), resume, extend)
        assert snapshot(tmp_path) == before
        return str(caught.value).replace(f"{tmp_path}/", "").split("\n")

    return check


def test_good_surroundings_pass_and_nothing_is_written(tmp_path: Path) -> None:
    data, model = write_data(tmp_path / "data"), write_model(tmp_path / "t5")
    (tmp_path / "empty").mkdir()
    before = snapshot(tmp_path)
    spec = spec_of(data={"tasks": ["sst2", "squad", "nano-question"], "dir": str(data)}, model={"name": str(model)})
    for output in ("new", "new/below", "empty"):
        preflight(spec, RunDir(tmp_path / output), resume=False)
    assert snapshot(tmp_path) == before


def test_every_split_and_column_that_is_lacking_is_told(tmp_path: Path, faults_of: Callable[..., list[str]]) -> None:
    data = write_data(tmp_path / "data")
    (data / "glue" / "sst2" / "validation.parquet").unlink()
    write_parquet(data / "squad" / "train.parquet", {"question": ["who"]})
    (data / "squad" / "validation.parquet").write_text("no parquet")
    found = faults_of(spec_of(data={"tasks": ["sst2", "squad", "rte"], "dir": str(data)}))
    assert found[:2] == [
        "data/glue/sst2/validation.parquet: data.dir: no such file; the task 'sst2' needs this split",
        "data/squad/train.parquet: data.dir: lacks the column context, answers; needs question, context, answers",
    ]
    assert found[2].startswith("data/squad/validation.parquet: data.dir: is no parquet file (")
    assert found[2].endswith("); needs question, context, answers")
    assert found[3:] == [
        "data/glue/rte/train.parquet: data.dir: no such file; the task 'rte' needs this split",
        "data/glue/rte/validation.parquet: data.dir: no such file; the task 'rte' needs this split",
    ]


def test_a_task_is_validated_on_its_own_split(tmp_path: Path, faults_of: Callable[..., list[str]]) -> None:
    for split in ("train", "validation"):
        columns = {"premise": ["a"], "hypothesis": ["b"], "label": [0]}
        write_parquet(tmp_path / "data" / "glue" / "mnli" / f"{split}.parquet", columns)
    assert faults_of(spec_of(data={"tasks": ["mnli"], "dir": str(tmp_path / "data")})) == [
        "data/glue/mnli/validation_matched.parquet: data.dir: no such file; the task 'mnli' needs this split"
    ]


@pytest.mark.parametrize(
    ("lacking", "what", "needs"),
    [
        ("config.json", "config", "config.json"),
        ("model.safetensors", "weights", WEIGHTS),
        ("tokenizer.json", "tokenizer", TOKENIZERS),
    ],
)
def test_a_model_folder_has_config_weights_and_tokenizer(
    tmp_path: Path, faults_of: Callable[..., list[str]], lacking: str, what: str, needs: str
) -> None:
    model = write_model(tmp_path / "t5")
    (model / lacking).unlink()
    spec = spec_of(model={"name": str(model), "family": "t5"})
    assert faults_of(spec) == [f"t5: model.name: no {what} in this folder; needs {needs}"]


def test_a_vision_model_has_an_image_processor_and_its_images_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_model(tmp_path / "vision")
    (folder / "config.json").write_text('{"model_type": "vit"}')
    (folder / "tokenizer.json").unlink()
    (tmp_path / "pics").mkdir()
    spec = spec_of(model={"name": "vision"}, data={"tasks": ["images"], "dir": "pics"})

    with pytest.raises(SetupError) as caught:
        preflight(spec, RunDir(tmp_path / "run"), resume=False)
    assert str(caught.value).splitlines() == [
        "vision: model.name: no image processor in this folder; needs preprocessor_config.json",
        "pics/images/train: data.dir: no such folder; the task 'images' needs this split",
        "pics/images/validation: data.dir: no such folder; the task 'images' needs this split",
    ]


def test_an_empty_model_folder_lacks_all_of_them(tmp_path: Path, faults_of: Callable[..., list[str]]) -> None:
    (tmp_path / "t5").mkdir()
    found = faults_of(spec_of(model={"name": str(tmp_path / "t5"), "family": "t5"}))
    assert [fault.split(" in this folder")[0] for fault in found] == [
        "t5: model.name: no config",
        "t5: model.name: no weights",
        "t5: model.name: no tokenizer",
    ]


@pytest.mark.parametrize(
    ("index", "faults"),
    [
        ({"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}, []),
        ({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}},
         ["names model-2.safetensors, which is not there"]),
        ({"weights": {}}, ["is no index of weights; needs a 'weight_map'"]),
        ([], ["is no index of weights; needs a 'weight_map'"]),
    ],
)  # fmt: skip
def test_an_index_of_weights_names_files_that_are_there(
    tmp_path: Path, faults_of: Callable[..., list[str]], index: Any, faults: list[str]
) -> None:
    model = write_model(tmp_path / "t5")
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    spec = spec_of(model={"name": str(model)})
    if faults:
        assert faults_of(spec) == [f"t5/model.safetensors.index.json: model.name: {fault}" for fault in faults]
    else:
        preflight(spec, RunDir(tmp_path / "out"), resume=False)


def test_an_output_folder_that_holds_a_sweep_is_left_alone(tmp_path: Path, faults_of: Callable[..., list[str]]) -> None:
    write_sweep(tmp_path / "out", spec_of(name="other"))
    message = "out: holds the sweep 'other' already; continue it with --resume, or give another folder with --output"
    assert faults_of(spec_of()) == [message]
    assert faults_of(spec_of(name="other")) == [message]


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "folder/file"])
def test_an_output_folder_that_holds_anything_is_left_alone(
    tmp_path: Path, faults_of: Callable[..., list[str]], name: str
) -> None:
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).touch()
    assert faults_of(spec_of()) == ["out: is not an empty folder; give another one with --output"]


def test_an_output_folder_is_no_file(tmp_path: Path, faults_of: Callable[..., list[str]]) -> None:
    (tmp_path / "out").touch()
    assert faults_of(spec_of()) == ["out: is not an empty folder; give another one with --output"]


def test_a_damaged_plan_is_told(tmp_path: Path, faults_of: Callable[..., list[str]]) -> None:
    write_sweep(tmp_path / "out", spec_of())
    for content in ("{", "[]", '{"name": "x"}'):
        (tmp_path / "out" / "plan.json").write_text(content)
        for resume in (False, True):
            (found,) = faults_of(spec_of(), resume=resume)
            assert found.startswith("out/plan.json: is no plan of a sweep (")


def test_a_sweep_is_continued_with_its_own_spec(tmp_path: Path) -> None:
    deft = {"alpha": {"uniform": [0, 2]}, "epsilon": 1e-7}
    write_sweep(tmp_path / "out", spec_of(deft=deft))
    before = snapshot(tmp_path)
    preflight(spec_of(deft=deft), RunDir(tmp_path / "out"), resume=True)
    preflight(spec_of(deft=deft, tracking={"uri": "http://new"}), RunDir(tmp_path / "out"), resume=True)
    assert snapshot(tmp_path) == before


def test_every_leaf_that_has_changed_since_is_told(tmp_path: Path, faults_of: Callable[..., list[str]]) -> None:
    write_sweep(tmp_path / "out", spec_of(deft={"alpha": {"uniform": [0, 2]}}))
    changed = spec_of(
        train={"steps": 20}, deft={"alpha": {"uniform": [0, 3]}}, search={"seeds": [0, 1]}, storage="s3://b"
    )
    told = "a sweep is continued with the spec it began with"
    assert sorted(faults_of(changed, resume=True)) == [
        f"out: deft.alpha.uniform: is [0.0, 3.0] now, was [0.0, 2.0]; {told}",
        f"out: search.seeds: is [0, 1] now, was [0]; {told}",
        f"out: storage: is 's3://b' now, was None; {told}",
        f"out: train.steps: is 20 now, was 10; {told}",
    ]


def test_a_spec_of_before_a_leaf_came_into_being_is_the_same(
    tmp_path: Path, faults_of: Callable[..., list[str]]
) -> None:
    write_sweep(tmp_path / "out", spec_of())
    file = tmp_path / "out" / "spec.yaml"
    tree = yaml.safe_load(file.read_text())
    del tree["dial"], tree["search"]["scheduler"]
    file.write_text(yaml.safe_dump(tree))
    preflight(spec_of(), RunDir(tmp_path / "out"), resume=True)
    told = "a sweep is continued with the spec it began with"
    assert faults_of(spec_of(dial={"taus": [0.1]}), resume=True) == [
        f"out: dial.taus: is [0.1] now, was []; {told}",
    ]


def test_a_sweep_is_extended_by_trials_alone(tmp_path: Path, faults_of: Callable[..., list[str]]) -> None:
    run_dir = write_sweep(tmp_path / "out", spec_of(search={"trials": 4}))
    identity = run_dir.sweep_id
    more = spec_of(search={"trials": 6})
    told = "a sweep is continued with the spec it began with"
    assert faults_of(more, resume=True) == [f"out: search.trials: is 6 now, was 4; {told}"]
    for fewer in (3, 4):
        needs = f"out: search.trials: is {fewer} now, was 4; --extend needs more than before"
        assert faults_of(spec_of(search={"trials": fewer}), extend=True) == [needs]
    other = spec_of(search={"trials": 6}, train={"steps": 20})
    assert faults_of(other, extend=True) == [f"out: train.steps: is 20 now, was 10; {told}"]
    preflight(more, RunDir(tmp_path / "out"), resume=False, extend=True)

    run_dir.continue_with(more, build_plan(more, "out", Machine(2, 0)))
    assert run_dir.sweep_id == identity
    preflight(more, RunDir(tmp_path / "out"), resume=True)
    preflight(more, RunDir(tmp_path / "out"), resume=True, extend=True)  # the same command again, and --resume
    assert faults_of(more, extend=True) == ["out: search.trials: is 6 now, was 6; --extend needs more than before"]
    assert yaml.safe_load(run_dir.spec.read_text())["search"]["trials"] == 6
    assert json.loads(run_dir.plan.read_text())["trials"] == 7


def test_a_path_is_not_extended(tmp_path: Path, faults_of: Callable[..., list[str]]) -> None:
    path = {"deft": {"alpha": {"loguniform": [0.1, 10.0]}}}
    write_sweep(tmp_path / "out", spec_of(search={"path": "alpha", "trials": 4}, **path))
    said = "out: search.path: a path is not extended: more trials would move its values of α"
    assert faults_of(spec_of(search={"path": "alpha", "trials": 6}, **path), extend=True) == [said]


@pytest.mark.parametrize("present", [None, "out", "out/notes.txt", "out/spec.yaml", "out/plan.json"])
def test_there_must_be_a_sweep_to_continue(
    tmp_path: Path, faults_of: Callable[..., list[str]], present: str | None
) -> None:
    if present is not None:
        (tmp_path / "out").mkdir()
    if present is not None and present != "out":
        (tmp_path / present).write_text("{}")
    assert faults_of(spec_of(), resume=True) == ["out: holds no sweep to continue; start one without --resume"]


@pytest.mark.parametrize("writes", [1, 2, 3])
@pytest.mark.parametrize("resume", [False, True])
def test_a_sweep_killed_while_it_made_its_folder_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool, writes: int
) -> None:
    left = writes

    def or_die(real: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise SystemExit
            return real(*arguments, **options)

        return act

    plan = build_plan(spec_of(), str(tmp_path / "out"), Machine(4, 0))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", or_die(Path.write_text))
        patch.setattr("os.replace", or_die(os.replace))
        with pytest.raises(SystemExit):
            RunDir(tmp_path / "out").create(spec_of(), plan)
    run_dir = RunDir(tmp_path / "out")
    assert not run_dir.begun
    preflight(spec_of(), run_dir, resume)
    run_dir.create(spec_of(), plan)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["plan.json", "spec.yaml"]


def test_a_folder_with_a_file_of_somebody_else_is_not_half_made(
    tmp_path: Path, faults_of: Callable[..., list[str]]
) -> None:
    (tmp_path / "out").mkdir()
    for name in (".plan.json.new", "notes.txt"):
        (tmp_path / "out" / name).touch()
    assert faults_of(spec_of()) == ["out: is not an empty folder; give another one with --output"]


@pytest.mark.parametrize("content", ["[", "- a", ""])
def test_a_damaged_spec_cannot_be_continued(tmp_path: Path, faults_of: Callable[..., list[str]], content: str) -> None:
    write_sweep(tmp_path / "out", spec_of()).spec.write_text(content)
    message = "out/spec.yaml: is no spec of a sweep, so nothing can be continued; give another folder"
    assert faults_of(spec_of(), resume=True) == [message]


def test_faults_of_output_model_and_data_come_together(tmp_path: Path, faults_of: Callable[..., list[str]]) -> None:
    (tmp_path / "out").touch()
    (tmp_path / "data").mkdir()
    model = write_model(tmp_path / "t5")
    (model / "model.safetensors").unlink()
    found = faults_of(spec_of(model={"name": str(model)}, data={"tasks": ["sst2"], "dir": str(tmp_path / "data")}))
    assert [fault.split(":")[0] for fault in found] == [
        "out",
        "t5",
        "data/glue/sst2/train.parquet",
        "data/glue/sst2/validation.parquet",
    ]


def test_a_run_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    before = snapshot(tmp_path)
    with pytest.raises(
        SetupError, match=r"file/out: cannot be made: .*Not a directory.*; give another folder with --output"
    ):
        run_sweep(spec_of(), tmp_path / "file" / "out")
    assert snapshot(tmp_path) == before


def test_paths_are_made_absolute_from_home_and_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "t5")
    write_data(tmp_path / "data")
    spec = with_absolute_paths(
        spec_of(model={"name": "~/t5"}, data={"tasks": ["sst2"], "dir": "data"}, storage="~/keep")
    )
    assert (spec.model.name, spec.data.dir, spec.storage) == tuple(
        f"{tmp_path}/{name}" for name in ("t5", "data", "keep")
    )
    hub = with_absolute_paths(spec_of(model={"name": "google/flan-t5-xl"}, storage="s3://bucket/x"))
    assert (hub.model.name, hub.data.dir, hub.storage) == ("google/flan-t5-xl", None, "s3://bucket/x")


def test_own_files_are_read_before_anything_starts(tmp_path: Path, faults_of: Callable[..., list[str]]) -> None:
    data = write_data(tmp_path / "data")
    (data / "glue" / "sst2" / "train.parquet").unlink()
    (data / "train.csv").write_text("body,stars\na boat,good\na horse,none\n")
    (data / "dev.jsonl").write_text('{"body": "a boat"}\n')
    own = {"train": "train.csv", "validation": "dev.jsonl", "text": "body", "label": "stars", "labels": ["bad", "good"]}
    spec = spec_of(data={"tasks": ["sst2", "mine"], "dir": str(data), "own": {"mine": own}})
    assert faults_of(spec) == [
        "data/glue/sst2/train.parquet: data.dir: no such file; the task 'sst2' needs this split",
        'data/train.csv: data.own.mine.train: row 2: unknown label (got "none"); allowed: bad, good, or 0 to 1',
        "data/dev.jsonl: data.own.mine.validation: lacks the column stars; has body",
    ]
    unused = spec_of(data={"tasks": ["squad"], "dir": str(data), "own": {"mine": own}})
    preflight(unused, RunDir(tmp_path / "out"), resume=False)


def test_own_files_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("data/train.csv", "train.csv", "dev.csv"):
        (tmp_path / name).touch()
    own = {"train": "train.csv", "validation": "~/dev.csv", "text": "body", "label": "stars", "labels": ["bad", "good"]}
    for folder, train in ((None, "train.csv"), ("data", "data/train.csv")):
        spec = with_absolute_paths(spec_of(data={"tasks": ["mine"], "dir": folder, "own": {"mine": own}}))
        mine = spec.data.own["mine"]
        assert (mine.train, mine.validation) == (f"{tmp_path}/{train}", f"{tmp_path}/dev.csv")
        assert find_task("mine", spec.data).files == (mine.train, mine.validation)


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing Ray from here on is an error: these faults are found before it is needed."""
    monkeypatch.setitem(sys.modules, "ray", None)


@pytest.mark.usefixtures("without_ray")
def test_the_command_ends_with_3_and_the_fault_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text(yaml.safe_dump(tree_of(data={"tasks": ["sst2"], "dir": "data"})))
    write_data(Path("data"))
    Path("data/glue/sst2/train.parquet").unlink()
    Path("runs").mkdir()
    write_sweep(Path("runs/try"), load_spec("spec.yaml"))
    before = snapshot(tmp_path)
    sst2 = f"{tmp_path}/data/glue/sst2/train.parquet: data.dir: no such file; the task 'sst2' needs this split\n"
    taken = "continue it with --resume, or give another folder with --output"
    cases = [
        (["spec.yaml"], f"{tmp_path}/runs/try: holds the sweep 'try' already; {taken}\n{sst2}"),
        (["spec.yaml", "--output", "new"], sst2),
        (["spec.yaml", "--output", "new", "--resume"],
         f"{tmp_path}/new: holds no sweep to continue; start one without --resume\n{sst2}"),
    ]  # fmt: skip
    for arguments, stderr in cases:
        assert main(arguments) == 3
        captured = capsys.readouterr()
        assert captured.err == stderr
        assert captured.out.startswith("sweep          try\n")
        assert snapshot(tmp_path) == before
    assert main(["spec.yaml", "--plan"]) == 0
    with pytest.raises(SetupError):
        main(["spec.yaml", "--debug"])


def test_a_calibration_split_larger_than_the_training_rows_is_told(
    tmp_path: Path, faults_of: Callable[..., list[str]]
) -> None:
    data = write_data(tmp_path / "data")
    (tmp_path / "mine.csv").write_text("body,stars\n" + "good,1\n" * 40)
    own = {"train": str(tmp_path / "mine.csv"), "validation": str(tmp_path / "mine.csv"), "text": "body"}
    tasks = {"tasks": ["sst2", "nano-sentiment", "mine"], "dir": str(data)}
    tasks["own"] = {"mine": {**own, "label": "stars", "labels": ["bad", "good"]}}
    told = "dial.calibration_examples must be below the"
    dial = {"taus": [0.1], "calibration_examples": 2000}
    assert faults_of(spec_of(data=tasks, dial=dial)) == [
        f"sst2: {told} 2 training rows (got 2000)",
        f"nano-sentiment: {told} 2000 training rows (got 2000)",
        f"mine: {told} 40 training rows (got 2000)",
    ]
    preflight(spec_of(data=tasks, dial={"taus": [0.1], "calibration_examples": 1}), RunDir(tmp_path / "o"), False)
    preflight(spec_of(data=tasks, dial={"calibration_examples": 2000}), RunDir(tmp_path / "o"), False)
