"""PrunedMoE in the place of Transformers' modules of experts: what `accelerate` does with mixtures."""

import copy
import warnings
import weakref

import pytest
import torch
from moe_cases import MIXTURES, make_mixture
from transformers.models.dbrx.modeling_dbrx import DbrxConfig, DbrxExperts

from pyprune import BackendError, InputError, PrunedMoE, UnsupportedModelError, accelerate, prune, save
from pyprune.base.experts import Experts
from pyprune.ffn import accelerate_experts, moe_choice, native, tuned
from pyprune.ffn.mlp import PrunedMLP
from pyprune.ffn.moe_operator import why_no_kernel
from pyprune.ffn.tuned import Entry
from pyprune.ffn.warming import warmup
from pyprune.model.expert_form import activation
from pyprune.model.experts import find_bank
from pyprune.model.families import find_ffns
from pyprune.model.mask import KeepIndex

needs_kernel = pytest.mark.skipif(
    bool(why_no_kernel("cpu", torch.float32, torch.float32)), reason="no native kernel of experts"
)
OLMOE = {**MIXTURES["qwen3_moe"], "intermediate_size": 48}
TAKEN = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "nemotron_h")


def mixture(kind, seed=0, **changes):
    if kind != "olmoe":
        return make_mixture(kind, seed, **changes)
    MIXTURES["olmoe"] = OLMOE
    try:
        return make_mixture("olmoe", seed, **changes)
    finally:
        del MIXTURES["olmoe"]


def quietly(model, **options):
    """`accelerate` that must not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return accelerate(model, **options)


def modules(model):
    return [m for m in model.modules() if isinstance(m, PrunedMoE)]


def banks(model):
    return accelerate_experts.banks_of(find_ffns(model))


@pytest.fixture(params=TAKEN)
def kind(request):
    return request.param


@needs_kernel
@pytest.mark.parametrize("backend", ["auto", "torch", "cpu"])
def test_an_accelerated_mixture_computes_what_it_did(kind, backend, ids, same_logits):
    model = mixture(kind)
    number, parameters = len(banks(model)), sum(p.numel() for p in model.parameters())
    originals = [weakref.ref(bank.module) for bank in banks(model)]
    with torch.no_grad():
        want = model(ids).logits
        written = model.generate(ids[:2], max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert quietly(model, backend=backend) is model
        same_logits(model(ids).logits, want)
        assert torch.equal(model.generate(ids[:2], max_new_tokens=6, min_new_tokens=6, do_sample=False), written)
    assert len(modules(model)) == number > 0
    assert sum(p.numel() for p in model.parameters()) == parameters  # no weight is there twice
    assert [original() for original in originals] == [None] * number
    assert all(isinstance(model.get_submodule(one.layer), PrunedMLP) for one in warmup(model, (1,)))
    with pytest.raises(UnsupportedModelError, match="add adapters to the model before"):
        modules(model)[0].down_proj.data.zero_()
    assert not hasattr(modules(model)[0], "up_proj")
    with pytest.raises(UnsupportedModelError, match="is accelerated already"):
        accelerate(model)


@needs_kernel
def test_it_saves_as_its_family_and_loads_again(kind, ids, tmp_path):
    model = mixture(kind)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    model.save_pretrained(tmp_path / "dense")
    quietly(model)
    state = model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], t) for name, t in before.items())
    save(model, tmp_path / "x")
    again = type(model).from_pretrained(tmp_path / "x").eval()
    assert all(torch.equal(t, before[name]) for name, t in again.state_dict().items())
    other = quietly(mixture(kind, seed=3))
    assert not torch.equal(other(ids).logits, model(ids).logits)
    other.load_state_dict(state)
    assert torch.equal(other(ids).logits, model(ids).logits)


@needs_kernel
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
@pytest.mark.filterwarnings("ignore:.* experts saw too few")
@torch.no_grad()
def test_pruned_experts_run_and_save(kind, ids, same_logits, tmp_path):
    model = mixture(kind)
    prune(model, keep=0.5, method="wanda", repair=None, allocation="uniform:multiple=8", text=ids)
    want = model(ids).logits
    quietly(model)
    assert {m.intermediate_size for m in modules(model)} == {24} and {m.record.shape[1] for m in modules(model)} == {24}
    same_logits(model(ids).logits, want)
    save(model, tmp_path / "x")
    same_logits(type(model).from_pretrained(tmp_path / "x").eval()(ids).logits, want)


@needs_kernel
@pytest.mark.parametrize("mode", ["compact", "gather"])
@torch.no_grad()
def test_loud_channels_do_not_drown_the_others_in_int8(mode, ids):
    bank = banks(mixture("mixtral"))[0]
    bank.module.down_proj[:, 5] *= 60  # [E, D, F]
    d, f = bank.module.down_proj.shape[1:]
    keep = [KeepIndex(range(0, f, 2), f)] * bank.experts if mode == "gather" else None
    x, weights = torch.randn(6, d), torch.rand(6, 2)
    index = torch.stack([torch.randperm(bank.experts)[:2] for _ in range(6)])
    exact, own = (PrunedMoE.from_bank(bank, keep, mode, weights=w) for w in (None, "int8"))
    assert own.channel_scales[5] >= 32 * own.channel_scales.median()
    want, found = exact(x, index, weights), own(x, index, weights)
    quiet = [c for c in range(d) if c != 5]
    assert (found - want)[:, quiet].norm() < 0.02 * want[:, quiet].norm()
    other = PrunedMoE.from_bank(banks(mixture("mixtral", seed=3))[0], keep, mode, weights="int8")
    other.load_state_dict(own.state_dict())
    assert torch.equal(other(x, index, weights), found) and torch.equal(other.channel_scales, own.channel_scales)
    with torch.enable_grad():
        assert torch.allclose(own(x.requires_grad_(), index, weights), found, rtol=1e-3, atol=1e-4)


@needs_kernel
@pytest.mark.parametrize("weights", ["int8", "bfloat16"])
def test_records_of_another_dtype(weights, ids):
    model = mixture("mixtral")
    bank = banks(model)[0]
    want = model(ids).logits
    before = {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}
    quietly(model, weights=weights)
    own = modules(model)[0]
    assert str(own.record.dtype) == f"torch.{weights}" and (own.scales is not None) == (weights == "int8")
    assert {name: (t.shape, t.dtype) for name, t in model.state_dict().items()} == before
    assert (model(ids).logits - want).norm() < 0.05 * want.norm()
    half = copy.deepcopy(own).half()
    assert half.dtype == torch.float16 and (half.scales is None or half.scales.dtype == torch.float32)
    assert half.record.dtype == (torch.int8 if weights == "int8" else torch.float16)
    state = own.state_dict()
    again = PrunedMoE.from_bank(bank, weights=weights)
    again.record.data.zero_()
    again.load_state_dict(state)
    assert torch.equal(again.record, own.record)
    with torch.no_grad():
        bank.module.down_proj[1, 2, 3] = float("inf")
    with pytest.raises(InputError, match=r"be finite in torch\.(float32|bfloat16); got \(.*inf\)"):
        PrunedMoE.from_bank(bank, weights=weights)


REASONS = {
    "gpt_oss": "8 experts and 0 FFNs .*layers.0.mlp.experts: its experts have biases and an activation of its own",
    "llama4_text": "4 experts and 0 FFNs .*its experts have rows that come sorted by expert",
}


@pytest.mark.parametrize("kind", sorted(REASONS))
def test_what_cannot_run_from_records_stays_and_the_warning_says_why(kind, ids):
    model = make_mixture(kind)
    want = model(ids).logits
    with pytest.warns(UserWarning, match=f"{REASONS[kind]}"):
        accelerate(model)
    assert not modules(model)
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(UnsupportedModelError, match=r"cannot run from a record .*, and all were asked for"):
        accelerate(make_mixture(kind), backend="cpu")
    bank = banks(make_mixture(kind))[0]
    with pytest.raises(UnsupportedModelError, match=r"\.experts \(.*\) cannot run from records: its experts have"):
        PrunedMoE.from_bank(bank)


def test_a_clipped_activation_is_no_silu():
    model = make_mixture("mixtral")
    assert activation(banks(model)[0]) == "silu"

    class Clipped(torch.nn.SiLU):
        def forward(self, x):
            return super().forward(x.clamp(max=7.0))

    model.model.layers[0].mlp.experts.act_fn = Clipped()
    assert activation(banks(model)[0]) is None
    with pytest.warns(UserWarning, match=r"4 experts and 0 FFNs .*layers\.0\.mlp\.experts: .*an activation of its own"):
        accelerate(model)
    assert len(modules(model)) == 1  # the other layer


@needs_kernel
@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("backend", ["auto", "torch", "cpu"])
@torch.no_grad()
def test_a_gather_runs_a_mask_over_all_weights(kind, backend, ids, same_logits, random_mask, tmp_path):
    """Any number of each expert; the model saves whole; another mask is taken at once, over the same records."""
    model, pruned = make_mixture(kind), make_mixture(kind)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    ffns = find_ffns(pruned)
    masks = [random_mask(model, [5 + (7 * i + 11 * j) % 43 for i in range(len(ffns))]) for j in range(2)]

    def dense(mask):
        """Logits of the dense model with down rows of zeros."""
        pruned.load_state_dict(before)
        for ffn, keep in zip(ffns, mask.layers, strict=True):
            dropped = torch.ones(ffn.intermediate_size, dtype=torch.bool)
            dropped[keep.neurons.long()] = False
            ffn.weights().down[dropped] = 0
        return pruned(ids).logits

    own = [[mask.layers[f.layer] for f in ffns if f.group == bank.name] for mask in masks for bank in banks(model)]
    quietly(model, mode="gather", mask=masks[0], backend=backend, measure=False)
    same_logits(model(ids).logits, dense(masks[0]))
    number = len(modules(model))
    assert ", gather 5 to 26, silu" in repr(modules(model)[0]) or kind != "qwen3_moe"
    records = [m.record.data_ptr() for m in modules(model)]
    if kind == "qwen3_moe":  # nothing but experts
        for module, keep in zip(modules(model), own[number:], strict=True):
            module.set_keep(keep)
        same_logits(model(ids).logits, dense(masks[1]))
    state = model.state_dict()
    assert all(torch.equal(state[name], t) for name, t in before.items()) and state.keys() == before.keys()
    save(model, tmp_path / "x")
    pruned.load_state_dict(before)
    for module in modules(model):
        module.set_keep(None)
    if kind == "qwen3_moe":
        same_logits(model(ids).logits, pruned(ids).logits)
    assert [m.record.data_ptr() for m in modules(model)] == records
    same_logits(type(model).from_pretrained(tmp_path / "x").eval()(ids).logits, pruned(ids).logits)


def test_bad_masks_of_a_gather_are_refused(random_mask):
    model = make_mixture("mixtral")
    bank = banks(model)[0]
    keep = [KeepIndex([0, 3], 48)] * 4
    for arguments, message in (
        ({"mode": "gather"}, "keep must be given in gather mode, and there alone; got 'gather'"),
        ({"keep": keep}, "keep must be given in gather mode, and there alone; got 'compact'"),
        ({"keep": keep[:3], "mode": "gather"}, "keep must have one of each of 4 experts; got 3"),
        ({"keep": [*keep[:3], KeepIndex([0], 47)], "mode": "gather"}, "keep must refer to 48 neurons; got 47"),
        ({"keep": keep, "mode": "scatter"}, "mode must be one of compact, gather; got 'scatter'"),
    ):
        with pytest.raises(InputError, match=message):
            PrunedMoE.from_bank(bank, **arguments)
    module = PrunedMoE.from_bank(bank, keep, "gather")
    with pytest.raises(InputError, match="keep must refer to 48 neurons"):
        module.set_keep([KeepIndex([1], 47)] * 4)
    assert module.counts.tolist() == [2] * 4
    with pytest.raises(InputError, match="mask must belong to this model"):
        accelerate(make_mixture("mixtral", seed=1), mode="gather", mask=random_mask(model, [24] * 8))


@needs_kernel
@torch.no_grad()
def test_a_gathers_first_accelerate_times_kernel_and_twin(table, random_mask):
    model = make_mixture("mixtral")
    quietly(model, mode="gather", mask=random_mask(model, [24] * 8))
    names = [name for name in tuned.known("cpu") if "gated gather silu" in name and name.startswith("experts")]
    assert 1 <= len(names) <= len(moe_choice.TOKENS)  # as far as time went
    assert all({e.backend for e in tuned.known("cpu")[name]} == {"cpu", "torch"} for name in names)


def test_masks_and_backends_without_a_kernel_are_refused(random_mask):
    model = make_mixture("mixtral")
    with pytest.raises(UnsupportedModelError, match=r"has experts, which are pruned in place: prune\(model, mask"):
        accelerate(model, mask=random_mask(model, [24] * 8))
    with pytest.raises(UnsupportedModelError, match="backend cublas has no kernel of experts"):
        accelerate(model, backend="cublas")
    with pytest.raises(UnsupportedModelError, match="experts: needs tensors on a CUDA device, not on cpu"):
        accelerate(model, backend="cuda")
    with pytest.raises(InputError, match="backend must be one of auto, torch, cpu, triton, cuda; got 'cublas'"):
        PrunedMoE.from_bank(banks(model)[0], backend="cublas")
    assert not modules(model)
    double = PrunedMoE.from_bank(banks(model.double())[0], backend="cpu")
    with torch.no_grad(), pytest.raises(BackendError, match=r"cpu: no kernel for torch\.float64"):
        double(torch.zeros(2, 32).double(), torch.zeros(2, 1).long(), torch.ones(2, 1).double())


def test_without_a_kernel_experts_stay(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: "native CPU library not built")
    model = make_mixture("mixtral")
    with pytest.warns(UserWarning, match="8 experts .* stay as they are, in torch .*native CPU library not built"):
        accelerate(model)
    assert not modules(model)


@needs_kernel
def test_bad_calls_are_refused():
    module = PrunedMoE.from_bank(banks(make_mixture("mixtral"))[0])
    x, index, weights = torch.zeros(3, 32), torch.tensor([[0, 1]] * 3), torch.ones(3, 2)
    calls = (
        ((x[:, :31], index, weights), r"x must have shape \[\.\.\., 32\]; got \(3, 31\)"),
        ((x.double(), index, weights), "dtype of x must be torch.float32"),
        ((x, index + 3, weights), r"index must name experts in \[0, 4\); got \(3, 4\)"),
        ((x, index - 1, weights), r"index must name experts in \[0, 4\); got \(-1, 0\)"),
        ((x, index), "call must bring hidden states, experts and weights; got 2"),
        ((x, index, weights[:, :1]), r"weights must have shape \(3, 2\), as index has; got \(3, 1\)"),
    )
    for arguments, message in calls:
        for enabled in (True, False):  # in training, and not
            with torch.set_grad_enabled(enabled), pytest.raises(InputError, match=message):
                module(*arguments)
    with torch.no_grad():
        assert torch.equal(module(x + 1, weights, index), module(hidden_states=x + 1, index=index, weights=weights))
        assert module(x.view(1, 3, 32), index.view(1, 3, 2), weights.view(1, 3, 2)).shape == (1, 3, 32)


@torch.no_grad()
def test_experts_whose_neurons_lie_flat_in_a_module_of_their_own():
    config = DbrxConfig().ffn_config
    config.hidden_size, config.ffn_hidden_size, config.moe_num_experts = 32, 48, 4
    module = DbrxExperts(config).eval()
    for parameter in module.parameters():
        parameter.normal_(std=0.15)
    own, state = PrunedMoE.from_bank(find_bank("x", module)), module.state_dict()
    assert own.state_dict().keys() == state.keys()
    assert all(torch.equal(own.state_dict()[name], tensor) for name, tensor in state.items())
    call = torch.randn(1, 5, 32), torch.rand(5, 4).argsort(1)[:, :2], torch.rand(5, 2)
    torch.testing.assert_close(own(*call).view(5, 32), module(*call).view(5, 32), rtol=1e-4, atol=1e-6)
    want = own.record.clone()
    own.record.zero_()
    own.load_state_dict(state)
    assert torch.equal(own.record, want)


def test_loading_says_what_does_not_fit():
    module = PrunedMoE.from_bank(banks(make_mixture("mixtral"))[0])
    state = module.state_dict()
    before = module.record.clone()
    module.load_state_dict({"down_proj": 2 * state["down_proj"]}, strict=False)
    assert torch.equal(module.record[..., :64], before[..., :64])
    assert torch.equal(module.record[..., 64:], 2 * before[..., 64:])
    with pytest.raises(RuntimeError, match=r"down_proj must have shape \(4, 32, 48\); got \(4, 32, 40\)"):
        module.load_state_dict({**state, "down_proj": state["down_proj"][..., :40]})
    with pytest.raises(RuntimeError, match=r"Missing key.*gate_up_proj(.|\n)*Unexpected key.*else"):
        module.load_state_dict({"down_proj": state["down_proj"], "else": state["down_proj"]})


@needs_kernel
def test_training_takes_torchs_path_and_gives_its_gradients(ids):
    dense = make_mixture("qwen3_moe")
    model = quietly(copy.deepcopy(dense))
    for one in (dense, model):
        one.train()
        one(ids, labels=ids).loss.backward()
    want = dense.model.layers[0].mlp.experts
    gate, up, down = modules(model)[0].record.grad.split(32, dim=2)
    torch.testing.assert_close(torch.cat([gate, up], 1), want.gate_up_proj.grad, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(down.transpose(1, 2), want.down_proj.grad, rtol=1e-3, atol=1e-6)
    router = [m.model.layers[0].mlp.gate.weight.grad for m in (model, dense)]
    torch.testing.assert_close(*router, rtol=1e-3, atol=1e-6)
    frozen = quietly(make_mixture("qwen3_moe").requires_grad_(False))
    assert not modules(frozen)[0].record.requires_grad


@needs_kernel
@torch.no_grad()
def test_compiles_and_exports():
    module = PrunedMoE.from_bank(banks(make_mixture("qwen3_moe"))[0])
    dynamic = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (1, 4, 90):
        x, index = torch.randn(tokens, 32), torch.rand(tokens, 4).argsort(1)[:, :2]
        call = (x, index, torch.rand(tokens, 2))
        assert torch.equal(dynamic(*call), module(*call))
    assert torch.equal(torch.export.export(module, call).module()(*call), module(*call))
    module.requires_grad_(True)
    with torch.enable_grad():
        call[0].requires_grad_()
        torch.compile(module, backend="aot_eager", fullgraph=True)(*call).sum().backward()
        got = module.record.grad.clone()
        module.record.grad = None
        module(*call).sum().backward()
    torch.testing.assert_close(got, module.record.grad)


@needs_kernel
@torch.no_grad()
def test_batch_invariant_mixtures(ids):
    model = quietly(make_mixture("mixtral"), batch_invariant=True)
    module = modules(model)[0]
    x, index, weights = torch.randn(9, 32), torch.rand(9, 4).argsort(1)[:, :2], torch.rand(9, 2)
    for grad in (False, True):  # also where nothing is learned, and nobody said so
        with torch.set_grad_enabled(grad):
            whole = module(x, index, weights)
            for t in (0, 4, 8):
                assert torch.equal(module(x[t : t + 1], index[t : t + 1], weights[t : t + 1])[0], whole[t])


def test_no_tokens_and_forward_derivatives(ids):
    """As the experts in their place: an empty batch comes back empty, and a tangent is that of plain torch."""
    module = modules(quietly(make_mixture("mixtral")).requires_grad_(False))[0]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            out = module(torch.zeros(0, 32), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
            assert out.shape == (0, 32)
    x, way = torch.randn(3, 32), torch.randn(3, 32)
    index, weights = torch.tensor([[0, 1], [2, 3], [1, 2]]), torch.rand(3, 2)
    _, tangent = torch.func.jvp(lambda t: module(t, index, weights), (x,), (way,))
    step = 1e-3
    wanted = (module(x + step * way, index, weights) - module(x - step * way, index, weights)) / (2 * step)
    torch.testing.assert_close(tangent, wanted, rtol=1e-2, atol=1e-4)


@torch.no_grad()
def test_a_call_reads_no_count_from_the_device(random_mask, monkeypatch):
    """A graph could not be captured else; on a GPU every layer of every step would wait."""
    model = make_mixture("mixtral")
    module = modules(quietly(model, mode="gather", mask=random_mask(model, (20,) * 8)))[0]
    monkeypatch.setattr(torch.Tensor, "__int__", lambda tensor: pytest.fail("a tensor was read"))
    module.experts.check_call(torch.randn(3, 32), torch.tensor([[0, 1]] * 3), torch.rand(3, 2))


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A folder for what is measured here."""
    monkeypatch.setenv("PYPRUNE_CACHE", str(tmp_path / "cache"))
    tuned.reload()
    yield tmp_path / "cache"
    monkeypatch.undo()
    tuned.reload()


@needs_kernel
def test_the_first_accelerate_of_a_shape_measures_it(table, monkeypatch):
    timed = []
    jobs = moe_choice._jobs
    monkeypatch.setattr(moe_choice, "_jobs", lambda *a: timed.append(a[-1]) or jobs(*a))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such small experts may be slower by the kernel
        accelerate(make_mixture("mixtral"))
        assert timed == list(moe_choice.TOKENS)
        accelerate(make_mixture("mixtral"))
    assert timed == list(moe_choice.TOKENS)
    names = [name for name in tuned.known("cpu") if name.startswith("experts 2 of 4 D32 K64 M")]
    assert len(names) == len(moe_choice.TOKENS)
    for name in names:
        entries = tuned.known("cpu")[name]
        assert {e.backend for e in entries} == {"cpu", "torch", "transformers"}
        assert [e.seconds for e in entries] == sorted(e.seconds for e in entries)


def note(model, seconds):
    """Write into the table, for tokens from `TOKENS` on, seconds of (cpu, torch, transformers)."""
    bank = banks(model)[0]
    experts, dtype = accelerate_experts.described(bank, None)
    for tokens, own in zip(moe_choice.TOKENS, seconds, strict=False):
        entries = [Entry(n, {}, s) for n, s in zip(("cpu", "torch", "transformers"), own, strict=True)]
        tuned.store("cpu", {moe_choice.key(experts, dtype, 2, tokens): sorted(entries, key=lambda e: e.seconds)})
    tuned.reload()


@needs_kernel
def test_auto_never_takes_what_was_measured_to_be_slower(table):
    table.mkdir()
    model = make_mixture("mixtral")
    note(model, [(2.0, 1.5, 1.0)] * 3)
    with pytest.warns(
        UserWarning, match=r"experts of 2 layers stay .*layers\.0\.mlp\.experts: .* up to 2\.00 times as fast"
    ):
        accelerate(model, measure=False)
    assert not modules(model)
    forced = quietly(make_mixture("mixtral"), backend="cpu")
    assert len(modules(forced)) == 2
    note(model, [(1.0, 2.0, 3.0), (1.0, 2.0, 3.0), (2.0, 1.0, 1.0)])
    quietly(model, measure=False)
    assert [m.native_pairs for m in modules(model)] == [8, 8]  # 4 tokens to 2 experts each
    note(model := make_mixture("mixtral"), [(1.0, 2.0, 3.0)] * 5)
    quietly(model, measure=False)
    assert modules(model)[0].native_pairs >= 512


@needs_kernel
def test_mixtures_with_dense_layers_get_both(ids):
    model = quietly(make_mixture("deepseek_v3"))
    assert len(modules(model)) == 1 and sum(isinstance(m, PrunedMLP) for m in model.modules()) == 2
    assert repr(modules(model)[0]) == "PrunedMoE(gated, E=4, D=32, F=48, silu, auto)"
    assert isinstance(modules(model)[0].experts, Experts)
