"""The public operator: `ffn(x, record)`.

With U, G, V the parts of the record, b, b' its neuron biases and c its down bias:

    plain: act(x U^T + b) V + c
    gated: (act(x G^T + b) * (x U^T + b')) V + c
"""

from __future__ import annotations

from torch import Tensor

from ..base.errors import check_choice
from ..base.record import Record
from . import dispatch
from .operators import FFN_BY_DISPATCH, arguments

_BACKENDS = tuple(dispatch.names())  # here, for torch.compile cannot follow how they are loaded


def ffn(x: Tensor, record: Record, *, backend: str = "auto", batch_invariant: bool = False) -> Tensor:
    """`reference.ffn` by the chosen backend, differentiable in x and in every floating tensor of the record.

    Args:
        x: `[..., D]`.
        record: the FFN.
        backend: `auto`, or a name that is then used or refused.
        batch_invariant: a row of the result must not depend, to the bit, on the rows beside it.

    Returns:
        `[..., D]` in the dtype of `x`.

    Raises:
        InputError: x does not fit the record, or there is no backend of that name.
        BackendError: the forced backend cannot run this problem.
    """
    check_choice(backend, "backend", _BACKENDS)
    record.check_x(x)
    return FFN_BY_DISPATCH(*arguments(x, record, backend, 0, batch_invariant))
