"""The same spec on a cluster: two nodes, one host each; one node is lost in the middle and another one joins."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.integration.sweeps import records, start, wait_until
from tests.tiny import write_glue, write_tiny_t5

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's cluster_utils

SPEC = """
name: cluster
model: {{name: {model}, family: t5, quantization: nf4}}
data: {{dir: {data}, tasks: [sst2], max_source_tokens: 48}}
deft: {{alpha: {{loguniform: [0.1, 3]}}}}
train: {{steps: 60, batch_size: 8, learning_rate: 3e-3, checkpoint_every_s: 0.5}}
search: {{trials: 15}}
resources: {{hosts: 2}}
storage: {storage}
"""


def test_a_lost_node_costs_no_trial(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    model, data = write_tiny_t5(tmp_path / "model"), write_glue(tmp_path / "data", ("sst2",))
    spec, output = tmp_path / "spec.yaml", tmp_path / "run"
    spec.write_text(SPEC.format(model=model, data=data, storage=tmp_path / "storage"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        lost = cluster.add_node(num_cpus=1)
        process = start(spec, output, "--address", cluster.address)
        try:
            wait_until(lambda: len({record["host"] for record in records(output)}) == 2, process)
            cluster.remove_node(lost, allow_graceful=False)
            seen = len(records(output))
            wait_until(lambda: len(records(output)) >= seen + 2, process)
            cluster.add_node(num_cpus=1)
            text, _ = process.communicate(timeout=900)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
    finally:
        cluster.shutdown()
    assert process.returncode == 0, text
    found = records(output)
    assert sorted(record["trial"] for record in found) == [f"t{number:04d}" for number in range(16)]
    assert {record["status"] for record in found} == {"complete"}
    assert {record["host"] for record in found} == {"host-0", "host-1"}
    assert all(Path(record["adapter"]).is_relative_to(tmp_path / "storage") for record in found)
    assert all((Path(record["adapter"]) / "adapter_model.safetensors").is_file() for record in found)
