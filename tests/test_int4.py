"""int4 records: values by hand, the order of halves, error, what a second rounding gives, modules, models, refusals."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from pyprune import InputError, KeepIndex, PrunedMLP, accelerate
from pyprune.base import int4, reference
from pyprune.base.record import Record, described
from pyprune.ffn import dispatch, native, tune
from pyprune.ffn.backends import Problem
from pyprune.ffn.quantisation import WEIGHTS, cast, dequantise, widened
from pyprune.model import checkpoint
from pyprune.model.families import find_ffns

UINT8 = WEIGHTS["int4"]
KEEP = KeepIndex(range(1, 96, 5), 96)


def random_weights(rows, groups, seed, dtype=torch.float32):
    """Groups of very different sizes, down to those below float32's normal range, and groups of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(rows, groups, int4.GROUP, generator=generator, dtype=torch.float64)
    exponents = torch.randint(-45, 38, (rows, groups, 1), generator=generator)
    weights = weights * 10.0 ** exponents.double() * (torch.rand(rows, groups, 1, generator=generator) > 0.2)
    return weights.flatten(1).clamp(-3e38, 3e38).to(dtype)


def test_by_hand():
    """The scale is a minus eighth of the largest, cut to bfloat16; element 8j + 4h + i is half h of byte 4i + j."""
    row = torch.zeros(64)
    row[:5] = torch.tensor([-16.0, 15.9, 3.1, -2.9, 1.0])  # in steps of 2: -8, 7 (not 8), 2, -1, 0 (to even)
    row[29] = 7.0
    row[32:] = torch.arange(32) * 0.25
    packed = int4.pack(row[None])[0]
    assert packed.dtype == torch.uint8 and packed.tolist()[:16] == [
        *(0x08, 0, 0, 0),  # elements 0, 4 | 8, 12 | 16, 20 | 24, 28
        *(0x07, 0, 0, 0x40),  # 1, 5 | 9, 13 | 17, 21 | 25, 29: half to even, 3.5 is 4
        *(0x02, 0, 0, 0),
        *(0x0F, 0, 0, 0),
    ]
    assert packed[32:].view(torch.bfloat16).tolist() == [2.0, -0.96875]  # -7.75 / 8 = -0.96875
    got = int4.unpack(packed[None], 1, torch.float32)[0]
    assert got[:5].tolist() == [-16.0, 14.0, 4.0, -2.0, 0.0] and got[29] == 8.0
    assert got[32:].tolist() == [-0.96875 * round(i * 0.25 / -0.96875) for i in range(32)]


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 10**6), st.sampled_from(["float32", "bfloat16", "float64"]))
@settings(max_examples=200, deadline=None)
def test_weights_written_out_in_float32_or_bfloat16_give_the_same_bytes(rows, groups, seed, dtype):
    packed = int4.pack(random_weights(rows, groups, seed, WEIGHTS.get(dtype, torch.float64)))
    for written in (torch.float32, torch.bfloat16):
        assert torch.equal(int4.pack(int4.unpack(packed, 1, written)), packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_off_by_half_a_scale_or_one_at_the_end(dtype):
    weights = random_weights(400, 4, 0, dtype)
    packed = int4.pack(weights)
    scales = packed[:, 64:].view(torch.bfloat16).double()
    groups = weights.double().unflatten(1, (4, 32))
    error = (int4.unpack(packed, 1, torch.float64).unflatten(1, (4, 32)) - groups).abs() / scales.abs()[..., None]
    steps = groups / scales[..., None]
    small = groups.abs().amax(-1) / 8 < torch.finfo(torch.float32).tiny  # counts as zeros
    assert (scales[small] == 1).all() and scales.isfinite().all()
    inner = (steps > -8) & (steps < 7.5)
    assert (error[inner & ~small[..., None]] <= 0.5 + 1e-6).all()
    assert (error[~inner & ~small[..., None]] <= 1.1).all()
    normal = torch.randn(500, 128, generator=torch.Generator().manual_seed(0))
    lost = (int4.unpack(int4.pack(normal), 1, torch.float32) - normal).norm() / normal.norm()
    assert 0.08 < lost < 0.09, "a scale of largest / 7 would lose 0.097"


def test_rows_parts_and_groups_do_not_depend_on_each_other():
    weights = random_weights(12, 9, 1)  # three parts of three groups
    packed, scales = cast(weights, 3, UINT8)
    assert scales is None and packed.shape == (12, 3 * 54) and packed.is_contiguous()
    assert torch.equal(cast(weights[[2, 3, 11]], 3, UINT8)[0], packed[[2, 3, 11]])
    assert torch.equal(cast(weights[:, 96:192], 1, UINT8)[0], packed[:, 54:108])  # strided
    assert torch.equal(cast(weights[:, 128:160], 1, UINT8)[0][:, :16], packed[:, 54 + 16 : 54 + 32])
    assert torch.equal(
        int4.unpack(packed[:, 54:108], 1, torch.float32), dequantise(packed, None, 3, torch.float32)[:, 96:192]
    )
    assert cast(weights[:0], 3, UINT8)[0].shape == (0, 162)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("gated", [True, False])
def test_the_twin_computes_what_is_written_out(gated, dtype):
    generator = torch.Generator().manual_seed(0)
    parts = 3 if gated else 2
    rows, _ = cast(torch.randn(40, parts * 64, generator=generator) / 8, parts, UINT8)
    x = torch.randn(3, 64, generator=generator).to(dtype).requires_grad_()
    index = torch.arange(0, 40, 3, dtype=torch.int32)
    record = Record(rows, gated, "silu", index=index)
    assert (record.hidden_size, record.kept, record.nbytes) == (64, 14, 14 * (parts * 36 + 4))
    assert described(64, 40, gated=gated, activation="silu", dtype=dtype, weights=UINT8).rows.shape == rows.shape
    got = reference.ffn(x, record)
    want = reference.ffn(x.double(), widened(record))
    assert got.dtype == dtype
    size = want.norm().item()
    assert (got.double() - want).norm() <= 4 * torch.finfo(dtype).eps * size + 1e-6 * size * (dtype != torch.float64)
    (grad,) = torch.autograd.grad(got.sum(), x)
    assert grad.isfinite().all()
    compact = dataclasses.replace(record, rows=rows[index.long()], index=None)
    assert torch.equal(reference.ffn(x, compact), got)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("mode", ["compact", "gather"])
@torch.no_grad()
def test_a_model_runs_saves_and_comes_back_with_the_same_rows(name, mode, tiny, ids, random_mask, masked, tmp_path):
    model = tiny(name)
    mask = random_mask(model, (64, 24, 96))
    want = masked(model, mask)(ids).logits
    accelerate(model, mode, mask=mask, weights="int4")
    modules = [m for m in model.modules() if isinstance(m, PrunedMLP)]
    assert all(m.record.dtype == UINT8 and m.scales is None and "int4 weights" in repr(m) for m in modules)
    got = model(ids).logits
    assert 0.01 < (got - want).norm() / want.norm() < 0.2
    low = model.to(torch.bfloat16)
    assert (low(ids).logits.float() - got).norm() < 0.1 * got.norm()
    checkpoint.save(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    again = [m for m in accelerate(loaded, weights="int4").modules() if isinstance(m, PrunedMLP)]
    for kept, saved in zip(modules, again, strict=True):
        # A narrow checkpoint has lost the neurons that its channels' scales were found with.
        if torch.equal(kept.channel_scales, saved.channel_scales) or mode == "gather":
            assert torch.equal(kept.record, saved.record)
    if mode == "compact":
        assert (loaded(ids).logits.float() - want).norm() < 1.5 * (got - want).norm()


def test_loading_a_part_leaves_the_others_alone(tiny):
    pruned = PrunedMLP.from_dense(find_ffns(tiny("llama"))[0].holder.bfloat16(), weights="int4")
    before = pruned.record.clone()
    weight = torch.randn(96, 32)
    pruned.load_state_dict({"up_proj.weight": weight}, strict=False)
    assert torch.equal(pruned.record, torch.cat([before[:, :18], int4.pack(weight), before[:, 36:]], 1))


def test_meta_tensors_and_other_places(tiny):
    pruned = PrunedMLP.from_dense(find_ffns(tiny("llama"))[0].holder, KEEP, "gather", weights="int4")
    moved = pruned.to("meta")
    assert moved(torch.empty(2, 32, device="meta")).shape == (2, 32)
    assert moved.record.dtype == UINT8 and moved.half().dtype == torch.float16
    cuda = Problem("cuda", torch.bfloat16, 1, 64, 96, 96, True, False, "silu", UINT8)
    assert dispatch.choose(cuda).backend.NAME == "torch"
    for name, reason in (("cuda", "no kernel for int4 weights"), ("triton", "uint8|int4"), ("cublas", "uint8|int4")):
        assert re.search(reason, dispatch.backends()[name].why_not(cuda) or "")


def test_on_a_cpu_the_library_computes_int4_for_every_number_of_tokens(monkeypatch):
    cpu = dispatch.backends()["cpu"]
    monkeypatch.setattr(native, "load", lambda: None)
    for tokens in (1, 128, 129, 4096):
        problem = Problem("cpu", torch.bfloat16, tokens, 64, 96, 96, True, False, "silu", UINT8)
        chosen = dispatch.choose(problem)
        assert chosen.backend is cpu and cpu.default_config(problem) == ({} if tokens <= 128 else {"written": True})
        assert {frozenset(c.items()) for c in cpu.candidate_configs(problem)} == {
            frozenset(),
            frozenset({("written", True)}),
        }
    assert 0 < dispatch.native_tokens(torch.bfloat16, UINT8, 64, False) <= 128
    dispatch.native_tokens.cache_clear()
    dispatch.choose.cache_clear()


@torch.no_grad()
def test_odd_widths_and_bad_weights_are_refused_before_anything_is_touched(tiny, tiny_config):
    model = AutoModelForCausalLM.from_config(tiny_config("llama", hidden_size=40))
    with pytest.raises(InputError, match=r"hidden_size must be a multiple of 32 for int4 weights; got 40"):
        accelerate(model, weights="int4")
    assert not any(isinstance(m, PrunedMLP) for m in model.modules())
    for call in (
        lambda: PrunedMLP.from_dense(find_ffns(model)[0].holder, weights="int4"),
        lambda: cast(torch.zeros(2, 3 * 40), 3, UINT8),
        lambda: tune.layer_problems(40, 96, gated=True, activation="silu", dtype=torch.float32, weights=UINT8),
    ):
        with pytest.raises(InputError, match=r"hidden_size must be a multiple of 32 for int4 weights; got 40"):
            call()
    model = tiny("llama")
    find_ffns(model)[2].weights().gate[95, 31] = float("nan")
    with pytest.raises(InputError, match="finite"):
        accelerate(model, weights="int4")
    for rows, more, message in (
        (torch.zeros(4, 3 * 18 + 1, dtype=UINT8), {}, r"rows must have shape \(4, 54\); got \(4, 55\)"),
        (torch.zeros(4, 3 * 16, dtype=UINT8), {}, r"rows must have shape \(4, 0\); got \(4, 48\)"),
        (torch.zeros(4, 54, dtype=UINT8), {"scales": torch.ones(4, 3)}, "scales must be None with rows of torch.uint8"),
    ):
        with pytest.raises(InputError, match=message):
            Record(rows, True, "silu", **more)
