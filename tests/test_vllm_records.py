"""FFNs from records in vLLM, beside a stand-in for its linear layers; see test_engines.py for vLLM itself."""

from __future__ import annotations

import gc
import json
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from pyprune.base.errors import InputError, UnsupportedModelError
from pyprune.ffn import native
from pyprune.serving import vllm_contest, vllm_ffn, vllm_plugin
from pyprune.serving.vllm_contest import take_over
from pyprune.serving.vllm_options import VllmOptions

D, WIDTHS = 32, (64, 64, 90)
needs_kernels = pytest.mark.skipif(native.load() is not None, reason=str(native.load()))


class UnquantizedLinearMethod:
    """As vLLM's on a CPU: it packs the weight for a library and drops it."""

    def process_weights_after_loading(self, layer: Any) -> None:
        if layer.weight.ndim == 2:
            layer.packed, layer.weight = layer.weight.detach().clone(), nn.Parameter(torch.empty(0))

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.linear(x, layer.packed, bias)


class Linear(nn.Module):
    tp_size = 1

    def __init__(self, size: int, out: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.randn(out, size) * size**-0.5).to(dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(out).to(dtype), requires_grad=False) if bias else None
        self.quant_method: Any = UnquantizedLinearMethod()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.quant_method.apply(self, x, self.bias), None


class MergedColumnParallelLinear(Linear):
    def __init__(self, size: int, width: int, *rest: Any) -> None:
        super().__init__(size, 2 * width, *rest)
        self.output_sizes = [width, width]


class RowParallelLinear(Linear):
    pass


class SiluAndMul(nn.Module):
    @staticmethod
    def forward_native(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return functional.silu(gate) * up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_native(x)


class MLP(nn.Module):
    factor = 1.0

    def __init__(self, width: int, *rest: Any) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(D, width, *rest)
        self.down_proj = RowParallelLinear(width, D, *rest)
        self.act_fn = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.act_fn(self.gate_up_proj(x)[0])
        return self.down_proj(self.factor * hidden)[0]


class Model(nn.Module):
    def __init__(self, bias: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(MLP(width, bias, dtype) for width in WIDTHS)

    def pack(self) -> Model:
        """What vLLM does at the end of loading."""
        for module in self.modules():
            if hasattr(module, "quant_method"):
                module.quant_method.process_weights_after_loading(module)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    linear: Any = types.ModuleType("vllm.model_executor.layers.linear")
    for kind in (MergedColumnParallelLinear, RowParallelLinear, UnquantizedLinearMethod):
        setattr(linear, kind.__name__, kind)
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.layers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, linear.__name__, linear)


def raced(monkeypatch: pytest.MonkeyPatch, ours: dict[int, float]) -> None:
    """Let a record take `ours[tokens]` seconds, and vLLM's layers one."""
    monkeypatch.setattr(vllm_contest, "_race", lambda own, records, dtype, tokens, backend: (1.0, ours[tokens]))


def x_of(tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def kinds(model: Model) -> list[str]:
    return [type(layer).__name__ for layer in model.layers]


def compiled(model: nn.Module) -> Any:
    """As vLLM compiles on a CPU: once for every number of tokens."""
    return torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")


@needs_kernels
@pytest.mark.parametrize("bias", [False, True])
def test_records_take_the_place_of_layers(bias: bool) -> None:
    model, own = Model(bias), Model(bias).pack()
    found = take_over(model, VllmOptions(kernels="on"))
    assert {outcome.way for outcome in found.values()} == {"record"} and len(found) == 2
    assert kinds(model.pack()) == ["RecordFFN"] * 3
    assert not any(isinstance(module, Linear) for module in model.modules())  # nothing is held twice
    with torch.no_grad():
        for run in (model, compiled(model)):
            for tokens in (1, 5, 300):
                torch.testing.assert_close(run(x_of(tokens)), own(x_of(tokens)), rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize(
    ("ours", "way"),
    [
        ({1: 0.96}, "own"),
        ({1: 0.9, 4: 0.9, 16: 1.1}, "own"),
        ({1: 0.9, 4: 0.9, 16: 1.0, 64: 1.0, 256: 1.02}, "record"),
    ],
)
def test_a_record_must_not_be_slower_anywhere(ours: dict[int, float], way: str, monkeypatch: Any) -> None:
    raced(monkeypatch, ours)
    model = Model()
    assert {outcome.way for outcome in take_over(model, VllmOptions()).values()} == {way}
    assert kinds(model) == ["MLP" if way == "own" else "RecordFFN"] * 3
    with torch.no_grad():
        torch.testing.assert_close(model.pack()(x_of(3)), Model().pack()(x_of(3)), rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize(
    ("ours", "spans", "told"),
    [
        ({1: 0.5, 2: 0.6, 4: 0.7}, [(1, 4)], "int8 rows for 1 to 4 tokens"),
        ({4: 1.2, 8: 0.9, 32: 0.5}, [(5, 8), (17, 32)], "int8 rows for 5 to 8, 17 to 32 tokens"),
    ],
)
def test_int8_rows_beside_layers_serve_what_they_are_faster_for(
    ours: dict[int, float], spans: list[tuple[int, int]], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raced(monkeypatch, dict.fromkeys(vllm_contest.FEW, 1.0) | ours)
    dtype = torch.bfloat16
    model, own = Model(dtype=dtype), Model(dtype=dtype).pack()
    (first, *_) = take_over(model, VllmOptions(weights="int8")).values()
    assert first.way == "beside" and first.spans == [range(a, b + 1) for a, b in spans]
    assert str(first).startswith(told)
    with torch.no_grad():
        for run in (model.pack(), compiled(model)):
            for tokens in (1, 4, 5, 8, 9, 16, 17, 32, 33):
                x, served = x_of(tokens, dtype), any(a <= tokens <= b for a, b in spans)
                assert torch.equal(run(x), own(x)) != served
                assert apart(run(x), own(x)) < 0.03


@needs_kernels
def test_kernels_that_are_asked_for_and_slower_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    raced(monkeypatch, {1: 0.5, 4: 1.02, 16: 1.1, 64: 1.5, 256: 1.0})
    model = Model()
    take_over(model, VllmOptions(kernels="on", weights="int8"))
    assert kinds(model) == ["RecordFFN"] * 3 and not any(isinstance(module, Linear) for module in model.modules())
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 2 and all(line.endswith("is slower than vLLM's layers for 16, 64 tokens") for line in said)


@needs_kernels
def test_stored_compilations_are_named_by_what_the_race_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM loads a stored graph without checks, and in it an operator knows its FFN by a key."""
    given, found = {"pyprune": {"weights": "int8"}}, []
    for faster in (WIDTHS, WIDTHS[2:], ()):

        def race(own: Any, records: Any, *rest: Any, faster: Any = faster) -> tuple[float, float]:
            return (1.0, 0.5 if len(records[0].rows) in faster else 2.0)

        monkeypatch.setattr(vllm_contest, "_race", race)
        model: Any = Model()
        model.vllm_config = config = types.SimpleNamespace(additional_config=given)
        model._pyprune_options = VllmOptions.of(given)
        vllm_plugin._packed(lambda model: None)(model)
        found.append(json.dumps(config.additional_config))
        assert VllmOptions.of(config.additional_config) == VllmOptions(weights="int8")
    assert len(set(found)) == 3 and found[2] == json.dumps(given) == json.dumps({"pyprune": {"weights": "int8"}})


@needs_kernels
def test_no_options_or_an_object_in_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    raced(monkeypatch, dict.fromkeys(vllm_contest.TOKENS, 0.5))
    # Through an object of another plugin's nothing could be told to vLLM's compiler.
    for given, kind in ((None, "RecordFFN"), (types.SimpleNamespace(compute_hash=str), "MLP")):
        model: Any = Model()
        model.vllm_config = types.SimpleNamespace(additional_config=given)
        model._pyprune_options = VllmOptions.of(given)
        vllm_plugin._packed(lambda model: None)(model)
        assert kinds(model) == [kind] * 3
        assert (model.vllm_config.additional_config is given) == (kind == "MLP")


@needs_kernels
def test_a_model_that_is_gone_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    raced(monkeypatch, dict.fromkeys(vllm_contest.FEW, 0.5))
    before, model = len(vllm_ffn._BESIDE), Model(dtype=torch.bfloat16)
    take_over(model, VllmOptions(weights="int8"))
    assert len(vllm_ffn._BESIDE) == before + 3
    del model
    gc.collect()
    assert len(vllm_ffn._BESIDE) == before


@needs_kernels
def test_int8_rows_alone() -> None:
    model, own = Model(), Model().pack()
    take_over(model, VllmOptions(kernels="on", weights="int8"))
    assert kinds(model) == ["RecordFFN"] * 3 and model.layers[0].rows.dtype == torch.int8
    with torch.no_grad():
        for tokens in (1, 300):
            assert apart(model(x_of(tokens)), own(x_of(tokens))) < 0.03


@needs_kernels
def test_both_are_timed() -> None:
    model = Model()
    found = take_over(model, VllmOptions(weights="int8"))
    assert all(min(times) > 0 for outcome in found.values() for times in outcome.times.values())
    assert all(1 in outcome.times for outcome in found.values())


@needs_kernels
def test_what_computes_something_else_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    raced(monkeypatch, dict.fromkeys(vllm_contest.TOKENS, 0.1))
    monkeypatch.setattr(MLP, "factor", 1.5)
    model = Model()
    assert {outcome.way for outcome in take_over(model, VllmOptions()).values()} == {"own"}
    with pytest.raises(UnsupportedModelError, match=r"layers.0 computes something else, 0.[0-9]+ from a plain FFN"):
        take_over(Model(), VllmOptions(kernels="on"))


def test_where_kernels_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    sharded, quantised, odd = Model(), Model(), Model()
    for layer in sharded.layers:
        layer.down_proj.tp_size = 2
    for layer in quantised.layers:
        layer.gate_up_proj.quant_method = object()
    for layer in odd.layers:
        layer.norm = nn.Identity()
    for model in (sharded, quantised, odd):
        assert vllm_ffn.find(model) == [] and take_over(model, VllmOptions()) == {}
        with pytest.raises(InputError, match="cannot run in this vLLM: no FFN in vLLM's own classes has whole"):
            take_over(model, VllmOptions(kernels="on"))
    monkeypatch.setattr(native, "load", lambda: "native CPU library not built: no compiler")
    assert take_over(Model(), VllmOptions()) == {}
    with pytest.raises(InputError, match=r"cannot run in this vLLM: native CPU library not built: no compiler"):
        take_over(Model(), VllmOptions(weights="int8"))
    assert take_over(Model(), VllmOptions(kernels="off")) == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kernel": "on"}, "has kernels, weights, mask; got kernel"),
        ({"kernels": "yes"}, "kernels must be one of auto, on, off; got 'yes'"),
        ({"weights": "int4"}, "weights must be 'int8' or left out"),
        ({"weights": ["int8"]}, "weights must be 'int8' or left out"),
        ({"weights": "int8", "kernels": "off"}, "kernels must be 'auto' or 'on' with weights"),
        ({"mask": "/nowhere"}, "mask must be a file; got '/nowhere'"),
        ("on", "must be an object; got 'on'"),
    ],
)
def test_bad_options(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        VllmOptions.of({"pyprune": given})
    assert VllmOptions.of({}) == VllmOptions.of(None) == VllmOptions()


def test_adapters_need_layers() -> None:
    assert VllmOptions().with_adapters() == VllmOptions(kernels="off")
    for asked in (VllmOptions(kernels="on"), VllmOptions(weights="int8")):
        with pytest.raises(InputError, match="kernels must be 'auto' or 'off' with LoRA adapters; got VllmOptions"):
            asked.with_adapters()
