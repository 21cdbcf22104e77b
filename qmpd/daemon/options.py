"""The two programs' option tables, and how their words are read.

`qmpd` reads options as the system emulator does (one dash or two, the value always in the next
word); `qmpd-storage-daemon` as getopt_long does (`--name value`, `--name=value`, abbreviations, `-T`).
Both keep the words as written: errors that come later name them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class UsageError(Exception):
    """A command line that cannot be read; `str()` is the line for standard error, without the program's name."""


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a program.

    name   without dashes        value   what its value is called in the help, "" if it takes none
    help   one line              short   the one-letter form of the storage daemon, "" if none
    """

    name: str
    value: str
    help: str
    short: str = ""


@dataclass(frozen=True, slots=True)
class Given:
    """One option as it was given.

    name    from the table; "" for a word that is no option (the word is then `value`)
    words   the words of the command line it took, as written
    """

    name: str
    value: str
    words: str


SYSTEM = (
    Option("h", "", "show this help"),
    Option("help", "", "show this help"),
    Option("version", "", "show the version"),
    Option("qmp", "unix:PATH[,server=on][,wait=off]", "a QMP monitor on a UNIX socket"),
    Option("chardev", "socket,id=ID,path=PATH|fd=N[,server=on][,wait=off]", "a socket for -mon"),
    Option("mon", "[chardev=]ID[,mode=control]", "a QMP monitor on a -chardev"),
    Option("object", "TYPE,id=ID[,...]", "an object, as object-add makes it"),
    Option("blockdev", "[driver=]DRIVER,node-name=NAME[,...]", "a block node, as blockdev-add makes it"),
    Option("device", "DRIVER[,id=ID][,drive=NODE][,...]", "a device, as device_add makes it"),
    Option("export", "[type=]TYPE,id=ID,node-name=NODE[,...]", "a block export, as block-export-add makes it"),
    Option("nbd-server", "addr.type=unix,addr.path=PATH[,...]", "the NBD server, as nbd-server-start makes it"),
    Option("luks-policy", "FILE|RULE=VALUE[,...]", "what LUKS volumes must be like"),
    Option("guest", "KEY=VALUE[,...]", "what the modelled guest does (may repeat)"),
    Option("S", "", "start in the state 'prelaunch'"),
    Option("machine", "[type=]NAME[,...]", "the modelled machine"),
    Option("M", "[type=]NAME[,...]", "the same as -machine"),
    Option("accel", "NAME[,...]", "remembered for query-kvm"),
    Option("cpu", "MODEL", "accepted; there is no guest"),
    Option("smp", "N[,...]", "number of modelled processors"),
    Option("m", "[size=]SIZE", "accepted; there is no guest memory"),
    Option("name", "[guest=]NAME[,...]", "the answer of query-name"),
    Option("uuid", "UUID", "the answer of query-uuid"),
    Option("nodefaults", "", "accepted; nothing is made by default"),
    Option("no-user-config", "", "accepted; there is no configuration file"),
    Option("nographic", "", "accepted; there is no display"),
    Option("display", "TYPE", "accepted; there is no display"),
    Option("rtc", "...", "accepted; there is no guest"),
    Option("boot", "...", "accepted; there is no guest"),
    Option("overcommit", "...", "accepted; there is no guest memory"),
    Option("global", "...", "accepted; there is no guest"),
    Option("no-shutdown", "", "stay alive, stopped, after a guest's poweroff"),
    Option("no-reboot", "", "end instead of a reset"),
    Option("pidfile", "FILE", "write the process id here"),
    Option("daemonize", "", "go to the background once the monitor listens"),
    Option("msg", "[timestamp=on]", "put the time before error messages"),
    Option("D", "FILE", "write the log here"),
    Option("T", "PATTERN", "turn on trace switches (monitor.*, qcow2.l2, ...)"),
    Option("trace", "PATTERN", "the same as -T"),
)

STORAGE = (
    Option("blockdev", "[driver=]DRIVER,node-name=NAME[,...]", "a block node, as blockdev-add makes it"),
    Option("chardev", "socket,id=ID,path=PATH|fd=N[,server=on][,wait=off]", "a socket for --monitor"),
    Option("daemonize", "", "go to the background once everything is there"),
    Option("export", "[type=]TYPE,id=ID,node-name=NODE[,...]", "a block export, as block-export-add makes it"),
    Option("help", "", "show this help", short="h"),
    Option("luks-policy", "FILE|RULE=VALUE[,...]", "what LUKS volumes must be like"),
    Option("monitor", "[chardev=]ID[,mode=control][,pretty=on|off]", "a QMP monitor on a --chardev"),
    Option("nbd-server", "addr.type=unix,addr.path=PATH[,...]", "the NBD server, as nbd-server-start makes it"),
    Option("object", "TYPE,id=ID[,...]", "an object, as object-add makes it"),
    Option("pidfile", "FILE", "write the process id here"),
    Option("trace", "PATTERN", "turn on trace switches (monitor.*, qcow2.l2, ...)", short="T"),
    Option("version", "", "show the version", short="V"),
)


def read_system(words: Sequence[str], table: Sequence[Option] = SYSTEM) -> list[Given]:
    """Read the words as the system emulator does. Raises UsageError."""
    options = {option.name: option for option in table}
    given: list[Given] = []
    rest = iter(words)
    for word in rest:
        if not word.startswith("-"):
            given.append(Given("", word, word))
            continue
        option = options.get(word[2:] if word.startswith("--") else word[1:])
        if option is None:
            raise UsageError(f"{word}: invalid option")
        if not option.value:
            given.append(Given(option.name, "", word))
            continue
        value = next(rest, None)
        if value is None:
            raise UsageError(f"{word}: requires an argument")
        given.append(Given(option.name, value, f"{word} {value}"))
    return given


def read_storage(words: Sequence[str], table: Sequence[Option] = STORAGE) -> list[Given]:
    """Read the words as getopt_long does. Raises UsageError."""
    long = {option.name: option for option in table}
    short = {option.short: option for option in table if option.short}
    given: list[Given] = []
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if word == "--":
            given.extend(Given("", plain, plain) for plain in words[at:])
            break
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            option = _long(name, word, long)
            text = word
            if not option.value:
                if equals:
                    raise UsageError(f"option '--{option.name}' doesn't allow an argument")
            elif not equals:
                if at == len(words):
                    raise UsageError(f"option '--{option.name}' requires an argument")
                value = words[at]
                text = f"{word} {value}"
                at += 1
            given.append(Given(option.name, value, text))
        elif word.startswith("-") and len(word) > 1:
            at = _letters(word, words, at, short, given)
        else:
            given.append(Given("", word, word))
    return given


def _long(name: str, word: str, long: Mapping[str, Option]) -> Option:
    if name in long:
        return long[name]
    matches = [option for full, option in long.items() if full.startswith(name)]
    if not matches:
        raise UsageError(f"unrecognized option '{word}'")
    if len(matches) > 1:
        possible = " ".join(f"'--{option.name}'" for option in matches)
        raise UsageError(f"option '{word}' is ambiguous; possibilities: {possible}")
    return matches[0]


def _letters(word: str, words: Sequence[str], at: int, short: Mapping[str, Option], given: list[Given]) -> int:
    """Read one word of one-letter options; return the index of the next word."""
    for position, letter in enumerate(word[1:], 1):
        option = short.get(letter)
        if option is None:
            raise UsageError(f"invalid option -- '{letter}'")
        if not option.value:
            given.append(Given(option.name, "", word))
            continue
        if position + 1 < len(word):
            given.append(Given(option.name, word[position + 1 :], word))
            return at
        if at == len(words):
            raise UsageError(f"option requires an argument -- '{letter}'")
        given.append(Given(option.name, words[at], f"{word} {words[at]}"))
        return at + 1
    return at


def help_text(program: str, table: Sequence[Option], dashes: str) -> str:
    """Return what --help prints."""
    lines = [f"Usage: {program} [options]", ""]
    for option in table:
        head = f"  {dashes}{option.name}" + (f" {option.value}" if option.value else "")
        if option.short:
            head += f", -{option.short}"
        lines.append(head)
        lines.append(f"        {option.help}")
    return "\n".join(lines) + "\n"
