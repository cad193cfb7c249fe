"""The verb `recover`: a short training of a pruned model, taught by the dense one, that wins back what pruning lost.

Where the model's logits are nothing but a projection of its last hidden states, no logits of all tokens ever exist, and
the teacher runs once over each window: what is kept of it are hidden states, from which its logits are made again.
Text may be of several sources; the state that stays is the best on all of them, and worse than before on none.
"""

from .config import DECAYS, MODES, ONLY_TEACHER, PRECISIONS, TRAINED, RecoverConfig, RecoverReport
from .sources import split
from .state import STATE
from .teaching import recover

__all__ = [
    "DECAYS",
    "MODES",
    "ONLY_TEACHER",
    "PRECISIONS",
    "STATE",
    "TRAINED",
    "RecoverConfig",
    "RecoverReport",
    "recover",
    "split",
]
