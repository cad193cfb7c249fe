"""The page: what a folder's facts say, as one HTML file that needs nothing else."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..base.errors import PypruneError
from ..base.files import new_file
from . import (
    figures_compare,
    figures_drift,
    figures_hierarchy,
    figures_latency,
    figures_neurons,
    figures_speed,
    figures_suite,
    figures_tasks,
    figures_widths,
    provenance,
)
from .answer import answer
from .facts import Facts, load_facts
from .parts import Section
from .traced import named

HERE = Path(__file__).parent
NAME = "report.html"
_NEEDS = ("jinja2", "matplotlib")
# In the order of the page.
_SECTIONS: tuple[Callable[[Facts], Section | None], ...] = (
    figures_widths.section,
    figures_neurons.section,
    figures_hierarchy.section,
    figures_drift.section,
    figures_suite.section,
    figures_tasks.section,
    figures_speed.section,
    figures_latency.section,
    figures_compare.section,
    figures_compare.recovery,
    provenance.section,
)


@dataclass(frozen=True)
class Written:
    """What `write` made.

    Attributes:
        path: the HTML file.
        files: the facts it was made from, relative to the folder.
        sections: titles of its parts.
        figures: how many.
    """

    path: Path
    files: tuple[str, ...]
    sections: tuple[str, ...]
    figures: int


def _check_installed() -> None:
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise PypruneError(f"the report needs {' and '.join(missing)}: pip install 'pyprune[report]'")


def _render(first: Any, sections: list[Section]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(HERE)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style = (HERE / "report.css").read_text(encoding="utf-8")
    return environment.get_template("report.html.j2").render(answer=first, sections=sections, style=style)


def _compose(folder: str | Path) -> tuple[str, Facts, list[Section]]:
    _check_installed()
    facts = load_facts(folder)
    sections = [made for make in _SECTIONS if (made := named(facts.trail, partial(make, facts))) is not None]
    return _render(named(facts.trail, partial(answer, facts)), sections), facts, sections


def build(folder: str | Path) -> str:
    """The report of a folder as HTML.

    Args:
        folder: with at least one of the files that `facts.load_facts` reads.

    Raises:
        InputError: see `facts.load_facts`; or a value that its figure cannot use.
        PypruneError: jinja2 or matplotlib is not installed.
    """
    return _compose(folder)[0]


def write(folder: str | Path, out: str | Path | None = None) -> Written:
    """Write the report of a folder.

    Args:
        folder: as for `build`.
        out: the HTML file; by default `report.html` in the folder.

    Raises:
        InputError, PypruneError: see `build`; nothing is written then.
    """
    html, facts, sections = _compose(folder)
    target = Path(folder) / NAME if out is None else Path(out)
    with new_file(target) as temporary:
        temporary.write_text(html, encoding="utf-8")
    figures = sum(len(section.figures) for section in sections)
    return Written(target, tuple(facts.places.values()), tuple(section.title for section in sections), figures)
