"""pyprune: structurally pruned feed-forward networks (FFNs) that really run faster, inside real GPT-type models.

    >>> model, tokenizer = load("demo")  # or a folder, a hub name, a GGUF file
    >>> report = prune(model, keep=0.7, tokenizer=tokenizer)  # 30 % of the neurons go, the rest is refitted
    >>> folder = save(model, "smol-070", tokenizer)  # an ordinary Hugging Face checkpoint
    >>> model = accelerate(model)  # `PrunedMLP` in the place of every FFN

Options of `prune`: how many neurons each layer keeps (`Uniform`, `Global`, `Sensitivity`, `Predicted`, `Latency`), and
how what stays is mended (`MeanBias`, `LeastSquares`, `Refit`). Everything that goes wrong is a `PypruneError`.

Importing this package wraps the constructor of Transformers' `PreTrainedModel` and the saving of its configs, so that
checkpoints whose FFN widths differ by layer load and save; every other model passes through untouched.
"""

from .base.errors import BackendError, CheckpointError, InputError, PypruneError, UnsupportedModelError
from .ffn.accelerate import accelerate
from .ffn.mlp import PrunedMLP
from .ffn.moe import PrunedMoE
from .model import heterogeneous, remote_code
from .model.checkpoint import save
from .model.mask import KeepIndex, Mask
from .pruning.allocation import Global, Latency, Predicted, Sensitivity, Uniform
from .pruning.blocks import prune_blocks
from .pruning.experts import prune_experts
from .pruning.load import load
from .pruning.nested import set_width
from .pruning.prune import prune
from .pruning.repair import LeastSquares, MeanBias, Refit
from .pruning.streaming import prune_checkpoint

__version__ = "0.1.0"

heterogeneous.install()
remote_code.install()

__all__ = [
    "BackendError",
    "CheckpointError",
    "Global",
    "InputError",
    "KeepIndex",
    "Latency",
    "LeastSquares",
    "Mask",
    "MeanBias",
    "Predicted",
    "PrunedMLP",
    "PrunedMoE",
    "PypruneError",
    "Refit",
    "Sensitivity",
    "Uniform",
    "UnsupportedModelError",
    "accelerate",
    "load",
    "prune",
    "prune_blocks",
    "prune_checkpoint",
    "prune_experts",
    "save",
    "set_width",
]
