"""A model judged on six domains at once, on PIQA's choices, and on what it writes."""

from .result import Losses, Suite
from .suite import Tasks, domain_windows, piqa, suite
from .texts import Domain, Material, read_material
from .writing import Writing, write

__all__ = [
    "Domain",
    "Losses",
    "Material",
    "Suite",
    "Tasks",
    "Writing",
    "domain_windows",
    "piqa",
    "read_material",
    "suite",
    "write",
]
