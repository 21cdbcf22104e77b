"""Replay the recorded conversations against qmpd and sort the steps by what the project says of them.

    python -m tests.conformance.runner                        numbers for every scenario
    python -m tests.conformance.runner 'luks-*' device-scsi   these, with the differences of each step
    python -m tests.conformance.runner --later NAME...        print what later.toml would have to list

A step is one message sent and what came back; step 0 is the greeting. Three lists beside this file say
which steps need not equal the recording:

    differences.toml  on purpose; each names a heading of docs/differences.md and a text of the difference
    later.toml        what they need is not built yet: `"needs: AREA"`, or `"consequence of: step N"`
    open.toml         faults that are known and not yet mended; at most 3 % of the steps that count

A listed step that equals its recording is an error, too: the list is out of date.
"""

from __future__ import annotations

import argparse
import copy
import enum
import fnmatch
import importlib.util
import json
import re
import shlex
import sys
import tomllib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus"
SETTLE = 0.05
"""Seconds of silence that end a step; the recordings used 0.02, too little for a busy machine."""
LATER_TIMEOUT = 1.0
"""Seconds that a step is waited for which is not expected to work."""
OPEN_SHARE = 0.03
"""Share of the counted steps that open.toml may list."""


class Verdict(enum.Enum):
    """What became of one step."""

    PASSED = "passed"
    DIFFERENCE = "differs by design"
    LATER = "later"
    OPEN = "open fault"
    FAILED = "failed"
    OUTDATED = "listed, but passes"


@dataclass
class Outcome:
    """One step of one scenario, judged."""

    step: int
    name: str
    verdict: Verdict
    reason: str = ""
    diff: list[str] = field(default_factory=list)


@dataclass
class Result:
    """One scenario: its steps, and what the daemon's own log says against it."""

    scenario: str
    outcomes: list[Outcome]
    complaints: list[str]

    def count(self, verdict: Verdict) -> int:
        """Return how many steps ended so."""
        return sum(outcome.verdict is verdict for outcome in self.outcomes)

    @property
    def good(self) -> bool:
        """Say whether nothing here is unexpected."""
        return not (self.complaints or self.count(Verdict.FAILED) or self.count(Verdict.OUTDATED))

    def report(self) -> str:
        """Return the steps that speak against the scenario, with their differences."""
        lines = list(self.complaints)
        for outcome in self.outcomes:
            if outcome.verdict in (Verdict.FAILED, Verdict.OUTDATED):
                listed = f" ({outcome.reason})" if outcome.reason else ""
                lines.append(f"{self.scenario} step {outcome.step} '{outcome.name}': {outcome.verdict.value}{listed}")
                lines += [f"    {line}" for line in outcome.diff[:12]]
                if len(outcome.diff) > 12:
                    lines.append(f"    ... and {len(outcome.diff) - 12} more")
        return "\n".join(lines)


def load_replay() -> ModuleType:
    """Import the corpus's own tool."""
    spec = importlib.util.spec_from_file_location("qmp_replay", CORPUS / "replay.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.setrecursionlimit(max(sys.getrecursionlimit(), module.RECURSION_LIMIT))
    module.DEFAULT_SETTLE = SETTLE
    return module


def scenario_paths() -> list[Path]:
    """Return every scenario of the corpus, by name."""
    return [path for path in sorted((CORPUS / "public").glob("*.json")) if not path.name.endswith(".expected.json")]


@dataclass(frozen=True)
class Listed:
    """The entry of a list for one step."""

    verdict: Verdict
    reason: str
    shows: str = ""


def read_lists(folder: Path = HERE) -> dict[tuple[str, int], Listed]:
    """Return the entries of the three lists by scenario and step.

    Raises ValueError for a step that is listed twice and for a reason of a wrong form.
    """
    entries: dict[tuple[str, int], Listed] = {}

    def add(scenario: str, step: int, entry: Listed) -> None:
        if (scenario, step) in entries:
            raise ValueError(f"{scenario} step {step} is listed twice")
        entries[scenario, step] = entry

    for file, verdict, form in (
        ("later.toml", Verdict.LATER, r"needs: \S.*|consequence of: step \d+"),
        ("open.toml", Verdict.OPEN, r"\S.*"),
    ):
        for scenario, reasons in tomllib.loads((folder / file).read_text()).items():
            for reason, steps in reasons.items():
                if not re.fullmatch(form, reason):
                    raise ValueError(f"{file}: {scenario}: '{reason}' is not of the form {form}")
                for step in steps:
                    add(scenario, step, Listed(verdict, reason))
    for row in tomllib.loads((folder / "differences.toml").read_text()).get("difference", []):
        for step in row["steps"]:
            add(row["scenario"], step, Listed(Verdict.DIFFERENCE, row["heading"], row["shows"]))
    return entries


def program(name: str) -> str:
    """Return the shell word of a console script of the environment that runs this."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise FileNotFoundError(f"{path}: install the project first (make does it)")
    return shlex.quote(str(path))


def forgiving_run(replay: ModuleType) -> Any:
    """Return the replayer's class for one run, made to go on when an action of its own fails.

    A step that closes an NBD client, say, fails then as one step, and the rest is still compared.
    """

    class ForgivingRun(replay.ScenarioRun):  # type: ignore[name-defined,misc]
        def _action(self, step: dict[str, Any], target: Any) -> Any:
            try:
                return super()._action(step, target)
            except (KeyError, OSError) as error:
                return {"observed": f"not done: {error!r}", "events": []}

    return ForgivingRun


def make_options(replay: ModuleType) -> Any:
    """Return the replayer's options with qmpd in the places of QEMU's programs."""
    options = replay.Options()
    storage = program("qmpd-storage-daemon")
    options.targets = {
        "system": f"{program('qmpd')} -machine pc -nodefaults -S -display none --guest unplug=reset"
        " -qmp unix:{socket},server=on,wait=off {args}",
        "storage-daemon": f"{storage} --chardev socket,id=qmp0,path={{socket}},server=on,wait=off"
        " --monitor chardev=qmp0 {args}",
    }
    options.cli_programs = {"storage-daemon": f"{storage} {{args}}", "qemu-img": f"{program('qmpd-img')} {{args}}"}
    return options


def watch_targets(replay: ModuleType) -> list[str]:
    """Make the replayer tell what the daemons did wrong outside of the conversation; returns the list it fills."""
    complaints: list[str] = []

    class WatchedTarget(replay.Target):  # type: ignore[name-defined,misc]
        def stop(self) -> None:
            process = self._process
            running = process is not None and process.poll() is None
            super().stop()
            log = self._log.read_text(errors="replace") if self._log.exists() else ""
            if running and process.returncode not in (0, -15):
                complaints.append(f"the daemon ended with status {process.returncode} when it was told to stop")
            if "Traceback" in log or "internal error" in log:
                complaints.append(f"the daemon's log:\n{log.strip()[-6000:]}")

    replay.Target = WatchedTarget  # type: ignore[attr-defined]
    return complaints


def run(path: Path, entries: dict[tuple[str, int], Listed]) -> Result:
    """Replay one scenario and judge its steps."""
    replay = load_replay()
    complaints = watch_targets(replay)
    scenario = json.loads(path.read_text())
    expected = json.loads(replay.recording_path(path).read_text())
    name = scenario["name"]
    played = copy.deepcopy(scenario)
    for index, step in enumerate(played["steps"], 1):
        listed = entries.get((name, index))
        if listed is not None and listed.verdict is not Verdict.DIFFERENCE:
            step["timeout"] = min(LATER_TIMEOUT, step.get("timeout", LATER_TIMEOUT))
    try:
        transcript = forgiving_run(replay)(played, make_options(replay)).run()
    except (replay.ScenarioError, OSError) as error:
        transcript = {"steps": []}
        # The greeting may be listed: then it is known that the daemon does not take the scenario's options.
        if (name, 0) not in entries:
            complaints.append(f"{name} could not run: {error}")
    outcomes = []
    for report in replay.compare(scenario, expected, transcript, "exact"):
        listed = entries.get((name, report.index))
        outcomes.append(judge(report.index, report.name, report.diff, listed))
    known = {outcome.step for outcome in outcomes}
    complaints += [f"{name} has no step {step}" for scenario, step in entries if scenario == name and step not in known]
    return Result(name, outcomes, complaints)


def judge(step: int, name: str, diff: list[str], listed: Listed | None) -> Outcome:
    """Return the outcome of a step from its differences and its entry in the lists."""
    if listed is None:
        return Outcome(step, name, Verdict.FAILED if diff else Verdict.PASSED, diff=diff)
    if not diff:
        return Outcome(step, name, Verdict.OUTDATED, listed.reason)
    if listed.verdict is Verdict.DIFFERENCE and not any(listed.shows in line for line in diff):
        return Outcome(step, name, Verdict.FAILED, f"differs, but not by '{listed.shows}'", diff)
    return Outcome(step, name, listed.verdict, listed.reason, diff)


def numbers(results: list[dict[str, int]]) -> str:
    """Return the line that sums up the given counts by verdict name."""
    total: Counter[str] = Counter()
    for counts in results:
        total.update(counts)
    return ", ".join(f"{verdict.value} {total[verdict.name]}" for verdict in Verdict)


def counts(result: Result) -> dict[str, int]:
    """Return the number of steps by name of verdict, those that are none left out."""
    return dict(Counter(outcome.verdict.name for outcome in result.outcomes))


def main() -> int:
    """Run scenarios by hand."""
    parser = argparse.ArgumentParser(description="Replay the conformance corpus against qmpd.")
    parser.add_argument("--later", action="store_true", help="print the failed steps as later.toml lists them")
    parser.add_argument("scenarios", nargs="*", metavar="GLOB")
    args = parser.parse_args()
    entries = read_lists()
    results = []
    for path in scenario_paths():
        if args.scenarios and not any(fnmatch.fnmatch(path.stem, pattern) for pattern in args.scenarios):
            continue
        result = run(path, entries)
        results.append(result)
        if args.later:
            failed = [outcome for outcome in result.outcomes if outcome.verdict is Verdict.FAILED]
            print(f"[{result.scenario}]\n" + "".join(f"# {one.step} {one.name}: {one.diff[0]}\n" for one in failed))
            continue
        print(f"{result.scenario}: {numbers([counts(result)])}", flush=True)
        if args.scenarios:
            print(result.report())
    print(f"all steps: {numbers([counts(result) for result in results])}")
    return 0 if all(result.good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
