"""Builds the native CPU library from csrc/cpu; standard library only: pip runs it where nothing else is installed.

    python csrc/build_native.py [--out FOLDER] [--sanitize]

writes libpyprune_cpu.so (.dylib on macOS) and native.json into the package's folder, or FOLDER. A library that cannot
be built is no error: native.json says why, in one line. PYPRUNE_NATIVE=0 skips the build, =require makes it an error.
Called so, rather than by pip, it does fail where there is a compiler and the sources do not compile.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "libpyprune_cpu.dylib" if sys.platform == "darwin" else "libpyprune_cpu.so"
RECORD, LOG = "native.json", "native.log"

_FLAGS = (
    *("-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"),
    *("-Wall", "-Wextra"),
    # The oldest torch whose stable ABI the library asks for: 2.11.
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
)
_OPTIMIZE = ("-O3",)
_SANITIZE = (
    *("-O1", "-g", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
)


class Isa(NamedTuple):
    """Flags of `isa_NAME.cpp`, and an instruction by which to see whether compiler and assembler know them."""

    flags: tuple[str, ...]
    instruction: str


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *_AVX2)
_AVX512_BF16 = (*_AVX512, "-mavx512bf16", "-mavx512vnni")
X86 = {
    "avx2": Isa(_AVX2, "vpaddd %ymm0, %ymm0, %ymm0"),
    "avx512": Isa(_AVX512, "vpaddd %zmm0, %zmm0, %zmm0"),
    "avx512_bf16": Isa(_AVX512_BF16, "vdpbf16ps %zmm0, %zmm0, %zmm0"),
    "amx": Isa((*_AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"), "tdpbf16ps %tmm0, %tmm1, %tmm2"),
}


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
        raise NotBuilt(f"torch {version} has no headers of the stable ABI; pyprune needs torch >= 2.11")
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


def hashes(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every source in `folder`; pyprune.native compares with it."""
    files = sorted(p for p in folder.glob("*") if p.suffix in (".cpp", ".h"))
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def choose_isas(folder: Path, compiler: Compiler) -> tuple[list[str], list[str]]:
    """Those of X86 that have a file: the ones that this compiler can build, and the ones left out."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    present = [name for name in X86 if (folder / f"isa_{name}.cpp").is_file()]
    built = [n for n in present if x86 and compiler.accepts(f'asm("{X86[n].instruction}");', *X86[n].flags)]
    return built, [n for n in present if n not in built]


def _quoted(arguments: tuple[str, ...]) -> str:
    return shlex.join(arguments).replace("$", "$$")


def _path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _link_flags(torch: Torch, sanitize: bool) -> tuple[str, ...]:
    """torch's libraries by name and without a search path: torch is always imported, and so loaded, before."""
    libraries = (f"-L{torch.folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10")
    if sys.platform == "darwin":
        return (f"-Wl,-install_name,@rpath/{LIBRARY}", *libraries)
    return ("-Wl,--as-needed", *(() if sanitize else ("-Wl,-z,defs",)), *libraries)


def ninja_file(root: Path, compiler: Compiler, torch: Torch, isas: list[str], sanitize: bool) -> str:
    """The text of build.ninja."""
    every = (
        *_FLAGS,
        *(_SANITIZE if sanitize else _OPTIMIZE),
        # gcc 12 warns of the undefined vectors in its own AVX-512 header; clang does not know that warning.
        *(() if "clang" in compiler.version else ("-Wno-maybe-uninitialized", "-Wno-uninitialized")),
        *(f"-DPYPRUNE_HAS_{name.upper()}" for name in isas),
        # No path of the machine that builds goes into the library.
        *(f"-ffile-prefix-map={root}=.", f"-ffile-prefix-map={torch.folder}=torch"),
        *("-isystem", str(torch.folder / "include")),
    )
    sources = sorted((root / "csrc" / "cpu").glob("*.cpp"))
    known = {f"isa_{name}": name for name in X86}
    used = [s for s in sources if known.get(s.stem) in (None, *isas)]
    lines = [
        f"cxx = {_quoted(compiler.command)}",
        # -MD, not -MMD: torch's headers are under the same path after an upgrade.
        "rule compile",
        f"  command = $cxx -MD -MF $out.d {_quoted(every)} $isa -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx -shared -pthread {_quoted(_SANITIZE) if sanitize else ''} $in -o $out "
        + _quoted(_link_flags(torch, sanitize)),
    ]
    for source in used:
        flags = X86[known[source.stem]].flags if source.stem in known else ()
        lines += [f"build {source.stem}.o: compile {_path(source)}", f"  isa = {_quoted(flags)}"]
    return "\n".join([*lines, f"build {LIBRARY}: link " + " ".join(f"{s.stem}.o" for s in used), ""])


def first_error(log: str) -> str:
    """The line of a build's log that says what is wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    wrong = [line for line in lines if re.search(r"\berror:|undefined reference|undefined symbol", line)]
    return (wrong or lines[-1:] or ["no message"])[0]


def compile_library(root: Path, sanitize: bool) -> tuple[Path, dict[str, Any]]:
    """The library, in the folder of its objects, and what is recorded of it. Raises NotBuilt."""
    sources = root / "csrc" / "cpu"
    recorded = hashes(sources)
    if sys.platform == "win32":
        raise NotBuilt("there is no build for Windows yet")
    if not any(name.endswith(".cpp") for name in recorded):
        raise NotBuilt("csrc/cpu has no sources")
    compiler, torch, ninja = find_compiler(), find_torch(), find_ninja()
    isas, left_out = choose_isas(sources, compiler)
    work = root / "build" / ("asan-objects" if sanitize else "objects")
    work.mkdir(parents=True, exist_ok=True)
    (work / "build.ninja").write_text(ninja_file(root, compiler, torch, isas, sanitize), encoding="utf-8")
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
    log = done.stdout.replace(f"{root}{os.sep}", "").replace(f"{torch.folder}{os.sep}", "torch/")
    if done.returncode:
        raise NotBuilt(f"{first_error(log)} (full log: {LOG} beside {RECORD})", log)
    if log.strip():
        print(log)
    facts = {"compiler": compiler.version, "torch": torch.version, "isas": isas, "left_out": left_out}
    return work / LIBRARY, {"built": True, **facts, "sanitized": sanitize, "sources": recorded}


def _place(text_or_file: str | Path, target: Path) -> None:
    """Write beside the target, then rename: a process that runs the old library keeps it."""
    beside = target.with_name(f"{target.name}.{os.getpid()}.new")
    if isinstance(text_or_file, Path):
        shutil.copyfile(text_or_file, beside)
    else:
        beside.write_text(text_or_file, encoding="utf-8")
    beside.replace(target)


def build(out: Path, root: Path, sanitize: bool = False) -> dict[str, Any]:
    """Build `root`/csrc/cpu into the folder `out`; returns what native.json records under `cpu`.

    Raises SystemExit with the reason when PYPRUNE_NATIVE is `require` and there is no library.
    """
    wanted = os.environ.get("PYPRUNE_NATIVE") or "1"
    if wanted not in ("0", "1", "require"):
        raise SystemExit(f"PYPRUNE_NATIVE must be 0, 1 or require; got {wanted}")
    out.mkdir(parents=True, exist_ok=True)
    (out / LOG).unlink(missing_ok=True)
    try:
        if wanted == "0":
            raise NotBuilt("PYPRUNE_NATIVE=0 was set at the build")
        library, record = compile_library(root, sanitize)
        _place(library, out / LIBRARY)
    except (NotBuilt, OSError, subprocess.SubprocessError) as error:
        # An older library would tell another story than the reason.
        (out / LIBRARY).unlink(missing_ok=True)
        record = {"built": False, "reason": " ".join(str(error).split())}
        if isinstance(error, NotBuilt) and error.log:
            _place(error.log, out / LOG)
    _place(json.dumps({"cpu": record}, indent=2) + "\n", out / RECORD)
    if wanted == "require" and not record["built"]:
        raise SystemExit(f"native CPU library: {record['reason']}")
    return record


def outputs(folder: Path) -> list[str]:
    """What `build` left in `folder`."""
    return [str(folder / name) for name in (LIBRARY, RECORD, LOG) if (folder / name).is_file()]


def preload() -> str:
    """What LD_PRELOAD must hold for a sanitized library: the runtime, and libstdc++ so that it sees exceptions."""
    compiler = find_compiler()
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):
        ask = [*compiler.command, f"-print-file-name={name}"]
        path = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
        if not path.is_absolute() or "clang" in compiler.version:
            raise SystemExit(f"{compiler.version} has no {name} to preload; set CXX to a g++ that has")
        found.append(str(path.resolve()))
    return " ".join(found)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build the native CPU library.")
    parser.add_argument("--out", type=Path, default=ROOT / "pyprune", help="folder for the library and its record")
    parser.add_argument("--sanitize", action="store_true", help="with the address and undefined behaviour sanitizers")
    parser.add_argument("--preload", action="store_true", help="only print LD_PRELOAD for a sanitized library")
    arguments = parser.parse_args(given)
    if arguments.preload:
        print(preload())
        return
    out = arguments.out.resolve()
    record = build(out, ROOT, arguments.sanitize)
    said = f"built, {', '.join(record['isas']) or 'no ISA files'}" if record["built"] else record["reason"]
    print(f"native CPU library: {said}")
    if (out / LOG).is_file():
        # To a developer a source that does not compile is an error: the tests of its kernels would only be skipped.
        raise SystemExit((out / LOG).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
