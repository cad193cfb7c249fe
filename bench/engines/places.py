"""Where `make engines` puts both engines, and how their processes are called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ENGINES = ROOT / "build" / "engines"
VLLM_PYTHON = ENGINES / "vllm" / "bin" / "python"
LLAMA_BIN = ENGINES / "llama" / "bin"
LLAMA_PYTHON = ENGINES / "llama-python"
ONNX_PYTHON = ENGINES / "onnx-python"

# For a process of this Python that is to find ONNX Runtime, llama-cpp-python and the library that was built for it.
LLAMA_ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(LLAMA_PYTHON), str(ONNX_PYTHON)]),
    "LLAMA_CPP_LIB_PATH": str(LLAMA_BIN),
}


_VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # Built for the torch of this package's environment, which is vLLM's too.
    "PYPRUNE_CPU_LIBRARY": str(ROOT / "pyprune" / "libpyprune_cpu.so"),
}


def _ask(python: Path | str, worker: str, request: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """Have a worker answer a request in a process of its own.

    Raises:
        RuntimeError: with the end of what it wrote, when it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked, out = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request))
        command = [python, Path(__file__).with_name(worker), asked, out]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
        if done.returncode or not out.is_file():
            asked_for = request.get("model") or [one["model"] for one in request["models"]]
            raise RuntimeError(f"{worker} failed on {asked_for}:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
        answer: dict[str, Any] = json.loads(out.read_text())
        return answer


def vllm_environment() -> dict[str, str]:
    """Of a process that runs vLLM: this one's, without its paths of modules."""
    return {**{key: value for key, value in os.environ.items() if key != "PYTHONPATH"}, **_VLLM_ENVIRONMENT}


def ask_vllm(request: dict[str, Any], **environment: str) -> dict[str, Any]:
    """Have `vllm_worker` answer a request, in vLLM's environment and what is added to it."""
    return _ask(VLLM_PYTHON, "vllm_worker.py", request, {**vllm_environment(), **environment})


def time_vllm(request: dict[str, Any]) -> dict[str, Any]:
    """Have `vllm_speed_worker` answer a request, in vLLM's environment."""
    return _ask(VLLM_PYTHON, "vllm_speed_worker.py", request, vllm_environment())


def ask_llama(request: dict[str, Any]) -> dict[str, Any]:
    """Have `llama_worker` answer a request."""
    return _ask(sys.executable, "llama_worker.py", request, {**os.environ, **LLAMA_ENVIRONMENT})
