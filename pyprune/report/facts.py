"""The facts of a report: the JSON files of a folder, read and checked before anything is drawn."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import InputError, check
from .shapes import SHAPES

MANIFEST = "pyprune.json"
# Of an integer in a file: below the range of floats, which it may be compared with.
_DIGITS = 30


@dataclass(frozen=True)
class Facts:
    """What the files of a folder say; every file is of the shape that `shapes.SHAPES` gives it.

    Attributes:
        files: file name -> its content.
        places: file name -> where it lies, relative to the folder.
    """

    files: dict[str, dict[str, Any]]
    places: dict[str, str]

    def get(self, name: str) -> dict[str, Any] | None:
        """The content of `NAME.json`, or None where the folder has no such file."""
        return self.files.get(f"{name}.json")

    def part(self, name: str, *keys: str) -> Any:
        """What stands under `keys` in `NAME.json`, or None where there is no such file or key."""
        found: Any = self.get(name)
        for key in keys:
            if not isinstance(found, dict):
                return None
            found = found.get(key)
        return found

    @property
    def bench(self) -> dict[str, Any] | None:
        """Speeds, of a file of their own or of the demo's."""
        return self.get("bench") or self.part("results", "bench")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits is too long")
    return int(digits)


def _readable(value: Any) -> Any:
    """Texts without what no page can show: control characters, halves of a surrogate pair."""
    if isinstance(value, dict):
        return {_readable(key): _readable(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_readable(entry) for entry in value]
    if isinstance(value, str):
        bad = {c for c in set(value) - {"\n", "\t"} if unicodedata.category(c) in ("Cc", "Cs") or c in "\ufffe\uffff"}
        return "".join("\ufffd" if c in bad else c for c in value) if bad else value
    return value


def _read(path: Path, place: str) -> Any:
    try:
        content = path.read_text(encoding="utf-8")
        return _readable(json.loads(content, parse_constant=_no_constant, parse_int=_integer))
    except (ValueError, RecursionError) as error:  # of JSON and of UTF-8 alike
        raise InputError(f"{place} must be JSON in UTF-8; {error}") from error


def _place(folder: Path, name: str) -> Path | None:
    """Where a file lies; the manifest may lie in the folder of a checkpoint, as the demo has it."""
    if (folder / name).is_file():
        return folder / name
    if name != MANIFEST:
        return None
    below = sorted(folder.glob(f"*/{name}"))
    preferred = [path for path in below if path.parent.name == "pruned"] or below
    return preferred[0] if len(preferred) == 1 else None


def load_facts(folder: str | Path) -> Facts:
    """Read every file of a folder that a report knows.

    Args:
        folder: with at least one of the files in `shapes.SHAPES`; the manifest of a checkpoint may lie one level
            below, in `pruned/` where there are several.

    Raises:
        InputError: no such folder, none of the files, or one that is damaged or of another shape.
    """
    root = Path(folder)
    check(root.is_dir(), "folder", "be an existing folder", str(folder))
    found = {name: path for name in SHAPES if (path := _place(root, name)) is not None}
    if not found:
        raise InputError(f"folder must hold at least one of {', '.join(SHAPES)}; {folder} has none of them")
    files = {}
    for name, path in found.items():
        place = path.relative_to(root).as_posix()
        files[name] = _read(path, place)
        SHAPES[name](f"{place}:", files[name])
    return Facts(files, {name: path.relative_to(root).as_posix() for name, path in found.items()})
