"""The Triton kernels as machine code for GPUs that need not be there: no spills, matrix units in use, sizes that fit.

Compilation happens in a process of its own, because this one may have imported the kernels for the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

STATIC = Path(__file__).parents[1] / "bench" / "results" / "static.json"
ARCHITECTURES = (80, 90, 100)
RENEW = "run python -m bench.gpu.static_triton"
# What a row is about; the rest is what the compiler made of it. Constants of the sizes may tell rows apart beside it.
ABOUT = (
    "kernel", "architecture", "dtype", "int8", "gated", "gather", "activation", "extras", "aligned", "blocks",
    "num_warps", "num_stages",
)  # fmt: skip
# Kernels that multiply no matrices.
WITHOUT = ("reduce_kernel", "act_mul_kernel", "route_kernel", "combine_kernel")
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}


def _python(folder: Path, *arguments: str, **environment: str) -> str:
    """Standard output of a fresh interpreter that compiles, started away from the source tree."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**kept, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _tables(folder: Path, *options: str) -> list[dict[str, Any]]:
    """The rows of every architecture, each compiled in a process of its own, side by side."""

    def table(architecture: int) -> list[dict[str, Any]]:
        command = ("-m", "pyprune.triton_kernels.aot", "--json", "--architecture", str(architecture))
        return json.loads(_python(folder, *command, *options))

    with ThreadPoolExecutor(3) as pool:
        return [row for rows in pool.map(table, ARCHITECTURES) for row in rows]


OF_THIS_CODE = """
import json
from pyprune.triton_kernels import INTERPRETED, why_unavailable
from pyprune.triton_kernels.aot import (
    ARCHITECTURES, described, distinct_launches, distinct_rows, fingerprint, machine_code
)
from pyprune.triton_kernels.variants import Variant, offered, variants

branches = [(row, a) for a in ARCHITECTURES for row in distinct_rows(variants(a), a)]
launch = Variant(512, 11008, 4096, "bfloat16", True, True, "gelu", "prefill").launches()[1]
large = {**launch.arguments, "BLOCK_M": 128, "BLOCK_N": 256}

def nearby(phase, m):
    widths = [Variant(m, k, 4096, "bfloat16", True, True, "silu", phase) for k in range(9000, 9600, 37)]
    return len(distinct_launches(widths)), len(distinct_launches(widths[:1]))

print(json.dumps({
    "fingerprint": fingerprint(),
    "branches": [described(*row, a) for row, a in branches],
    "offered": [described(*row, a) for a in ARCHITECTURES for row in distinct_rows(offered(a), a)],
    "compiled": [described(*row, a) | machine_code(row[1], a) for row, a in branches[7::20]],
    "spilling": machine_code(launch._replace(arguments=large, num_warps=4, num_stages=2), 90),
    "nearby": [nearby(*sizes) for sizes in (("decode", 1), ("decode", 7), ("prefill", 40), ("prefill", 300))],
    "refused": [INTERPRETED, why_unavailable("cpu")],
}))
"""


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return json.loads(STATIC.read_text())


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the kernels are now: which there are, and one in twenty compiled."""
    return json.loads(_python(tmp_path_factory.mktemp("here"), "-c", OF_THIS_CODE))


def _about(row: dict[str, Any]) -> str:
    return json.dumps({name: row[name] for name in ABOUT}, sort_keys=True)


@pytest.fixture(scope="module")
def rows(committed: dict[str, Any], here: dict[str, Any], tmp_path_factory: Any) -> list[dict[str, Any]]:
    """Of every branch: the committed rows where the compiler is theirs, else compiled now."""
    if committed["versions"]["triton"] != version("triton"):
        return _tables(tmp_path_factory.mktemp("aot"))
    wanted = set(map(_about, here["branches"]))
    return [row for row in committed["kernels"] if _about(row) in wanted]


def test_the_committed_table_is_of_these_kernels(committed: dict[str, Any], here: dict[str, Any]) -> None:
    assert here["fingerprint"] == committed["fingerprint"], RENEW
    known = set(map(_about, committed["kernels"]))
    assert [row for row in here["branches"] + here["offered"] if _about(row) not in known] == [], RENEW
    assert spilling(committed["kernels"]) == []
    assert too_large(committed["kernels"]) == []


def test_kernels_compiled_here_are_as_in_the_table(rows: list[dict[str, Any]], here: dict[str, Any]) -> None:
    found = here["compiled"]
    assert {row["architecture"] for row in found} == SHARED_LIMIT.keys() and len({row["kernel"] for row in found}) > 5
    assert [row for row in found if row not in rows] == []


def spilling(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["stack_bytes"] or row["ldl"] or row["stl"]]


def too_large(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        row
        for row in rows
        if row["registers"] > 255
        or row["registers"] * 32 * row["num_warps"] > 65536
        or row["shared_bytes"] > SHARED_LIMIT[row["architecture"]]
    ]


def test_every_kernel_branch_and_dtype_is_compiled(rows: list[dict[str, Any]]) -> None:
    both = {(a, b) for a in (False, True) for b in (False, True)}
    for architecture in SHARED_LIMIT:
        here = [row for row in rows if row["architecture"] == architecture]
        found = {"slab_kernel", "hidden_kernel", "down_kernel", "expert_hidden_kernel", "expert_down_kernel", *WITHOUT}
        if architecture != "sm_80":
            found |= {"hidden_descriptor_kernel", "down_descriptor_kernel"}
        assert {row["kernel"] for row in here} == found
        for kernel in ("slab_kernel", "hidden_kernel"):
            mine = [row for row in here if row["kernel"] == kernel]
            assert {(row["gated"], row["gather"]) for row in mine} == both
            assert {(row["int8"], row["dtype"]) for row in mine} == {
                (int8, dtype) for int8 in (False, True) for dtype in ("float32", "float16", "bfloat16")
            }
            assert {"gelu", "silu"} <= {row["activation"] for row in mine}
            assert {row["aligned"] for row in mine} == {True, False}


def test_nothing_spills(rows: list[dict[str, Any]]) -> None:
    assert spilling(rows) == []


def test_registers_and_shared_memory_fit(rows: list[dict[str, Any]]) -> None:
    assert too_large(rows) == []


def test_half_precision_uses_the_matrix_units(rows: list[dict[str, Any]]) -> None:
    tall = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
    for row in rows:
        if row["kernel"] in WITHOUT or row["dtype"] == "float32":
            continue
        # The warp-group instructions of sm_90 and sm_100 work on 64 rows at least, which are rows of weights.
        weights = row["blocks"].get("SLAB") or row["blocks"]["BLOCK_N"]
        allowed = (
            {tall[row["architecture"]]} if weights >= 64 and row["aligned"] else {"HMMA", tall[row["architecture"]]}
        )
        assert row["mma"] in allowed and row["mma_count"] > 0, row


def test_a_row_is_made_of_the_same_instructions_beside_few_tokens_and_many(rows: list[dict[str, Any]]) -> None:
    about = ("kernel", "architecture", "dtype", "int8", "gated", "gather", "aligned", "num_warps")
    found: dict[str, set[str]] = {}
    tokens: dict[str, set[int]] = {}
    for row in rows:
        tile = {name: size for name, size in row["blocks"].items() if name != "BLOCK_M"}
        if row["kernel"] == "slab_kernel" or row["blocks"].get("BLOCK_N") in (32, 64):
            key = json.dumps([*(row[name] for name in about), tile])
            found.setdefault(key, set()).add(row["mma_kinds"])
            tokens.setdefault(key, set()).add(row["blocks"]["BLOCK_M"])
    assert sum(len(sizes) > 1 for sizes in tokens.values()) >= 4 * len(SHARED_LIMIT)
    assert {key: kinds for key, kinds in found.items() if len(kinds) > 1} == {}


def test_decode_reads_weights_by_16_bytes(rows: list[dict[str, Any]]) -> None:
    slabs = [row for row in rows if row["kernel"] == "slab_kernel" and row["aligned"] and row["dtype"] != "float32"]
    assert {row["architecture"] for row in slabs} == SHARED_LIMIT.keys()
    for row in slabs:
        assert row["loads_128"] > 0, row
        assert row["copies_narrow"] == 0, row
    bare = [row for row in slabs if not row["extras"]]
    assert len(bare) >= len(SHARED_LIMIT)
    assert all(row["loads_narrow"] == 0 for row in bare)
    described = [row for row in rows if "descriptor" in row["kernel"]]
    assert described and all(row["copies_narrow"] == 0 for row in described)


def test_few_tokens_bring_weights_in_asynchronously(rows: list[dict[str, Any]]) -> None:
    kernels = ("hidden_kernel", "down_kernel")
    bare = [row for row in rows if row["kernel"] in kernels and not row["extras"]]
    assert {row["architecture"] for row in bare} == SHARED_LIMIT.keys()
    assert {row["blocks"]["BLOCK_N"] for row in bare} == {32, 64, 128}
    for row in bare:
        assert row["loads_narrow"] == row["copies_narrow"] == 0, row
        assert row["copies_128"] == row["loads_128"] > 0, row


def test_experts_bring_weights_in_asynchronously_by_16_bytes(rows: list[dict[str, Any]]) -> None:
    products = [row for row in rows if row["kernel"] in ("expert_hidden_kernel", "expert_down_kernel")]
    wide = [row for row in products if row["aligned"] and row["dtype"] != "float32" and not row["int8"]]
    assert {row["architecture"] for row in wide} == SHARED_LIMIT.keys()
    assert {row["blocks"]["BLOCK_M"] for row in wide} == {16, 32, 64, 128}
    assert {(row["kernel"], row["gather"]) for row in wide} == {
        (kernel, gather) for kernel in ("expert_hidden_kernel", "expert_down_kernel") for gather in (False, True)
    }
    for row in wide:
        assert row["copies_128"] == row["loads_128"] > 0, row
        # Of a gather the rows' numbers are copied beside them.
        assert row["copies_narrow"] == 0 or (row["gather"] and row["kernel"] == "expert_down_kernel"), row


def test_float32_is_not_rounded_to_tf32(rows: list[dict[str, Any]]) -> None:
    products = [row for row in rows if row["dtype"] == "float32" and row["kernel"] not in WITHOUT]
    assert products
    assert {row["mma"] for row in products} <= {"FFMA", "FFMA2"}


@pytest.mark.slow
def test_every_offered_configuration_compiles_without_spills(tmp_path: Path) -> None:
    rows = _tables(tmp_path, "--offered")
    assert spilling(rows) == []
    assert too_large(rows) == []


def test_the_spill_gate_can_close(here: dict[str, Any]) -> None:
    found = here["spilling"]
    assert found["stack_bytes"] > 0
    assert found["ldl"] > 0
    assert found["stl"] > 0


def test_layers_of_nearby_width_share_kernels(here: dict[str, Any]) -> None:
    assert len(here["nearby"]) == 4
    for many, one in here["nearby"]:
        assert many == one


REASON = "from pyprune.triton_kernels import INTERPRETED, why_unavailable; print(INTERPRETED, why_unavailable('cpu'))"


def test_without_the_interpreter_a_cpu_is_refused_with_the_reason(here: dict[str, Any]) -> None:
    assert here["refused"] == [False, "needs a CUDA device (or TRITON_INTERPRET=1 for tests)"]


def test_an_interpreter_asked_for_too_late_is_refused_with_the_reason(tmp_path: Path) -> None:
    late = "import os, triton; os.environ['TRITON_INTERPRET'] = '1'; " + REASON
    assert _python(tmp_path, "-c", late).strip() == "True TRITON_INTERPRET was set after the first import of triton"


def test_static_table_refuses_to_compile_under_the_interpreter(tmp_path: Path) -> None:
    program = """
from pyprune.triton_kernels.aot import static_table
try:
    static_table([], 90)
except RuntimeError as error:
    print(error)
"""
    assert "TRITON_INTERPRET" in _python(tmp_path, "-c", program, TRITON_INTERPRET="1")
