"""QEMU's image locks: byte-range OFD locks that processes see each other's permissions by.

A permission p in use is a read lock on byte 100 + p, an unshared one a read lock on byte 200 + p.
Whoever wants p asks whether anybody else holds byte 200 + p, and the other way round; nobody ever
takes a write lock. Observed on the reference through /proc/PID/fdinfo.
"""

from __future__ import annotations

import errno
import fcntl
import struct

from qmpd.errors import CommandError

PERM_BASE = 100
SHARED_BASE = 200
NAMES = ("consistent read", "write", "write unchanged", "resize")

_FLOCK = struct.Struct("hhxxxxqqixxxx")


def _lock(fd: int, kind: int, start: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, 0, start, 1, 0))


def _held_by_other(fd: int, start: int) -> bool:
    reply = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, start, 1, 0))
    return bool(_FLOCK.unpack(reply)[0] != fcntl.F_UNLCK)


def available(fd: int) -> bool:
    """Say whether the file system of `fd` has OFD locks."""
    try:
        _held_by_other(fd, PERM_BASE)
    except OSError:
        return False
    return True


def apply(fd: int, taken: int, unshared: int, *, release: bool) -> None:
    """Hold the bytes of the permission bits `taken` and `unshared`; with `release` no others.

    Raises CommandError if the system refuses a lock.
    """
    for base, wanted, what in ((PERM_BASE, taken, ""), (SHARED_BASE, unshared, "shared ")):
        for bit, name in enumerate(NAMES):
            try:
                if wanted >> bit & 1:
                    _lock(fd, fcntl.F_RDLCK, base + bit)
                elif release:
                    _lock(fd, fcntl.F_UNLCK, base + bit)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise CommandError(f'Failed to get {what}"{name}" lock') from error
                raise CommandError(f"Failed to lock byte {base + bit}: {error.strerror}") from error


def check(fd: int, taken: int, unshared: int, path: str) -> None:
    """Raise CommandError if another open file description holds what these bits conflict with.

    The hint names the image, and the process that holds the lock where it can be found.
    """
    for base, wanted, what in ((SHARED_BASE, taken, ""), (PERM_BASE, unshared, "shared ")):
        for bit, name in enumerate(NAMES):
            if wanted >> bit & 1 and _held_by_other(fd, base + bit):
                raise CommandError(
                    f'Failed to get {what}"{name}" lock', hint=f"Is another process using the image [{path}]?"
                )
