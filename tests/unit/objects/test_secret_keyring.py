"""secret_keyring: a real key of this process's keyring."""

from __future__ import annotations

import base64
import ctypes
import os
import platform

import pytest

from qmpd.errors import QmpdError
from qmpd.objects.secret_keyring import SecretKeyring, SecretKeyringOptions
from qmpd.qom.tree import ObjectTree

ADD_KEY = {"x86_64": 248, "aarch64": 217, "riscv64": 217, "ppc64le": 269, "s390x": 278}[platform.machine()]
PROCESS_KEYRING = -2


def add_key(payload: bytes) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    serial = libc.syscall(ADD_KEY, b"user", b"qmpd-test", payload, len(payload), PROCESS_KEYRING)
    if serial < 0:
        reason = os.strerror(ctypes.get_errno())
        pytest.skip(f"this environment forbids add_key: {reason}")
    return int(serial)


def test_a_key_of_the_kernel_is_read() -> None:
    tree = ObjectTree()
    raw = add_key(b"hello\0\xff")
    tree.add("raw", SecretKeyring(SecretKeyringOptions(serial=raw)))
    assert tree.secret("raw") == b"hello\0\xff"
    assert tree.resolve("raw").get_property("serial") == raw
    encoded = add_key(base64.b64encode(b"key material"))
    tree.add("b64", SecretKeyring(SecretKeyringOptions(serial=encoded, format="base64")))
    assert tree.secret("b64") == b"key material"


@pytest.mark.parametrize(
    ("serial", "text"),
    [
        (1, "Unable to read serial key 00000001: Required key not available"),
        (0, "'serial' should not be equal to 0"),
        (1 << 31, "Parameter 'serial' expects int32_t"),
        (-(1 << 31) - 1, "Parameter 'serial' expects int32_t"),
    ],
)
def test_refusals(serial: int, text: str) -> None:
    add_key(b"x")
    tree = ObjectTree()
    with pytest.raises(QmpdError) as caught:
        tree.add("s", SecretKeyring(SecretKeyringOptions(serial=serial)))
    assert str(caught.value) == text
    assert tree.get("s") is None
