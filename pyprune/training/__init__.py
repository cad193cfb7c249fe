"""Pruning neurons during training: schedule, masks, methods whose scores are learned, and two loops that agree."""

from . import methods
from .callback import PruningCallback
from .config import TrainingConfig
from .ema import EMA
from .loop import model_loss, train
from .pruner import TrainingPruner
from .schedule import CubicSchedule

__all__ = [
    "EMA",
    "CubicSchedule",
    "PruningCallback",
    "TrainingConfig",
    "TrainingPruner",
    "methods",
    "model_loss",
    "train",
]
