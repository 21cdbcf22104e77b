"""Work done by two threads, and extents read straight from a file: equal to the reference engine in every byte."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from qmpd.crypto.cipher import (
    EXTENT,
    SHARED,
    CipherSpec,
    ExtentTable,
    extents_work,
    open_cipher,
    read_extents,
    write_extents,
)

pytestmark = pytest.mark.skipif(not extents_work(), reason="the compiled engine is not built")
KEY = bytes(range(64))


def spec(name: str, sector: int = 512) -> CipherSpec:
    mode, iv, hashed = {
        "xts": ("xts", "plain64", None),
        "cbc": ("cbc", "essiv", "sha256"),
        "ecb": ("ecb", "plain64", None),
    }[name]
    return CipherSpec("aes", mode, iv, hashed, 64 if mode == "xts" else 32, sector)


@pytest.mark.parametrize("mode", ["xts", "cbc", "ecb"])
@pytest.mark.parametrize("sector", [512, 4096])
def test_large_work_is_the_same_as_small_work(mode: str, sector: int) -> None:
    key = KEY[: spec(mode).key_length]
    ours, reference = (open_cipher(spec(mode, sector), key, engine=engine) for engine in ("compiled", "reference"))
    plain = os.urandom(SHARED + 17 * 4096)
    large = bytearray(plain)
    ours.encrypt([(8, memoryview(large), memoryview(large))])
    sample = bytearray(plain[SHARED : SHARED + 4096])
    reference.encrypt([(8 + SHARED // 512, sample, sample)])
    assert large[SHARED : SHARED + 4096] == sample
    pieces = bytearray(plain)
    for at in range(0, len(plain), 4096):
        part = memoryview(pieces)[at : at + 4096]
        ours.encrypt([(8 + at // 512, part, part)])
    assert pieces == large
    ours.decrypt([(8, memoryview(large), memoryview(large))])
    assert large == plain


def test_many_threads_at_once() -> None:
    """One helper serves whoever comes first; the others work alone."""
    cipher = open_cipher(spec("xts"), KEY, engine="compiled")
    plain = os.urandom(SHARED * 2)
    wanted = bytearray(plain)
    cipher.encrypt([(0, wanted, wanted)])
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            data = bytearray(plain)
            cipher.encrypt([(0, data, data)])
            if data != wanted:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("length", [512, 4096, 200 * 1024])
def test_extents(tmp_path: Path, encrypted: bool, length: int) -> None:
    stored = os.urandom(1 << 20)
    (tmp_path / "f").write_bytes(stored)
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    cipher = open_cipher(spec("xts"), KEY, engine="compiled") if encrypted else None
    table, out = ExtentTable(8), bytearray(2 << 20)
    places = [(0, 16), (512 * 3, 16 + length + 16), (len(stored) - length, 2 * (16 + length) + 16)]
    for number, (offset, at) in enumerate(places):
        EXTENT.pack_into(table.data, number * EXTENT.size, offset // 512, offset, length, at)
    EXTENT.pack_into(table.data, 3 * EXTENT.size, 0, len(stored) - 100, length, 0)
    try:
        assert read_extents(cipher, fd, table, 3, memoryview(out)) == 3
        for offset, at in places:
            data = bytearray(stored[offset : offset + length])
            if encrypted:
                open_cipher(spec("xts"), KEY, engine="reference").decrypt([(offset // 512, data, data)])
            assert out[at : at + length] == data
        assert read_extents(cipher, fd, table, 4, memoryview(bytearray(len(out)))) == 3  # the last one is not all there
        with pytest.raises(ValueError, match="leaves the buffer"):
            read_extents(cipher, fd, table, 1, memoryview(out)[: 15 + length])
    finally:
        os.close(fd)


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("length", [512, 4096, 200 * 1024])
def test_extents_that_are_written(tmp_path: Path, encrypted: bool, length: int) -> None:
    """From odd addresses, each in its place, and what they come from stays as it is."""
    before, plain = os.urandom(1 << 20), os.urandom(2 << 20)
    (tmp_path / "f").write_bytes(before)
    fd = os.open(tmp_path / "f", os.O_RDWR)
    cipher = open_cipher(spec("xts"), KEY, engine="compiled") if encrypted else None
    table, source, expected = ExtentTable(8), bytearray(plain), bytearray(before)
    for number, (offset, at) in enumerate([(0, 13), (512 * 999, 13 + length), (len(before) - length, 29 + 2 * length)]):
        EXTENT.pack_into(table.data, number * EXTENT.size, offset // 512, offset, length, at)
        data = bytearray(plain[at : at + length])
        if encrypted:
            open_cipher(spec("xts"), KEY, engine="reference").encrypt([(offset // 512, data, data)])
        expected[offset : offset + length] = data
    try:
        assert write_extents(cipher, fd, table, 3, memoryview(source)) == 3
        assert (source, (tmp_path / "f").read_bytes()) == (plain, expected)
        with pytest.raises(ValueError, match="leaves the buffer"):
            write_extents(cipher, fd, table, 1, memoryview(source)[: 12 + length])
    finally:
        os.close(fd)
    fd = os.open(tmp_path / "f", os.O_RDONLY)
    try:
        assert write_extents(cipher, fd, table, 3, memoryview(source)) == 0
    finally:
        os.close(fd)
