"""Character devices, as far as a monitor needs them: UNIX sockets that listen, connect or were passed in.

Options and texts as the reference's `-chardev socket` and `-qmp unix:`; what it has besides is refused by name.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import sys
from dataclasses import dataclass, field

from qmpd.aio.unix import bind_listener, peer_uid
from qmpd.daemon.keyval import Opts, parse_bool, parse_opts
from qmpd.errors import CommandError
from qmpd.qom.tree import ID_HINT, id_well_formed

BACKENDS = (
    *("file", "hub", "memory", "msmouse", "mux", "null", "parallel", "pipe", "pty", "ringbuf", "serial"),
    *("socket", "spicevmc", "spiceport", "stdio", "udp", "vc", "wctablet", "braille", "testdev", "dbus"),
)
"""Names that the reference knows; of these, `socket` and `null` are there."""

_SOCKET_OPTIONS = frozenset(
    [
        "backend",
        "id",
        "path",
        "fd",
        "server",
        "wait",
        "host",
        "port",
        "to",
        "ipv4",
        "ipv6",
        "delay",
        "nodelay",
        "reconnect",
        "reconnect-ms",
        "telnet",
        "tn3270",
        "websocket",
        "tls-creds",
        "tls-authz",
        "abstract",
        "tight",
        "mux",
        "logfile",
        "logappend",
    ]
)
_UNSUPPORTED = ("telnet", "tn3270", "websocket", "tls-creds", "tls-authz", "abstract", "mux", "logfile", "reconnect")


@dataclass(slots=True)
class Chardev:
    """One character device.

    listener   accepts clients; None for a device that is connected itself, and for `null`
    connected  a client that is there already
    trusted    whoever made the socket decides who may connect; else only this user and root may
    path       the socket file to remove at the end, "" if it is not ours
    """

    id: str
    address: str = ""
    listener: socket.socket | None = None
    connected: list[socket.socket] = field(default_factory=list)
    trusted: bool = False
    path: str = ""

    def filename(self, clients: int) -> str:
        """Return how query-chardev shows the device while it has so many clients."""
        if not self.address:
            return "null"
        shown = f"unix:{self.address}" + (",server=on" if self.listener is not None else "")
        return shown if clients else f"disconnected:{shown}"

    def close(self) -> None:
        """Close what nobody took over, and remove the socket file."""
        if self.listener is not None:
            self.listener.close()
        for sock in self.connected:
            sock.close()
        if self.path:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
            self.path = ""


def open_chardev(text: str) -> Chardev:
    """Make the device that the value of -chardev describes. Raises CommandError."""
    opts = parse_opts(text, "backend")
    values = opts.as_dict()
    name, backend = values.get("id"), values.get("backend")
    if name is not None and not id_well_formed(name):
        raise CommandError("Parameter 'id' expects an identifier", hint=ID_HINT)
    opts.check(_SOCKET_OPTIONS)
    if name is None:
        raise CommandError("chardev: no id specified")
    if backend is None:
        raise CommandError(f'chardev: "{name}" missing backend')
    if backend not in BACKENDS:
        raise CommandError(f"'{backend}' is not a valid char driver name")
    if backend == "null":
        return Chardev(name)
    if backend != "socket":
        raise CommandError(f"the character device '{backend}' is not available, only 'socket' and 'null' are")
    return _open_socket(name, opts)


def open_compat(text: str, name: str) -> Chardev:
    """Make the device that the value of -qmp describes. Raises CommandError."""
    kind, colon, rest = text.partition(":")
    if text == "null":
        return Chardev(name)
    if kind != "unix" or not colon:
        if kind in ("tcp", "telnet", "websocket", "udp", "pipe", "file", "con") or text in (
            "stdio",
            "pty",
            "vc",
            "none",
        ):
            raise CommandError(f"a monitor on '{kind}' is not available, only 'unix:PATH' and 'null' are")
        raise CommandError(f"'{text}' is not a valid char driver")
    opts = parse_opts(f"path={rest}")
    opts.check(_SOCKET_OPTIONS)
    return _open_socket(name, opts)


def _open_socket(name: str, opts: Opts) -> Chardev:
    values = opts.as_dict()
    path, fd, host = values.get("path"), values.get("fd"), values.get("host")
    server = parse_bool("server", values.get("server", "off"))
    wait = parse_bool("wait", values["wait"]) if "wait" in values else server
    if sum(one is not None for one in (path, fd, host)) > 1:
        raise CommandError("None or one of 'path', 'fd' or 'host' option required.")
    if host is not None:
        raise CommandError("a socket with 'host' is not available, only 'path' and 'fd' are")
    for option in _UNSUPPORTED:
        if values.get(option, "off") not in ("off", "0"):
            raise CommandError(f"the option '{option}' is not available")
    if "wait" in values and not server and wait:
        raise CommandError("'wait' option is incompatible with socket in client connect mode")
    if path is not None:
        chardev = listen_at(name, path) if server else _connect_to(name, path)
    else:
        chardev = _adopt(name, fd or "", server)
    if server and wait:
        _wait_for_client(chardev)
    return chardev


def _path_fits(path: str) -> None:
    if len(os.fsencode(path)) > 107:
        raise CommandError(f"UNIX socket path '{path}' is too long", hint="Path must be less than 108 bytes")


def listen_at(name: str, path: str) -> Chardev:
    """Return a device that listens at `path`. Raises CommandError."""
    _path_fits(path)
    try:
        listener = bind_listener(path)
    except OSError as error:
        raise CommandError(f"Failed to bind socket to {path}: {os.strerror(error.errno or 0)}") from error
    return Chardev(name, path, listener, path=os.path.abspath(path))


def _connect_to(name: str, path: str) -> Chardev:
    _path_fits(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.connect(path)
    except OSError as error:
        sock.close()
        raise CommandError(f"Failed to connect to '{path}': {os.strerror(error.errno or 0)}") from error
    return Chardev(name, path, connected=[sock])


def _adopt(name: str, text: str, server: bool) -> Chardev:
    if not text.isascii() or not text.isdigit():
        raise CommandError(f"Unable to parse FD number {text}")
    number = int(text)
    try:
        is_socket = stat.S_ISSOCK(os.fstat(number).st_mode)
    except (OSError, OverflowError):
        is_socket = False
    if not is_socket:
        raise CommandError(f"File descriptor '{text}' is not a socket")
    os.set_inheritable(number, False)
    return adopt_socket(name, socket.socket(fileno=number), server)


def adopt_socket(name: str, sock: socket.socket, server: bool) -> Chardev:
    """Take over a socket that somebody else opened: a listening one if `server`, else a connected one."""
    if sock.family != socket.AF_UNIX:
        raise CommandError(f"the socket of '{name}' is no UNIX socket")
    address = os.fsdecode(sock.getsockname())
    if not server:
        return Chardev(name, address, connected=[sock], trusted=True)
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise CommandError(f"the socket of '{name}' does not listen")
    return Chardev(name, address, sock, trusted=True)


def _wait_for_client(chardev: Chardev) -> None:
    """Block until the first client is there, as `wait=on` asks."""
    assert chardev.listener is not None
    sys.stderr.write(f"QEMU waiting for connection on: {chardev.filename(0)}\n")
    sys.stderr.flush()
    chardev.listener.setblocking(True)
    while not chardev.connected:
        client, _ = chardev.listener.accept()
        if chardev.trusted or peer_uid(client) in (0, os.geteuid()):
            chardev.connected.append(client)
        else:
            client.close()
