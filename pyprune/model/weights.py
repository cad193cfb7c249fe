"""What the weights of a model must be before anything is done to them: there, ordinary floats, finite."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..base.errors import UnsupportedModelError, check

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_KNOWN_AS = {"optimum": "quanto"}

# What quantisers set on a module whose weight may still look like an ordinary one.
_MARKS = ("quantization_scheme", "weight_qtype", "weight_fake_quantizer")


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite: the least and the largest tell, sooner than a look at each."""
    if not values.numel() or not values.is_floating_point():
        return True
    return bool(torch.stack(values.aminmax()).isfinite().all())


def check_finite(model: nn.Module) -> None:
    """Raise `InputError` naming the first parameter that has NaN or infinity."""
    for name, parameter in model.named_parameters():
        own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        check(all_finite(own), "model", "have finite weights", f"NaN or infinity in {name}")


_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def checksum(model: nn.Module) -> str:
    """A hex number that tells models apart: names, shapes and dtypes of weights, and sums of their bits, both ways.

    Quick, in two passes over the weights, and the same on every device; no protection against who wants to deceive.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(repr((name, tuple(parameter.shape), str(parameter.dtype))).encode())
        bits = parameter.detach().view(_BITS[parameter.element_size()])
        rows = bits.reshape(len(bits), -1) if bits.ndim else bits.reshape(1, 1)
        for sums in (rows.sum(0, dtype=torch.int64), rows.sum(1, dtype=torch.int64)):
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def sketch(model: nn.Module) -> str:
    """A hex number that tells a model from its fine-tunes, by a sample of every parameter.

    Rounded to bfloat16 first, so that it is one in float32 and bfloat16. Of parameters that are not there it has the
    names.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(repr((name, tuple(parameter.shape))).encode())
        if not parameter.is_meta:
            values = parameter.detach().flatten()[:: max(1, parameter.numel() // 256)]
            digest.update(values.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def check_there(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` when a parameter has no values: on the meta device, or offloaded by hooks."""
    name = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if name is None:
        return
    kind = type(model).__name__
    if any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise UnsupportedModelError(
            f"{kind}: layers carry accelerate hooks that keep weights elsewhere ({name} is offloaded): prune it as it "
            "is (prune), or its folder (pyprune prune --stream); for anything else load the model whole, with a "
            "device_map that names neither 'cpu' beside a GPU nor 'disk'"
        )
    raise UnsupportedModelError(
        f"{kind}: {name} is on the meta device, where it has no values: load the weights first (from_pretrained, or "
        "to_empty and load_state_dict)"
    )


def is_sharded(model: nn.Module) -> bool:
    """Whether some weights are cut over processes (DTensor)."""
    return any(hasattr(p, "placements") for p in model.parameters())


def whole(tensor: Any) -> Tensor:
    """A tensor with all its values: of one that is cut over processes each of them must ask."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "placements") else tensor
    return found


def check_plain(model: nn.Module, layers: nn.Module, prefix: str, sharded: bool = False) -> None:
    """Raise `UnsupportedModelError` when weights in `layers` are quantised, sharded, or computed from others.

    Told by the tensors and modules themselves, whatever wrote them: a dtype, a tensor class, what a quantiser marks.

    Args:
        model: the whole model, which the message names.
        layers: the part of it that is looked at.
        prefix: its path.
        sharded: they may be.
    """
    kind = type(model).__name__
    for name, module in layers.named_modules():
        where = f"{kind}: {prefix}.{name}"
        if (what := _quantised(module)) is not None:
            how = _maker(model, module)
            raise UnsupportedModelError(
                f"{where}: weights are {what} ({how}): load the model unquantised, prune it, then quantise"
            )
        for key, tensor in module._parameters.items():
            if (
                tensor is not None
                and type(tensor) is not nn.Parameter
                and not (sharded and hasattr(tensor, "placements"))
            ):
                raise UnsupportedModelError(
                    f"{where}.{key} is a {type(tensor).__name__}: load the model with plain tensors, whole in one "
                    "process"
                )
        if isinstance(module, nn.Linear | Conv1D) and "weight" not in module._parameters:
            raise UnsupportedModelError(
                f"{where}.weight is computed from other tensors: make it permanent first (torch.nn.utils.prune.remove, "
                "parametrize.remove_parametrizations)"
            )


def _kept_in(tensor: Tensor) -> torch.dtype:
    """The dtype that a tensor is kept in: of one that wraps others, theirs, where that is no ordinary float."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            inner = getattr(tensor, name)
            if isinstance(inner, Tensor) and (dtype := _kept_in(inner)) not in _FLOATS:
                return dtype
    return tensor.dtype


def _quantised(module: nn.Module) -> str | None:
    """What the weights of `module` itself are kept in, where they are quantised, else None."""
    named = [(n, t) for n, t in [*module._parameters.items(), *module._buffers.items()] if t is not None]
    for name, tensor in named:
        parameter = name in module._parameters
        foreign = type(tensor).__module__.partition(".")[0] != "torch"
        odd = _kept_in(tensor) not in _FLOATS or foreign
        if odd and (parameter or "weight" in name):
            return str(_kept_in(tensor)).removeprefix("torch.")
    if hasattr(module, "_packed_params"):
        return "packed"
    return "quantised at every call" if any(getattr(module, mark, None) is not None for mark in _MARKS) else None


def _maker(model: nn.Module, module: nn.Module) -> str:
    """What quantised it: a package, or what the model's config says, and the class."""
    marks = [getattr(module, mark, None) for mark in _MARKS]
    things: list[Any] = [*module._parameters.values(), *module._buffers.values(), *marks, module]
    for thing in things:
        package = type(thing).__module__.partition(".")[0]
        if thing is not None and package not in ("torch", "transformers", "builtins"):
            return _KNOWN_AS.get(package, package)
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    own = type(module)
    return str(getattr(method, "value", method) or f"{own.__module__.partition('.')[0]} {own.__name__}")


@torch.inference_mode(False)
@torch.no_grad()
def leave_inference(model: nn.Module) -> None:
    """Put ordinary tensors of the same values in the place of those that were made in inference mode.

    Others can neither be changed outside that mode nor ever be trained. Tied ones stay tied.
    """
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_inference():
                    places.setdefault(id(tensor), []).append((tensors, name))
    for tied in places.values():
        first, name = tied[0]
        old = first[name]
        new: Tensor = old.detach().clone()
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        for owner, name in tied:
            owner[name] = new
