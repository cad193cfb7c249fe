"""The native CUDA library's build and loading, and the simulator's, with tiny sources; no device is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pyprune.ffn import native

sys.path.insert(0, str(Path(__file__).parent.parent / "csrc"))
import build_cuda
import build_native
import build_simulator
import building

KERNEL = """
#include "../common/twice.h"
#ifdef PYPRUNE_SIMULATE
void twice(float* x, void*) { *x *= kTwice; }
#else
static __global__ void kernel(float* x) { x[threadIdx.x] *= kTwice; }
void twice(float* x, void* stream) { kernel<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(x); }
#endif
"""
SHARED = "constexpr float kTwice = 2;\nvoid twice(float* x, void* stream);\n"
BINDING = """
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <cuda_runtime.h>
#include <string>
#include "../common/twice.h"
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
std::string devices(std::string) {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess && count > 0 && &aoti_torch_get_current_cuda_stream) return "some";
  return count < 0 ? (twice(nullptr, nullptr), "") : "none";
}
Tensor ffn(Tensor x, Tensor, Maybe, Maybe, Maybe, Maybe, Maybe, bool, std::string, std::string, int64_t) { return x; }
STABLE_TORCH_LIBRARY_FRAGMENT(pyprune, m) { m.def("tiny_devices(str wanted) -> str"); }
STABLE_TORCH_LIBRARY_IMPL(pyprune, CompositeExplicitAutograd, m) { m.impl("tiny_devices", TORCH_BOX(&devices)); }
STABLE_TORCH_LIBRARY_IMPL(pyprune, CUDA, m) { m.impl("ffn", TORCH_BOX(&ffn)); }
"""
SIMULATOR = """
#include <torch/csrc/stable/library.h>
#include <string>
#include "../../common/twice.h"
std::string simulated(std::string) {
  float x = 3;
  twice(&x, nullptr);
  return std::to_string(x);
}
STABLE_TORCH_LIBRARY_FRAGMENT(pyprune, m) { m.def("tiny_simulated(str wanted) -> str"); }
STABLE_TORCH_LIBRARY_IMPL(pyprune, CompositeExplicitAutograd, m) { m.impl("tiny_simulated", TORCH_BOX(&simulated)); }
"""


def _cannot_build(toolkit: bool) -> str:
    try:
        building.find_torch(), building.find_ninja()
        compiler = building.find_compiler()
        if toolkit:
            build_cuda.find_toolkit(compiler)
    except building.NotBuilt as reason:
        return str(reason)
    return ""


NO_COMPILER, NO_TOOLKIT = _cannot_build(False), _cannot_build(True)
needs_compiler = pytest.mark.skipif(bool(NO_COMPILER), reason=NO_COMPILER or "there is a compiler")
needs_nvcc = pytest.mark.skipif(bool(NO_TOOLKIT), reason=NO_TOOLKIT or "there is an nvcc")


def write(root: Path, name: str, text: str) -> None:
    (root / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
    (root / "csrc" / name).write_text(text)


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYPRUNE_NATIVE", "PYPRUNE_CUDA", "PYPRUNE_CUDA_ARCHS", "PYPRUNE_PREBUILT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one tiny kernel, which is compiled for one architecture only."""
    monkeypatch.setenv("PYPRUNE_CUDA_ARCHS", "90")
    write(tmp_path, "cuda/twice.cu", KERNEL)
    write(tmp_path, "common/twice.h", SHARED)
    return tmp_path


def build(root: Path) -> dict[str, Any]:
    """Build into ROOT/pyprune; what is returned must be what is recorded, and agree with what lies there."""
    out = root / "pyprune"
    records = build_native.build(out, root)
    assert json.loads((out / "native.json").read_text()) == records
    assert (out / build_cuda.LIBRARY).is_file() == records["cuda"]["built"]
    assert "\n" not in records["cuda"].get("reason", "")
    record: dict[str, Any] = records["cuda"]
    return record


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A checkout whose CUDA library is built for every architecture, and the record."""
    root = tmp_path_factory.mktemp("built")
    for name, text in (("cuda/twice.cu", KERNEL), ("cuda/binding.cpp", BINDING), ("common/twice.h", SHARED)):
        write(root, name, text)
    return root, build(root)


def test_without_nvcc_the_reason_is_recorded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDACXX", "no-such-nvcc")
    write(root, "cpu/one.cpp", "int one() { return 1; }\n")
    expected = NO_COMPILER or "no nvcc: CUDACXX names no-such-nvcc, which is none; install the CUDA toolkit"
    assert build(root)["reason"] == expected
    assert json.loads((root / "pyprune" / "native.json").read_text())["cpu"]["built"] == (not NO_COMPILER)


@needs_compiler
def test_nvcc_is_that_of_the_variable_and_no_other(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(root))
    assert f"CUDA_HOME names {root / 'bin' / 'nvcc'}, which is none" in build(root)["reason"]
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(build_cuda, "_USUAL", ("no-such-nvcc",))
    assert build(root)["reason"].startswith("no nvcc: none on PATH or in /usr/local/cuda/bin")
    monkeypatch.setenv("CUDACXX", "true")
    assert build(root)["reason"] == "true does not work as nvcc: `--version` names no release"


@needs_nvcc
def test_it_is_built_for_every_architecture(built: tuple[Path, dict[str, Any]]) -> None:
    root, record = built
    assert record["built"], record
    assert record["torch"] == torch.__version__ and record["nvcc"] and record["compiler"]
    assert set(record["sources"]) == {"cuda/twice.cu", "cuda/binding.cpp", "common/twice.h"}
    if record["left_out"]:
        pytest.skip(f"nvcc {record['nvcc']} does not know {', '.join(record['left_out'])}")
    assert record["architectures"] == ["sm_80", "sm_90", "sm_100", "sm_120", "compute_80", "compute_90"]
    said = (root / "build" / "cuda" / "twice.ptxas.txt").read_text()
    for name in ("sm_80", "sm_90", "sm_100", "sm_120"):
        assert f"for '{name}'" in said
    triton = pytest.importorskip("triton")
    command = [triton.knobs.nvidia.cuobjdump.path, str(root / "pyprune" / build_cuda.LIBRARY)]
    dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("Fatbin ")
    kinds = [(part.split()[0], part.partition("arch = ")[2].split()[0]) for part in dump[1:]]
    words = {"elf": "sm", "ptx": "compute"}
    held = [f"{words[kind]}_{architecture.removeprefix('sm_')}" for kind, architecture in kinds]
    assert sorted(held) == sorted(record["architectures"])


@needs_nvcc
def test_no_path_of_this_machine_is_built_in(built: tuple[Path, dict[str, Any]]) -> None:
    folder = built[0] / "pyprune"
    bytes_ = (folder / build_cuda.LIBRARY).read_bytes() + (folder / "native.json").read_bytes()
    assert str(built[0]).encode() not in bytes_
    assert str(Path(torch.__file__).parent).encode() not in bytes_


@needs_nvcc
def test_it_brings_torch_and_no_part_of_cuda(built: tuple[Path, dict[str, Any]]) -> None:
    """Without libtorch among what it needs, a weak symbol would not be found in a torch with CUDA either."""
    bytes_ = (built[0] / "pyprune" / build_cuda.LIBRARY).read_bytes()
    assert b"\0libtorch.so\0" in bytes_ and b"libcudart.so" not in bytes_


@needs_nvcc
def test_nothing_is_compiled_again_without_a_change(built: tuple[Path, dict[str, Any]]) -> None:
    objects = [built[0] / "build" / "cuda" / f"{name}.o" for name in ("twice.cu", "binding.cpp")]
    before = [file.stat().st_mtime_ns for file in objects]
    build(built[0])
    assert [file.stat().st_mtime_ns for file in objects] == before


@needs_nvcc
def test_it_loads_without_a_device_beside_the_cpu_library(built: tuple[Path, dict[str, Any]]) -> None:
    code = (
        "import json, sys; from pyprune import cli; from pyprune.ffn import native, ops; import torch;"
        "torch.cuda.is_available = lambda: False;"
        "print(json.dumps([native.load(), native.load_cuda(), native.load_cuda(), native.facts('cuda')])); "
        "print(torch.ops.pyprune.tiny_devices('')); sys.argv[1:] = ['doctor']; cli.main()"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment["PYPRUNE_CUDA_LIBRARY"] = str(built[0] / "pyprune" / build_cuda.LIBRARY)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, devices, *doctor = done.stdout.splitlines()
    cpu, reason, again, facts = json.loads(first)
    assert (cpu, reason, again, devices) == (native.load(), None, None, "none")
    assert (facts["state"], facts["nvcc"]) == ("usable", built[1]["nvcc"])
    said = " ".join(" ".join(doctor).split())
    assert "native CUDA library: loaded (built: sm_80" in said
    for code in built[1]["architectures"]:
        kind = f"machine code of {code}," if code.startswith("sm_") else f"PTX of {code}, compiled at the first call,"
        assert f"{kind} {'without' if code.endswith('_80') else 'with'} clusters and dependent launch" in said


@needs_nvcc
def test_a_change_in_a_shared_header_compiles_again(root: Path) -> None:
    assert build(root)["architectures"] == ["sm_90", "compute_90"]
    library = root / "build" / "cuda" / build_cuda.LIBRARY
    before = library.stat().st_mtime_ns
    write(root, "common/twice.h", SHARED.replace("2", "3"))
    assert build(root)["built"] and library.stat().st_mtime_ns > before


@needs_nvcc
def test_a_broken_source_keeps_the_first_error_and_the_log(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, "cuda/twice.cu", KERNEL.replace("kTwice; }", "missing; }"))
    reason = build(root)["reason"]
    assert reason.startswith("csrc/cuda/twice.cu(") and "missing" in reason
    assert "missing" in (root / "pyprune" / build_cuda.LOG).read_text()
    monkeypatch.setattr(build_native, "ROOT", root)
    with pytest.raises(SystemExit, match="missing"):
        build_native.main([])
    monkeypatch.setenv("CUDACXX", "no-such-nvcc")
    build_native.main([])
    assert not (root / "pyprune" / build_cuda.LOG).exists()


@needs_nvcc
def test_a_missing_symbol_fails_at_the_build(root: Path) -> None:
    write(root, "cuda/twice.cu", "int elsewhere();\nint one() { return elsewhere(); }\n")
    assert "elsewhere" in build(root)["reason"]


@needs_nvcc
def test_an_architecture_that_nvcc_does_not_know_is_left_out(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = root / "nvcc"
    nvcc.write_text(f'#!/bin/sh\ncase "$*" in *sm_1?0*) exit 1;; esac\nexec {build_cuda._nvcc()[0]} "$@"\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    toolkit = build_cuda.find_toolkit(building.find_compiler())
    monkeypatch.delenv("PYPRUNE_CUDA_ARCHS")
    assert build_cuda.choose_architectures(toolkit) == (["80", "90"], ["100", "120"])
    monkeypatch.setenv("PYPRUNE_CUDA_ARCHS", "100")
    assert build(root)["reason"] == f"nvcc {toolkit.version} knows none of 100"
    monkeypatch.setenv("PYPRUNE_CUDA_ARCHS", "90,75")
    with pytest.raises(SystemExit, match="must hold 80, 90, 100, 120 only; got 75"):
        build(root)


@pytest.mark.parametrize(
    ("capability", "code"),
    [
        *(((7, 5), None), ((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 0), "sm_100")),
        *(((10, 3), "sm_100"), ((11, 0), "compute_90"), ((12, 1), "sm_120"), ((13, 0), "compute_90")),
    ],
)
def test_what_a_device_runs(capability: tuple[int, int], code: str | None) -> None:
    every = build_cuda.codes(list(build_cuda.ARCHITECTURES))
    assert native.code_for(capability, every) == code


@pytest.mark.parametrize(
    ("capability", "code"),
    [((8, 0), "compute_80"), ((8, 9), "sm_86"), ((9, 0), "compute_80"), ((12, 1), "compute_100")],
)
def test_machine_code_is_of_no_later_device_and_ptx_the_newest(capability: tuple[int, int], code: str) -> None:
    assert native.code_for(capability, ["sm_86", "compute_80", "compute_100"]) == code


def test_the_variable_skips_requires_or_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYPRUNE_CUDA", "0")
    assert build(root)["reason"] == "PYPRUNE_CUDA=0 was set at the build"
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PYPRUNE_CUDA", "require")
    with pytest.raises(SystemExit, match=r"native CUDA library: .*CXX=no-such-compiler"):
        build(root)
    monkeypatch.setenv("PYPRUNE_CUDA", "maybe")
    with pytest.raises(SystemExit, match="PYPRUNE_CUDA must be 0, 1 or require; got maybe"):
        build(root)


@needs_compiler
def test_requiring_the_cpu_library_does_not_require_cuda(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, "cpu/one.cpp", "int one() { return 1; }\n")
    monkeypatch.setenv("CUDACXX", "no-such-nvcc")
    monkeypatch.setenv("PYPRUNE_NATIVE", "require")
    assert not build(root)["built"]


def test_a_package_holds_what_was_built_and_no_simulator(tmp_path: Path) -> None:
    for name in ("libpyprune_cuda.so", "native.json", "native_cuda.log", build_simulator.LIBRARY):
        (tmp_path / name).touch()
    listed = {Path(file).name for file in build_native.outputs(tmp_path)}
    assert listed == {"libpyprune_cuda.so", "native.json", "native_cuda.log"}


@needs_compiler
def test_the_simulator_is_the_same_source_as_cxx(root: Path) -> None:
    write(root, "cuda/simulator/binding.cpp", SIMULATOR)
    write(root, "cuda/binding.cpp", "#error not for the simulator\n")
    out = root / "build" / "simulator"
    assert build_native.build_for_tests(out, root) == "built"
    code = f"import torch; torch.ops.load_library({str(out / build_simulator.LIBRARY)!r}); "
    code += "print(torch.ops.pyprune.tiny_simulated(''))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(said) == 6
    write(root, "cuda/twice.cu", "#ifdef PYPRUNE_SIMULATE\n#error broken\n#endif\n")
    assert build_native.build_for_tests(out, root).startswith("csrc/cuda/twice.cu:2:")
    assert not (out / build_simulator.LIBRARY).exists() and (out / build_simulator.LOG).exists()


def test_what_is_no_library_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / build_cuda.LIBRARY
    monkeypatch.setenv("PYPRUNE_CUDA_LIBRARY", str(file))
    try:
        native.load_cuda.cache_clear()
        assert native.load_cuda() == f"PYPRUNE_CUDA_LIBRARY must name an existing file; got {file}"
        (tmp_path / "native.json").write_text('{"cuda": {"built": false, "reason": "no nvcc"}}')
        native.load_cuda.cache_clear()
        assert native.describe("cuda") == "native CUDA library not built: no nvcc"
        file.write_bytes(b"not a library")
        native.load_cuda.cache_clear()
        reason = native.load_cuda()
        assert reason is not None and reason.startswith("native CUDA library cannot be loaded: ")
        assert "\n" not in reason and native.facts("cuda") == {"state": reason, "path": str(file)}
    finally:
        native.load_cuda.cache_clear()
