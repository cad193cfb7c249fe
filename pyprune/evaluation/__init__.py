"""Quality of a model: perplexity, generated text and how far it is from another model's."""

from .agreement import Deltas, generation_deltas
from .generation import generate_text
from .perplexity import Perplexity, perplexity

__all__ = [
    "Deltas",
    "Perplexity",
    "generate_text",
    "generation_deltas",
    "perplexity",
]
