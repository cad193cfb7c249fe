"""Numbers as a reader wants them: three digits that count, their interval beside them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Format = Callable[[float], str]


def short(value: float) -> str:
    """Three digits: `0.301`, `12.7`, `1,465`, `1.2e-09`."""
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e7:
        return f"{value:.1e}"
    for least, digits in ((100, 0), (10, 1), (1, 2)):
        if size >= least:
            return f"{value:,.{digits}f}"
    return f"{value:.3g}" if size >= 1e-3 else f"{value:.1e}"


def percent(value: float) -> str:
    """A share: `71%`; with a digit more near its ends, `0.4%`, `99.6%`, `3.2%`."""
    size = abs(value)
    if 0 < size < 0.0005:
        return f"{value:.0e}"
    return f"{value:.1%}" if 0 < size < 0.0995 or 0.985 < size < 1 or 1 < size < 1.015 else f"{value:.0%}"


def tick(value: float) -> str:
    """A number beside an axis: `50`, `2,000`, `0.01`, `1e-4`."""
    if value == 0 or 1e-3 <= abs(value) < 1000:
        return f"{value:.4g}"
    return (
        f"{value:,.0f}"
        if 1000 <= abs(value) < 1e7
        else re.sub(r"e([+-])0*(\d)", r"e\1\2", f"{value:.0e}").replace("e+", "e")
    )


def tick_percent(value: float) -> str:
    """A share beside an axis: `5%`, `0.1%`."""
    return f"{tick(100 * value)}%" if value else "0"


def times(value: float) -> str:
    """A ratio: `1.13x`."""
    return f"{value:.2f}x"


def megabytes(count: float) -> str:
    """Bytes as MB (10^6)."""
    return f"{count / 1e6:,.0f} MB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def signed(value: float) -> str:
    """A share with its sign: `+18%`."""
    return ("+" if value > 0 else "") + percent(value)


def span(found: Mapping[str, Any], form: Format = short) -> str:
    """` (0.271 to 0.332)`, the 95 % interval of a summary or an estimate; nothing where it has none."""
    interval = found.get("interval")
    return f" ({form(interval[0])} to {form(interval[1])})" if interval else ""


def estimate(found: Mapping[str, Any] | None, form: Format = short) -> str:
    """A mean or value with its interval; `-` where there is none."""
    value = None if found is None else found.get("mean", found.get("value"))
    return "-" if found is None or value is None else form(value) + span(found, form)


def clip(text: str, length: int) -> str:
    """A name that fits into a figure: one line of `length` characters at most."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def model_name(name: str) -> str:
    """The last part of a path: what stands before it is about somebody's machine."""
    last = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return "SmolLM2-135M-Instruct" if last == "demo" else last


def listed(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def plural(count: int, noun: str) -> str:
    """`1 layer`, `30 layers`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
