"""Tokens a second of dense and pruned models in both engines; nothing is measured beside other work.

In vLLM with its own layers (`off`), with the plugin's choice (`auto`), and with int8 rows for few tokens (`int8`).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pyprune.base.clock import median
from pyprune.base.files import new_folder

from .places import LLAMA_BIN, ask_vllm

BATCHES = (1, 4, 16)
PROMPT, NEW = 512, 64
KERNELS = {"off": {"kernels": "off"}, "auto": {}, "int8": {"weights": "int8"}}
# LLaMA 3.2 1B with half of its neurons, and with random weights: the FFN is most of what its layers read.
WIDE = "llama-1b-half"
_WIDE = {
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def make_wide(models: Path) -> None:
    """The checkpoint of random weights, where it is not there yet: 1.7 GB."""
    if not (models / WIDE).is_dir():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**_WIDE)).to(torch.bfloat16)
        with new_folder(models / WIDE) as folder:
            model.save_pretrained(folder)


def measure(models: Path, names: Sequence[str], say: Callable[[str], None]) -> list[dict[str, Any]] | None:
    """Decode and prefill of every model, or None where other processes take more than a tenth of the machine.

    Args:
        models: their folder.
        names: of those of one dense model, that itself first and the one for all kinds of kernels last.
        say: told each row.
    """
    make_wide(models)
    busy = psutil.cpu_percent(interval=10)
    if busy > 10:
        say(f"no speed: {busy:.0f} % of the machine is busy with other work")
        return None
    rows = []
    cases = [(llama, name, kind) for kind in ("bf16", "q8_0", "q4_0") for name in names]
    cases += [(vllm, name, "off") for name in names[:-1]]
    cases += [(vllm, name, kernels) for name in (names[-1], WIDE) for kernels in KERNELS]
    for engine, name, way in cases:
        found = engine(models, name, way)
        for row in found:
            say(str(row))
        rows += found
    return rows


def llama(models: Path, name: str, kind: str) -> list[dict[str, Any]]:
    """Rows by llama-bench: prefill of `PROMPT` tokens, decode of `NEW`."""
    file = models / f"{name}-{kind}.gguf"
    threads = psutil.cpu_count(logical=False) or 1
    command = [LLAMA_BIN / "llama-bench", "-m", file, "-t", threads, "-p", PROMPT, "-n", NEW, "-r", 5, "-o", "json"]
    done = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
    rows = []
    for found in json.loads(done.stdout):
        what = "prefill" if found["n_prompt"] else "decode"
        told = {"model": name, "engine": "llama.cpp", "type": kind, "what": what, "batch": 1, "threads": threads}
        told["bytes"] = file.stat().st_size
        rows.append({**told, "tokens_per_s": median(found["samples_ts"]), "samples": found["samples_ts"]})
    return rows


def vllm(models: Path, name: str, kernels: str) -> list[dict[str, Any]]:
    """Rows by vLLM, compiled: prefill, and decode as what `NEW` tokens more take over one."""
    folder = models / name
    cases = [(1, PROMPT, 1)] + [(batch, 16, new) for batch in BATCHES for new in (1, NEW + 1)]
    options = {"dtype": "bfloat16", "skip_tokenizer_init": True, "additional_config": {"pyprune": KERNELS[kernels]}}
    found = ask_vllm({"model": str(folder), "options": options, "context": 1024, "speed": cases})
    seconds = {(row["batch"], row["prompt"], row["new"]): median(row["seconds"]) for row in found["speed"]}
    told = {"model": name, "engine": "vllm", "type": "bfloat16", "class": found["class"], "kernels": kernels}
    told |= {"records": found["records"], "bytes": (folder / "model.safetensors").stat().st_size}
    rows = [{**told, "what": "prefill", "batch": 1, "tokens_per_s": PROMPT / seconds[1, PROMPT, 1]}]
    for batch in BATCHES:
        took = seconds[batch, 16, NEW + 1] - seconds[batch, 16, 1]
        rows.append({**told, "what": "decode", "batch": batch, "tokens_per_s": batch * NEW / took})
    return rows
