"""The libraries' own loaders, in a fresh process with an empty cache, against the stand-in of the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.hub_stand_in import HubStandIn, write_dataset_repo

WORDS = ["<pad>", "</s>", "<unk>", "a", "dull", "moving", "film"]
SST2 = {
    "train": [
        {"sentence": "a moving film", "label": 1, "idx": 0},
        {"sentence": "a dull film", "label": 0, "idx": 1},
    ],
    "validation": [{"sentence": "dull", "label": 0, "idx": 0}],
}
STSB = {"validation": [{"sentence1": "a film", "sentence2": "a dull film", "label": 2.5, "idx": 0}]}
SQUAD = {
    "validation": [
        {
            "id": "q0",
            "title": "Film",
            "context": "A dull film.",
            "question": "What film?",
            "answers": {"text": ["dull"], "answer_start": [2]},
        }
    ]
}

LOAD_MODEL = """
import json
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer
name = "google/flan-t5-xl"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForSeq2SeqLM.from_pretrained(name)
classifier = AutoModelForSequenceClassification.from_pretrained(name, num_labels=3)
try:
    AutoConfig.from_pretrained("nobody/nothing")
    unknown = None
except OSError as error:
    unknown = [type(error).__name__, type(error.__cause__).__name__, str(error)]
print(json.dumps({
    "d_model": AutoConfig.from_pretrained(name).d_model,
    "short": AutoConfig.from_pretrained("t5-small").d_model,
    "ids": tokenizer("a moving film").input_ids,
    "wo": model.encoder.block[0].layer[1].DenseReluDense.wo.weight.double().sum().item(),
    "classes": classifier.config.num_labels,
    "unknown": unknown,
}))
"""

LOAD_DATA = """
import json
from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError
sst2 = load_dataset("nyu-mll/glue", "sst2")
stsb = load_dataset("nyu-mll/glue", "stsb", split="validation")
squad = load_dataset("rajpurkar/squad", split="validation")
try:
    load_dataset("nobody/nothing")
    unknown = None
except DatasetNotFoundError as error:
    unknown = str(error)
try:
    load_dataset("squad")
    short = None
except ValueError as error:
    short = str(error)
print(json.dumps({
    "sst2": {split: list(rows) for split, rows in sst2.items()},
    "names": sst2["train"].features["label"].names,
    "stsb": list(stsb),
    "squad": list(squad),
    "short": short,
    "unknown": unknown,
}))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubStandIn]:
    folder = tmp_path_factory.mktemp("hub")
    glue = write_dataset_repo(
        folder / "glue", {"sst2": SST2, "stsb": STSB}, class_names={"sst2": {"label": ["negative", "positive"]}}
    )
    squad = write_dataset_repo(folder / "squad", {"plain_text": SQUAD})
    datasets = {"nyu-mll/glue": glue, "rajpurkar/squad": squad}
    t5 = _save_tiny_t5(folder / "t5")
    with HubStandIn(models={"google/flan-t5-xl": t5, "google-t5/t5-small": t5}, datasets=datasets) as hub:
        yield hub


def test_a_model_loads_by_name(hub: HubStandIn, tmp_path: Path) -> None:
    loaded = _run(LOAD_MODEL, hub, tmp_path)

    assert loaded["d_model"] == loaded["short"] == 16
    assert loaded["ids"] == [3, 5, 6, 1]
    assert loaded["wo"] == pytest.approx(_tiny_t5_wo_sum(), rel=1e-6)
    assert loaded["classes"] == 3
    kind, cause, message = loaded["unknown"]
    assert (kind, cause) == ("OSError", "RepositoryNotFoundError")
    assert "nobody/nothing is not a local folder and is not a valid model identifier" in message
    assert "GET /api/models/google/flan-t5-xl" in hub.requests


def test_datasets_load_by_name(hub: HubStandIn, tmp_path: Path) -> None:
    loaded = _run(LOAD_DATA, hub, tmp_path)

    assert loaded["sst2"] == SST2
    assert loaded["names"] == ["negative", "positive"]
    assert loaded["stsb"] == STSB["validation"]
    assert loaded["squad"] == SQUAD["validation"]
    assert loaded["unknown"] == "Dataset 'nobody/nothing' doesn't exist on the Hub or cannot be accessed."
    assert "Repository id must be 'namespace/name', got 'squad'." in loaded["short"]  # the library's, not the hub's


def test_nothing_asks_the_real_hub(hub: HubStandIn) -> None:
    """Runs after the loads above; what they sent elsewhere came to the stand-in as their proxy."""
    elsewhere = [request for request in hub.requests if "://" in request or request.startswith("CONNECT")]

    assert all("://datasets-server.127.0.0.1:" in request for request in elsewhere)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/nobody/nothing/resolve/main/config.json", "RepoNotFound"),
        ("/google/flan-t5-xl/resolve/main/adapter_config.json", "EntryNotFound"),
        ("/google/flan-t5-xl/resolve/v2/config.json", "RevisionNotFound"),
        ("/api/models/google/flan-t5-xl/tree/main/additional_chat_templates", "EntryNotFound"),
        ("/api/datasets/nyu-mll/glue/revision/refs%2Fconvert%2Fparquet", "RevisionNotFound"),
        ("/api/datasets/google/flan-t5-xl", "RepoNotFound"),
        ("/api/whoami-v2", "EntryNotFound"),
    ],
)
def test_what_is_missing_is_named_by_its_code(hub: HubStandIn, path: str, code: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        _open(hub, path)

    assert error.value.code == 404
    assert error.value.headers["X-Error-Code"] == code
    error.value.close()


@pytest.mark.parametrize("path", ["/datasets/glue/resolve/main/README.md", "/api/datasets/glue/tree/main/sst2"])
def test_an_old_name_is_redirected(hub: HubStandIn, path: str) -> None:
    assert _open(hub, path) == _open(hub, path.replace("glue", "nyu-mll/glue"))


def test_paths_info_skips_what_is_missing(hub: HubStandIn) -> None:
    asked = urllib.parse.urlencode({"paths": ["sst2", "README.md", "gone.txt"], "expand": False}, doseq=True)
    found = json.loads(_open(hub, "/api/datasets/nyu-mll/glue/paths-info/main", data=asked.encode()))

    assert [(entry["type"], entry["path"]) for entry in found] == [("directory", "sst2"), ("file", "README.md")]


def test_tree_lists_one_level_or_all(hub: HubStandIn) -> None:
    flat = json.loads(_open(hub, "/api/datasets/nyu-mll/glue/tree/main"))
    deep = json.loads(_open(hub, "/api/datasets/nyu-mll/glue/tree/main?recursive=True"))

    assert [(entry["type"], entry["path"]) for entry in flat] == [
        ("file", "README.md"),
        ("directory", "sst2"),
        ("directory", "stsb"),
    ]
    assert {"sst2/train-00000-of-00001.parquet", "stsb/validation-00000-of-00001.parquet"} <= {
        entry["path"] for entry in deep
    }


@pytest.mark.parametrize(("span", "expected"), [("bytes=0-2", "---"), ("bytes=4-10", "configs"), ("bytes=1-3", "--\n")])
def test_a_range_is_served_alone(hub: HubStandIn, span: str, expected: str) -> None:
    assert _open(hub, "/datasets/nyu-mll/glue/resolve/main/README.md", {"Range": span}).decode() == expected


def test_a_table_is_a_split_too(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"], "score": [0.5, 1.0]})
    card = (write_dataset_repo(tmp_path / "own", {"default": {"train": table}}) / "README.md").read_text()

    assert "path: default/train-*" in card
    assert "num_examples: 2" in card
    assert "dtype: float64" in card


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"me/mine: no file under .*nowhere"):
        HubStandIn(models={"me/mine": tmp_path / "nowhere"})


def _run(program: str, hub: HubStandIn, home: Path) -> dict[str, Any]:
    """What a fresh process prints as JSON on its last line."""
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=env | hub.environment(home / "hf"),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return printed


def _open(hub: HubStandIn, path: str, headers: dict[str, str] | None = None, data: bytes | None = None) -> bytes:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(urllib.request.Request(hub.endpoint + path, data, headers or {})) as answer:
        body: bytes = answer.read()
        return body


def _tiny_t5() -> Any:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(WORDS),
        d_model=16,
        d_ff=32,
        d_kv=8,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def _tiny_t5_wo_sum() -> float:
    total: float = _tiny_t5().encoder.block[0].layer[1].DenseReluDense.wo.weight.double().sum().item()
    return total


def _save_tiny_t5(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    _tiny_t5().save_pretrained(folder)
    return folder
