"""The benchmark of a sweep's makespan, at its smallest: a shape with random weights, by the command and by fits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.sweeps import PATIENCE_S, ROOT, environment

CODE = """
import runpy
import sys
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
import store
store.RESULTS = Path({folder!r})
sys.argv = ["benchmarks/makespan.py", "--shape", "tiny", "--trials", "4", "--slots", "2", "--fits", "1"]
runpy.run_path({benchmarks!r} + "/makespan.py", run_name="__main__")  # as a script: workers cannot import it
"""


def test_it_stores_what_a_sweep_and_fits_take(tmp_path: Path) -> None:
    code = CODE.format(benchmarks=str(ROOT / "benchmarks"), folder=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "makespan_tiny.json").read_text())
    (sweep,), fits = found["sweeps"], found["fits"]
    assert (found["trials"], sweep["slots"], len(fits["each_s"])) == (4, 2, 1)
    assert 0 < sweep["first_trial_to_last_s"] < sweep["makespan_s"]
    assert fits["makespan_s"] == pytest.approx(4 * fits["each_s"][0])
    assert "of 80 passes were shared" in sweep["packing"]
    assert found["sweep_over_fits"] == {"2": pytest.approx(sweep["makespan_s"] / fits["makespan_s"])}
    for each in (sweep, fits):
        assert 0.2 < each["peak_gib"] < 4
        # of four trials twenty steps of four sources of 64 tokens, and their answers of four
        assert each["tokens_per_s"] * each["makespan_s"] == pytest.approx(4 * 20 * 4 * (64 + 4))
    assert str(tmp_path) not in "".join(found["spec"])
