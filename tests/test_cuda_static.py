"""The CUDA kernels as machine code, for GPUs that need not be there: no spills, loads of 16 bytes, blocks that fit."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pyprune.ffn import native
from pyprune.ffn.backends import cuda

BENCH = Path(__file__).parent.parent / "bench"
pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(bool(native.load_cuda()), reason=native.load_cuda() or "the CUDA library is built")


@pytest.fixture(scope="module")
def static() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH.parent))
        return importlib.import_module("bench.gpu.static_cuda")


@pytest.fixture(scope="module")
def committed(static: ModuleType) -> dict[str, Any]:
    return json.loads(static.RESULT.read_text())


@pytest.fixture(scope="module")
def here(static: ModuleType) -> list[dict[str, Any]]:
    """What this library holds: `make` builds it for one architecture where there is no GPU."""
    return static.rows(native.library("cuda"))


@pytest.fixture(scope="module")
def rows(committed: dict[str, Any], here: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every architecture: those in the library, and of the others what is committed."""
    held = {row["architecture"] for row in here}
    return here + [row for row in committed["cuda"] if row["architecture"] not in held]


def test_the_committed_table_is_of_these_kernels(
    static: ModuleType, committed: dict[str, Any], here: list[dict[str, Any]]
) -> None:
    assert committed["cuda_built"]["fingerprint"] == static.fingerprint(), "renew it, as bench/gpu/static_cuda.py says"
    assert here
    if native.facts("cuda")["nvcc"] == committed["cuda_built"]["nvcc"]:
        assert [row for row in here if row not in committed["cuda"]] == []


def test_every_kernel_is_compiled_for_every_architecture(static: ModuleType, rows: list[dict[str, Any]]) -> None:
    def kernels(architecture: str) -> list[tuple[Any, ...]]:
        return [
            (row["kernel"], row["weights"], row["tokens"], row["gated"])
            for row in rows
            if row["architecture"] == architecture
        ]

    # By four types of weights: the single pass and its form in bulk for 1, 2, 4 tokens, plain and gated; two passes for
    # 1, 4, 8, of which the down pass is the same for both; the same two of experts. One more runs before others, and
    # one after those of experts.
    for architecture in static.ARCHITECTURES:
        found = kernels(architecture)
        assert len(found) == len(set(found)) == 4 * (2 * 3 * 2 + 2 * (3 * 2 + 3)) + 2
        assert found == kernels("sm_80")


def test_nothing_spills(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["stack_bytes"] or row["ldl"] or row["stl"]] == []


def test_a_block_of_every_kernel_fits_on_a_multiprocessor(static: ModuleType, rows: list[dict[str, Any]]) -> None:
    # Registers are given to warps by the 256.
    given = [-(-row["registers"] * 32 // 256) * 256 * row["threads"] // 32 for row in rows]
    assert [row for row, n in zip(rows, given, strict=True) if n > static.REGISTERS] == []


def test_weights_are_read_sixteen_bytes_at_a_time(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["copies_narrow"] == 0, row
        if row["kernel"] == "single_pass_bulk":
            # There are none before 9.0, where no plan asks for them.
            assert row["copies_128"] == 0 and (row["copies_bulk"] > 0) == (row["architecture"] != "sm_80"), row
        elif row["kernel"] == "single_pass":
            # A part of the record is a copy or more of each thread, in the first steps and in the loop.
            assert row["copies_128"] >= 2 * (3 if row["gated"] else 2), row
        elif row["kernel"] in ("hidden_pass", "down_pass", "expert_hidden", "expert_down"):
            assert row["loads_128"] >= 4, row


def test_no_copy_has_an_address_that_is_illegal(rows: list[dict[str, Any]]) -> None:
    # Seen on an H200: "an illegal instruction was encountered", from every kernel that had such a copy and no other.
    assert [row for row in rows if row["copies_uniform"]] == []


LAYERS = [(4096, 14336, True), (4096, 16384, False), (768, 3072, False), (576, 1536, True), (2048, 8192, True)]


@pytest.mark.parametrize("weights", ["bfloat16", "float16", "float32", "int8"])
@pytest.mark.parametrize("capability", ["8.0", "8.9", "9.0", "12.0"])
def test_planned_shared_memory_fits(static: ModuleType, capability: str, weights: str) -> None:
    simulator = Path(__file__).parent.parent / "build" / "simulator" / "libpyprune_simulator.so"
    if not simulator.is_file():
        pytest.skip("the simulator of the CUDA kernels is not built")
    torch.ops.load_library(simulator)
    shared = static.SHARED_LIMIT[capability]
    # The multiprocessors of an A100, an RTX 4090, an H100 and an RTX 5090.
    processors = {"8.0": 108, "8.9": 128, "9.0": 132, "12.0": 170}[capability]
    device = [processors, shared, float(capability) >= 9, 0]
    unset = cuda.plan(None)
    for (width, neurons, gated), tokens in ((layer, tokens) for layer in LAYERS for tokens in range(1, 9)):
        arguments = (tokens, width, neurons, gated, True, weights, unset, device)
        plan = json.loads(torch.ops.pyprune.plan_simulated(*arguments))
        assert plan.get("shared_bytes", 0) <= shared
        assert plan["threads"] <= static.most_threads("single_pass", plan["tokens"])
