"""The tables of what is registered: criteria, allocations, repairs, ways to prune while training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.tables.readme import markdown
from pyprune.base.options import Option
from pyprune.pruning import importance
from pyprune.pruning.allocation import ALLOCATIONS
from pyprune.pruning.repair import REPAIRS
from pyprune.training.methods import METHODS


def _options(kinds: Iterable[type[Option]]) -> list[str]:
    """A line for each option: its class, the name and keys of its short form, what it does, the paper."""
    cells = [
        [
            f"`{kind.__name__}`",
            f"`{kind.NAME}`",
            ", ".join(kind.keywords()),
            kind.SUMMARY.replace("|", "\\|"),
            kind.SOURCE,
        ]
        for kind in kinds
    ]
    return markdown(["in Python", "short form", "options", "what it does", "source"], cells)


def allocations_table(_: dict[str, Any]) -> list[str]:
    """How many neurons each layer keeps."""
    return _options(ALLOCATIONS)


def repairs_table(_: dict[str, Any]) -> list[str]:
    """What kept neurons take over from removed ones."""
    return _options(REPAIRS)


def training_table(_: dict[str, Any]) -> list[str]:
    """What gives neurons their scores while a model is trained."""
    return _options(METHODS)


def methods_table(_: dict[str, Any]) -> list[str]:
    """A line for each criterion of `pruning.importance`; the forms of magnitude share one."""
    lines = {}
    for name in importance.names():
        entry = importance.get(name)
        gradients = any("gradient" in need for need in entry.needs)
        of = "gradients" if gradients else "activations" if entry.needs else "weights"
        if name.startswith("magnitude-"):
            name, summary = "magnitude-{l1,l2}-{fan-in,fan-out,both,product}", "L1 or L2 norm of a neuron's weights"
        else:
            summary = entry.summary
        lines[name] = [f"`{name}`", summary.replace("|", "\\|"), of, entry.source]
    return markdown(["method", "score of a neuron", "from", "source"], lines.values())
