"""What recovery gave back: a dense model, a pruned one, and the pruned one after `pyprune recover`, side by side.

    python -m bench.model.recover DENSE PRUNED RECOVERED --control TRAINED --text FILE:second --also default

Perplexity alone flatters a model that was tuned on the like of the text, so multiple choice, greedy text and a second
text stand beside it; and so does a control, the dense model after the same training, which shows how much of the gain
is the text's and not recovery's. The JSON goes to bench/results/NAME.json.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from pyprune.base import machine
from pyprune.base.errors import check
from pyprune.base.files import new_file
from pyprune.base.text import load_text, plain_text
from pyprune.base.windows import token_windows
from pyprune.cli.screen import Bars, show
from pyprune.evaluation import generation_deltas, perplexity
from pyprune.evaluation.tasks import continuations, continuations_correct
from pyprune.evaluation.tasks.estimates import Estimate, metric
from pyprune.model.loading import DEMO, load_model, load_tokenizer

RESULTS = Path(__file__).parents[1] / "results"
# Of the dense model's perplexity, on the first text.
LIMIT = 1.15
CHOICES = 4


def prompts_of(text: str, count: int, words: int = 16) -> list[str]:
    """The first words of `count` paragraphs that are at least twice as long, spread evenly over the text."""
    paragraphs = [p.split() for p in text.split("\n") if len(p.split()) >= 2 * words]
    check(len(paragraphs) >= count, "text", f"have {count} paragraphs of {2 * words} words", len(paragraphs))
    return [" ".join(paragraphs[i * len(paragraphs) // count][:words]) for i in range(count)]


def judge(perplexities: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The recovered model against the dense one, and against the dense one trained alike, on the first text.

    `closed` is of every text: the share of what pruning lost, in log perplexity, that came back.
    """
    text = next(iter(perplexities["dense"]))
    losses = [{t: math.log(p) for t, p in perplexities[name].items()} for name in ("pruned", "recovered", "dense")]
    before, after, base = losses
    dense, recovered = (perplexities[name][text] for name in ("dense", "recovered"))
    ratio = recovered / dense
    return {
        "text": text,
        "dense": dense,
        "recovered": recovered,
        "ratio": ratio,
        "limit": LIMIT,
        "met": ratio <= LIMIT,
        "closed": {t: (before[t] - after[t]) / (before[t] - base[t]) for t in base if before[t] > base[t]},
        **({"control": recovered / perplexities["control"][text]} if "control" in perplexities else {}),
    }


def _named(name: str, found: Estimate | None) -> dict[str, Any]:
    assert found is not None
    return {name: found.value, "interval": list(found.interval)}


def main(
    dense: Annotated[str, typer.Argument(help="MODEL, as for the command line.")],
    pruned: Annotated[str, typer.Argument(help="The checkpoint that was recovered.")],
    recovered: Annotated[str, typer.Argument(help="What `pyprune recover` wrote.")],
    control: Annotated[str | None, typer.Option(help="The dense model after the same training.")] = None,
    text: Annotated[str | None, typer.Option(help="Text that recovery has not seen; default: CPython's prose.")] = None,
    also: Annotated[list[str] | None, typer.Option(help="A further text; 'default' is CPython's prose.")] = None,
    tokens: Annotated[int, typer.Option(help="Of each text, for perplexity.")] = 16384,
    window: Annotated[int, typer.Option(help="Tokens in a window.")] = 1024,
    items: Annotated[int, typer.Option(help="Of multiple choice, from each text.")] = 200,
    context: Annotated[int, typer.Option(help="Tokens in front of the choices.")] = 64,
    continuation: Annotated[int, typer.Option(help="Tokens of a choice.")] = 16,
    prompts: Annotated[int, typer.Option(help="To continue greedily, from the first text.")] = 16,
    new_tokens: Annotated[int, typer.Option(help="Of a continuation at most.")] = 48,
    dtype: Annotated[str, typer.Option(help="Of the weights of all of them.")] = "float32",
    device: Annotated[str, typer.Option(help="Where they run.")] = "cpu",
    name: Annotated[str, typer.Option(help="Of the results file.")] = "recover",
) -> None:
    """Measure the models and write what was found."""
    started = time.perf_counter()
    tokenizer = load_tokenizer(dense)
    texts = [load_text(None if path in (None, "default") else path, "second") for path in [text, *(also or [])]]
    windows = {called: token_windows(tokenizer, content, tokens, window) for content, called in texts}
    questions = {
        called: continuations(plain_text(content), tokenizer, items, context, continuation, CHOICES)
        for content, called in texts
    }
    starts = prompts_of(plain_text(texts[0][0]), prompts)
    paths = {"dense": dense, "pruned": pruned, "recovered": recovered}
    if control is not None:
        paths["control"] = control
    loaded = {called: load_model(path, dtype, device) for called, path in paths.items()}
    models: dict[str, dict[str, Any]] = {}
    answers: dict[str, dict[str, Tensor]] = {}
    with Bars() as bars:
        for called, model in loaded.items():
            answers[called] = {t: continuations_correct(model, asked, bars) for t, asked in questions.items()}
            models[called] = {
                "perplexity": {t: perplexity(model, ids, bars).perplexity for t, ids in windows.items()},
            }
            compared = {t: metric(answers["dense"][t], right, 1 / CHOICES) for t, right in answers[called].items()}
            models[called]["choice"] = {
                t: _named("accuracy", found.pruned) | {"items": items, "chance": 1 / CHOICES}
                for t, found in compared.items()
            }
            if called == "dense":
                continue
            deltas = generation_deltas(loaded["dense"], model, tokenizer, starts, new_tokens, bars).to_json()
            models["dense"]["wrote"], models[called]["wrote"] = deltas.pop("dense"), deltas.pop("pruned")
            lost = {t: _named("difference", found.difference) for t, found in compared.items()}
            models[called] |= {"generation": deltas, "choice_lost": lost}
    sizes = {called: sum(p.numel() for p in model.parameters()) for called, model in loaded.items()}
    facts = {
        "machine": machine.facts(),
        "dense": dense if dense == DEMO else Path(dense).name,
        "parameters": sizes,
        "recovery": (getattr(loaded["recovered"].config, "pyprune", None) or {}).get("recovery"),
        "texts": {t: {"tokens": ids.numel(), "window": window} for t, ids in windows.items()},
        "choices": CHOICES,
        "prompts": prompts,
        "models": models,
        "goal": judge({called: found["perplexity"] for called, found in models.items()}),
        "seconds": time.perf_counter() - started,
    }
    with new_file(RESULTS / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    show(facts, True)


if __name__ == "__main__":
    typer.run(main)
