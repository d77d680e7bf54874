"""Make docs/results.md of results/paper_table.json and results/real_front.json.

python benchmarks/results_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import paper_table
import real_front
from store import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "results.md"


def main() -> None:
    """Write the page."""
    parts = ["# PEFT against DEFT on real data\n", paper_table.part(_read("paper_table"))]
    if (RESULTS / "real_front.json").is_file():
        parts.append(real_front.part(_read("real_front")))
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {PAGE}")


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    main()
