"""Man pages, in the classic man macros that every reader of manuals knows (groff_man(7))."""

from __future__ import annotations

from qmpd.manual.pages import Argument, Page, Subpage, version

__all__ = ["render"]


def render(page: Page) -> str:
    """Return the source of a page."""
    lines = [
        '.\\" Written from the declarations that --help shows: python -m qmpd.manual',
        f'.TH {page.name.upper()} {page.section} "" "{version()}" "qmpd"',
        ".SH NAME",
        f"{_plain(page.name)} \\- {_plain(page.summary)}",
        ".SH SYNOPSIS",
    ]
    if page.subpages:
        for one in page.subpages:
            lines += [f".B {_plain(page.name)} {_plain(one.name)}", _plain(one.usage.split(one.name, 1)[1].strip())]
            lines.append(".br")
    else:
        lines += [f".B {_plain(page.name)}", "[OPTION...]"]
    lines += [".SH DESCRIPTION", _plain(page.text), ".SH OPTIONS"]
    for argument in page.arguments:
        lines += _option(argument)
    if page.subpages:
        lines.append(".SH COMMANDS")
        for one in page.subpages:
            lines += _command(one)
    lines.append(".SH EXIT STATUS")
    for status, meaning in page.statuses:
        lines += [".TP", f".B {status}", _plain(meaning)]
    lines.append(".SH EXAMPLES")
    for purpose, text in page.examples:
        lines += [".PP", _plain(purpose) + ":", ".PP", ".EX", *map(_plain, text.split("\n")), ".EE"]
    lines.append(".SH SEE ALSO")
    lines.append(",\n".join(f".BR {_plain(one.partition('(')[0])} ({one.partition('(')[2]}" for one in page.related))
    return "\n".join(lines).replace(",\n.BR", " ,\n.BR") + "\n"


def _command(one: Subpage) -> list[str]:
    lines = [f".SS {_plain(one.usage)}", _plain(one.text or one.summary)]
    for argument in one.arguments:
        if "--help" not in argument.flags:
            lines += _option(argument)
    return lines


def _option(argument: Argument) -> list[str]:
    flags = ", ".join(f"\\fB{_plain(flag)}\\fR" for flag in argument.flags)
    value = f" \\fI{_plain(argument.value)}\\fR" if argument.value else ""
    return [".TP", flags + value, _plain(argument.help)]


def _plain(text: str) -> str:
    """Return text that roff prints as it is: minus signs that can be copied, no request at the start of a line."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + text if text.startswith((".", "'")) else text
