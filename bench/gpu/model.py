"""A whole model's decode step in a CUDA graph: LLaMA-3-8B's shape, random weights; dense, narrow, accelerated."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from bench.gpu.timing import Replay, Timer
from pyprune import accelerate
from pyprune.base.clock import median, quantiles
from pyprune.speed import roofline
from pyprune.speed.timing import ffn_units

LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}
PROMPT, CACHE = 64, 128
ROUNDS, PER_ROUND = 6, 4


def make(device: torch.device, dtype: torch.dtype, sizes: dict[str, Any], width: int) -> Any:
    """A random LLaMA with FFNs of `width` neurons, in eval mode."""
    config = AutoConfig.for_model("llama", **{**sizes, "intermediate_size": width})
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


class Step:
    """The decode step at position PROMPT over a static cache, ready to be replayed; `rewind` first, each time."""

    def __init__(self, model: Any, timer: Timer) -> None:
        self.model, self.timer = model, timer
        self.cache = StaticCache(config=model.config, max_cache_len=CACHE)
        device = timer.device
        prompt = torch.randint(model.config.vocab_size, (1, PROMPT), device=device)
        self.model(input_ids=prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.token = prompt[:, -1:].clone()
        self.position = torch.full((1, 1), PROMPT, device=device)
        self.path, self.reason = "graph", ""
        try:
            self.replay = timer.capture([self._step])
            if 2 * self.replay.calls > CACHE - PROMPT:  # a sample is two replays
                raise RuntimeError(f"{self.replay.calls} steps in one graph would leave the cache")
        except Exception as problem:
            timer.synchronize()
            self.path, self.reason = "eager", " ".join(f"{type(problem).__name__}: {problem}".split())[:400]
            out = self._step()
            self.replay = Replay(self._step, 1, out, out)

    def _step(self) -> torch.Tensor:
        out = self.model(
            input_ids=self.token,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits

    def rewind(self) -> None:
        """Have the cache hold the prompt only: a replay writes behind what it holds, and its end is not checked."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(PROMPT)

    def samples(self, count: int) -> list[float]:
        found = []
        for _ in range(count):
            self.rewind()
            found += self.timer.sample(self.replay, 1)
        return found


def _ffn_replay(model: Any, timer: Timer, x: torch.Tensor) -> Replay:
    """One call of every FFN of the model in turn."""
    units = ffn_units(model)

    def run() -> torch.Tensor:
        for unit in units:
            out = unit.run(x)
        return out

    return timer.capture([run])


def _interleaved(timer: Timer, steps: dict[str, Step], ffns: dict[str, Replay]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in (*steps, *ffns)}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            found[name] += step.samples(PER_ROUND)
        for name, replay in ffns.items():
            found[name] += timer.sample(replay, PER_ROUND)
    return found


def _entry(samples: list[float], step: Step) -> dict[str, Any]:
    spread = quantiles(samples, 1e3)
    why = {"no_graph": step.reason} if step.reason else {}
    return {
        "step_ms": spread["p50"],
        "step_ms_quantiles": spread,
        "tokens_per_s": 1e3 / spread["p50"],
        "samples": len(samples),
        "path": step.path,
        **why,
    }


@torch.no_grad()
def measure(timer: Timer, dtype: torch.dtype, sizes: dict[str, Any], keep: float, say: Any) -> dict[str, Any]:
    """The row of the whole model: step times, the FFNs' share, and the speed-up beside what Amdahl's law allows.

    Args:
        timer: of the device.
        dtype: of the weights.
        sizes: LLAMA or TINY.
        keep: share of neurons that stay.
        say: told what is about to run.
    """
    say("dense")
    dense = make(timer.device, dtype, sizes, sizes["intermediate_size"])
    x = torch.randn(1, 1, sizes["hidden_size"], device=timer.device).to(dtype)
    steps, ffns = {"dense": Step(dense, timer)}, {"dense ffn": _ffn_replay(dense, timer, x)}
    say("narrow")
    narrow = make(timer.device, dtype, sizes, round(keep * sizes["intermediate_size"]))
    steps["narrow"] = Step(narrow, timer)
    first = _interleaved(timer, steps, ffns)
    entries = {"narrow": _entry(first["narrow"], steps["narrow"])}
    del steps["narrow"]  # its graph reads weights that accelerate frees
    say("accelerated")
    accelerate(narrow)
    steps["accelerated"] = Step(narrow, timer)
    ffns["accelerated ffn"] = _ffn_replay(narrow, timer, x)
    second = _interleaved(timer, steps, ffns)
    for name in ("dense", "accelerated"):
        entries[name] = _entry(second[name], steps[name])
    whole, ffn = median(second["dense"]), median(second["dense ffn"])
    share = min(1.0, ffn / whole)
    ratio, ceiling = whole / median(second["accelerated"]), roofline.amdahl(share, 1 / keep)
    return {
        "case": f"whole model keep {keep:g}",
        "layers": sizes["num_hidden_layers"],
        "keep": keep,
        "models": entries,
        "dense_ffn_ms": ffn * 1e3,
        "ffn_ms": median(second["accelerated ffn"]) * 1e3,
        "ffn_share": share,
        "ratio": ratio,
        "ceiling": ceiling,
        "share_of_ceiling": ratio / ceiling,
        "in_graph": all(entry["path"] == "graph" for entry in entries.values()),
    }
