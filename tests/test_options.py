"""Options of pruning: every rule with its message, short forms, and that one more is found without being named."""

import dataclasses
import json
from dataclasses import dataclass

import pytest
import torch
from typer.testing import CliRunner

from pyprune import (
    Global,
    InputError,
    Latency,
    LeastSquares,
    MeanBias,
    Predicted,
    Refit,
    Sensitivity,
    Uniform,
    prune,
    prune_blocks,
)
from pyprune.cli.commands import app
from pyprune.model.families import find_ffns
from pyprune.pruning import text
from pyprune.pruning.allocation import ALLOCATIONS, Allocation, Plan
from pyprune.pruning.options import PruneOptions
from pyprune.pruning.repair import REPAIRS, Fitted, NoRepair, Repair

NAN, INF = float("nan"), float("inf")
FORMS = {
    "uniform": Uniform(),
    "uniform:multiple=8,protect=4,2": Uniform(multiple=8, protect=(4, 2)),
    "global:multiple=1": Global(multiple=1),
    "predictor:samples=200,windows=2": Predicted(samples=200, windows=2),
    "sensitivity:floor=0.2": Sensitivity(floor=0.2),
    "latency:target_speedup=1.3,workload=decode:1:int8": Latency(target_speedup=1.3, workload="decode:1:int8"),
    "none": NoRepair(),
    "bias": MeanBias(),
    "least-squares:damping=auto,target=0.5": LeastSquares(damping="auto", target=0.5),
    "refit:damping=0.5": Refit(damping=0.5),
}


@pytest.mark.parametrize(
    ("make", "argument", "values", "message"),
    [
        (PruneOptions.of, "keep", (0, -0.1, 1.01, NAN, INF, True, "0.5", None), r"keep must lie in \(0, 1\]; got"),
        (PruneOptions.of, "seed", (-1, 0.5, None), "seed must be a non-negative integer; got"),
        (PruneOptions.of, "sequential", (0, None), "sequential must be True or False; got"),
        (PruneOptions.of, "method", ("wands",), r"method must be one of .*got 'wands' \(nearest: wanda"),
        (PruneOptions.of, "method", ("magnitude",), r"got 'magnitude' \(nearest: magnitude-l"),
        *[(c, "floor", (-0.1, 1.1, NAN, "0", None), r"floor must lie in \[0, 1\]; got") for c in (Global, Sensitivity)],
        *[(c, "multiple", (0, -64, 1.5, "64"), "multiple must be a positive int.*; got") for c in (Uniform, Global)],
        (Uniform, "protect", (1, (1,), (1, -1), "1,2"), "protect must be two counts of layers, first and last; got"),
        *[(Predicted, name, (0, -1, 1.5, True, None), f"{name} must be a positive integer; got")
          for name in ("samples", "windows", "verify")],
        (Predicted, "draws", (-1, None), "draws must be a non-negative integer; got"),
        (Latency, "target_speedup", (None, 1, INF, NAN, "2"), "target_speedup must be a number above 1 with alloc"),
        *[(c, "damping", (0, -1.0, NAN, INF, "x", None), "damping must be positive and finite, or 'auto'; got")
          for c in (LeastSquares, Refit)],
        (LeastSquares, "target", (-0.1, 1.1, NAN, "1"), r"target must lie in \[0, 1\], or be 'auto'; got"),
    ],
)  # fmt: skip
def test_bad_value_is_refused(make, argument, values, message):
    for value in values:
        with pytest.raises(InputError, match=message):
            make(**{argument: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocation": Global(floor=0.5), "keep": 0.2}, r"floor must be at most keep \(0\.2\); got 0\.5"),
        ({"repair": Refit(), "sequential": False}, "sequential must be True with repair 'refit'; got False"),
        ({"repair": Refit(target=0.1), "sequential": False}, "target must be 0 where nothing is sequential; got 0.1"),
        ({"allocation": "globally"}, r"allocation must be one of global, .*uniform; got 'globally' \(nearest: global"),
        ({"repair": "least_squares"}, r"repair must be one of bias, .*refit; got .*\(nearest: least-squares"),
        ({"allocation": Refit()}, r"allocation must be an option or its short form; got Refit\("),
        ({"allocation": None}, "allocation must be an option or its short form; got None"),
        ({"allocation": "uniform:floor=0.2"}, "floor is no option of allocation 'uniform'; it has multiple, protect"),
        ({"repair": "none:damping=1"}, "damping is no option of repair 'none'; it has none"),
        ({"allocation": "uniform:"}, "allocation must be like NAME:key=value,key=value; got 'uniform:'"),
        ({"allocation": "uniform:8"}, "allocation must be like NAME:key=value,key=value; got 'uniform:8'"),
        ({"allocation": "uniform:multiple="}, "allocation must be like NAME:key=value,key=value"),
        ({"allocation": "uniform:multiple=8,multiple=8"}, "allocation must give multiple once"),
        ({"allocation": "uniform:multiple=8.5"}, "multiple must be a positive integer; got 8.5"),
        ({"allocation": "latency"}, "target_speedup must be a number above 1 with allocation 'latency'; got None"),
        ({"allocation": "latency:target_speedup=2,workload=run"}, "workload must be like decode:1, .*; got 'run'"),
    ],
)
def test_what_does_not_go_together_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        PruneOptions.of(**options)


@pytest.mark.parametrize("form", FORMS)
def test_short_forms_come_back(form):
    option = FORMS[form]
    registry = ALLOCATIONS if isinstance(option, Allocation) else REPAIRS
    assert registry.parse(form) == option == registry.parse(option)
    assert str(option) == form
    with pytest.raises(dataclasses.FrozenInstanceError):
        option.multiple = 1


def test_every_option_has_a_short_form_a_summary_and_a_name_on_the_command_line():
    shown = CliRunner().invoke(app, ["prune", "--help"], env={"COLUMNS": "400", "TERM": "dumb"}).stdout
    for registry in (ALLOCATIONS, REPAIRS):
        for option in registry:
            assert option.SUMMARY and option.NAME in shown and all(key in shown for key in option.keywords())


def test_several_short_forms_and_overrides():
    found = REPAIRS.parse_all("none, least-squares:damping=auto,target=0.5,refit")
    assert found == [NoRepair(), LeastSquares(damping="auto", target=0.5), Refit()]
    assert ALLOCATIONS.parse_all("uniform:protect=4,2,global") == [Uniform(protect=(4, 2)), Global()]
    for words in ("", "none,none", "bias,bias:"):
        with pytest.raises(InputError, match="repair must be"):
            REPAIRS.parse_all(words)
    assert ALLOCATIONS.parse("global:floor=0.2,multiple=8", floor="0.1") == Global(floor=0.1, multiple=8)
    assert ALLOCATIONS.parse(Global(floor=0.2), protect=(1, 0)) == Global(floor=0.2, protect=(1, 0))


def test_facts_are_plain_json_and_flat():
    facts = PruneOptions.of(1, "wanda", "sensitivity:floor=0.2,protect=1,0", "least-squares:damping=auto").facts()
    assert facts == json.loads(json.dumps(facts)) == {
        "keep": 1,
        "method": "wanda",
        "structure": "neurons",
        "allocation": "sensitivity",
        "multiple": 64,
        "protect": [1, 0],
        "floor": 0.2,
        "compensate": "least-squares",
        "damping": None,
        "target": 0.0,
        "sequential": True,
        "seed": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("method", "allocation", "repair", "needed", "with_mask"),
    [
        ("random", "uniform", None, False, False),
        ("magnitude-l2-both", "global", None, False, False),
        ("random", "uniform", "bias", True, True),
        ("magnitude-l1-both", "uniform", "least-squares", True, True),
        ("random", "sensitivity", None, True, False),
        *[(name, "uniform", None, True, False) for name in ("wanda", "flap", "activation")],
    ],
)
def test_needs_text(method, allocation, repair, needed, with_mask):
    options = PruneOptions.of(0.7, method, allocation, repair)
    assert (options.needs_text(), options.needs_text(mask=True)) == (needed, with_mask)


@pytest.fixture
def toys():
    """An allocation and a repair that nothing else names."""

    @ALLOCATIONS.add
    @dataclass(frozen=True, kw_only=True)
    class Falling(Allocation):
        NAME, SUMMARY = "falling", "every layer keeps `step` neurons less than the one before"
        step: int = 8

        def plan(self, layers, keep):
            return Plan([size - self.step * (i + 1) for i, size in enumerate(layers.sizes)])

    @REPAIRS.add
    @dataclass(frozen=True, kw_only=True)
    class Louder(Repair):
        NAME, SUMMARY = "louder", "kept down rows times `by`"
        by: float = 2.0

        def fit(self, layer):
            return Fitted(down=layer.ffn.weights().down[layer.kept] * self.by, error_cut=layer.stats.tokens)

    yield Falling, Louder
    ALLOCATIONS.remove(Falling)
    REPAIRS.remove(Louder)


def test_one_more_allocation_and_repair_are_found(toys, tiny, ids, tiny_checkpoint, tmp_path):
    falling, louder = toys
    model, dense = tiny("llama"), tiny("llama")
    report = prune(model, method="random", allocation=falling(step=16), repair="louder:by=3", text=ids)
    assert report.mask.widths == (80, 64, 48) and report.layers[0].error_cut == ids.numel()
    for new, old, keep in zip(find_ffns(model), find_ffns(dense), report.mask.layers, strict=True):
        assert torch.equal(new.weights().down, 3 * old.weights().down[keep.neurons.long()])
    facts = model.config.pyprune["provenance"]["config"]
    assert (facts["allocation"], facts["step"], facts["compensate"], facts["by"]) == ("falling", 16, "louder", 3)
    arguments = ["prune", tiny_checkpoint, "--method", "random", "--allocation", "falling:step=24,multiple=8"]
    arguments += ["--repair", "louder", "--tokens", 128, "--window", 32, "--dry-run", "--json"]
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["widths"] == [72, 48, 24]
    refused = CliRunner().invoke(app, [str(a) for a in [*arguments, "--floor", 0.2]])
    assert refused.exit_code == 2
    message = "floor is no option of allocation 'falling'; it has multiple, protect, step"
    assert message in " ".join(refused.output.split())
    with pytest.raises(InputError, match="repair must be 'bias' or 'none' with structure 'ffn'; got 'louder'"):
        prune_blocks(model, repair=louder(), text=ids)
    with pytest.raises(RuntimeError, match="two options of repair are called 'louder'"):
        REPAIRS.add(louder)


def test_text_as_prose_file_and_default(tiny, tokenizer, tmp_path, monkeypatch):
    class Tokenizer:
        bos_token_id = None

        def __call__(self, text, **options):
            return {"input_ids": [3 + ord(c) % 100 for c in text]}

    path = tmp_path / "text.txt"
    path.write_text("abc def " * 100)
    wide = {"method": "wanda", "repair": None, "allocation": "uniform:multiple=8", "tokenizer": Tokenizer()}
    first = prune(tiny("llama"), text=path.read_text(), **wide)
    second = prune(tiny("llama"), text=path, **wide)
    monkeypatch.setattr(text, "TOKENS", 1024)
    third = prune(tiny("llama", vocab_size=1024), **{**wide, "tokenizer": tokenizer})
    assert first.mask == second.mask and (first.tokens, first.window) == (768, 64)
    assert second.mask.provenance["text"] == "text.txt" and "text" not in first.mask.provenance
    used = [(part["source"], part["tokens"]) for part in third.sources]
    assert used == [("self:plain", 768), ("pydoc_data.topics (first half)", 128), ("builtin:code", 128)]
    with pytest.raises(InputError, match="tokenizer must be given with text that is no token ids; got None"):
        prune(tiny("llama"), text="prose")


def test_keys_given_apart_on_the_command_line_win(tiny_checkpoint):
    def call(*arguments):
        common = ["--tokens", 512, "--window", 32, "--dry-run", "--json"]
        return CliRunner().invoke(app, [str(a) for a in (arguments[0], tiny_checkpoint, *arguments[1:], *common)])

    spread = ("--allocation", "global:floor=0.9,multiple=8", "--floor", 0.25, "--protect", "1,0")
    done = call("prune", "--method", "wanda", *spread, "--repair", "least-squares:target=0.5", "--damping", "auto")
    assert done.exit_code == 0, done.output
    config = json.loads(done.stdout)["config"]
    assert (config["floor"], config["multiple"], config["protect"]) == (0.25, 8, [1, 0])
    assert (config["damping"], config["target"]) == (None, 0.5)
    blocks = call("prune-blocks", "--structure", "ffn", "--repair", "bias", "--protect", "1,0", "--keep", 0.67)
    assert blocks.exit_code == 0, blocks.output
    found = json.loads(blocks.stdout)
    assert found["config"]["protect"] == [1, 0] and found["removed"] in ([1], [2])
    for arguments, message in (
        (("prune", "--repair", "bias", "--damping", "auto"), "damping is no option of repair 'bias'; it has none"),
        (("prune", "--allocation", "uniform", "--target-speedup", 2), "target_speedup is no option of allocation"),
        (("prune", "--target-speedup", 1), "target_speedup must be a number above 1 with allocation 'latency'"),
        (("prune", "--protect", "4"), "protect must be two counts of layers, first and last; got 4"),
        (("prune-blocks", "--protect", "4"), "protect must be two counts like 4,2; got '4'"),
        (("prune-blocks", "--structure", "layer", "--repair", "bias"), "repair must be 'none' with structure 'layer'"),
    ):
        refused = call(*arguments)
        assert refused.exit_code == 2 and message in " ".join(refused.output.split()), refused.output
