"""What kept neurons take over from removed ones. One way a file; a file dropped in here is found."""

from ...base.options import import_all
from .base import REPAIRS, Fitted, Layer, Repair, parse
from .least_squares import LeastSquares
from .mean_bias import MeanBias
from .none import NoRepair
from .refit import Refit

import_all(__path__, __name__)

__all__ = ["REPAIRS", "Fitted", "Layer", "LeastSquares", "MeanBias", "NoRepair", "Refit", "Repair", "parse"]
