"""Registers, spills and matrix instructions of every Triton kernel, compiled for GPUs that need not be there.

python bench/static_table.py          prints the table and writes bench/results/static.json
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from pyprune.files import new_file
from pyprune.triton_kernels.aot import static_table, variants

RESULT = Path(__file__).parent / "results" / "static.json"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "x".join(map(str, value.values()))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


def main() -> None:
    """Compile, print, write."""
    rows = static_table(variants())
    table = Table(title="Triton kernels as machine code", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in rows[0]:
        table.add_column(
            name.replace("_", "\n"), justify="right" if isinstance(rows[0][name], int) else "left", no_wrap=True
        )
    for row in rows:
        spilled = row["stack_bytes"] or row["ldl"] or row["stl"]
        table.add_row(*map(_text, row.values()), style="red" if spilled else None)
    # Into a pipe rich would fold the columns at 80.
    console = Console()
    console.width = max(console.width, 160)
    console.print(table)
    versions = {name: version(name) for name in ("triton", "torch")}
    with new_file(RESULT) as temporary:
        temporary.write_text(json.dumps({"versions": versions, "kernels": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
