"""The growth of the loss to the second order, from one backward pass over labels that the model draws."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import check
from ...base.progress import Progress, quiet
from ...model.families import FFN
from ...model.units import Expert, groups
from ..gradients import backward_windows, watching


def output_gradients(
    model: Any, ffns: Sequence[FFN], ids: Tensor, seed: int = 0, progress: Progress = quiet
) -> list[Tensor]:
    """Gradient of a window's summed negative log-likelihood at every output of an FFN, or of a bank of experts, with
    labels that the model draws.

    Args:
        model: a causal LM of Transformers, its weights get no gradients.
        ffns: its FFNs.
        ids: `[n, W]` token ids.
        seed: of the labels.
        progress: called as `(stage, done, total)`.

    Returns:
        `[n * W, D]` float32 for each FFN, one for the experts of a bank together.

    Raises:
        InputError: gradients that are not finite.
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    leaves: dict[int, Tensor] = {}
    heads = [group[0] for group in groups(list(ffns))]
    found: list[list[Tensor]] = [[] for _ in heads]

    def leaf(layer: int, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves[layer] = torch.zeros_like(output, requires_grad=True)
        return output + leaves[layer]

    def hooks() -> list[Any]:
        ends = [ffn.of_bank.module if isinstance(ffn, Expert) else ffn.down for ffn in heads]
        return [end.register_forward_hook(partial(leaf, i)) for i, end in enumerate(ends)]

    def drawn(number: int, window: Tensor, logits: Tensor) -> Tensor:
        plain = logits.requires_grad_()[:-1].float()
        check(bool(plain.isfinite().all()), f"logits of window {number}", "be finite", "NaN or infinity")
        labels = torch.multinomial(plain.detach().softmax(-1), 1, generator=generator)[:, 0]
        return torch.autograd.grad(nn.functional.cross_entropy(plain, labels, reduction="sum"), logits)[0]

    with watching(model, (), [hooks]):
        for _ in backward_windows(model, ids, "gradients of FFN outputs", drawn, progress):
            for i, ffn in enumerate(heads):
                gradient = leaves[i].grad
                assert gradient is not None
                if isinstance(ffn, Expert) and ffn.of_bank.layout.sorted_rows:  # blocks of the experts, added up behind
                    gradient = gradient[: len(gradient) // ffn.of_bank.experts]
                found[i].append(gradient.reshape(-1, gradient.shape[-1]).float())
    joined = [torch.cat(row) for row in found]
    for ffn, gradient in zip(heads, joined, strict=True):
        bad = int((~gradient.isfinite()).sum())
        check(bad == 0, f"gradients of layer {ffn.layer}", "be finite", f"{bad} values that are not")
    return joined


@torch.no_grad()
def second_order(
    kind: str,
    activations: Tensor,
    gradients: Tensor,
    down: Tensor,
    order: Tensor,
    gram: Tensor | None = None,
    damping: float = 0.0,
) -> Tensor:
    """The estimates of the package's docstring, summed over tokens, for every width at once.

    The k first neurons of `order` stay. With a repair, H = R R^T is the (damped) second moment in that order, R lower
    triangular: least squares leaves V' with a change of the down rows `dV = R^-T Z_k`, where Z = R^T V and Z_k is Z
    without its first k rows (they solve the normal equations of the neurons that stay; the others' rows are V). So
    the output changes by `e_t = a_t^T dV = sum over i >= k of P_ti Z_i`, with P = A R^-T. The bare cut is R = I.

    Args:
        kind: `error` or `fisher`.
        activations: `[T, F]`, what enters the down projection.
        gradients: `[T, D]`, of the summed loss at the FFN's output.
        down: `[F, D]` dense down rows.
        order: `[F]` neurons, the most important first.
        gram: `[F, F]` mean second moment for the least-squares repair; None for the bare cut.
        damping: ridge of the repair, as a share of the mean diagonal of `gram`.

    Returns:
        `[F + 1]` float64, for k = 0..F neurons kept; the last is 0.

    Raises:
        InputError: `damping` is too small for `gram`.
    """
    order = order.to(down.device)
    p, z = activations.double()[:, order], down.double()[order]
    if gram is not None and float(gram.diagonal().mean()) > 0:
        h = gram.double()[order][:, order]
        h.diagonal().add_(damping * float(h.diagonal().mean()))
        triangle, failed = torch.linalg.cholesky_ex(h)
        rule = "be large enough to make the second moment positive definite"
        check(not int(failed), "damping", rule, damping)
        p = torch.linalg.solve_triangular(triangle, p.t(), upper=False).t()
        z = triangle.t() @ z
    g = gradients.double()
    if kind == "fisher":
        # g_t . e_t for every k: what neurons k, k + 1, ... add up to
        products = p.mul_(g @ z.t())
        sums = products.flip(1).cumsum(1).square().sum(0).flip(0)
    else:
        weighted = p.t() @ (p * g.square().sum(1, keepdim=True))
        # trailing blocks: sum over i, j >= k
        blocks = (weighted.mul_(z @ z.t())).flip(0, 1).cumsum(0).cumsum(1)
        sums = blocks.diagonal().flip(0) / down.shape[1]
    return 0.5 * torch.cat([sums, sums.new_zeros(1)])
