"""How many neurons each layer keeps. One way a file; a file dropped in here is found."""

from ...base.options import import_all
from .base import ALLOCATIONS, Allocation, Layers, Plan
from .by_latency import Latency
from .by_predictor import Predicted
from .by_sensitivity import Sensitivity
from .ranked import Global
from .uniform import Uniform

import_all(__path__, __name__)

__all__ = ["ALLOCATIONS", "Allocation", "Global", "Latency", "Layers", "Plan", "Predicted", "Sensitivity", "Uniform"]
