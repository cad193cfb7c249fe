"""Lines of JSON by which the processes of run.py tell each other what was measured; a killed one loses none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def say(path: Path, **facts: Any) -> None:
    """Add one line to `path`."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")


class Lines:
    """Reads what others add to a file."""

    def __init__(self, path: Path) -> None:
        self.path, self._read, self._rest = path, 0, ""

    def new(self) -> list[dict[str, Any]]:
        """The lines added since the last call; one that is not whole yet waits."""
        if not self.path.is_file():
            return []
        with self.path.open(encoding="utf-8") as file:
            file.seek(self._read)
            text = file.read()
            self._read = file.tell()
        *whole, self._rest = (self._rest + text).split("\n")
        found = []
        for line in whole:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found
