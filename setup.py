"""Extensions and package_dir only; everything else about the package lives in pyproject.toml.

`triton_kernels/` is installed as `pyprune.triton_kernels`: a top-level package of that name belongs to
another project that serving engines probe for.
"""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import build_native  # noqa: E402 - not a package's module: pip builds with the build requirements only


class BuildNative(build_ext):
    """The native libraries, in the package's folder; where one cannot be built, the record of why."""

    @property
    def _folder(self) -> Path:
        return ROOT / "pyprune" if self.inplace or self.editable_mode else Path(self.build_lib) / "pyprune"

    def run(self) -> None:
        build_native.build(self._folder, ROOT)

    def get_outputs(self) -> list[str]:
        return build_native.outputs(self._folder)

    def get_output_mapping(self) -> dict[str, str]:
        in_place = self._folder == ROOT / "pyprune"
        return {str(Path(self.build_lib) / "pyprune" / Path(f).name): f for f in self.get_outputs()} if in_place else {}


class AnyPython(bdist_wheel):
    """The libraries call torch only, never Python, so one wheel a platform serves every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[*find_packages(include=["pyprune", "pyprune.*"]), "pyprune.triton_kernels"],
    package_dir={"pyprune": "pyprune", "pyprune.triton_kernels": "triton_kernels"},
    ext_modules=[Extension(f"pyprune.libpyprune_{name}", sources=[]) for name in build_native.NATIVE],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython},
)
