"""The recorded conversations of QEMU 10.0.2, replayed against qmpd's own programs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conformance import runner
from tests.conformance.runner import Listed, Verdict, judge

ENTRIES = runner.read_lists()
PATHS = runner.scenario_paths()
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_scenario(path: Path, record_property: Callable[[str, object], None]) -> None:
    result = runner.run(path, ENTRIES)
    record_property("conformance", json.dumps(runner.counts(result)))
    assert result.good, "\n" + result.report()


def recorded_steps() -> int:
    """Return the number of steps in all recordings, greetings included."""
    recordings = [json.loads(path.with_name(f"{path.stem}.expected.json").read_text()) for path in PATHS]
    return sum(len(recording["steps"]) + ("greeting" in recording) for recording in recordings)


def test_open_faults_are_few() -> None:
    by_verdict = [entry.verdict for entry in ENTRIES.values()]
    counted = recorded_steps() - by_verdict.count(Verdict.LATER) - by_verdict.count(Verdict.DIFFERENCE)
    assert by_verdict.count(Verdict.OPEN) <= runner.OPEN_SHARE * counted


def test_lists_name_scenarios_of_the_corpus() -> None:
    assert {scenario for scenario, _ in ENTRIES} <= {path.stem for path in PATHS}


def test_every_difference_has_its_heading() -> None:
    headings = set(re.findall(r"^#+ (.+)$", (ROOT / "docs" / "differences.md").read_text(), re.M))
    missing = {entry.reason for entry in ENTRIES.values() if entry.verdict is Verdict.DIFFERENCE} - headings
    assert not missing


def test_a_consequence_names_an_earlier_step_that_is_listed_as_well() -> None:
    for (scenario, step), entry in ENTRIES.items():
        match = re.fullmatch(r"consequence of: step (\d+)", entry.reason)
        if match is not None:
            cause = int(match[1])
            assert cause < step, f"{scenario} step {step}"
            assert ENTRIES.get((scenario, cause), entry).verdict is Verdict.LATER
            assert (scenario, cause) in ENTRIES, f"{scenario} step {step} names step {cause}, which is not listed"


def test_verdicts() -> None:
    later = Listed(Verdict.LATER, "needs: jobs")
    difference = Listed(Verdict.DIFFERENCE, "Heading", shows="expected 1, got 2")
    assert judge(1, "x", [], None).verdict is Verdict.PASSED
    assert judge(1, "x", ["/a: missing"], None).verdict is Verdict.FAILED
    assert judge(1, "x", ["/a: missing"], later).verdict is Verdict.LATER
    assert judge(1, "x", [], later).verdict is Verdict.OUTDATED
    assert judge(1, "x", ["/a: expected 1, got 2"], difference).verdict is Verdict.DIFFERENCE
    assert judge(1, "x", ["/a: expected 1, got 3"], difference).verdict is Verdict.FAILED


def test_a_step_listed_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "later.toml").write_text('[cli]\n"needs: jobs" = [3]\n"needs: NBD exports" = [3]\n')
    (tmp_path / "open.toml").write_text("")
    (tmp_path / "differences.toml").write_text("")
    with pytest.raises(ValueError, match="cli step 3 is listed twice"):
        runner.read_lists(tmp_path)


def test_a_reason_of_another_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "later.toml").write_text('[cli]\n"it fails" = [3]\n')
    with pytest.raises(ValueError, match="'it fails' is not of the form"):
        runner.read_lists(tmp_path)
