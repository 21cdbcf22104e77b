"""Outgoing sockets for a SocketAddress (qapi/sockets.json).

Texts are those of QEMU's socket code (util/qemu-sockets.c).
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Mapping
from typing import Any

from qmpd.errors import CommandError

MAX_UNIX_PATH = 107
"""Bytes in the path of a UNIX socket, its final NUL not counted."""


async def connect(address: Mapping[str, Any]) -> socket.socket:
    """Return a connected, non-blocking socket for a validated SocketAddress (flat form, wire names).

    Raises CommandError.
    """
    kind = address["type"]
    if kind == "unix":
        return await _connect_unix(address["path"], bool(address.get("abstract")), bool(address.get("tight", True)))
    if kind == "inet":
        return await _connect_inet(address)
    if kind == "vsock":
        return await _connect_vsock(address["cid"], address["port"])
    raise CommandError("only QEMU supports file descriptor passing")


async def _connected(sock: socket.socket, where: Any, shown: str) -> socket.socket:
    """Connect `sock` and return it. Raises CommandError, the socket then being closed."""
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, where)
    except OSError as error:
        sock.close()
        reason = os.strerror(error.errno or errno.EIO)
        raise CommandError(f"Failed to connect to '{shown}': {reason}") from error
    except BaseException:
        sock.close()
        raise
    return sock


async def _connect_unix(path: str, abstract: bool, tight: bool) -> socket.socket:
    encoded = os.fsencode(path)
    if len(encoded) > MAX_UNIX_PATH:
        raise CommandError(
            f"UNIX socket path '{path}' is too long",
            hint=f"Path must be less than {MAX_UNIX_PATH + 1} bytes",
        )
    where = encoded
    if abstract:
        where = b"\0" + encoded
        where = where if tight else where.ljust(MAX_UNIX_PATH + 1, b"\0")
    elif not encoded:
        # An empty name would reach the abstract socket without a name, which is nobody's.
        raise CommandError("Failed to connect to '': Connection refused")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    return await _connected(sock, where, path)


async def _connect_inet(address: Mapping[str, Any]) -> socket.socket:
    host, port = address["host"], address["port"]
    shown = f"{host}:{port}"
    family = inet_family(address)
    loop = asyncio.get_running_loop()
    flags = socket.AI_V4MAPPED | socket.AI_ADDRCONFIG
    try:
        if not host:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        found = await loop.getaddrinfo(host, port or None, family=family, type=socket.SOCK_STREAM, flags=flags)
    except (socket.gaierror, UnicodeError, ValueError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else "Name or service not known"
        raise CommandError(f"address resolution failed for {shown}: {reason}") from error
    refusal: CommandError | None = None
    for one_family, kind, protocol, _, where in found:
        try:
            sock = socket.socket(one_family, kind | socket.SOCK_CLOEXEC, protocol)
        except OSError as error:
            refusal = CommandError(f"Failed to create socket: {error.strerror}")
            continue
        try:
            sock = await _connected(sock, where, shown)
        except CommandError as error:
            refusal = error
            continue
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if address.get("keep-alive"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return sock
    raise refusal or CommandError(f"Failed to connect to '{shown}': No route to host")


def inet_family(address: Mapping[str, Any]) -> socket.AddressFamily:
    """Return the family that the ipv4 and ipv6 switches of an address leave. Raises CommandError."""
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


async def _connect_vsock(cid: str, port: str) -> socket.socket:
    numbers = []
    for name, text in (("cid", cid), ("port", port)):
        if not text.isascii() or not text.isdigit() or int(text) >= 1 << 32:
            raise CommandError(f"Failed to parse {name} '{text}'")
        numbers.append(int(text))
    try:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    except OSError as error:
        raise CommandError(f"Failed to create socket: {error.strerror}") from error
    return await _connected(sock, (numbers[0], numbers[1]), f"{cid}:{port}")
