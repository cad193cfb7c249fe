"""The native CPU library's build and loading, with tiny sources: every way to have none ends in one line. Of the CUDA
library: test_native_cuda.py.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pyprune.ffn import native

sys.path.insert(0, str(Path(__file__).parent.parent / "csrc"))
import build_cpu
import build_native
import building

OPERATOR = """
#include <torch/csrc/stable/library.h>
#include <string>
std::string cpu_isa(std::string) { return "tiny"; }
STABLE_TORCH_LIBRARY_FRAGMENT(pyprune, m) { m.def("cpu_isa(str wanted) -> str"); }
STABLE_TORCH_LIBRARY_IMPL(pyprune, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }
"""


def _cannot_build() -> str:
    try:
        building.find_compiler(), building.find_torch(), building.find_ninja()
    except building.NotBuilt as reason:
        return str(reason)
    return ""


NO_BUILD = _cannot_build()
needs_build = pytest.mark.skipif(bool(NO_BUILD), reason=NO_BUILD or "a library can be built")
needs_x86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="ISA files are for x86")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one tiny source."""
    monkeypatch.delenv("PYPRUNE_NATIVE", raising=False)
    write(tmp_path, "one.cpp", "int one() { return 1; }\n")
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    (root / "csrc" / "cpu").mkdir(parents=True, exist_ok=True)
    (root / "csrc" / "cpu" / name).write_text(text)


def build(root: Path) -> dict[str, Any]:
    """Build into ROOT/pyprune; what is returned must be what is recorded, and agree with what lies there."""
    out = root / "pyprune"
    record: dict[str, Any] = build_native.build(out, root)["cpu"]
    assert json.loads((out / "native.json").read_text())["cpu"] == record
    assert (out / build_cpu.LIBRARY).is_file() == record["built"]
    assert "\n" not in record.get("reason", "")
    return record


def fresh(library: Path, code: str) -> str:
    """Run `code` in a process of its own that takes `library`."""
    environment = {**os.environ, "PYPRUNE_CPU_LIBRARY": str(library)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The file that PYPRUNE_CPU_LIBRARY names, not there yet; `load` starts anew, before and after."""
    path = tmp_path / build_cpu.LIBRARY
    monkeypatch.setenv("PYPRUNE_CPU_LIBRARY", str(path))
    native.load.cache_clear()
    yield path
    native.load.cache_clear()


@pytest.mark.parametrize("compiler", ["named one missing", "none on the path"])
def test_without_a_compiler_the_reason_is_recorded(root: Path, monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    if compiler == "named one missing":
        monkeypatch.setenv("CXX", "no-such-compiler")
    else:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv("PATH", str(root))
    reason = build(root)["reason"]
    assert reason.startswith("no C++17 compiler: ")
    assert compiler == "none on the path" or "CXX=no-such-compiler" in reason


def test_doctor_and_load_tell_the_recorded_reason(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    line = f"native CPU library not built: {build(root)['reason']}"
    code = "import sys; from pyprune import cli; from pyprune.ffn import native; print(native.load()); "
    code += "sys.argv[1:] = ['doctor']; cli.main()"
    said = " ".join(fresh(root / "pyprune" / build_cpu.LIBRARY, code).split())
    assert said.startswith(line)
    assert said.count(line) >= 2, said


@needs_build
def test_a_built_library_loads_in_a_fresh_process(root: Path) -> None:
    write(root, "one.cpp", OPERATOR)
    record = build(root)
    assert record["compiler"] and record["torch"] == torch.__version__ and record["isas"] == []
    code = (
        "import json; from pyprune.ffn import native; print(json.dumps([native.load(), native.load(), native.facts()]))"
    )
    first, second, facts = json.loads(fresh(root / "pyprune" / build_cpu.LIBRARY, code))
    assert (first, second) == (None, None)
    assert (facts["state"], facts["isa"], facts["compiler"]) == ("usable", "tiny", record["compiler"])


@needs_build
def test_no_path_of_this_machine_is_built_in(root: Path) -> None:
    write(root, "one.cpp", OPERATOR)
    build(root)
    built = (root / "pyprune" / build_cpu.LIBRARY).read_bytes() + (root / "pyprune" / "native.json").read_bytes()
    assert str(root).encode() not in built
    assert str(Path(torch.__file__).parent).encode() not in built


@needs_build
def test_a_broken_source_keeps_the_first_error_and_the_log(root: Path) -> None:
    assert build(root)["built"]
    write(root, "two.cpp", "int two() {\n  return missing;\n}\n#error second\n")
    reason = build(root)["reason"]
    assert reason.startswith("csrc/cpu/two.cpp:") and "error: " in reason
    log = (root / "pyprune" / "native.log").read_text()
    assert "missing" in log and "second" in log
    write(root, "two.cpp", "int two() { return 2; }\n")
    assert build(root)["built"]
    assert not (root / "pyprune" / "native.log").exists()


@needs_build
def test_the_command_fails_on_a_broken_source_only(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_native, "ROOT", root)
    write(root, "one.cpp", "#error broken\n")
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")
        build_native.main([])
    with pytest.raises(SystemExit, match="broken"):
        build_native.main([])


@needs_build
def test_a_missing_symbol_fails_at_the_build(root: Path) -> None:
    write(root, "one.cpp", "int elsewhere();\nint one() { return elsewhere(); }\n")
    assert "elsewhere" in build(root)["reason"]


@needs_build
def test_only_what_changed_is_compiled_again(root: Path) -> None:
    write(root, "two.cpp", '#include "two.h"\nint two() { return kTwo; }\n')
    write(root, "two.h", "constexpr int kTwo = 2;\n")

    def times() -> list[int]:
        build(root)
        return [(root / "build" / "objects" / f"{name}.cpp.o").stat().st_mtime_ns for name in ("one", "two")]

    first = times()
    assert times() == first
    write(root, "two.h", "constexpr int kTwo = 3;\n")
    again = times()
    assert again[0] == first[0] and again[1] > first[1]


@needs_build
@needs_x86
def test_an_isa_file_gets_its_flags_and_the_others_its_define(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, "isa_avx2.cpp", "#ifndef __AVX2__\n#error no flags\n#endif\n")
    write(root, "one.cpp", "#if !defined(PYPRUNE_HAS_AVX2) || defined(__AVX2__)\n#error define\n#endif\n")
    record = build(root)
    assert record.get("isas") == ["avx2"], record
    monkeypatch.setitem(build_cpu.X86, "avx2", build_cpu.Isa(("-mno-such-isa",), "nop"))
    write(root, "one.cpp", "#ifdef PYPRUNE_HAS_AVX2\n#error define\n#endif\n")
    record = build(root)
    assert (record["isas"], record["left_out"]) == ([], ["avx2"])


def test_the_variable_skips_requires_or_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PYPRUNE_NATIVE", "0")
    assert build(root)["reason"] == "PYPRUNE_NATIVE=0 was set at the build"
    monkeypatch.setenv("PYPRUNE_NATIVE", "require")
    with pytest.raises(SystemExit, match="CXX=no-such-compiler"):
        build(root)
    monkeypatch.setenv("PYPRUNE_NATIVE", "maybe")
    with pytest.raises(SystemExit, match="must be 0, 1 or require; got maybe"):
        build(root)


@needs_build
def test_without_torch_or_sources_the_reason_says_so(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(building, "_torch_folder", lambda: None)
        assert "install torch first, then reinstall pyprune" in build(root)["reason"]
    (root / "csrc" / "cpu" / "one.cpp").unlink()
    assert build(root)["reason"] == "csrc/cpu has no sources"


def test_torch_is_found_from_an_isolated_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip hides the target environment from the build by a sitecustomize on PYTHONPATH."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.path[:] = [p for p in sys.path if 'site-' not in p]")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(building.importlib.util, "find_spec", lambda name: None)
    assert building.find_torch().folder == Path(torch.__file__).parent


@needs_build
def test_a_library_older_than_its_sources_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_PACKAGE", root / "pyprune")
    monkeypatch.delenv("PYPRUNE_CPU_LIBRARY", raising=False)
    build(root)
    assert native._changed("cpu") == []
    write(root, "one.cpp", "int one() { return 2; }\n")
    write(root, "new.h", "")
    (root / "csrc" / "common").mkdir()
    (root / "csrc" / "common" / "shared.h").touch()
    assert native._changed("cpu") == ["common/shared.h", "cpu/new.h", "cpu/one.cpp"]


def test_what_is_no_library_is_told_in_one_line(named: Path) -> None:
    assert native.load() == f"PYPRUNE_CPU_LIBRARY must name an existing file; got {named}"
    native.load.cache_clear()
    named.write_bytes(b"not a library")
    reason = native.load()
    assert reason is not None and reason.startswith("native CPU library cannot be loaded: ") and "\n" not in reason
    assert native.describe() == reason and native.facts() == {"state": reason, "path": str(named)}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cpu": 3}', "{}"])
def test_a_corrupt_record_is_as_none(named: Path, text: str) -> None:
    named.with_name("native.json").write_text(text)
    assert (native.load() or "").startswith("PYPRUNE_CPU_LIBRARY must name")


@needs_build
def test_a_library_of_other_operators_is_not_loaded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels would take for operands what are none, and torch does not check."""
    assert building.INTERFACE == native._INTERFACE
    build(root)
    monkeypatch.setattr(native, "_PACKAGE", root / "pyprune")
    monkeypatch.delenv("PYPRUNE_CPU_LIBRARY", raising=False)
    monkeypatch.setattr(native, "_INTERFACE", building.INTERFACE + 1)
    native.load.cache_clear()
    assert "built for other operators: run `make native`" in (native.load() or "")
    native.load.cache_clear()
