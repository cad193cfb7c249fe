"""`python3 bench/gpu.py [--quick]`: what `python3 -m bench.gpu.job` does, which says more."""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    runpy.run_module("bench.gpu.job", run_name="__main__", alter_sys=True)
