"""Task types: multiple choice, answer tokens, generation and retrieval, of a dense and a pruned model side by side."""

from .categorical import Categorical, categorical
from .choice import choice_correct, option_scores
from .continuations import Continuation, continuations, continuations_correct
from .estimates import Estimate, Metric, Order
from .generation import generation_scores
from .records import ChoiceRecord, GenerationRecord, RetrievalRecord, read_records, shipped
from .retrieval import embeddings, pairs_from_text, retrieval_scores
from .suite import TaskReport, TaskResult, run_tasks

__all__ = [
    "Categorical",
    "ChoiceRecord",
    "Continuation",
    "Estimate",
    "GenerationRecord",
    "Metric",
    "Order",
    "RetrievalRecord",
    "TaskReport",
    "TaskResult",
    "categorical",
    "choice_correct",
    "continuations",
    "continuations_correct",
    "embeddings",
    "generation_scores",
    "option_scores",
    "pairs_from_text",
    "read_records",
    "retrieval_scores",
    "run_tasks",
    "shipped",
]
