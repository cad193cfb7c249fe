"""A checkpoint larger than the device may hold, pruned from the disk on a GPU: peaks, time, and where it goes.

    python3 -m bench.streaming.gpu FOLDER --gb 15 --limit-gb 12 --out streamed-gpu.json --compare

Makes a LLaMA of random bfloat16 weights (LLaMA-3-8B's widths unless told otherwise) in FOLDER, and prunes it streamed,
once by weights alone and once with random token ids and a fit, while torch may take `--limit-gb` of the device. The
files leave the system's cache before each run. The disk is measured first; where all would take longer than `--seconds`
by the estimate, the model has fewer layers, and the result says so. `--compare` prunes a smaller one also in the
device's memory, and compares every tensor. Results are written after each step. FOLDER is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.streaming.make import config_of, make
from bench.streaming.phases import phases
from bench.streaming.run import RUNS, _evict, _files, _tensors
from pyprune.base import machine
from pyprune.base.files import new_file
from pyprune.base.memory import PeakMemory
from pyprune.model import checkpoint, loading
from pyprune.model.shards import CHUNK
from pyprune.pruning.prune import prune
from pyprune.pruning.streaming import prune_checkpoint

KEEP = 0.7
# Products a second: bfloat16 as measured on an H200 (bench/results/gpu.json), float64 by NVIDIA's data sheet of it.
LOW, DOUBLE = 790e12, 67e12
# For the estimate before anything is made: bytes a second that are made, hashed and written to the cache; seconds a
# layer of LLaMA-3-8B's widths with 131,072 tokens, and seconds that stand by themselves.
MADE, LAYER, FIXED = 0.9e9, 1.3, 25.0
COMPARED = {"gigabytes": 1.5, "hidden": 3072, "intermediate": 8192, "windows": 8, "window": 1024}


@dataclass(frozen=True)
class Asked:
    """What is measured: windows of text, bytes that torch may take, the device."""

    windows: int
    window: int
    limit: float
    device: torch.device

    def text(self, config: dict[str, Any], windows: int, window: int) -> torch.Tensor:
        """Random token ids."""
        return torch.randint(config["vocab_size"], (windows, window), generator=torch.Generator().manual_seed(0))

    def allow(self, limit: float | None) -> None:
        """Let torch take so many bytes of the device; None: all."""
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0 if limit is None else min(1.0, limit / total), self.device)


def disk(folder: Path, size: int) -> dict[str, float]:
    """Bytes a second that one thread writes to a new file, synced, and reads from it, out of the cache."""
    path, piece = folder / "model.safetensors", os.urandom(CHUNK)
    folder.mkdir(parents=True)
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(max(1, size // CHUNK)):
            file.write(piece)
        os.fsync(file.fileno())
    wrote = time.perf_counter() - start
    _evict(folder)
    held, room, start = path.stat().st_size, bytearray(CHUNK), time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(room):
            pass
    read = time.perf_counter() - start
    shutil.rmtree(folder)
    return {"write": held / wrote, "read": held / read}


def seconds(gigabytes: float, layers: int, share: float, rates: dict[str, float]) -> float:
    """What making and both runs take, by the estimate; `share` of LLaMA-3-8B's products in a layer."""
    size = gigabytes * 1e9
    moved = size / rates["read"] + KEEP * size / rates["write"]
    return FIXED + size / min(MADE, rates["write"]) + moved + max(moved, layers * LAYER * share)


def floor(config: dict[str, Any], read: int, written: int, rates: dict[str, float], tokens: int) -> dict[str, float]:
    """Seconds that nothing could go below: bytes over the disk's rates; products over the device's, `tokens` of text.

    Three forwards of a layer, the last of them cut; half of the second moment, the cross moment; a fit with its errors.
    """
    f, d, layers = config["intermediate_size"], config["hidden_size"], config["num_hidden_layers"]
    k, attention, ffn = KEEP * f, 2.5 * d * d, 3 * d * f
    forwards = 2 * tokens * (3 * attention + (2 + KEEP) * ffn)
    moments = 2 * tokens * f * (f / 2 + d)
    fit = 2 * k * f * d + k**3 / 3 + 2 * k * k * d + 4 * 2 * f * f * d
    low, double = layers * (forwards + moments) / LOW, layers * fit / DOUBLE
    found = {"reading": read / rates["read"], "writing": written / rates["write"]}
    return found | ({"forwards and moments": low, "fits": double} if tokens else {})


def _stream(folder: Path, out: Path, name: str, asked: Asked, config: dict[str, Any], limit: float | None) -> Any:
    how = RUNS[name]
    text = asked.text(config, asked.windows, asked.window) if how["repair"] else None
    asked.allow(limit)
    return prune_checkpoint(folder, out, KEEP, text=text, device=asked.device, max_shard_size="2GB", **how)


def measure(folder: Path, name: str, asked: Asked, rates: dict[str, float]) -> dict[str, Any]:
    """One streamed run, in a device that is half as large again where it does not fit; what it wrote is removed."""
    out = folder.parent / f"{folder.name}-pruned"
    config = json.loads((folder / "config.json").read_text())
    held, limit, small = sum(path.stat().st_size for path in _files(folder)), asked.limit, []
    while True:
        _evict(folder)
        start = time.perf_counter()
        try:
            with PeakMemory(device=asked.device) as memory, phases(asked.device) as found:
                report = _stream(folder, out, name, asked, config, limit)
                took, parts = time.perf_counter() - start, found()
            break
        except torch.OutOfMemoryError as error:
            small.append({"limit_bytes": limit, "said": str(error).splitlines()[0][:300]})
            print(f"{name}: {limit / 1e9:g} GB of the device are too few", flush=True)
            limit *= 1.5
            if len(small) == 3:
                raise
    reserved = torch.cuda.max_memory_reserved(asked.device) if asked.device.type == "cuda" else 0
    written = sum(path.stat().st_size for path in _files(out))
    shutil.rmtree(out)
    row = {
        "seconds": took,
        "seconds_a_layer": took / config["num_hidden_layers"],
        "phases": parts,
        "floor": floor(config, held, written, rates, report.tokens),
        "limit_bytes": limit,
        "too_small": small,
        "device_peak_bytes": report.device_peak_bytes,
        "device_reserved_bytes": reserved,
        "host_peak_bytes": memory.peak,
        "host_growth_bytes": memory.growth,
        "bytes_read": held,
        "bytes_written": written,
        "bytes_per_second": (held + written) / took,
        "tokens": report.tokens,
        "tokens_per_second": report.tokens / took,
    }
    least, most = max(row["floor"].values()), sum(row["floor"].values())
    peaks = f"device {report.device_peak_bytes / 1e9:.2f} GB, host {memory.peak / 1e9:.2f} GB"
    rate = f"{row['bytes_per_second'] / 1e9:.2f} GB/s read and written"
    print(f"{name}: {took:.1f} s (floor {least:.1f} to {most:.1f}), {peaks}, {rate}", flush=True)
    print("  " + ", ".join(f"{part} {value:.2f}" for part, value in parts.items()), flush=True)
    return row


def compare(folder: Path, asked: Asked, hidden: int, intermediate: int, gigabytes: float) -> dict[str, Any]:
    """A smaller checkpoint, streamed and in the device's memory: which tensors differ, and the largest difference."""
    gigabytes = min(COMPARED["gigabytes"], gigabytes)
    sides = min(COMPARED["hidden"], hidden), min(COMPARED["intermediate"], intermediate)
    make(folder, gigabytes, *sides, device=asked.device)
    config = json.loads((folder / "config.json").read_text())
    count = min(COMPARED["windows"], asked.windows), min(COMPARED["window"], asked.window)
    few, found = Asked(*count, asked.limit, asked.device), {}
    outs = [folder.parent / f"{folder.name}-{name}" for name in ("streamed", "in-memory")]
    for name, how in RUNS.items():
        report = _stream(folder, outs[0], name, few, config, None)
        start = time.perf_counter()
        model = loading.load_model(str(folder), "auto", str(asked.device))
        loaded = time.perf_counter() - start
        made = prune(model, KEEP, text=few.text(config, *count) if how["repair"] else None, **how)
        checkpoint.save(model, outs[1], max_shard_size="2GB")
        del model
        largest, differ = 0.0, 0
        for (key, a), (other, b) in zip(_tensors(outs[0]), _tensors(outs[1]), strict=True):
            assert key == other
            if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
                differ += 1
                apart = float((a.float() - b.float()).abs().max()) if a.shape == b.shape else float("inf")
                largest = max(largest, apart)
        found[name] = {
            "equal_to_the_bit": differ == 0 and report.mask == made.mask,
            "same_neurons": report.mask == made.mask,
            "tensors_that_differ": differ,
            "largest_difference": largest,
            "streamed": {"seconds": report.seconds, "device_peak_bytes": report.device_peak_bytes},
            "in_memory": {
                "load_seconds": loaded,
                "seconds": made.seconds,
                "device_peak_bytes": made.device_peak_bytes,
            },
        }
        said = f"equal to the bit {differ == 0}, {differ} tensors differ, at most {largest:g}"
        print(f"compared, {name}: {said}", flush=True)
        for out in outs:
            shutil.rmtree(out)
    shutil.rmtree(folder)
    shape = {key: config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    return {"shape": shape, "tokens": count[0] * count[1], "runs": found}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="does not exist; on the disk that is measured")
    parser.add_argument("--gb", type=float, default=15.0, help="of the checkpoint, in GB (10^9 bytes)")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14_336)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--limit-gb", type=float, default=12.0, help="of the device's memory")
    parser.add_argument("--seconds", type=float, default=200.0, help="that all may take by the estimate")
    parser.add_argument("--compare", action="store_true", help="first a smaller one, in the device's memory too")
    parser.add_argument("--only", choices=list(RUNS), action="append", help="default: all")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="JSON of the results")
    asked = parser.parse_args(arguments)
    what = Asked(asked.windows, asked.window, asked.limit_gb * 1e9, machine.place_of(asked.device))
    result: dict[str, Any] = {"machine": machine.facts(), "keep": KEEP, "errors": {}}
    began = time.perf_counter()

    def step(name: str, work: Callable[[], Any]) -> Any:
        """What `work` gives, or None with the reason among the errors; written down either way."""
        start, found = time.perf_counter(), None
        try:
            found = result[name] = work()
        except Exception as error:
            result["errors"][name] = traceback.format_exc()
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
        print(f"{name} took {time.perf_counter() - start:.1f} s, all {time.perf_counter() - began:.1f} s", flush=True)
        if asked.out is not None:
            with new_file(asked.out) as file:
                file.write_text(json.dumps(result, indent=2) + "\n")
        return found

    asked.folder.mkdir(parents=True)
    try:
        rates = step("disk", lambda: disk(asked.folder / "disk", int(min(1.0, asked.gb) * 1e9)))
        print(f"disk: {rates['write'] / 1e9:.2f} GB/s written, {rates['read'] / 1e9:.2f} GB/s read", flush=True)
        if asked.compare:
            small = asked.hidden, asked.intermediate, asked.gb
            step("compared", lambda: compare(asked.folder / "small", what, *small))
        gigabytes, whole = asked.gb, config_of(asked.gb, asked.hidden, asked.intermediate).num_hidden_layers
        products = asked.hidden * asked.intermediate * asked.windows * asked.window / (4096 * 14_336 * 131_072)
        share = min(1.0, asked.seconds / seconds(gigabytes, whole, products, rates))
        large = asked.folder / "large"
        shape = share * gigabytes, asked.hidden, asked.intermediate
        config = step("make", lambda: make(large, *shape, device=what.device).to_dict())
        if config is not None:
            keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
            size = sum(path.stat().st_size for path in _files(large))
            result["make"] = {**{key: config[key] for key in keys}, "layers_asked": whole, "bytes": size}
            layers = config["num_hidden_layers"]
            print(f"made {layers} layers of the {whole} asked for, {size / 1e9:.1f} GB", flush=True)
            for name in asked.only or list(RUNS):
                step(name, partial(measure, large, name, what, rates))
    finally:
        shutil.rmtree(asked.folder)
    return result


if __name__ == "__main__":
    raise SystemExit(1 if main()["errors"] else 0)
