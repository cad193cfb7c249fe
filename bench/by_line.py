"""Results as JSON with one entry a line, so that a change of one row shows as one line."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any


def _block(brackets: str, entries: list[str]) -> str:
    inner = ",\n".join(f"  {entry}" for entry in entries)
    return f"{brackets[0]}\n{inner}\n {brackets[1]}"


def dumps(result: dict[str, Any], parts: Collection[str]) -> str:
    """JSON text of `result`, in which the entries of its mappings and lists `parts` stand on a line each."""
    lines = []
    for name, value in result.items():
        if name not in parts or not value:
            text = json.dumps(value, indent=1).replace("\n", "\n ")
        elif isinstance(value, list):
            text = _block("[]", [json.dumps(entry) for entry in value])
        else:
            text = _block("{}", [f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items()])
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
