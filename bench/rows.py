"""Results as JSON with one entry a line, so that a change of one row shows as one line."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any


def dumps(result: dict[str, Any], parts: Collection[str]) -> str:
    """JSON text of `result`, in which the entries of its mappings `parts` stand on a line each."""
    lines = []
    for name, value in result.items():
        if name in parts and value:
            entries = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items())
            text = f"{{\n{entries}\n }}"
        else:
            text = json.dumps(value, indent=1).replace("\n", "\n ")
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
