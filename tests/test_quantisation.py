"""int8 records and casts: values by hand, rounding, what a second pass gives, and every refusal."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyprune import InputError, PrunedMLP
from pyprune.ffn.quantisation import WEIGHTS, cast, channel_scales, dequantise, quantise
from pyprune.model.mask import KeepIndex

TINY = torch.finfo(torch.float32).tiny


def test_by_hand():
    record = torch.tensor([[127.0, -63.4, 0.0, 0.5], [-2.54, 1.276, 0.0, 0.0]])
    integers, scales = quantise(record, 2)
    assert integers.dtype == torch.int8 and scales.dtype == torch.float32
    assert integers.tolist() == [[127, -63, 0, 127], [-127, 64, 0, 0]]
    torch.testing.assert_close(scales, torch.tensor([[1.0, 0.5 / 127], [0.02, 1.0]]))
    torch.testing.assert_close(
        dequantise(integers, scales, 2, torch.float32),
        torch.tensor([[127.0, -63.0, 0.0, 0.5], [-2.54, 1.28, 0.0, 0.0]]),
    )


def random_record(rows, parts, width, seed, dtype=torch.float32):
    """Rows of very different sizes, down to those below float32's normal range, and parts of zeros."""
    generator = torch.Generator().manual_seed(seed)
    record = torch.randn(rows, parts, width, generator=generator, dtype=torch.float64)
    exponents = torch.randint(-45, 38, (rows, parts, 1), generator=generator)
    record = record * 10.0 ** exponents.double() * (torch.rand(rows, parts, 1, generator=generator) > 0.2)
    return record.flatten(1).clamp(-3e38, 3e38).to(dtype)


@given(st.integers(1, 9), st.integers(2, 3), st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_a_dequantised_record_gives_the_same_integers_and_scales(rows, parts, width, seed):
    integers, scales = quantise(random_record(rows, parts, width, seed), parts)
    again = quantise(dequantise(integers, scales, parts, torch.float32), parts)
    assert torch.equal(again[0], integers)
    torch.testing.assert_close(again[1], scales, rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_are_off_by_half_a_scale_at_most(dtype):
    record = random_record(300, 3, 17, 0, dtype)
    integers, scales = quantise(record, 3)
    assert integers.min() == -127 and integers.max() == 127
    assert ((scales >= TINY) & scales.isfinite()).all()
    error = (dequantise(integers, scales, 3, torch.float64) - record.double()).abs().unflatten(1, (3, 17))
    small = record.double().abs().unflatten(1, (3, 17)).amax(-1) < 127 * TINY  # counts as zeros
    assert (error <= scales[..., None].double() * (0.5 + 1e-5))[~small].all()
    assert (scales[small] == 1).all() and (integers.unflatten(1, (3, 17))[small] == 0).all()


def test_rows_and_parts_do_not_depend_on_each_other():
    record = random_record(12, 3, 8, 1)
    integers, scales = quantise(record, 3)
    kept = quantise(record[[2, 3, 11]], 3)
    assert torch.equal(kept[0], integers[[2, 3, 11]]) and torch.equal(kept[1], scales[[2, 3, 11]])
    part = quantise(record[:, 8:16], 1)  # strided
    assert torch.equal(part[0], integers[:, 8:16]) and torch.equal(part[1], scales[:, 1:2])
    assert part[0].is_contiguous()


def test_dequantise_rounds_once():
    integers, scales = quantise(random_record(50, 2, 16, 2).clamp(-1e4, 1e4), 2)
    exact = integers.double().unflatten(1, (2, 16)) * scales[..., None].double()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        got = dequantise(integers, scales, 2, dtype)
        assert got.dtype == dtype and got.shape == integers.shape
        torch.testing.assert_close(got.double(), exact.flatten(1), rtol=torch.finfo(dtype).eps, atol=1e-44)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("weights", sorted(WEIGHTS))
def test_weights_that_are_not_finite_are_refused(bad, weights):
    record = torch.ones(4, 64)
    record[3, 4] = bad
    with pytest.raises(InputError, match=r"record must be finite in torch\.\w+; got"):
        cast(record, 2, WEIGHTS[weights])


def test_casts():
    record = torch.tensor([[1.0, -70000.0], [3.0001, 0.0]])
    for name in ("float32", "bfloat16"):
        values, scales = cast(record, 2, WEIGHTS[name])
        assert scales is None and torch.equal(values, record.to(WEIGHTS[name]))
    with pytest.raises(InputError, match=r"record must be finite in torch\.float16; got \(-70000\.0, 3\."):
        cast(record, 2, torch.float16)
    integers, scales = cast(record, 2, torch.int8)
    assert integers.dtype == torch.int8 and scales.shape == (2, 2)
    with pytest.raises(InputError, match=r"finite in torch\.float32; got .*1e\+39"):
        quantise(torch.tensor([[1e39]], dtype=torch.float64), 1)  # its scale would fit into float32


def test_channel_scales_by_hand():
    down = torch.tensor([[1.0, 3.0, 0.0, 2.0, 0.3], [-1.0, 5.0, 0.0, 2.0, -0.3]])  # rms 1, 4.1, 0, 2, 0.3; median 1
    assert channel_scales(down).tolist() == [4.0, 16.0, 4.0, 8.0, 1.0]
    assert channel_scales(torch.zeros(3, 2)).tolist() == channel_scales(torch.zeros(0, 2)).tolist() == [1.0, 1.0]
    huge = channel_scales(torch.tensor([[1e-12, 1.0, 1.0, 1e12]]))
    assert huge.tolist() == [1.0, 16.0, 16.0, 4096.0]


@pytest.mark.parametrize(("weights", "better"), [("int8", 8), ("int4", 2)])
@torch.no_grad()
def test_loud_channels_do_not_drown_the_others(weights, better, tiny):
    mlp = tiny("llama").model.layers[0].mlp
    mlp.down_proj.weight[5] *= 60
    x, quiet = torch.randn(64, 32), [c for c in range(32) if c != 5]
    want = mlp(x)[:, quiet]
    module = PrunedMLP.from_dense(mlp, weights=weights)
    error = (module(x)[:, quiet] - want).norm() / want.norm()
    module.set_width(96, mlp.down_proj.weight.t())
    assert (module(x)[:, quiet] - want).norm() / want.norm() < 1.01 * error
    plain, scales = cast(
        torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.t()], 1), 3, WEIGHTS[weights]
    )
    down = dequantise(plain, scales, 3, torch.float32)[:, 64:].t()
    hidden = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    assert error < ((hidden @ down.t())[:, quiet] - want).norm() / want.norm() / better


@pytest.mark.parametrize("name", ["llama", "opt"])
@torch.no_grad()
def test_channel_scales_survive_saving_loading_and_a_choice_of_neurons(name, tiny):
    from pyprune.model.families import find_ffns

    ffn = find_ffns(tiny(name))[0]
    down = ffn.weights().down
    down[:, 3] *= 16
    keep = KeepIndex(range(0, len(down), 3), len(down))
    compact, gather = (PrunedMLP.from_dense(ffn, keep, mode, weights="int8") for mode in ("compact", "gather"))
    assert compact.channel_scales[3] == 16 * compact.channel_scales[2]
    assert torch.equal(compact.record, gather.record[keep.neurons.long()])
    saved = gather.state_dict()
    other = PrunedMLP.from_dense(find_ffns(tiny(name))[0], keep, "gather", weights="int8")
    other.load_state_dict(saved)
    x = torch.randn(3, 32)
    assert torch.equal(other(x), gather(x)) and torch.equal(other.channel_scales, gather.channel_scales)
    assert other.half().channel_scales.dtype == torch.float16
