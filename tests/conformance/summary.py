"""Prints the numbers of the conformance run at its end, also when it was spread over processes."""

from __future__ import annotations

import json

import pytest

from tests.conformance.runner import numbers

PROPERTY = "conformance"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Sum up what the scenario tests reported."""
    results = []
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", []):
                if name == PROPERTY and report.when == "call":
                    results.append(json.loads(value))
    if results:
        terminalreporter.section("conformance")
        terminalreporter.write_line(f"{len(results)} scenarios; steps: {numbers(results)}")
