"""The README's table of what goes together is the one that was measured."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_of_what_goes_together_is_what_was_measured() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "support.json").read_text())["rows"]
    text = (ROOT / "README.md").read_text()
    table = text.split("<!-- support: made by benchmarks/support.py -->")[1].split("<!-- end of support -->")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
    kinds = [heading.split(",")[0] for heading in lines[0][2:]]

    assert len(rows) == 4 * 4 * 4 * 2
    seen = 0
    for adapter, base, *cells in lines[2:]:
        for kind, cell in zip(kinds, cells, strict=True):
            mine = [
                row
                for row in rows
                if (row["adapter"], row["approximation"], row["quantization"])
                == (adapter, kind, {"NF4": "nf4", "float32": "none"}[base])
            ]
            falls = [1 - row["density"] / row["baseline"] for row in mine if row["density"] is not None]
            seen += len(mine)
            if all(fall > 0 for fall in falls) and len(falls) == 4:
                assert cell == f"0 to 3 (-{100 * min(falls):.1f} %)"
            else:
                assert not cell.startswith("0 to 3")
    assert seen == len(rows)
