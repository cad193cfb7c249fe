"""Do scores smoothed over steps choose better neurons where single batches are noisy: small ones, and few of them?

    python -m bench.experiments.ema_scores --data FOLDER            what is missing, then the table
    python -m bench.experiments.ema_scores --data FOLDER --seeds 8  more seeds
    python -m bench.experiments.ema_scores --show                   the table of what is there

The small GPT-2 of `bench.experiments.run_finetune`, trained on E2E NLG, is pruned while it is fine-tuned for few steps
of few texts. Each score is taken unsmoothed, from the last batch alone, and as a moving average; movement and GUM also
as published, by the sum of all steps. Runs of one seed see the same batches in the same order. Judged by the perplexity
of held-out references. Each run is written when it is there, so it can be stopped and started at will.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.experiments.finetune import batches, runner
from bench.experiments.finetune.dense import Dense, learning_rate
from bench.experiments.finetune.evaluate import likelihoods, spread
from bench.experiments.finetune.recipes import Recipe, recipe
from bench.experiments.finetune.run import Work, load_task
from bench.experiments.finetune.settings import DENSE, Setting
from bench.experiments.finetune.tasks import Task
from bench.tables.ema_scores import ema_scores_table
from pyprune.base import machine
from pyprune.base.errors import check
from pyprune.cli.screen import verb
from pyprune.training import TrainingConfig, TrainingPruner, methods, train

OUT = Path(__file__).parents[1] / "results" / "ema-scores.json"
# (texts in a batch, steps), the cheapest first; shares kept; seeds.
PLACES, KEEPS, SEEDS = ((2, 40), (8, 40), (2, 120), (8, 120)), (0.5, 0.3), 3
# At a tenth of the rate for batches of 32: 40 batches of two leave the dense control where it was.
RATE = 1e-4
# Family of scores -> form -> method. All scores of a family differ in how much of the past they hold, and in no more.
FORMS = {
    "Taylor": {"last batch": "smoothed:beta=0", "EMA": "smoothed"},
    "sensitivity": {"last batch": "ema:beta=0", "EMA": "ema", "EMA and uncertainty": "platon"},
    "movement": {"last batch": "movement:beta=0", "EMA": "movement:beta=0.85", "sum": "movement"},
    "GUM": {
        "last batch": "gum:beta=0,similarity_beta=0",
        "EMA": "gum:beta=0.85,similarity_beta=0.85",
        "sum": "gum",
    },
}
CONTROLS = {"random": {"no score": "random"}}


@dataclass(frozen=True)
class Run:
    """One run: the family of scores and its form, where it is pruned, how much, and the seed of everything."""

    family: str
    form: str
    method: str
    keep: float
    batch: int
    steps: int
    seed: int

    @property
    def key(self) -> str:
        return f"{self.batch}x{self.steps}/{self.keep:g}/{self.family}/{self.form}/{self.seed}"


def grid(seeds: int, places: int = len(PLACES)) -> Iterator[Run]:
    """Place by place and seed by seed, so that what is cut short still compares whole rows."""
    for (batch, steps), seed in itertools.product(PLACES[:places], range(seeds)):
        yield Run(DENSE, "trained on", DENSE, 1.0, batch, steps, seed)
        for keep, (family, forms) in itertools.product(KEEPS, (CONTROLS | FORMS).items()):
            for form, method in forms.items():
                yield Run(family, form, method, keep, batch, steps, seed)


class Experiment:
    """Carries out runs from one dense model."""

    def __init__(self, data: Path | None, folder: Path) -> None:
        start = Setting("e2e", "scratch", "cpu", DENSE, 1.0, False, 0)
        self.task: Task = load_task(start, data)
        self.recipe: Recipe = replace(recipe("e2e", "scratch", "cpu"), rate=RATE)
        self.dense: Dense = Work(data, folder).dense(start)
        self.examples = spread(self.task.test, self.recipe.inputs)
        self.model, self.tokenizer = self.dense.start()
        self.rows = batches.encode(self.tokenizer, self.task.pairs)

    def facts(self) -> dict[str, Any]:
        """All that runs depend on besides their own settings."""
        names = ("rate", "warmup", "cooldown", "inputs", "targets")
        return {**{name: getattr(self.recipe, name) for name in names}, "dense": self.dense.facts["recipe"]}

    def perplexity(self, model: Any) -> float:
        """Of the tokens of the held-out references."""
        sums = likelihoods(model.eval(), self.tokenizer, self.examples, self.recipe.targets, 100)
        return math.exp(sum(nll for nll, _ in sums) / sum(count for _, count in sums))

    def __call__(self, run: Run) -> dict[str, Any]:
        started = time.process_time()
        model = copy.deepcopy(self.model)
        data = list(batches.batches(self.rows, run.batch, run.steps, run.seed, self.tokenizer.pad_token_id))
        torch.manual_seed(run.seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.recipe.rate, weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, run.steps, 1.0))
        pruner = None if run.method == DENSE else TrainingPruner(model, self.config(run))
        losses = train(model, data, optimizer, pruner, steps=run.steps, scheduler=scheduler)
        if pruner:
            pruner.finish()
        return {
            **vars(run),
            "perplexity": self.perplexity(model),
            "loss": losses[-1],
            "cpu_seconds": time.process_time() - started,
            "commit": machine.source()["commit"],
        }

    def config(self, run: Run) -> TrainingConfig:
        """What the run asks of `pyprune.training`."""
        warmup, cooldown = (round(share * run.steps) for share in (self.recipe.warmup, self.recipe.cooldown))
        method = methods.parse(run.method)
        return TrainingConfig(
            method=method, keep=run.keep, steps=run.steps, warmup=warmup, cooldown=cooldown, seed=run.seed
        )


@verb
def main(
    data: Annotated[Path | None, typer.Option(help="Folder of the E2E files.")] = None,
    seeds: Annotated[int, typer.Option(help="How many.")] = SEEDS,
    places: Annotated[int, typer.Option(help="Of the four pairs of batch and steps, the first so many.")] = len(PLACES),
    models_folder: Annotated[Path, typer.Option("--models", help="Where the dense model is kept.")] = Path(
        "out/finetune"
    ),
    out_file: Annotated[Path, typer.Option("--out", help="The result.")] = OUT,
    show_only: Annotated[bool, typer.Option("--show", help="Run nothing.")] = False,
) -> None:
    """Run what is missing, and show the table."""
    result = runner.load(out_file)
    if not show_only:
        check(seeds >= 2, "seeds", "be at least 2, or there is no interval", seeds)
        check(1 <= places <= len(PLACES), "places", f"be from 1 to {len(PLACES)}", places)
        runner.quiet()
        experiment = Experiment(data, models_folder)
        old, facts = result.get("setting"), experiment.facts()
        check(old in (None, facts), "out", f"hold runs of the same setting: {facts}", old)
        runs = list(grid(seeds, places))
        missing = [run for run in runs if run.key not in result["runs"]]
        start = {"start": experiment.dense.facts["metrics"]["perplexity"]}
        runner.save(out_file, dense=start, setting=facts, machine=machine.facts())
        typer.echo(f"{len(missing)} of {len(runs)} runs are missing")
        for done, run in enumerate(missing, 1):
            entry = experiment(run)
            runner.save(out_file, runs={run.key: entry})
            typer.echo(f"{done} of {len(missing)}: {run.key}, {entry['perplexity']:.3f}, {entry['cpu_seconds']:.1f} s")
    typer.echo("\n".join(ema_scores_table(runner.load(out_file))))


if __name__ == "__main__":
    typer.run(main)
