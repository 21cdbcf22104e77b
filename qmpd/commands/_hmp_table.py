"""The commands of the monitor for people: a table, and how a line finds its command.

`@hmp("stop|s", ...)` and `@info("block", ...)` declare one; the handler is called with the context
and the parsed arguments and returns what is printed. Texts: monitor/hmp.c of QEMU.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from qmpd.commands import _hmp_arguments as arguments
from qmpd.context import Context
from qmpd.errors import QmpdError

Handler = Callable[[Context, dict[str, Any]], Awaitable[str]]
_SPACE = " \t\n\v\f\r"


@dataclass(frozen=True, slots=True)
class Entry:
    """One command.

    name   with its short forms, "stop|s"      spec    see `_hmp_arguments`
    shown  its arguments, for help             help    what it does, for help
    """

    name: str
    spec: str
    shown: str
    help: str
    handler: Handler | None

    def is_called(self, word: str) -> bool:
        """Say whether `word` is one of its names."""
        return word in self.name.split("|")


COMMANDS: list[Entry] = []
INFO: list[Entry] = []
_SUBTABLES = {"info": INFO}


def hmp(name: str, spec: str = "", shown: str = "", help: str = "") -> Callable[[Handler], Handler]:
    """Declare a command."""
    return _declare(COMMANDS, name, spec, shown, help)


def info(name: str, spec: str = "", shown: str = "", help: str = "") -> Callable[[Handler], Handler]:
    """Declare a subcommand of `info`."""
    return _declare(INFO, name, spec, shown, help)


def _declare(table: list[Entry], name: str, spec: str, shown: str, help: str) -> Callable[[Handler], Handler]:
    def declare(handler: Handler) -> Handler:
        table.append(Entry(name, spec, shown, help, handler))
        return handler

    return declare


async def run(ctx: Context, line: str) -> str:
    """Carry out one line and return what is printed, lines ending in a newline."""
    entry, rest, words = _find(line.lstrip(_SPACE))
    if entry is None:
        return f"unknown command: '{words}'\n" if words else ""
    if entry.handler is None:
        return describe(f"{words} ", "")
    try:
        values = arguments.parse(entry.name, entry.spec, rest)
    except arguments.Usage as problem:
        complaint = f"{problem}\n" if str(problem) else ""
        return f'{complaint}Try "help {words}" for more information\n'
    try:
        return await entry.handler(ctx, values)
    except QmpdError as error:
        return f"Error: {error}\n"


def _find(line: str) -> tuple[Entry | None, str, str]:
    """Return the entry that a line calls, the rest of the line, and the words that named it."""
    table: list[Entry] | None = COMMANDS
    rest, entry, words = line, None, ""
    while table is not None and rest:
        end = next((at for at, char in enumerate(rest) if char in _SPACE or char == "/"), len(rest))
        word, rest = rest[:end], rest[end:]
        words = f"{words} {word}" if words and word else words or word
        entry = next((one for one in table if one.is_called(word)), None)
        if entry is None:
            return None, rest, words
        rest = rest.lstrip(_SPACE)
        table = _SUBTABLES.get(entry.name)
    return entry, rest, words


def describe(prefix: str, name: str) -> str:
    """Return the help on one command or, with an empty name, on all of a table."""
    table = INFO if prefix == "info " else COMMANDS
    chosen = [one for one in table if not name or one.is_called(name)]
    return "".join(
        f"{prefix}{one.name} {one.shown} -- {one.help}\n" for one in sorted(chosen, key=lambda one: one.name)
    )


def help_text(words: str) -> str:
    """Return what `help WORDS` prints."""
    if not words:
        return describe("", "")
    entry, _, named = _find(words)
    if entry is None:
        return f"unknown command: '{named}'\n"
    if named == "info":
        return describe("info ", "")
    prefix, _, last = named.rpartition(" ")
    return describe(f"{prefix} " if prefix else "", last)


COMMANDS.append(Entry("info", "", "[subcommand]", "show what is going on", None))
