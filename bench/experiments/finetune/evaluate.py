"""A model on a task: what it writes, how likely it finds the references, and how redundant its neurons are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from . import batches
from .intervals import bootstrap
from .metrics import METRICS, perplexity_score
from .recipes import Recipe
from .tasks import Example, Task

_SHOWN = 3


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """At most `count` examples, evenly spread, that have a target."""
    usable = [e for e in examples if e.targets]
    count = min(count, len(usable))
    return [usable[i * len(usable) // count] for i in range(count)]


@torch.no_grad()
def generate(model: Any, tokenizer: Any, examples: Sequence[Example], new_tokens: int, decode: int) -> list[str]:
    """Greedy continuations of all prompts, `decode` at a time with a KV cache, values put back."""
    prompts = batches.encode_prompts(tokenizer, [e.prompt for e in examples])
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    device = next(model.parameters()).device
    texts = [""] * len(prompts)
    for at in range(0, len(order), decode):
        chosen = order[at : at + decode]
        longest = max(len(prompts[i]) for i in chosen)
        ids = torch.full((len(chosen), longest), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):  # padded on the left: what is written comes next
            ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, longest - len(prompts[i]) :] = 1
        written = model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for i, row in zip(chosen, tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True), strict=True):
            texts[i] = examples[i].restore(row.strip())
    return texts


@torch.no_grad()
def likelihoods(
    model: Any, tokenizer: Any, examples: Sequence[Example], targets: int, size: int, ends: bool = True
) -> list[list[float]]:
    """Negative log-likelihood (nats) and number of target tokens, summed over the first `targets` of each example."""
    pairs = [(k, (e.prompt, text)) for k, e in enumerate(examples) for text in e.targets[:targets]]
    rows = batches.encode(tokenizer, [pair for _, pair in pairs], ends)
    device = next(model.parameters()).device
    found = [[0.0, 0.0] for _ in examples]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    for at in range(0, len(order), size):
        chosen = order[at : at + size]
        batch = batches.collate([rows[i] for i in chosen], tokenizer.pad_token_id, device)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        labels = batch["labels"][:, 1:]
        counted = labels >= 0
        losses = torch.zeros(labels.shape, device=device)
        losses[counted] = cross_entropy(logits[:, :-1][counted].float(), labels[counted], reduction="none")
        for i, loss, count in zip(chosen, losses.sum(1).tolist(), counted.sum(1).tolist(), strict=True):
            found[pairs[i][0]][0] += loss
            found[pairs[i][0]][1] += count
    return found


def windows(tokenizer: Any, examples: Sequence[Example], count: int, window: int, ends: bool = True) -> Tensor:
    """`[count, window]` tokens of examples one after the other."""
    pairs = [(e.prompt, e.targets[0]) for e in examples if e.targets]
    stream = [token for ids, _ in batches.encode(tokenizer, pairs, ends) for token in ids]
    count = min(count, len(stream) // window)
    return torch.tensor(stream[: count * window]).view(count, window)


def evaluate(model: Any, tokenizer: Any, task: Task, recipe: Recipe) -> dict[str, Any]:
    """Every metric of the task and the perplexity of the references, each with its interval over examples.

    Returns:
        `metrics` (name -> `value`, `low`, `high`), `samples` (a few texts beside their prompts), `inputs`, `seconds`.
    """
    started = time.perf_counter()
    model.eval()
    examples = spread(task.test, recipe.inputs)
    texts = generate(model, tokenizer, examples, recipe.new_tokens, recipe.decode) if task.metrics else []
    metrics = {}
    for name in task.metrics:
        metric = METRICS[name]
        statistics = [metric.statistics(t, e.references) for t, e in zip(texts, examples, strict=True)]
        metrics[name] = bootstrap(statistics, metric.score)
    size = max(1, recipe.decode // 2)
    statistics = likelihoods(model, tokenizer, examples, recipe.targets, size, task.ends)
    metrics["perplexity"] = bootstrap(statistics, perplexity_score)
    step = max(1, len(examples) // _SHOWN)
    shown = [{"prompt": e.prompt, "text": t} for e, t in list(zip(examples, texts, strict=False))[::step][:_SHOWN]]
    seconds = time.perf_counter() - started
    return {"metrics": metrics, "samples": shown, "inputs": len(examples), "seconds": seconds}
