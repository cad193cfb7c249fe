"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) on the projections of the decoder layers, merged at the end."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..base.errors import InputError, check
from ..model import families


def check_peft() -> None:
    """Raise `InputError` when peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise InputError("mode 'lora' needs the package peft: pip install 'pyprune[recover]'")


def projections(model: nn.Module, ffn_only: bool) -> list[str]:
    """Names of the projections in the decoder layers: of the FFNs, and unless `ffn_only` also of attention.

    Found by structure: every Linear or Conv1D module of a decoder layer.
    """
    list_name, layers = families.decoder_layers(model)
    names = [f"{list_name}.{name}" for name, module in layers.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    if not ffn_only:
        return names
    wanted = {
        ".".join(filter(None, (ffn.name, name)))
        for ffn in families.find_ffns(model)
        for name in (*(name for name, _ in ffn.pattern.inputs), ffn.pattern.down)
    }
    return [name for name in names if name in wanted]


class Adapters:
    """Adapters in a model, whose other parameters are frozen until `merge`.

    Args:
        model: changed in place; its projections get adapters that start as zero.
        targets: names of projections (see `projections`).
        rank: of an adapter's two factors.
        alpha: an adapter's product is multiplied by alpha / rank.

    Raises:
        InputError: peft is not installed, or the model has adapters already.
    """

    def __init__(self, model: nn.Module, targets: list[str], rank: int, alpha: int) -> None:
        check_peft()
        check(not hasattr(model, "peft_config"), "model", "have no adapters yet", type(model).__name__)
        check(bool(targets), "targets", "name at least one projection", targets)
        from peft import LoraConfig, LoraModel

        transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in targets)
        config: Any = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), fan_in_fan_out=transposed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's advice about Conv1D, which holds already
            self._lora: Any = LoraModel(model, config, "default")
        self._model = model

    def merge(self) -> None:
        """Add the adapters to the weights; the model has its ordinary modules again."""
        self._lora.merge_and_unload()
        if hasattr(self._model, "peft_config"):
            del self._model.peft_config
