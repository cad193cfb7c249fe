"""`pyprune report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..report import write
from ..report.facts import KINDS
from .options import JsonOption
from .screen import show, verb


@verb
def report(
    folder: Annotated[
        Path,
        typer.Argument(help=f"A folder with any of {', '.join(KINDS)}.", metavar="DIR", show_default=False),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The HTML file. Default: DIR/report.html.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """One HTML page of what was measured: quality lost, speed won, and why; it needs no other file and no network."""
    made = write(folder, out)
    facts = {
        "out": str(made.path),
        "bytes": made.path.stat().st_size,
        "files": list(made.files),
        "sections": list(made.sections),
        "figures": made.figures,
    }
    show(
        facts,
        as_json,
        f"wrote {escape(str(made.path))}: {made.figures} figures in {len(made.sections)} parts, from "
        f"{escape(', '.join(made.files))}",
    )
