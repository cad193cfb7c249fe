"""pyprune: structurally pruned feed-forward networks that really run faster, inside real GPT-type models."""

from .base.errors import BackendError, CheckpointError, InputError, PypruneError, UnsupportedModelError
from .ffn.accelerate import accelerate
from .ffn.mlp import PrunedMLP
from .ffn.warming import warmup
from .model import heterogeneous, remote_code
from .model.families import find_ffns
from .model.mask import KeepIndex, Mask
from .pruning import importance
from .pruning.config import PruneConfig
from .pruning.nested import set_width
from .pruning.prune import PruneReport, prune

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
