"""What a page is made of: tiles, figures, tables and texts in sections; plain texts, which the template escapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .svg import SIZE, Paint, draw


@dataclass(frozen=True)
class Tile:
    """A big number of the first screen.

    Attributes:
        label: what it is.
        value: the number.
        beside: what stands below it, the dense model first.
    """

    label: str
    value: str
    beside: tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """A figure with the sentence that says what it shows.

    Attributes:
        name: unique in the page.
        title: of a few words.
        caption: one sentence, with the numbers.
        svg: its markup, which `svg.draw` made.
    """

    name: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Table:
    """Rows of texts.

    Attributes:
        title: above it.
        columns: their names; one that starts with `>` is right-aligned, as in `screen.table`.
        rows: as long as `columns`.
        folded: shown when the reader opens it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False


@dataclass(frozen=True)
class Example:
    """Two continuations of one prompt.

    Attributes:
        title: how they were made.
        prompt: its end.
        same: with which both begin.
        dense, pruned: how each goes on from there.
    """

    title: str
    prompt: str
    same: str
    dense: str
    pruned: str


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Attributes:
        name: of its anchor.
        title, lead: its heading, and what is to be seen, in a sentence or two.
        figures, tables, examples, commands: in this order.
    """

    name: str
    title: str
    lead: str
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    examples: tuple[Example, ...] = ()
    commands: tuple[str, ...] = ()


def figure(name: str, title: str, caption: str, paint: Paint, size: tuple[float, float] = SIZE) -> Figure:
    """Draw a figure; `paint` gets the axes."""
    return Figure(name, title, caption, draw(name, title, paint, size))
