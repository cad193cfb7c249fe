"""A checkpoint pruned from the disk under a limit of memory: peak, time, and rates beside a plain copy of the files.

    python -m bench.streaming.make /tmp/large --gb 15
    python -m bench.streaming.run /tmp/large --limit-gb 4 --name 15GB
    python -m bench.streaming.run /tmp/small --limit-gb 4 --name 1.5GB --compare

Every run is a process of its own, whose address space (RLIMIT_AS) is limited. Before each, the checkpoint's pages are
dropped from the system's cache (posix_fadvise), so that they come from the disk. The copy reads and writes the same
files in pieces of 16 MB, and is synced, as the output is. `--compare` prunes the same in memory too, without a limit,
and compares every tensor to the bit. Calibration text is random token ids, as the weights are random. Results go into
`bench/results/streaming.json` under their name.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from pyprune.base import machine
from pyprune.base.files import new_file
from pyprune.model import checkpoint, loading
from pyprune.model.shards import CHUNK, Shards
from pyprune.pruning.prune import prune
from pyprune.pruning.streaming import prune_checkpoint

RESULTS = Path(__file__).parents[1] / "results" / "streaming.json"
# Data-free, and with text and a fit.
RUNS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude-l2-both", "repair": None},
    "wanda + least squares": {"method": "wanda", "repair": "least-squares:target=0.5"},
}
KEEP, WINDOW = 0.8, 512


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _evict(folder: Path) -> None:
    """Let the pages of the folder's weights leave the cache."""
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _copy(source: Path, out: Path) -> float:
    """Seconds that copying the weights takes, synced."""
    _evict(source)
    out.mkdir()
    start = time.perf_counter()
    for path in _files(source):
        with path.open("rb", buffering=0) as read, (out / path.name).open("wb", buffering=0) as write:
            while piece := read.read(CHUNK):
                write.write(piece)
            os.fsync(write.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


def _text(folder: Path, name: str) -> torch.Tensor | None:
    """`[N, WINDOW]` random ids: as many tokens as a layer keeps neurons, and a window more."""
    if RUNS[name]["repair"] is None:
        return None
    config = json.loads((folder / "config.json").read_text())
    windows = -(-config["intermediate_size"] // WINDOW) + 1
    return torch.randint(config["vocab_size"], (windows, WINDOW), generator=torch.Generator().manual_seed(0))


def _facts(start: float) -> dict[str, Any]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    peaks = {name: int(status[key].split()[0]) * 1024 for name, key in (("rss", "VmHWM"), ("addresses", "VmPeak"))}
    done = psutil.Process().io_counters()
    return {
        "seconds": time.perf_counter() - start,
        "peak_rss_bytes": peaks["rss"],
        "peak_address_bytes": peaks["addresses"],
        "cpu_seconds": sum(os.times()[:2]),
        "disk_read_bytes": done.read_bytes,
        "disk_written_bytes": done.write_bytes,
    }


def child(folder: Path, out: Path, name: str, limit: int, spill: Path | None) -> dict[str, Any]:
    """One run, in this process; `limit` bytes of addresses, or 0 for the path in memory, without one."""
    start = time.perf_counter()
    text = _text(folder, name)
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        report = prune_checkpoint(folder, out, KEEP, text=text, spill=spill, max_shard_size="2GB", **RUNS[name])
    else:
        model = loading.load_model(str(folder), "auto")
        report = prune(model, KEEP, text=text, **RUNS[name])
        checkpoint.save(model, out, max_shard_size="2GB")
    return {**_facts(start), "keep": report.mask.keep, "tokens": report.tokens}


def _run(folder: Path, out: Path, name: str, limit: int, spill: Path | None) -> dict[str, Any]:
    _evict(folder)
    asked = [str(folder), "--child", name, "--out", str(out), "--limit-bytes", str(limit)]
    asked += [] if spill is None else ["--spill", str(spill)]
    # One arena: every other thread would reserve addresses that it does not use. And pieces of their own from 1 MB on:
    # building a model asks for memory that it gives back untouched, else 2.7 GB of addresses of a 15 GB model.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, "-m", "bench.streaming.run", *asked]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    shards = Shards(folder)
    for name in sorted(shards.places):
        yield name, shards.read(name)


def _equal(folder: Path, other: Path) -> bool:
    """Whether two checkpoints have the same tensors, to the bit, and the same config."""
    pairs = zip(_tensors(folder), _tensors(other), strict=True)
    same = all(n == m and torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for (n, a), (m, b) in pairs)
    return same and (folder / "config.json").read_bytes() == (other / "config.json").read_bytes()


def measure(folder: Path, limit: int, names: list[str], compare: bool, spill: Path | None) -> dict[str, Any]:
    """The result: a plain copy, and every run beside it."""
    held = sum(path.stat().st_size for path in _files(folder))
    made, memory = folder.parent / f"{folder.name}-pruned", folder.parent / f"{folder.name}-in-memory"
    copied = _copy(folder, made)
    config = json.loads((folder / "config.json").read_text())
    shape = {key: config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    found: dict[str, Any] = {"machine": machine.facts(), "shape": shape, "bytes": held, "limit_bytes": limit}
    found["copy"] = {"seconds": copied, "bytes_per_second": 2 * held / copied}
    found["runs"] = {}
    for name in names:
        row = _run(folder, made, name, limit, spill)
        written = sum(path.stat().st_size for path in _files(made))
        row |= {"machine": found["machine"], "copy": found["copy"]}  # a later call may measure other runs
        row |= {"bytes_written": written, "bytes_per_second": (held + written) / row["seconds"]}
        row["share_of_copy"] = row["bytes_per_second"] / found["copy"]["bytes_per_second"]
        checkpoint.verify(made)
        if compare:
            row["in_memory"] = _run(folder, memory, name, 0, None)
            row["equal_to_the_bit"] = _equal(made, memory)
            shutil.rmtree(memory)
        shutil.rmtree(made)
        found["runs"][name] = row
        print(f"{name}: {row['seconds']:.0f} s, peak {row['peak_rss_bytes'] / 1e9:.2f} GB, "
              f"{row['bytes_per_second'] / 1e6:.0f} MB/s read and written, {row['share_of_copy']:.0%} of a copy's; "
              f"equal: {row.get('equal_to_the_bit', 'not compared')}", flush=True)  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkpoint of bench.streaming.make")
    parser.add_argument("--limit-gb", type=float, default=4.0, help="of addresses, in GB (10^9 bytes)")
    parser.add_argument("--name", help="of the result; default: the folder's")
    parser.add_argument("--only", choices=list(RUNS), action="append", help="default: all")
    parser.add_argument("--spill", type=Path, help="a folder for hidden states")
    parser.add_argument("--compare", action="store_true", help="also prune in memory, and compare")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", choices=list(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--limit-bytes", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(child(asked.folder, asked.out, asked.child, asked.limit_bytes, asked.spill)))
        return
    found = measure(asked.folder, int(asked.limit_gb * 1e9), asked.only or list(RUNS), asked.compare, asked.spill)
    results = json.loads(asked.results.read_text()) if asked.results.exists() else {}
    name = asked.name or asked.folder.name
    runs = {**results.get(name, {}).get("runs", {}), **found["runs"]}
    with new_file(asked.results) as file:
        file.write_text(json.dumps({**results, name: {**found, "runs": runs}}, indent=2) + "\n")


if __name__ == "__main__":
    main()
