"""Masks on every family, what they gather, and the pruner from the first step to the cut."""

import copy
import json

import pytest
import torch
from moe_cases import listed, make_mixture
from tower_cases import make_tower
from transformers import AutoModelForCausalLM

from pyprune import CheckpointError, InputError, UnsupportedModelError
from pyprune.model import checkpoint
from pyprune.model.families import find_ffns
from pyprune.training import TrainingConfig, TrainingPruner, methods
from pyprune.training.masks import NeuronMask


def pruner_of(model, **values):
    return TrainingPruner(model, TrainingConfig(**{"steps": 2, "keep": 0.5, "cooldown": 1, **values}))


def one_step(model, pruner, ids, step=None):
    model.train()
    pruner.before_step(pruner.done if step is None else step)
    model(ids, labels=ids).loss.backward()
    pruner.step()
    model.zero_grad()
    model.eval()


@pytest.mark.parametrize("name", ["gpt2", "stablelm", "opt"])
def test_score_gradient_is_the_derivative_by_the_mask(name, tiny, ids):
    """Against central differences in float64, for kept and for removed neurons: dL/dm_j = sum_t a_tj dL/da'_tj.

    These families normalise in float64, and the loss is not the model's own, for that is float32.
    """
    still = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout"), 0.0)
    model = tiny(name, **still).double().train()
    masks = [NeuronMask(ffn, gradient=True, moments=False) for ffn in find_ffns(model)]
    for mask in masks:
        mask.set(torch.arange(96) % 3 > 0)

    def loss():
        return model(ids).logits.double().square().mean()

    loss().backward()
    gradient = masks[1].gradient
    assert gradient.dtype == torch.float64
    eps = 1e-4
    for j in (0, 1, 5, 90):
        losses = []
        with torch.no_grad():
            for sign in (1, -2, 1):
                masks[1]._mask[j] += sign * eps
                losses.append(float(loss()))
        assert float(gradient[j]) == pytest.approx((losses[0] - losses[1]) / (2 * eps), rel=1e-5)


def test_removed_neurons_get_a_score_gradient_but_none_on_their_weights(tiny, ids):
    model = tiny("llama")
    ffn = find_ffns(model)[0]
    mask = NeuronMask(ffn, gradient=True, moments=False)
    keep = torch.arange(96) < 40
    mask.set(keep)
    seen = []
    ffn.down.register_forward_pre_hook(lambda module, args: seen.append(args[0]) or args[0].retain_grad())
    raw = []
    ffn.holder.up_proj.register_forward_hook(lambda module, args, out: raw.append(out.detach()))
    gates = []
    ffn.holder.act_fn.register_forward_hook(lambda module, args, out: gates.append(out.detach()))
    model.train()(ids, labels=ids).loss.backward()
    want = (raw[0] * gates[0] * seen[0].grad).flatten(0, 1).sum(0)
    torch.testing.assert_close(mask.gradient, want)
    assert mask.gradient[~keep].abs().min() > 0
    assert ffn.holder.up_proj.weight.grad[~keep].abs().max() == 0
    assert ffn.down.weight.grad[:, ~keep].abs().max() == 0
    assert ffn.down.weight.grad[:, keep].abs().max() > 0


def test_gradients_and_products_add_up_over_batches(tiny, ids):
    def gather(batches):
        model = tiny("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
        mask = NeuronMask(find_ffns(model)[0], gradient=True, moments=True)
        mask.set(torch.arange(96) % 2 > 0)
        for batch in batches:
            (model(batch, labels=batch).loss / len(batches)).backward()
        return mask

    whole, halves = gather([ids]), gather([ids[:2], ids[2:]])
    torch.testing.assert_close(whole.gradient, halves.gradient, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(whole.products, halves.products)
    assert whole.products[::2].abs().max() == 0  # the activations as masked
    whole.set(torch.ones(96, dtype=torch.bool))
    assert whole.gradient is None
    assert whole.products is None


def test_evaluation_is_masked_and_gathers_nothing(tiny, ids, masked):
    model = tiny("phi3")
    pruner = pruner_of(model, method="gum")
    one_step(model, pruner, ids)
    pruner.before_step(1)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            logits = model(ids).logits
    mask = pruner._masks[0]
    assert mask.products is None
    logits = model(ids, labels=ids).loss
    logits.backward()
    assert mask.gradient is None
    with pytest.raises(InputError, match="step must follow a backward pass of the model in training mode"):
        pruner.step()


def test_bfloat16_autocast(tiny, ids):
    """Sums run in float32: the score gradient is that of float32 up to what bfloat16 activations lose."""
    gathered = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny("llama").train()
        mask = NeuronMask(find_ffns(model)[2], gradient=True, moments=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        assert mask.gradient.dtype == mask.products.dtype == torch.float32
        gathered.append((mask.gradient, mask.products))
    for exact, half in zip(*gathered, strict=True):
        assert (half - exact).norm() < 0.05 * exact.norm()


def test_whole_model_in_bfloat16(tiny, ids):
    model = tiny("gpt2").bfloat16()
    pruner = pruner_of(model, method="gum")
    one_step(model, pruner, ids)
    assert pruner.scores[0].dtype == torch.float32
    one_step(model, pruner, ids)
    assert sum(pruner.finish().widths) == 144


def test_the_cut_model_is_the_masked_model(family, tiny, ids, masked, tmp_path, same_logits):
    """On every family: masks while training, compacted at the end to widths that differ by layer, saved, loaded."""
    model = tiny(family)
    pruner = pruner_of(model, method="gum")
    one_step(model, pruner, ids)
    one_step(model, pruner, ids)
    assert pruner.keep == 0.5
    dense = copy.deepcopy(model)
    for module in dense.modules():
        module._forward_pre_hooks.clear()
    with torch.no_grad():
        before = model(ids).logits
        mask = pruner.finish()
        after = model(ids).logits
        want = masked(dense, mask)(ids).logits
    same_logits(after, before)
    same_logits(after, want)
    assert [f.intermediate_size for f in find_ffns(model)] == list(mask.widths)
    assert sum(mask.widths) == 144
    if family in ("llama", "gpt2", "opt"):
        assert mask.widths != (48, 48, 48)
        checkpoint.save(model, tmp_path / "out")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, after)
        assert loaded.config.pyprune["provenance"]["training"]["method"] == methods.Gum().in_full
        assert loaded.config.pyprune["base_fingerprint"] == mask.fingerprint


def test_a_block_that_several_layers_run_is_masked_in_each(ids):
    """The cut model is the masked one there too; and the gradient is that of one mask for all places."""
    model = make_tower("zamba")
    dense = model(ids, use_cache=False).logits
    pruner = pruner_of(model)
    one_step(model, pruner, ids)
    one_step(model, pruner, ids)
    masked = model(ids, use_cache=False).logits
    assert len(pruner._masks[0]._downs) == 2 and not torch.allclose(masked, dense, atol=1e-3)
    pruner.finish()
    torch.testing.assert_close(model(ids, use_cache=False).logits, masked, rtol=1e-4, atol=1e-5)
    assert not [m for m in model.modules() if m._forward_pre_hooks]


def test_experts_of_a_layer_are_cut_to_one_width(ids):
    """Those that are modules of their own, though scores of the whole model compete."""
    model = listed(make_mixture("mixtral"))
    pruner = pruner_of(model, method="gum", steps=3, multiple=8)
    for _ in range(3):
        one_step(model, pruner, ids)
    masked = model(ids).logits
    widths = pruner.finish().widths
    assert len(widths) == 8 and len({*widths[:4]}) == len({*widths[4:]}) == 1 and not any(w % 8 for w in widths)
    torch.testing.assert_close(model(ids).logits, masked, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("zamba", "smoothed:criterion=fisher", "runs in several places, where the gradients of criteria are not"),
        ("deepseek_v3", "movement", "is an expert whose weights lie in a tensor"),
        ("qwen3_moe", "smoothed", "is an expert whose weights lie in a tensor"),
    ],
)
def test_what_cannot_be_masked_is_left_as_it_was(kind, method, message):
    model = make_tower(kind) if kind == "zamba" else make_mixture(kind)
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=message):
            pruner_of(model, method=method)
        assert not [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]


@pytest.mark.parametrize("method", methods.names())
def test_every_method_follows_the_schedule(method, tiny, ids):
    model = tiny("llama")
    kind = methods.METHODS[method]
    option = kind(penalty=50.0) if issubclass(kind, methods.Movement) else kind()
    option = methods.L0(tolerance=1.0) if method == "l0" else option  # two steps reach no share
    pruner = pruner_of(model, method=option, steps=4, cooldown=2, multiple=32, floor=0.3, keep=0.4)
    for _ in range(4):
        one_step(model, pruner, ids)
    mask = pruner.finish({"text": "none"})
    assert all(w % 32 == 0 and w >= 32 for w in mask.widths)
    assert mask.provenance["steps"] == 4
    assert mask.provenance["kept"] == pytest.approx(sum(mask.widths) / 288)
    assert mask.provenance["text"] == "none"
    assert json.loads(json.dumps(mask.provenance)) == mask.provenance
    if method != "movement-soft":
        assert abs(sum(mask.widths) - 0.4 * 288) <= 16 or pruner.config.scope == "layer"


@pytest.mark.gpu
@pytest.mark.parametrize("method", [*methods.names(), "gum:criterion=wanda", "movement:criterion=taylor-neuron"])
def test_every_method_on_a_gpu(method, tiny, ids):
    model, ids = tiny("llama").cuda(), ids.cuda()
    pruner = pruner_of(model, method=method, steps=6, warmup=3)
    for _ in range(4):
        one_step(model, pruner, ids)
    assert all(t.is_cuda for state in pruner._states for name, t in state.items() if name != "seed")


def test_soft_movement_keeps_what_the_penalty_leaves(tiny, ids):
    strong, weak = (tiny("llama") for _ in range(2))
    kept = []
    for model, penalty in ((strong, 1e4), (weak, 0.0)):
        method = methods.MovementSoft(penalty=penalty, score_rate=1.0, threshold=0.3)
        pruner = pruner_of(model, method=method, steps=6, cooldown=2)
        for _ in range(6):
            one_step(model, pruner, ids)
        kept.append(pruner.keep)
    assert kept[0] < 0.1 < kept[1]
    assert kept[0] >= 3 / 288  # a neuron a layer


def test_l0_trains_under_gates_and_is_judged_under_the_mask(tiny, ids):
    """Activations times gates in training, times the highest scores elsewhere; removed neurons learn on."""
    model = tiny("llama")
    pruner = pruner_of(model, method=methods.L0(initial=0.5), steps=9, keep=0.3, cooldown=1)
    seen = []
    down = find_ffns(model)[1].down
    down.register_forward_pre_hook(lambda module, args: seen.append(args[0]), prepend=True)
    down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for _ in range(3):
        one_step(model, pruner, ids)
    seen.clear()
    pruner.before_step(3)
    model.train()(ids)
    model.eval()(ids)
    gates = pruner._states[1]["gates"]
    assert ((gates > 0) & (gates < 1)).any() and (gates == 0).any() and (gates == 1).any()
    torch.testing.assert_close(seen[1], seen[0] * gates)
    torch.testing.assert_close(seen[3], seen[2] * pruner.masks[1])
    assert sum(pruner.widths) == round(pruner.config.schedule(3) * 288)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_reentrant_checkpoints_see_the_same_gates(tiny, ids):
    """Their first pass runs without gradients; loss and gradients are those of a model without checkpoints."""
    found = []
    for reentrant in (None, True, False):
        model = tiny("llama").train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        pruner = pruner_of(model, method=methods.L0(initial=0.6), steps=9)
        pruner.before_step(0)
        loss = model(ids, labels=ids).loss
        loss.backward()
        found.append((loss.detach(), find_ffns(model)[0].down.weight.grad, pruner._masks[0].gradient))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize(("scope", "widths"), [("layer", (48, 48, 48)), ("global", None)])
def test_l0_reaches_its_share_and_is_cut_to_it(scope, widths, tiny, ids):
    model = tiny("llama")
    pruner = pruner_of(model, method="l0", scope=scope, steps=190, warmup=5, cooldown=10, keep=0.5)
    for step in range(190):
        one_step(model, pruner, ids)
        if step == 181:
            decided = pruner.masks
    assert all(torch.equal(one, other) for one, other in zip(decided, pruner.masks, strict=True))
    expected = [pruner._method.chance(score) for score in pruner.scores]
    assert float(torch.cat(expected).mean()) == pytest.approx(0.5, abs=0.05)
    mask = pruner.finish()
    assert sum(mask.widths) == 144
    assert mask.widths == widths if widths else len(set(mask.widths)) > 1
    for keep, chance in zip(mask.layers, expected, strict=True):
        assert keep.neurons.tolist() == sorted(chance.argsort(descending=True, stable=True)[: len(keep)].tolist())


def test_l0_finds_the_neurons_that_matter(tiny, ids):
    """Half of all neurons speak, more in later layers; the loss is the distance to the dense model's own logits."""
    model = tiny("llama")
    speaks = [torch.arange(96) % 96 < count for count in (16, 48, 80)]
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for i, ffn in enumerate(find_ffns(model)):
            speaks[i] = speaks[i][torch.randperm(96, generator=generator)]
            ffn.down.weight.mul_(20.0 * speaks[i])
        target = model.eval()(ids).logits
    pruner = pruner_of(model, method="l0", steps=150, warmup=5, cooldown=1, keep=0.5)
    model.train()
    for step in range(150):
        pruner.before_step(step)
        (model(ids).logits - target).square().mean().backward()
        pruner.step()
        model.zero_grad()
    found = [float((mask & truth).sum() / truth.sum()) for mask, truth in zip(pruner.masks, speaks, strict=True)]
    assert min(found) > 0.95, found
    widths = pruner.finish().widths
    assert sum(widths) == 144 and widths[0] < widths[1] < widths[2]


def test_l0_is_not_cut_where_it_did_not_get(tiny, ids):
    """The error comes when the schedule ends, or at the cut; the model is as it was, and says how far the gates got."""
    model = tiny("llama")
    pruner = pruner_of(model, method="l0", steps=4, cooldown=1, keep=0.2)
    for _ in range(3):
        one_step(model, pruner, ids)
    message = r"keep must be reached by the gates of the model within 0.05 .*at step 3 .* is 0.9\d+; .*; got 0.2"
    for call in (lambda: pruner.before_step(3), pruner.finish):
        with pytest.raises(InputError, match=message):
            call()
    assert [ffn.intermediate_size for ffn in find_ffns(model)] == [96] * 3
    pruner.remove()


def test_a_schedule_without_cooldown_is_cut_at_the_end(tiny, ids):
    model = tiny("llama")
    pruner = pruner_of(model, steps=2, cooldown=0)
    for _ in range(2):
        one_step(model, pruner, ids)
    assert pruner.keep > 0.5
    assert pruner.finish().widths == (48, 48, 48)


def test_finish_warns_of_an_early_end_and_of_scores_that_never_moved(tiny, ids):
    model = tiny("llama")
    pruner = pruner_of(model, steps=8)
    with torch.no_grad():
        find_ffns(model)[1].down.weight.zero_()  # a dead layer: its zero gradients are no error
    one_step(model, pruner, ids)
    one_step(model, pruner, ids)
    assert pruner._moved == [True, False, True]
    with pytest.warns(UserWarning) as caught:
        pruner.finish()
    messages = [str(w.message) for w in caught]
    assert any("training ended after 2 steps, the schedule ends at 7" in m for m in messages)
    assert any("the scores of layers [1] never moved" in m for m in messages)


def test_finish_warns_where_a_multiple_leaves_everything(tiny, ids):
    model = tiny("llama")
    pruner = pruner_of(model, keep=0.95, multiple=64, scope="global")
    one_step(model, pruner, ids)
    one_step(model, pruner, ids)
    with pytest.warns(UserWarning, match="no neuron was removed: 64 is too coarse a multiple"):
        assert pruner.finish().widths == (96, 96, 96)


def test_not_a_number_is_refused_with_layer_and_step(tiny, ids):
    model = tiny("llama")
    pruner = pruner_of(model)
    one_step(model, pruner, ids)
    pruner.before_step(1)
    model.train()(ids, labels=ids).loss.backward()
    pruner._masks[2].gradient[5] = float("nan")
    with pytest.raises(InputError, match="score gradients of layer 2 must be finite at step 1; got 1 of 96"):
        pruner.step()
    other = pruner_of(tiny("gpt2"), method="platon")
    other.before_step(0)
    other.model.train()(ids, labels=ids).loss.backward()
    find_ffns(other.model)[1].down.weight.grad[3] = float("inf")
    with pytest.raises(InputError, match="scores of layer 1 must be finite at step 0; got 1 of 96"):
        other.step()


def test_bad_order_of_calls(tiny, ids):
    model = tiny("llama")
    pruner = pruner_of(model)
    with pytest.raises(InputError, match="step must follow before_step"):
        pruner.step()
    with pytest.raises(InputError, match="step must be 0, the number of steps taken so far; got 3"):
        pruner.before_step(3)
    with pytest.raises(InputError, match="model must not be masked by another pruner"):
        pruner_of(model)
    with pytest.raises(InputError, match="provenance must hold JSON"):
        pruner.finish({"model": model})
    assert len(find_ffns(model)) == 3  # a masked model is still looked through
    pruner.remove()
    with pytest.raises(InputError, match="pruner must not have been finished"):
        pruner.before_step(0)
    pruner_of(model).remove()


def test_state_goes_through_a_file(tiny, ids, tmp_path):
    model = tiny("llama")
    pruner = pruner_of(model, method="gum", steps=4)
    for _ in range(2):
        one_step(model, pruner, ids)
    path = pruner.save(tmp_path)
    assert path.name == "pruning.safetensors"
    fresh = tiny("llama")
    other = pruner_of(fresh, method="gum", steps=4)
    other.load(tmp_path)
    assert other.done == 2
    for mine, theirs in zip([*pruner.scores, *pruner.masks], [*other.scores, *other.masks], strict=True):
        assert torch.equal(mine, theirs)
    one_step(model, pruner, ids)
    one_step(fresh, other, ids)
    for mine, theirs in zip(pruner.scores, other.scores, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0.25}, r"config keep of the state to resume must be 0.25; got 0.5"),
        ({"method": "gum"}, "config method of the state to resume must be 'gum:.*'; got 'movement:"),
        ({"method": "movement:penalty=0.5"}, r"method .* must be '.*penalty=0.5,.*'; got 'movement:.*penalty=0.0,.*'"),
        ({"steps": 9}, "config steps of the state to resume must be 9; got 4"),
        ({"seed": 1}, "config seed of the state to resume must be 1; got 0"),
    ],
)
def test_another_configuration_is_not_resumed(change, message, tiny, tmp_path):
    pruner_of(tiny("llama"), steps=4).save(tmp_path)
    other = pruner_of(tiny("llama"), **{"steps": 4, **change})
    with pytest.raises(InputError, match=message):
        other.load(tmp_path)


def test_another_model_is_not_resumed(tiny, tmp_path):
    pruner_of(tiny("llama")).save(tmp_path)
    with pytest.raises(InputError, match="model_type of the state to resume must be 'gpt2'; got 'llama'"):
        pruner_of(tiny("gpt2")).load(tmp_path)
    with pytest.raises(InputError, match=r"intermediate_sizes .* must be \[64, 64, 64\]; got \[96, 96, 96\]"):
        pruner_of(tiny("llama", intermediate_size=64)).load(tmp_path)
    with pytest.raises(
        InputError, match=r"weights of the state to resume must be those in the model .*load the weights"
    ):
        pruner_of(tiny("llama", seed=1)).load(tmp_path)


def test_damaged_states_are_refused(tiny, tmp_path):
    pruner = pruner_of(tiny("llama"))
    with pytest.raises(InputError, match="checkpoint must be an existing file"):
        pruner.load(tmp_path)
    path = pruner.save(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        pruner.load(tmp_path)
    state = pruner.state_dict()
    del state["tensors"]["layers.1.keep"]
    with pytest.raises(CheckpointError, match=r"the state is damaged: KeyError: 'layers.1.keep'"):
        pruner.load_state_dict(state)
    state = pruner.state_dict()
    state["tensors"]["layers.1.state.scores"] = torch.zeros(5)
    with pytest.raises(CheckpointError, match="its tensors do not fit its widths"):
        pruner.load_state_dict(state)
    assert pruner.done == 0
