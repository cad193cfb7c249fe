"""Widths by latency: what an FFN of each width costs on this machine, with the kernels in use, in this model.

The speed-up that is promised here is that of the accelerated pruned model over the accelerated dense one (`PrunedMLP`
at full width, the best dense path there is), so that only the removed neurons count; the table also holds the step of
the plain Transformers model.

An FFN alone is not quite an FFN in a model: what is in the caches and how threads meet differ. So the shape of a curve
over widths comes from FFNs alone, and its size from whole steps at a few uniform widths: between those, what an FFN
alone saves is multiplied by what the model really saved over what its FFNs alone would have.
"""

from .measuring import measure, part
from .table import KINDS, LatencyTable, Workload, factors, rising

__all__ = [
    "KINDS",
    "LatencyTable",
    "Workload",
    "factors",
    "measure",
    "part",
    "rising",
]
