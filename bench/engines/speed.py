"""Tokens a second of dense and pruned models in both engines; nothing is measured beside other work."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from pyprune.base.clock import median

from .places import LLAMA_BIN, ask_vllm

BATCHES = (1, 4, 16)
PROMPT, NEW = 512, 64


def measure(models: Path, names: Sequence[str], say: Callable[[str], None]) -> list[dict[str, Any]] | None:
    """Decode and prefill of every model, or None where other processes take more than a tenth of the machine."""
    busy = psutil.cpu_percent(interval=10)
    if busy > 10:
        say(f"no speed: {busy:.0f} % of the machine is busy with other work")
        return None
    rows = []
    for kind in ("bf16", "q8_0", "q4_0"):
        for name in names:
            rows += llama(models / f"{name}-{kind}.gguf", name, kind)
    for name in names:
        rows += vllm(models / name, name)
    for row in rows:
        say(str(row))
    return rows


def llama(file: Path, name: str, kind: str) -> list[dict[str, Any]]:
    """Rows by llama-bench: prefill of `PROMPT` tokens, decode of `NEW`."""
    threads = psutil.cpu_count(logical=False) or 1
    command = [LLAMA_BIN / "llama-bench", "-m", file, "-t", threads, "-p", PROMPT, "-n", NEW, "-r", 5, "-o", "json"]
    done = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
    rows = []
    for found in json.loads(done.stdout):
        what = "prefill" if found["n_prompt"] else "decode"
        told = {"model": name, "engine": "llama.cpp", "type": kind, "what": what, "batch": 1, "threads": threads}
        rows.append({**told, "tokens_per_s": median(found["samples_ts"]), "samples": found["samples_ts"]})
    return rows


def vllm(folder: Path, name: str) -> list[dict[str, Any]]:
    """Rows by vLLM, compiled: prefill, and decode as what `NEW` tokens more take over one."""
    cases = [(1, PROMPT, 1)] + [(batch, 16, new) for batch in BATCHES for new in (1, NEW + 1)]
    options = {"dtype": "bfloat16"}
    found = ask_vllm({"model": str(folder), "options": options, "context": 1024, "speed": cases})
    seconds = {(row["batch"], row["prompt"], row["new"]): median(row["seconds"]) for row in found["speed"]}
    told = {"model": name, "engine": "vllm", "type": "bfloat16", "class": found["class"]}
    rows = [{**told, "what": "prefill", "batch": 1, "tokens_per_s": PROMPT / seconds[1, PROMPT, 1]}]
    for batch in BATCHES:
        took = seconds[batch, 16, NEW + 1] - seconds[batch, 16, 1]
        rows.append({**told, "what": "decode", "batch": batch, "tokens_per_s": batch * NEW / took})
    return rows
