"""Run the tests marked `engine`, where llama-cpp-python finds the library that was built for it."""

from __future__ import annotations

import os
import subprocess
import sys

from .places import LLAMA_ENVIRONMENT, ROOT

if __name__ == "__main__":
    command = [sys.executable, "-m", "pytest", "-q", "-m", "engine", "tests/test_engines.py", "tests/test_onnx.py"]
    sys.exit(subprocess.run(command, cwd=ROOT, env={**os.environ, **LLAMA_ENVIRONMENT}, check=False).returncode)
