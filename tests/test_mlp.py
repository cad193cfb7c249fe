"""PrunedMLP: built from dense modules, trained, saved, loaded, moved, compiled."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from pyprune import BackendError, InputError, KeepIndex, PrunedMLP, UnsupportedModelError, accelerate
from pyprune.base import reference
from pyprune.base.record import Record
from pyprune.ffn.mlp import pack
from pyprune.ffn.quantisation import WEIGHTS, quantise, widened
from pyprune.model import patterns
from pyprune.model.families import find_ffns
from pyprune.model.heterogeneous import layer_widths
from pyprune.model.patterns import FFNWeights

KEEP = KeepIndex([0, 3, 4, 40, 77, 95], 96)
MODULES = ("llama", "phi3", "gpt2", "gptj", "gpt_neox", "starcoder2", "nemotron", "lfm2", "falcon")


def dense_and_path(tiny, name):
    model = tiny(name)
    ffn = find_ffns(model)[0]
    return ffn.holder, ffn


def cut_dense(ffn, x, keep=KEEP):
    """The dense module's output with the removed neurons silenced."""
    module = copy.deepcopy(ffn.holder)
    removed = torch.ones(96, dtype=torch.bool)
    removed[keep.neurons.long()] = False
    with torch.no_grad():
        patterns.projections(module, ffn.pattern).down[removed] = 0
    return module(x)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("mode", ["compact", "gather"])
def test_from_dense_equals_the_masked_dense_module(name, mode, tiny):
    module, ffn = dense_and_path(tiny, name)
    before = copy.deepcopy(module.state_dict())
    pruned = PrunedMLP.from_dense(module, KEEP, mode)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(pruned(x), cut_dense(ffn, x))
    assert pruned.record.shape == (6 if mode == "compact" else 96, 32 * (3 if ffn.gated else 2))
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    with torch.no_grad():
        pruned.record.zero_()  # shares no memory with the module it came from
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


@pytest.mark.parametrize("name", MODULES)
def test_whole_module_without_keep(name, tiny):
    module, ffn = dense_and_path(tiny, name)
    x = torch.randn(3, 32)
    for source in (module, ffn):
        torch.testing.assert_close(PrunedMLP.from_dense(source)(x), module(x))


@given(st.integers(1, 9), st.integers(1, 12), st.booleans(), st.booleans(), st.data())
@settings(max_examples=30, deadline=None)
def test_pack_and_unpack_round_trip(d, f, gated, biased, data):
    sizes = [(f, d)] * (3 if gated else 2) + [(f,)] * ((2 if gated else 1) if biased else 0)
    tensors = [torch.randn(s) for s in sizes]
    gate = tensors.pop() if gated and not biased else (tensors.pop(2) if gated else None)
    up, down, *biases = tensors
    weights = FFNWeights(up, down, gate, *([biases[0], biases[1] if gated else None] if biased else []))
    keep = torch.tensor(sorted(data.draw(st.sets(st.integers(0, f - 1), min_size=1))))
    record, neuron_bias = pack(weights, keep)
    assert record.is_contiguous()
    for part, packed in zip(weights.parts, record.split(d, dim=1), strict=True):
        assert torch.equal(part[keep], packed)
    if not biased:
        assert neuron_bias is None
    else:
        for bias, packed in zip(weights.input_biases, neuron_bias.unbind(1), strict=True):
            assert torch.equal(bias[keep], packed)


@pytest.mark.parametrize("name", MODULES)
def test_state_dict_is_the_familys_own(name, tiny):
    module, _ = dense_and_path(tiny, name)
    state = PrunedMLP.from_dense(module).state_dict()
    dense = module.state_dict()
    assert list(state) == sorted(state, key=list(state).index)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in dense.items()}
    assert all(torch.equal(state[k], v) and state[k].is_contiguous() for k, v in dense.items())


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("mode", ["compact", "gather"])
def test_load_state_dict_round_trip(name, mode, tiny):
    source = PrunedMLP.from_dense(find_ffns(tiny(name))[0].holder, KEEP, mode)
    target = PrunedMLP.from_dense(find_ffns(tiny(name, seed=9))[0].holder, KEEP, mode)
    x = torch.randn(3, 32)
    assert not torch.equal(source(x), target(x))
    result = target.load_state_dict(source.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(source(x), target(x))


def test_load_state_dict_reports(tiny):
    pruned = PrunedMLP.from_dense(find_ffns(tiny("llama"))[0].holder)
    state = pruned.state_dict()
    extra = {**state, "norm.weight": torch.zeros(2)}
    assert pruned.load_state_dict(extra, strict=False).unexpected_keys == ["norm.weight"]
    part = {"up_proj.weight": torch.zeros(96, 32)}
    assert pruned.load_state_dict(part, strict=False).missing_keys == ["gate_proj.weight", "down_proj.weight"]
    assert (pruned.state_dict()["up_proj.weight"] == 0).all()  # what is there is loaded
    assert torch.equal(pruned.state_dict()["gate_proj.weight"], state["gate_proj.weight"])
    with pytest.raises(RuntimeError, match=r"Missing key.*gate_proj.*"):
        pruned.load_state_dict(part)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*norm.weight"):
        pruned.load_state_dict(extra)
    with pytest.raises(RuntimeError, match=r"up_proj.weight must have shape \(96, 32\); got \(32, 96\)"):
        pruned.load_state_dict({**state, "up_proj.weight": torch.zeros(32, 96)})


def test_loading_its_own_state_changes_nothing(tiny):
    pruned = PrunedMLP.from_dense(find_ffns(tiny("phi3"))[0].holder)
    before = pruned.record.clone()
    pruned.load_state_dict(dict(pruned.state_dict(keep_vars=True)))
    assert torch.equal(pruned.record, before)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("mode", ["compact", "gather"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_gradients_are_those_of_the_dense_modules_kept_neurons(name, mode, backend, tiny):
    module, ffn = dense_and_path(tiny, name)
    pruned = PrunedMLP.from_dense(module, KEEP, mode, backend)
    rows = slice(None) if mode == "compact" else KEEP.neurons.long()
    kept = KEEP.neurons.long()
    x, upstream = torch.randn(5, 32, requires_grad=True), torch.randn(5, 32)
    removed = torch.ones(96, dtype=torch.bool)
    removed[kept] = False
    with torch.no_grad():
        ffn.weights().down[removed] = 0
    module.zero_grad()
    want_x = torch.autograd.grad(module(x), x, upstream, retain_graph=True)[0]
    module(x).backward(upstream)
    grads = copy.deepcopy(module)
    for copied, own in zip(grads.parameters(), module.parameters(), strict=True):
        copied.data = own.grad
    want = patterns.projections(grads, ffn.pattern)
    x.grad = None
    pruned(x).backward(upstream)
    torch.testing.assert_close(x.grad, want_x)
    for part, packed in zip(want.parts, pruned.record.grad.split(32, dim=1), strict=True):
        torch.testing.assert_close(packed[rows], part[kept])
    if pruned.neuron_bias is not None:
        torch.testing.assert_close(pruned.neuron_bias.grad[rows], torch.stack(want.input_biases, 1)[kept])
        torch.testing.assert_close(pruned.down_bias.grad, want.down_bias)
    if mode == "gather":
        assert (pruned.record.grad[removed] == 0).all()


def test_one_training_step_lowers_the_loss(tiny):
    pruned = PrunedMLP.from_dense(find_ffns(tiny("llama"))[0].holder, KEEP).train()
    x, target = torch.randn(64, 32), torch.randn(64, 32)
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.5)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (pruned(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "starcoder2"])
def test_dropout_only_in_training(name, tiny):
    changes = {"gpt2": {"resid_pdrop": 0.5}, "starcoder2": {"residual_dropout": 0.5}, "phi3": {}}[name]
    module = find_ffns(tiny(name, **changes))[0].holder
    pruned = PrunedMLP.from_dense(module)
    x = torch.randn(200, 32)
    torch.testing.assert_close(pruned(x), module(x))
    pruned.train()
    zeros = (pruned(x) == 0).float().mean()
    assert abs(zeros - (0.5 if changes else 0.0)) < 0.05


def test_mode_and_requires_grad_are_kept(tiny):
    module = find_ffns(tiny("llama"))[0].holder
    assert PrunedMLP.from_dense(module.train()).training
    assert not PrunedMLP.from_dense(module.eval()).training
    assert all(p.requires_grad for p in PrunedMLP.from_dense(module).parameters())
    assert not any(p.requires_grad for p in PrunedMLP.from_dense(module.requires_grad_(False)).parameters())


@pytest.mark.parametrize("mode", ["compact", "gather"])
def test_deepcopy_and_dtype(mode, tiny):
    pruned = PrunedMLP.from_dense(find_ffns(tiny("gpt2"))[0].holder, KEEP, mode)
    twin = copy.deepcopy(pruned)
    x = torch.randn(3, 32)
    want = pruned(x)
    assert torch.equal(twin(x), want)
    with torch.no_grad():
        twin.record.zero_()
    assert torch.equal(pruned(x), want)
    half = pruned.to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    if mode == "gather":
        assert half.index.dtype == torch.int32
    torch.testing.assert_close(half(x.bfloat16()).float(), want, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("mode", ["compact", "gather"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_compiles_into_one_graph(mode, name, tiny):
    pruned = PrunedMLP.from_dense(find_ffns(tiny(name))[0].holder, KEEP, mode)
    compiled = torch.compile(pruned, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (3, 5):
        x = torch.randn(tokens, 32)
        torch.testing.assert_close(compiled(x), pruned(x))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_trains_when_compiled(backend, tiny):
    pruned = PrunedMLP.from_dense(find_ffns(tiny("llama"))[0].holder, KEEP, "gather", backend)
    x = torch.randn(3, 32)
    pruned(x).square().sum().backward()
    want, pruned.record.grad = pruned.record.grad, None
    torch.compile(pruned, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    torch.testing.assert_close(pruned.record.grad, want)


@torch.no_grad()
def test_inductor(tiny):
    pruned = PrunedMLP.from_dense(find_ffns(tiny("llama"))[0].holder, KEEP)
    x = torch.randn(3, 32)
    torch.testing.assert_close(torch.compile(pruned, fullgraph=True)(x), pruned(x))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(3, 31), r"x must have shape \[\.\.\., 32\]; got \(3, 31\)"),
        (torch.randn(3, 32, dtype=torch.float64), r"dtype of x must be torch\.float32, .*; got torch\.float64"),
        (torch.zeros(3, 32, dtype=torch.int64), "x must be floating point; got torch.int64"),
        (torch.empty(3, 32, device="meta"), "x must be on the device of the record, cpu; got 'meta'"),
    ],
)
def test_wrong_input_is_refused(x, message, tiny):
    with pytest.raises(InputError, match=message):
        PrunedMLP.from_dense(find_ffns(tiny("llama"))[0].holder)(x)


def test_bad_arguments_are_refused(tiny):
    module = find_ffns(tiny("llama"))[0].holder
    for arguments, message in (
        ({"mode": "compakt"}, r"mode must be one of compact, gather; got 'compakt' \(nearest: compact\)"),
        ({"mode": "gather"}, "keep must be given in gather mode; got None"),
        ({"keep": KeepIndex([0], 95)}, "keep must refer to 96 neurons; got 95"),
        ({"keep": KeepIndex([0], 95), "mode": "gather"}, "keep must refer to 96 neurons; got 95"),
        ({"backend": "cudnn"}, "backend must be one of auto, torch"),
    ):
        with pytest.raises(InputError, match=message):
            PrunedMLP.from_dense(module, **arguments)
    with pytest.raises(UnsupportedModelError, match=r"Sequential is no FFN that pyprune knows \(it has 0, 1\)"):
        PrunedMLP.from_dense(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with pytest.raises(UnsupportedModelError, match=r"Linear is no FFN that pyprune knows \(it has no children\)"):
        PrunedMLP.from_dense(nn.Linear(2, 2))


def test_bias_on_only_one_of_gate_and_up_is_refused(tiny):
    module = find_ffns(tiny("llama"))[0].holder
    module.gate_proj.bias = nn.Parameter(torch.ones(96))
    with pytest.raises(UnsupportedModelError, match="a bias on both gate and up, or on neither; it has one on one"):
        PrunedMLP.from_dense(module)


def test_bias_on_up_or_down_alone(tiny):
    module = find_ffns(tiny("nemotron", mlp_bias=True))[0].holder
    x = torch.randn(3, 32)
    for missing in ("down_proj", "up_proj"):
        getattr(module, missing).bias = None
        pruned = PrunedMLP.from_dense(module)
        torch.testing.assert_close(pruned(x), module(x))
        assert pruned.state_dict().keys() == module.state_dict().keys()


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_forced_backend_is_refused_at_the_call(backend, tiny):
    pruned = PrunedMLP.from_dense(find_ffns(tiny("llama"))[0].holder.double(), backend=backend)
    for run in (pruned, torch.no_grad()(pruned)):
        with pytest.raises(BackendError, match=rf"{backend}: no kernel for torch\.float64"):
            run(torch.randn(2, 32, dtype=torch.float64))


@pytest.fixture
def llama_ffn(tiny):
    return find_ffns(tiny("llama", mlp_bias=True))[0].holder


def dequantised(pruned):
    """A copy of a module with an int8 record, its weights written out in float32."""
    return PrunedMLP(widened(pruned.running, torch.float32), pattern=pruned.pattern, backend="torch")


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("mode", ["compact", "gather"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@torch.no_grad()
def test_int8_weights(name, mode, backend, tiny):
    module, ffn = dense_and_path(tiny, name)
    pruned = PrunedMLP.from_dense(module, KEEP, mode, backend, "int8")
    assert pruned.record.dtype == torch.int8 and not pruned.record.requires_grad
    assert pruned.scales.shape == (len(pruned.record), 3 if ffn.gated else 2)
    x = torch.randn(2, 5, 32)
    want = dequantised(pruned).double()(x.double())
    torch.testing.assert_close(pruned(x).double(), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
    exact = cut_dense(ffn, x)
    assert 0 < (pruned(x) - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("weights", ["bfloat16", "float16", "float32"])
@torch.no_grad()
def test_weights_of_another_dtype(weights, llama_ffn):
    module = llama_ffn.to(torch.bfloat16 if weights == "float32" else torch.float32)
    own = next(module.parameters()).dtype
    pruned = PrunedMLP.from_dense(module, weights=weights)
    assert pruned.record.dtype == WEIGHTS[weights] and pruned.scales is None
    assert pruned.down_bias.dtype == pruned.neuron_bias.dtype == pruned.dtype == own
    x = torch.randn(7, 32, dtype=own)
    assert pruned(x).dtype == own
    want = copy.deepcopy(module).to(WEIGHTS[weights]).double()(x.double())
    torch.testing.assert_close(pruned(x).double(), want, rtol=2e-2, atol=2e-2)
    assert {t.dtype for t in pruned.state_dict().values()} == {own}


@pytest.mark.parametrize("weights", ["bfloat16", "float16", "int8", "int4"])
def test_kept_neurons_are_those_of_the_whole_module(weights, llama_ffn):
    whole = PrunedMLP.from_dense(llama_ffn, weights=weights)
    compact = PrunedMLP.from_dense(llama_ffn, KEEP, weights=weights)
    gather = PrunedMLP.from_dense(llama_ffn, KEEP, "gather", weights=weights)
    rows = KEEP.neurons.long()
    assert torch.equal(gather.record, whole.record)
    assert torch.equal(compact.record, whole.record[rows])
    if weights == "int8":
        assert torch.equal(gather.scales, whole.scales)
        assert torch.equal(compact.scales, whole.scales[rows])


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("weights", ["int8", "int4", "bfloat16"])
def test_state_dict_of_other_weights_is_the_familys_own(name, weights, tiny):
    module, _ = dense_and_path(tiny, name)
    pruned = PrunedMLP.from_dense(module, weights=weights)
    state = pruned.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in state.items()} == {
        k: (v.shape, v.dtype) for k, v in module.state_dict().items()
    }
    other = PrunedMLP.from_dense(find_ffns(tiny(name, seed=3))[0].holder, weights=weights)
    assert not torch.equal(other.record, pruned.record)
    other.load_state_dict(state)
    assert torch.equal(other.record, pruned.record)
    x = torch.randn(3, 32)
    torch.testing.assert_close(other(x), pruned(x))
    module.load_state_dict(state)
    torch.testing.assert_close(pruned(x), module(x), rtol=2e-2, atol=2e-2)


def test_loading_a_part_leaves_the_others_integers_alone(llama_ffn):
    pruned = PrunedMLP.from_dense(llama_ffn.bfloat16(), weights="int8")
    before = pruned.record.clone(), pruned.scales.clone()
    weight = torch.randn(96, 32)
    pruned.load_state_dict({"up_proj.weight": weight}, strict=False)
    integers, scales = quantise(weight, 1)
    assert torch.equal(pruned.record, torch.cat([before[0][:, :32], integers, before[0][:, 64:]], 1))
    assert torch.equal(pruned.scales, torch.cat([before[1][:, :1], scales, before[1][:, 2:]], 1))


@pytest.mark.parametrize("weights", ["int8", "int4", "float16"])
def test_loading_what_the_weights_cannot_hold_is_refused(weights, llama_ffn):
    pruned = PrunedMLP.from_dense(llama_ffn, weights=weights)
    state = {**pruned.state_dict(), "up_proj.weight": torch.full((96, 32), float("inf"))}
    with pytest.raises(InputError, match=r"up_proj\.weight must be finite in torch\.float"):
        pruned.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", ["compact", "gather"])
@torch.no_grad()
def test_casting_the_module_changes_no_scale(dtype, mode, llama_ffn):
    pruned = PrunedMLP.from_dense(llama_ffn, KEEP, mode, weights="int8")
    record, scales = pruned.record.clone(), pruned.scales.clone()
    want = pruned(torch.ones(2, 32)).double()
    cast = copy.deepcopy(pruned).to(dtype)
    assert cast.scales.dtype == torch.float32 and torch.equal(cast.scales, scales)
    assert torch.equal(cast.record, record)
    assert {cast.dtype, cast.down_bias.dtype, cast(torch.ones(2, 32, dtype=dtype)).dtype} == {dtype}
    assert {t.dtype for t in cast.state_dict().values()} == {dtype}
    got = cast(torch.ones(2, 32, dtype=dtype)).double()
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())
    assert torch.equal(cast.float().scales, scales)
    moved = copy.deepcopy(pruned).to("meta")
    assert moved.scales.is_meta and moved.scales.dtype == torch.float32
    assert copy.deepcopy(pruned).to("meta", torch.bfloat16).scales.dtype == torch.float32
    empty = moved.to_empty(device="cpu")
    assert empty.scales.device.type == "cpu" and empty.dtype == torch.float32


def test_no_biases_no_float_parameter_and_still_a_dtype(tiny):
    pruned = PrunedMLP.from_dense(find_ffns(tiny("llama"))[0].holder.bfloat16(), weights="int8")
    assert [p.dtype for p in pruned.parameters()] == [torch.int8]
    assert pruned.dtype == torch.bfloat16
    assert pruned.half().dtype == torch.float16


@pytest.mark.parametrize("mode", ["compact", "gather"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_training_around_int8_weights(mode, backend, llama_ffn):
    pruned = PrunedMLP.from_dense(llama_ffn, KEEP, mode, backend, "int8")
    assert not pruned.record.requires_grad and pruned.down_bias.requires_grad
    x = torch.randn(3, 32, requires_grad=True)
    upstream = torch.randn(3, 32)
    pruned(x).backward(upstream)
    twin = dequantised(pruned).double()
    wide = x.detach().double().requires_grad_()
    twin(wide).backward(upstream.double())
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-4)
    for name in ("neuron_bias", "down_bias"):
        got, want = getattr(pruned, name).grad.double(), getattr(twin, name).grad
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert pruned.record.grad is None


def calls_of(op, run):
    """How often `run` calls the operator, seen by torch's own dispatch."""
    found = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        run()
    return sum(func in op for func in found)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_inference_takes_the_lean_operator_and_training_does_not(backend, llama_ffn):
    lean = (torch.ops.pyprune.ffn.default, torch.ops.pyprune.ffn_by_dispatch.default)
    pruned = PrunedMLP.from_dense(llama_ffn, backend=backend)
    x = torch.randn(3, 32)
    with torch.no_grad():
        assert calls_of(lean, lambda: pruned(x)) == 1
    differentiable = 0 if backend == "auto" else 1  # plain torch, or what was forced
    assert calls_of(lean, lambda: pruned(x)) == differentiable  # weights want a gradient
    assert pruned(x).requires_grad
    pruned.requires_grad_(False)
    assert calls_of(lean, lambda: pruned(x)) == 1
    x.requires_grad_()
    assert calls_of(lean, lambda: pruned(x)) == differentiable
    assert pruned(x).requires_grad
    x.requires_grad_(False)
    pruned.down_bias.requires_grad_()
    pruned(x).sum().backward()
    assert pruned.down_bias.grad.tolist() == [3.0] * 32


@torch.no_grad()
def test_another_dtype_of_x_is_computed_or_refused(tiny, llama_ffn):
    pruned = PrunedMLP.from_dense(find_ffns(tiny("llama"))[0].holder)
    x = torch.randn(3, 32)
    got = pruned(x.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), pruned(x.bfloat16().float()), rtol=1e-2, atol=1e-2)
    with pytest.raises(InputError, match=r"dtype of x must be torch\.float32, as neuron_bias is; got torch\.bfloat16"):
        PrunedMLP.from_dense(llama_ffn)(x.bfloat16())
    with pytest.raises(InputError, match=r"x must have at least one dimension; got \(\)"):
        pruned(torch.tensor(1.0))


def test_the_result_has_the_dtype_of_x_with_gradients_too(tiny):
    pruned = PrunedMLP.from_dense(find_ffns(tiny("llama"))[0].holder, weights="int8")
    x = torch.randn(3, 32).bfloat16()
    with torch.no_grad():
        want = pruned(x)
    got = pruned(x.requires_grad_())
    assert got.requires_grad and got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_x_of_any_number_of_dimensions(llama_ffn):
    pruned = PrunedMLP.from_dense(llama_ffn)
    x = torch.randn(3, 32)
    for ones in range(12):
        assert torch.equal(pruned(x.view(*[1] * ones, 3, 32)), pruned(x).view(*[1] * ones, 3, 32))


@pytest.mark.parametrize("width", [2.5, True, "3", None, torch.tensor(2.5)])
def test_a_width_that_is_no_integer_is_refused(width, llama_ffn):
    pruned = PrunedMLP.from_dense(llama_ffn)
    with pytest.raises(InputError, match="neurons must be an integer; got"):
        pruned.set_width(width)
    assert pruned.neurons == 96


@pytest.mark.parametrize("weights", [None, "int8", "int4", "bfloat16"])
@pytest.mark.parametrize("mode", ["compact", "gather"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@torch.no_grad()
def test_inference_compiles_and_exports(weights, mode, backend, llama_ffn):
    pruned = PrunedMLP.from_dense(llama_ffn, KEEP, mode, backend, weights)
    exported = torch.export.export(
        pruned, (torch.randn(4, 32),), dynamic_shapes=({0: torch.export.Dim("tokens", min=2, max=500)},)
    ).module()
    static = torch.compile(pruned, backend="aot_eager", fullgraph=True, dynamic=False)
    dynamic = torch.compile(pruned, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (4, 100):  # on either side of most crossovers
        x = torch.randn(tokens, 32)
        for run in (exported, static, dynamic):
            assert torch.equal(run(x), pruned(x))


@torch.no_grad()
def test_exported_program_survives_its_file(llama_ffn, tmp_path):
    pruned = PrunedMLP.from_dense(llama_ffn, KEEP, "gather", weights="int8")
    x = torch.randn(4, 32)
    torch.export.save(torch.export.export(pruned, (x,)), tmp_path / "ffn.pt2")
    assert torch.equal(torch.export.load(tmp_path / "ffn.pt2").module()(x), pruned(x))


def test_bad_records_are_refused_when_the_module_is_made(llama_ffn):
    pattern = PrunedMLP.from_dense(llama_ffn).pattern
    integers, scales = quantise(torch.randn(5, 24), 3)
    for record, more, message in (
        (Record(integers, True, "silu", scales), {}, "dtype must be given with rows of integers; got None"),
        (
            Record(torch.zeros(5, 24).double(), True, "silu"),
            {"dtype": torch.float32},
            "dtype must be torch.float64, as",
        ),
        (Record(torch.zeros(5, 24), False, "silu"), {}, "record must be gated, as its pattern is; got False"),
    ):
        with pytest.raises(InputError, match=message):
            PrunedMLP(record, pattern=pattern, **more)
    with pytest.raises(InputError, match=r"weights must be one of float32, .*; got 'in8' \(nearest: int8"):
        PrunedMLP.from_dense(llama_ffn, weights="in8")


def test_repr_says_what_it_is(tiny):
    pruned = PrunedMLP.from_dense(find_ffns(tiny("llama"))[0].holder, KEEP, "gather")
    assert repr(pruned) == "PrunedMLP(gated, D=32, F=96, gather 6, silu, auto)"
    pruned = PrunedMLP.from_dense(find_ffns(tiny("llama"))[0].holder, weights="int8")
    assert repr(pruned) == "PrunedMLP(gated, D=32, F=96, silu, auto, int8 weights)"


def test_lone_modules_of_transformers(tiny_config):
    for module in (GPT2MLP(96, tiny_config("gpt2")), Phi3MLP(tiny_config("phi3"))):
        x = torch.randn(2, 32)
        torch.testing.assert_close(PrunedMLP.from_dense(module.eval())(x), module(x))


def test_forward_derivatives_are_those_of_torch_or_refused(tiny):
    """Of frozen weights too, where nothing else asks for derivatives."""
    model = accelerate(tiny("llama").requires_grad_(False))
    module = model.model.layers[0].mlp
    x, way = torch.randn(3, 32), torch.randn(3, 32)
    _, tangent = torch.func.jvp(module, (x,), (way,))
    _, wanted = torch.func.jvp(lambda t: reference.ffn(t, module.running), (x,), (way,))
    torch.testing.assert_close(tangent, wanted)
    assert tangent.abs().max() > 1e-3
    module.backend = "torch"
    with pytest.raises(BackendError, match="forward-mode derivatives need backend 'auto'"):
        torch.func.jvp(module, (x,), (way,))


def test_what_ends_accelerate_early_leaves_the_config(tiny, random_mask, monkeypatch):
    """An interrupt while kernels are timed; and a bias on one of gate and up alone."""
    model = tiny("llama")
    mask = random_mask(model, (40, 48, 56))

    def stop(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyprune.ffn.first_use.measure", stop)
    with pytest.raises(KeyboardInterrupt):
        accelerate(model, mask=mask)
    model.model.layers[1].mlp.up_proj.bias = torch.nn.Parameter(torch.zeros(96))
    with pytest.raises(UnsupportedModelError, match="a bias on both gate and up, or on neither"):
        accelerate(model, mask=mask, measure=False)
    assert model.config.intermediate_size == 96 and layer_widths(model.config) is None
    assert not any(isinstance(m, PrunedMLP) for m in model.modules())
