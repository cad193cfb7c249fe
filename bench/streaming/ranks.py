"""Pruning by several processes against one: seconds of `prune`, and whether they give the same.

    python -m bench.streaming.ranks                     two processes of one thread each, on the CPU
    python -m bench.streaming.ranks --device cuda --hidden 4096 --intermediate 14336 --layers 4 --windows 128
                                                        two GPUs over NCCL; refused at once where they are not there

Every run is `torchrun` of so many processes, each of one thread, in turns, `--repeats` times each; the model has random
weights and the text is random ids, since the time does not depend on what they say. The time is that of `prune` alone
in the slowest rank, after a barrier. The best run of each counts, since others on the machine can only add. The result
has all runs, the largest difference of a weight, and the load before. On CPUs two processes need two free cores; the
processor time of the busiest process is there beside the seconds: what these come to where nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pyprune.base import machine
from pyprune.base.errors import InputError
from pyprune.base.files import new_file
from pyprune.base.ranks import ALONE, check_devices, joining, launched, local_device
from pyprune.pruning.prune import prune

RESULTS = Path(__file__).parents[1] / "results" / "ranks.json"
VOCABULARY, WINDOW = 4096, 512
RUNS: dict[str, dict[str, Any]] = {
    "wanda + least squares": {"method": "wanda", "repair": "least-squares:target=0.5"},
    "obs + least squares": {"method": "obs", "repair": "least-squares:target=0.5"},
}


def _shape(asked: argparse.Namespace) -> dict[str, int]:
    heads = max(1, asked.hidden // 64)
    return {
        "hidden_size": asked.hidden,
        "intermediate_size": asked.intermediate,
        "num_hidden_layers": asked.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 3 if heads % 3 == 0 else heads,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": WINDOW,
    }


def worker(asked: argparse.Namespace) -> None:
    """One run in this rank; rank 0 writes the weights, and every rank its seconds."""
    place = local_device(asked.device)
    with joining(place) if launched() > 1 else nullcontext(ALONE) as ranks:
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(**_shape(asked))).eval().to(place)
        ids = torch.randint(VOCABULARY, (asked.windows, WINDOW), generator=torch.Generator().manual_seed(0))
        ranks.gather(0)  # all are here
        start, worked = time.perf_counter(), time.process_time()
        report = prune(model, 0.8, text=ids, **RUNS[asked.case])
        if asked.device == "cuda":
            torch.cuda.synchronize()
        facts = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - worked}
        facts |= {"peak_bytes": report.peak_bytes, "device_peak_bytes": report.device_peak_bytes}
        (asked.out / f"{ranks.rank}.json").write_text(json.dumps(facts))
        if ranks.rank == 0:
            masks = {f"mask.{i}": keep.neurons for i, keep in enumerate(report.mask.layers)}
            save_file({**{n: p.cpu() for n, p in model.state_dict().items()}, **masks}, asked.out / "model.safetensors")


def _run(out: Path, processes: int, name: str, asked: argparse.Namespace) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words += ["-m", "bench.streaming.ranks", "--out", str(out), "--case", name]
    for option in ("device", "hidden", "intermediate", "layers", "windows"):
        words += [f"--{option}", str(getattr(asked, option))]
    known = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    subprocess.run([sys.executable, *words], env=known, check=True)
    rows = [json.loads((out / f"{rank}.json").read_text()) for rank in range(processes)]
    return {name: max(row[name] for row in rows) for name in rows[0]}


def _difference(one: Path, several: Path) -> dict[str, Any]:
    """Whether the same neurons stayed, and the largest difference of a weight, relative to its tensor's largest."""
    a, b = (load_file(folder / "model.safetensors") for folder in (one, several))
    masks = [name for name in a if name.startswith("mask.")]
    same = all(a[name].equal(b[name]) for name in masks)
    pairs = [(a[name], b[name]) for name in a if name not in masks and a[name].shape == b[name].shape]
    largest = max(float((x - y).abs().max() / x.abs().max()) for x, y in pairs)
    return {"same_neurons": same, "largest_difference": largest}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--windows", type=int, default=32, help="of 512 tokens")
    parser.add_argument("--only", choices=list(RUNS), action="append", help="default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=list(RUNS), help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.case:
        worker(asked)
        return
    try:
        check_devices(asked.device, asked.processes)
    except InputError as error:
        parser.error(str(error))
    sizes = {**_shape(asked), "tokens": WINDOW * asked.windows}
    result: dict[str, Any] = {"machine": machine.facts(), "shape": sizes, "device": asked.device, "runs": {}}
    result["processes"] = asked.processes
    for name in asked.only or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            one, several = Path(folder) / "one", Path(folder) / "several"
            row: dict[str, Any] = {"one": [], "several": []}
            for _ in range(asked.repeats):
                row["one"].append(_run(one, 1, name, asked))
                row["several"].append(_run(several, asked.processes, name, asked))
            best = {key: {f: min(r[f] for r in row[key]) for f in ("seconds", "cpu_seconds")} for key in row}
            row |= {f"speedup_{f}": best["one"][f] / best["several"][f] for f in best["one"]}
            row |= _difference(one, several)
        result["runs"][name] = row
        print(f"{name}: {best['one']['seconds']:.1f} s by one, {best['several']['seconds']:.1f} s by several: "
              f"{row['speedup_seconds']:.2f}x (of processor time in the busiest, {row['speedup_cpu_seconds']:.2f}x); "
              f"same neurons: {row['same_neurons']}, largest difference of a weight {row['largest_difference']}",
              flush=True)  # fmt: skip
    found = json.loads(asked.results.read_text()) if asked.results.exists() else {}
    with new_file(asked.results) as file:
        file.write_text(json.dumps({**found, f"{asked.device} {asked.processes}": result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
