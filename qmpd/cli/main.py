"""Entry points of qmpd-ctl and qmpd-img: parse the command line, run the subcommand, word its errors."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from qmpd.errors import QmpdError
from qmpd.streams import complete_streams


def run(program: str, package: str, description: str, argv: Sequence[str] | None) -> int:
    """Run the subcommand that `argv` (default: the process's own) names and return its exit status.

    1 with one line on standard error for what failed, 130 for the interrupt key.
    """
    import asyncio

    from qemu.qmp import QMPError

    from qmpd.cli.subcommand import make_parser

    args = make_parser(program, package, description).parse_args(argv)
    try:
        status: int = asyncio.run(args.subcommand.run(args))
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (QmpdError, QMPError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        if isinstance(error, QmpdError) and error.hint:
            print(error.hint, file=sys.stderr)
        return 1


def ctl_main(argv: Sequence[str] | None = None) -> int:
    """Run qmpd-ctl."""
    complete_streams()
    return run("qmpd-ctl", "qmpd.cli.ctl", "Talk to a running qmpd, or to any QMP server.", argv)


def img_main(argv: Sequence[str] | None = None) -> int:
    """Run qmpd-img."""
    from qmpd.cli.img import _program

    return _program.main(argv)


def img_program() -> NoReturn:
    """Run qmpd-img as the whole process.

    Everything it had open is closed and flushed then, so the process ends at once: taking the interpreter apart, module
    by module, would take longer than many of its commands.
    """
    complete_streams()
    gc.set_threshold(20_000)  # what is imported stays: looking for rubbish in it again and again finds none
    try:
        status = img_main()
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        status = end.code or 0
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            status = status or 1
    os._exit(status)
