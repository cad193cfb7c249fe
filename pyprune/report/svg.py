"""Figures as inline SVG: drawn by matplotlib, with the page's own fonts and colours, so that one file is right in both
light and dark.

Colours are drawn as sentinels, which stand for CSS variables and are replaced by them. The markup is parsed and written
again: every text in it is escaped, and nothing in it names another resource.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

Paint = Callable[[Any], None]

# Inches: small, so that 9 points are still 8 pixels where the page is 360 wide.
SIZE = (4.5, 3.0)
INK, SOFT, LINE, GRID, PAPER = (f"#fe0a0{i}" for i in range(5))
DENSE, PRUNED, FAST, LIMIT, WARM, VIOLET = (f"#fe0b0{i}" for i in range(6))
_VARIABLES = {
    INK: "ink",
    SOFT: "soft",
    LINE: "line",
    GRID: "grid",
    PAPER: "paper",
    DENSE: "dense",
    PRUNED: "pruned",
    FAST: "fast",
    LIMIT: "limit",
    WARM: "warm",
    VIOLET: "violet",
}
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, and has the page's font
    "font.size": 10.0,
    "axes.labelsize": 10.0,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 9.5,
    "text.parse_math": False,  # a name may hold a dollar sign
    "axes.unicode_minus": False,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 1.0,
    "lines.linewidth": 2.0,
    "lines.markersize": 4.5,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.borderaxespad": 0.2,
    "legend.labelcolor": INK,
    "errorbar.capsize": 3.0,
    "figure.constrained_layout.h_pad": 0.02,
    "figure.constrained_layout.w_pad": 0.02,
}
_NAMESPACE = re.compile(r"^\{[^}]*\}")
_REFERENCE = re.compile(r"#([\w.-]+)")
# As some versions write it, and as others do.
_FAMILY = re.compile(r"font-family:[^;]*;?\s*")
_FONT = re.compile(r"font:\s*(?P<style>[^;]*?)(?P<size>[\d.]+)px[^;]*")
_DIGITS = re.compile(r"-?\d+\.\d{3,}")
_NOT_DRAWN = {"metadata", "style", "title"}


def draw(name: str, label: str, paint: Paint, size: tuple[float, float] = SIZE) -> str:
    """An `<svg>` element for a page of HTML.

    Args:
        name: unique in the page: its ids begin with it.
        label: what it is, for those who do not see it.
        paint: is called with the axes of matplotlib.
        size: width and height in inches.

    Raises:
        TypeError: `paint` plots texts; matplotlib would make categories of them.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that its own font lacks: the reader's is another
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.grid(axis="y")
        axes.tick_params(length=0)
        paint(axes)
        if axes.xaxis.units is not None or axes.yaxis.units is not None:  # categories: texts were plotted
            raise TypeError("a text where a number belongs")
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inline(file.getvalue(), name, label)


def _inline(markup: bytes, name: str, label: str) -> str:
    root = ElementTree.fromstring(markup)
    used = {found for e in root.iter() for value in e.attrib.values() for found in _REFERENCE.findall(value)}
    _clean(root, name, used)
    box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update({"viewBox": box, "role": "img", "aria-label": label})
    return ElementTree.tostring(root, encoding="unicode")


def _clean(element: ElementTree.Element, name: str, used: set[str]) -> None:
    """Without namespaces, style sheets and ids that nobody refers to; with the page's colours and font."""
    element.tag = _NAMESPACE.sub("", element.tag)
    attributes = {}
    for key, value in element.attrib.items():
        plain = _NAMESPACE.sub("", key)
        if plain != "id":
            attributes[plain] = _value(plain, value, name)
        elif value in used:
            attributes[plain] = f"{name}-{value}"
    element.attrib.clear()
    element.attrib.update(attributes)
    if element.tag not in ("text", "tspan"):
        element.text = None
    element.tail = None
    for child in list(element):
        if not isinstance(child.tag, str) or _NAMESPACE.sub("", child.tag) in _NOT_DRAWN:
            element.remove(child)
        else:
            _clean(child, name, used)


def _value(key: str, value: str, name: str) -> str:
    if key in ("style", "fill", "stroke"):
        for sentinel, variable in _VARIABLES.items():
            value = value.replace(sentinel, f"var(--{variable})")
        value = _FONT.sub(_font, _FAMILY.sub("", value))
    value = _REFERENCE.sub(rf"#{name}-\1", value) if key == "href" or "url(#" in value else value
    return _DIGITS.sub(lambda found: f"{float(found.group()):.2f}", value)


def _font(found: re.Match[str]) -> str:
    bold = "; font-weight: 600" if re.search(r"bold|[6-9]00", found["style"]) else ""
    return f"font-size: {found['size']}px{bold}"
