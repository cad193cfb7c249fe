"""Tables of docs/families.md: what of Transformers' types works (bench/families/sweep.py), and the trained mixture."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from bench.tables.readme import markdown, provenance

_STATES = ("works", "refused", "refused late", "CRASH", "no decoder", "not built")


def _counts(types: dict[str, Any]) -> list[list[str]]:
    """Of each table of Transformers, and of all: its name, all types, and those of each of `_STATES`."""
    lines = []
    for table in dict.fromkeys(found["table"] for found in types.values()):
        own = [found["state"] for found in types.values() if found["table"] == table]
        counts = [sum(state.startswith(s) and (s != "refused" or state == s) for state in own) for s in _STATES]
        lines.append([table, str(len(own)), *map(str, counts)])
    return [*lines, ["all", *(str(sum(int(line[i]) for line in lines)) for i in range(1, len(lines[0])))]]


def works_table(result: dict[str, Any]) -> list[str]:
    """README's line: how many of the types that could be built work, and of which kinds."""
    types = result["families"]["types"]
    *tables, (_, every, works, refused, late, crash, none, missing) = _counts(types)
    kinds = ", ".join(f"{line[2]} {line[0]}" for line in tables)
    bad = [f", {count} {what}" for count, what in ((late, "after something changed"), (crash, "crash")) if count != "0"]
    built, version = int(every) - int(missing), result["families"]["transformers"]
    return [
        f"Of {built} types of Transformers {version} that could be built tiny, [{works} work](docs/families.md) "
        f"({kinds}), {refused} are refused before anything changes{''.join(bad)}, and {none} are no decoders."
    ]


def families_table(result: dict[str, Any]) -> list[str]:
    """A line a table of Transformers with counts, then the types that work, and those refused with their reason."""
    types = result["types"]
    header = ("model types", ">all", *(f">{state}" for state in _STATES))
    works = sorted(kind for kind, found in types.items() if found["state"] == "works")
    by_letter = [" ".join(f"`{kind}`" for kind in kinds) for _, kinds in groupby(works, key=lambda kind: kind[0])]
    refused = [[f"`{k}`", f["message"].replace("|", "\\|")] for k, f in types.items() if f["state"] == "refused"]
    return [
        f"Transformers {result['transformers']}.",
        "",
        *markdown(header, _counts(types)),
        "",
        f"These {len(works)} work:",
        "",
        " · ".join(by_letter),
        "",
        "Refused, before anything changes:",
        "",
        *markdown(("type", "reason"), refused),
    ]


def mixture_table(result: dict[str, Any]) -> list[str]:
    """Perplexity of the trained mixture by structure, method, keep and repair; random is the mean of its seeds."""
    cells: dict[tuple[str, str], dict[tuple[float, str], str]] = {}
    columns = list(dict.fromkeys((row["keep"], _repaired(row)) for row in result["rows"]))
    for (structure, method, keep, repair), rows in _grouped(result["rows"]):
        perplexity = sum(row["perplexity"] for row in rows) / len(rows)
        better = method != "random" and rows[0]["interval"][1] < 0
        mark = "**" if better else ""
        cells.setdefault((structure, method), {})[keep, repair] = f"{mark}{perplexity:.1f}{mark}"
    lines = [[s, f"`{m}`", *(found.get(column, "") for column in columns)] for (s, m), found in cells.items()]
    header = ("structure", "method", *(f">{1 - keep:.0%} removed{repair}" for keep, repair in columns))
    return [
        f"Perplexity, dense {result['dense']:.1f}; bold where the 95 % interval of the difference in nats from the "
        f"mean of random choices lies below zero. {result['judged']:,} tokens of {result['text']} judged, "
        f"{result['calibration']:,} others calibrated. {provenance(result)}"
        + "".join(f" Of {name}: {provenance({'machine': facts})}" for name, facts in result.get("later", {}).items()),
        "",
        *markdown(header, lines),
    ]


def _repaired(row: dict[str, Any]) -> str:
    return ", mended" if row["repair"] else ""


def _grouped(rows: list[dict[str, Any]]) -> list[tuple[tuple[str, str, float, str], list[dict[str, Any]]]]:
    found: dict[tuple[str, str, float, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["structure"], row["method"], row["keep"], _repaired(row)), []).append(row)
    return list(found.items())
