"""The answers of a task among themselves, beside the whole vocabulary at the same position.

Restricted to the answers and renormalised, the probabilities decide an item; whatever moves the rest of the vocabulary
does not count there (He et al. 2026, arXiv 2603.24652).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...base.progress import Progress, quiet
from ..analysis.deviation import probability_deviation
from ..intervals import bootstrap
from .encoding import Row, batches, logits_at

# Of `analysis.deviation.PROBABILITY`, those that compare two distributions of any size.
DEVIATIONS = ("cosine", "kl", "kl_reverse", "js", "total_variation", "top1")
ROWS_AT_ONCE = 8
Values = dict[str, Tensor]


def deviations(dense: Tensor, pruned: Tensor) -> Tensor:
    """`[len(DEVIATIONS), B]` float64 between the softmax of the rows of `[B, K]` and `[B, K]`."""
    return torch.stack(list(probability_deviation(dense, pruned, names=DEVIATIONS).values()))


def at_last(dense: Any, pruned: Any, rows: Sequence[Row], progress: Progress = quiet) -> Values:
    """For each of `DEVIATIONS`, `[N]` float64: of the whole vocabulary, behind the last token of each row.

    Args:
        dense, pruned: causal LMs of Transformers, in eval mode, of one vocabulary.
        rows: token ids, none empty.
        progress: called as `(stage, done, total)`.

    Raises:
        InputError: logits that are not finite.
    """
    table = torch.zeros(len(DEVIATIONS), len(rows), dtype=torch.float64)
    done = 0
    for numbers in batches(rows, ROWS_AT_ONCE):
        progress("answer positions", done, len(rows))
        some = [rows[i] for i in numbers]
        places = [[len(row) - 1] for row in some]
        both = [torch.cat(logits_at(model, some, places)) for model in (dense, pruned)]
        table[:, numbers] = deviations(both[0], both[1])
        done += len(numbers)
    progress("answer positions", len(rows), len(rows))
    return dict(zip(DEVIATIONS, table, strict=True))


def to_json(restricted: Values, full: Values, seed: int = 0) -> dict[str, Any]:
    """Means over items with 95 % intervals, by space; a space without values is left out."""

    def entry(values: Tensor) -> dict[str, Any]:
        return {"mean": float(values.mean()), "interval": list(bootstrap(values, seed))}

    spaces = {"restricted": restricted, "full": full}
    return {space: {name: entry(v) for name, v in values.items()} for space, values in spaces.items() if values}
