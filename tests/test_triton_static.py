"""The Triton kernels as machine code for GPUs that need not be there: no spills, matrix units in use, sizes that fit.

Compilation happens in a process of its own, because this one may have imported the kernels for the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}


def _python(folder: Path, *arguments: str, **environment: str) -> str:
    """Standard output of a fresh interpreter that compiles, started away from the source tree."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={**kept, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("aot")
    return json.loads(_python(folder, "-m", "pyprune.triton_kernels.aot", "--json"))


def test_every_kernel_branch_and_dtype_is_compiled(rows: list[dict[str, Any]]) -> None:
    for architecture in SHARED_LIMIT:
        here = [row for row in rows if row["architecture"] == architecture]
        assert {row["kernel"] for row in here} == {"slab_kernel", "reduce_kernel", "hidden_kernel", "down_kernel"}
        for kernel in ("slab_kernel", "hidden_kernel"):
            mine = [row for row in here if row["kernel"] == kernel]
            assert {(row["gated"], row["gather"]) for row in mine} == {(a, b) for a in (0, 1) for b in (0, 1)}
            assert {row["dtype"] for row in mine} == {"float32", "float16", "bfloat16"}
            assert {"gelu", "silu"} <= {row["activation"] for row in mine}
            assert {row["aligned"] for row in mine} == {True, False}


def test_nothing_spills(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["stack_bytes"] or row["ldl"] or row["stl"]] == []


def test_registers_and_shared_memory_fit(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["registers"] > 255] == []
    assert [row for row in rows if row["registers"] * 32 * row["num_warps"] > 65536] == []
    assert [row for row in rows if row["shared_bytes"] > SHARED_LIMIT[row["architecture"]]] == []


def test_half_precision_uses_the_matrix_units(rows: list[dict[str, Any]]) -> None:
    tall = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
    for row in rows:
        if row["kernel"] == "reduce_kernel" or row["dtype"] == "float32":
            continue
        # The warp-group instructions of sm_90 and sm_100 work on 64 rows at least.
        wanted = tall[row["architecture"]] if row["blocks"]["BLOCK_M"] >= 64 else "HMMA"
        assert row["mma"] == wanted and row["mma_count"] > 0, row


def test_float32_is_not_rounded_to_tf32(rows: list[dict[str, Any]]) -> None:
    products = [row for row in rows if row["dtype"] == "float32" and row["kernel"] != "reduce_kernel"]
    assert products
    assert {row["mma"] for row in products} <= {"FFMA", "FFMA2"}


def test_the_spill_gate_can_close(tmp_path: Path) -> None:
    program = """
import json
from pyprune.triton_kernels.aot import Variant, machine_code
launch = Variant(512, 11008, 4096, "bfloat16", True, True, "gelu", "prefill").launches()[1]
blocks = {"BLOCK_M": 128, "BLOCK_N": 256}
launch = launch._replace(arguments={**launch.arguments, **blocks}, num_warps=4, num_stages=2)
print(json.dumps(machine_code(launch, 90)))
"""
    found = json.loads(_python(tmp_path, "-c", program))
    assert found["stack_bytes"] > 0
    assert found["ldl"] > 0
    assert found["stl"] > 0


def test_layers_of_nearby_width_share_kernels(tmp_path: Path) -> None:
    program = """
from pyprune.triton_kernels.aot import Variant, distinct_launches
for phase, m in (("decode", 1), ("decode", 7), ("prefill", 300)):
    widths = [Variant(m, k, 4096, "bfloat16", True, True, "silu", phase) for k in range(9000, 9600, 37)]
    print(len(distinct_launches(widths)), len(distinct_launches(widths[:1])))
"""
    for line in _python(tmp_path, "-c", program).splitlines():
        many, one = line.split()
        assert many == one


REASON = "from pyprune.triton_kernels import INTERPRETED, why_unavailable; print(INTERPRETED, why_unavailable('cpu'))"


def test_without_the_interpreter_a_cpu_is_refused_with_the_reason(tmp_path: Path) -> None:
    found = _python(tmp_path, "-c", REASON).strip()
    assert found == "False needs a CUDA device (or TRITON_INTERPRET=1 for tests)"


def test_an_interpreter_asked_for_too_late_is_refused_with_the_reason(tmp_path: Path) -> None:
    late = "import os, triton; os.environ['TRITON_INTERPRET'] = '1'; " + REASON
    assert _python(tmp_path, "-c", late).strip() == "True TRITON_INTERPRET was set after the first import of triton"


def test_static_table_refuses_to_compile_under_the_interpreter(tmp_path: Path) -> None:
    program = """
from pyprune.triton_kernels.aot import static_table
try:
    static_table([])
except RuntimeError as error:
    print(error)
"""
    assert "TRITON_INTERPRET" in _python(tmp_path, "-c", program, TRITON_INTERPRET="1")
