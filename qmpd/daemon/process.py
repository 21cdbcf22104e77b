"""The process itself: background, pid file, hardening, systemd."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import resource
import socket
import sys

_log = logging.getLogger("qmpd.daemon")

_PR_SET_DUMPABLE = 4
_FIRST_PASSED_FD = 3


def harden() -> None:
    """Make sure that no core dump shows a key, and that other processes of the user cannot look in."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        _log.warning("core dumps could not be turned off")


class Background:
    """The way to the background: the parent waits until the child says it is ready.

    Made before any thread or loop exists. In the child, and without -daemonize, the constructor
    returns; in the parent it ends the process with the child's status.
    """

    def __init__(self, wanted: bool) -> None:
        self._pipe: int | None = None
        if not wanted:
            return
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        if os.fork() > 0:
            os.close(write_end)
            status = os.read(read_end, 1)
            os._exit(0 if status == b"\0" else 1)
        os.close(read_end)
        os.setsid()
        if os.fork() > 0:
            os._exit(0)
        os.umask(0o027)
        self._pipe = write_end

    def ready(self) -> None:
        """Let the parent end with status 0, and let go of its standard streams and directory."""
        if self._pipe is None:
            return
        os.chdir("/")
        sys.stdout.flush()
        sys.stderr.flush()
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for standard in range(3):
            os.dup2(null, standard)
        os.close(null)
        os.write(self._pipe, b"\0")
        os.close(self._pipe)
        self._pipe = None


class PidFile:
    """A locked file that holds the process id while the daemon lives."""

    def __init__(self, path: str) -> None:
        """Raises OSError if the file cannot be made, BlockingIOError if another process has it."""
        self._path = os.path.abspath(path)
        while True:
            self._fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = os.fstat(self._fd)
                try:
                    there = os.stat(path)
                except FileNotFoundError:
                    there = None
                if there is not None and (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino):
                    break
            except BaseException:
                os.close(self._fd)
                raise
            os.close(self._fd)
        os.ftruncate(self._fd, 0)
        os.write(self._fd, f"{os.getpid()}\n".encode())

    def remove(self) -> None:
        """Take the file away; the lock goes with the process."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)


def notify(state: str) -> None:
    """Tell the service manager, if there is one ("READY=1", "STOPPING=1")."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            sock.sendall(state.encode())
        except OSError as error:
            _log.warning("the service manager cannot be told '%s': %s", state, error.strerror)


def passed_sockets() -> list[socket.socket]:
    """Return the listening sockets that the service manager opened for this process."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = os.environ.get("LISTEN_FDS", "")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    found = []
    for fd in range(_FIRST_PASSED_FD, _FIRST_PASSED_FD + (int(count) if count.isdigit() else 0)):
        os.set_inheritable(fd, False)
        found.append(socket.socket(fileno=fd))
    return found
