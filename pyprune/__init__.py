"""pyprune: structurally pruned feed-forward networks that really run faster, inside real GPT-type models."""

from . import heterogeneous, importance, remote_code
from .config import PruneConfig
from .errors import BackendError, CheckpointError, InputError, PypruneError, UnsupportedModelError
from .families import find_ffns
from .mask import KeepIndex, Mask
from .mlp import PrunedMLP
from .nested import set_width
from .pruning import PruneReport, prune
from .surgery import accelerate
from .warming import warmup

__version__ = "0.1.0"

heterogeneous.install()
remote_code.install()

__all__ = [
    "BackendError",
    "CheckpointError",
    "InputError",
    "KeepIndex",
    "Mask",
    "PruneConfig",
    "PruneReport",
    "PrunedMLP",
    "PypruneError",
    "UnsupportedModelError",
    "accelerate",
    "find_ffns",
    "importance",
    "prune",
    "set_width",
    "warmup",
]
