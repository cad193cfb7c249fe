"""Widths by latency: the promised speed-up of the whole model beside the measured one, for a few targets.

    python -m bench.model.latency_aware --text FILE
    python -m bench.model.latency_aware --workload prefill --batch 512 --dtype bfloat16 --name latency-aware-prefill

One table of latencies and one set of curves serve all targets. Then all models run in turn: the plain dense one, the
accelerated dense one (the baseline of the promise), and the accelerated pruned one of each target. The result goes to
bench/results/NAME.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench.tables.latency_aware import HEADER, latency_aware_rows, latency_aware_summary
from pyprune import KeepIndex, Mask, accelerate, prune
from pyprune.base import machine
from pyprune.base.clock import interleave, median, quantiles
from pyprune.base.errors import check
from pyprune.base.files import new_file
from pyprune.base.text import load_text
from pyprune.base.windows import token_windows
from pyprune.cli.screen import Bars, show, table, verb
from pyprune.evaluation import perplexity
from pyprune.model import families
from pyprune.model.families import find_ffns
from pyprune.model.loading import DEMO, load_model, load_tokenizer
from pyprune.pruning import prune as pruning
from pyprune.pruning.allocation import by_latency
from pyprune.speed import latency
from pyprune.speed.latency import LatencyTable, Workload

RESULTS = Path(__file__).parents[1] / "results"
_PLAIN, _DENSE = "plain", "dense"


def mask_of(model: Any, scores: Sequence[Tensor], widths: Sequence[int]) -> Mask:
    """The best `widths` neurons of each layer by `scores`."""
    keeps = tuple(KeepIndex.from_scores(s, w) for s, w in zip(scores, widths, strict=True))
    return Mask(keeps, families.fingerprint(model, find_ffns(model)))


def by_round(samples: Sequence[float], rounds: int) -> list[float]:
    """The median of each recorded round."""
    share = len(samples) // rounds
    return [median(samples[i * share : (i + 1) * share]) for i in range(rounds)]


def compare(found: dict[str, list[float]], rounds: int, promised: dict[str, float]) -> dict[str, dict[str, Any]]:
    """For each target's model its step beside the dense ones', by medians; the spread is of rounds against rounds.

    Args:
        found: samples in seconds: `plain`, `dense`, and one entry a target.
        rounds: in which they were taken in turn.
        promised: speed-up over `dense`, by target.
    """
    dense = by_round(found[_DENSE], rounds)
    entries = {}
    for name, promise in promised.items():
        own = by_round(found[name], rounds)
        measured = median(found[_DENSE]) / median(found[name])
        entries[name] = {
            "promised": promise,
            "measured": measured,
            "measured_spread": quantiles([a / b for a, b in zip(dense, own, strict=True)]),
            "error": measured / promise - 1,
            "over_plain": median(found[_PLAIN]) / median(found[name]),
            "step_ms": quantiles(found[name], 1e3),
        }
    return entries


@verb
def main(
    text: Annotated[str | None, typer.Option(help="Its halves calibrate and evaluate; default: CPython's.")] = None,
    model: Annotated[str, typer.Option(help="MODEL, as for the command line.")] = DEMO,
    targets: Annotated[str, typer.Option(help="Speed-ups, with commas between.")] = "1.1,1.2,1.3",
    method: Annotated[str, typer.Option(help="Criterion.")] = "wanda",
    dtype: Annotated[str, typer.Option(help="Of the model.")] = "float32",
    weights: Annotated[str | None, typer.Option(help="FFN weights are kept in this dtype when accelerated.")] = None,
    workload: Annotated[str, typer.Option(help="decode or prefill.")] = "decode",
    batch: Annotated[int, typer.Option(help="Sequences decoded at once; tokens of a prefill.")] = 1,
    multiple: Annotated[int, typer.Option(help="Widths are multiples of this.")] = 64,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 16384,
    evaluation_tokens: Annotated[int, typer.Option(help="Evaluation tokens.")] = 16384,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    repeats: Annotated[int, typer.Option(help="Recorded rounds of the table.")] = 7,
    rounds: Annotated[int, typer.Option(help="Recorded rounds of the comparison.")] = 15,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    name: Annotated[str, typer.Option(help="Of the results file.")] = "latency-aware",
) -> None:
    """Measure the table and write it."""
    started = time.perf_counter()
    wanted = {f"{float(t):g}": float(t) for t in targets.split(",")}
    check(len(wanted) > 0 and min(wanted.values()) >= 1, "targets", "be speed-ups of at least 1", targets)
    load = Workload(workload, batch, weights=weights)
    tokenizer = load_tokenizer(model)
    first, first_name = load_text(f"{text}:first" if text else None, "first")
    second, second_name = load_text(f"{text}:second" if text else None, "second")
    calibration = token_windows(tokenizer, first, tokens, window)
    held_out = token_windows(tokenizer, second, evaluation_tokens, window)
    facts: dict[str, Any] = {
        "machine": machine.facts(),
        "model": "SmolLM2-135M-Instruct" if model == DEMO else Path(model).name,
        "dtype": dtype,
        "method": method,
        "calibration": first_name,
        "tokens": calibration.numel(),
        "evaluation": second_name,
        "evaluation_tokens": held_out.numel(),
        "window": window,
        "rounds": rounds,
    }
    with Bars() as bars:
        plain = load_model(model, dtype, device)
        sizes = [ffn.intermediate_size for ffn in find_ffns(plain)]
        latencies = latency.measure(plain, range(multiple, max(sizes), multiple), load, repeats, bars)
        facts |= {"table": latencies.to_json(), "largest": latencies.largest()}
        chosen, models, rows = {}, {}, {}
        curves = pruning.curves(plain, method, multiple=multiple, text=calibration, progress=bars)
        scores = pruning.score(plain, method, text=calibration, progress=bars)
        for key, target in wanted.items():
            chosen[key] = by_latency.choose_widths(curves, latencies, target)
        facts |= {"curves": curves.kind, "dense_perplexity": perplexity(plain, held_out, bars).perplexity}
        for key, widths in chosen.items():
            pruned = load_model(model, dtype, device)
            report = prune(pruned, text=calibration, mask=mask_of(pruned, scores, widths), progress=bars)
            rows[key] = {
                "target": wanted[key],
                "widths": list(widths),
                "keep": sum(widths) / sum(sizes),
                "perplexity": perplexity(pruned, held_out, bars).perplexity,
                "prune_seconds": report.seconds,
            }
            models[key] = accelerate(pruned, weights=weights)
        models = {_PLAIN: plain, _DENSE: accelerate(load_model(model, dtype, device), weights=weights), **models}
        with torch.no_grad():
            jobs = {key: load.job(one) for key, one in models.items()}
            found = interleave(jobs, rounds, lambda done, total: bars("promised against measured", done, total))
    facts["rows"] = [rows[key] | entry for key, entry in compare(found, rounds, _promises(latencies, chosen)).items()]
    facts |= {"plain_ms": quantiles(found[_PLAIN], 1e3), "dense_ms": quantiles(found[_DENSE], 1e3)}
    facts["seconds"] = time.perf_counter() - started
    with new_file(RESULTS / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    show(facts, False, table(latency_aware_summary(facts), HEADER, latency_aware_rows(facts)))


def _promises(latencies: LatencyTable, chosen: dict[str, list[int]]) -> dict[str, float]:
    return {key: latencies.speedup(widths) for key, widths in chosen.items()}


if __name__ == "__main__":
    typer.run(main)
