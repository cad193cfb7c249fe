"""Write a shipped table of choices, `pyprune/tables/ARCHITECTURE.json`, from what `pyprune tune` measured here.

    python -m bench.gpu.choices_table sm_90

On a machine of that architecture the table holds what the user's own table holds, with the machine's facts. On any
other it is empty, unless there is one already, which stays as it is.
"""

from __future__ import annotations

import re
from typing import Annotated

import typer

from pyprune.base.errors import InputError, check
from pyprune.cli.screen import out, verb
from pyprune.ffn import choices


@verb
def main(
    architecture: Annotated[str, typer.Argument(help="Such as sm_90.")],
) -> None:
    """Write the table, or say why it stays."""
    check(re.fullmatch(r"sm_\d+", architecture) is not None, "architecture", "be like sm_90", architecture)
    file = choices.SHIPPED / f"{architecture}.json"
    here = choices.architecture("cuda")
    found = choices.tuned("cuda") if here == architecture else {}
    if not found and file.exists():
        raise InputError(f"architecture must be one that was tuned here, {file.name} stays; got {architecture!r}")
    about = choices.identity("cuda") if found else None
    choices.write(file, "architecture", architecture, found, measured=about)
    out.print(f"{len(found)} choices in {file.name}")


if __name__ == "__main__":
    typer.run(main)
