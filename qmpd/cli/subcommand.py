"""What a subcommand is, and how a program finds its own: by the modules of one package."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

from qmpd.version import VERSION


class Subcommand(Protocol):
    """A class with these two static methods, declared with `@subcommand`."""

    @staticmethod
    def arguments(parser: argparse.ArgumentParser) -> None:
        """Declare options and operands."""

    @staticmethod
    async def run(args: argparse.Namespace) -> int:
        """Do the work and return the exit status."""


class Entry(NamedTuple):
    """A declared subcommand: its name, the line that `--help` shows, and its class."""

    name: str
    help: str
    cls: type[Subcommand]


T = TypeVar("T", bound=type[Subcommand])
_entries: dict[tuple[str, str], Entry] = {}


def subcommand(name: str, *, help: str) -> Callable[[T], T]:  # noqa: A002 - argparse's own word
    """Declare the decorated class as subcommand `name` of the program whose package its module lies in."""

    def declare(cls: T) -> T:
        package = cls.__module__.rpartition(".")[0]
        if (package, name) in _entries:
            raise RuntimeError(f"subcommand '{name}' is declared twice in {package}")
        _entries[package, name] = Entry(name, help, cls)
        return cls

    return declare


def discover(package: str) -> list[Entry]:
    """Import the modules of a package, helpers (`_name`) left out, and return their subcommands by name."""
    root = importlib.import_module(package)
    for info in pkgutil.iter_modules(root.__path__):
        if not info.name.startswith("_"):
            importlib.import_module(f"{package}.{info.name}")
    return sorted((entry for (owner, _), entry in _entries.items() if owner == package), key=lambda one: one.name)


def make_parser(program: str, package: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of a program; the chosen class is the attribute `subcommand` of its result."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--version", action="version", version=f"{program} {VERSION}")
    parsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for entry in discover(package):
        sub = parsers.add_parser(entry.name, help=entry.help, description=entry.cls.__doc__)
        entry.cls.arguments(sub)
        sub.set_defaults(subcommand=entry.cls)
    return parser
