"""After the cut the optimizer goes on: the same parameters, and of its moments the rows that stayed."""

import copy
import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.optim import optimizer as torch_optimizer
from transformers import Trainer, TrainingArguments
from transformers.optimization import Adafactor

from pyprune import InputError, UnsupportedModelError, accelerate
from pyprune.model import checkpoint
from pyprune.model.families import find_ffns
from pyprune.training import PruningCallback, TrainingConfig, TrainingPruner, train

STEPS = 6
CONFIG = TrainingConfig(method="movement", keep=0.4, steps=STEPS, warmup=1, cooldown=2)


@pytest.fixture
def batches(ids):
    return [{"input_ids": ids[i : i + 2], "labels": ids[i : i + 2]} for i in (0, 2)]


def ffn_parameters(model):
    return {p for ffn in find_ffns(model) for p in ffn.parameters()}


def cut(tensor, parameter, before, ffns, keeps):
    """`tensor` of the shape `before` of a parameter, cut by hand as the parameter was."""
    for ffn, keep in zip(ffns, keeps, strict=True):
        for name, blocks in (*ffn.pattern.inputs, (ffn.pattern.down, 1)):
            module = ffn.holder.get_submodule(name)
            if parameter is module.weight or parameter is module.bias:
                rows = torch.cat([keep.neurons.long() + block * keep.intermediate_size for block in range(blocks)])
                dim = next((d for d in range(len(before)) if before[d] != parameter.shape[d]), None)
                return tensor if dim is None else tensor.index_select(dim, rows)
    return tensor


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt"])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2),
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=1e-2),
        lambda p: torch.optim.Adafactor(p, lr=1e-2),
    ],
    ids=["adamw", "fused amsgrad", "momentum", "sgd", "factored by mean"],
)
def test_the_optimizer_goes_on_where_it_was(make, name, tiny, batches):
    model = tiny(name)
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    pruner = TrainingPruner(model, CONFIG)
    train(model, batches, optimizer, pruner, steps=STEPS, scheduler=scheduler)
    loss = model(**batches[0]).loss
    loss.backward()  # its graph remembers the old shapes, and outlives the cut
    ffns, parameters = find_ffns(model), list(model.parameters())
    shapes = {p: p.shape for p in parameters}
    before = {p: copy.deepcopy(dict(optimizer.state[p])) for p in parameters}
    weights = {p: p.detach().clone() for p in parameters}
    gradients = {p: p.grad.clone() for p in parameters}
    mask = pruner.finish()
    assert set(mask.widths) == {38}
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters], "a parameter became another object"
    for p in parameters:
        args = p, shapes[p], ffns, mask.layers
        assert torch.equal(p, cut(weights[p], *args)) and torch.equal(p.grad, cut(gradients[p], *args))
        assert optimizer.state[p].keys() == before[p].keys()
        for key, value in before[p].items():
            whole = isinstance(value, torch.Tensor) and value.shape == shapes[p]
            want = cut(value, *args) if whole else value
            if isinstance(value, torch.Tensor) and not whole and value.ndim == 2 and p.shape != shapes[p]:
                dim = next(d for d in range(2) if p.shape[d] != shapes[p][d])
                want = value if value.shape[dim] == 1 else cut(value, *args)
            got = optimizer.state[p][key]
            assert torch.equal(got, want) if isinstance(want, torch.Tensor) else got is want or got == want
    model.zero_grad()
    rate = scheduler.get_last_lr()
    narrow = {p: p.detach().clone() for p in ffn_parameters(model)}
    train(model, batches, optimizer, steps=2, scheduler=scheduler)
    assert scheduler.get_last_lr() < rate
    assert all(not torch.equal(p, narrow[p]) for p in narrow)
    del loss


def test_state_of_another_shape_begins_anew_and_says_so(tiny, batches):
    model = tiny("llama")
    optimizer = Adafactor(model.parameters(), lr=1e-2, relative_step=False, scale_parameter=False)
    pruner = TrainingPruner(model, CONFIG)
    train(model, batches, optimizer, pruner, steps=STEPS)
    with pytest.warns(UserWarning, match=r"Adafactor keeps state that cannot be cut .*exp_avg_sq_row.* 9 parameters"):
        pruner.finish()
    narrow = {p: p.detach().clone() for p in ffn_parameters(model)}
    assert not any(optimizer.state.get(p) for p in narrow)
    train(model, batches, optimizer, steps=2)
    assert all(not torch.equal(p, narrow[p]) for p in narrow)


def test_an_optimizer_that_did_not_step_is_named_or_fails_loudly(tiny, batches):
    def trained(model):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        train(model, batches, optimizer, steps=2)
        pruner = TrainingPruner(model, CONFIG)
        other = torch.optim.SGD(model.parameters(), lr=1e-2)
        train(model, batches, other, pruner, steps=STEPS)
        return optimizer, pruner

    model = tiny("llama")
    optimizer, pruner = trained(model)
    pruner.finish(optimizers=[optimizer])
    train(model, batches, optimizer, steps=2)
    model = tiny("llama")
    optimizer, pruner = trained(model)
    pruner.finish()
    with pytest.raises(RuntimeError, match="size"):
        train(model, batches, optimizer, steps=2)


def test_nothing_listens_any_more_after_the_end(tiny):
    hooks = torch_optimizer._global_optimizer_post_hooks
    before = len(hooks)
    one, other, third = (TrainingPruner(tiny("llama"), CONFIG) for _ in range(3))
    assert len(hooks) == before + 3
    one.remove()
    with pytest.warns(UserWarning, match="training ended after 0 steps"):
        other.finish()
    del third
    gc.collect()
    assert len(hooks) == before


def trainer_of(model, ids, folder, callback):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        learning_rate=1e-2,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return Trainer(model, arguments, train_dataset=rows, callbacks=[callback])


def test_the_trainer_trains_twice(tiny, ids, tmp_path):
    model, callback = tiny("llama"), PruningCallback(CONFIG)
    trainer = trainer_of(model, ids, tmp_path, callback)
    trainer.train()
    assert type(trainer.optimizer).__module__ == "accelerate.optimizer"
    trainer.remove_callback(callback)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    steps = {p: float(s["step"]) for p, s in trainer.optimizer.state.items()}
    trainer.train()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert all(float(trainer.optimizer.state[p]["step"]) == n + STEPS for p, n in steps.items()), "moments began anew"
    assert all(s["exp_avg"].shape == p.shape for p, s in trainer.optimizer.state.items())


def test_adapters_on_attention_go_on_and_on_ffns_are_refused(tiny, ids, tmp_path):
    model, callback = tiny("llama"), PruningCallback(CONFIG)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    trainer = trainer_of(adapted, ids, tmp_path, callback)
    trainer.train()
    trainer.remove_callback(callback)
    before = {n: p.detach().clone() for n, p in adapted.named_parameters() if p.requires_grad}
    trainer.train()
    assert len(before) == 12
    assert all(not torch.equal(p, before[n]) for n, p in adapted.named_parameters() if n in before)
    checkpoint.save(adapted.merge_and_unload(), tmp_path / "merged")
    assert checkpoint.verify(tmp_path / "merged")["widths"] == [38, 38, 38]
    everywhere = get_peft_model(tiny("llama"), LoraConfig(target_modules="all-linear"))
    message = r"layers.0.mlp.gate_proj carries adapters \(peft.*\): merge them first \(merge_and_unload\)"
    with pytest.raises(UnsupportedModelError, match=message):
        TrainingPruner(everywhere, CONFIG)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("targets", ["all-linear", "one projection"])
def test_an_accelerated_model_does_not_take_adapters_for_a_part_of_it(targets, name, tiny):
    model = accelerate(tiny(name))
    if targets == "one projection":
        targets = [{"llama": "up_proj", "gpt2": "c_fc", "opt": "fc1.fc1"}[name]]
    with pytest.raises(UnsupportedModelError, match="add adapters to the model before pyprune"):
        get_peft_model(model, LoraConfig(target_modules=targets))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_multiple_without_a_narrower_width_is_refused(scope, tiny):
    config = TrainingConfig(method="movement", keep=0.5, steps=2, multiple=1000, scope=scope)
    with pytest.raises(
        InputError, match=r"multiple must leave a width near keep 0.5 of 96 neurons \(nearest possible: 96"
    ):
        TrainingPruner(tiny("llama"), config)
