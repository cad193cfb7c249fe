"""Builds csrc/driver, the CPU kernels without torch, for a machine that an emulator runs; for tests only.

    python csrc/build_driver.py [--compiler aarch64-linux-gnu-g++] [--out build/arm/driver]

Static, so that it needs nothing of that machine's. Compiled again where a source is newer. With --binding FOLDER, where
torch's headers are, it also compiles the library's own binding for that machine, without linking it.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import build_cpu
import building

ROOT = Path(__file__).resolve().parent.parent
COMPILER = "aarch64-linux-gnu-g++"
# Not one whose intrinsics are x86's.
_SOURCES = ("cpu/run.cpp", "cpu/isa.cpp", "cpu/isa_portable.cpp", "driver/main.cpp")


def flags() -> list[str]:
    """Those of the library, but for torch's."""
    wanted = [flag for flag in building.FLAGS if flag not in ("-fPIC", "-fvisibility=hidden")]
    return ["-std=c++17", *wanted, "-Werror", *build_cpu._FLAGS, *build_cpu._OPTIMIZE]


def build(compiler: str, out: Path) -> bool:
    """Whether anything was compiled. Raises CalledProcessError where it does not compile."""
    sources = [ROOT / "csrc" / name for name in _SOURCES]
    headers = [h for folder in ("cpu", "common") for h in (ROOT / "csrc" / folder).glob("*.h")]
    newest = max(file.stat().st_mtime for file in [*sources, *headers, Path(__file__)])
    if out.is_file() and out.stat().st_mtime > newest:
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    made = out.with_name(out.name + ".new")
    subprocess.run([compiler, *flags(), "-static", *map(str, sources), "-o", str(made)], check=True)
    made.replace(out)
    return True


def compile_binding(compiler: str, headers: Path, out: Path) -> None:
    """The object of binding.cpp in `out`. Raises CalledProcessError where it does not compile."""
    source = ROOT / "csrc" / "cpu" / "binding.cpp"
    # What g++ takes for uninitialized are optionals of torch's headers.
    made = [*flags(), "-Wno-maybe-uninitialized", "-fPIC", building.TARGET, "-isystem", str(headers)]
    subprocess.run([compiler, *made, "-c", str(source), "-o", str(out)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the CPU kernels without torch, for an emulator.")
    parser.add_argument("--compiler", default=COMPILER)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "arm" / "driver")
    parser.add_argument("--binding", type=Path, metavar="FOLDER", help="torch's headers")
    arguments = parser.parse_args()
    build(arguments.compiler, arguments.out)
    if arguments.binding:
        compile_binding(arguments.compiler, arguments.binding, arguments.out.with_name("binding.o"))


if __name__ == "__main__":
    main()
