"""A native library that was built before is taken where it is the one that would be built, and else never."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_native_cuda import BINDING, KERNEL, NO_COMPILER, NO_TOOLKIT, SHARED, write

from pyprune.ffn import native

sys.path.insert(0, str(Path(__file__).parent.parent / "csrc"))
import build_cpu
import build_cuda
import build_native

pytestmark = pytest.mark.skipif(bool(NO_COMPILER), reason=NO_COMPILER or "there is a compiler")
needs_nvcc = pytest.mark.skipif(bool(NO_TOOLKIT), reason=NO_TOOLKIT or "there is an nvcc")
ONE = "int one() { return 1; }\n"


def fill(root: Path) -> None:
    for name, text in {
        "cpu/one.cpp": ONE,
        "cuda/twice.cu": KERNEL,
        "cuda/binding.cpp": BINDING,
        "common/twice.h": SHARED,
    }.items():
        write(root, name, text)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of libraries that were built elsewhere, the CUDA one for one architecture; and their records."""
    root = tmp_path_factory.mktemp("elsewhere")
    fill(root)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PYPRUNE_NATIVE", "PYPRUNE_CUDA", "PYPRUNE_PREBUILT"):
            patch.delenv(name, raising=False)
        patch.setenv("PYPRUNE_CUDA_ARCHS", "90")
        return root / "out", build_native.build(root / "out", root)


@pytest.fixture
def root(tmp_path: Path, before: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same sources on a machine without a compiler, and what was built before, copied to ROOT/prebuilt."""
    fill(tmp_path)
    shutil.copytree(before[0], tmp_path / "prebuilt")
    for name in ("PYPRUNE_NATIVE", "PYPRUNE_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYPRUNE_CUDA_ARCHS", "90")
    monkeypatch.setenv("PYPRUNE_PREBUILT", str(tmp_path / "prebuilt"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CUDACXX", "no-such-nvcc")
    return tmp_path


@needs_nvcc
@pytest.mark.parametrize("out", ["pyprune", "prebuilt"])
def test_it_is_taken_without_a_compiler(
    root: Path, before: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.setenv("PYPRUNE_CUDA", "require")
    records = build_native.build(root / out, root)
    assert records == {name: {**record, "taken": True} for name, record in before[1].items()}
    assert json.loads((root / out / "native.json").read_text()) == records
    for name in (build_cpu.LIBRARY, build_cuda.LIBRARY):
        assert (root / out / name).read_bytes() == (before[0] / name).read_bytes()
    assert not (root / "build").exists()
    monkeypatch.setenv("PYPRUNE_CUDA_LIBRARY", str(root / out / build_cuda.LIBRARY))
    monkeypatch.setattr(native, "load_cuda", lambda: None)
    assert native.facts("cuda")["taken"] is True
    assert "loaded (taken as built before: sm_90, compute_90; nvcc" in native.describe("cuda")


def edit(**changes: Any) -> Callable[[Path], None]:
    """Change the CPU library's record."""

    def change(root: Path) -> None:
        file = root / "prebuilt" / "native.json"
        records = json.loads(file.read_text())
        records["cpu"].update(changes)
        file.write_text(json.dumps(records))

    return change


def no_library(root: Path) -> None:
    """What is no library, though it is the one recorded."""
    text = b"not a library"
    (root / "prebuilt" / build_cpu.LIBRARY).write_bytes(text)
    edit(sha256=hashlib.sha256(text).hexdigest())(root)


AGAINST: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another source": (lambda root: write(root, "cpu/one.cpp", ONE + "\n"), "it was built from other sources"),
    "one more header": (lambda root: write(root, "common/new.h", ""), "it was built from other sources"),
    "sanitized": (edit(sanitized=True), "it is sanitized"),
    "none built": (edit(built=False), "native.json there records none"),
    "another library": (
        lambda root: (root / "prebuilt" / build_cpu.LIBRARY).write_bytes(b"cut off"),
        f"{build_cpu.LIBRARY} there is not the one that was recorded",
    ),
    "no library": (
        lambda root: (root / "prebuilt" / build_cpu.LIBRARY).unlink(),
        f"{build_cpu.LIBRARY} there is not the one that was recorded",
    ),
    "cannot be loaded": (no_library, "it cannot be loaded: OSError: "),
    "no record": (lambda root: (root / "prebuilt" / "native.json").unlink(), "FileNotFoundError: "),
    "corrupt record": (lambda root: (root / "prebuilt" / "native.json").write_text("[3]"), "TypeError: "),
}


@pytest.mark.parametrize("case", AGAINST)
def test_what_is_against_it_is_said_and_it_is_compiled(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    damage, reason = AGAINST[case]
    damage(root)
    monkeypatch.setenv("PYPRUNE_CUDA", "0")
    record = build_native.build(root / "pyprune", root)["cpu"]
    said = capsys.readouterr().out.splitlines()
    assert said == [line for line in said if f"native CPU library in PYPRUNE_PREBUILT={root / 'prebuilt'}" in line]
    assert len(said) == 1 and f"not taken: {reason}" in said[0]
    assert not record["built"] and "CXX=no-such-compiler" in record["reason"]


@needs_nvcc
def test_it_must_hold_the_architectures_that_are_wanted(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYPRUNE_CUDA_ARCHS", "80 90")
    monkeypatch.setenv("PYPRUNE_NATIVE", "0")
    assert not build_native.build(root / "pyprune", root)["cuda"]["built"]
    assert "not taken: it is not built for sm_80, compute_80" in capsys.readouterr().out
