"""A pruned checkpoint through torch's own exporter, executed by ONNX Runtime and by OpenVINO.

`make engines` installs both and runs this.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyprune import accelerate, prune

pytestmark = pytest.mark.engine


class Logits(nn.Module):
    """What is exported of a causal LM: token ids in, logits out, without a cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def by_onnx_runtime(file: Path) -> Callable[[Tensor], Any]:
    session = importlib.import_module("onnxruntime").InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda tokens: session.run(None, {session.get_inputs()[0].name: tokens.numpy()})[0]


def by_openvino(file: Path) -> Callable[[Tensor], Any]:
    # In float32, for its own choice on this CPU may be bfloat16.
    compiled = (
        importlib.import_module("openvino").Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    )
    return lambda tokens: compiled(tokens.numpy())[0]


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("widths", [(64, 64, 64), (64, 90, 32)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_exported_model_gives_the_same_logits(
    family: str,
    widths: tuple[int, ...],
    accelerated: bool,
    tiny: Callable[..., Any],
    random_mask: Callable[..., Any],
    ids: Tensor,
    tmp_path: Path,
) -> None:
    model, file = tiny(family), tmp_path / "model.onnx"
    prune(model, mask=random_mask(model, widths), repair=None)
    with torch.no_grad():
        wanted = [model(tokens).logits for tokens in (ids, ids[:1, :5])]
    if accelerated:
        accelerate(model)
    shapes = {"input_ids": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=64)}}
    exported = torch.onnx.export(Logits(model).eval(), (ids,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert exported is not None
    exported.save(file)
    for run in (by_onnx_runtime(file), by_openvino(file)):
        for tokens, logits in zip((ids, ids[:1, :5]), wanted, strict=True):
            torch.testing.assert_close(torch.tensor(run(tokens)), logits, rtol=1e-4, atol=1e-4)
