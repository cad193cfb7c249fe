"""A text VAE whose Transformer encoder loses FFN neurons while it trains, by scores smoothed over the steps.

    python examples/ema_pruned_vae.py --out out/vae.json

Trains a dense model, prunes copies of it on the cubic schedule, cuts them, and trains on. Says what each way to choose
neurons costs in ELBO, reconstruction and KL on text that was held out: the exponential moving average (EMA) of two
scores, the same scores of the last batch alone, the EMA in one shot, and chance; beside a dense model that trains as
long. The decoder is never touched. Then the encoder's speed. Under 5 minutes on 2 cores; everything is seeded.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from vae import data, report
from vae.experiment import Plan, run
from vae.model import Loss, Sizes
from vae.speed import encoder_speed

from pyprune.base import machine
from pyprune.base.errors import check
from pyprune.base.files import new_file
from pyprune.cli.screen import Bars, show, verb


@verb
def main(
    text: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 text or .jsonl: its first half trains, its second measures. Default: CPython's prose."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    steps: Annotated[int, typer.Option(help="Of dense training.")] = Plan.steps,
    prune_steps: Annotated[int, typer.Option(help="From the dense model to the cut.")] = Plan.prune_steps,
    recover_steps: Annotated[int, typer.Option(help="After the cut.")] = Plan.recover_steps,
    keep: Annotated[float, typer.Option(help="Share of the encoder's FFN neurons that stays.")] = Plan.keep,
    beta: Annotated[float, typer.Option(help="Weight of the past in the moving average.")] = Plan.beta,
    seeds: Annotated[int, typer.Option(help="Runs; time grows with them.")] = Plan.seeds,
    batch: Annotated[int, typer.Option(help="Strings a step.")] = Plan.batch,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = Plan.rate,
    length: Annotated[int, typer.Option(help="Bytes of a string.")] = Sizes.length,
    hidden: Annotated[int, typer.Option(help="Of the encoder.")] = Sizes.hidden,
    width: Annotated[int, typer.Option(help="Neurons of each of its FFNs.")] = Sizes.width,
    layers: Annotated[int, typer.Option(help="Of the encoder.")] = Sizes.layers,
    latent: Annotated[int, typer.Option(help="Dimensions of z.")] = Sizes.latent,
    word_dropout: Annotated[float, typer.Option(help="Share of bytes hidden from the decoder.")] = Loss.word_dropout,
    free_bits: Annotated[float, typer.Option(help="Nats of a latent dimension that cost nothing.")] = Loss.free_bits,
    held_out: Annotated[int, typer.Option(help="Strings to measure on, at most.")] = 768,
    rounds: Annotated[int, typer.Option(help="Of the speed measurement; 0 for none.")] = 15,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train, prune, recover, measure; print the tables and write the JSON."""
    started = time.perf_counter()
    plan = Plan(
        steps=steps,
        prune_steps=prune_steps,
        recover_steps=recover_steps,
        keep=keep,
        beta=beta,
        batch=batch,
        rate=rate,
        seeds=seeds,
        sizes=Sizes(length=length, hidden=hidden, width=width, layers=layers, latent=latent),
        loss=Loss(word_dropout, free_bits),
    )
    check(rounds >= 0, "rounds", "be at least 0", rounds)
    check(out is None or not out.is_dir(), "out", "be a file", str(out))
    facts = machine.facts()
    strings = data.load(text, length, held_out)
    with Bars() as bars:
        runs = [
            run(strings, plan, seed, lambda done, total, seed=seed: bars(f"trainings, seed {seed}", done, total))  # type: ignore[misc]
            for seed in range(seeds)
        ]
    found = report.result(runs, plan, strings)
    if rounds:
        found["speed"] = encoder_speed(runs[-1].model.encoder, runs[-1].compact.encoder, length, rounds=rounds)
    found |= {"machine": facts, "seconds": time.perf_counter() - started}
    if out is not None:
        with new_file(out) as temporary:
            temporary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    show(found, as_json, *report.tables(found), *([f"wrote {out}"] if out is not None else []))


if __name__ == "__main__":
    typer.run(main)
