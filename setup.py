"""Extensions and package_dir only; everything else about the package lives in pyproject.toml.

`triton_kernels/` is installed as `pyprune.triton_kernels`: a top-level package of that name belongs to
another project that serving engines probe for.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["pyprune", "pyprune.*"]), "pyprune.triton_kernels"],
    package_dir={"pyprune": "pyprune", "pyprune.triton_kernels": "triton_kernels"},
)
