"""Attention in blocks: what torch's own attention computes, forward and backward, taken only where it may be."""

import pytest
import torch
from torch.nn import functional as F

from pyprune import prune
from pyprune.model import attention
from pyprune.training.recovery import RecoverConfig, recover

SHAPES = [(9, 3, 300, 64, 64), (4, 4, 130, 8, 16), (6, 2, 1, 8, 8), (6, 1, 257, 16, 8), (2, 2, 128, 4, 4)]


def operands(heads, shared, tokens, size, value_size, dtype=torch.float64):
    torch.manual_seed(0)
    sizes = ((heads, size), (shared, size), (shared, value_size))
    return [torch.randn(2, h, tokens, d, dtype=dtype, requires_grad=True) for h, d in sizes]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_torch(shape):
    given = operands(*shape)
    own = attention.causal(*given, 0.3)
    wanted = F.scaled_dot_product_attention(*given, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(own, wanted)
    change = torch.randn_like(own)
    found, others = (torch.autograd.grad(out, given, change) for out in (own, wanted))
    torch.testing.assert_close(found, others)


def test_in_bfloat16_the_error_is_at_most_twice_that_of_torch():
    exact = operands(*SHAPES[0])
    given = [t.detach().bfloat16() for t in exact]
    wanted = attention.causal(*(t.double() for t in given), 0.125)
    other = F.scaled_dot_product_attention(*given, is_causal=True, scale=0.125, enable_gqa=True)
    own = attention.causal(*given, 0.125)
    assert (own - wanted).norm() <= 2 * (other - wanted).norm()


@pytest.fixture
def everywhere(monkeypatch):
    """As on a CPU that multiplies bfloat16 fast and has no matrix tiles; counts how often blocks are taken."""
    taken, real = [], attention.causal
    monkeypatch.setattr(attention, "fast_bfloat16", lambda device: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(attention, "causal", lambda *given: taken.append(1) or real(*given))
    return taken


@torch.no_grad()
def test_a_model_has_its_own_attention_again_afterwards(tiny, everywhere):
    model = tiny("llama").bfloat16()
    ids = torch.randint(0, model.config.vocab_size, (2, 150))
    plain = model(ids).logits
    with pytest.raises(ZeroDivisionError), attention.in_blocks(model):
        blocks = model(ids).logits
        assert len(everywhere) == model.config.num_hidden_layers
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa" and torch.equal(model(ids).logits, plain)
    assert 0 < float((blocks - plain).norm() / plain.norm()) < 0.02


def test_masks_caches_and_float32_take_torchs_kernel(tiny, everywhere):
    model = tiny("llama")
    ids = torch.randint(0, model.config.vocab_size, (2, 20))
    padded = torch.ones_like(ids)
    padded[0, :5] = 0
    with attention.in_blocks(model):
        model(ids)
        model.bfloat16()(ids, attention_mask=padded)
        assert not everywhere
        model.generate(ids[:1], max_new_tokens=3, do_sample=False)
        assert len(everywhere) == model.config.num_hidden_layers  # the prompt alone


def test_pruning_and_recovery_take_blocks_and_leave_none(tiny, everywhere):
    dense, model = tiny("llama").bfloat16(), tiny("llama").bfloat16()
    ids = torch.randint(0, model.config.vocab_size, (6, 40))
    prune(model, 0.5, text=ids)
    assert everywhere
    everywhere.clear()
    recover(model, dense, ids, RecoverConfig(steps=1, batch=2, held_out=0, precision="bfloat16"))
    assert everywhere
    assert {m.config._attn_implementation for m in (dense, model)} == {"sdpa"}
