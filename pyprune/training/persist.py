"""One file for tensors and facts: safetensors, with JSON in its metadata. Written beside its place, then renamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..base.errors import CheckpointError, InputError, check
from ..base.files import new_file


def write(path: Path, kind: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write `tensors` and `facts` as one file of format `kind`.

    Raises:
        InputError: a fact is no JSON value.
    """
    try:
        text = json.dumps(facts)
    except (TypeError, ValueError) as error:
        raise InputError(f"what is saved must be tensors and JSON values; {error}") from error
    # Tied tensors share memory, which the format refuses.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with new_file(path) as temporary:
        save_file(copies, temporary, metadata={"format": kind, "facts": text})


def read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the facts of a file of format `kind`.

    Raises:
        InputError: no such file.
        CheckpointError: of another format, or damaged.
    """
    check(path.is_file(), "checkpoint", "be an existing file", str(path))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:
                raise CheckpointError(f"{path} has format {metadata.get('format')!r}, not {kind!r}")
            facts = json.loads(metadata["facts"])
            if not isinstance(facts, dict):
                raise CheckpointError(f"{path} is damaged: its facts are no object")
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 - not a dict
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
