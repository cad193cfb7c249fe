"""Which backend runs a problem best, and how, as `pyprune tune` measured it on this machine.

A table maps a problem's key to what was measured for it, the fastest backend first. Tables are JSON, one for each
machine and version of the kernels, in the folder that PYPRUNE_CACHE names or the system's own for caches.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..base import machine
from ..base.errors import check
from ..base.files import cache_folder, new_file
from . import native
from .backends import Config, Problem
from .quantisation import name_of

try:
    import fcntl
except ImportError:  # Windows, where of two that write at once the last one wins
    fcntl = None  # type: ignore[assignment]

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)
_FORMAT = 1
_FEWEST = 64
# Caches of others that hold what they found here; `reload` clears them.
DEPENDENT: list[Callable[[], None]] = []


@dataclass(frozen=True)
class Entry:
    """What one backend reached.

    Attributes:
        backend: its name.
        config: its fastest configuration.
        seconds: of one call, median.
    """

    backend: str
    config: Config
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"backend": self.backend, "config": dict(self.config), "seconds": self.seconds}


def token_bucket(tokens: int) -> int:
    """The entry of `TOKENS` that stands for so many tokens: the next one up, or the last."""
    return next((bucket for bucket in TOKENS if tokens <= bucket), TOKENS[-1])


def neuron_bucket(neurons: int) -> int:
    """The number that stands for so many neurons: the next one up of four to the octave, at least 64."""
    if neurons <= _FEWEST:
        return _FEWEST
    step = 1 << ((neurons - 1).bit_length() - 3)
    return -(-neurons // step) * step


def representative(problem: Problem) -> Problem:
    """The problem that stands for all with the same `key`, and that is timed for them."""
    kept = neuron_bucket(problem.kept)
    size = max(problem.intermediate_size, kept) if problem.gather else kept
    weights = problem.weights or problem.dtype
    tokens = 1 if problem.batch_invariant else token_bucket(problem.tokens)
    return dataclasses.replace(problem, tokens=tokens, kept=kept, intermediate_size=size, weights=weights)


def key(problem: Problem) -> str:
    """What a table calls a problem: D, bucketed K and M, dtypes, form, activation. Its device chooses the table."""
    chosen = representative(problem)
    dtype, weights = name_of(chosen.dtype), name_of(chosen.weights or chosen.dtype)
    form = "gather" if chosen.gather else "compact"
    words = [f"experts {chosen.picked} of {chosen.experts}"] if chosen.experts else []
    words += [
        f"D{chosen.hidden_size}",
        f"K{chosen.kept}",
        f"M{chosen.tokens}",
        dtype,
        f"{weights}-weights",
        "gated" if chosen.gated else "plain",
        form,
        chosen.activation,
    ]
    return " ".join(words + ["batch-invariant"] * chosen.batch_invariant)


def architecture(device: str) -> str | None:
    """What a device type is here, such as `sm_90`; None for CUDA where torch sees no device."""
    if device == "cpu":
        return f"cpu_{native.isa() if native.load() is None else 'torch'}"
    if device == "cuda" and torch.cuda.is_available():
        return "sm_{}{}".format(*torch.cuda.get_device_capability())
    return None


@functools.cache
def _kernels(device: str) -> str:
    """A hash of the sources that decide how fast a configuration is."""
    spec = importlib.util.find_spec("pyprune.triton_kernels")
    folders = [Path(__file__).parent / "backends", *map(Path, (spec.submodule_search_locations or []) if spec else [])]
    files = [file for place in folders for file in sorted(place.glob("*.py"))]
    files += [file for file in [native.library(device).with_name("native.json")] if file.is_file()]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def identity(device: str) -> dict[str, Any]:
    """What a measurement on this machine holds for: device, versions of what runs, and a hash of the kernels."""
    if device == "cuda":
        about: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    else:
        about = {"device": machine.cpu_name(), "threads": torch.get_num_threads()}
    known = machine.versions()
    versions = {name: known[name] for name in ("pyprune", "torch", "triton")}
    return {**about, "architecture": architecture(device), **versions, "kernels": _kernels(device)}


def path(device: str) -> Path:
    """The file of the user's table for a device type; it need not exist.

    Raises:
        InputError: there is no such device here.
    """
    check(architecture(device) is not None, "device", "be one that is here", device)
    digest = hashlib.sha256(json.dumps(identity(device), sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"{architecture(device)}-{digest[:12]}.json"


def _entry(found: Any) -> Entry:
    config, seconds = found["config"], found["seconds"]
    if not isinstance(found["backend"], str) or not isinstance(config, dict):
        raise ValueError("an entry needs a backend and a configuration")
    if not all(isinstance(value, int | str) for value in config.values()):  # a bool is an int
        raise ValueError("a configuration holds integers, strings and booleans")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
        raise ValueError("seconds must be a positive number")
    return Entry(found["backend"], config, float(seconds))


def _read(file: Path, device: str) -> dict[str, list[Entry]]:
    """A table, or an empty one with a warning where it is corrupt or not of this machine."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"choices in {file} are ignored: {error}", stacklevel=2)
        return {}
    expected = identity(device)
    try:
        data = json.loads(text)
        if data["format"] != _FORMAT or data["identity"] != expected:
            raise ValueError(f"not a table of format {_FORMAT} for {expected}")
        table = {str(name): [_entry(entry) for entry in found] for name, found in data["entries"].items()}
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        warnings.warn(f"choices in {file} are ignored: {type(error).__name__}: {error}", stacklevel=2)
        return {}
    return {name: sorted(entries, key=lambda entry: entry.seconds) for name, entries in table.items()}


@functools.cache
def known(device: str) -> Mapping[str, list[Entry]]:
    """The table for a device type here: key -> entries, the fastest first."""
    if architecture(device) is None or not cache_folder().is_dir():
        return {}
    return _read(path(device), device)


def find(problem: Problem) -> list[Entry]:
    """What was measured for problems like this one, the fastest first."""
    return known(problem.device).get(key(problem), [])


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other writers, in this process or another, from the tables of a folder until the block ends."""
    if fcntl is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = None
    with suppress(OSError):  # another user's, in a folder that is shared
        lock = (folder / ".lock").open("ab")
    if lock is None:
        yield
        return
    with lock:
        with suppress(OSError):  # a disk without locks: what is lost is measured again
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:  # closing it would not do where a process was forked meanwhile
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)


def store(device: str, found: Mapping[str, list[Entry]]) -> Path:
    """Add to the table; what it has under other keys stays. `reload` must follow for it to be used.

    Raises:
        InputError: there is no such device here.
        OSError: it cannot be written.
    """
    file = path(device)
    with _alone(file.parent):
        table = {**_read(file, device), **found}
        entries = {name: [entry.to_json() for entry in table[name]] for name in sorted(table)}
        data = {"format": _FORMAT, "identity": identity(device), "entries": entries}
        with new_file(file) as temporary:
            temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return file


def reload() -> None:
    """Forget what was read, so that the files count as they are now; PrunedMLPs made before keep their crossovers."""
    for cached in (known, _kernels):
        cached.cache_clear()
    for clear in DEPENDENT:
        clear()
