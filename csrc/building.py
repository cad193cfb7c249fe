"""What the builds of the native libraries share: compiler, torch and ninja of this machine, flags, and one run of
ninja. Standard library only: pip runs it where nothing else is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


def version_numbers(text: str) -> tuple[int, ...]:
    """2, 11 and 0 of `2.11.0+cu130`."""
    return tuple(int(word) for word in re.findall(r"\d+", text.partition("+")[0]))


def _oldest_torch() -> tuple[int, int, int]:
    """The oldest torch that pyproject.toml admits."""
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    needs = tomllib.loads(text)["project"]["dependencies"]
    least = next(need for need in needs if re.match(r"torch\s*>=", need)).partition(">=")[2].partition(",")[0]
    major, minor, patch = (*version_numbers(least), 0)[:3]
    return major, minor, patch


OLDEST = ".".join(map(str, _oldest_torch()))
# The stable ABI that the libraries ask for: that of the oldest torch.
TARGET = "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}{:02x}{:010x}".format(*_oldest_torch(), 0)
FLAGS = ("-fPIC", "-pthread", "-fvisibility=hidden", "-Wall", "-Wextra")
SANITIZE = (
    *("-O1", "-g", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
)
SOURCES = (".cpp", ".h", ".cu", ".cuh")
# Counted up, here and in pyprune/ffn/native.py, when the operands of an operator change: torch hands them on unchecked.
INTERFACE = 4


class NotBuilt(Exception):  # noqa: N818 - a reason, not an error
    """Why there is no library, in one line; `log` is what compiler or linker said."""

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.log = log


class Compiler(NamedTuple):
    command: tuple[str, ...]
    version: str

    def accepts(self, source: str, *flags: str) -> bool:
        """Whether `source` compiles and assembles with `flags`."""
        with tempfile.TemporaryDirectory() as folder:
            command = [*self.command, *flags, "-x", "c++", "-c", "-", "-o", str(Path(folder) / "probe.o")]
            return subprocess.run(command, input=source.encode(), capture_output=True, check=False).returncode == 0


class Torch(NamedTuple):
    folder: Path
    version: str


def find_compiler() -> Compiler:
    """The C++17 compiler that $CXX names, and no other then; else the first of c++, g++, clang++."""
    named = os.environ.get("CXX")
    for candidate in [named] if named else ["c++", "g++", "clang++"]:
        command = tuple(shlex.split(candidate))
        if not command or not shutil.which(command[0]):
            continue
        said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
        compiler = Compiler(command, said.partition("\n")[0].strip())
        if compiler.accepts("#include <optional>\nstd::optional<int> probe;", "-std=c++17"):
            return compiler
    where = f"CXX={named} is none" if named else "none of c++, g++, clang++ is one"
    raise NotBuilt(f"no C++17 compiler: {where}; install one, then reinstall pyprune")


def _torch_folder() -> Path | None:
    """Where torch is, without importing it: it need not be importable here, and takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        return Path(spec.origin).parent
    # pip's build isolation hides the environment that is installed into by these two; the interpreter is its own.
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")
    ask = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"
    done = subprocess.run(
        [sys.executable, "-P", "-c", ask],
        env={k: v for k, v in os.environ.items() if k not in hidden},
        capture_output=True,
        text=True,
        check=False,
    )
    return Path(done.stdout.strip()).parent if done.stdout.strip() else None


def find_torch() -> Torch:
    """The torch of the environment that is installed into."""
    folder = _torch_folder()
    if folder is None:
        raise NotBuilt(
            "torch is not installed, or hidden from this build: install torch first, then reinstall pyprune "
            "(with --no-build-isolation if it was installed)"
        )
    found = re.search(r"__version__ = ['\"](.+?)['\"]", (folder / "version.py").read_text(encoding="utf-8"))
    version = found[1] if found else "of unknown version"
    if not (folder / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise NotBuilt(f"torch {version} has no headers of the stable ABI; pyprune needs torch >= {OLDEST}")
    return Torch(folder, version)


def find_ninja() -> str:
    """The ninja of the package of that name, whose scripts folder need not be on PATH, or any other."""
    spec = importlib.util.find_spec("ninja")
    if spec:
        import ninja

        bundled = Path(ninja.BIN_DIR) / "ninja"
        if bundled.is_file():
            return str(bundled)
    found = shutil.which("ninja")
    if not found:
        raise NotBuilt("ninja is not installed: install the package `ninja`, then reinstall pyprune")
    return found


def hashes(root: Path, part: str) -> dict[str, str]:
    """Path below csrc -> SHA-256 of every source in csrc/`part` and csrc/common; `ffn.native` compares with it."""
    csrc = root / "csrc"
    files = sorted(p for folder in (part, "common") for p in (csrc / folder).glob("*") if p.suffix in SOURCES)
    return {p.relative_to(csrc).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def host_flags(root: Path, torch: Torch, compiler: Compiler) -> tuple[str, ...]:
    """FLAGS, where torch's headers are, and what keeps paths of this machine out of the library."""
    return (
        *("-std=c++17", *FLAGS, TARGET),
        # gcc 12 warns of the undefined vectors in its own AVX-512 header; clang does not know that warning.
        *(() if "clang" in compiler.version else ("-Wno-maybe-uninitialized", "-Wno-uninitialized")),
        *prefix_maps(root, torch),
        *("-isystem", str(torch.folder / "include")),
    )


def prefix_maps(root: Path, torch: Torch) -> tuple[str, ...]:
    return (f"-ffile-prefix-map={root}=.", f"-ffile-prefix-map={torch.folder}=torch")


def link_flags(library: str, torch: Torch, sanitize: bool = False) -> tuple[str, ...]:
    """torch's libraries by name and without a search path: torch is always imported, and so loaded, before."""
    libraries = (f"-L{torch.folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10")
    if sys.platform == "darwin":
        return (f"-Wl,-install_name,@rpath/{library}", *libraries)
    return ("-Wl,--as-needed", *(() if sanitize else ("-Wl,-z,defs",)), *libraries)


def quoted(arguments: Iterable[str]) -> str:
    """For a command in build.ninja."""
    return shlex.join(arguments).replace("$", "$$")


def path(file: Path | str) -> str:
    """For a `build` line in build.ninja."""
    return re.sub(r"([$ :])", r"$\1", str(file))


# Sources for the C++ compiler, each with its flags.
Units = dict[Path, tuple[str, ...]]

# -MD, not -MMD: torch's headers are under the same path after an upgrade.
COMPILE = ("  depfile = $out.d", "  deps = gcc")


def compile_lines(compiler: Compiler, units: Units) -> list[str]:
    """In build.ninja: one object for each source, by the name of `object_of`."""
    lines = [
        f"cxx = {quoted(compiler.command)}",
        "rule compile",
        "  command = $cxx -MD -MF $out.d $flags -c $in -o $out",
        *COMPILE,
    ]
    for source, flags in units.items():
        lines += [f"build {object_of(source)}: compile {path(source)}", f"  flags = {quoted(flags)}"]
    return lines


def object_of(source: Path) -> str:
    return path(f"{source.name}.o")


def first_error(log: str) -> str:
    """The line of a build's log that says what is wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    wrong = [line for line in lines if re.search(r"\b(error|fatal)\s*:|undefined (reference|symbol)", line)]
    return (wrong or lines[-1:] or ["no message"])[0]


def run_ninja(work: Path, text: str, root: Path, torch: Torch, log_name: str) -> None:
    """Write `text` as `work`/build.ninja and run it; prints warnings. Raises NotBuilt with the first error."""
    ninja = find_ninja()
    work.mkdir(parents=True, exist_ok=True)
    (work / "build.ninja").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [ninja, "--quiet", "-C", str(work)],
        # Messages in English, so that the first error is found.
        env={**os.environ, "LC_ALL": "C"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    log = done.stdout
    for folder, short in ((f"{os.path.relpath(root, work)}/", ""), (f"{root}/", ""), (f"{torch.folder}/", "torch/")):
        log = log.replace(folder, short)
    if done.returncode:
        raise NotBuilt(f"{first_error(log)} (full log: {log_name})", log)
    if log.strip():
        print(log)


def place(text_or_file: str | Path, target: Path) -> None:
    """Write beside the target, then rename: a process that runs the old library keeps it."""
    beside = target.with_name(f"{target.name}.{os.getpid()}.new")
    if isinstance(text_or_file, Path):
        shutil.copyfile(text_or_file, beside)
    else:
        beside.write_text(text_or_file, encoding="utf-8")
    beside.replace(target)
