"""A pytest plugin: every test's outcome as a line of JSON in the file that PYPRUNE_OUTCOMES names, as soon as known.

PYPRUNE_SHARE, two numbers `i of`, leaves of all tests every `of`-th, from the i-th on: so several processes share them.
"""

import json
import os
from pathlib import Path


def _say(**facts):
    with Path(os.environ["PYPRUNE_OUTCOMES"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")


class _Outcomes:
    """Tells every report."""

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            message = "" if report.outcome == "passed" else str(report.longrepr)[-600:]
            _say(id=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), message=message)

    def pytest_collectreport(self, report):
        if report.outcome == "failed":
            _say(id=report.nodeid, outcome="not collected", seconds=0.0, message=str(report.longrepr)[-600:])


def pytest_collection_modifyitems(config, items):
    first, of = map(int, os.environ.get("PYPRUNE_SHARE", "0 1").split())
    left_out = [item for i, item in enumerate(items) if i % of != first]
    config.hook.pytest_deselected(items=left_out)
    items[:] = items[first::of]


def pytest_configure(config):
    if os.environ.get("PYPRUNE_OUTCOMES"):
        config.pluginmanager.register(_Outcomes(), "pyprune-outcomes")
