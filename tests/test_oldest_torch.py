"""The native libraries and the oldest torch that pyproject.toml admits: they compile with it, and load beside it."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyprune.ffn import native

sys.path.insert(0, str(Path(__file__).parent.parent / "csrc"))
import building
import oldest_torch

ROOT = Path(__file__).parent.parent
# Declared by torch 2.13 and used before it was seen that 2.11 has no such macro.
NEWER = """
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
inline void look(AtenTensorHandle x, int32_t* dtype) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x, dtype));
}
"""


@pytest.fixture(scope="module")
def oldest() -> building.Torch:
    try:
        building.find_compiler()
        return oldest_torch.oldest_torch()
    except building.NotBuilt as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("part", oldest_torch.PARTS)
def test_every_source_that_sees_torch_compiles(part: str, oldest: building.Torch) -> None:
    try:
        sources = oldest_torch.units(ROOT, oldest, part)
    except building.NotBuilt as reason:
        pytest.skip(str(reason))
    assert "binding.cpp" in {source.name for source in sources}
    assert list(oldest_torch.errors(ROOT, oldest, part)) == []


def test_a_name_that_it_lacks_is_found_through_includes(tmp_path: Path, oldest: building.Torch) -> None:
    cpu, common = tmp_path / "csrc" / "cpu", tmp_path / "csrc" / "common"
    cpu.mkdir(parents=True)
    common.mkdir()
    (common / "operands.h").write_text(NEWER)
    (cpu / "between.h").write_text('#include "../common/operands.h"\n')
    (cpu / "one.cpp").write_text('#include "between.h"\n')
    (cpu / "other.cpp").write_text('#include "absent.h"\n#error seen, though it has nothing of torch\n')
    assert [source.name for source in oldest_torch.units(tmp_path, oldest, "cpu")] == ["one.cpp"]
    (said,) = oldest_torch.errors(tmp_path, oldest, "cpu")
    assert "common/operands.h:6:" in said and "STABLE_TORCH_ERROR_CODE_CHECK" in said
    installed = building.find_torch()
    if building.version_numbers(installed.version) >= (2, 13):
        assert list(oldest_torch.errors(tmp_path, installed, "cpu")) == []


def test_its_abi_is_what_the_build_asks_for(oldest: building.Torch) -> None:
    """One place says which torch is the oldest: pyproject.toml."""
    major, minor, patch = (
        int(found[1])
        for name in ("MAJOR", "MINOR", "PATCH")
        if (found := re.search(rf"VERSION_{name} (\d+)", (oldest.folder / VERSION).read_text()))
    )
    assert oldest.version == f"{major}.{minor}.{patch}"
    assert f"={major << 56 | minor << 48 | patch << 40:#018x}" in building.TARGET


VERSION = Path("include", "torch", "headeronly", "version.h")


def built(which: str) -> Path:
    library = native.library(which)
    if platform.system() != "Linux" or not library.is_file():
        pytest.skip(f"no library for Linux at {library}")
    try:
        building.find_compiler()
    except building.NotBuilt as reason:
        pytest.skip(str(reason))
    return library


@pytest.mark.parametrize("which", ["cpu", "cuda"])
def test_it_exports_what_the_libraries_need(which: str) -> None:
    library = built(which)
    assert {"aoti_torch_empty_strided", "torch_call_dispatcher"} <= oldest_torch.needs(library).keys()
    assert oldest_torch.missing(library) == []


@pytest.mark.skipif(platform.system() != "Linux", reason="reads libraries for Linux")
def test_a_symbol_that_it_does_not_export_is_found(tmp_path: Path) -> None:
    try:
        compiler = building.find_compiler()
    except building.NotBuilt as reason:
        pytest.skip(str(reason))
    source, library = tmp_path / "one.cpp", tmp_path / "one.so"
    source.write_text(
        'extern "C" int aoti_torch_made_up(), aoti_torch_abi_version();\n'
        "namespace at { int made_up(); }\n"
        "int one() { return aoti_torch_made_up() + aoti_torch_abi_version() + at::made_up(); }\n"
    )
    subprocess.run([*compiler.command, "-shared", "-fPIC", source, "-o", library], check=True)
    assert oldest_torch.missing(library) == ["_ZN2at7made_upEv", "aoti_torch_made_up"]


# A library that was built here serves a machine with a GPU that has these: glibc 2.34 and the C++ library of gcc 11.
LIMITS = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (11,)}


@pytest.mark.parametrize("which", ["cpu", "cuda"])
def test_the_libraries_need_no_newer_system(which: str) -> None:
    library, here = built(which), platform.libc_ver()[1]
    if building.version_numbers(here) > (2, 36):
        pytest.skip(f"built beside glibc {here}: what is handed on is built beside 2.36")
    versions = set(oldest_torch.needs(library).values()) - {""}
    assert any(version.startswith("GLIBC_") for version in versions)
    numbers = {version: building.version_numbers(version.partition("_")[2]) for version in versions}
    assert {version for version, number in numbers.items() if number > LIMITS[version.partition("_")[0]]} == set()
