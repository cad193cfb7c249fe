"""What the tests of the GPU bench share: its modules, its scripts, and a worker that is made up."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parent.parent / "bench"
Load = Callable[[str], Any]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.syspath_prepend(str(BENCH.parent))  # as when a script is run
    return importlib.import_module


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "OUT")}
    return {**kept, **more}


def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    places = os.pathsep.join([str(BENCH / "checkout"), str(BENCH.parent)])
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment(PYTHONPATH=places, **more), capture_output=True, text=True)


WORKER = """
import json, sys, time
lines, plan = open(sys.argv[1], "a"), json.load(open(sys.argv[2]))
def say(**facts):
    lines.write(json.dumps(facts) + "\\n"); lines.flush()
for name in plan["cases"]:
    if time.time() + 1 > plan["until"]:
        say(left_out=name); continue
    for variant in ("dense", "compact:cuda"):
        if variant in plan["skip"].get(name, []): continue
        say(doing=[name, variant])
        if variant == "compact:cuda" and "opt" in name and "M 16" in name:
            if "lost" in sys.argv[3]: say(broken=[name, "an illegal address"], lost=True); sys.exit(3)
            if "hang" in sys.argv[3]: time.sleep(60)
    row = {"case": name, "kind": "few", "failed": {}, "variants": {}, "keep": 0.5, "tokens": 16, "model": "x"}
    say(row=row, done=name)
"""
