"""What is found once about a model and handed down."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import nn

from . import families


class Described:
    """A model, with what its structure says; what is asked is computed once, of the model as it is then.

    Args:
        model: a causal LM of Transformers.

    Attributes:
        ffns: its FFNs (`families.find_ffns`).
        sizes: their widths F.

    Raises:
        UnsupportedModelError: an FFN that pyprune does not know, or an accelerated model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.ffns = families.find_ffns(model)
        self.sizes = [ffn.intermediate_size for ffn in self.ffns]

    @cached_property
    def block(self) -> dict[str, Any]:
        """What the config must say of FFNs whose widths differ (`families.ffn_block`)."""
        return families.ffn_block(self.model, self.ffns)

    @cached_property
    def fingerprint(self) -> str:
        """Of the FFNs' weights (`families.fingerprint`)."""
        return families.fingerprint(self.model, self.ffns)
