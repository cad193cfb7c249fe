"""Nested widths: sorting changes no function, a prefix is the cut model, and nothing is lost on the way back."""

import copy
import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pyprune import CheckpointError, InputError, KeepIndex, Mask, PrunedMLP, accelerate, prune, set_width
from pyprune.base import clock
from pyprune.ffn.warming import warmup
from pyprune.model import checkpoint, families, surgery
from pyprune.model.families import find_ffns
from pyprune.pruning.nested import FILE, attach, compensate, load, narrowed, prune_nested, sort_neurons
from pyprune.speed import timing

BARE = {"method": "magnitude-l2-both", "repair": None}
# What the checkpoint and `set_width` are told; 96 neurons a layer give 48 and 67.
SHARES = (0.5, 0.7)


def pruned_mlps(model):
    return [m for m in model.modules() if isinstance(m, PrunedMLP)]


def tokens(rows=6):
    return torch.randint(3, 128, (rows, 16), generator=torch.Generator().manual_seed(5))


def orders(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(f.intermediate_size, generator=generator) for f in find_ffns(model)]


def prefix(width, size=96):
    return KeepIndex(torch.arange(width), size)


def module_of(tiny, name, weights=None, dtype=torch.float32, **options):
    return PrunedMLP.from_dense(find_ffns(tiny(name).to(dtype))[0].holder, weights=weights, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A nested checkpoint of a tiny LLaMA, and the dense model it was made from."""
    from conftest import make_model

    dense = make_model("llama")
    model = copy.deepcopy(dense)
    report = prune_nested(model, SHARES, text=tokens())
    return dense, model, checkpoint.save(model, tmp_path_factory.mktemp("nested") / "out"), report


# ---- sorting


def test_permute_by_hand():
    from conftest import make_config
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    module = Phi3MLP(make_config("phi3", hidden_size=2, intermediate_size=3))
    with torch.no_grad():  # rows of gate 0 1 2, of up 10 11 12; columns of down 20 21 22
        module.gate_up_proj.weight.copy_(torch.tensor([[0.0, 0], [1, 1], [2, 2], [10, 10], [11, 11], [12, 12]]))
        module.down_proj.weight.copy_(torch.tensor([[20.0, 21, 22], [20, 21, 22]]))
    ffn = families.FFN(0, "", module, families.match(module), "silu")
    surgery.permute(ffn, torch.tensor([2, 0, 1]))
    assert module.gate_up_proj.weight[:, 0].tolist() == [2, 0, 1, 12, 10, 11]
    assert module.down_proj.weight.tolist() == [[22, 20, 21], [22, 20, 21]]


@torch.no_grad()
def test_sorting_changes_no_function(family, tiny, ids):
    model = tiny(family)
    want = model(ids).logits
    before = [f.weights().down.clone() for f in find_ffns(model)]
    parameters = [id(p) for p in model.parameters()]
    permutations = orders(model)
    sort_neurons(model, permutations)
    for ffn, old, order in zip(find_ffns(model), before, permutations, strict=True):
        assert torch.equal(ffn.weights().down, old[order])
    got = model(ids).logits
    # The same products in another order: some roundings of a sum of 96.
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert not torch.equal(got, want)
    assert [id(p) for p in model.parameters()] == parameters


def test_bad_orders_change_nothing(tiny):
    model = tiny("llama")
    (ffn, *_) = find_ffns(model)
    before = ffn.weights().down.clone()
    for order, message in (
        (torch.arange(95), "order of layer 0 must hold 96 integers"),
        (torch.arange(96.0), "order of layer 0 must hold 96 integers"),
        (torch.arange(96).clamp(max=94), r"hold every number in \[0, 96\) once"),
        (torch.arange(96) + 1, r"hold every number in \[0, 96\) once"),
    ):
        with pytest.raises(InputError, match=message):
            surgery.permute(ffn, order)
    with pytest.raises(InputError, match="order must hold one permutation for each of 3 layers; got 1"):
        sort_neurons(model, [torch.arange(96).flip(0)])
    assert torch.equal(ffn.weights().down, before)


# ---- PrunedMLP at a width


@pytest.mark.parametrize("name", ["phi3", "gpt2"])
@pytest.mark.parametrize(
    ("dtype", "weights"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8"), (torch.float32, "bfloat16")],
)
@torch.no_grad()
def test_a_prefix_is_the_cut_module_to_the_bit(name, dtype, weights, tiny):
    for backend, invariant in (("auto", False), ("torch", False), ("auto", True)):
        options = {"backend": backend, "batch_invariant": invariant}
        whole = module_of(tiny, name, weights, dtype, **options)
        before = whole.record.clone()
        for width in (7, 65, 96):
            cut = module_of(tiny, name, weights, dtype, keep=prefix(width), **options)
            whole.set_width(width)
            assert whole.neurons == width
            for count in (1, 33):
                x = torch.randn(count, 32).to(dtype)
                assert torch.equal(whole(x), cut(x))
        assert torch.equal(whole.record, before)


@torch.no_grad()
def test_a_width_is_a_view(tiny):
    module = module_of(tiny, "starcoder2", "int8")
    record, scales, bias = module.record.data_ptr(), module.scales.data_ptr(), module.neuron_bias.data_ptr()
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func, args))
            return func(*args, **(kwargs or {}))

    with Watch():
        module.set_width(40)
    assert seen == []  # nothing is computed, so nothing is copied
    x = torch.randn(1, 32)
    module(x)
    with Watch():
        module(x)
    ((_, args),) = [(f, a) for f, a in seen if "pyprune" in str(f)]
    # The second call makes no view either.
    assert [f for f, _ in seen if "pyprune" not in str(f)] == [torch.ops.aten.mul_.Tensor]
    assert (args[1].shape[0], args[1].data_ptr()) == (40, record)
    assert (args[3].shape[0], args[3].data_ptr()) == (40, scales)
    assert (args[4].shape[0], args[4].data_ptr()) == (40, bias)


@pytest.mark.parametrize(
    ("dtype", "weights"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "int8"), (torch.bfloat16, "int4")],
)
@pytest.mark.parametrize("name", ["phi3", "gpt2"])
@torch.no_grad()
def test_compensated_rows_come_and_go(name, dtype, weights, tiny):
    model = tiny(name).to(dtype)
    (ffn, *_) = find_ffns(model)
    module = PrunedMLP.from_dense(ffn.holder, weights=weights)
    record, state = module.record.clone(), {k: v.clone() for k, v in module.state_dict().items()}
    scales = None if module.scales is None else module.scales.clone()
    down = torch.randn(40, 32)
    surgery.cut(ffn, prefix(40), down.to(dtype))
    x = torch.randn(3, 32).to(dtype)
    want = PrunedMLP.from_dense(ffn.holder, weights=weights)(x)
    address = module.record.data_ptr()
    with torch.inference_mode():
        module.set_width(40, down)
    assert torch.equal(module(x), want)
    assert module.record.data_ptr() == address
    # Whoever saves now saves what was there before.
    assert all(torch.equal(state[k], v) for k, v in module.state_dict().items())
    module.load_state_dict(state)
    assert torch.equal(module(x), want)
    assert "first 40 compensated" in repr(module)
    module.set_width(50, torch.randn(50, 32))  # straight from one to the other
    module.set_width(96)
    assert torch.equal(module.record, record)
    assert scales is None or torch.equal(module.scales, scales)


def test_bad_widths_of_a_module_change_nothing(tiny):
    module = module_of(tiny, "llama")
    module.set_width(30)
    for arguments, message in (
        ((0,), r"neurons must lie in \[1, 96\]; got 0"),
        ((97,), r"neurons must lie in \[1, 96\]; got 97"),
        ((40, torch.ones(39, 32)), r"down must have shape \(40, 32\); got \(39, 32\)"),
        ((40, torch.full((40, 32), float("nan"))), "down must be finite in torch.float32"),
    ):
        with pytest.raises(InputError, match=message):
            module.set_width(*arguments)
        assert module.neurons == 30 and module.plain_down is None
    gather = module_of(tiny, "llama", keep=prefix(9), mode="gather")
    with pytest.raises(InputError, match="mode must be compact"):
        gather.set_width(5)


@torch.no_grad()
def test_a_narrow_module_is_copied_cast_and_loaded(tiny):
    module, other = module_of(tiny, "gpt2", "int8"), module_of(tiny, "gpt2", "int8")
    x, down = torch.randn(2, 32), torch.randn(40, 32)
    module.set_width(40, down)
    want = module(x)
    twin = copy.deepcopy(module)
    module.record.zero_()
    assert torch.equal(twin(x), want)  # its views are of its own memory
    half = twin.to(torch.bfloat16)
    assert half.plain_scales.dtype == torch.float32
    torch.testing.assert_close(half(x.bfloat16()).float(), want, rtol=0.02, atol=0.1)
    half.set_width(96)
    assert torch.equal(half.record, other.record) and torch.equal(half.scales, other.scales)
    # What stands in the place of a parameter is seen, by its name or by its data.
    module = module_of(tiny, "llama")
    module.set_width(40)
    module(x)
    assert torch.equal(torch.func.functional_call(module, {"record": torch.zeros(96, 96)}, x), torch.zeros(2, 32))
    module.record.data = torch.zeros(96, 96)
    assert torch.equal(module(x), torch.zeros(2, 32))
    state = module_of(tiny, "llama").state_dict()
    module.load_state_dict(state)
    assert torch.equal(module(x), module_of(tiny, "llama", keep=prefix(40))(x))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_gradients_reach_the_prefix_only(backend, tiny):
    module = module_of(tiny, "phi", backend=backend).train()
    cut = module_of(tiny, "phi", backend=backend, keep=prefix(40)).train()
    module.set_width(40)
    x, upstream = torch.randn(3, 32), torch.randn(3, 32)
    for each in (module, cut):
        each(x).backward(upstream)
    for name in ("record", "neuron_bias"):
        grad = getattr(module, name).grad
        torch.testing.assert_close(grad[:40], getattr(cut, name).grad)
        assert grad[:40].abs().sum() > 0 and not grad[40:].any()
    module.set_width(40, torch.ones(40, 32))
    with pytest.raises(InputError, match="compensated down rows cannot be trained"):
        module(x)
    assert module.eval()(x).requires_grad  # looking is allowed


@pytest.mark.parametrize("weights", [None, "int8"])
@torch.no_grad()
def test_a_narrow_module_compiles_into_one_graph(weights, tiny):
    module = module_of(tiny, "starcoder2", weights)
    x = torch.randn(4, 32)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for width in (40, 96, 7):
        module.set_width(width)
        assert torch.equal(compiled(x), module(x))
    exported = torch.export.export(module, (x,)).module()
    assert torch.equal(exported(x), module(x))


@pytest.mark.gpu
@torch.no_grad()
def test_cuda_graph_of_a_narrow_module(tiny):
    module = module_of(tiny, "llama", dtype=torch.bfloat16).cuda()
    module.set_width(40, torch.randn(40, 32))
    x = torch.randn(1, 32, dtype=torch.bfloat16, device="cuda")
    warmup(module, (1,))
    out = torch.empty_like(x)
    replay = clock.graphed(lambda: out.copy_(module(x)), "cuda")
    for _ in range(2):
        x.normal_()
        replay()
        assert torch.equal(out, module(x))
    compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True)
    for width in (40, 96, 17):
        module.set_width(width)
        for _ in range(3):
            torch.testing.assert_close(compiled(x), module(x))


# ---- whole models


@torch.no_grad()
def test_prune_nested_sorts_by_the_criterion(made, ids):
    dense, model, _, report = made
    assert (report.shares, report.widths) == ([0.5, 0.7], [[48] * 3, [67] * 3])
    assert (model(ids).logits - dense(ids).logits).abs().max() < 1e-4
    # Wanda keeps the first 48 of the sorted model in the first layer, where its input is the same.
    mask = prune(copy.deepcopy(dense), keep=0.5, allocation="uniform:multiple=1", text=tokens()).mask
    first, order = find_ffns(dense)[0].weights().up, mask.layers[0].neurons.long()
    kept = find_ffns(model)[0].weights().up[:48]
    assert {tuple(r) for r in kept.tolist()} == {tuple(r) for r in first[order].tolist()}
    for errors in report.errors:
        assert all(0 < after < before for before, after in errors)
    facts = model.config.pyprune
    assert facts["base_fingerprint"] == families.fingerprint(dense, find_ffns(dense))
    assert facts["nested"]["fingerprint"] == families.fingerprint(model, find_ffns(model))
    assert "keep" not in facts["provenance"]["config"] and facts["provenance"]["tokens"] == 96
    json.dumps(report.to_json())


@pytest.mark.parametrize("name", ["opt", "phi3"])
@torch.no_grad()
def test_rows_are_those_of_pruning_to_that_width(name, tiny, ids, same_logits):
    """Sequentially fitted: the same as pruning the sorted model to the prefix, layer by layer."""
    model = tiny(name)
    config = {"method": "magnitude-l2-both", "repair": "least-squares"}
    with pytest.warns(match=r"of 288 neurons, in \d layers, were never active") if name == "opt" else nullcontext():
        prune_nested(model, (0.5, [30, 96, 67]), **config, text=tokens())
    sorted_model = copy.deepcopy(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    accelerate(model)
    for width in (0.5, [30, 96, 67]):
        counts = set_width(model, width)
        cut = copy.deepcopy(sorted_model)
        mask = Mask(tuple(prefix(c) for c in counts), families.fingerprint(cut, find_ffns(cut)))
        prune(cut, **config, text=tokens(), mask=mask)
        assert getattr(cut, "pyprune_nested", None) is None and "nested" not in cut.config.pyprune
        same_logits(model(ids).logits, accelerate(cut)(ids).logits)
        assert [m.plain_down is not None for m in pruned_mlps(model)] == [True] * 3
    set_width(model, 1.0)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(("name", "target"), [("llama", 0.5), ("gemma3_text", 0.0)])
def test_the_target_is_what_suits_the_model(name, target, tiny):
    report = prune_nested(tiny(name), (0.5,), repair="least-squares:target=auto", text=tokens())
    assert report.options.repair.target == target


@pytest.mark.parametrize("weights", [None, "int8"])
@torch.no_grad()
def test_round_trip_through_disk(weights, made, ids, tmp_path):
    _, model, folder, _ = made
    checkpoint.verify(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(stock(ids).logits, model(ids).logits)
    loaded = load(folder, weights=weights)
    full = loaded(ids).logits
    assert set_width(loaded, 0.5) == [48] * 3
    compensated = loaded(ids).logits
    assert set_width(loaded, 0.5, compensated=False) == [48] * 3
    plain = loaded(ids).logits
    again = attach(accelerate(stock, weights=weights), folder)  # in the other order
    set_width(again, 0.5)
    assert torch.equal(again(ids).logits, compensated)
    assert not torch.equal(plain, compensated)
    # A narrow model saves all of itself.
    set_width(loaded, 0.7)
    if weights is None:
        checkpoint.save(loaded, tmp_path / "again")
        for name in ("model.safetensors", FILE):
            one, other = load_file(folder / name), load_file(tmp_path / "again" / name)
            assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
        checkpoint.verify(tmp_path / "again")
    set_width(loaded, 1.0)
    assert torch.equal(loaded(ids).logits, full)


@torch.no_grad()
def test_bfloat16(made, ids):
    *_, folder, _ = made
    model = load(folder, "bfloat16")
    before = [m.record.clone() for m in pruned_mlps(model)]
    for width in (0.5, 0.7, 0.6, 1.0):
        set_width(model, width)
        assert model(ids).logits.isfinite().all()
    assert all(torch.equal(m.record, b) for m, b in zip(pruned_mlps(model), before, strict=True))


def test_widths_by_layer(made):
    model = load(made[2])
    assert set_width(model, [1.0, 0.25, 10]) == [96, 24, 10]
    assert set_width(model, 0.5, layer=1) == [96, 48, 10]
    assert [m.plain_down is not None for m in pruned_mlps(model)] == [False, True, False]
    assert set_width(model, 67, layer=2) == [96, 48, 67]
    assert [m.neurons for m in pruned_mlps(model)] == [96, 48, 67]
    assert [unit.neurons for unit in timing.ffn_units(model)] == [96, 48, 67]
    assert warmup(model, (1,))[1].problem.intermediate_size == 48
    assert set_width(model, 0.3) == [29] * 3


@torch.no_grad()
def test_widths_that_differ_by_score(tiny, ids, tmp_path):
    model = tiny("llama")
    find_ffns(model)[0].weights().up[:20] *= 9  # beside these the others of the layer are nothing
    config = {"method": "magnitude-l2-both", "allocation": "global:multiple=8,floor=0.1"}
    report = prune_nested(model, (0.5,), **config, text=tokens())
    (widths,) = report.widths
    assert len(set(widths)) > 1 and all(w % 8 == 0 for w in widths) and abs(sum(widths) - 144) <= 4
    checkpoint.save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert set_width(loaded, 0.5) == widths
    assert all(m.plain_down is not None for m in pruned_mlps(loaded))


def test_without_compensation(tiny, tmp_path):
    model = tiny("llama")
    report = prune_nested(model, **BARE, shares=SHARES)
    assert report.errors == [] and report.tokens == 0
    folder = checkpoint.save(model, tmp_path / "out")
    assert not (folder / FILE).exists()
    loaded = load(folder)
    assert set_width(loaded, 0.5) == [48] * 3
    assert all(m.plain_down is None for m in pruned_mlps(loaded))


def test_bad_widths_of_a_model_change_nothing(made, tiny):
    model = load(made[2])
    set_width(model, 0.7)
    for keep, message in (
        (0.0, r"keep must lie in \(0, 1\]; got 0.0"),
        (1.1, r"keep must lie in \(0, 1\]; got 1.1"),
        (float("nan"), r"keep must lie in \(0, 1\]; got nan"),
        ("0.5", r"keep must lie in \(0, 1\]; got '0.5'"),
        (True, r"keep must lie in \(0, 1\]; got True"),
        (1, r"keep must be a share, as a float \(1.0 is all\), or a count from 2 to 96; got 1"),
        (97, "a count from 2 to 96; got 97"),
        ([0.5, 0.5], "keep must hold one width for each of 3 layers; got 2"),
        ([0.5, 0.5, 2.0], r"keep must lie in \(0, 1\]; got 2.0"),
    ):
        with pytest.raises(InputError, match=message):
            set_width(model, keep)
    for layer in (3, -1, "1"):
        with pytest.raises(InputError, match=r"layer must lie in \[0, 3\)"):
            set_width(model, 0.5, layer=layer)
    assert [m.neurons for m in pruned_mlps(model)] == [67] * 3
    with pytest.raises(InputError, match=r"model must be accelerated first \(pyprune.accelerate\)"):
        set_width(tiny("llama"), 0.5)


def test_unsorted_gather_and_unattached_models_are_refused(made, tiny, random_mask):
    model = accelerate(tiny("llama"))
    with pytest.raises(InputError, match=r"neurons sorted by importance.*unsorted=True insists"):
        set_width(model, 0.5)
    assert set_width(model, 0.5, unsorted=True) == [48] * 3
    dense = tiny("llama")
    gather = accelerate(dense, "gather", mask=random_mask(dense, (9, 9, 9)))
    with pytest.raises(InputError, match="be accelerated in mode 'compact'"):
        set_width(gather, 0.5, unsorted=True)
    stock = accelerate(AutoModelForCausalLM.from_pretrained(made[2]))
    with pytest.raises(
        InputError, match=r"call pyprune.pruning.nested.attach\(model, the folder of nested.safetensors\)"
    ):
        set_width(stock, 0.5)
    assert set_width(stock, 0.5, compensated=False) == [48] * 3
    with pytest.raises(CheckpointError, match=r"names nested.safetensors, which was not loaded.*nothing was written"):
        checkpoint.save(stock, made[2].parent / "other")
    assert not (made[2].parent / "other").exists()


def test_another_cut_forgets_the_widths(made, random_mask, tmp_path):
    model = attach(AutoModelForCausalLM.from_pretrained(made[2]), made[2])
    prune(model, **BARE, mask=random_mask(model, (40, 40, 40)))
    assert "nested" not in model.config.pyprune
    folder = checkpoint.save(model, tmp_path / "out")
    assert not (folder / FILE).exists()


def test_narrowed_for_the_command_line(made, tiny):
    model = AutoModelForCausalLM.from_pretrained(made[2])
    assert narrowed(model, made[2], None) is model and pruned_mlps(model) == []
    assert [m.neurons for m in pruned_mlps(narrowed(model, made[2], 0.7))] == [67] * 3
    assert [m.neurons for m in pruned_mlps(narrowed(model, made[2], 0.5))] == [48] * 3
    with pytest.raises(InputError, match=r"width must lie in \(0, 1\]; got 0.0"):
        narrowed(model, made[2], 0.0)
    with pytest.raises(InputError, match="must be a nested checkpoint"):
        narrowed(tiny("llama"), "folder", 0.5)


def test_batches_are_refused(tiny, ids):
    model = tiny("llama")
    for method in ("magnitude-l2-both", "obs"):
        with pytest.raises(InputError, match="text must be windows of token ids with nested widths; got 'batches'"):
            prune_nested(model, (0.5,), method, text=[{"input_ids": ids}])


def test_bad_settings_are_refused(tiny):
    model = tiny("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for config, batches, shares, message in (
        ({}, None, SHARES, "text must be given"),
        (
            {},
            tokens(2),
            SHARES,
            r"text must hold at least 67 tokens to fit 67 neurons a layer .*; got '32 tokens'",
        ),
        ({"repair": "bias"}, tokens(), SHARES, "repair must be none or least-squares"),
        ({"allocation": "latency:target_speedup=2"}, tokens(), SHARES, "allocation must spread a share .* 'latency'"),
        ({"allocation": "global:protect=1,0"}, tokens(), SHARES, r"protect must be \(0, 0\) with nested widths"),
        (BARE, None, (), "shares must hold at least one share"),
        (BARE, None, (0.5, 0.5), "shares must hold each share once; got 0.5"),
        (BARE, None, (1.5,), r"shares must lie in \(0, 1\]; got 1.5"),
        (BARE, None, ([4, 5],), "shares must hold one width for each of 3 layers; got 2"),
    ):
        with pytest.raises(InputError, match=message):
            prune_nested(model, shares, **config, text=batches)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(InputError, match=r"text must lie in \[0, 128\)"):
        compensate(model, tokens() + 100)


# ---- the file


@pytest.fixture
def copied(made, tmp_path):
    shutil.copytree(made[2], tmp_path / "copy")
    return tmp_path / "copy"


def rewrite(folder, change=lambda tensors: None, **metadata):
    """Write the rows again, changed."""
    with safe_open(folder / FILE, framework="pt") as file:
        known = file.metadata()
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, {**known, **metadata})


def test_verify_catches_an_altered_file(copied):
    data = bytearray((copied / FILE).read_bytes())
    data[-1] ^= 1
    (copied / FILE).write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"nested.safetensors was altered"):
        checkpoint.verify(copied)
    (copied / FILE).unlink()
    with pytest.raises(CheckpointError, match=r"nested.safetensors is missing"):
        checkpoint.verify(copied)
    with pytest.raises(CheckpointError, match=r"nested.safetensors, which config.json names, is missing"):
        load(copied)


@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        (lambda t: t.pop("shares.1.layers.2"), {}, "cannot be read.*shares.1.layers.2"),
        (lambda t: t.update({"shares.0.layers.0": torch.zeros(47, 32)}), {}, r"must have shape \[48, 32\]; it has"),
        (lambda t: t["shares.0.layers.1"].fill_(float("nan")), {}, "shares.0.layers.1 of nested.safetensors must hold"),
        (lambda t: t.update({"shares.0.layers.0": torch.zeros(48, 32).int()}), {}, "must hold finite floating-point"),
        (lambda t: None, {"fingerprint": "0"}, "does not belong to the checkpoint"),
        (lambda t: None, {"format": "other"}, "does not belong to the checkpoint"),
    ],
)
def test_wrong_rows_are_refused(change, metadata, message, copied):
    rewrite(copied, change, **metadata)
    with pytest.raises(CheckpointError, match=message):
        load(copied)


def test_a_damaged_file_is_refused(copied):
    (copied / FILE).write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="nested"):
        attach(AutoModelForCausalLM.from_pretrained(copied), copied)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "../model.safetensors"}, r"must name nested.safetensors; it names '../model.safetensors'"),
        ({"shares": [0.5]}, "does not fit the model's 3 FFNs"),
        ({"shares": [0.5, "x"]}, "does not fit the model's 3 FFNs"),
        ({"widths": [[48] * 3, [67] * 2]}, "does not fit the model's 3 FFNs"),
        ({"widths": [[48] * 3, [97] * 3]}, "does not fit the model's 3 FFNs"),
        ({"widths": 7}, "cannot be read"),
    ],
)
def test_wrong_entries_are_refused(changes, message, copied):
    model = AutoModelForCausalLM.from_pretrained(copied)
    model.config.pyprune = {**model.config.pyprune, "nested": {**model.config.pyprune["nested"], **changes}}
    with pytest.raises(CheckpointError, match=message):
        attach(model, copied)


def test_widths_by_sensitivity_differ_by_layer_and_fit_the_share(tiny):
    model = tiny("llama")
    config = {"allocation": "sensitivity:multiple=8"}
    report = prune_nested(model, (0.75, 0.5), **config, text=tokens())
    for share, widths in zip(report.shares, report.widths, strict=True):
        assert sum(widths) == pytest.approx(share * 288, abs=8)
    assert len(set(report.widths[1])) > 1
    accelerate(model)
    assert set_width(model, 0.5) == report.widths[1]
