"""The `pyprune` block of a model's config: how the model was made. Nothing else writes it."""

from __future__ import annotations

import copy
import json
from typing import Any

from torch import nn

from ..base.errors import InputError


def read(config: Any) -> dict[str, Any]:
    """The block of a config; empty where there is none."""
    block: dict[str, Any] = getattr(config, "pyprune", None) or {}
    return block


def check_json(facts: dict[str, Any] | None) -> dict[str, Any]:
    """`facts` from outside, none as empty.

    Raises:
        InputError: they hold something else than JSON values.
    """
    try:
        json.dumps(facts)
    except (TypeError, ValueError) as error:
        raise InputError(f"provenance must hold JSON values only; {error}") from error
    return facts or {}


def write(model: nn.Module, base_fingerprint: str, facts: dict[str, Any], **entries: Any) -> None:
    """Say how the model was made: `facts`, from the model with `base_fingerprint`; `entries` go beside them."""
    _set(model.config, {"base_fingerprint": base_fingerprint, "provenance": facts, **entries})


def add_recovery(model: nn.Module, facts: dict[str, Any]) -> None:
    """Append one recovery to those the model had."""
    _set(model.config, {"recovery": [*read(model.config).get("recovery", []), copy.deepcopy(facts)]})


def set_ffn(config: Any, block: dict[str, Any] | None) -> None:
    """Say how FFNs whose widths differ by layer are to be built (`families.ffn_block`); None where they do not."""
    rest = {k: v for k, v in read(config).items() if k != "ffn"}
    config.pyprune = rest if block is None else {**rest, "ffn": block}


def forget_nested(config: Any) -> None:
    """Drop what is said of nested widths."""
    if "nested" in read(config):
        config.pyprune = {k: v for k, v in read(config).items() if k != "nested"}


def _set(config: Any, entries: dict[str, Any]) -> None:
    config.pyprune = {**read(config), **entries}
