"""The distillation loss: float32 probabilities, of a few tokens at a time, for a vocabulary is wide.

loss = ce_weight CE + kl_weight T^2 KL(teacher_T || student_T) + hidden_weight MSE(student's, teacher's hidden states)

with softmax at temperature T in the KL (Hinton et al., arXiv 1503.02531, section 2: T^2 keeps its gradient as large).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..base.errors import check
from .chunked_loss import IGNORED, FromHidden, FromLogits
from .distillation_config import DistillationConfig


@dataclass(frozen=True)
class DistillationLoss:
    """A loss and its parts.

    Attributes:
        total: the weighted sum, differentiable.
        ce, kl, hidden: means over the tokens that count, unweighted and without T^2; 0 where a part has no weight.
    """

    total: Tensor
    ce: float
    kl: float
    hidden: float


def _checked_labels(labels: Tensor, rows: int, vocabulary: int) -> Tensor:
    flat = labels.reshape(-1)
    check(len(flat) == rows, "labels", f"be one for each of {rows} rows of logits", len(flat))
    kept = flat[flat != IGNORED]
    low, high = (int(kept.min()), int(kept.max())) if len(kept) else (0, 0)
    check(low >= 0 and high < vocabulary, "labels", f"lie in [0, {vocabulary}), or be {IGNORED}", (low, high))
    return flat


def _count(labels: Tensor, given: Tensor | int | None) -> Tensor:
    """What sums over tokens are divided by: the tokens that count here, or in all batches of an optimizer step."""
    own = (labels != IGNORED).sum().clamp_(min=1) if given is None else torch.as_tensor(given, device=labels.device)
    return own.float()


def hidden_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], labels: Tensor, count: Tensor, layers: Sequence[int] | None
) -> Tensor:
    """Mean over layers, tokens that count, and channels of the squared difference, in float32.

    Args:
        student, teacher: the output of each decoder layer, `[..., D]`.
        labels: as many as tokens; those that are -100 do not count.
        count: tokens that count.
        layers: which; None for all.

    Raises:
        InputError: another number of layers, a layer that there is not, or another D.
    """
    check(len(student) == len(teacher), "hidden states of the student", f"be of {len(teacher)} layers", len(student))
    chosen = range(len(teacher)) if layers is None else layers
    strange = [n for n in chosen if n >= len(teacher)]
    check(not strange, "layers", f"be numbers below {len(teacher)}", strange)
    mask = (labels.reshape(-1) != IGNORED).float()
    total = torch.zeros((), device=mask.device)
    for n in chosen:
        s, t = student[n], teacher[n]
        check(s.shape[-1] == t.shape[-1], "hidden_size of the student", f"be the teacher's {t.shape[-1]}", s.shape[-1])
        square = (s.float() - t.float()).square().mean(-1).reshape(-1)
        total = total + (square * mask).sum()
    return total / (count * len(chosen))


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    config: DistillationConfig | None = None,
    student_hidden: Sequence[Tensor] | None = None,
    teacher_hidden: Sequence[Tensor] | None = None,
    *,
    tokens: Tensor | int | None = None,
) -> DistillationLoss:
    """The loss of the module's docstring, in float32; differentiable in the student's tensors, once.

    Beside the logits given and the gradient of the student's, `[tokens, vocabulary]` floats exist for one chunk only.

    Args:
        student_logits, teacher_logits: `[..., V]`; the teacher's may be None where kl_weight is 0.
        labels: `[...]`, what each row of logits must predict (already shifted); rows with -100 count nowhere.
        config: None for the defaults.
        student_hidden, teacher_hidden: outputs of the decoder layers, `[..., D]` each; needed with a hidden_weight.
        tokens: divide sums by this number instead of the labels that count here (as Trainer's accumulation asks).

    Raises:
        InputError: shapes or labels that do not fit, or hidden states that are missing or do not.
    """
    config = config or DistillationConfig()
    V = student_logits.shape[-1]
    teacher = None
    if config.kl_weight:
        shape = None if teacher_logits is None else tuple(teacher_logits.shape)
        check(
            shape == tuple(student_logits.shape), "teacher_logits", f"have shape {tuple(student_logits.shape)}", shape
        )
        assert teacher_logits is not None
        teacher = teacher_logits.detach().reshape(-1, V)
    flat = _checked_labels(labels, student_logits.numel() // V, V)
    count = _count(flat, tokens)
    total, ce, kl = FromLogits.apply(student_logits.reshape(-1, V), teacher, flat, config, count)
    return _with_hidden(total, ce, kl, config, student_hidden, teacher_hidden, flat, count)


def _with_hidden(
    total: Tensor,
    ce: Tensor,
    kl: Tensor,
    config: DistillationConfig,
    student: Sequence[Tensor] | None,
    teacher: Sequence[Tensor] | None,
    labels: Tensor,
    count: Tensor,
) -> DistillationLoss:
    hidden = torch.zeros(())
    if config.hidden_weight:
        given = student is not None and teacher is not None
        check(given, "student_hidden and teacher_hidden", "be given with a hidden_weight above 0", None)
        assert student is not None and teacher is not None
        hidden = hidden_loss(student, teacher, labels, count, config.layers)
        total = total + config.hidden_weight * hidden
    return DistillationLoss(total, float(ce), float(kl), float(hidden.detach()))


def distillation_loss_from_hidden(
    student: tuple[Tensor, nn.Linear],
    teacher: tuple[Tensor, nn.Linear] | None,
    labels: Tensor,
    config: DistillationConfig,
    dtype: torch.dtype = torch.float32,
) -> DistillationLoss:
    """CE and KL as `distillation_loss`, from the last hidden states: no logits of all tokens ever exist.

    Args:
        student, teacher: hidden states `[..., D]` and the output projection over them (see `plain_head`). The teacher
            may be None where kl_weight is 0.
        labels: as for `distillation_loss`.
        config: its hidden part is not for this function.
        dtype: of the products; what comes out of them is summed and exponentiated in float32.
    """
    hidden, head = student
    V, D = head.weight.shape
    flat = _checked_labels(labels, hidden.numel() // D, V)
    other = None
    if config.kl_weight:
        check(teacher is not None, "teacher", "be given with a kl_weight above 0", None)
        assert teacher is not None
        states, projection = teacher
        check(len(projection.weight) == V, "vocabulary of the teacher", f"be {V}", len(projection.weight))
        bias = None if projection.bias is None else projection.bias.detach().to(dtype)
        states = states.detach().reshape(-1, states.shape[-1])
        other = states, projection.weight.detach().to(dtype), bias
    count = _count(flat, None)
    total, ce, kl = FromHidden.apply(hidden.reshape(-1, D), head.weight, head.bias, other, flat, config, count, dtype)
    return DistillationLoss(total, float(ce), float(kl), 0.0)
