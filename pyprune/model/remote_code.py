"""The file of code that a checkpoint whose widths differ by layer carries, and who writes it.

A config that names such a file (`auto_map`) and a folder without it cannot be loaded, so both are written together, and
whoever saves: `checkpoint.save`, a Trainer, or a plain `save_pretrained`, which all save the config.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig

from . import heterogeneous

FILE = "modeling_pyprune.py"
_MODULE = Path(FILE).stem
_AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)


def classes(config: Any) -> dict[str, str]:
    """Transformers' classes of the config's family, by their auto class."""
    mappings = {name: getattr(transformers, name)._model_mapping for name in _AUTO_CLASSES}
    return {name: mapping[type(config)].__name__ for name, mapping in mappings.items() if type(config) in mapping}


def _source(names: set[str]) -> str:
    """A copy of `heterogeneous`, and under the names of Transformers' classes those that build differing widths."""
    imports = f"from transformers import {', '.join(sorted(names))}  # noqa: E402"
    made = "\n".join(f"{name} = pruned_class({name})" for name in sorted(names))
    return f"{inspect.getsource(heterogeneous)}\n\n{imports}\n\n{made}\n"


def write(config: Any, folder: str | Path) -> None:
    """Where widths differ: name the file in the config and write it into `folder`. Else: no longer name it."""
    named = getattr(config, "auto_map", None) or {}
    if not heterogeneous.parts(config):
        if any(str(reference).startswith(f"{_MODULE}.") for reference in named.values()):
            del config.auto_map
        return
    found = classes(config)
    config.auto_map = {auto: f"{_MODULE}.{name}" for auto, name in found.items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / FILE).write_text(_source(set(found.values())), encoding="utf-8")


def install() -> None:
    """Let every config that is saved in this process take the file along where its widths differ."""
    if getattr(PreTrainedConfig, "_pyprune_saves", False):
        return
    save = PreTrainedConfig.save_pretrained

    @functools.wraps(save)
    def wrapped(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if not Path(save_directory).is_file():  # which Transformers refuses
            write(self, save_directory)
        return save(self, save_directory, *args, **kwargs)

    hooked: Any = PreTrainedConfig
    hooked.save_pretrained = wrapped
    hooked._pyprune_saves = True
