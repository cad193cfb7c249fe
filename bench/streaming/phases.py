"""Where the seconds of a streamed run go: clocks around what the product does, put there from outside."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pyprune.model.pages import Pages
from pyprune.model.shard_writer import ShardWriter
from pyprune.model.shards import Shards
from pyprune.model.transfer import Transfer
from pyprune.pruning.calibration import LayerStream
from pyprune.pruning.moments import Moments
from pyprune.pruning.pruner import Pruner
from pyprune.pruning.repair.least_squares import LeastSquares
from pyprune.pruning.streaming.pruner import KeptStream, StreamedPruner

# What is timed, whether on the device (else on the host), and what it is called. Names in one another: `read` holds
# `read: files`, `write` holds `write: hash and file`, `statistics` holds `moments`. Reading and writing are threads
# of their own; the others follow one another.
TIMED: tuple[tuple[Any, str, bool, str], ...] = (
    (Shards, "_fill", False, "read: files"),
    (Transfer, "read", False, "read"),
    (ShardWriter, "_all", False, "write: hash and file"),
    (ShardWriter, "flush", False, "write: sync"),
    (ShardWriter, "write", False, "write"),
    (Pages, "need", False, "waiting for a layer to be read"),
    (StreamedPruner, "wait", False, "waiting for a layer to be written"),
    (KeptStream, "keep", False, "hidden states kept"),
    (LayerStream, "_embed", True, "embedding"),
    (LayerStream, "group_statistics", True, "statistics"),
    (Moments, "add", True, "moments"),
    (LayerStream, "advance", True, "forward, cut"),
    (LayerStream, "advance_twin", True, "forward, dense"),
    (Pruner, "score", True, "scores"),
    (LeastSquares, "fit", True, "fit"),
)


@contextmanager
def phases(device: torch.device) -> Iterator[Callable[[], dict[str, float]]]:
    """Inside, what `TIMED` names is timed; gives a function of seconds by name. On a GPU by events, without waiting."""
    seen: list[tuple[str, Any, Any]] = []
    gpu = device.type == "cuda"

    def timed(method: Any, name: str, on_device: bool) -> Any:
        def now() -> Any:
            if not (gpu and on_device):
                return time.perf_counter()
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event

        @functools.wraps(method)
        def timing(*args: Any, **kwargs: Any) -> Any:
            start = now()
            try:
                return method(*args, **kwargs)
            finally:
                seen.append((name, start, now()))

        return timing

    def found() -> dict[str, float]:
        if gpu:
            torch.cuda.synchronize(device)
        sums: dict[str, float] = defaultdict(float)
        for name, start, end in seen:
            sums[name] += end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3
        return dict(sums)

    before = [(owner, attribute, owner.__dict__[attribute]) for owner, attribute, _, _ in TIMED]
    for owner, attribute, on_device, name in TIMED:
        setattr(owner, attribute, timed(owner.__dict__[attribute], name, on_device))
    try:
        yield found
    finally:
        for owner, attribute, method in before:
            setattr(owner, attribute, method)
