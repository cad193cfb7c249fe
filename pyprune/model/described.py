"""What is found once about a model and handed down."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..base.errors import UnsupportedModelError
from . import families, widths
from .units import Expert


class Described:
    """A model, with what its structure says; what is asked is computed once, of the model as it is then.

    Args:
        model: a causal LM of Transformers.
        absent: its weights may be on the meta device, and come when they are needed (see `pages`).

    Attributes:
        ffns: its FFNs (`families.find_ffns`).
        sizes: their widths F.

    Raises:
        UnsupportedModelError: an FFN that pyprune does not know, or an accelerated model.
    """

    def __init__(self, model: nn.Module, absent: bool = False) -> None:
        self.model = model
        self.ffns = families.find_ffns(model, absent)
        self.sizes = [ffn.intermediate_size for ffn in self.ffns]

    @cached_property
    def plain(self) -> bool:
        """Whether the model has one list of layers, each of which has one FFN, all of one form."""
        return widths.plain(self.model, self.ffns)

    @property
    def streamed(self) -> bool:
        """Whether no FFN is run by several layers, and there is one list of layers: so text may go layer by layer."""
        encodes = getattr(self.model.config, "is_encoder_decoder", False)
        return not encodes and not any(ffn.shared or ffn.stack for ffn in self.ffns)

    @property
    def device(self) -> torch.device:
        """Where the first weights are that have values."""
        return next(p.device for p in self.model.parameters() if not p.is_meta)

    @property
    def experts(self) -> list[Expert]:
        """Those of its FFNs that are experts of a bank."""
        return [ffn for ffn in self.ffns if isinstance(ffn, Expert)]

    def check_plain(self, what: str) -> None:
        """Raise `UnsupportedModelError`, naming `what` asks for it, where the model is not `plain`."""
        if not self.plain:
            raise UnsupportedModelError(
                f"{what} needs a model whose layers each have one FFN of one form; {type(self.model).__name__} has "
                "layers without one, several in one, experts, or an encoder beside its decoder: use structure "
                "'neurons' with allocation 'uniform' or 'global'"
            )

    def check_layered(self, what: str) -> None:
        """Raise `UnsupportedModelError`, naming `what` asks for it, where FFNs are not reached layer by layer."""
        if not self.streamed or any(ffn.expert and not isinstance(ffn, Expert) for ffn in self.ffns):
            raise UnsupportedModelError(
                f"{what} needs one list of layers, and experts in tensors; {type(self.model).__name__} has an encoder "
                "beside its decoder, a block that several layers run, or experts in a list of modules: use structure "
                "'neurons' with allocation 'uniform' or 'global'"
            )

    @cached_property
    def block(self) -> dict[str, Any]:
        """What the config must say of FFNs whose widths differ (`families.ffn_block`)."""
        return families.ffn_block(self.model, self.ffns)

    @cached_property
    def fingerprint(self) -> str:
        """Of the FFNs' weights (`families.fingerprint`)."""
        return families.fingerprint(self.model, self.ffns)
