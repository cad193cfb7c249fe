"""Which files of a folder are a checkpoint that pyprune wrote: by its manifest, and by what such files are called."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..base.errors import CheckpointError, InputError
from ..base.files import restore
from . import remote_code

MANIFEST = "pyprune.json"
FORMAT = 1
# What `save` writes in all, as Transformers and `nested` name it; and what tells of a tokenizer.
_WRITTEN = (
    MANIFEST,
    remote_code.FILE,
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "nested.safetensors",
)
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The folder's `pyprune.json`.

    Raises:
        InputError: no such folder.
        CheckpointError: not a checkpoint that pyprune wrote, or a damaged manifest.
    """
    folder = Path(folder)
    if not folder.is_dir():
        restore(folder)
    if not folder.is_dir():
        raise InputError(f"checkpoint must be an existing folder; got {str(folder)!r}")
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} was not written by pyprune (it has no {MANIFEST})")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {manifest['format']!r}; this version reads {FORMAT}")
        files = {str(k): (int(v["bytes"]), str(v["sha256"])) for k, v in manifest["files"].items()}
        list(manifest["widths"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
        raise CheckpointError(f"{path} names files outside its folder")
    result: dict[str, Any] = manifest
    return result


def _is(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def is_tokenizer(name: str) -> bool:
    """Whether a file of this name is part of a tokenizer."""
    return _is(name, _TOKENIZER)


def _recorded(folder: Path) -> set[str] | None:
    """Names of the files that `save` wrote into `folder`, or None where it was not pyprune that wrote there."""
    try:
        return {MANIFEST, *read_manifest(folder)["files"]}
    except CheckpointError:
        pass  # or what a plain `save_pretrained` of a pruned model left
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return set() if isinstance(config["pyprune"], dict) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def strangers(folder: Path) -> list[str]:
    """What lies in `folder` and is no part of a checkpoint that pyprune wrote: names, a folder's end in a slash."""
    recorded = _recorded(folder)
    if recorded is None:
        return sorted(entry.name for entry in folder.iterdir())
    known = (*_WRITTEN, *_TOKENIZER)

    def found(place: Path) -> Iterator[str]:
        for entry in sorted(place.iterdir()):
            name = entry.relative_to(folder).as_posix()
            if not entry.is_dir() or entry.is_symlink():
                if name not in recorded and not _is(name, known):
                    yield name
            elif any(other.startswith(f"{name}/") for other in (*recorded, *known)):
                yield from found(entry)
            else:
                yield f"{name}/"

    return list(found(folder))


def keep_tokenizer(old: Path, new: Path) -> None:
    """Copy what `old`, which has no strangers, holds of a tokenizer, and its generation config where `new` has none."""
    for file in sorted(old.rglob("*")):
        name = file.relative_to(old).as_posix()
        theirs = not _is(name, _WRITTEN) or name == "generation_config.json"
        if file.is_file() and theirs and not (new / name).exists():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, new / name)
