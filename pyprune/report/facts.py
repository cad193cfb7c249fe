"""The facts of a report: the JSON files of a folder, read, and known for what they are, before anything is drawn."""

from __future__ import annotations

import json
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import InputError, check
from .traced import Trail, below, traced

MANIFEST = "pyprune.json"
# File name -> what its kind has at the top, in one row for each kind; the order of the report's own list of files.
KINDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "results.json": (("model", "keep", "evaluation", "prune", "dense", "pruned", "bench"),),
    "diagnose.json": (("dense", "pruned", "text", "tokens", "window"),),
    "suite.json": (("format", "domains", "missing", "perplexity", "piqa", "generation", "against"),),
    "redundancy.json": (("model", "redundancy"),),
    "pyprune.json": (("format", "model_type", "widths", "files"),),
    "bench.json": (("models",),),
    "nested.json": (("model", "dense", "rows"),),
    "latency-aware.json": (("model", "dense_perplexity", "rows", "table"),),
    "compare.json": (("format", "evaluation", "dense", "rows"),),
    # Of `pyprune recover --json`, or of bench/model/recover.py.
    "recover.json": (("perplexity", "train"), ("models", "recovery")),
}
# Of the files that name their format.
_FORMAT = 1
# Of an integer in a file: below the range of floats, which it may be compared with.
_DIGITS = 30


@dataclass(frozen=True)
class Facts:
    """What the files of a folder say.

    Attributes:
        files: file name -> its content.
        places: file name -> where it lies, relative to the folder.
        trail: what was read last.
    """

    files: dict[str, dict[str, Any]]
    places: dict[str, str]
    trail: Trail

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


def _read(path: Path, place: str, trail: Trail) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant, parse_int=_integer)
        found = traced(content, f"{place}:", trail)
    except (ValueError, RecursionError) as error:  # of JSON and of UTF-8 alike
        raise InputError(f"{place} must be JSON in UTF-8; {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{place}: must be an object; got {reprlib.repr(content)}")
    kinds = KINDS[path.name]
    if not any(found.keys() >= set(kind) for kind in kinds):
        keys = " or ".join(", ".join(kind) for kind in kinds)
        raise InputError(f"{place}: must have {keys}; got {', '.join(list(found)[:12]) or 'nothing'}")
    if "format" in kinds[0] and content["format"] != _FORMAT:
        where = below(f"{place}:", "format")
        raise InputError(f"{where} must be {_FORMAT}, which this version reads; got {reprlib.repr(content['format'])}")
    return found


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
        folder: with at least one of the files in `KINDS`; the manifest of a checkpoint may lie one level
            below, in `pruned/` where there are several.

    Raises:
        InputError: no such folder, none of the files, or one that is damaged or of another kind.
    """
    root = Path(folder)
    check(root.is_dir(), "folder", "be an existing folder", str(folder))
    found = {name: path for name in KINDS if (path := _place(root, name)) is not None}
    if not found:
        raise InputError(f"folder must hold at least one of {', '.join(KINDS)}; {folder} has none of them")
    places, trail = {name: path.relative_to(root).as_posix() for name, path in found.items()}, Trail()
    return Facts({name: _read(path, places[name], trail) for name, path in found.items()}, places, trail)
