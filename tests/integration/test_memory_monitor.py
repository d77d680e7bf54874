"""Ray ends a host's worker as its machine lacks memory: the host takes fewer trials at once in its next life."""

from __future__ import annotations

import subprocess
import sys

from tests.integration.sweeps import PATIENCE_S, ROOT, environment

#: Memory that the worker takes before Ray's limit is reached, and the most that it takes at all.
LIMIT_GIB, MOST_GIB = 2, 6

#: A real Train run that eats memory, watched as a host's is, and a real dispatcher with four trials on that host.
EATEN = f"""
import os
os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
import ray
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory
from ray.train import FailureConfig, RunConfig, ScalingConfig
from deft_ray.sweep.dispatcher import start_dispatcher
from deft_ray.sweep.hosts import _HostTrainer, _ReleaseOnFailure

def eat(config):
    import time
    kept = []
    while len(kept) < {MOST_GIB} * 16:
        kept.append(b"x" * 2**26)
    time.sleep(60)

threshold = (get_used_memory() + {LIMIT_GIB} * 2**30) / get_system_memory()  # a container's, where there is one
limits = {{"memory_usage_threshold": threshold, "memory_monitor_refresh_ms": 100, "max_kill_memory_buffer_bytes": 0}}
ray.init(num_cpus=2, _system_config=limits)
dispatcher = start_dispatcher({{}})
for number in range(4):
    ray.get(dispatcher.submit.remote(f"t{{number}}", "spec"))
    assert ray.get(dispatcher.claim.remote("host-0", 0, False)) == ("spec", 1, False)
assert ray.get(dispatcher.limit.remote("host-0")) is None
trainer = _HostTrainer(
    eat,
    train_loop_config={{}},
    scaling_config=ScalingConfig(num_workers=1),
    run_config=RunConfig(
        name="eaten",
        storage_path=os.environ["EATEN"],
        failure_config=FailureConfig(max_failures=0),
        callbacks=[_ReleaseOnFailure(dispatcher, "host-0")],
    ),
)
trainer.outlived = False
try:
    trainer.fit()
except Exception as error:
    assert "memory" in str(error), error
else:
    raise AssertionError("nobody ended it")
assert ray.get(dispatcher.limit.remote("host-0")) == 2
assert ray.get(dispatcher.claim.remote("host-0", 1, False)) == ("spec", 2, False), "its trials wait again"
"""


def test_a_host_that_ray_ends_for_lack_of_memory_has_half_its_slots_from_then_on(tmp_path: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", EATEN],
        cwd=ROOT,
        env=environment(EATEN=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
