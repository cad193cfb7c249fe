"""Folders import downward only, kernels know no framework, and nothing here can unpickle."""

import ast
import sys
from pathlib import Path

import pytest

import pyprune

PACKAGE = Path(pyprune.__file__).parent
ROOT = PACKAGE.parent
KERNELS, CSRC = ROOT / "triton_kernels", ROOT / "csrc"

# Top first. Imports, also those inside functions, go to folders further down; inside a folder they are free.
FOLDERS = ("cli", "report", "evaluation", "training", "serving", "pruning", "speed", "ffn", "model", "base")


def imports_of(path, package):
    """Every import in a file, as absolute dotted names; `from . import a, b` gives one for each."""
    folder = path.relative_to(package.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = folder[: len(folder) - node.level + 1] if node.level else ()
            base = ".".join([*parent, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


TOP = (PACKAGE / "__init__.py", PACKAGE / "__main__.py")
SOURCES = [p for p in sorted(PACKAGE.rglob("*.py")) if p not in TOP]
KERNEL_SOURCES = sorted(KERNELS.glob("*.py"))
CSRC_SOURCES = sorted(CSRC.rglob("*.py"))


def below(path, package):
    return path.relative_to(package).as_posix()


def test_the_package_is_this_checkout():
    assert len(SOURCES) > 20
    assert len(KERNEL_SOURCES) > 3 and len(CSRC_SOURCES) > 3


def test_every_module_lies_in_a_known_folder():
    assert {below(p, PACKAGE).split("/")[0] for p in SOURCES} <= set(FOLDERS), (
        "give the new folder its place in FOLDERS"
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: below(p, PACKAGE))
def test_folders_import_downward(path):
    own = below(path, PACKAGE).split("/")[0]
    allowed = {*FOLDERS[FOLDERS.index(own) :], "triton_kernels"}
    used = {name.split(".")[1] for name in imports_of(path, PACKAGE) if name.startswith("pyprune.")}
    assert used <= allowed, f"{own} imports {sorted(used - allowed)}, which are not below it"


@pytest.mark.parametrize("path", KERNEL_SOURCES, ids=lambda p: p.name)
def test_kernels_import_torch_triton_and_siblings_only(path):
    roots = {name.partition(".")[0] for name in imports_of(path, KERNELS)}
    assert roots <= {"torch", "triton", "triton_kernels"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", CSRC_SOURCES, ids=lambda p: p.name)
def test_builds_import_the_standard_library_and_siblings_only(path):
    siblings = {p.stem for p in CSRC_SOURCES}
    roots = {name.partition(".")[0] for name in imports_of(path, CSRC)}
    assert roots <= {"ninja"} | siblings | set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", [*SOURCES, *KERNEL_SOURCES], ids=lambda p: below(p, ROOT))
def test_nothing_unpickles(path):
    assert not {"pickle", "dill", "joblib", "marshal", "shelve"} & {
        n.partition(".")[0] for n in imports_of(path, PACKAGE if PACKAGE in path.parents else KERNELS)
    }
    calls = [ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not {"torch.load", "eval", "exec", "np.load", "numpy.load"} & set(calls)


def test_public_names_exist():
    assert all(hasattr(pyprune, name) for name in pyprune.__all__)
    assert sorted(pyprune.__all__, key=str.lower) == sorted(set(pyprune.__all__), key=str.lower)
