"""Why a pruned model fails: where it parts from the dense one, in layers, logits, probabilities and in its text."""

from .drift import Drift, generation_drift
from .hierarchy import Hierarchy, representation_hierarchy
from .redundancy import Redundancy, neuron_redundancy

__all__ = [
    "Drift",
    "Hierarchy",
    "Redundancy",
    "generation_drift",
    "neuron_redundancy",
    "representation_hierarchy",
]
