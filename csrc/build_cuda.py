"""The native CUDA library: csrc/cuda/*.cu by nvcc, csrc/cuda/*.cpp by the C++ compiler. The toolkit decides, never a
device: it is built for all ARCHITECTURES on a machine without one, and with a torch without CUDA.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import building
from building import Compiler, NotBuilt, Torch

LIBRARY = "libpyprune_cuda.so"
LOG = "native_cuda.log"

# Machine code runs on later devices of the same major number, PTX on every later one. No sm_86 and sm_89: they have
# sm_80's instructions (1 % fewer, 89's those of 86), for 2.6 MB and 17 seconds of a CPU each. No 90a, 100a: the same
# machine code as 90 and 100, to the instruction, but for one device only.
ARCHITECTURES = {
    "80": "arch=compute_80,code=[sm_80,compute_80]",
    "90": "arch=compute_90,code=[sm_90,compute_90]",
    "100": "arch=compute_100,code=sm_100",
    "120": "arch=compute_120,code=sm_120",
}
_USUAL = ("nvcc", "/usr/local/cuda/bin/nvcc")
_LAUNCHERS = ("ccache", "sccache", "distcc")


class Toolkit(NamedTuple):
    command: tuple[str, ...]
    version: str
    includes: tuple[str, ...]
    libraries: tuple[str, ...]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """nvcc on an empty source, in a folder of its own."""
        with tempfile.TemporaryDirectory() as folder:
            command = [*self.command, "-std=c++17", *arguments, "-x", "cu", os.devnull]
            return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)

    def knows(self, architecture: str) -> bool:
        return self.run("--dryrun", "-c", "-gencode", ARCHITECTURES[architecture]).returncode == 0


def _nvcc() -> tuple[str, ...]:
    """nvcc of $CUDACXX or else of $CUDA_HOME, and no other if one is set; else of PATH or /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    named = os.environ.get("CUDACXX") or (home and shlex.quote(str(Path(home) / "bin" / "nvcc")))
    for candidate in [named] if named else _USUAL:
        command = tuple(shlex.split(candidate))
        if command and shutil.which(command[0]):
            return command
    variable = "CUDACXX" if os.environ.get("CUDACXX") else "CUDA_HOME"
    where = f"{variable} names {named}, which is none" if named else "none on PATH or in /usr/local/cuda/bin"
    raise NotBuilt(f"no nvcc: {where}; install the CUDA toolkit")


def _host(compiler: Compiler) -> str:
    """The program of `compiler` for nvcc, which takes no launcher and no flags in its place."""
    return next(word for word in compiler.command if Path(word).name not in _LAUNCHERS)


def find_toolkit(compiler: Compiler) -> Toolkit:
    """The CUDA toolkit, if its nvcc takes `compiler`; folders as nvcc itself would use them."""
    command = _nvcc()
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", said)
    if not found:
        raise NotBuilt(f"{shlex.join(command)} does not work as nvcc: `--version` names no release")
    toolkit = Toolkit((*command, "-ccbin", _host(compiler)), found[1], (), ())
    tried = toolkit.run("-E")
    if tried.returncode:
        why = building.first_error(tried.stderr)
        raise NotBuilt(f"nvcc {toolkit.version} does not work with {compiler.version}: {why}")
    planned = toolkit.run("--dryrun", "-c").stderr
    words = dict(re.findall(r"^#\$ (INCLUDES|SYSTEM_INCLUDES|LIBRARIES)=(.*)$", planned, flags=re.MULTILINE))
    includes = [*shlex.split(words.get("INCLUDES", "")), *shlex.split(words.get("SYSTEM_INCLUDES", ""))]
    # "-Ifolder" or "-isystem" "folder"; the compiler's own must stay in its place, after its C++ headers.
    folders = [re.sub("^-I", "", word) for word in includes if word != "-isystem"]
    folders = [folder for folder in folders if os.path.realpath(folder) != "/usr/include"]
    libraries = shlex.split(words.get("LIBRARIES", ""))
    if not any(Path(word[2:], "libcudart_static.a").is_file() for word in libraries):
        raise NotBuilt(f"the CUDA toolkit {toolkit.version} has no libcudart_static.a")
    return toolkit._replace(includes=tuple(folders), libraries=tuple(libraries))


def wanted_architectures() -> list[str]:
    """Those of ARCHITECTURES that $PYPRUNE_CUDA_ARCHS allows."""
    asked = os.environ.get("PYPRUNE_CUDA_ARCHS") or " ".join(ARCHITECTURES)
    words = [word for word in re.split("[ ,;]+", asked) if word]
    unknown = [word for word in words if word not in ARCHITECTURES]
    if unknown:
        raise SystemExit(f"PYPRUNE_CUDA_ARCHS must hold {', '.join(ARCHITECTURES)} only; got {' '.join(unknown)}")
    return [name for name in ARCHITECTURES if name in words]


def choose_architectures(toolkit: Toolkit) -> tuple[list[str], list[str]]:
    """Those of the wanted that nvcc knows; and of ARCHITECTURES the ones left out."""
    wanted = wanted_architectures()
    built = [name for name in wanted if toolkit.knows(name)]
    if not built:
        raise NotBuilt(f"nvcc {toolkit.version} knows none of {', '.join(wanted)}")
    return built, [name for name in ARCHITECTURES if name not in built]


def codes(architectures: list[str]) -> list[str]:
    """What a library for `architectures` holds: sm_80, compute_80, and so on; PTX last."""
    held = re.findall(r"(?:sm|compute)_\d+", " ".join(ARCHITECTURES[a].partition("code=")[2] for a in architectures))
    return sorted(held, key=lambda code: code.startswith("compute"))


def lacks(record: dict[str, Any]) -> str:
    """What a library with this record lacks of what is wanted, or nothing."""
    missing = [code for code in codes(wanted_architectures()) if code not in record.get("architectures", ())]
    return f"it is not built for {', '.join(missing)}" if missing else ""


def _device_flags(root: Path, torch: Torch, architectures: list[str]) -> tuple[str, ...]:
    host = (*building.FLAGS, *building.prefix_maps(root, torch))
    return (
        # Architectures side by side, on all cores; --split-compile takes longer here, and grows the code.
        *("-O3", "-std=c++17", "--threads", "0", "-Xptxas", "-v", building.TARGET),
        *(word for name in architectures for word in ("-gencode", ARCHITECTURES[name])),
        *(word for flag in host for word in ("-Xcompiler", flag)),
        *("-isystem", str(torch.folder / "include")),
    )


def _link_flags(torch: Torch, toolkit: Toolkit) -> tuple[str, ...]:
    # libtorch by its name even though nothing of it is called: in a torch with CUDA it brings libtorch_cuda, where the
    # loader then finds what the binding declares weak, for this library is linked to a torch that may not have it.
    torch_cuda = ("-Wl,--no-as-needed", f"-L{torch.folder / 'lib'}", "-ltorch")
    runtime = (*toolkit.libraries, "-lcudart_static", "-ldl", "-lrt", "-Wl,--exclude-libs,ALL", "-Wl,--discard-all")
    return (*torch_cuda, *building.link_flags(LIBRARY, torch), *runtime)


def units(root: Path, compiler: Compiler, torch: Torch, toolkit: Toolkit) -> building.Units:
    """What the C++ compiler compiles, and how."""
    host = (
        *building.host_flags(root, torch, compiler),
        *("-O3", *(word for include in toolkit.includes for word in ("-isystem", include))),
    )
    return dict.fromkeys(sorted((root / "csrc" / "cuda").glob("*.cpp")), host)


def ninja_file(root: Path, compiler: Compiler, torch: Torch, toolkit: Toolkit, architectures: list[str]) -> str:
    """The text of build.ninja."""
    folder = root / "csrc" / "cuda"
    compiled = units(root, compiler, torch, toolkit)
    lines = [
        *building.compile_lines(compiler, compiled),
        f"nvcc = {building.quoted(toolkit.command)}",
        "rule device",
        # What ptxas says of each kernel is kept; of the rest, only warnings and errors are shown.
        f"  command = $nvcc -MD -MF $out.d -MT $out {building.quoted(_device_flags(root, torch, architectures))}"
        " -c $in -o $out > $said 2>&1 && { grep -iw warning $said || true; } || { cat $said; exit 1; }",
        *building.COMPILE,
        "rule link",
        "  command = $cxx -shared -pthread $in -o $out " + building.quoted(_link_flags(torch, toolkit)),
    ]
    # nvcc writes a source's name into the library as it was given: a relative one tells nothing of this machine.
    relative = Path(os.path.relpath(folder, root / "build" / "cuda"))
    kernels = sorted(folder.glob("*.cu"))
    for source in kernels:
        said = building.path(f"{source.stem}.ptxas.txt")
        lines += [f"build {building.object_of(source)} | {said}: device {building.path(relative / source.name)}"]
        lines += [f"  said = {said}"]
    objects = map(building.object_of, sorted([*kernels, *compiled]))
    return "\n".join([*lines, f"build {LIBRARY}: link {' '.join(objects)}", ""])


def compile_library(root: Path, sanitize: bool) -> tuple[Path, dict[str, Any]]:
    """The library, in build/cuda with its objects and what ptxas says (NAME.ptxas.txt), and what is recorded of it.

    Raises NotBuilt.
    """
    recorded = building.hashes(root, "cuda")
    if sanitize:
        raise NotBuilt("sanitizers are for the CPU library only")
    if sys.platform != "linux":
        raise NotBuilt(f"there is no CUDA build for {sys.platform}")
    if not any((root / "csrc" / "cuda").glob("*.cu")):
        raise NotBuilt("csrc/cuda has no sources")
    # torch's headers are the same with and without CUDA, so any torch will do.
    compiler, torch = building.find_compiler(), building.find_torch()
    toolkit = find_toolkit(compiler)
    architectures, left_out = choose_architectures(toolkit)
    work = root / "build" / "cuda"
    building.run_ninja(
        work, ninja_file(root, compiler, torch, toolkit, architectures), root, torch, f"{LOG} beside native.json"
    )
    facts = {
        "nvcc": toolkit.version,
        "compiler": compiler.version,
        "torch": torch.version,
        "architectures": codes(architectures),
        "left_out": [f"sm_{name}" for name in left_out],
    }
    return work / LIBRARY, {"built": True, "interface": building.INTERFACE, **facts, "sources": recorded}
