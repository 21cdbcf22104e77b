"""File names that mean an NBD export, and back: `nbd://`, `nbd+tcp://`, `nbd+unix://` and the older `nbd:`.

Source: doc/uri.md of the Network Block Device project, narrowed and widened as QEMU's `nbd_parse_filename` does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

DEFAULT_PORT = "10809"
SCHEMES = ("nbd", "nbd+tcp", "nbd+unix")

_EXPORT_NAME = ":exportname="
_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})?")


class BadName(ValueError):
    """A file name that means no export; the text is QEMU's."""


def parse(name: str) -> dict[str, Any]:
    """Return `server` (a SocketAddress) and `export` for a file name. Raises BadName."""
    return _parse_uri(name) if "://" in name else _parse_legacy(name)


def _parse_uri(name: str) -> dict[str, Any]:
    scheme, _, rest = name.partition("://")
    if scheme not in SCHEMES:
        raise BadName("No valid URL specified")
    rest = rest.partition("#")[0]
    rest, question, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    export = _unescaped(path).lstrip("/") if slash else ""
    parameters = _parameters(query) if question else {}
    options: dict[str, Any] = {}
    if export:
        options["export"] = export
    if scheme == "nbd+unix":
        if authority or set(parameters) != {"socket"}:
            raise BadName("No valid URL specified")
        return options | {"server": {"type": "unix", "path": parameters["socket"]}}
    if parameters:
        raise BadName("No valid URL specified")
    host, port = _host_and_port(authority.rpartition("@")[2])
    return options | {"server": {"type": "inet", "host": host, "port": port}}


def _host_and_port(authority: str) -> tuple[str, str]:
    match = re.fullmatch(r"(\[[^][]+\]|[^][:]+)(?::([0-9]*))?", authority)
    if match is None or (match[2] and int(match[2]) > 0xFFFF):
        raise BadName("No valid URL specified")
    host = _unescaped(match[1])
    if host.startswith("["):
        host = host[1:-1]
    number = int(match[2] or 0)
    return host, str(number) if number else DEFAULT_PORT


def _parameters(query: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in query.split("&"):
        if not pair:
            continue
        key, equals, value = pair.partition("=")
        if not equals:
            raise BadName("No valid URL specified")
        found[_unescaped(key)] = _unescaped(value)
    return found


def _unescaped(text: str) -> str:
    """Undo %XX; anything else after a percent sign, NUL, and what is not UTF-8 are refused."""

    def one(match: re.Match[bytes]) -> bytes:
        if match[1] is None:
            raise BadName("No valid URL specified")
        return bytes((int(match[1], 16),))

    plain = _ESCAPE.sub(one, text.encode(errors="surrogateescape"))
    if b"\0" in plain:
        raise BadName("No valid URL specified")
    try:
        return plain.decode()
    except UnicodeDecodeError as error:
        raise BadName("No valid URL specified") from error


def _parse_legacy(name: str) -> dict[str, Any]:
    """`nbd:HOST:PORT` or `nbd:unix:PATH`, each with `:exportname=NAME` after it or not."""
    if not name.startswith("nbd:"):
        raise BadName("File name string for NBD must start with 'nbd:'")
    where, given, export = name.partition(_EXPORT_NAME)
    options: dict[str, Any] = {}
    if given and not export:
        return options
    if given:
        options["export"] = export
    where = where.removeprefix("nbd:")
    if not where:
        return options
    if where.startswith("unix:"):
        return options | {"server": {"type": "unix", "path": where.removeprefix("unix:")}}
    host, port = _legacy_inet(where)
    return options | {"server": {"type": "inet", "host": host, "port": port}}


def _legacy_inet(text: str) -> tuple[str, str]:
    address = text.partition(",")[0]
    bracketed = address.startswith("[")
    match = re.match(r"\[([^]]{1,64})\]:(.+)" if bracketed else r"([^:]{0,64}):(.+)", address)
    if match is None or len(match[2]) > 32:
        raise BadName(f"error parsing {'IPv6 ' if bracketed else ''}address '{text}'")
    return match[1], match[2]


def uri(server: Mapping[str, Any], export: str | None) -> str:
    """Return the name that QEMU shows for an export, "" if a plain name cannot say it. Nothing is escaped there."""
    if server["type"] == "unix":
        return f"nbd+unix:///{export}?socket={server['path']}" if export else f"nbd+unix://?socket={server['path']}"
    if server["type"] == "inet":
        where = f"nbd://{server['host']}:{server['port']}"
        return f"{where}/{export}" if export else where
    return ""


def standard_uri(server: Mapping[str, Any], export: str, *, tls: bool = False) -> str | None:
    """Return the URI of an export as doc/uri.md has it, escaped; None for an address that no URI can name."""
    name, scheme = quote(export, safe=""), "nbds" if tls else "nbd"
    if server["type"] == "unix" and not server.get("abstract"):
        return f"{scheme}+unix:///{name}?socket={quote(server['path'], safe='/')}"
    if server["type"] == "inet":
        host = f"[{server['host']}]" if ":" in server["host"] else server["host"]
        return f"{scheme}://{host}:{server['port']}/{name}"
    return None
