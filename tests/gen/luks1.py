"""LUKS1 volumes for tests: a valid one, and one for every rule that can be broken."""

from __future__ import annotations

import functools
import random
import struct
from dataclasses import dataclass

from qmpd.crypto.secretbytes import SecretBytes
from qmpd.formats import luks1
from qmpd.luks.create import Luks1Options, header_length, make_volume

PASSPHRASE = b"abc123"
OPTIONS = Luks1Options(
    cipher_alg="aes-128", iterations=1000, uuid="01234567-89ab-4def-8123-456789abcdef", hash_alg="sha256"
)


@functools.cache
def header(*, detached: bool, options: Luks1Options = OPTIONS, passphrase: bytes = PASSPHRASE) -> bytes:
    """Return a header with its key material: slot 0 takes `passphrase`. Always the same bytes."""
    made, material = make_volume(
        options, SecretBytes(passphrase), detached=detached, random=random.Random(4711).randbytes
    )
    area = bytearray(header_length(options))
    area[: luks1.HEADER_SIZE] = made.pack()
    at = made.slots[0].material_offset
    area[at : at + len(material)] = material
    return bytes(area)


def u32(value: int) -> bytes:
    """Return a field of four bytes."""
    return struct.pack(">I", value)


def at(name: str) -> int:
    """Return the byte offset of a header field."""
    return luks1.Phdr.offset_of(name)


def slot(index: int, name: str) -> int:
    """Return the byte offset of a field of a slot."""
    return luks1.Phdr.SIZE + index * luks1.Keyslot.SIZE + luks1.Keyslot.offset_of(name)


def patched(data: bytes, *patches: tuple[int, bytes]) -> bytes:
    """Return `data` with bytes replaced."""
    changed = bytearray(data)
    for offset, value in patches:
        changed[offset : offset + len(value)] = value
    assert len(changed) == len(data)
    return bytes(changed)


@dataclass(frozen=True, slots=True)
class Broken:
    """A header with one rule broken.

    whole, detached   what opening answers when the payload follows the header, and when it does not; "" if
                      that use is fine, None for a wrong-passphrase answer
    """

    name: str
    patches: tuple[tuple[int, bytes], ...]
    whole: str | None
    detached: str | None


INVALID = "Invalid password, cannot unlock any keyslot"


def _both(name: str, text: str | None, *patches: tuple[int, bytes]) -> Broken:
    return Broken(name, patches, text, text)


def _mode(text: str, answer: str) -> Broken:
    return _both(f"mode {text}", answer, (at("cipher_mode"), text.encode() + b"\0"))


OVERLAP = "Keyslots {} and {} are overlapping in the header"
PAYLOAD = "Keyslot {} is overlapping with the encrypted payload"

BROKEN: list[Broken] = [
    _both("magic", "Volume is not in LUKS format", (0, b"LUKS\xba\xbf")),
    _both("second header's magic", "Volume is not in LUKS format", (0, b"SKUL\xba\xbe")),
    _both("version 0", "LUKS version 0 is not supported", (at("version"), b"\0\0")),
    _both("version 3", "LUKS version 3 is not supported", (at("version"), b"\0\3")),
    _both("version 65535", "LUKS version 65535 is not supported", (at("version"), b"\xff\xff")),
    _both("cipher name without end", "LUKS header cipher name is not NUL terminated", (at("cipher_name"), b"a" * 32)),
    _both("cipher mode without end", "LUKS header cipher mode is not NUL terminated", (at("cipher_mode"), b"a" * 32)),
    _both("hash without end", "LUKS header hash spec is not NUL terminated", (at("hash_spec"), b"a" * 32)),
    Broken("payload at 0", ((at("payload_offset"), u32(0)),), "LUKS payload is overlapping with the header", ""),
    Broken(
        "payload in the header", ((at("payload_offset"), u32(7)),), "LUKS payload is overlapping with the header", ""
    ),
    Broken("payload on slot 0", ((at("payload_offset"), u32(8)),), PAYLOAD.format(0), ""),
    _both("digest iterations 0", "LUKS key iteration count is zero", (at("mk_digest_iterations"), u32(0))),
    _both("digest iterations changed", INVALID, (at("mk_digest_iterations"), u32(1001))),
    _both("digest changed", INVALID, (at("mk_digest"), b"\1")),
    _both("digest salt changed", INVALID, (at("mk_digest_salt"), b"\1\2\3")),
    _both("slot salt changed", INVALID, (slot(0, "salt"), b"\1\2\3")),
    _both("slot iterations changed", INVALID, (slot(0, "iterations"), u32(1001))),
    _both("slot 0 disabled", INVALID, (slot(0, "active"), u32(luks1.DISABLED))),
    _both("key material damaged", INVALID, (4096 + 70_000, b"\0\1\2\3\4\5\6\7")),
    _both("slot state 0", "Keyslot 0 state (active/disable) is corrupted", (slot(0, "active"), u32(0))),
    _both("slot 7 state", "Keyslot 7 state (active/disable) is corrupted", (slot(7, "active"), u32(0xDEADBEEF))),
    _both("slot 0 iterations 0", "Keyslot 0 iteration count is zero", (slot(0, "iterations"), u32(0))),
    _both(
        "slot 1 in use with iterations 0", "Keyslot 1 iteration count is zero", (slot(1, "active"), u32(luks1.ENABLED))
    ),
    _both("slot 3 stripes 0", "Keyslot 3 is corrupted (stripes 0 != 4000)", (slot(3, "stripes"), u32(0))),
    _both("slot 3 stripes 4001", "Keyslot 3 is corrupted (stripes 4001 != 4000)", (slot(3, "stripes"), u32(4001))),
    _both("slot 3 stripes huge", "Keyslot 3 is corrupted (stripes -1 != 4000)", (slot(3, "stripes"), u32(0xFFFFFFFF))),
    _both("slot 0 at 0", "Keyslot 0 is overlapping with the LUKS header", (slot(0, "material_sector"), u32(0))),
    _both("slot 0 at 7", "Keyslot 0 is overlapping with the LUKS header", (slot(0, "material_sector"), u32(7))),
    _both("slot 2 at 0", OVERLAP.format(0, 2), (slot(2, "material_sector"), u32(0))),
    _both("slot 1 on slot 0", OVERLAP.format(0, 1), (slot(1, "material_sector"), u32(8))),
    _both("slot 1 touches slot 0", OVERLAP.format(0, 1), (slot(1, "material_sector"), u32(8 + 249))),
    Broken("slot 6 in the payload", ((slot(6, "material_sector"), u32(5000)),), PAYLOAD.format(6), ""),
    Broken("slot 7 at the end of all", ((slot(7, "material_sector"), u32(0xFFFFFFFF)),), PAYLOAD.format(7), ""),
    _both("key of 0 bytes", "Algorithm 'aes' with key size 0 bytes not supported", (at("key_bytes"), u32(0))),
    _both("key of 16 bytes", "Algorithm 'aes' with key size 8 bytes not supported", (at("key_bytes"), u32(16))),
    _both("key of 33 bytes", OVERLAP.format(0, 1), (at("key_bytes"), u32(33))),
    Broken("key of 4 GiB", ((at("key_bytes"), u32(0xFFFFFFFF)),), PAYLOAD.format(0), OVERLAP.format(0, 1)),
    _both(
        "cipher unknown", "Algorithm 'foobar' with key size 16 bytes not supported", (at("cipher_name"), b"foobar\0")
    ),
    _both("cipher in capitals", "Algorithm 'AES' with key size 16 bytes not supported", (at("cipher_name"), b"AES\0")),
    _both("cipher empty", "Algorithm '' with key size 16 bytes not supported", (at("cipher_name"), b"\0")),
    _both("cipher no text", "Algorithm '\ufffd' with key size 16 bytes not supported", (at("cipher_name"), b"\xff\0")),
    _both("hash unknown", "Hash algorithm 'foohash' not supported", (at("hash_spec"), b"foohash\0")),
    _both("hash empty", "Hash algorithm '' not supported", (at("hash_spec"), b"\0")),
    _both("hash of another volume", INVALID, (at("hash_spec"), b"sha512\0")),
    _mode("xts", "Unexpected cipher mode string format 'xts'"),
    _mode("", "Unexpected cipher mode string format ''"),
    _mode("xts-", "IV generator '' not supported"),
    _mode("xts-foo", "IV generator 'foo' not supported"),
    _mode("xts-plain64-foo", "IV generator 'plain64-foo' not supported"),
    _mode("xts-null", "IV generator 'null' not supported"),
    _mode("XTS-plain64", "Cipher mode 'XTS' not supported"),
    _mode("foo-plain64", "Cipher mode 'foo' not supported"),
    _mode("foo-foo", "Cipher mode 'foo' not supported"),
    _mode("xts:essiv-foo", "Cipher mode 'xts:essiv' not supported"),
    _mode("xts-plain64:foo", "Hash algorithm 'foo' not supported"),
    _mode("foo-essiv:foo", "Hash algorithm 'foo' not supported"),
    _mode("xts-essiv", "Missing IV generator hash specification"),
    _mode("xts-essiv:", "Hash algorithm '' not supported"),
    _mode("xts-essiv:sha1", "No AES cipher with key size 20 available"),
    _mode("cbc-essiv:sha512", "No AES cipher with key size 64 available"),
    _mode("cbc-essiv:sha256", INVALID),
]
"""Opening with the right passphrase; the texts were asked of QEMU 10.0.2, where one differs it says so."""
