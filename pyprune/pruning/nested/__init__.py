"""Nested widths: neurons sorted by importance once, so that every prefix of a layer is a narrower layer.

`prune_nested` sorts the neurons of a dense model, which changes nothing that it computes, and fits the down rows of a
few chosen widths to it. The checkpoint holds the whole model, as stock Transformers loads it, and beside it
`nested.safetensors` with those rows. `set_width` then makes the loaded and accelerated model run any prefix from the
memory that is there: one checkpoint, any speed.
"""

from .chosen import FILE, Nested, attach
from .fitting import SHARES, NestedReport, compensate, prune_nested, sort_neurons
from .width import load, narrowed, set_width

__all__ = [
    "FILE",
    "SHARES",
    "Nested",
    "NestedReport",
    "attach",
    "compensate",
    "load",
    "narrowed",
    "prune_nested",
    "set_width",
    "sort_neurons",
]
