"""The two programs: `qmpd` and `qmpd-storage-daemon`.

`qmpd` stands for the system emulator: its options are sorted into QEMU's order of creation (objects,
character devices, nodes, monitors, devices). `qmpd-storage-daemon` applies its options strictly in
the order given. What else differs follows from the schema root each loads.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Callable, Sequence

from qmpd import trace
from qmpd.daemon import log, options, process
from qmpd.daemon.options import Given, UsageError
from qmpd.daemon.start import Done, Failure, Start
from qmpd.streams import complete_streams
from qmpd.version import QEMU_LEVEL, VERSION

_RECURSION = 4000
"""Frames Python may nest: values of 1024 levels pass through recursive code."""


def main() -> None:
    """Run `qmpd` with the arguments of the process."""
    sys.exit(_program("qmpd", sys.argv[1:], _prepare_system))


def storage_main() -> None:
    """Run `qmpd-storage-daemon` with the arguments of the process."""
    sys.exit(_program("qmpd-storage-daemon", sys.argv[1:], _prepare_storage))


def version_text(program: str) -> str:
    """Return what --version prints."""
    level = ".".join(str(part) for part in QEMU_LEVEL)
    return f"{program} version {VERSION} (compatible with QEMU {level})"


def _program(name: str, words: Sequence[str], prepare: Callable[[log.Complaints, Sequence[str]], Start]) -> int:
    complete_streams()
    complaints = log.Complaints(os.path.basename(sys.argv[0]) if not sys.argv[0].endswith(".py") else name)
    try:
        start = prepare(complaints, words)
    except UsageError as error:
        complaints.say(str(error))
        return 1
    except Done as done:
        print(done)
        return 0
    except Failure as failure:
        complaints.say(str(failure), words=failure.words, hint=failure.hint)
        return 1
    sys.setrecursionlimit(_RECURSION)
    background = process.Background(start.daemonize)
    try:
        log.set_up(name, start.log_path)
    except OSError as error:
        complaints.say(f"Error opening logfile {start.log_path}: {os.strerror(error.errno or 0)}")
        return 1
    process.harden()
    gc.disable()  # nothing that is loaded now goes away again: looking through it costs a tenth of the start
    from qmpd.daemon.startup import run

    return asyncio.run(run(name, start, background))


def _prepare_storage(complaints: log.Complaints, words: Sequence[str]) -> Start:
    given = options.read_storage(words)
    start = Start(complaints, [])
    rest: list[Given] = []
    for one in given:
        match one.name:
            case "help":
                raise Done(options.help_text(complaints.program, options.STORAGE, "--").rstrip("\n"))
            case "version":
                raise Done(version_text(complaints.program))
            case "daemonize":
                start.daemonize = True
            case "pidfile":
                start.pid_path = one.value
            case "trace":
                trace.enable(one.value)
            case _:
                rest.append(one)
    start.given = rest
    return start


def _prepare_system(complaints: log.Complaints, words: Sequence[str]) -> Start:
    given = options.read_system(words)
    start = Start(complaints, given)
    for one in given:
        match one.name:
            case "h" | "help":
                raise Done(options.help_text(complaints.program, options.SYSTEM, "-").rstrip("\n"))
            case "version":
                raise Done(version_text(complaints.program))
            case "daemonize":
                start.daemonize = True
            case "pidfile":
                start.pid_path = one.value
            case "D":
                start.log_path = one.value
            case "T" | "trace":
                trace.enable(one.value)
            case "":
                raise Failure("disk images are given with -blockdev and -device", words=one.words)
    return start
