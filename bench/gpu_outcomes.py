"""A pytest plugin: every test's outcome as a line of JSON in the file that PYPRUNE_OUTCOMES names, as soon as known."""

import json
import os
from pathlib import Path


def _say(**facts):
    with Path(os.environ["PYPRUNE_OUTCOMES"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")


class _Outcomes:
    """Registered where all reports arrive: in a run by several processes that is the one which gives out the tests."""

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            message = "" if report.outcome == "passed" else str(report.longrepr)[-600:]
            _say(id=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), message=message)

    def pytest_collectreport(self, report):
        if report.outcome == "failed":
            _say(id=report.nodeid, outcome="not collected", seconds=0.0, message=str(report.longrepr)[-600:])


def pytest_configure(config):
    if os.environ.get("PYPRUNE_OUTCOMES") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Outcomes(), "pyprune-outcomes")
