"""pyprune: structurally pruned feed-forward networks that really run faster, inside real GPT-type models."""

from .base.errors import BackendError, CheckpointError, InputError, PypruneError, UnsupportedModelError
from .ffn.accelerate import accelerate
from .ffn.mlp import PrunedMLP
from .ffn.warming import warmup
from .model import heterogeneous, remote_code
from .model.families import find_ffns
from .model.mask import KeepIndex, Mask
from .pruning import importance
from .pruning.allocation import Global, Latency, Sensitivity, Uniform
from .pruning.blocks import BlockReport, prune_blocks
from .pruning.nested import set_width
from .pruning.prune import PruneReport, prune
from .pruning.repair import LeastSquares, MeanBias, Refit

__version__ = "0.1.0"

heterogeneous.install()
remote_code.install()

__all__ = [
    "BackendError",
    "BlockReport",
    "CheckpointError",
    "Global",
    "InputError",
    "KeepIndex",
    "Latency",
    "LeastSquares",
    "Mask",
    "MeanBias",
    "PruneReport",
    "PrunedMLP",
    "PypruneError",
    "Refit",
    "Sensitivity",
    "Uniform",
    "UnsupportedModelError",
    "accelerate",
    "find_ffns",
    "importance",
    "prune",
    "prune_blocks",
    "set_width",
    "warmup",
]
