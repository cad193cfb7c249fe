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

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import allocation, families
from .calibration import LayerStream, Progress, check_windows, quiet
from .compensation import least_squares
from .errors import InputError, check, check_choice
from .families import FFN
from .importance import ActivationStats

KINDS = ("loss", "error", "fisher")
# A measured point costs a pass through the rest of the model; the estimates give every width at once.
SHARES = {"loss": (0.8, 0.6, 0.4, 0.2), "error": (), "fisher": ()}
WINDOWS = {"loss": 2, "error": 4, "fisher": 4}
_STEEPEST = 10.0  # exponent of a curve where nothing was tried
_FINE = tuple(i / 32 for i in range(31, 0, -1))

# Importance `[F]` of one FFN's neurons from the dense model's statistics, higher = keep.
Scorer = Callable[[FFN, ActivationStats], Tensor]


@dataclass(frozen=True)
class SensitivityCurves:
    """How much the loss grows when one layer alone is narrowed.

    Attributes:
        kind: one of `KINDS`.
        sizes: F of each layer.
        widths: of each layer, ascending, those that were tried; all below F.
        losses: of each layer and width, growth of the mean cross entropy in nats a token; as found, so noise may make
            it negative.
        tokens: that were predicted for it.
        fingerprint: of the dense model.

    Raises:
        InputError: NaN or infinite losses, widths out of range or not ascending, or lengths that differ.
    """

    kind: str
    sizes: tuple[int, ...]
    widths: tuple[tuple[int, ...], ...]
    losses: tuple[tuple[float, ...], ...]
    tokens: int
    fingerprint: str

    def __post_init__(self) -> None:
        check_choice(self.kind, "kind", KINDS)
        layers = len(self.sizes)
        check(layers > 0 and len(self.widths) == layers, "widths", f"be given for {layers} layers", len(self.widths))
        check(len(self.losses) == layers, "losses", f"be given for {layers} layers", len(self.losses))
        for i, (size, widths, losses) in enumerate(zip(self.sizes, self.widths, self.losses, strict=True)):
            rising = all(a < b for a, b in zip((0, *widths), (*widths, size), strict=True)) and len(widths) > 0
            check(rising, f"widths of layer {i}", f"ascend between 1 and {size - 1}", list(widths))
            check(len(losses) == len(widths), f"losses of layer {i}", f"be {len(widths)} numbers", len(losses))
            check(all(map(math.isfinite, losses)), f"losses of layer {i}", "be finite", list(losses))

    def at(self, layer: int, widths: Sequence[int]) -> list[float]:
        """Growth of the loss when `layer` keeps each of `widths` neurons: a power law between neighbours.

        What was found is first made to grow with what is removed. Between two points the curve is a straight line in
        the logarithms of loss and of removed share, so it is as convex as the points are; from nothing removed to the
        first point, and past the last, it goes on with the exponent of the nearest two, 1 to 10. Where
        a point is 0 there is no logarithm, and the line is straight in plain numbers.

        Raises:
            InputError: a width outside [1, F].
        """
        size = self.sizes[layer]
        strange = [width for width in widths if not 1 <= width <= size]
        check(not strange, "widths", f"lie in [1, {size}]", strange[:3])
        removed = [1 - width / size for width in reversed(self.widths[layer])]
        found = np.maximum.accumulate(np.maximum(self.losses[layer][::-1], 0.0)).tolist()
        return [_power_law(removed, found, 1 - width / size) for width in widths]

    def check_fits(self, sizes: Sequence[int], fingerprint: str | None = None) -> None:
        """Raise `InputError` unless these curves are of a model of such widths and, where given, this fingerprint."""
        check(list(sizes) == list(self.sizes), "curves", f"be of layers {list(sizes)[:4]}...", list(self.sizes)[:4])
        same = fingerprint is None or fingerprint == self.fingerprint
        check(same, "curves", f"belong to this model ({str(fingerprint)[:16]}...)", f"{self.fingerprint[:16]}...")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SensitivityCurves:
        """What `to_json` gave.

        Raises:
            InputError: something else.
        """
        try:
            return cls(
                kind=values["kind"],
                sizes=tuple(values["sizes"]),
                widths=tuple(map(tuple, values["widths"])),
                losses=tuple(map(tuple, values["losses"])),
                tokens=int(values["tokens"]),
                fingerprint=str(values["fingerprint"]),
            )
        except InputError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"curves must be as `to_json` gives them; {type(error).__name__}: {error}") from error


def _exponent(r: Sequence[float], y: Sequence[float], i: int) -> float:
    """Of the power law through points i and i + 1; 2, as of a quadratic loss, where there is none."""
    if not 0 <= i < len(r) - 1 or y[i] <= 0:
        return 2.0
    power = (math.log(y[i + 1]) - math.log(y[i])) / (math.log(r[i + 1]) - math.log(r[i]))
    return min(_STEEPEST, max(1.0, power))


def _power_law(r: Sequence[float], y: Sequence[float], x: float) -> float:
    """Value at removed share x of the curve through the points (r, y); see `SensitivityCurves.at`."""
    i = int(np.searchsorted(r, x))
    if i < len(r) and r[i] == x:
        return y[i]
    if i == 0:
        return float(y[0] * (x / r[0]) ** _exponent(r, y, 0))
    if i == len(r):
        return float(y[-1] * (x / r[-1]) ** _exponent(r, y, i - 2))
    if y[i - 1] <= 0:
        return y[i] * (x - r[i - 1]) / (r[i] - r[i - 1])
    way = math.log(x / r[i - 1]) / math.log(r[i] / r[i - 1])
    return math.exp((1 - way) * math.log(y[i - 1]) + way * math.log(y[i]))


def choose_widths(
    curves: SensitivityCurves,
    keep: float,
    multiple: int = 1,
    floor: float = 0.0,
    protect: tuple[int, int] = (0, 0),
) -> list[int]:
    """The widths that cost least by `curves` among those that keep at most the share `keep` of all neurons.

    Losses of layers are taken to add up; the optimum of the sum is exact (`allocation.exact`).

    Args:
        curves: of the dense model.
        keep: in (0, 1], of all neurons of all layers.
        multiple: widths are multiples of it, or F.
        floor: least share kept in any layer.
        protect: how many of the first and of the last layers keep all neurons.

    Raises:
        InputError: the least widths allowed hold more neurons than `keep` does.
    """
    choices = allocation.candidate_widths(curves.sizes, multiple, floor, protect)
    budget, least = round(keep * sum(curves.sizes)), sum(row[0] for row in choices)
    rule = f"be at least {least / sum(curves.sizes):.3f} with this multiple, floor and protect"
    check(least <= budget, "keep", rule, keep)
    # The widest first: of equal losses it is taken, so a flat curve leaves no neurons unspent.
    choices = [row[::-1] for row in choices]
    losses = [curves.at(i, row) for i, row in enumerate(choices)]
    chosen = allocation.exact(losses, choices, budget)
    return [row[i] for row, i in zip(choices, chosen, strict=True)]


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` computes `forward` inside; after it, also after an error, it is as it was."""
    own: Any = vars(module)
    before = own.get("forward")
    own["forward"] = forward
    try:
        yield
    finally:
        del own["forward"]
        if before is not None:
            own["forward"] = before


@contextmanager
def narrowed(ffn: FFN, keep: Tensor, down: Tensor | None = None) -> Iterator[None]:
    """Inside, `ffn` gives what it would give after `surgery.cut`; its weights stay as they are, to the bit.

    Args:
        ffn: of a model in eval mode.
        keep: `[K]` neurons that stay.
        down: `[K, D]` new down rows for them, or None for their own.
    """
    weights = ffn.weights()
    keep = keep.long().to(weights.down.device)
    rows = weights.down[keep] if down is None else down.to(weights.down.dtype)
    bias = weights.down_bias

    def forward(a: Tensor) -> Tensor:
        return nn.functional.linear(a.index_select(-1, keep), rows.t(), bias)

    with replaced(ffn.down, forward):
        yield


class _Rest:
    """The model from one decoder layer on.

    Args:
        model: a causal LM of Transformers, in eval mode.
        ids: `[n, W]`, the windows whose loss is measured.
    """

    def __init__(self, model: Any, ids: Tensor) -> None:
        self._model, self._ids = model, ids.to(next(model.parameters()).device)
        self._layers = list(families.decoder_layers(model)[1])
        self._extra: list[int | None] = [None] * len(self._layers)

    def dense_loss(self) -> float:
        """Mean cross entropy of a predicted token, in nats; also notes how layers give their output."""

        def note(i: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                self._extra[i] = len(output) - 1 if isinstance(output, tuple) else None

            return hook

        handles = [layer.register_forward_hook(note(i)) for i, layer in enumerate(self._layers)]
        try:
            return self.loss(0, None)
        finally:
            for handle in handles:
                handle.remove()

    def _passing(self, i: int, hidden: Tensor) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            extra = self._extra[i]
            return hidden if extra is None else (hidden, *([None] * extra))

        return forward

    @torch.no_grad()
    def loss(self, start: int, hidden: Tensor | None) -> float:
        """Mean cross entropy of a predicted token when layer `start` gets `hidden` (`[n, W, D]`)."""
        total = 0.0
        for i, window in enumerate(self._ids):
            with ExitStack() as stack:
                if hidden is not None:
                    for j in range(start):
                        stack.enter_context(replaced(self._layers[j], self._passing(j, hidden[i : i + 1])))
                logits = self._model(input_ids=window[None], use_cache=False).logits[0, :-1]
            total += float(nn.functional.cross_entropy(logits.float(), window[1:], reduction="sum"))
        return total / (self._ids.numel() - len(self._ids))


def _look(stream: LayerStream, ffn: FFN, layer: nn.Module) -> tuple[Tensor, Tensor]:
    """What enters decoder layer and down projection over the stream's windows: `[n, W, D]` and `[n * W, F]`."""
    hidden: list[Tensor] = []
    inner: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])

    def inside(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inner.append(args[0].reshape(-1, args[0].shape[-1]).float())

    handles = [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        ffn.down.register_forward_pre_hook(inside),
    ]
    try:
        stream.statistics(ffn, gram=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(hidden), torch.cat(inner)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside; so a backward pass keeps and computes only what outputs need."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def output_gradients(
    model: Any, ffns: Sequence[FFN], ids: Tensor, seed: int = 0, progress: Progress = quiet
) -> list[Tensor]:
    """Gradient of a window's summed negative log-likelihood at every FFN's output, with labels that the model draws.

    Args:
        model: a causal LM of Transformers, in eval mode; its weights get no gradients.
        ffns: its FFNs.
        ids: `[n, W]` token ids.
        seed: of the labels.
        progress: called as `(stage, done, total)`.

    Returns:
        `[n * W, D]` float32 for each FFN.

    Raises:
        InputError: gradients that are not finite.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    found: list[list[Tensor]] = [[] for _ in ffns]
    for i, window in enumerate(ids.to(device)):
        progress("gradients of FFN outputs", i, len(ids))
        leaves: dict[int, Tensor] = {}

        def add(layer: int, leaves: dict[int, Tensor] = leaves) -> Callable[..., Tensor]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                leaves[layer] = torch.zeros_like(output, requires_grad=True)
                return output + leaves[layer]

            return hook

        handles = [ffn.down.register_forward_hook(add(ffn.layer)) for ffn in ffns]
        try:
            with _frozen(model), torch.enable_grad():
                logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
                finite = bool(logits.isfinite().all())
                check(finite, f"logits of window {i}", "be finite", "NaN or infinity")
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
                gradients = torch.autograd.grad(loss, [leaves[ffn.layer] for ffn in ffns])
        finally:
            for handle in handles:
                handle.remove()
        for row, gradient in zip(found, gradients, strict=True):
            row.append(gradient.reshape(-1, gradient.shape[-1]).float())
    joined = [torch.cat(row) for row in found]
    for ffn, gradient in zip(ffns, joined, strict=True):
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
    """The estimates of the module's docstring, summed over tokens, for every width at once.

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


def curves(
    model: nn.Module,
    ffns: list[FFN],
    ids: Tensor,
    score: Scorer,
    *,
    kind: str = "loss",
    shares: Sequence[float] | None = None,
    multiple: int = 1,
    repair: bool = False,
    damping: float = 1e-2,
    gram: bool = False,
    windows: int | None = None,
    seed: int = 0,
    progress: Progress = quiet,
) -> SensitivityCurves:
    """Narrow each layer of the dense model alone, and find what that does to the loss. The model stays as it is.

    Cost of `loss`: layers x shares passes of `windows` windows through the rest of the model; of the estimates: one
    backward pass over them, and a Cholesky factor of each layer.

    Args:
        model: a causal LM of Transformers, in eval mode.
        ffns: its FFNs (`families.find_ffns`).
        ids: `[N, W]` calibration tokens for statistics and repairs.
        score: importance from the dense model's statistics.
        kind: one of `KINDS`.
        shares: of each layer's neurons to try, in (0, 1); None for `SHARES`, or a fine grid for an estimate.
        multiple: widths are rounded to it.
        repair: least squares refits the down rows of each narrowed layer; False for the bare cut.
        damping: ridge of the repair, as a share of the mean diagonal of the activations' second moment.
        gram: `score` needs `stats.gram`.
        windows: of `ids`, spread evenly, for which loss or gradients are computed; None for `WINDOWS`.
        seed: of the labels that the estimates draw.
        progress: called as `(stage, done, total)`.

    Raises:
        InputError: a value breaks its rule, or losses, activations or gradients are not finite.
        UnsupportedModelError: the layers do not simply hand one hidden state to the next.
    """
    check_choice(kind, "kind", KINDS)
    tried = tuple(shares) if shares is not None else SHARES[kind] or _FINE
    check(len(tried) > 0 and all(0 < s < 1 for s in tried), "shares", "be one or more shares in (0, 1)", list(tried))
    check(0 < damping < math.inf, "damping", "be positive and finite", damping)
    windows = WINDOWS[kind] if windows is None else windows
    check(windows >= 1, "windows", "be at least 1", windows)
    check(ids.ndim == 2 and ids.shape[1] >= 2, "ids", "be [N, W] with at least 2 tokens a window", tuple(ids.shape))
    check_windows(model, ids, "ids")
    finder = _Finder(model, ffns, ids, score, kind, damping if repair else None, gram, windows, seed, progress)
    rows = []
    for ffn in ffns:
        size = ffn.intermediate_size
        check(size > 1, f"layer {ffn.layer}", "have more than one neuron", size)
        widths = {allocation.round_width(share * size, multiple, size) for share in tried}
        widths = {width for width in widths if width < size} or {max(1, size // 2)}
        rows.append(finder.layer(ffn, sorted(widths)))
    progress("sensitivity of layers", len(ffns), len(ffns))
    return SensitivityCurves(
        kind=kind,
        sizes=tuple(ffn.intermediate_size for ffn in ffns),
        widths=tuple(tuple(row) for row in rows),
        losses=tuple(tuple(row.values()) for row in rows),
        tokens=finder.predicted,
        fingerprint=families.fingerprint(model, ffns),
    )


class _Finder:
    """One run of `curves`: two streams move through the dense model together, one of all windows for statistics, one of
    those whose loss counts.
    """

    def __init__(
        self,
        model: nn.Module,
        ffns: list[FFN],
        ids: Tensor,
        score: Scorer,
        kind: str,
        damping: float | None,
        gram: bool,
        windows: int,
        seed: int,
        progress: Progress,
    ) -> None:
        self._score, self._kind, self._damping, self._gram = score, kind, damping, gram
        self._progress, self._layers = progress, list(families.decoder_layers(model)[1])
        chosen = torch.linspace(0, len(ids) - 1, min(windows, len(ids))).round().long()
        few = ids[chosen]
        self.predicted = few.numel() - len(few)
        if kind == "loss":
            self._rest = _Rest(model, few)
            self._dense = self._rest.dense_loss()
        else:
            self._gradients = output_gradients(model, ffns, few, seed, progress)
        self._stream = LayerStream(model, ffns, ids)
        self._few = LayerStream(model, ffns, few)

    @torch.no_grad()
    def layer(self, ffn: FFN, widths: list[int]) -> dict[int, float]:
        """Width -> growth of the loss, for the layer that both streams stand in front of; they move on."""
        self._progress("sensitivity of layers", ffn.layer, len(self._layers))
        stats = self._stream.statistics(ffn, gram=self._gram or self._damping is not None)
        hidden, activations = _look(self._few, ffn, self._layers[ffn.layer])
        order = self._score(ffn, stats).argsort(descending=True, stable=True)
        if self._kind == "loss":
            found = {width: self._measured(ffn, stats, order[:width].sort().values, hidden) for width in widths}
        else:
            found = self._estimated(ffn, stats, order, activations, widths)
        self._stream.advance()
        self._few.advance()
        return found

    def _measured(self, ffn: FFN, stats: ActivationStats, keep: Tensor, hidden: Tensor) -> float:
        down = None
        if self._damping is not None:
            weights = ffn.weights().down
            down = least_squares(weights, stats, keep.to(weights.device), self._damping).down
        with narrowed(ffn, keep, down):
            return self._rest.loss(ffn.layer, hidden) - self._dense

    def _estimated(
        self, ffn: FFN, stats: ActivationStats, order: Tensor, activations: Tensor, widths: list[int]
    ) -> dict[int, float]:
        gram = None if self._damping is None or stats.gram is None else stats.gram / stats.tokens
        gradients, down = self._gradients[ffn.layer], ffn.weights().down
        total = second_order(self._kind, activations, gradients, down, order, gram, self._damping or 0.0)
        return {width: float(total[width]) / self.predicted for width in widths}
