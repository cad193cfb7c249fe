"""Tokens a second of dense and pruned models in both engines; nothing is measured beside other work.

In vLLM with its own layers (`off`), with the plugin's choice (`auto`), and with int8 rows for few tokens (`int8`). What
is compared is measured in turn. For each engine the share of the FFNs is measured too, and with it the ceiling.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pyprune import prune
from pyprune.base.clock import median
from pyprune.base.files import new_folder
from pyprune.model import checkpoint
from pyprune.model.loading import load_model

from .ceiling import LEAST, LEAST_NEURONS, add_ceilings, neurons
from .places import LLAMA_BIN, time_vllm

TYPES = ("bf16", "q8_0", "q4_0")  # of llama.cpp
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


def make_least(models: Path) -> None:
    """The dense model with next to no neurons, where it is not there yet."""
    if not (models / LEAST).is_dir():
        model = load_model(str(models / "dense"), "bfloat16")
        share = LEAST_NEURONS / model.config.intermediate_size
        prune(model, share, "magnitude-l2-both", allocation=f"uniform:multiple={LEAST_NEURONS}", repair=None)
        checkpoint.save(model, models / LEAST)


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
    rows: list[dict[str, Any]] = []
    by_own = [(name, "off") for name in (*names, LEAST)]
    parts = [partial(llama, models, (*names, LEAST), kind) for kind in TYPES]
    parts += [partial(vllm, models, [*by_own, (names[-1], "auto"), (names[-1], "int8")])]
    parts += [partial(vllm, models, [(WIDE, kernels) for kernels in KERNELS])]
    for part in parts:
        found = part()
        for row in found:
            say(str(row))
        rows += found
    add_ceilings(rows, names[1:])
    return rows


def llama(models: Path, names: Sequence[str], kind: str, rounds: int = 3) -> list[dict[str, Any]]:
    """Rows by llama-bench and llama-batched-bench, the models in turn: prefill of `PROMPT` tokens, and decode."""
    threads = psutil.cpu_count(logical=False) or 1
    samples: dict[tuple[str, str, int], list[float]] = {}
    for _ in range(rounds):
        for name in names:
            file = models / f"{name}-{kind}.gguf"
            for one in json.loads(_run("llama-bench", file, threads, "-p", PROMPT, "-n", NEW, "-r", 2, "-o", "json")):
                what = "prefill" if one["n_prompt"] else "decode"
                samples.setdefault((name, what, 1), []).extend(one["samples_ts"])
            many = ("-npp", 16, "-ntg", NEW // 2, "-npl", BATCHES[-1], "-c", 2048, "--output-format", "jsonl")
            for line in _run("llama-batched-bench", file, threads, *many).splitlines():
                if line.startswith("{"):
                    samples.setdefault((name, "decode", BATCHES[-1]), []).append(json.loads(line)["speed_tg"])
    rows = []
    for (name, what, batch), found in samples.items():
        told = {"model": name, "engine": "llama.cpp", "type": kind, "what": what, "batch": batch, "threads": threads}
        told |= {"bytes": (models / f"{name}-{kind}.gguf").stat().st_size, "neurons": neurons(models / name)}
        rows.append({**told, "tokens_per_s": median(found), "samples": found})
    return rows


def _run(program: str, file: Path, threads: int, *options: object) -> str:
    command = [LLAMA_BIN / program, "-m", file, "-t", threads, *options]
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


def vllm(models: Path, ways: Sequence[tuple[str, str]], rounds: int = 5) -> list[dict[str, Any]]:
    """Rows by vLLM, compiled, the models in turn: prefill, and decode as what `NEW` tokens more take over one.

    Args:
        models: their folder.
        ways: models, each with a key of `KERNELS`.
        rounds: that are timed.
    """
    cases = [(1, PROMPT, 1)] + [(batch, 16, new) for batch in BATCHES for new in (1, NEW + 1)]
    asked = []
    for name, kernels in ways:
        options = {"dtype": "bfloat16", "skip_tokenizer_init": True, "additional_config": {"pyprune": KERNELS[kernels]}}
        asked.append({"model": str(models / name), "options": options})
    answer = time_vllm({"models": asked, "cases": cases, "rounds": rounds})
    rows = []
    for (name, kernels), found in zip(ways, answer["models"], strict=True):
        seconds = {case: median(samples) for case, samples in zip(cases, found["seconds"], strict=True)}
        told = {"model": name, "engine": "vllm", "type": "bfloat16", "class": found["class"], "kernels": kernels}
        told |= {"records": found["records"], "threads": answer["threads"], "neurons": neurons(models / name)}
        told |= {"bytes": (models / name / "model.safetensors").stat().st_size}
        rows.append({**told, "what": "prefill", "batch": 1, "tokens_per_s": PROMPT / seconds[1, PROMPT, 1]})
        for batch in BATCHES:
            took = seconds[batch, 16, NEW + 1] - seconds[batch, 16, 1]
            rows.append({**told, "what": "decode", "batch": batch, "tokens_per_s": batch * NEW / took})
    return rows
