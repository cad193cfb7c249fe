"""Quality of a model: perplexity and generated text."""

from .generation import generate_text
from .perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "generate_text", "perplexity"]
