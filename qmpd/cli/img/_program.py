"""The command line of qmpd-img: finds the subcommand, imports only that one, words what goes wrong.

Exit status 1 and the reference's texts for a bad command line; see each subcommand for the others.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from qmpd.cli import img
from qmpd.cli.img._common import PROGRAM, UsageError
from qmpd.cli.subcommand import Entry, Subcommand, discover
from qmpd.errors import QmpdError
from qmpd.version import VERSION

PACKAGE = "qmpd.cli.img"
_MISSING = re.compile(r"Could not open '(?P<path>[^']+)': No such file or directory")
_ARGUMENT = re.compile(r"argument (?P<names>[^:]+): expected .*")


class Parser(argparse.ArgumentParser):
    """An argparse parser that complains as getopt does."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong with the command line and end with status 1."""
        match = _ARGUMENT.fullmatch(message)
        text = message
        if match:
            option = match["names"].split("/")[0]
            text = f"option requires an argument -- '{option[1:]}'"
            if option.startswith("--"):
                text = f"option '{option}' requires an argument"
        elif message.startswith("unrecognized arguments: "):
            option = message.removeprefix("unrecognized arguments: ").split()[0]
            text = f"unrecognized option '{option}'" if option[:2] == "--" else f"invalid option -- '{option[1:2]}'"
        print(f"{self.prog}: {text}\nTry '{self.prog} --help' for more info", file=sys.stderr)
        raise SystemExit(1)


def names() -> list[str]:
    """Return the names of the subcommands, without importing them."""
    return sorted(info.name for info in pkgutil.iter_modules(img.__path__) if not info.name.startswith("_"))


def make_parser(name: str) -> tuple[Parser, type[Subcommand]]:
    """Import a subcommand; return its parser and its class."""
    module = importlib.import_module(f"{PACKAGE}.{name}")
    cls: type[Subcommand] = next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, "arguments")
    )
    parser = Parser(prog=f"{PROGRAM} {name}", description=cls.__doc__)
    cls.arguments(parser)
    return parser, cls


def print_help(entries: list[Entry]) -> None:
    """Print what the program can do."""
    print(f"usage: {PROGRAM} [-h] [--version] COMMAND [options]\n\nWork on disk images.\n\ncommands:")
    for entry in entries:
        print(f"  {entry.name:<10} {entry.help}")
    print(f"\n'{PROGRAM} COMMAND --help' tells the options of a command.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    while words and words[0] in ("-T", "--trace", "--luks-policy"):
        if words[0] == "--luks-policy" and (text := _refused_policy(words[1:2])):
            return _complain(text, "")
        del words[:2]
    if not words:
        return _complain("Not enough arguments", f"Try '{PROGRAM} --help' for more info")
    first = words.pop(0)
    if first in ("-V", "--version"):
        print(f"{PROGRAM} {VERSION}")
        raise SystemExit(0)
    if first in ("-h", "--help", "help"):
        print_help(discover(PACKAGE))
        return 0
    if first.startswith("-"):
        return _complain(f"unrecognized option '{first}'", f"Try '{PROGRAM} --help' for more info")
    if first not in names():
        return _complain(f"Command not found: {first}", f"Try '{PROGRAM} --help' for more info")
    parser, cls = make_parser(first)
    prepare = getattr(cls, "prepare", None)
    if prepare is not None:
        words = prepare(words)
    if not any(word == "-h" or word.startswith("--h") for word in words):
        parser.usage = ""  # else it is made each time, and what makes it takes longer to import than this module
    return run(cls, parser.parse_intermixed_args(words))


def _refused_policy(value: list[str]) -> str:
    """Set what LUKS volumes must be like; return why not, "" if it is set."""
    from qmpd.errors import CommandError
    from qmpd.luks.policy import parse_policy, set_policy

    try:
        set_policy(parse_policy(*value or [""]))
    except CommandError as error:
        return str(error)
    return ""


def run(cls: type[Subcommand], args: argparse.Namespace) -> int:
    """Run a subcommand; 1 (or what it says for failures) and its text on standard error when it fails."""
    import asyncio

    failure: int = getattr(cls, "failure", 1)
    try:
        status: int = asyncio.run(cls.run(args))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UsageError as error:
        return _complain(str(error), error.hint)
    except QmpdError as error:
        return _complain(str(error), error.hint or missing_file_hint(str(error)), status=failure)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        return _complain(f"{error.filename}: {reason}" if error.filename else reason, None, status=failure)


def _complain(text: str, hint: str | None, *, status: int = 1) -> int:
    sys.stdout.flush()
    print(f"{PROGRAM}: {text}", file=sys.stderr)
    if hint:
        print(hint, file=sys.stderr)
    return status


def missing_file_hint(text: str) -> str | None:
    """Return a line that names the file which may have been meant, where an error says that there is none."""
    missing = _MISSING.findall(text)
    if not missing:
        return None
    folder, wanted = os.path.split(missing[-1])
    stem = os.path.splitext(wanted)[0]
    try:
        with os.scandir(folder or ".") as entries:
            there = [entry.name for entry, _ in zip(entries, range(10_000), strict=False)]
    except OSError:
        return None
    likely = sorted(name for name in there if os.path.splitext(name)[0] == stem)
    if not likely:
        import difflib

        likely = difflib.get_close_matches(wanted, there, n=1, cutoff=0.8)
    if not likely:
        return None
    shown = " or ".join(f"'{os.path.join(folder, name)}'" for name in likely[:3])
    return f"There is no '{missing[-1]}', but there is {shown}."
