"""Decode under `generate`: the stock model, and accelerated ones as they are and by the recipe of docs/speed-cpu.md.

    python -m bench.model.compiled [--model demo] [--keep 0.7] [--weights bfloat16,int8,int4] [--out FILE]

All take turns in each round. A sample is the time between two tokens; of each call of `generate` the first two steps,
which wait for the prompt and for what is made once, do not count. Tokens are compared with those of the same model
before the recipe.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from pyprune import accelerate, prune
from pyprune.base import machine
from pyprune.base.clock import interleave, quantiles
from pyprune.base.errors import check, check_choice
from pyprune.base.files import new_file
from pyprune.cli.screen import Bars, out, table
from pyprune.ffn.quantisation import WEIGHTS
from pyprune.model.loading import load_model

DOCS = Path(__file__).parents[2] / "docs" / "speed-cpu.md"
PROMPT = 32


def recipe() -> str:
    """The Python of the documented recipe, without its last line, the call."""
    after = DOCS.read_text(encoding="utf-8").partition("<!-- recipe:compile -->")[2]
    code = after.partition("```py\n")[2].partition("```")[0]
    body, _, call = code.rstrip().rpartition("\n")
    check(call.startswith("ids = model.generate("), "docs/speed-cpu.md", "end its recipe with a call of generate", call)
    return body


def compiled(model: Any) -> Any:
    """`model` after the recipe."""
    exec(recipe(), {"model": model})
    return model


class _Times:
    """A streamer of `generate` that keeps the time of every token."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def put(self, _: Tensor) -> None:
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to show."""


@dataclass
class Run:
    """A model under `generate`; calling it gives seconds of each step, and keeps the tokens."""

    model: Any
    prompt: Tensor
    settings: dict[str, Any]
    tokens: list[int] = field(default_factory=list)

    @torch.no_grad()
    def __call__(self) -> list[float]:
        times = _Times()
        ids = self.model.generate(self.prompt, streamer=times, **self.settings)
        self.tokens = ids[0, self.prompt.shape[1] :].tolist()
        stamps = times.stamps[3:]  # the first is the prompt's own
        return [b - a for a, b in itertools.pairwise(stamps)]


def runs(model: str, dtype: str, keep: float, weights: list[str], new_tokens: int) -> dict[str, Run]:
    """Stock dense, and for each dtype of weights the pruned and accelerated model as it is and compiled."""
    dense = load_model(model, dtype, "cpu")
    narrow = copy.deepcopy(dense)
    if keep < 1:
        prune(narrow, keep, "random", repair=None)
    prompt = torch.randint(dense.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    static = {**settings, "cache_implementation": "static"}
    found = {"dense": Run(dense, prompt, settings)}
    for name in weights:
        fast = accelerate(copy.deepcopy(narrow), weights=None if name == dtype else name)
        # A copy would hold the record twice, and copy it: modules are shared, `forward` is each one's own.
        found[name] = Run(fast, prompt, settings)
        found[f"{name}, compiled"] = Run(compiled(copy.copy(fast)), prompt, static)
    return found


def measure(found: dict[str, Run], repeats: int) -> list[dict[str, Any]]:
    """A row for each run."""
    with Bars() as bars:
        for i, (name, run) in enumerate(found.items()):
            bars(f"first call: {name}", i, len(found))
            run()
        samples = interleave(dict(found), repeats, lambda done, total: bars("timing generate", done, total))
    rows = []
    for name, run in found.items():
        before = found[name.removesuffix(", compiled")]
        step = quantiles(samples[name], 1e3)
        same = sum(a == b for a, b in zip(run.tokens, before.tokens, strict=True))
        rows.append({"what": name, "step_ms": step, "tokens_per_s": 1e3 / step["p50"], "same": same / len(run.tokens)})
    return rows


def main(
    model: Annotated[str, typer.Option(help="MODEL to decode with.")] = "demo",
    dtype: Annotated[str, typer.Option(help="Of the model.")] = "bfloat16",
    keep: Annotated[float, typer.Option(help="Share of the neurons that stay (random ones).")] = 0.7,
    weights: Annotated[str, typer.Option(help=f"Of {', '.join(WEIGHTS)}, by commas.")] = "bfloat16,int8,int4",
    new_tokens: Annotated[int, typer.Option(help="Tokens of a call.")] = 48,
    repeats: Annotated[int, typer.Option(help="Rounds, after one that does not count.")] = 5,
    out_file: Annotated[Path | None, typer.Option("--out", help="A JSON file of the result.")] = None,
) -> None:
    """Measure, print, write."""
    names = weights.split(",")
    for name in names:
        check_choice(name, "weights", WEIGHTS)
    check(0 < keep <= 1, "keep", "be in (0, 1]", keep)
    check(new_tokens >= 4, "new_tokens", "be at least 4, since two steps never count", new_tokens)
    check(repeats >= 1, "repeats", "be at least 1", repeats)
    rows = measure(runs(model, dtype, keep, names, new_tokens), repeats)
    if out_file:
        settings = {"model": model, "dtype": dtype, "keep": keep, "prompt": PROMPT, "new_tokens": new_tokens}
        settings["repeats"] = repeats
        result = {"suite": "compiled", "machine": machine.facts(), "settings": settings, "rows": rows}
        with new_file(out_file) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    cells = []
    for row in rows:
        rate, step = row["tokens_per_s"], row["step_ms"]["p50"]
        ratio = rate / rows[0]["tokens_per_s"]
        cells.append((row["what"], f"{step:.2f} ms", f"{rate:.1f}", f"{ratio:.2f}x", f"{row['same']:.0%}"))
    header = ("what", ">step", ">tokens/s", ">ratio", ">same tokens")
    out.print(table(f"{model}, {keep:.0%} of the neurons, decode under generate, medians", header, cells))


if __name__ == "__main__":
    typer.run(main)
