"""Imports point downward only, kernels know no framework, and nothing here can unpickle."""

import ast
import sys
from pathlib import Path

import pytest

import pyprune

PACKAGE = Path(pyprune.__file__).parent
KERNELS = PACKAGE.parent / "triton_kernels"

# Bottom first. A module imports from lower rows only; a package counts as one module.
LAYERS = (
    {"errors", "reference", "heterogeneous", "memory", "machine", "summary", "fresh", "native", "scratch"},
    {"files", "remote_code", "text", "patterns", "quantisation", "roofline", "screen", "weights"},
    {"figures", "manifest"},
    {"report"},
    {"probe"},
    {"families"},
    {"mask", "importance"},
    {"moments"},
    {"config", "allocation", "compensation", "calibration", "depth", "backends"},
    {"gradients", "reconstruction"},
    {"choices"},
    {"dispatch"},
    {"operators"},
    {"ops"},
    {"mlp_state"},
    {"mlp"},
    {"surgery"},
    {"checkpoint", "blocks", "sensitivity", "evaluation", "timing"},
    {"analysis"},
    {"tasks"},
    {"loading", "trial", "warming", "latency", "benchmark"},
    {"pruner"},
    {"pruning", "tune"},
    {"training", "nested", "comparison"},
    {"recovery"},
    {"options", "doctor", "diagnose"},
    {"demo"},
    {"cli_tune", "cli_prune", "cli_recover", "cli_compare", "cli_diagnose", "cli_inspect", "cli_report"},
    {"cli"},
)
RANK = {module: rank for rank, modules in enumerate(LAYERS) for module in modules}


def module_of(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path, package):
    """Every import in a file, as absolute dotted names; `from . import a, b` gives one for each."""
    folder = path.relative_to(package.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = folder[: len(folder) - node.level + 1] if node.level else ()
            base = ".".join([*parent, *([node.module] if node.module else [])])
            yield from ([base] if node.module else [f"{base}.{alias.name}" for alias in node.names])


SOURCES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]
KERNEL_SOURCES = sorted(KERNELS.glob("*.py"))


def test_the_package_is_this_checkout():
    assert len(SOURCES) > 20
    assert len(KERNEL_SOURCES) > 3


def test_every_module_has_its_place():
    assert {module_of(p) for p in SOURCES} - {"__main__"} <= RANK.keys(), "give the new module a row in LAYERS"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_point_downward(path):
    own = module_of(path)
    used = {name.split(".")[1] for name in imports_of(path, PACKAGE) if name.startswith("pyprune.")}
    upward = sorted(m for m in used - {own} if RANK[m] >= RANK[own])
    assert not upward, f"{own} imports {upward}, which are not below it"


@pytest.mark.parametrize("path", KERNEL_SOURCES, ids=lambda p: p.name)
def test_kernels_import_torch_triton_and_siblings_only(path):
    roots = {name.partition(".")[0] for name in imports_of(path, KERNELS)}
    assert roots <= {"torch", "triton", "triton_kernels"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", [*SOURCES, *KERNEL_SOURCES], ids=lambda p: p.name)
def test_nothing_unpickles(path):
    assert not {"pickle", "dill", "joblib", "marshal", "shelve"} & {
        n.partition(".")[0] for n in imports_of(path, PACKAGE)
    }
    calls = [ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not {"torch.load", "eval", "exec", "np.load", "numpy.load"} & set(calls)


def test_public_names_exist():
    assert all(hasattr(pyprune, name) for name in pyprune.__all__)
    assert sorted(pyprune.__all__, key=str.lower) == sorted(set(pyprune.__all__), key=str.lower)
