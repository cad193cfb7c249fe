"""How the native CPU library is called: threads, processes, refusals, torch.compile and export, a real model."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from pyprune import KeepIndex, PrunedMLP, accelerate
from pyprune.ffn import dispatch, native
from pyprune.ffn.quantisation import quantise
from pyprune.model import surgery
from pyprune.model.families import find_ffns

pytestmark = pytest.mark.skipif(bool(native.load()), reason=native.load() or "the native library is there")

PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.int8),
    (torch.float32, torch.int8),
]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """`threads(n)` sets the number of torch's threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def operands(
    tokens: int = 5,
    hidden_size: int = 24,
    neurons: int = 12,
    dtype: torch.dtype = torch.float32,
    weights: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """All arguments of the operator for a gated FFN, gather, by name."""
    generator = torch.Generator().manual_seed(seed)
    randn = functools.partial(torch.randn, generator=generator)
    record, scales = randn(neurons, 3 * hidden_size) * hidden_size**-0.5, None
    record, scales = quantise(record, 3) if weights == torch.int8 else (record.to(weights), None)
    return {
        "x": randn(tokens, hidden_size).to(dtype),
        "record": record,
        "index": torch.arange(0, neurons, 2, dtype=torch.int32),
        "scales": scales,
        "neuron_bias": randn(neurons, 2).to(dtype),
        "down_bias": randn(hidden_size).to(dtype),
        "gated": True,
        "activation": "silu",
        "backend": "cpu",
        "native_tokens": 0,
        "batch_invariant": False,
    }


def ffn(**arguments: Any) -> Tensor:
    out: Tensor = torch.ops.pyprune.ffn.default(*arguments.values())
    return out


@pytest.mark.parametrize(("dtype", "weights"), PAIRS, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 33, 130])
def test_threads_and_repetition_change_no_bit(
    isa: str, threads: Callable[[int], None], dtype: torch.dtype, weights: torch.dtype, tokens: int
) -> None:
    for width, neurons in ((576, 1401), (33, 700), (1030, 45)):
        arguments = operands(tokens, width, neurons, dtype, weights)
        threads(1)
        want = ffn(**arguments)
        for number in (1, 2, 3, 8):
            threads(number)
            assert torch.equal(ffn(**arguments), want)
            assert torch.equal(ffn(**arguments), want)


@pytest.mark.parametrize("number", [1, 2])
def test_concurrent_calls_do_not_disturb_each_other(isa: str, threads: Callable[[int], None], number: int) -> None:
    threads(number)
    sizes = ((1, 576, 300), (20, 65, 700), (5, 129, 400), (1, 35, 21), (64, 300, 150), (1, 200, 900))
    calls = [operands(*size, *pair, seed=i) for i, (size, pair) in enumerate(zip(sizes, itertools.cycle(PAIRS)))]
    alone = [ffn(**arguments) for arguments in calls]

    def repeat(i: int) -> bool:
        return all(torch.equal(ffn(**calls[i]), alone[i]) for _ in range(15))

    with ThreadPoolExecutor(len(calls)) as pool:
        assert all(pool.map(repeat, range(len(calls))))


def _in_child(arguments: dict[str, Any], sent: Any) -> None:
    # GNU OpenMP cannot start its threads again in a fork of a process that used them, and would wait for ever.
    torch.set_num_threads(1)
    sent.send(ffn(**arguments).tolist())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_computes_the_same(isa: str) -> None:
    arguments = operands(20, 576, 600, torch.bfloat16, torch.bfloat16)
    want = ffn(**arguments).tolist()
    context = multiprocessing.get_context("fork")
    received, sent = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(arguments, sent), daemon=True)
    child.start()
    answered = received.poll(30)
    if not answered:
        child.kill()
    assert answered
    assert received.recv() == want
    child.join(30)
    assert child.exitcode == 0


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "x of integers": ({"x": torch.zeros(5, 24, dtype=torch.int64)}, "x must be float32, bfloat16 or float16"),
    "x of float64": ({"x": torch.zeros(5, 24, dtype=torch.float64)}, "x must be float32, bfloat16 or float16"),
    "x of int8": ({"x": torch.zeros(5, 24, dtype=torch.int8)}, "x must be floating point"),
    "x a scalar": ({"x": torch.tensor(1.0)}, "x must have at least one dimension"),
    "x of nine dimensions": ({"x": torch.zeros(*[1] * 8, 24)}, "x must have at most eight dimensions"),
    "x of another width": ({"x": torch.zeros(5, 23)}, "record must have two dimensions, the second of 2 .gated: 3."),
    "record of float64": ({"record": torch.zeros(12, 72, dtype=torch.float64)}, "record must be float32"),
    "record of int16": ({"record": torch.zeros(12, 72, dtype=torch.int16)}, "record must be float32"),
    "int4 beside 24 columns": (
        {"record": torch.zeros(12, 54, dtype=torch.uint8)},
        "x must have a multiple of 32 columns",
    ),
    "x of uint8": ({"x": torch.zeros(5, 24, dtype=torch.uint8)}, "x must be floating point"),
    "record of one dimension": ({"record": torch.zeros(72)}, "record must have two dimensions"),
    "record of three": ({"record": torch.zeros(12, 3, 24)}, "record must have two dimensions"),
    "record of another width": ({"record": torch.zeros(12, 71)}, "record must have two dimensions"),
    "plain record": ({"record": torch.zeros(12, 48)}, "record must have two dimensions"),
    "gated record": ({"gated": False}, "record must have two dimensions"),
    "int8 without scales": ({"record": torch.zeros(12, 72, dtype=torch.int8)}, "scales must be given for int8"),
    "scales without int8": ({"scales": torch.ones(12, 3)}, "scales must be given for int8 records only"),
    "scales too short": ({"scales": torch.ones(11, 3)}, "scales must have the shape that goes with"),
    "scales too narrow": ({"scales": torch.ones(12, 2)}, "scales must have the shape that goes with"),
    "scales of float64": ({"scales": torch.ones(12, 3).double()}, "scales must have the dtype that goes with"),
    "neuron_bias too short": ({"neuron_bias": torch.zeros(6, 2)}, "neuron_bias must have the shape"),
    "neuron_bias too narrow": ({"neuron_bias": torch.zeros(12, 1)}, "neuron_bias must have the shape"),
    "neuron_bias flat": ({"neuron_bias": torch.zeros(24)}, "neuron_bias must have the shape"),
    "neuron_bias of bfloat16": ({"neuron_bias": torch.zeros(12, 2).bfloat16()}, "neuron_bias must have the dtype"),
    "down_bias too long": ({"down_bias": torch.zeros(25)}, "down_bias must have the shape"),
    "down_bias of float64": ({"down_bias": torch.zeros(24).double()}, "down_bias must have the dtype"),
    "index of int64": ({"index": torch.arange(3)}, "index must have the dtype that goes with"),
    "index of two dimensions": ({"index": torch.zeros(3, 1, dtype=torch.int32)}, "index must have one dimension"),
    "index past the record": ({"index": torch.tensor([0, 12]).int()}, "index must hold rows of the record"),
    "index far past it": ({"index": torch.tensor([2**31 - 1]).int()}, "index must hold rows of the record"),
    "index below zero": ({"index": torch.tensor([3, -1, 5]).int()}, "index must hold rows of the record"),
    "unknown activation": ({"activation": "swish"}, "activation must be gelu, gelu_tanh, relu, relu2, silu or quick"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_operands_are_refused_by_name(name: str) -> None:
    changes, message = REFUSED[name]
    arguments = {**operands(), **changes}
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, Tensor)}
    with pytest.raises(RuntimeError, match=message):
        ffn(**arguments)
    assert all(torch.equal(arguments[k], v) for k, v in before.items())


def test_an_unknown_instruction_set_is_refused_with_those_there_are() -> None:
    names = torch.ops.pyprune.cpu_isas().split(",")
    before = torch.ops.pyprune.cpu_isa("")
    with pytest.raises(RuntimeError, match=rf"\({', '.join(names)}\); got nonsense"):
        torch.ops.pyprune.cpu_isa("nonsense")
    assert torch.ops.pyprune.cpu_isa("") == before
    for name in names:
        assert torch.ops.pyprune.cpu_isa(name) == torch.ops.pyprune.cpu_isa("") == name
    assert torch.ops.pyprune.cpu_isa("best") == names[0]


def test_the_variable_forces_an_instruction_set() -> None:
    last = torch.ops.pyprune.cpu_isas().split(",")[-1]
    code = "from pyprune.ffn import native; print(native.load(), native.isa(), native.facts()['isa'])"
    environment = {**os.environ, "PYPRUNE_CPU_ISA": last}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["None", last, last]


def test_a_variable_that_names_no_instruction_set_is_told_at_once() -> None:
    """Nothing goes on in torch alone, as it would without the library."""
    code = """
from transformers import LlamaConfig, LlamaForCausalLM
from pyprune import InputError, PrunedMLP, accelerate
from pyprune.ffn import native
sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
for verb in (accelerate, lambda model: PrunedMLP.from_dense(model.model.layers[0].mlp)):
    try: verb(model)
    except InputError as error: print(error)
print(native.load())
print(native.facts()["state"])
"""
    environment = {**os.environ, "PYPRUNE_CPU_ISA": "avx2.0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = torch.ops.pyprune.cpu_isas().replace(",", ", ")
    assert done.stdout.splitlines() == [f"PYPRUNE_CPU_ISA must be one of {names}; got 'avx2.0'"] * 4


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The problems that Python's dispatch was asked about; none on the native path."""
    asked: list[Any] = []
    choose = dispatch.choose

    def note(problem: Any, backend: str = "auto") -> Any:
        asked.append(problem)
        return choose(problem, backend)

    monkeypatch.setattr(dispatch, "choose", note)
    return asked


@pytest.mark.parametrize("weights", [None, "int8", "bfloat16"])
@pytest.mark.parametrize("mode", ["compact", "gather"])
@torch.no_grad()
def test_compiles_and_exports_on_the_native_path(
    weights: str | None, mode: str, tiny: Callable[..., Any], choices: list[Any]
) -> None:
    keep = KeepIndex(range(0, 96, 3), 96)
    pruned = PrunedMLP.from_dense(find_ffns(tiny("llama"))[0], keep, mode, "cpu", weights)
    tokens = {0: torch.export.Dim("tokens", min=2, max=500)}
    exported = torch.export.export(pruned, (torch.randn(4, 32),), dynamic_shapes=(tokens,)).module()
    static = torch.compile(pruned, backend="aot_eager", fullgraph=True, dynamic=False)
    dynamic = torch.compile(pruned, backend="aot_eager", fullgraph=True, dynamic=True)
    for number in (4, 9, 70):
        x = torch.randn(number, 32)
        for run in (exported, static, dynamic):
            assert torch.equal(run(x), pruned(x))
    assert not choices


@torch.no_grad()
def test_the_module_takes_the_native_path_up_to_its_number_of_tokens(
    tiny: Callable[..., Any], choices: list[Any]
) -> None:
    pruned = PrunedMLP.from_dense(find_ffns(tiny("llama"))[0])
    most = dispatch.native_tokens(torch.float32, torch.float32, 32, False)
    assert most > 0
    for shape, asked in (((1,), 0), ((most,), 0), ((1, most), 0), ((most + 1,), 1)):
        pruned(torch.randn(*shape, 32))
        assert len(choices) == asked


@pytest.mark.parametrize("mode", ["compact", "gather"])
def test_generates_the_tokens_of_the_model_it_accelerates(
    isa: str, mode: str, tiny: Callable[..., Any], ids: Tensor, random_mask: Callable[..., Any]
) -> None:
    model, fast = tiny("llama"), tiny("llama")
    mask = random_mask(model, (60, 33, 96))
    for ffn_of, keep in zip(find_ffns(model), mask.layers, strict=True):
        surgery.cut(ffn_of, keep)
    accelerate(fast, mode, "cpu", mask)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for cache in (None, "static"):
        want, got = (m.generate(ids, cache_implementation=cache, **options) for m in (model, fast))
        assert torch.equal(got, want)


def test_reading_a_buffer_gives_its_sum(isa: str, threads: Callable[[int], None]) -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (0, 1, 7, 127, 128, 129, 1000, 100_003):
        whole = torch.randint(-8, 9, (size + 5,), generator=generator).float()
        for number in (1, 2, 8):
            threads(number)
            assert torch.ops.pyprune.cpu_read(whole[5:]) == whole[5:].sum().item()
    buffer = torch.randn(99_999, generator=generator)
    assert abs(torch.ops.pyprune.cpu_read(buffer) - buffer.double().sum().item()) < 0.05
    for wrong in (buffer.double(), buffer[::2], buffer.int()):
        with pytest.raises(RuntimeError, match="buffer must be a contiguous float32 tensor on the CPU"):
            torch.ops.pyprune.cpu_read(wrong)
