"""Two attempts at pruning for generation: calibrating on own text, and choosing by the KL of next-token probabilities.

    python -m bench.experiments.generation_aware --data DATA [--minutes 60] [--arm own --arm fisher] [--samples 1]

SmolLM2 at 30 % of its neurons removed, without recovery. `ARMS` differ in one thing each; every sample calibrates on
16,384 other tokens. What is measured: answers that are written (the generation task that ships), 4-grams that greedy
text repeats, perplexity on six domains, and the KL to the dense model on text that it wrote. Prose at other shares is
the line on which an arm is compared "at equal perplexity". The result, bench/results/findings-generation.json, is
written after every row: a run that was stopped goes on. docs/findings.md has the answers.
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from bench import by_line
from bench.experiments.findings import RESULTS, STRATEGY, command, write_document
from pyprune import prune
from pyprune.base import machine
from pyprune.base.errors import check, check_choice
from pyprune.base.files import new_file
from pyprune.base.text import load_text
from pyprune.base.windows import cut, token_windows
from pyprune.cli.screen import Bars, err, verb
from pyprune.evaluation.diagnose import prompts_of
from pyprune.evaluation.domains import read_material
from pyprune.evaluation.domains.suite import domain_windows
from pyprune.evaluation.domains.writing import write
from pyprune.evaluation.likeness import repetition
from pyprune.evaluation.perplexity import window_losses
from pyprune.evaluation.tasks.generation import generation_scores
from pyprune.evaluation.tasks.records import read_records, shipped
from pyprune.model.decode import decode
from pyprune.model.loading import DEMO, load_model, load_tokenizer
from pyprune.pruning.mixture import mix

WINDOW, TOKENS, SAMPLES = 512, 16384, 3
DOMAIN_TOKENS, JUDGED, NEW_TOKENS = 1536, 1536, 96
PROMPT, CONTINUED = 64, 192  # tokens of prose in front of an own continuation, and of that
PLAIN = "least-squares"
Facts = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One way to prune: what calibrates it, and how."""

    text: str
    method: str = "wanda"
    repair: str = PLAIN
    allocation: str = "uniform"
    keep: float = 0.7


# `fisher` is the mean square of d NLL / d gate. On text that the model sampled itself that is the curvature of the KL
# to its own probabilities, the Fisher information; and the loss that `widths` looks at is that KL and a constant. Of
# `own`, `target`, `ridge` and both the table takes the one with the least KL on own text that no fit has read, and the
# one with the least error of the last hidden state there.
ARMS = {
    "prose": Arm("prose"),
    "own": Arm("own"),
    "prose, 20 %": Arm("prose", keep=0.8),
    "fisher": Arm("own", "fisher"),
    "target": Arm("own", repair=f"{PLAIN}:target=0.5"),
    "ridge": Arm("own", repair=f"{PLAIN}:damping=0.1"),
    "ridge, target": Arm("own", repair=f"{PLAIN}:damping=0.1,target=0.5"),
    "continued": Arm("continued"),
    "half own": Arm("half own"),
    "prose, 40 %": Arm("prose", keep=0.6),
    "widths": Arm("own", allocation="sensitivity"),
}


def divergence(dense: Any, pruned: Any, windows: Tensor) -> tuple[list[float], list[float]]:
    """Of each window of `[N, W]` token ids: the mean KL of dense's next-token probabilities from pruned's, in nats, and
    the squared error of the hidden state in front of the LM head over its square.
    """
    kl, hidden = [], []
    with torch.no_grad():
        for ids in windows:
            (a, x), (b, y) = (_seen(model, ids) for model in (dense, pruned))
            kl.append(float(F.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="batchmean")))
            hidden.append(float((x - y).square().sum() / x.square().sum()))
    return kl, hidden


def _seen(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """`[W, V]` logits, and `[W, D]` hidden states in front of them, both float32."""
    hidden = model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
    return model.lm_head(hidden).float(), hidden.float()


class Bench:
    """The dense model, all texts and all measures."""

    def __init__(self, data: str, progress: Any) -> None:
        self.progress = progress
        self.tokenizer = load_tokenizer(DEMO)
        self.dense = load_model(DEMO)
        self.quick = copy.deepcopy(self.dense).bfloat16()  # what measures, and writes
        material = read_material(data, items=1)
        self.domains = domain_windows(self.tokenizer, material.domains, DOMAIN_TOKENS, WINDOW)
        self.records: Any = read_records(shipped("generation"))
        halves = [load_text(f"{data}/wikitext-2/valid.txt:{part}", part)[0] for part in ("first", "second")]
        self.prose = self._parts(token_windows(self.tokenizer, halves[0], SAMPLES * TOKENS, WINDOW))
        judged = token_windows(self.tokenizer, halves[1], 4 * JUDGED, 256)
        self.starts = prompts_of(judged, 32, 32)
        self.judged = self._continued(judged.flatten(), JUDGED, seed=SAMPLES)

    @staticmethod
    def _parts(windows: Tensor) -> list[Tensor]:
        return list(windows.split(TOKENS // WINDOW))

    @cached_property
    def own(self) -> list[Tensor]:
        """What the dense model writes from the start of a text: one part a sample, and one that chooses."""
        pool = mix({"self:plain": 1.0}, self.dense, self.tokenizer, (SAMPLES + 1) * TOKENS, WINDOW)
        return self._parts(pool.ids)

    def _continued(self, stream: Tensor, tokens: int, seed: int) -> Tensor:
        """Stretches of a text, each continued by the dense model at temperature 1."""
        count = tokens // (PROMPT + CONTINUED)
        rows = prompts_of(stream[None], count, PROMPT)
        found = decode(self.quick, rows, CONTINUED, 1.0, seed, self.progress)
        flat = torch.cat([part for pair in zip(rows, found, strict=True) for part in pair])
        return cut(flat.tolist(), WINDOW)

    def text(self, name: str, sample: int) -> Tensor:
        """`[N, WINDOW]` calibration tokens."""
        if name == "continued":
            return self._continued(self.prose[sample].flatten(), TOKENS, sample)
        if name == "half own":
            pairs = zip(self.prose[sample][::2], self.own[sample][::2], strict=True)
            return torch.stack([window for pair in pairs for window in pair])
        return {"prose": self.prose, "own": self.own}[name][sample]

    def prune(self, arm: Arm, sample: int) -> tuple[Any, Facts]:
        """A pruned model in bfloat16, and what was done."""
        model, text = load_model(DEMO), self.text(arm.text, sample)
        report = prune(
            model,
            arm.keep,
            arm.method,
            allocation=f"{arm.allocation}:multiple=16",
            repair=arm.repair,
            text=text,
            precision="auto",
            progress=self.progress,
        )
        return model.bfloat16(), {"kept": report.mask.keep, "tokens": text.numel()}

    def measure(self, model: Any) -> Facts:
        """Every measure of one model, each by item: prompt, window or question."""
        answers = generation_scores(model, self.tokenizer, self.records, progress=self.progress)
        chat = write(model, self.tokenizer, NEW_TOKENS, progress=self.progress)
        stretches = decode(model, self.starts, NEW_TOKENS, progress=self.progress, padded=True)
        losses = {name: window_losses(model, ids) / (ids.shape[1] - 1) for name, ids in self.domains.items()}
        kl, hidden = divergence(self.quick, model, self.judged)
        chosen = divergence(self.quick, model, self.own[SAMPLES][: JUDGED // WINDOW])
        return {
            "answers": {name: answers[name].tolist() for name in ("exact", "contains")},
            "repeated": {"chat": list(chat.repetition), "prose": [repetition(row.tolist()) for row in stretches]},
            "losses": {name: loss.tolist() for name, loss in losses.items()},
            "kl": kl,
            "hidden": hidden,
            "chosen_by": dict(zip(("kl", "hidden"), chosen, strict=True)),
        }


@verb
def main(
    data: Annotated[str, typer.Option(help="A folder as for `eval --suite --data`.")],
    arms: Annotated[list[str] | None, typer.Option("--arm", help=f"Of {', '.join(ARMS)}; default: all.")] = None,
    samples: Annotated[int | None, typer.Option(help="Of the calibration text; default: all three.")] = None,
    minutes: Annotated[float, typer.Option(help="Start no row later than this.")] = float("inf"),
) -> None:
    """Prune by every arm, measure, and write the document again."""
    for name in arms or ():
        check_choice(name, "arm", tuple(ARMS))
    samples = SAMPLES if samples is None else samples
    check(0 < samples <= SAMPLES, "samples", f"lie in [1, {SAMPLES}]", samples)
    started, path = time.perf_counter(), RESULTS / STRATEGY
    settings = {
        "model": "SmolLM2-135M-Instruct",
        "window": WINDOW,
        "tokens": TOKENS,
        "domain_tokens": DOMAIN_TOKENS,
        "new_tokens": NEW_TOKENS,
        "arms": {name: vars(arm) for name, arm in ARMS.items()},
    }
    new = {"settings": settings, "command": command("generation_aware"), "machine": machine.facts(), "rows": {}}
    facts: Facts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else new
    check(facts["settings"] == settings, "settings", f"be those of {path.name}", settings)
    with Bars() as bars:
        bench = Bench(data, bars)
        work = [("dense", 0), *((name, sample) for sample in range(samples) for name in arms or ARMS)]
        for name, sample in work:
            key = f"{name} {sample}"
            if key in facts["rows"] or time.perf_counter() - started > 60 * minutes:
                continue
            err.print(key)
            begun = time.perf_counter()
            model, made = (bench.quick, {}) if name == "dense" else bench.prune(ARMS[name], sample)
            row = made | bench.measure(model)
            seconds = time.perf_counter() - begun
            facts["rows"][key] = {"arm": name, "sample": sample, **row, "seconds": seconds}
            with new_file(path) as temporary:
                temporary.write_text(by_line.dumps(facts, ("rows",)), encoding="utf-8")
    write_document()


if __name__ == "__main__":
    typer.run(main)
