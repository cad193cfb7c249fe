"""A streamed run that is killed (SIGKILL) at random moments and started again: nothing is lost, and nothing differs.

    python -m bench.streaming.kill --kills 20

A small LLaMA of random weights is pruned with wanda and least squares. Runs are killed after a random time, drawn anew
from the length of a whole one, and the same call goes on; whenever one ends, its output is compared to the bit with
that of `prune` and `save` in memory, and a new one begins, until there were as many kills as asked for. After each kill
the output folder must not be there, or be whole (`verify`), and the layers that were done must be at least those
before. The log goes into `bench/results/killed.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.streaming.make import make
from bench.streaming.run import _equal
from pyprune.base import machine
from pyprune.base.files import new_file
from pyprune.model import checkpoint, loading
from pyprune.pruning.prune import prune
from pyprune.pruning.streaming import prune_checkpoint
from pyprune.pruning.streaming.state import STATE, folder_of

RESULTS = Path(__file__).parents[1] / "results" / "killed.json"
HOW: dict[str, Any] = {"keep": 0.8, "method": "wanda", "repair": "least-squares:target=0.5"}


def _layers(out: Path) -> int:
    """How many layers are done, by the state on the disk."""
    path = folder_of(out) / STATE
    return int(json.loads(path.read_text())["progress"]["layers"]) if path.is_file() else 0


def _start(source: Path, out: Path, ids: torch.Tensor) -> int:
    """The process id of a run that has begun."""
    child = os.fork()
    if child == 0:
        try:
            prune_checkpoint(source, out, text=ids, max_shard_size="1MB", **HOW)
            os._exit(0)
        except BaseException as error:
            print(f"run failed: {type(error).__name__}: {error}", flush=True)
            os._exit(1)
    return child


def _ended(child: int, seconds: float) -> int | None:
    """The exit status of a run if it ends within `seconds`, else None."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if (done := os.waitpid(child, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(done[1])
        time.sleep(0.002)
    return None


def run(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """The log of `kills` kills."""
    source, out, wanted = folder / "dense", folder / "out", folder / "wanted"
    config = make(source, 0.02, 128, 352, seed)
    ids = torch.randint(config.vocab_size, (4, 128), generator=torch.Generator().manual_seed(seed))
    model = loading.load_model(str(source), "auto")
    prune(model, text=ids, **HOW)
    checkpoint.save(model, wanted)
    begun = time.monotonic()
    assert _ended(_start(source, out, ids), 3600) == 0
    length = time.monotonic() - begun
    assert _equal(out, wanted), "without a kill"
    shutil.rmtree(out)
    draw, log, whole, before = random.Random(seed), [], 0, 0
    while len(log) < kills:
        child, after = _start(source, out, ids), draw.uniform(0, length)
        status = _ended(child, after)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            there = out.exists()
            if there:
                checkpoint.verify(out)
            done = config.num_hidden_layers if there else _layers(out)
            assert done >= before, f"{before} layers were done, and then {done}"
            log.append({"after_seconds": round(after, 3), "layers_before": before, "layers_done": done, "whole": there})
            print(log[-1], flush=True)
            before = done
        assert status in (None, 0), "a run failed"
        if out.exists():
            assert _equal(out, wanted), f"after {len(log)} kills"
            whole, before = whole + 1, 0
            shutil.rmtree(out)
            shutil.rmtree(folder_of(out), ignore_errors=True)
    while not out.exists():
        assert _ended(_start(source, out, ids), 3600) == 0
    assert _equal(out, wanted), "at the end"
    facts = {"layers": config.num_hidden_layers, "seconds_of_a_whole_run": length, "kills": len(log)}
    return {"machine": machine.facts(), **facts, "runs_that_ended_and_were_equal": whole + 1, "log": log}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(asked.kills, asked.seed, Path(folder))
    with new_file(asked.results) as file:
        file.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{found['kills']} kills; {found['runs_that_ended_and_were_equal']} runs ended, each equal to the bit")


if __name__ == "__main__":
    main()
