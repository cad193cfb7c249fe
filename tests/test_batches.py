"""Batches of keyword tensors: padded positions never count, pictures go through all of it, and what is refused."""

import copy

import pytest
import torch
from moe_cases import listed, make_mixture
from torch.nn import functional as F
from tower_cases import make_tower

from pyprune import InputError, UnsupportedModelError, prune, prune_experts
from pyprune.model.families import find_ffns
from pyprune.model.units import groups
from pyprune.pruning.batches import of_windows
from pyprune.pruning.calibration import LayerStream
from pyprune.pruning.text import batches
from pyprune.pruning.whole import WholeForwards

OPTIONS = {"keep": 0.5, "method": "wanda", "allocation": "uniform:multiple=8"}


def rows_of(ids, lengths):
    return [row[:length] for row, length in zip(ids, lengths, strict=True)]


def padded(rows, side, width=None):
    """One batch of rows of several lengths."""
    width = width or max(map(len, rows))
    sides = [(width - len(row), 0) if side == "left" else (0, width - len(row)) for row in rows]
    ids = torch.stack([F.pad(row, pad) for row, pad in zip(rows, sides, strict=True)])
    mask = torch.stack([F.pad(torch.ones_like(row), pad) for row, pad in zip(rows, sides, strict=True)])
    return {"input_ids": ids, "attention_mask": mask}


def statistics(model, given, gram=True, held_out=False):
    stream = WholeForwards(model, batches(model, given))
    found = []
    for group in groups(find_ffns(model)):
        found += stream.group_statistics(group, gram, held_out)
    return found


def same(a, b, exact=1e-4):
    for one, other in zip(a, b, strict=True):
        assert one.tokens == other.tokens
        for name in ("mean", "abs_mean", "square_sum", "gram"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=exact, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3_moe"])
def test_padded_positions_never_count(side, family, tiny, ids):
    model = make_mixture("qwen3_moe") if family == "qwen3_moe" else tiny(family)
    rows = rows_of(ids, (16, 5, 11, 2))
    apart = [{"input_ids": row[None]} for row in rows]
    want = statistics(model, apart)
    assert sum(s.tokens for s in want) == sum(map(len, rows)) * (len(want) if family != "qwen3_moe" else 2 * 2)
    same(statistics(model, [padded(rows, side)]), want)
    same(statistics(model, [padded(rows[:2], side, 20), padded(rows[2:], side)]), want)


def test_an_encoder_decoder_has_two_masks(ids):
    model = make_tower("bart")
    rows, written = rows_of(ids, (16, 5, 11, 3)), rows_of(ids.flip(1), (4, 9, 6, 12))
    apart = [{"input_ids": a[None], "decoder_input_ids": b[None]} for a, b in zip(rows, written, strict=True)]
    read, out = padded(rows, "right"), padded(written, "right")
    together = {**read, "decoder_input_ids": out["input_ids"], "decoder_attention_mask": out["attention_mask"]}
    want = statistics(model, apart)
    assert want[0].tokens == 35 and want[1].tokens == 31
    same(statistics(model, [together]), want)


def test_whole_forwards_see_what_layers_in_turn_see(tiny, more_ids):
    model = tiny("llama")
    ffns = find_ffns(model)
    with torch.no_grad():
        stream = LayerStream(model, ffns, more_ids)
    whole = WholeForwards(model, of_windows(more_ids, False))
    for ffn in ffns:
        stream.reach(ffn)
        for held_out in (False, True):
            a, b = (s.group_statistics([ffn], True, held_out)[0] for s in (stream, whole))
            same([a], [b])
            if held_out:
                same([a.seen], [b.seen])
                torch.testing.assert_close(a.held_out.gram, b.held_out.gram, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(stream.inputs(ffn)[0], whole.inputs(ffn)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sequential", [True, False])
def test_prune_is_the_same_either_way(sequential, tiny, more_ids):
    one, other = tiny("llama"), tiny("llama")
    options = {**OPTIONS, "repair": "least-squares:damping=0.01", "sequential": sequential}
    a = prune(one, text=more_ids, **options)
    b = prune(other, text=[{"input_ids": row[None]} for row in more_ids], **options)
    assert a.mask == b.mask and (a.tokens, a.window) == (b.tokens, b.window) == (128, 16)
    for x, y in zip(a.layers, b.layers, strict=True):
        assert x.error_repaired == pytest.approx(y.error_repaired, rel=1e-3)


def test_a_mixture_and_its_experts_take_batches(ids):
    given = [padded(rows_of(torch.cat((ids, ids.flip(1))), (16, 9, 12, 4, 16, 7, 15, 16)), "left")]
    model = make_mixture("mixtral")
    report = prune(copy.deepcopy(model), repair="least-squares", text=given, **OPTIONS)
    assert report.tokens == 95 and sum(layer.tokens for layer in report.layers) == 2 * 2 * 95
    counted = prune_experts(model, 0.5, "frequency", text=given)
    assert [sum(layer["tokens"]) for layer in counted.layers] == [190, 190]


def test_pictures_go_through_the_whole_model(ids):
    model = make_tower("llava")
    picture = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ids = ids.clamp_max(126)
    words = ids[:1].clone()
    words[0, 2:6] = 127  # four patches
    seen = []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: seen.append(1))
    text = [{"input_ids": ids[1:2]}]
    with_picture = statistics(model, [{"input_ids": words, "pixel_values": picture}, *text])
    handle.remove()
    without = statistics(model, text)
    assert len(seen) == 2 and with_picture[0].tokens == 32 and without[0].tokens == 16
    pruned = prune(model, repair=None, text=[{"input_ids": words, "pixel_values": picture}], **OPTIONS)
    assert [layer.after for layer in pruned.layers] == [48, 48]


IDS = torch.ones(1, 4).long()
BAD = [
    (
        {"input_ids": IDS, "attention_mask": torch.ones(1, 5).long()},
        r"have the shape of its ids, \(1, 4\)",
    ),
    ({"input_ids": IDS, "attention_mask": torch.full((1, 4), 2)}, "hold 0 and 1 only"),
    ({"input_ids": IDS, "attention_mask": torch.zeros(1, 4).long()}, "no padding; got 'none'"),
    ({"input_ids": IDS, "images": ["a.png"]}, r"text\[0\]\['images'\] must hold what the model's"),
    ({"input_ids": [[1, 2]]}, r"text\[0\]\['input_ids'\] must be a \[B, T\] tensor"),
    ({"pixel_values": torch.ones(1)}, r"text\[0\]\['input_ids'\] must be a \[B, T\] tensor"),
    ({"input_ids": torch.ones(1, 4)}, r"text\[0\]\['input_ids'\] must hold token ids"),
    ({"input_ids": torch.full((1, 4), 500)}, r"text\[0\]\['input_ids'\] must lie in \[0, 128\); got \(500, 500\)"),
]


@pytest.mark.parametrize(("batch", "message"), BAD)
def test_bad_batches_are_refused_before_anything_changes(batch, message, tiny):
    model = tiny("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        prune(model, repair=None, text=[batch], **OPTIONS)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_pictures_without_their_places_in_the_text_are_refused(ids):
    model = make_tower("llava")
    words = {"input_ids": ids[:1].clamp_max(126), "pixel_values": torch.randn(1, 3, 16, 16)}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"text must be batches that LlavaForConditionalGeneration takes; .* features"):
        prune(model, repair=None, text=[words], **OPTIONS)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "fisher"}, InputError, "text must be windows of token ids for method 'fisher'; got 'batches'"),
        ({"allocation": "sensitivity"}, InputError, "text must be windows of token ids for curves of layers"),
        ({"repair": "least-squares:target=0.5"}, InputError, "target must be 0 with batches of keyword tensors"),
    ],
)
def test_what_needs_windows_says_so(options, error, message, tiny, more_ids):
    with pytest.raises(error, match=message):
        prune(tiny("llama"), text=[{"input_ids": more_ids}], **{**OPTIONS, "repair": None, **options})


def test_lists_of_expert_modules_cannot_tell_padding(ids):
    model = listed(make_mixture("mixtral"))
    rows = rows_of(ids, (16, 5, 11, 2))
    with pytest.raises(UnsupportedModelError, match="padded cannot be told: give batches without padding"):
        statistics(model, [padded(rows, "left")])
    found = statistics(model, [{"input_ids": row[None]} for row in rows])
    want = statistics(make_mixture("mixtral"), [{"input_ids": row[None]} for row in rows])
    assert [s.tokens for s in found] == [s.tokens for s in want]
    torch.testing.assert_close(found[0].abs_mean, want[0].abs_mean, rtol=1e-4, atol=1e-6)
