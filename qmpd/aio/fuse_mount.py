"""Mounting a FUSE file system over a regular file: by mount(2), or by fusermount3 for who may not.

Sources: mount(2), umount2(2), and the protocol of fusermount (libfuse, lib/mount.c): it mounts, and
sends the descriptor of /dev/fuse over the socket whose number is in _FUSE_COMMFD.
"""

from __future__ import annotations

import array
import ctypes
import errno
import os
import shutil
import socket
import subprocess

_MS_NOSUID, _MS_NODEV = 2, 4
_MNT_DETACH = 2
_HELPER_SECONDS = 10.0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


def mount(path: str, *, allow_other: bool, max_read: int) -> int:
    """Mount over the file `path` and return the descriptor that requests come from.

    allow_other  other users may open the file, as far as its mode lets them
    max_read     bytes in one read at most
    Raises OSError.
    """
    options = f"default_permissions,max_read={max_read}" + (",allow_other" if allow_other else "")
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        mode = os.stat(path).st_mode
        data = f"fd={fd},rootmode={mode:o},user_id={os.getuid()},group_id={os.getgid()},{options}"
        if _libc.mount(b"/dev/fuse", os.fsencode(path), b"fuse", _MS_NOSUID | _MS_NODEV, data.encode()):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), path)
    except OSError as error:
        os.close(fd)
        if error.errno != errno.EPERM or not shutil.which("fusermount3"):
            raise
        return _mount_by_helper(path, options)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _mount_by_helper(path: str, options: str) -> int:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        ours.settimeout(_HELPER_SECONDS)
        done = subprocess.run(
            ["fusermount3", "-o", options, "--", path],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=(theirs.fileno(),),
            capture_output=True,
            timeout=_HELPER_SECONDS,
            check=False,
        )
        if done.returncode:
            raise OSError(errno.EPERM, done.stderr.decode(errors="replace").strip(), path)
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4))
        for level, kind, value in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                descriptors = array.array("i", value[:4])
                os.set_inheritable(descriptors[0], False)
                return descriptors[0]
    raise OSError(errno.EPROTO, "fusermount3 sent no descriptor", path)


def unmount(path: str) -> None:
    """Take the file system away from `path` at once; who has the file open gets errors later. Raises OSError."""
    if not _libc.umount2(os.fsencode(path), _MNT_DETACH):
        return
    error = ctypes.get_errno()
    if error == errno.EPERM and shutil.which("fusermount3"):
        subprocess.run(
            ["fusermount3", "-u", "-z", "-q", "--", path],
            timeout=_HELPER_SECONDS,
            check=False,
        )
        return
    raise OSError(error, os.strerror(error), path)
