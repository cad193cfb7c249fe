"""Retrieval: is the document that answers a query the nearest to it, in the space of the model's hidden states?

A text's embedding is the mean over its tokens of the hidden state that enters the LM head, or of one that leaves a
layer. Of the latter each token's is divided by its norm, as the norm in front of the next sublayer does: the first
token's may be hundreds of times longer than the others' (Sun et al. 2024, arXiv 2402.17762), and the mean would be that
token. The mean of all texts of a side is taken off before cosines: hidden states of language models share a few large
components, which make every cosine nearly 1 (Mu and Viswanath 2018, arXiv 1702.01417; Ethayarajh 2019, arXiv
1909.00512).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import check
from ...base.progress import Progress, quiet
from ...model.families import decoder_layers
from .encoding import batches, check_rows, padded, prompt_ids
from .records import RetrievalRecord

METRICS = ("accuracy_at_1", "mrr")
_ROWS_AT_ONCE = 16


class _Stop(Exception):  # noqa: N818 - not an error: it ends a forward pass whose rest nobody needs
    pass


@contextmanager
def _caught(model: Any, layers: Sequence[int | None]) -> Iterator[dict[int | None, Tensor]]:
    """Inside the block, the dict receives the states that leave these layers, and those that enter the LM head."""
    found: dict[int | None, Tensor] = {}

    def take(layer: int | None, value: Any) -> None:
        found[layer] = value[0] if isinstance(value, tuple) else value
        if len(found) == len(set(layers)):
            raise _Stop

    def leaving(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: take(layer, output)

    numbers = {layer for layer in layers if layer is not None}
    modules: Sequence[nn.Module] = list(decoder_layers(model)[1]) if numbers else []
    for layer in numbers:
        check(0 <= layer < len(modules), "layer", f"be from 0 to {len(modules) - 1}, or None for the last state", layer)
    head = model.get_output_embeddings()
    check(isinstance(head, nn.Module), "model", "have an LM head", type(model).__name__)
    handles = [modules[layer].register_forward_hook(leaving(layer)) for layer in numbers]
    if None in layers:
        handles.append(head.register_forward_pre_hook(lambda module, args: take(None, args[0])))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def embeddings(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    layers: Sequence[int | None] = (None,),
    progress: Progress = quiet,
) -> Tensor:
    """`[len(layers), N, D]` float64: for each text the mean over its tokens of hidden states.

    Args:
        model: a causal LM of Transformers, in eval mode.
        tokenizer: its tokenizer.
        texts: none empty.
        layers: numbers of decoder layers, from 0, for the states that leave them, each divided by its norm; None for
            the one that enters the LM head, as it is. One pass serves all.
        progress: called as `(stage, done, total)`.

    Raises:
        InputError: no text, one longer than the model's context, a layer that the model does not have, or hidden states
            that are not finite.
    """
    check(bool(texts), "texts", "be at least one", len(texts))
    check(bool(layers), "layers", "be at least one", list(layers))
    rows = [prompt_ids(tokenizer, text) for text in texts]
    empty = [text for text, row in zip(texts, rows, strict=True) if not row]
    check(not empty, "texts", "have a token each", empty[:1])
    check_rows(model, rows, "texts")
    device = next(model.parameters()).device
    found: dict[int, Tensor] = {}
    for numbers in batches(rows, _ROWS_AT_ONCE):
        progress("embedding", len(found), len(rows))
        ids, mask = (t.to(device) for t in padded([rows[i] for i in numbers]))
        with _caught(model, layers) as states, suppress(_Stop):
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        means = torch.stack([_mean(states[layer], mask, layer is not None) for layer in layers], 1).cpu()
        check(bool(means.isfinite().all()), "model", "give finite hidden states on every text", "NaN or infinity")
        found.update(zip(numbers, means, strict=True))
    progress("embedding", len(rows), len(rows))
    return torch.stack([found[i] for i in range(len(rows))], 1)


def _mean(hidden: Tensor, mask: Tensor, unit: bool) -> Tensor:
    """`[B, D]` float64: the mean of `[B, L, D]` where `mask` `[B, L]` is 1, of unit vectors if `unit`."""
    hidden = nn.functional.normalize(hidden.double(), dim=-1) if unit else hidden.double()
    weights = mask[..., None].double()
    # Chosen and not only weighted: 0 times what stands at a filled place is 0 only where that is a number.
    return torch.where(weights > 0, hidden, 0.0).sum(1) / weights.sum(1)


def ranks(queries: Tensor, documents: Tensor, centred: bool = True) -> Tensor:
    """`[N]` int64, from 1: how many documents are at least as near to a query as its own is, itself included.

    Documents that tie with the right one count as before it: a model to which all texts are the same finds none.

    Args:
        queries, documents: `[N, D]`; query i belongs to document i.
        centred: take the mean of the queries off each, and that of the documents.

    Raises:
        InputError: shapes differ, or less than two documents.
    """
    check(queries.shape == documents.shape, "documents", f"be {tuple(queries.shape)}", tuple(documents.shape))
    check(len(queries) >= 2, "documents", "be at least 2", len(queries))
    if centred:
        queries, documents = queries - queries.mean(0), documents - documents.mean(0)
    unit = [nn.functional.normalize(x.double(), dim=1) for x in (queries, documents)]
    # Rounded, so that equal texts tie, whatever the order of summation.
    cosine = (unit[0] @ unit[1].T).round(decimals=10)
    return (cosine >= cosine.diagonal()[:, None]).sum(1)


def retrieval_scores(
    model: Any,
    tokenizer: Any,
    records: Sequence[RetrievalRecord],
    layers: Sequence[int | None] = (None,),
    centred: bool = True,
    progress: Progress = quiet,
) -> list[dict[str, Tensor]]:
    """For each layer, each of `METRICS`, `[N]` float64: 1 where the right document is the nearest; one over its rank.

    Args:
        model, tokenizer, layers, progress: see `embeddings`.
        records: two or more; every query is held against the documents of all of them.
        centred: see `ranks`.

    Raises:
        InputError: see `embeddings` and `ranks`.
    """
    check(len(records) >= 2, "records", "be at least 2, for a choice of documents", len(records))
    texts = [*(record.query for record in records), *(record.document for record in records)]
    results = []
    for vectors in embeddings(model, tokenizer, texts, layers, progress):
        queries, documents = vectors.chunk(2)
        found = ranks(queries, documents, centred).double()
        results.append({"accuracy_at_1": (found == 1).double(), "mrr": 1 / found})
    return results


def chances(count: int) -> dict[str, float]:
    """What guessing gives for each of `METRICS` among `count` documents."""
    return {"accuracy_at_1": 1 / count, "mrr": sum(1 / rank for rank in range(1, count + 1)) / count}


def pairs_from_text(text: str, count: int = 60, least_words: int = 40, seed: int = 0) -> tuple[RetrievalRecord, ...]:
    """Queries and documents without labels: the first and the second half of paragraphs of a text.

    Args:
        text: any prose; paragraphs are parted by blank lines.
        count: how many pairs.
        least_words: of a paragraph that is used, both halves together.
        seed: of the choice of paragraphs.

    Raises:
        InputError: counts too small, or a text with fewer such paragraphs that differ.
    """
    check(count >= 2, "count", "be at least 2", count)
    check(least_words >= 2, "least_words", "be at least 2", least_words)
    paragraphs = [part.split() for part in re.split(r"\n\s*\n", text)]
    unique = dict.fromkeys(" ".join(p) for p in paragraphs if len(p) >= least_words)
    long = [p.split() for p in unique]
    check(len(long) >= count, "text", f"have {count} paragraphs of at least {least_words} words", len(long))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(long), generator=generator)[:count].sort().values.tolist()
    halves = [(long[i][: len(long[i]) // 2], long[i][len(long[i]) // 2 :]) for i in drawn]
    return tuple(RetrievalRecord(" ".join(a), " ".join(b)) for a, b in halves)
