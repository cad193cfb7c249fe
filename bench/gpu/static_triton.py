"""Registers, spills and matrix instructions of every Triton kernel, compiled for GPUs that need not be there.

    python -m bench.gpu.static_triton     prints the table and writes bench/results/static.json

`make test` reads the table where it is of the kernels there, and compiles a few of its rows again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from bench import by_line
from pyprune.base.files import new_file
from pyprune.triton_kernels.aot import ARCHITECTURES, fingerprint

RESULT = Path(__file__).parents[1] / "results" / "static.json"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "x".join(map(str, value.values()))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


def _compiled(architecture: int, offered: bool) -> list[dict[str, Any]]:
    """Rows of one architecture, from a process of its own; triton compiles on one core."""
    command = [sys.executable, "-m", "pyprune.triton_kernels.aot", "--json", "--architecture", str(architecture)]
    command += ["--offered"] * offered
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def kernels() -> list[dict[str, Any]]:
    """A row for each distinct kernel and architecture; what is offered for tuning after every branch."""
    jobs = [(architecture, offered) for architecture in ARCHITECTURES for offered in (False, True)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(_compiled, *zip(*jobs, strict=True))
        return list({json.dumps(row, sort_keys=True): row for rows in found for row in rows}.values())


def update(**new: Any) -> None:
    """Set keys of the result; what other scripts wrote there stays."""
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    with new_file(RESULT) as temporary:
        temporary.write_text(by_line.dumps({**result, **new}, ("kernels", "cuda")))


def main() -> None:
    """Compile, print, write."""
    argparse.ArgumentParser(description="Compile the Triton kernels and write what they need.").parse_args()
    made_of, rows = fingerprint(), kernels()
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
    console.width = max(console.width, 200)
    console.print(table)
    versions = {name: version(name) for name in ("triton", "torch")}
    update(versions=versions, fingerprint=made_of, kernels=rows)


if __name__ == "__main__":
    main()
