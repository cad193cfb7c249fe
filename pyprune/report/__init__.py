"""The report: one HTML file with what pruning cost, what it won and why, from the JSON that the verbs wrote.

It reads facts only: no model is loaded, nothing is measured, and what is not in the files is not in the report.
"""

from .page import Written, build, write

__all__ = ["Written", "build", "write"]
