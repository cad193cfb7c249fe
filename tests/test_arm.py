"""The CPU kernels compiled for Arm and run in an emulator: the core of tests/test_cpu_kernels.py, without torch there.

Many cases in one run of the driver (csrc/driver), for the emulator takes its time to start.
"""

from __future__ import annotations

import importlib
import itertools
import math
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import ffn_cases
import pytest
import torch
from ffn_cases import FLOATS, FORMS, TYPES, Case, exact, make
from torch import Tensor

from pyprune.base import int4, reference
from pyprune.base.activations import ACTIVATIONS
from pyprune.ffn.quantisation import cast

ROOT = Path(__file__).parent.parent
NEEDED = {
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
}
MISSING = [package for tool, package in NEEDED.items() if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs Debian's packages {' and '.join(MISSING)}")

KINDS = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8]  # as `Type` in csrc/common/call.h
INT4 = [(x, torch.uint8) for x in FLOATS]


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "csrc"))
        return importlib.import_module("build_driver")


@pytest.fixture(scope="module")
def driver(builder: ModuleType) -> Path:
    path = ROOT / "build" / "arm" / "driver"
    builder.build(builder.COMPILER, path)
    return path


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _packed(case: Case, write_out: bool) -> bytes:
    parts = 3 if case.gated else 2
    columns = case.record.shape[1] // parts
    width = int4.width(columns) if case.record.dtype == torch.uint8 else columns
    kept = len(case.record) if case.index is None else len(case.index)
    numbers = (write_out, len(case.x), width, kept, len(case.record), case.gated)
    kinds = (list(ACTIVATIONS).index(case.activation), KINDS.index(case.x.dtype), KINDS.index(case.record.dtype))
    found = struct.pack("<9q", *numbers, *kinds)
    for tensor in (case.x, case.record, case.index, case.scales, case.neuron_bias, case.down_bias):
        data = None if tensor is None else _bytes(tensor)
        found += struct.pack("<q", -1 if data is None else len(data)) + (data or b"")
    return found


@pytest.fixture
def run(driver: Path, tmp_path: Path) -> Callable[..., list[Tensor]]:
    """`run(cases, write_out=False)` -> the result of each on the emulated machine."""

    def run_all(cases: Sequence[Case], write_out: bool = False) -> list[Tensor]:
        calls, results = tmp_path / "calls", tmp_path / "results"
        calls.write_bytes(struct.pack("<q", len(cases)) + b"".join(_packed(case, write_out) for case in cases))
        done = subprocess.run(
            ["qemu-aarch64", str(driver), str(calls), str(results)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr or f"ended with {done.returncode}"
        assert done.stdout.strip() == "portable"
        data = results.read_bytes()
        found, at = [], 0
        for case in cases:
            parts = 3 if case.gated else 2
            shape = (len(case.record), parts * case.x.shape[1]) if write_out else tuple(case.x.shape)
            size = math.prod(shape) * case.x.dtype.itemsize
            found.append(torch.tensor(list(data[at : at + size]), dtype=torch.uint8).view(case.x.dtype).view(shape))
            at += size
        assert at == len(data)
        return found

    return run_all


def test_it_is_a_program_for_arm(driver: Path) -> None:
    assert struct.unpack_from("<H", driver.read_bytes(), 18)[0] == 183, "e_machine of AArch64"


def test_the_librarys_binding_compiles_for_arm(builder: ModuleType, tmp_path: Path) -> None:
    builder.compile_binding(builder.COMPILER, Path(torch.__file__).parent / "include", tmp_path / "binding.o")
    assert struct.unpack_from("<H", (tmp_path / "binding.o").read_bytes(), 18)[0] == 183


def test_error_is_at_most_twice_that_of_torch(run: Callable[..., list[Tensor]]) -> None:
    """Every dtype, form, and number of tokens around what is taken at once; odd widths, int4's last groups."""
    cases = []
    for types, gated, tokens in itertools.product(TYPES, (False, True), (1, 2, 7, 65)):
        for width, form in zip((67, 5, 128), FORMS, strict=True):
            cases.append(make(tokens, width, 37, types, gated, form=form))
    for types, tokens, width in itertools.product(INT4, (1, 2, 5, 65), (32, 96, 160)):
        cases += [make(tokens, width, 37, types, form=form) for form in FORMS]
    cases += [make(tokens, 192, 1031, types) for types in [*TYPES[::5], *INT4] for tokens in (1, 3)]
    cases += [make(0, 35, 21), make(3, 35, 21).rows(slice(0)), make(2, 35, 21, form="gather", kept=0)]
    for case, got in zip(cases, run(cases), strict=True):
        ffn_cases.check_error(case, lambda _, out=got: out)


@pytest.mark.parametrize("dtype", FLOATS)
def test_activations_at_every_size(run: Callable[..., list[Tensor]], dtype: torch.dtype) -> None:
    sizes = torch.cat([torch.logspace(-6, 4, 350), torch.linspace(0, 15, 162)])
    x = torch.cat([sizes, -sizes, torch.zeros(1)])[:, None].to(dtype)
    cases = [Case(x, torch.ones(1, 2), gated=False, activation=name) for name in sorted(reference.ACTIVATIONS)]
    for case, got in zip(cases, run(cases), strict=True):
        want = exact(case)
        want = want.to(dtype).double() if dtype == torch.float16 else want
        finite = want.isfinite()
        assert torch.equal(got[~finite].double(), want[~finite])
        relative = (got.double() - want).abs()[finite] / (want.abs()[finite] + 1e-7)
        assert relative.max() < max(16 * torch.finfo(torch.float32).eps, 1.1 * torch.finfo(dtype).eps), case.activation


def test_nan_and_infinity_go_where_they_do_in_torch(run: Callable[..., list[Tensor]]) -> None:
    cases = []
    for types, special, tokens in itertools.product([*TYPES, *INT4], (math.nan, math.inf, -math.inf), (1, 6)):
        case = make(tokens, 64, 21, types, activation=sorted(reference.ACTIVATIONS)[tokens % 6])
        case.x[tokens // 2, 63] = special
        cases.append(case)
    for case, got in zip(cases, run(cases), strict=True):
        ffn_cases.check_special(case, lambda _, out=got: out)


def test_gather_and_prefix_equal_copied_rows_in_bits(run: Callable[..., list[Tensor]]) -> None:
    cases, others = [], []
    for types, tokens in itertools.product([*TYPES, *INT4], (1, 6)):
        gather = make(tokens, 96, 50, types, form="gather", kept=23)
        assert gather.index is not None
        cases += [gather, make(tokens, 96, 50, types, form="prefix", kept=23)]
        whole = make(tokens, 96, 50, types)
        others += [whole.rows(gather.index.long()), whole.rows(slice(23))]
    assert all(torch.equal(a, b) for a, b in zip(run(cases), run(others), strict=True))


def test_int4_rows_are_written_out_as_torch_does(run: Callable[..., list[Tensor]]) -> None:
    cases = []
    for dtype, (width, parts) in itertools.product(FLOATS, ((32, 2), (96, 3), (224, 2))):
        rows, _ = cast(torch.randn(13, parts * width), parts, torch.uint8)
        cases.append(Case(torch.zeros(1, width, dtype=dtype), rows, gated=parts == 3))
    for case, got in zip(cases, run(cases, write_out=True), strict=True):
        assert torch.equal(got, int4.unpack(case.record, 3 if case.gated else 2, case.x.dtype))
