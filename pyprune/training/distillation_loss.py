"""The distillation loss: float32 probabilities, of a few tokens at a time, for a vocabulary is wide.

loss = ce_weight CE + kl_weight T^2 KL(teacher_T || student_T) + hidden_weight MSE(student's, teacher's hidden states)

with softmax at temperature T in the KL (Hinton et al., arXiv 1503.02531, section 2: T^2 keeps its gradient as large).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import check

IGNORED = -100
_CHUNK = 1 << 23  # numbers in a [tokens, vocabulary] buffer of logits: 170 tokens of a vocabulary of 49152
_BLOCK = 1 << 19  # floats in one of probabilities: 2 MB, which a core's cache holds


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class DistillationConfig:
    """How to distil.

    Attributes:
        temperature: T, above 0.
        kl_weight, ce_weight, hidden_weight: of the three parts, 0 or more, one of them above 0.
        layers: numbers of the decoder layers whose outputs the hidden part compares; None for all of them.

    Raises:
        InputError: a value breaks its rule.
    """

    temperature: float = 2.0
    kl_weight: float = 0.5
    ce_weight: float = 0.5
    hidden_weight: float = 0.0
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        positive = _is_number(self.temperature) and self.temperature > 0
        check(positive, "temperature", "be positive and finite", self.temperature)
        for name in ("kl_weight", "ce_weight", "hidden_weight"):
            value = getattr(self, name)
            check(_is_number(value) and value >= 0, name, "be 0 or more, and finite", value)
        weights = self.kl_weight, self.ce_weight, self.hidden_weight
        check(any(weights), "kl_weight, ce_weight and hidden_weight", "not all be 0", weights)
        if self.layers is not None:
            counts = [isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in self.layers]
            check(bool(counts) and all(counts), "layers", "be numbers of decoder layers", self.layers)
            check(self.hidden_weight > 0, "layers", "be given only with a hidden_weight above 0", self.layers)
            object.__setattr__(self, "layers", tuple(self.layers))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "layers": None if self.layers is None else list(self.layers)}


def _losses(
    z: Tensor, z_teacher: Tensor | None, labels: Tensor, config: DistillationConfig, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sums of CE and KL over rows of logits, `[rows, V]`, float32.

    With a `scale`, d(weighted sum)/dz times it takes the place of `z`.
    """
    ce = kl = torch.zeros((), device=z.device)
    size = max(1, _BLOCK // z.shape[1]) if z.device.type == "cpu" else len(z)
    for start in range(0, len(z), size):
        block = slice(start, start + size)
        q = None if z_teacher is None else z_teacher[block]
        more_ce, more_kl, gradient = _block_losses(z[block], q, labels[block], config, scale is not None)
        ce, kl = ce + more_ce, kl + more_kl
        if gradient is not None and scale is not None:
            z[block] = gradient.mul_(scale)
    return ce, kl


def _block_losses(
    z: Tensor, z_teacher: Tensor | None, labels: Tensor, config: DistillationConfig, wanted: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    T = config.temperature
    ce = kl = torch.zeros((), device=z.device)
    gradient: Tensor | None = torch.zeros_like(z, dtype=torch.float32) if wanted else None
    z = z.float()
    if z_teacher is not None:
        log_p = torch.log_softmax(z / T, -1)
        log_q = torch.log_softmax(z_teacher.float().div_(T), -1)
        q = log_q.exp()
        kl = log_q.sub_(log_p).mul_(q).sum()
        if wanted:
            # d(T^2 KL)/dz = T (p - q)
            gradient = log_p.exp_().sub_(q).mul_(config.kl_weight * T)
    if config.ce_weight:
        log_p = torch.log_softmax(z, -1)
        ce = -log_p.gather(1, labels[:, None]).sum()
        if gradient is not None:
            # dCE/dz = p - onehot(label)
            gradient.add_(log_p.exp_(), alpha=config.ce_weight)
            gradient.scatter_add_(1, labels[:, None], torch.full_like(gradient[:, :1], -config.ce_weight))
    return ce, kl, gradient


def _chunks(labels: Tensor, vocabulary: int) -> tuple[Tensor, ...]:
    """Numbers of the rows that have a label, in chunks."""
    rows = (labels != IGNORED).nonzero().flatten()
    return rows.split(max(1, _CHUNK // vocabulary))


class _FromLogits(torch.autograd.Function):
    """Weighted CE and KL of logits `[N, V]`; the gradient is worked out chunk by chunk on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor | None, labels: Tensor, config: DistillationConfig, count: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        ce = kl = torch.zeros((), device=student.device)
        for rows in _chunks(labels, student.shape[1]):
            z = student[rows]
            scale = None if gradient is None else 1 / count
            more_ce, more_kl = _losses(z, None if teacher is None else teacher[rows], labels[rows], config, scale)
            ce, kl = ce + more_ce, kl + more_kl
            if gradient is not None:
                gradient[rows] = z
        ctx.save_for_backward(gradient)
        return _outputs(ctx, ce / count, kl / count, config)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None, None


class _FromHidden(torch.autograd.Function):
    """The same from hidden states `[N, D]` and the output projections: logits exist for one chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: tuple[Tensor, Tensor, Tensor | None] | None,
        labels: Tensor,
        config: DistillationConfig,
        count: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if for_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and for_bias else None
        ce = kl = torch.zeros((), device=hidden.device)
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        scale = 1 / count if for_hidden or for_weight or for_bias else None
        for rows in _chunks(labels, len(weight)):
            h = hidden[rows].to(dtype)
            z = F.linear(h, w, b)
            q = None if teacher is None else F.linear(teacher[0][rows].to(dtype), *teacher[1:])
            more_ce, more_kl = _losses(z, q, labels[rows], config, scale)
            ce, kl = ce + more_ce, kl + more_kl
            if d_hidden is not None:
                d_hidden[rows] = (z @ w).to(d_hidden.dtype)
            if d_weight is not None:
                d_weight += z.t() @ h
            if d_bias is not None:
                d_bias += z.sum(0, dtype=torch.float32)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return _outputs(ctx, ce / count, kl / count, config)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *unused: Any) -> Any:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype),
            None if d_weight is None else d_weight.mul_(grad).to(ctx.dtypes[0]),
            None if d_bias is None else d_bias.mul_(grad).to(ctx.dtypes[1]),
            *[None] * 5,
        )


def _outputs(ctx: Any, ce: Tensor, kl: Tensor, config: DistillationConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted sum, and its parts for reports."""
    ctx.mark_non_differentiable(ce, kl)
    return config.ce_weight * ce + config.kl_weight * config.temperature**2 * kl, ce, kl


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
    total, ce, kl = _FromLogits.apply(student_logits.reshape(-1, V), teacher, flat, config, count)
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
    total, ce, kl = _FromHidden.apply(hidden.reshape(-1, D), head.weight, head.bias, other, flat, config, count, dtype)
    return DistillationLoss(total, float(ce), float(kl), 0.0)
