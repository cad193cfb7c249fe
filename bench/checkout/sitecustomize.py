"""With this folder on PYTHONPATH a checkout's `pyprune` and `pyprune.triton_kernels` are imported where they lie.

For Pythons in which pyprune is not installed and cannot be: an editable install does the same. Python runs a module of
this name at its start; another one that it would have run without this folder runs as well.
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

_OWN = Path(__file__).resolve().parent
_ROOT = _OWN.parent.parent
_PLACES = {"pyprune": _ROOT / "pyprune", "pyprune.triton_kernels": _ROOT / "triton_kernels"}


class _Checkout:
    """Finds the packages of the checkout, before anything that is installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        folder = _PLACES.get(name)
        if folder is None:
            return None
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def _run_the_other():
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != _OWN]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, _Checkout)
_run_the_other()
