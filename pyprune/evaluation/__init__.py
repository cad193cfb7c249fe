"""Quality of a model: perplexity, multiple choice, generated text and how far it is from another model's."""

from .agreement import Deltas, generation_deltas
from .choice import Choice, ChoiceItem, Difference, choice_accuracy, choice_difference, choice_items
from .generation import generate_text
from .perplexity import Perplexity, perplexity

__all__ = [
    "Choice",
    "ChoiceItem",
    "Deltas",
    "Difference",
    "Perplexity",
    "choice_accuracy",
    "choice_difference",
    "choice_items",
    "generate_text",
    "generation_deltas",
    "perplexity",
]
