"""Why a pruned model fails: where it parts from the dense one, in layers, in logits, in probabilities and in its text."""

from .drift import Drift, generation_drift
from .hierarchy import Hierarchy, representation_hierarchy

__all__ = ["Drift", "Hierarchy", "generation_drift", "representation_hierarchy"]
