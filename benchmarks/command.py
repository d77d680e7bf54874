"""How long a person waits for ``--help``, ``--plan`` and a spec error.

python benchmarks/command.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from store import store, summary

ROUNDS = 15
SPEC = str(Path(__file__).parents[1] / "search_spaces" / "quickstart.yaml")


def main() -> None:
    """Run the three commands in turn, a few times, and store their wall times."""
    with tempfile.TemporaryDirectory() as folder:
        wrong = Path(folder) / "wrong.yaml"
        wrong.write_text(Path(SPEC).read_text().replace("alpha:", "alhpa:"))
        commands = {"help": ["--help"], "plan": [SPEC, "--plan"], "spec_error": [str(wrong)]}
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(ROUNDS):
            for name, arguments in commands.items():
                began = time.perf_counter()
                subprocess.run([sys.executable, "-m", "deft_ray.sweep", *arguments], capture_output=True, check=False)
                times[name].append(time.perf_counter() - began)
    store("command", {"wall_s": {name: summary(values) for name, values in times.items()}, "aim": "under 0.5 s"})


if __name__ == "__main__":
    main()
