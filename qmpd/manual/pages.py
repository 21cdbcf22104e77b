"""What the programs take, read from the same declarations that `--help` prints."""

from __future__ import annotations

import argparse
import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from qmpd.cli import subcommand
from qmpd.daemon import options
from qmpd.qapi import registry
from qmpd.version import VERSION

__all__ = ["Argument", "Kind", "Page", "Subpage", "collect"]


class Kind(enum.Enum):
    """What a shell may offer as the value of an option."""

    NONE = "nothing"
    FILE = "a path"
    FORMAT = "an image format"
    CHOICE = "one of a list"
    TEXT = "text only the user knows"


@dataclass(frozen=True, slots=True)
class Argument:
    """An option (or, without flags, an operand).

    flags     with their dashes, short one first        value   its value as the help shows it, "" if none
    help      one line                                  choices what it may be, of Kind.CHOICE
    """

    flags: tuple[str, ...]
    value: str
    help: str
    kind: Kind
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Subpage:
    """A subcommand; `name` has a space where one subcommand has others below it."""

    name: str
    summary: str
    text: str
    usage: str
    arguments: tuple[Argument, ...]
    operands: tuple[Kind, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """A program.

    section    of the manual                      related  other pages, "name(section)"
    arguments  of the program itself              statuses exit statuses and what they mean
    examples   what it is for, and the command
    """

    name: str
    section: int
    summary: str
    text: str
    related: tuple[str, ...]
    statuses: tuple[tuple[str, str], ...]
    examples: tuple[tuple[str, str], ...]
    arguments: tuple[Argument, ...] = ()
    subpages: tuple[Subpage, ...] = field(default=())


_FILES = re.compile(r"\bFILE\b|\bPATH\b|\bFILENAME\b|\bIMAGE\b|\bDIR\b|\bBACKUP\b|\bDOCUMENT\b|\bSOCKET\b|\bHEADER\b")
_HELP = Argument(("-h", "--help"), "", "show this help", Kind.NONE)
_VERSION = Argument(("--version",), "", "show the version", Kind.NONE)
_DAEMON_STATUS = (("0", "ended by quit, or by a signal to terminate"), ("1", "the command line or the start failed"))
_DAEMONS = {
    "qmpd": (
        "a QMP daemon with QEMU's block layer and a modelled machine",
        "Speaks QMP over UNIX sockets as QEMU's system emulator does: secrets, a graph of block nodes that reads and "
        "writes actual images, disks plugged and unplugged, jobs and exports. No guest runs. Options are applied in "
        "QEMU's order of creation: objects, character devices, nodes, monitors, devices.",
        ("qmpd-storage-daemon(8)", "qmpd-img(1)", "qmpd-ctl(1)"),
        (
            (
                "A machine for one client; a plugged disk gets a socket of its own in DIR",
                "qmpd -qmp unix:/run/qmpd.sock,server=on,wait=off -guest plug=nbd:DIR",
            ),
        ),
    ),
    "qmpd-storage-daemon": (
        "a QMP daemon that serves block nodes, without a machine",
        "Speaks QMP as QEMU's storage daemon does. Options are applied strictly in the order given.",
        ("qmpd(8)", "qmpd-img(1)", "qmpd-ctl(1)"),
        (
            (
                "A LUKS volume whose header is a file of its own, served by NBD",
                "qmpd-storage-daemon --object secret,id=s,file=/run/key \\\n"
                "  --blockdev file,node-name=h,filename=header.img \\\n"
                "  --blockdev file,node-name=p,filename=payload.img \\\n"
                "  --blockdev luks,node-name=disk,file=p,header=h,key-secret=s \\\n"
                "  --nbd-server addr.type=unix,addr.path=/run/nbd.sock \\\n"
                "  --export nbd,id=e,node-name=disk,writable=on",
            ),
        ),
    ),
}
_IMG_STATUS = (
    ("0", "done; for compare: the images show the same"),
    ("1", "failed; for compare: they differ; for check: the check itself failed"),
    ("2", "check: errors were found; compare: an image could not be opened"),
    ("3", "check: leaked clusters were found; compare: a map could not be read"),
    ("4", "compare: reading failed"),
    ("63", "check: the format has no check"),
)


def collect() -> list[Page]:
    """Return the pages of all programs. Imports all plug-ins and subcommands."""
    pages = []
    for name, (summary, text, related, examples) in _DAEMONS.items():
        table, dashes = (options.SYSTEM, "-") if name == "qmpd" else (options.STORAGE, "--")
        given = tuple(_daemon_option(option, dashes) for option in table)
        pages.append(Page(name, 8, summary, text, related, _DAEMON_STATUS, examples, given))
    pages.append(
        Page(
            "qmpd-img",
            1,
            "work on disk images",
            "Makes, shows, checks, converts and changes disk images with the options and the output of qemu-img, LUKS "
            "volumes with a header of their own among them.",
            ("qmpd(8)", "qmpd-ctl(1)", "qemu-img(1)", "cryptsetup(8)"),
            _IMG_STATUS,
            (
                (
                    "A LUKS header without a payload",
                    "qmpd-img create --object secret,id=s,file=key \\\n"
                    "  -f luks -o key-secret=s,detached-header=true header.img",
                ),
            ),
            (_HELP, _VERSION),
            tuple(_subpages("qmpd-img", "qmpd.cli.img")),
        )
    )
    pages.append(
        Page(
            "qmpd-ctl",
            1,
            "talk to a running qmpd, or to any QMP server",
            "Sends commands, shows events and draws the graph of block nodes.",
            ("qmpd(8)", "qmpd-img(1)"),
            (("0", "done"), ("1", "failed")),
            (("The node graph of a daemon, as text", "qmpd-ctl graph /run/qmpd.sock"),),
            (_HELP, _VERSION),
            tuple(_subpages("qmpd-ctl", "qmpd.cli.ctl")),
        )
    )
    return pages


def image_formats() -> tuple[str, ...]:
    """Return the names of the formats that can be made, and so be named after -f and -O."""
    return tuple(sorted(set(registry.discover().creators) - {"file"} | {"raw"}))


def version() -> str:
    """Return what the pages say of their origin."""
    return f"qmpd {VERSION}"


def _daemon_option(option: options.Option, dashes: str) -> Argument:
    flags = (f"-{option.short}",) if option.short else ()
    return Argument((*flags, dashes + option.name), option.value, option.help, _kind(option.value))


def _kind(value: str) -> Kind:
    if not value:
        return Kind.NONE
    if value == "FMT":
        return Kind.FORMAT
    return Kind.FILE if _FILES.search(value) and "=" not in value else Kind.TEXT


def _subpages(program: str, package: str) -> Iterator[Subpage]:
    for entry in subcommand.discover(package):
        parser = argparse.ArgumentParser(prog=f"{program} {entry.name}", description=entry.cls.__doc__)
        entry.cls.arguments(parser)
        yield from _walk(program, entry.name, entry.help, parser)


def _walk(program: str, name: str, summary: str, parser: argparse.ArgumentParser) -> Iterator[Subpage]:
    given, operands = [], []
    shown: list[str] = []
    # argparse has no public way to ask what was declared.
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for word, below in action.choices.items():
                yield from _walk(program, f"{name} {word}", helps.get(word, ""), below)
            if action.choices:
                return
        elif action.option_strings:
            if action.help is not argparse.SUPPRESS:
                given.append(_argument(action))
        else:
            text = _operand_text(action)
            shown.append(text)
            operands += [_kind(word) for word in re.findall(r"[A-Z]+", text)]
    text = " ".join((parser.description or "").split())
    usage = " ".join([program, name, "[OPTION...]", *shown])
    yield Subpage(name, summary, text, usage, tuple(given), tuple(operands))


def _operand_text(action: argparse.Action) -> str:
    """Return an operand as a synopsis shows it. Operands declared together have their brackets already."""
    text = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if action.help is argparse.SUPPRESS:
        return text
    return {"?": f"[{text}]", "*": f"[{text}...]", "+": f"{text}..."}.get(str(action.nargs), text)


def _argument(action: argparse.Action) -> Argument:
    value = ""
    if action.nargs != 0:
        metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        value = metavar if action.choices is None else "|".join(map(str, action.choices))
    words = value.split("|")
    closed = len(words) > 1 and all(re.fullmatch(r"[a-z][a-z0-9-]*", word) for word in words)
    kind = Kind.CHOICE if closed else _kind(value)
    text = " ".join((action.help or "").split())
    return Argument(tuple(action.option_strings), value, text, kind, tuple(words) if closed else ())
