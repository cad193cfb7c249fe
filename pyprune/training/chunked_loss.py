"""Cross entropy and KL as autograd functions that hold probabilities of a few tokens at a time.

For their parts see `distillation_loss`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .distillation_config import DistillationConfig

IGNORED = -100
_CHUNK = 1 << 23  # numbers in a [tokens, vocabulary] buffer of logits: 170 tokens of a vocabulary of 49152
_BLOCK = 1 << 19  # floats in one of probabilities: 2 MB, which a core's cache holds


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


class FromLogits(torch.autograd.Function):
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


class FromHidden(torch.autograd.Function):
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
