"""Perplexity and latency over the share of neurons that runs, all from one nested checkpoint.

    python -m bench.model.nested --text FILE:second --calibrate FILE:first

Makes the checkpoint once (--checkpoint keeps it), and measures every share with the plain prefix and with compensated
rows; latency of all widths and of the dense model of Transformers in turn, in one run. The result, NAME.json in
bench/results, is written after every step: a run that was stopped goes on where it was. Draws NAME.svg beside it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib import rc_context
from matplotlib.figure import Figure

from pyprune import set_width
from pyprune.base import machine
from pyprune.base.clock import Job, interleave, median, quantiles
from pyprune.base.errors import check
from pyprune.base.files import new_file
from pyprune.base.progress import Progress
from pyprune.base.text import load_text
from pyprune.base.windows import token_windows
from pyprune.cli.screen import Bars
from pyprune.evaluation import perplexity
from pyprune.ffn.warming import warmup
from pyprune.model import checkpoint
from pyprune.model.loading import DEMO, load_model, load_tokenizer
from pyprune.pruning import nested
from pyprune.speed.timing import Decode, Prefill

HERE = Path(__file__).parents[1]
RESULTS = HERE / "results"
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
# Of middle brightness, for the background is the reader's: light or dark.
_GREY, _PREFIX, _OWN, _FAST = "#8a8f98", "#c08a2b", "#3d85c6", "#3aa17e"
_STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _GREY),
    "grid.color": _GREY,
    "svg.fonttype": "none",  # text stays text: a tenth of the bytes
    "svg.hashsalt": "pyprune",  # the same names inside the file at every run
}

Result = dict[str, Any]


class Record:
    """A result that is written after every step, and read again by the next run with the same settings."""

    def __init__(self, path: Path, settings: Result) -> None:
        self.path = path
        self.facts: Result = {"settings": settings, "done": {}}
        if path.is_file():
            old = json.loads(path.read_text(encoding="utf-8"))
            if old.get("settings") == settings:
                self.facts = old

    def step(self, name: str, run: Callable[[], Any]) -> Any:
        """What `run` gives, now or in an earlier run; JSON values."""
        done = self.facts["done"]
        if name not in done:
            done[name] = run()
            self.write()
        return done[name]

    def write(self) -> None:
        """Write all facts."""
        with new_file(self.path) as temporary:
            temporary.write_text(json.dumps(self.facts, indent=1) + "\n", encoding="utf-8")


def make(
    model: str, folder: Path, method: str, calibrate: str | None, sizes: tuple[int, int], progress: Progress
) -> None:
    """Write the nested checkpoint with compensated rows for every share below 1, unless it is there."""
    if folder.is_dir():
        checkpoint.verify(folder)
        return
    tokenizer = load_tokenizer(model)
    content, name = load_text(calibrate, "first")
    dense = load_model(model)
    shares = [share for share in SHARES if share < 1]
    batches = token_windows(tokenizer, content, *sizes)
    nested.prune_nested(dense, shares, method, text=batches, progress=progress, provenance={"text": name})
    checkpoint.save(dense, folder, tokenizer)


def switch_ms(model: Any, share: float, compensated: bool) -> float:
    """Median milliseconds to reach a width from the full one."""
    found = []
    for _ in range(5):
        set_width(model, 1.0)
        start = time.perf_counter()
        set_width(model, share, compensated=compensated)
        found.append(1e3 * (time.perf_counter() - start))
    return median(found)


def at_width(model: Any, share: float, job: Job) -> Job:
    """`job`, at a width that is set before its clock starts."""

    def run() -> Sequence[float]:
        set_width(model, share, compensated=False)
        return job()

    return run


def latency(dense: Any, model: Any, settings: Result, progress: Progress) -> Result:
    """Quantiles in milliseconds by name ("dense", or a share), of decode steps and of a prefill, in turn."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = dense.config.vocab_size
    prompt, text = (
        torch.randint(vocabulary, (1, settings[key]), generator=generator)
        for key in ("prompt_tokens", "prefill_tokens")
    )
    for share in SHARES:
        set_width(model, share, compensated=False)
        warmup(model, (1, settings["prompt_tokens"], settings["prefill_tokens"]))
    found: Result = {}
    kinds: tuple[tuple[str, Callable[[Any], Job]], ...] = (
        ("decode_ms", lambda m: Decode(m, prompt, settings["new_tokens"])),
        ("prefill_ms", lambda m: Prefill(m, text)),
    )
    for kind, make_job in kinds:
        jobs: dict[str, Job] = {"dense": make_job(dense)}
        jobs |= {str(share): at_width(model, share, make_job(model)) for share in SHARES}
        stage = f"timing {kind.partition('_')[0]}"
        samples = interleave(jobs, settings["repeats"], lambda done, total, stage=stage: progress(stage, done, total))
        found[kind] = {name: quantiles(times, 1e3) for name, times in samples.items()}
    return found


def measure(record: Record, folder: Path, dense: Any, held_out: torch.Tensor, progress: Progress) -> Result:
    """Everything, step by step."""
    settings = record.facts["settings"]
    model = nested.load(folder, settings["dtype"])
    dense_perplexity = record.step("perplexity dense", lambda: perplexity(dense, held_out, progress).perplexity)

    def quality(share: float, compensated: bool) -> float:
        set_width(model, share, compensated=compensated)
        return perplexity(model, held_out, progress).perplexity

    rows = []
    for share in SHARES:
        own = share < 1
        rows.append(
            {
                "share": share,
                "widths": set_width(model, share, compensated=False),
                "perplexity": record.step(f"perplexity {share}", lambda s=share: quality(s, False)),
                "perplexity_compensated": record.step(f"perplexity {share} own", lambda s=share: quality(s, True))
                if own
                else None,
                "switch_ms": record.step(f"switch {share}", lambda s=share: switch_ms(model, s, False)),
                "switch_compensated_ms": record.step(f"switch {share} own", lambda s=share: switch_ms(model, s, True))
                if own
                else None,
            }
        )
    times = record.step("latency", lambda: latency(dense, model, settings, progress))
    for row in rows:
        row |= {kind: by[str(row["share"])] for kind, by in times.items()}
    dense_row = {"perplexity": dense_perplexity, **{kind: by["dense"] for kind, by in times.items()}}
    return {"dense": dense_row, "rows": rows}


def draw(result: Result, path: Path) -> None:
    """Perplexity and decode latency over the share of neurons, an SVG."""
    rows = result["rows"]
    check(len(rows) > 1, "result", "hold two shares at least", len(rows))
    shares = [row["share"] for row in rows]
    with rc_context(_STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        quality, speed = figure.subplots(1, 2)
        quality.plot(shares, [r["perplexity"] for r in rows], color=_PREFIX, marker="s", label="prefix")
        own = [r["perplexity_compensated"] or r["perplexity"] for r in rows]
        quality.plot(shares, own, color=_OWN, marker="o", label="with compensated down rows")
        quality.axhline(result["dense"]["perplexity"], color=_GREY, linestyle="--", label="dense")
        quality.set_yscale("log")
        quality.set_ylabel("perplexity")
        speed.plot(shares, [r["decode_ms"]["p50"] for r in rows], color=_FAST, marker="o", label="pyprune, set_width")
        speed.axhline(result["dense"]["decode_ms"]["p50"], color=_GREY, linestyle="--", label="dense, torch")
        speed.set_ylabel("milliseconds a token, median")
        speed.set_ylim(bottom=0)
        for axes in (quality, speed):
            axes.set_xlabel("share of neurons that runs")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8, frameon=False)
        figure.suptitle(f"{result['model']} in {result['dtype']}: one checkpoint, every width", fontsize=10)
        with new_file(path) as temporary:
            figure.savefig(temporary, format="svg", transparent=True, metadata={"Date": None})


def main(
    text: Annotated[str | None, typer.Option(help="Evaluated; FILE:second is its second half.")] = None,
    calibrate: Annotated[str | None, typer.Option(help="Calibration text; FILE:first is its first half.")] = None,
    model: Annotated[str, typer.Option(help="MODEL, as for the command line.")] = DEMO,
    folder: Annotated[Path, typer.Option("--checkpoint", help="The nested checkpoint; made if missing.")] = Path(
        "build/nested"
    ),
    method: Annotated[str, typer.Option(help="Importance criterion.")] = "wanda",
    dtype: Annotated[str, typer.Option(help="Of the weights that run.")] = "float32",
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 16384,
    evaluation_tokens: Annotated[int, typer.Option(help="Evaluation tokens.")] = 16384,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    prefill_tokens: Annotated[int, typer.Option(help="Of the prefill that is timed.")] = 512,
    repeats: Annotated[int, typer.Option(help="Recorded rounds.")] = 7,
    name: Annotated[str, typer.Option(help="Of the result and the figure, in --results.")] = "nested",
    results: Annotated[Path, typer.Option(help="Folder of the result.")] = RESULTS,
) -> None:
    """Measure, write the result and draw the figure."""
    timed = {"prompt_tokens": 32, "new_tokens": 16, "prefill_tokens": prefill_tokens, "repeats": repeats}
    settings = {"model": model, "method": method, "dtype": dtype, "window": window, "tokens": tokens, **timed}
    settings |= {"evaluation_tokens": evaluation_tokens, "text": text and Path(text).name, "shares": list(SHARES)}
    settings |= {"calibrate": calibrate and Path(calibrate).name}
    with Bars() as bars:
        make(model, folder, method, calibrate, (tokens, window), bars)
        tokenizer = load_tokenizer(model)
        content, evaluation = load_text(text, "second")
        held_out = token_windows(tokenizer, content, evaluation_tokens, window)
        record = Record(results / f"{name}.json", settings)
        record.facts.setdefault("machine", machine.facts())
        measured = measure(record, folder, load_model(model, dtype), held_out, bars)
    labels = {key: settings[key] for key in ("model", "method", "dtype", "prefill_tokens")}
    record.facts |= {**labels, "evaluation": evaluation, "evaluation_tokens": held_out.numel(), **measured}
    record.write()
    draw(record.facts, results / f"{name}.svg")


if __name__ == "__main__":
    typer.run(main)
