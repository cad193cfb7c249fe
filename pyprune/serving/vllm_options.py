"""What a user of vLLM's plugin may ask for: `--additional-config '{"pyprune": {...}}'`, which vLLM hands to plugins."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import InputError, check, check_choice

KERNELS = ("auto", "on", "off")


@dataclass(frozen=True)
class VllmOptions:
    """How the plugin runs a model.

    Attributes:
        kernels: whether FFNs run by our operator instead of vLLM's linear layers: `auto` where that was faster when the
            model was loaded, `on` everywhere, `off` nowhere.
        weights: `int8` to keep a copy of the FFNs in int8 for steps of few tokens; None for as they are.
        mask: a file of `Mask.save`; the neurons of the dense checkpoint that it does not keep are not loaded.

    Raises:
        InputError: a value breaks its rule.
    """

    kernels: str = "auto"
    weights: str | None = None
    mask: str | None = None

    def __post_init__(self) -> None:
        check_choice(self.kernels, "kernels", KERNELS)
        check(self.weights in (None, "int8"), "weights", "be 'int8' or left out", self.weights)
        check(self.weights is None or self.kernels != "off", "kernels", "be 'auto' or 'on' with weights", self.kernels)
        there = self.mask is None or (isinstance(self.mask, str) and Path(self.mask).is_file())
        check(there, "mask", "be a file", self.mask)

    @classmethod
    def of(cls, additional_config: Any) -> VllmOptions:
        """From vLLM's `additional_config`; the defaults where nothing is said in it.

        vLLM names stored compilations by it, so where it is an object of another plugin's, to which nothing can be
        added, kernels are off.

        Raises:
            InputError: an unknown option, or a value that breaks its rule.
        """
        if not isinstance(additional_config, dict | None):
            return cls(kernels="off")
        given = (additional_config or {}).get("pyprune", {})
        check(isinstance(given, dict), "additional_config['pyprune']", "be an object", given)
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(given) - set(known)):
            raise InputError(f"additional_config['pyprune'] has {', '.join(known)}; got {', '.join(unknown)}")
        return cls(**given)

    def with_adapters(self) -> VllmOptions:
        """The same where vLLM puts adapters (LoRA) on its linear layers, which must then be there.

        Raises:
            InputError: kernels are asked for.
        """
        check(self.kernels != "on" and not self.weights, "kernels", "be 'auto' or 'off' with LoRA adapters", self)
        return dataclasses.replace(self, kernels="off")
