"""Listening sockets for a SocketAddress (qapi/sockets.json): UNIX, inet, vsock and inherited ones.

Texts are those of QEMU's socket code (util/qemu-sockets.c).
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
import tempfile
from collections.abc import Mapping
from typing import Any

from qmpd.errors import CommandError

BACKLOG = 1024
"""Clients that may wait to be accepted; a UNIX client beyond them gets EAGAIN, not patience."""

MAX_UNIX_PATH = 107
"""Bytes in the path of a UNIX socket, its final NUL not counted."""


class Listening:
    """The sockets of one address.

    path   file that belongs to a UNIX socket and goes with it, None if there is none
    """

    def __init__(self, sockets: list[socket.socket], path: str | None = None) -> None:
        self.sockets, self.path = sockets, path
        self._identity = _identity(path) if path is not None else None
        for sock in sockets:
            sock.setblocking(False)

    def close(self) -> None:
        """Close the sockets and remove the file, unless another socket has taken its place."""
        for sock in self.sockets:
            sock.close()
        self.sockets = []
        if self.path is not None and _identity(self.path) == self._identity:
            os.unlink(self.path)
        self.path = None


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


async def listen(address: Mapping[str, Any], *, inherited: bool) -> Listening:
    """Return sockets that listen at a validated SocketAddress (flat form, wire names).

    inherited   a descriptor may be named by its number (the command line's)
    Raises CommandError.
    """
    kind = address["type"]
    if kind == "unix":
        return listen_unix(address["path"], abstract=address.get("abstract", False), tight=address.get("tight", True))
    if kind == "inet":
        return await _listen_inet(address)
    if kind == "vsock":
        return _listen_vsock(address["cid"], address["port"])
    return _take_inherited(address["str"], inherited=inherited)


def _failed(what: str, error: OSError) -> CommandError:
    return CommandError(f"{what}: {error.strerror}")


# UNIX


def listen_unix(path: str, *, abstract: bool = False, tight: bool = True) -> Listening:
    """Return a socket that listens at `path`; a socket file that is there is replaced.

    Another kind of file is not: the reference would delete it. Raises CommandError.
    """
    if len(os.fsencode(path)) > MAX_UNIX_PATH:
        raise CommandError(
            f"UNIX socket path '{path}' is too long",
            hint=f"Path must be less than {MAX_UNIX_PATH + 1} bytes",
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if abstract:
            name = b"\0" + os.fsencode(path)
            sock.bind(name if tight else name.ljust(MAX_UNIX_PATH + 1, b"\0"))
            where: str | None = None
        else:
            where = path or tempfile.mktemp(prefix="qmpd-socket-")  # noqa: S306 - bind fails if it is taken
            _remove_stale(where)
            sock.bind(where)
    except OSError as error:
        sock.close()
        raise _failed(f"Failed to bind socket to {path}", error) from error
    except CommandError:
        sock.close()
        raise
    sock.listen(BACKLOG)
    return Listening([sock], where)


def _remove_stale(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return
    if stat.S_ISSOCK(mode) or stat.S_ISDIR(mode):
        try:
            os.unlink(path)
        except OSError as error:
            raise _failed(f"Failed to unlink socket {path}", error) from error


# inet


async def _listen_inet(address: Mapping[str, Any]) -> Listening:
    host, port = address["host"], address["port"]
    family = _family(address)
    flags = socket.AI_PASSIVE
    if address.get("numeric"):
        flags |= socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host or None, port or None, family=family, type=socket.SOCK_STREAM, flags=flags)
    except socket.gaierror as error:
        raise CommandError(f"address resolution failed for {host}:{port}: {error.strerror}") from error
    except UnicodeError as error:
        raise CommandError(f"address resolution failed for {host}:{port}: Name or service not known") from error
    sockets: list[socket.socket] = []
    last = address.get("to")
    try:
        for one_family, kind, protocol, _, where in found:
            bound = _bind_first(one_family, kind, protocol, where, last, both=family == socket.AF_UNSPEC)
            if bound is not None:
                sockets.append(bound)
        if not sockets:
            raise CommandError("Failed to find an available port: Address already in use")
        for sock in sockets:
            if address.get("keep-alive"):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.listen(BACKLOG)
    except OSError as error:
        _close_all(sockets)
        raise _failed("Failed to listen on socket", error) from error
    except CommandError:
        _close_all(sockets)
        raise
    return Listening(sockets)


def _family(address: Mapping[str, Any]) -> socket.AddressFamily:
    """Return the family that the ipv4 and ipv6 switches leave."""
    ipv4, ipv6 = address.get("ipv4"), address.get("ipv6")
    if ipv4 is False and ipv6 is False:
        raise CommandError("Cannot disable IPv4 and IPv6 at same time")
    if ipv4 and ipv6:
        return socket.AF_UNSPEC
    if ipv6 or ipv4 is False:
        return socket.AF_INET6
    if ipv4 or ipv6 is False:
        return socket.AF_INET
    return socket.AF_UNSPEC


def _bind_first(
    family: int, kind: int, protocol: int, where: tuple[Any, ...], last: int | None, *, both: bool
) -> socket.socket | None:
    """Return a socket bound to the first free port from that of `where` to `last`, None if all are taken."""
    first = where[1]
    for port in range(first, (first if last is None else last) + 1):
        sock = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1 if both else 0)
            sock.bind((where[0], port, *where[2:]))
        except OSError as error:
            sock.close()
            if error.errno != errno.EADDRINUSE:
                raise _failed("Failed to bind socket", error) from error
            continue
        return sock
    return None


def _close_all(sockets: list[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


# vsock and inherited descriptors


def _listen_vsock(cid: str, port: str) -> Listening:
    numbers = []
    for name, text in (("cid", cid), ("port", port)):
        if not text.isascii() or not text.isdigit() or int(text) >= 1 << 32:
            raise CommandError(f"Failed to parse {name} '{text}'")
        numbers.append(int(text))
    try:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    except OSError as error:
        raise _failed("Failed to create socket", error) from error
    try:
        sock.bind((numbers[0], numbers[1]))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise _failed("Failed to bind socket", error) from error
    return Listening([sock])


def _take_inherited(text: str, *, inherited: bool) -> Listening:
    if not inherited:
        raise CommandError("only QEMU supports file descriptor passing")
    if not text.isascii() or not text.isdigit():
        raise CommandError(f"Unable to parse FD number '{text}'")
    number = int(text)
    try:
        sock = socket.socket(fileno=os.dup(number))
    except OSError as error:
        raise CommandError(f"File descriptor '{text}' is not a socket") from error
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.listen(BACKLOG)
    return Listening([sock])
