"""Model and data set by name: the same command, with a local stand-in for the hub's HTTP interface."""

from __future__ import annotations

from pathlib import Path

from tests.hub_stand_in import HubStandIn, write_dataset_repo
from tests.integration.sweeps import records, sweep
from tests.tiny import glue_rows, squad_rows, write_tiny_t5

SPEC = """
name: hub
model: {{name: {name}}}
data: {{tasks: [{tasks}], max_source_tokens: 48}}
train: {{steps: 2, batch_size: 8}}
search: {{trials: 0}}
"""


def test_named_model_and_data_sets_come_from_the_hub(tmp_path: Path) -> None:
    t5 = write_tiny_t5(tmp_path / "t5")
    splits = ("train", "validation")
    glue = write_dataset_repo(tmp_path / "glue", {"sst2": {s: glue_rows("sst2", s, 24) for s in splits}})
    squad = write_dataset_repo(tmp_path / "squad", {"plain_text": {s: squad_rows(s, 24) for s in splits}})
    models, datasets = {"google/flan-t5-small": t5}, {"nyu-mll/glue": glue, "rajpurkar/squad": squad}
    with HubStandIn(models=models, datasets=datasets) as hub:
        extra = {**hub.environment(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        spec, output = tmp_path / "spec.yaml", tmp_path / "run"
        spec.write_text(SPEC.format(name="google/flan-t5-small", tasks="sst2, squad"))
        done = sweep(spec, output, **extra)
        assert done.returncode == 0, done.stdout + done.stderr
        assert {r["task"]: r["status"] for r in records(output)} == {"sst2": "complete", "squad": "complete"}
        assert any("/resolve/" in path and "flan-t5-small" in path for path in hub.requests)
        assert any("nyu-mll/glue" in path and path.endswith(".parquet") for path in hub.requests)
        assert not [path for path in hub.requests if path.startswith("CONNECT")]

        spec = tmp_path / "unknown.yaml"
        spec.write_text(SPEC.format(name="nobody/no-such-t5", tasks="sst2"))
        done = sweep(spec, tmp_path / "unknown", **extra)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "model.name" in done.stderr
    assert "nobody/no-such-t5" in done.stderr
    assert records(tmp_path / "unknown") == []
