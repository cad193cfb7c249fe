"""How much the loss grows when one layer alone is narrowed: a curve over widths for each layer.

Two ways to know. Measured (`loss`): the layer is narrowed for a trial, and the cross entropy of some windows taken.
Estimated from one backward pass (`error`, `fisher`): with e_t the change of the FFN's output at token t and g_t the
gradient there of the summed negative log-likelihood, the expected growth to the second order is

    dL = 1/2 sum_t e_t^T E[g_t g_t^T] e_t        (Fisher information in the place of the Hessian)

where the labels are drawn from the model itself: their scores have no mean, so neither a first-order term nor terms
between tokens remain. Divided by the predicted tokens it is in nats a token, as the measured one.

    fisher:  1/2 sum_t (g_t . e_t)^2           one draw for each token in the place of the expectation
    error:   1/2 sum_t |g_t|^2 |e_t|^2 / D     and the direction of g_t taken as even over all D: less noise, more bias

Weights of the model are never touched: a trial replaces what the down projection computes.
"""

from .curve import KINDS, SensitivityCurves
from .estimate import output_gradients, second_order
from .find import SHARES, WINDOWS, Scorer, curves

__all__ = [
    "KINDS",
    "SHARES",
    "WINDOWS",
    "Scorer",
    "SensitivityCurves",
    "curves",
    "output_gradients",
    "second_order",
]
