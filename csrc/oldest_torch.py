"""Whether the native sources compile with the oldest torch that pyproject.toml admits, whatever torch is installed.

    python csrc/oldest_torch.py             fetches that torch's headers, once, into build/oldest-torch-VERSION
    python csrc/oldest_torch.py --symbols   and writes csrc/torch-VERSION.symbols, by llvm-nm (for a new VERSION)

The headers are the same in every wheel, so they are taken from the smallest, which is that for macOS: 80 MB.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import build_cpu
import build_cuda
import build_simulator
import building
from building import OLDEST, NotBuilt, Torch

ROOT = Path(__file__).resolve().parent.parent
SYMBOLS = ROOT / "csrc" / f"torch-{OLDEST}.symbols"
FOLDER = ROOT / "build" / f"oldest-torch-{OLDEST}"
WHY = FOLDER.with_name(f"{FOLDER.name}.txt")  # why there are no headers
PARTS = ("cpu", "cuda", "simulator")

_WHEEL = ("--platform", "macosx_11_0_arm64", "--python-version", "3.12", "--implementation", "cp")
_TORCH = re.compile(r"^\s*#\s*include\s*<(?:torch|ATen|c10)/", re.MULTILINE)
_OWN = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
# Kernels of Inductor and of one platform are for no library of ours.
_STABLE = re.compile(r"^_((?:aoti_torch_(?!cpu_|mps_)|torch_)\w+)$")


def oldest_torch() -> Torch:
    """Where the headers are. Raises NotBuilt where they were not fetched, with the reason."""
    if (FOLDER / "include").is_dir():
        return Torch(FOLDER, OLDEST)
    said = WHY.read_text(encoding="utf-8") if WHY.is_file() else "`python csrc/oldest_torch.py` fetches them"
    raise NotBuilt(f"no headers of torch {OLDEST}: {said.strip()}")


def _wheel(folder: Path) -> Path:
    """The wheel, downloaded into `folder`. Raises NotBuilt with what pip said."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--retries=1"]
    command += ["--disable-pip-version-check", "-d", str(folder), *_WHEEL, f"torch=={OLDEST}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    except subprocess.TimeoutExpired:
        raise NotBuilt("pip did not end in 600 seconds") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = re.search(r"^ERROR: (.*)", done.stderr, re.MULTILINE) or re.search(r"(.+)\s*$", done.stderr)
        raise NotBuilt(f"pip could not fetch them: {said[1] if said else 'it said nothing'}")
    return wheels[0]


def fetch(symbols: bool) -> None:
    """Headers into FOLDER, and SYMBOLS written if asked for. Raises NotBuilt."""
    if (FOLDER / "include").is_dir() and not symbols:
        return
    FOLDER.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{FOLDER.name}-", dir=FOLDER.parent) as beside:
        with zipfile.ZipFile(_wheel(Path(beside))) as wheel:
            names = [name for name in wheel.namelist() if name.startswith("torch/include/")]
            wheel.extractall(beside, names)
            if symbols:
                libraries = [name for name in wheel.namelist() if re.fullmatch(r"torch/lib/lib(torch|c10).*", name)]
                wheel.extractall(beside, libraries)
                exported = _exported([Path(beside, name) for name in libraries])
                building.place("".join(f"{name}\n" for name in exported), SYMBOLS)
        if not FOLDER.is_dir():
            WHY.unlink(missing_ok=True)
            shutil.rmtree(Path(beside, "torch", "lib"), ignore_errors=True)
            Path(beside, "torch").rename(FOLDER)


def _exported(libraries: list[Path]) -> list[str]:
    """Names of the stable ABI that `libraries`, of macOS, export."""
    nm = shutil.which("llvm-nm")
    if nm is None:
        raise NotBuilt("no llvm-nm: install LLVM")
    command = [nm, "--extern-only", "--defined-only", "--just-symbol-name", *map(str, libraries)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sorted({found[1] for line in said.splitlines() if (found := _STABLE.match(line))})


def sees_torch(source: Path) -> bool:
    """Whether `source`, or a file that it includes by a path from where it is, includes a header of torch."""
    seen, waiting = set(), [source]
    while waiting:
        file = waiting.pop().resolve()
        if file in seen or not file.is_file():
            continue
        seen.add(file)
        text = file.read_text(encoding="utf-8")
        if _TORCH.search(text):
            return True
        waiting += [file.parent / name for name in _OWN.findall(text)]
    return False


def units(root: Path, torch: Torch, part: str) -> building.Units:
    """The sources of a library that see torch, with the flags of its build; `part` is one of PARTS.

    Raises NotBuilt where it cannot be built here.
    """
    compiler = building.find_compiler()
    if part == "cpu":
        isas, _ = build_cpu.choose_isas(root / "csrc" / "cpu", compiler)
        every = build_cpu.units(root, compiler, torch, isas)
    elif part == "cuda":
        every = build_cuda.units(root, compiler, torch, build_cuda.find_toolkit(compiler))
    else:
        every = build_simulator.units(root, compiler, torch)
    return {source: flags for source, flags in every.items() if sees_torch(source)}


def errors(root: Path, torch: Torch, part: str) -> Iterator[str]:
    """The first error of each source that sees torch and does not compile with this one."""
    compiler = building.find_compiler()
    for source, flags in units(root, torch, part).items():
        command = [*compiler.command, *flags, "-w", "-fsyntax-only", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            yield building.first_error(done.stderr).replace(f"{root}/", "")


def _dynamic(library: Path, which: str) -> dict[str, str]:
    """Dynamic symbols of a library for Linux -> version, as `GLIBC_2.34`, or nothing; not the weak ones it lacks."""
    command = ["nm", "--dynamic", which, str(library)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r" [A-Zu] ([^\s@]+)@*(\S*)$", said, re.MULTILINE))


def needs(library: Path) -> dict[str, str]:
    """Symbol -> version of what `library`, for Linux, must be given when it is loaded; of torch's the version is empty.

    Raises NotBuilt where there is no compiler.
    """
    ask = [*building.find_compiler().command, "-print-file-name=libstdc++.so.6"]
    runtime = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    # torch exports a part of the C++ library too, by which the linker forgets the version.
    offered = _dynamic(runtime, "--defined-only") if runtime.is_file() else {}
    return {name: found or offered.get(name, "") for name, found in _dynamic(library, "--undefined-only").items()}


def missing(library: Path) -> list[str]:
    """What `library` needs of torch that the oldest one does not export. Raises NotBuilt where there is no compiler."""
    exported = set(SYMBOLS.read_text(encoding="utf-8").split())
    return sorted({name for name, version in needs(library).items() if not version} - exported)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch the headers of the oldest torch.")
    parser.add_argument("--symbols", action="store_true", help=f"write {SYMBOLS.name} as well")
    symbols = parser.parse_args().symbols
    try:
        fetch(symbols)
    except (NotBuilt, OSError, zipfile.BadZipFile) as reason:
        if symbols:
            raise SystemExit(str(reason)) from None
        building.place(f"{reason}\n", WHY)
        print(f"headers of torch {OLDEST}: {reason}")


if __name__ == "__main__":
    main()
