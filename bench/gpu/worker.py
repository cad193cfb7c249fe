"""The process that measures: case after case, each told to a file as soon as it is known.

    python -m bench.gpu.worker LINES PLAN

PLAN is a JSON file: `cases` (names, in order), `skip` (case -> variants that brought an earlier worker down), `until`
(the time, by time.time(), after which no case is begun), `dry`, `ceilings` (whether to measure them). A worker that
loses the device ends with LOST; what it was doing then is the last `doing` of the file.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

LOST = 3
INDUCTOR_SECONDS = 110.0


def _device_is_lost(timer: Any) -> bool:
    try:
        timer.synchronize()
    except Exception:
        return True
    return False


class Worker:
    """One process' work; imports torch and the kernels, so it is made where these are wanted only."""

    def __init__(self, lines: Path, plan: dict[str, Any]) -> None:
        import torch

        from bench.gpu.layers import Arena
        from bench.gpu.lines import say
        from bench.gpu.timing import CudaTimer, WallTimer

        self.lines, self.plan, self._say = lines, plan, say
        self.timer = WallTimer() if plan["dry"] else CudaTimer()
        self.dtype = torch.float32 if plan["dry"] else torch.bfloat16
        small = (1 << 20, 1 << 17) if plan["dry"] else ()
        self.arena = Arena(self.timer.device, self.dtype, *small)

    def say(self, **facts: Any) -> None:
        self._say(self.lines, **facts)

    def machine(self) -> None:
        """Tell what this is measured on, and the ceilings."""
        from bench.gpu.ceilings import gemm_rate, read_bandwidth
        from bench.gpu.clocks import clocks, device_facts
        from pyprune.base import machine
        from pyprune.ffn import native

        facts = device_facts(self.timer.device)
        library = native.facts("cuda")
        library.pop("path", None)
        self.say(machine=machine.facts(), device=facts, native=library, clocks_before=clocks())
        self.timer.spin(1.0)  # nothing is measured by cold clocks
        if not self.plan["ceilings"]:
            return
        self.say(doing=["ceilings", ""])
        many = int(facts.get("multiprocessors", 1))
        size, n = (1 << 18, 64) if self.plan["dry"] else (4 << 30, 8192)
        self.say(
            ceilings={"read": read_bandwidth(self.timer, size, many), "gemm": gemm_rate(self.timer, self.dtype, n)}
        )
        self.say(clocks_after_ceilings={**clocks(), **self.timer.clocks()})

    def case(self, case: Any) -> None:
        """Measure one case and tell its row."""
        from bench.gpu import model
        from bench.gpu.case import ROUNDS, measure

        start = time.perf_counter()

        def doing(what: str) -> None:
            self.say(doing=[case.name, what])

        if case.kind == "inductor":
            doing("inductor")
            self._inductor()
            return
        if case.kind == "model":
            sizes = model.TINY if self.plan["dry"] else model.LLAMA
            row = model.measure(self.timer, self.dtype, sizes, case.keep, doing)
            self.say(model={**row, "seconds": time.perf_counter() - start}, done=case.name)
        else:
            skip = set(self.plan["skip"].get(case.name, []))
            row = measure(case, self.arena, self.timer, skip, doing, 1 if self.plan["dry"] else ROUNDS)
            self.say(row={**row, "seconds": time.perf_counter() - start}, done=case.name)

    def _inductor(self) -> None:
        """torch.compile in a process of its own: it cannot be interrupted, only ended."""
        left = min(INDUCTOR_SECONDS, self.plan["until"] - time.time())
        command = [sys.executable, "-m", "bench.gpu.inductor", str(self.lines)]
        outcome = "whole"
        try:
            done = subprocess.run([*command, *(["dry"] if self.plan["dry"] else [])], timeout=left, check=False)
            if done.returncode:
                outcome = f"ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            outcome = f"ended after {left:.0f} s"
        self.say(inductor_outcome=outcome, done="inductor")

    def run(self) -> int:
        """All cases of the plan that time allows; the exit code."""
        import torch

        from bench.gpu.cases import all_cases, dry_cases

        known = {case.name: case for case in (dry_cases() if self.plan["dry"] else all_cases())}
        self.machine()
        for name in self.plan["cases"]:
            case = known[name]
            if time.time() + case.seconds > self.plan["until"]:
                self.say(left_out=name)
                continue
            try:
                self.case(case)
            except Exception as problem:
                lost = _device_is_lost(self.timer)
                message = " ".join(f"{type(problem).__name__}: {problem}".split())[:400]
                self.say(broken=[name, message], lost=lost)
                if lost:
                    return LOST
            if self.timer.device.type == "cuda":
                torch.cuda.empty_cache()
        from bench.gpu.clocks import clocks

        self.say(clocks_at_the_end=clocks())
        return 0


def main(lines: str, plan: str) -> int:
    worker = Worker(Path(lines), json.loads(Path(plan).read_text(encoding="utf-8")))
    gc.freeze()  # a capture may collect garbage first, which would look through all that was imported
    return worker.run()


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    # Past what a lost device would make of the interpreter's end.
    os._exit(code)
