"""How the loss of a dense model depends on the neurons and weights of its FFNs, by one backward pass for each window.

Knows no pruning method. Only FFN weights get gradients, and those of one layer are freed as soon as they are added up,
so memory is one model, what was asked to be kept of the FFNs' weight gradients (float32), and the graph of one window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..base.errors import check
from ..base.progress import Progress, quiet
from ..base.ranks import ALONE, Ranks
from ..base.statistics import GradientStats
from ..base.windows import check_windows, stack_batches
from ..model.families import FFN, Expert
from ..model.probe import evaluating
from .expert_gradients import BankGradients
from .gradient_sums import NeuronSums, finished
from .gradient_sums import wide as _wide


def neuron_major(ffn: FFN, of: Callable[[Any], Any]) -> tuple[list[Tensor], list[Tensor]]:
    """What `of` gives for each parameter: parts `[F, D]` in record order, and input biases `[F]`."""
    parts: list[Tensor] = []
    biases: list[Tensor] = []
    for name, blocks in ffn.pattern.inputs:
        module: Any = ffn.holder.get_submodule(name)
        weight = of(module.weight)
        parts += (weight.t() if isinstance(module, Conv1D) else weight).chunk(blocks)
        biases += () if module.bias is None else of(module.bias).chunk(blocks)
    down = of(ffn.down.weight)
    return [*parts, down if isinstance(ffn.down, Conv1D) else down.t()], biases


class _Layer:
    """Hooks on one FFN, and the sums over what they saw; gradients are those of a window's summed loss."""

    def __init__(self, ffn: FFN, parts: bool, parts_square: bool) -> None:
        self.ffn = ffn
        weights = [_wide(w) for w in neuron_major(ffn, Tensor.detach)[0]]
        self.parts = [torch.zeros_like(w) for w in weights] if parts else []
        self.parts_square = [torch.zeros_like(w) for w in weights] if parts_square else []
        self.all = NeuronSums(len(weights[0]), weights[0].device)
        # Of the window at hand: sums over tokens of abs(a g) and of a g, and over weights of w g.
        self.window = torch.zeros_like(self.all.sums)
        self.activation: Tensor | None = None  # of the forward pass at hand, the last
        # A bias of the down projection belongs to no neuron.
        inputs = [p for name, _ in ffn.pattern.inputs for p in ffn.holder.get_submodule(name).parameters()]
        self.parameters: list[nn.Parameter] = [*inputs, ffn.down.get_parameter("weight")]

    def hook(self) -> list[Any]:
        """Start watching; gives the handles."""
        handles = [p.register_post_accumulate_grad_hook(self._collect) for p in self.parameters]
        return [*(down.register_forward_pre_hook(self._enter) for down in self.ffn.downs), *handles]

    def _enter(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.activation = args[0].detach()
        args[0].register_hook(partial(self._leave, self.activation))

    def _leave(self, activation: Tensor, gradient: Tensor) -> None:
        product = (_wide(activation) * _wide(gradient)).flatten(0, -2)
        self.activation = None
        self.window[0] += product.abs().sum(0, dtype=torch.float64)
        self.window[1] += product.sum(0, dtype=torch.float64)

    def _collect(self, _: Tensor) -> None:
        if any(p.grad is None for p in self.parameters):
            return
        weights, biases = neuron_major(self.ffn, Tensor.detach)
        gradients, bias_gradients = neuron_major(self.ffn, lambda p: p.grad)
        for w, g in zip(biases, bias_gradients, strict=True):
            self.window[2] += w.double() * g.double()
        for i, (w, g) in enumerate(zip(weights, gradients, strict=True)):
            self.window[2] += (_wide(w) * _wide(g)).sum(1, dtype=torch.float64)
            # The mean over the window's predictions is taken at the end, as for everything else.
            if self.parts:
                self.parts[i] += g
            if self.parts_square:
                self.parts_square[i] += _wide(g).square()
        for p in self.parameters:
            p.grad = None

    def all_stats(self, samples: int, tokens: int, predictions: int) -> list[GradientStats]:
        """`finish`, of every FFN that is watched: this one."""
        some = bool(self.all.sums[0].any())
        check(some, f"gradients of layer {self.ffn.layer}", "not all be zero, or no neuron can be ranked", 0.0)
        return [finished(self.all, self.parts, self.parts_square, samples, tokens, predictions)]

    def close_window(self) -> None:
        """Add the window's sums to those of all windows."""
        bad = (~self.window.isfinite().all(0)).nonzero()
        message = f"be finite; {len(bad)} of {self.window.shape[1]} neurons are not, the first is"
        check(len(bad) == 0, f"gradients of layer {self.ffn.layer}", message, bad[:1].flatten().tolist())
        self.all.add_activations(self.window[0], self.window[None, 1])
        self.all.add_weights(self.window[None, 2])
        self.window.zero_()


@contextmanager
def watching(
    model: nn.Module, parameters: Iterable[nn.Parameter], hooks: Iterable[Callable[[], Iterable[Any]]]
) -> Iterator[None]:
    """Inside, in eval mode, only `parameters` need a gradient, and have none yet; afterwards all is as it was.

    Args:
        model: whose.
        parameters: some of its own.
        hooks: each sets hooks on the model when it is called, and gives their handles; they are removed at the end.
    """
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    handles: list[Any] = []
    try:
        for p, _, _ in before:
            p.requires_grad_(False)
        for p in parameters:
            p.grad = None
            p.requires_grad_(True)
        for hook in hooks:
            handles += hook()
        with evaluating(model), torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for p, needed, gradient in before:
            p.requires_grad_(needed)
            p.grad = gradient


def _summed_loss(logits: Tensor, targets: Tensor, rows: int = 128) -> tuple[float, Tensor]:
    """Cross entropy in nats summed over predictions, and its gradient by the logits, `rows` predictions at a time.

    Args:
        logits: `[W, V]`; row t predicts token t + 1, and the last row nothing.
        targets: `[W - 1]`.
    """
    gradient = torch.zeros_like(logits)
    total = 0.0
    for start in range(0, len(targets), rows):
        target = targets[start : start + rows, None]
        log_p = _wide(logits[start : start + len(target)]).log_softmax(-1)
        total -= float(log_p.gather(1, target).sum(dtype=torch.float64))
        # d(-log p_target) / dz = p - onehot(target)
        p = log_p.exp_()
        gradient[start : start + len(target)] = p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
    return total, gradient


def backward_windows(
    model: Any, ids: Tensor, stage: str, loss: Callable[[int, Tensor, Tensor], Tensor], progress: Progress = quiet
) -> Iterator[int]:
    """One forward and backward pass a window; gives the window's number after each.

    Args:
        model: a causal LM of Transformers, which something is `watching`.
        ids: `[N, W]` token ids.
        stage: for `progress`.
        loss: `(number, window [W], logits [W, V])` -> `[W, V]`, gradient by the logits of the window's summed cross
            entropy, with labels from the text or drawn; the sum, since the mean's gradients could vanish in float16.
        progress: called as `(stage, done, total)`.
    """
    device = next(model.parameters()).device
    for i in range(len(ids)):
        progress(stage, i, len(ids))
        window = ids[i].to(device)
        logits = model(input_ids=window[None], use_cache=False).logits
        gradient = loss(i, window, logits[0].detach())
        logits.backward(gradient[None])
        del logits, gradient
        yield i
    progress(stage, len(ids), len(ids))


def _check_loss(layers: Sequence[_Layer | BankGradients], window: int, loss: float) -> None:
    """Raise `InputError` for a loss that is not finite, naming the first layer that went wrong."""
    if math.isfinite(loss):
        return
    for layer in layers:
        if layer.activation is not None:
            bad = (~layer.activation.flatten(0, -2).isfinite().all(0)).nonzero().flatten().tolist()
            message = f"be finite; {len(bad)} of {layer.activation.shape[-1]} neurons are not, the first is"
            check(not bad, f"activations of layer {layer.ffn.layer}", message, bad[:1])
    check(False, f"loss of window {window}", "be finite", loss)


def collect(
    model: Any,
    ffns: list[FFN],
    ids: Tensor,
    *,
    parts: bool = True,
    parts_square: bool = False,
    progress: Progress = quiet,
    ranks: Ranks = ALONE,
) -> list[GradientStats]:
    """Gradient statistics of every FFN (see `importance.GradientStats`), in one pass over the windows.

    A sample is a window, and its loss the mean cross entropy of its W - 1 next-token predictions, in nats. `parts` is
    the gradient of the mean of those losses; `mask_square`, `sample_taylor` and `parts_square` are means over samples
    of what each sample's own loss gives; `neuron_taylor` is a mean over all N W tokens. Runs in eval mode and in the
    model's dtype, the loss and all sums in float32 or wider. What the model had before, `requires_grad`, `.grad` and
    training modes, it has again afterwards, also after an error.

    Args:
        model: a causal LM of Transformers; dense, as `ffns` describe it.
        ffns: its FFNs, as `families.find_ffns` gives them.
        ids: `[N, W]` token ids.
        parts: keep the weights' gradients: float32, as many values as the FFNs have weights.
        parts_square: the same of their squares.
        progress: called as `(stage, done, total)`.
        ranks: processes that each take a part of the windows; sums are those of all.

    Raises:
        InputError: windows shorter than 2 tokens or longer than the model's context, ids out of range; a loss,
            activation or gradient that is not finite; a layer in which abs(a dL/da) is zero for every neuron.
    """
    ids = stack_batches(ids, getattr(model.config, "vocab_size", None))
    check_windows(model, ids, "ids")
    samples, width = ids.shape
    check(width >= 2, "ids", "have windows of at least 2 tokens, one to predict", width)
    layers: list[_Layer | BankGradients] = []
    for ffn in ffns:
        if not isinstance(ffn, Expert):
            layers.append(_Layer(ffn, parts, parts_square))
        elif ffn.number == 0:
            layers.append(BankGradients(ffn.of_bank, ffn, parts, parts_square))
    parameters = [p for layer in layers for p in layer.parameters]

    def of_text(number: int, window: Tensor, logits: Tensor) -> Tensor:
        loss, gradient = _summed_loss(logits, window[1:])
        _check_loss(layers, ranks.rank + number * ranks.size, loss)
        return gradient

    with watching(model, parameters, [layer.hook for layer in layers]):
        own = ids[ranks.rank :: ranks.size]
        for _ in backward_windows(model, own, "collecting gradients", of_text, progress):
            # From the last layer down, as gradients come: the first that is not finite spoils those below it.
            for layer in reversed(layers):
                layer.close_window()
    for layer in layers:
        sums = layer.all if isinstance(layer.all, list) else [layer.all]
        ranks.add(*(one.sums for one in sums), *layer.parts, *layer.parts_square)
    return [stats for layer in layers for stats in layer.all_stats(samples, ids.numel(), width - 1)]
