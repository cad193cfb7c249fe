"""Where a model's FFNs are: detection by structure (see `patterns`), never by the name of a model.

What matches a pattern is then tried out (see `probe`): it must compute a plain or gated FFN with one of the activations
of `reference.ACTIVATIONS`; so a shape that only looks familiar (an extra norm, a multiplier, a hidden residual) is
refused instead of silently changed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..base import reference
from ..base.errors import UnsupportedModelError
from .experts import Bank, computes, find_bank
from .patterns import PATTERNS, FFNWeights, Pattern, match, projections
from .probe import detect_activation, prunable
from .towers import decoder_layers, stacks
from .units import FFN, OWN, Expert
from .weights import check_plain, check_there, leave_inference, whole
from .widths import BIAS_KEYS, WIDTH_KEYS, bias_key, ffn_block, has_width, plain, width_key

__all__ = [
    "BIAS_KEYS",
    "FFN",
    "WIDTH_KEYS",
    "Expert",
    "bias_key",
    "candidates",
    "decoder_layers",
    "ffn_block",
    "find_ffns",
    "find_plain",
    "fingerprint",
    "has_width",
    "width_key",
]

# Names of parts of a layer that say that it is an FFN: a layer that has one that is not known is not passed over.
_ROUTES = re.compile(r"(^|\.)(router|gate|gating)\.")  # what stands in a router is left alone
_CALLED_FFN = re.compile(r"mlp|ffn|ff|feed_?forward|moe|block_sparse_moe|experts?|fc\d?|channel_mix", re.IGNORECASE)


def _wide_norm(layer: nn.Module, width: int, hidden_size: int) -> str | None:
    """The name of a norm over the neurons of an in-layer FFN, which no module call would reveal, or None."""
    if width == hidden_size:
        return None
    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.shape == (width,):
            return name
    return None


def _describe(layer: nn.Module) -> str:
    """What a layer without a known FFN holds, for the refusal."""
    for name, module in layer.named_modules():
        if name and (hasattr(module, "experts") or "experts" in type(module).__name__.lower()):
            return f"a mixture of experts, {name} ({type(module).__name__})"
    kinds = [
        f"{name} ({type(module).__name__}: {', '.join(n for n, _ in module.named_children()) or 'no children'})"
        for name, module in layer.named_children()
    ]
    return "; ".join(kinds)


@torch.inference_mode(False)
@torch.no_grad()
def find_ffns(model: nn.Module, absent: bool = False, sharded: bool = False) -> list[FFN]:
    """Find the FFNs of every decoder layer, in order; of a mixture each expert is one (`units.Expert`).

    Of a model with several towers, those of the text's (see `towers.stacks`); of an encoder-decoder those of both
    sides. A layer may have none, or several; what several layers run is found once. Tensors of the model that were
    made in inference mode become ordinary ones, of the same values. With `absent` weights need not be there: an FFN is
    tried out with others anyway. With `sharded` they may be cut over processes.

    Raises:
        UnsupportedModelError: no decoder layers, or several lists that may be meant; weights that are not there or no
            ordinary floats (see `weights`); no layer with a known FFN, or a layer with an unknown one: an unknown shape
            or layout of experts, or neurons that are not computed each without the others.
    """
    found: list[FFN] = []
    for number, (list_name, layers) in enumerate(stacks(model)):
        for i, layer in enumerate(layers):
            if any(hasattr(m, "record") for m in layer.modules()):
                raise UnsupportedModelError(
                    f"{list_name}.{i} is accelerated already; prune the loaded checkpoint first, then accelerate it"
                )
        if number == 0 and not absent:
            check_there(model)
        check_plain(model, layers, list_name, sharded)
        leave_inference(model)
        _add_stack(model, found, number, list_name, layers)
    _check_shared(model, found)
    return found


def find_plain(model: nn.Module, what: str) -> list[FFN]:
    """`find_ffns` of a model whose layers each have one FFN of one form, with an activation that records know.

    Args:
        what: asks for that, as the message says.

    Raises:
        UnsupportedModelError: as `find_ffns`, or another kind of model.
    """
    found = find_ffns(model)
    if not plain(model, found) or any(ffn.activation == OWN for ffn in found):
        raise UnsupportedModelError(
            f"{what} takes models whose layers each have one FFN of one form, with one of the activations "
            f"{', '.join(reference.ACTIVATIONS)}; {type(model).__name__} is none (see docs/families.md)"
        )
    return found


def _add_stack(model: nn.Module, found: list[FFN], number: int, list_name: str, layers: nn.ModuleList) -> None:
    """Add the FFNs of one list of layers."""
    kind = type(model).__name__
    empty: list[int] = []
    seen = {id(ffn.holder): i for i, ffn in enumerate(found)}
    start = len(found)
    for i, layer in enumerate(layers):
        prefix = f"{list_name}.{i}"
        here = candidates(layer)
        for name, module, pattern in here:
            where = f"{prefix}.{name}".rstrip(".")
            if id(module) in seen:
                known = seen[id(module)]
                for j in range(known, len(found)):
                    if found[j].holder is module:
                        object.__setattr__(found[j], "shared", True)
                continue
            seen[id(module)] = len(found)
            assert pattern is not None
            if isinstance(pattern, Bank):
                bank = Bank(where, *list(vars(pattern).values())[1:])
                if not computes(bank):
                    raise UnsupportedModelError(
                        f"{kind}: {where} ({type(module).__name__}) holds a mixture of experts, but does not compute "
                        f"what its tensors {bank.layout.up} and {bank.layout.down} say; its form may be added to "
                        "`experts.LAYOUTS` (see CONTRIBUTING.md)"
                    )
                found += [Expert.of(bank, e, len(found) + e, number, i) for e in range(bank.experts)]
                continue
            if (same := _same_weights(found, module, pattern)) is not None:
                object.__setattr__(same, "shared", True)
                object.__setattr__(same, "twins", (*same.twins, (where, module)))
                continue
            activation = _activation(kind, where, module, pattern)
            if any("." in n for n, _ in pattern.inputs):
                activation = OWN  # its modules do not stand side by side, as a `PrunedMLP` has them
            ffn = FFN(len(found), where, module, pattern, activation, number, i, _group(layer, prefix, name))
            if pattern.in_layer and (norm := _wide_norm(layer, ffn.intermediate_size, ffn.hidden_size)):
                raise UnsupportedModelError(f"{kind}: {prefix} has a norm over its neurons, {norm}")
            found.append(ffn)
        if not here:
            empty.append(i)
    kinds = {type(ffn.holder) for ffn in found[start:]}
    for i in empty:
        _check_empty(model, layers[i], f"{list_name}.{i}", kinds)


def _same_weights(found: list[FFN], module: nn.Module, pattern: Pattern) -> FFN | None:
    """The FFN that has all the parameters of a module, as where layers are tied, or None."""
    own = {id(p) for p in FFN(0, "", module, pattern, OWN).parameters()}
    return next((f for f in found if f.pattern is pattern and own == {id(p) for p in f.parameters()}), None)


def candidates(layer: nn.Module) -> list[tuple[str, nn.Module, Pattern | Bank | None]]:
    """(path, module, pattern or bank) of everything in a layer that looks like an FFN, none inside another.

    What runs from records has None.
    """
    found: list[tuple[str, nn.Module, Pattern | Bank | None]] = []
    for name, module in layer.named_modules():
        if any(name.startswith(f"{outer}.") for outer, _, _ in found if outer) or _ROUTES.search(name):
            continue
        swapped = hasattr(module, "record")
        pattern = None if swapped else find_bank(name, module) or match(module, in_layer=not name)
        if swapped or pattern is not None:
            found.append((name, module, pattern))
    return found


def _group(layer: nn.Module, prefix: str, name: str) -> str:
    """The path of the list of experts that an FFN module is in, or its own."""
    parent = name.rpartition(".")[0]
    inside = parent and isinstance(layer.get_submodule(parent), nn.ModuleList | nn.ModuleDict)
    several = inside and sum(1 for m in layer.get_submodule(parent).children() if match(m)) > 1
    return f"{prefix}.{parent if several else name}".rstrip(".")


def _activation(kind: str, where: str, module: nn.Module, pattern: Pattern) -> str:
    """What `FFN.activation` says, for a module that matches a pattern.

    Raises:
        UnsupportedModelError: it does not compute an FFN whose neurons may be removed.
    """
    found = detect_activation(module, pattern)
    if found is not None:
        return found
    if prunable(module, pattern):
        return OWN
    norm = _wide_norm(module, projections(module, pattern).down.shape[0], 0)
    why = f": {norm}, a norm over all neurons, makes each depend on the others" if norm else ""
    raise UnsupportedModelError(
        f"{kind}: {where} ({type(module).__name__}, {pattern.name}) does not compute "
        f"a {'gated' if pattern.gated else 'plain'} FFN with one of {', '.join(reference.ACTIVATIONS)}, "
        f"nor one whose neurons could be removed one by one{why}: this model cannot be pruned by neurons"
    )


def _check_empty(model: nn.Module, layer: nn.Module, prefix: str, kinds: set[type]) -> None:
    """Raise `UnsupportedModelError` for a layer that has an unknown FFN and no known one, or where no layer has one.

    Args:
        kinds: classes of the FFNs of other layers.
    """
    _check_adapted(model, layer, prefix)
    own = [n for n, m in layer.named_children() if _CALLED_FFN.fullmatch(n) and list(m.parameters())]
    own += [n for n, m in layer.named_modules() if type(m) in kinds]
    if kinds and not own:
        return
    found, known = _describe(layer), "its form may be added to `patterns.PATTERNS` (see CONTRIBUTING.md)"
    hint = (
        known
        if own or "experts" in found
        else "where a mixer is all that a layer has, there are no FFN neurons to prune"
    )
    raise UnsupportedModelError(
        f"{type(model).__name__}: {prefix} has no FFN that pyprune knows; found {found}; {hint}"
    )


def _check_adapted(model: nn.Module, layer: nn.Module, prefix: str) -> None:
    """Raise `UnsupportedModelError` when projections of an FFN in `layer` are wrapped by adapters."""
    known = {name for pattern in PATTERNS for name in (*(n for n, _ in pattern.inputs), pattern.down)}
    for name, module in layer.named_modules():
        if hasattr(module, "base_layer") and name.rpartition(".")[2] in known:
            raise UnsupportedModelError(
                f"{type(model).__name__}: {prefix}.{name} carries adapters ({type(module).__module__}): merge them "
                "first (merge_and_unload), or adapt the attention only"
            )


def _check_shared(model: nn.Module, ffns: list[FFN]) -> None:
    owner: dict[int, str] = {}
    for ffn in ffns:
        name = ffn.group if isinstance(ffn, Expert) else ffn.name
        for parameter in ffn.parameters():
            other = owner.setdefault(id(parameter), name)
            if other != name:
                raise UnsupportedModelError(
                    f"{type(model).__name__}: {other} and {name} share weights, so they cannot be pruned apart"
                )


def fingerprint(model: nn.Module, ffns: list[FFN]) -> str:
    """A hex SHA-256 that names a dense model: its type, its FFN shapes, and a sample of every FFN's weights.

    Weights are rounded to bfloat16 first, so a checkpoint has one fingerprint whether it is loaded in float32 or
    in bfloat16. The sample is at least 4096 values (all, of fewer) of each part of each layer, evenly spread.
    """
    return fingerprint_of(model, (sample(ffn) for ffn in ffns))


def fingerprint_of(model: nn.Module, samples: Iterable[bytes]) -> str:
    """`fingerprint`, of the samples of the model's FFNs in order."""
    digest = hashlib.sha256()
    digest.update(str(getattr(model.config, "model_type", "")).encode())
    for part in samples:
        digest.update(part)
    return digest.hexdigest()


def sample(ffn: FFN) -> bytes:
    """What an FFN has a part in `fingerprint` with."""
    return sample_of(ffn.layer, ffn.gated, ffn.weights())


def sample_of(layer: int, gated: bool, weights: FFNWeights) -> bytes:
    """`sample`, of the weights of FFN number `layer`."""
    found = [repr((layer, gated, tuple(weights.down.shape))).encode()]
    for part in weights.parts:
        step = max(1, part.numel() // 4096)
        rows, columns = _spread(part.shape, step)
        values = whole(part.detach())[rows.to(part.device), columns.to(part.device)]
        found.append(values.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return b"".join(found)


def _spread(shape: torch.Size, step: int) -> tuple[Tensor, Tensor]:
    flat = torch.arange(0, shape[0] * shape[1], step)
    return flat // shape[1], flat % shape[1]
