"""How two models' generations part: step by step, along the model's own text and along the dense model's.

At step t the dense model has written D[:t], the pruned one P[:t]. Compared with what the dense model predicts after D
are the pruned model's predictions after P (`own`) and after D (`fixed`). `fixed` is the error of one prediction; `own`
has on top what the pruned model's own tokens did to it: the difference is what accumulates. Most of that is that the
texts have parted, which two equal models would show as well. So a third comparison, of both models after P (`local`):
where it is larger than `fixed`, the pruned model has written itself to where it errs more (exposure bias, Ranzato et
al. 2016, arXiv 1511.06732).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import check, is_finite
from ...base.memory import release
from ...base.progress import Progress, quiet
from ...model.decode import check_prompts, decode
from ...model.probe import evaluating
from .. import likeness
from .deviation import probability_deviation, vector_deviation
from .hierarchy import check_same_vocabulary
from .summarise import interval, number
from .trace import Tracer

_ORDERS = (1, 2, 3, 4)
# 1 - cos in the three spaces; and of the probabilities these.
_SPACES = ("embedding", "logits", "probabilities")
_OF_PROBABILITIES = ("cosine", "kl", "total_variation", "top1")
_MEASURES = (*_SPACES, *_OF_PROBABILITIES[1:])

Numbers = dict[str, Any]


@dataclass(frozen=True)
class Drift:
    """Continuations of the same prompts by two models, at one temperature; means come with 95 % over prompts.

    Attributes:
        temperature: 0 for greedy, else of the sampling, whose random numbers both models share.
        prompts, new_tokens: how many; a continuation's tokens at most.
        steps: for each step, from 1, its number and, for `own`, `fixed` and `local`, the mean of each of `_MEASURES`
            over prompts, with `count`, the prompts that had not ended.
        instantaneous: mean of `fixed` over all steps.
        accumulated: mean of `own` minus `fixed` over the last quarter of the steps: above 0, errors add up.
        exposure: mean of `local` minus `fixed` over all steps: above 0, its own text leads it to where it errs more.
        growth: mean of `fixed` over the last quarter of the steps minus the first quarter.
        survival: for each step the share of prompts whose texts are still the same, with its interval.
        median_divergence: the first step at which half of the texts differ; None if it never comes.
        agreement: of the two texts: `overlap1` to `overlap4` (F1 of n-grams), `edit` (Levenshtein over the longer one).
        dense, pruned: what each wrote, see `likeness.habits`.
        repetition_difference: of the share of repeated 4-grams, pruned minus dense.
        examples: the first texts, as token ids: prompt, dense, pruned.
    """

    temperature: float
    prompts: int
    new_tokens: int
    steps: list[Numbers]
    instantaneous: Numbers
    accumulated: Numbers
    exposure: Numbers
    growth: Numbers
    survival: list[Numbers]
    median_divergence: int | None
    agreement: Numbers
    dense: dict[str, float]
    pruned: dict[str, float]
    repetition_difference: Numbers
    examples: list[dict[str, list[int]]]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(vars(self))


def _mean(values: Tensor) -> Numbers:
    """Of `[B]` prompts, NaN where one has no value."""
    there = values[~values.isnan()]
    if not len(there):
        return {"mean": None, "interval": None}
    return {"mean": number(float(there.mean())), "interval": interval(there)}


def _prediction(tracer: Tracer, prompt: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """`[n, D]` and `[n, V]`: what enters the LM head in front of each token of `text`, and the logits."""
    trace = tracer(torch.cat([prompt, text]))
    place = slice(len(prompt) - 1, len(prompt) + len(text) - 1)
    return trace.final[place], trace.logits[place]


def _compare(dense: tuple[Tensor, Tensor], pruned: tuple[Tensor, Tensor], steps: int, temperature: float) -> Tensor:
    """`[len(_MEASURES), steps]`, NaN for steps that one of the two never took."""
    count = min(len(dense[0]), len(pruned[0]))
    (h, z), (h_pruned, z_pruned) = ((a[:count], b[:count]) for a, b in (dense, pruned))
    found = probability_deviation(z, z_pruned, temperature, _OF_PROBABILITIES)
    values = {
        "embedding": vector_deviation(h, h_pruned)["cosine"],
        "logits": vector_deviation(z, z_pruned)["cosine"],
        "probabilities": found["cosine"],
        **{name: found[name] for name in _OF_PROBABILITIES[1:]},
    }
    result = torch.full((len(_MEASURES), steps), torch.nan, dtype=torch.float64)
    result[:, :count] = torch.stack([values[name] for name in _MEASURES]).cpu()
    return result


def _part(values: Tensor, quarter: slice) -> Tensor:
    """`[B]`: mean of each prompt's steps, NaN for a prompt that had ended by then."""
    return values[:, quarter].nanmean(1)


def _by_measure(values: Tensor) -> Numbers:
    """A mean for each of `_MEASURES` from `[B, len(_MEASURES)]`."""
    return {name: _mean(values[:, i]) for i, name in enumerate(_MEASURES)}


def _survival(dense: Sequence[list[int]], pruned: Sequence[list[int]], steps: int) -> list[Numbers]:
    parted = [likeness.divergence(a, b) for a, b in zip(dense, pruned, strict=True)]
    first = torch.tensor([steps + 1 if at is None else at for at in parted])
    return [{"step": t, **_mean((first > t).double())} for t in range(1, steps + 1)]


def _agreement(dense: Sequence[list[int]], pruned: Sequence[list[int]]) -> Numbers:
    pairs = list(zip(dense, pruned, strict=True))
    found = {f"overlap{n}": [likeness.overlap(a, b, n) for a, b in pairs] for n in _ORDERS}
    found["edit"] = [likeness.edit_distance(a, b) for a, b in pairs]
    return {name: _mean(torch.tensor(values, dtype=torch.float64)) for name, values in found.items()}


@torch.no_grad()
def generation_drift(
    dense: nn.Module,
    pruned: nn.Module,
    prompts: Sequence[Tensor],
    new_tokens: int = 48,
    temperature: float = 0.0,
    seed: int = 0,
    examples: int = 3,
    progress: Progress = quiet,
) -> Drift:
    """Let two models continue the same prompts, and compare them at every step.

    Args:
        dense, pruned: causal LMs of Transformers, of one vocabulary and hidden size.
        prompts: token ids, `[P]` each.
        new_tokens: of a continuation at most.
        temperature: 0 decodes greedily (probabilities are then compared at temperature 1); above 0 samples, with common
            random numbers, and compares at that temperature.
        seed: of the random numbers.
        examples: how many texts to give back.
        progress: called as `(stage, done, total)`.

    Raises:
        InputError: another vocabulary or hidden size; no prompt, an empty one, one too long for the context; a count or
            temperature out of range; hidden states or logits that are not finite.

    Source: the two histories as He et al. 2026, arXiv 2603.24652.
    """
    check(is_finite(temperature) and temperature >= 0, "temperature", "be 0 or more, and finite", temperature)
    check_same_vocabulary(dense, pruned)
    for model in (dense, pruned):
        check_prompts(model, prompts, new_tokens)
    at = temperature or 1.0
    traced = Tracer(dense), Tracer(pruned)
    with evaluating(dense), evaluating(pruned):
        texts = [decode(model, prompts, new_tokens, temperature, seed, progress) for model in (dense, pruned)]
        own, fixed, local = [], [], []
        for i, prompt in enumerate(prompts):
            progress("comparing steps", i, len(prompts))
            release()
            reference = _prediction(traced[0], prompt, texts[0][i])
            along = _prediction(traced[1], prompt, texts[0][i])
            fixed.append(_compare(reference, along, new_tokens, at))
            if torch.equal(texts[0][i], texts[1][i]):
                own.append(fixed[-1])
                local.append(fixed[-1])
                continue
            its = _prediction(traced[1], prompt, texts[1][i])
            own.append(_compare(reference, its, new_tokens, at))
            local.append(_compare(_prediction(traced[0], prompt, texts[1][i]), its, new_tokens, at))
    progress("comparing steps", len(prompts), len(prompts))
    tokens = [[text.tolist() for text in side] for side in texts]
    values = {"own": torch.stack(own), "fixed": torch.stack(fixed), "local": torch.stack(local)}
    return _report(values, prompts, tokens, new_tokens, float(temperature), examples)


def _report(
    values: dict[str, Tensor],
    prompts: Sequence[Tensor],
    texts: Sequence[list[list[int]]],
    new_tokens: int,
    temperature: float,
    examples: int,
) -> Drift:
    steps = [
        {
            "step": t + 1,
            **{
                name: {**_by_measure(found[:, :, t]), "count": int((~found[:, 0, t].isnan()).sum())}
                for name, found in values.items()
            },
        }
        for t in range(new_tokens)
    ]
    own, fixed, local = (values[name] for name in ("own", "fixed", "local"))
    quarter = max(1, new_tokens // 4)
    first, last = slice(0, quarter), slice(new_tokens - quarter, new_tokens)
    columns = range(len(_MEASURES))

    def over(found: Tensor, part: slice) -> Tensor:
        return torch.stack([_part(found[:, i], part) for i in columns], dim=1)

    a, b = texts
    survival = _survival(a, b, new_tokens)
    repeated = [torch.tensor([likeness.repetition(t) for t in side], dtype=torch.float64) for side in texts]
    return Drift(
        temperature=temperature,
        prompts=len(prompts),
        new_tokens=new_tokens,
        steps=steps,
        instantaneous=_by_measure(over(fixed, slice(None))),
        accumulated=_by_measure(over(own - fixed, last)),
        exposure=_by_measure(over(local - fixed, slice(None))),
        growth=_by_measure(over(fixed, last) - over(fixed, first)),
        survival=survival,
        median_divergence=next((entry["step"] for entry in survival if entry["mean"] <= 0.5), None),
        agreement=_agreement(a, b),
        dense=likeness.habits(a),
        pruned=likeness.habits(b),
        repetition_difference=_mean(repeated[1] - repeated[0]),
        examples=[
            {"prompt": p.tolist(), "dense": x, "pruned": y}
            for p, x, y in list(zip(prompts, a, b, strict=True))[:examples]
        ],
    )
