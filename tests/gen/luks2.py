"""LUKS2 headers for tests: a valid one, and one for every rule that can be broken."""

from __future__ import annotations

import base64
import copy
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from qmpd.crypto import af
from qmpd.crypto.cipher import CipherSpec, open_cipher
from qmpd.crypto.kdf import pbkdf2
from qmpd.formats.luks2 import BinaryHeader, checksum, pack_copy
from qmpd.formats.luks2_json import dump_json

PASSPHRASE = b"abc123"
COPY = 16384
AREA = 131072
KEY = random.Random(7).randbytes(32)
Tree = dict[str, Any]


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@functools.cache
def _material(salt: bytes) -> bytes:
    material = af.split(KEY, 4000, "sha256", random.Random(8).randbytes)
    key = pbkdf2("sha256", PASSPHRASE, salt, 1000, 32)
    open_cipher(CipherSpec("aes", "xts", "plain64", None, 32), key).encrypt([(0, material, material)])
    return bytes(material)


def tree(*, offset: int = 0, sector_size: int = 512) -> Tree:
    """Return valid JSON: one pbkdf2 keyslot, one segment at `offset` of the payload."""
    salt = random.Random(9).randbytes(32)
    digest_salt = random.Random(10).randbytes(32)
    return {
        "keyslots": {
            "0": {
                "type": "luks2",
                "key_size": 32,
                "af": {"type": "luks1", "stripes": 4000, "hash": "sha256"},
                "area": {
                    "type": "raw",
                    "offset": str(2 * COPY),
                    "size": str(AREA),
                    "encryption": "aes-xts-plain64",
                    "key_size": 32,
                },
                "kdf": {"type": "pbkdf2", "hash": "sha256", "iterations": 1000, "salt": _b64(salt)},
            }
        },
        "tokens": {},
        "segments": {
            "0": {
                "type": "crypt",
                "offset": str(offset),
                "size": "dynamic",
                "iv_tweak": "0",
                "encryption": "aes-xts-plain64",
                "sector_size": sector_size,
            }
        },
        "digests": {
            "0": {
                "type": "pbkdf2",
                "keyslots": ["0"],
                "segments": ["0"],
                "hash": "sha256",
                "iterations": 1000,
                "salt": _b64(digest_salt),
                "digest": _b64(bytes(pbkdf2("sha256", KEY, digest_salt, 1000, 32))),
            }
        },
        "config": {"json_size": str(COPY - 4096), "keyslots_size": str(AREA)},
    }


def binary(*, seqid: int = 3) -> BinaryHeader:
    """Return the fields of a copy; place, magic and checksum are set when it is packed."""
    return BinaryHeader(
        magic=b"",
        version=2,
        hdr_size=COPY,
        seqid=seqid,
        label=b"",
        csum_alg=b"sha256",
        salt=random.Random(11).randbytes(64),
        uuid=b"01234567-89ab-4def-8123-456789abcdef",
        subsystem=b"",
        hdr_offset=0,
        padding=b"",
        csum=b"",
    )


def header(json_tree: Tree | None = None, text: bytes | None = None, *, seqids: tuple[int, int] = (3, 3)) -> bytes:
    """Return a whole header device: two copies of the same JSON, and key material."""
    body = dump_json(tree() if json_tree is None else json_tree) if text is None else text
    copies = b"".join(pack_copy(binary(seqid=seqids[i]), body, i * COPY) for i in range(2))
    salt = random.Random(9).randbytes(32)
    material = _material(salt)
    return copies + material + bytes(AREA - len(material))


@dataclass(frozen=True, slots=True)
class Broken:
    """A header whose JSON breaks one rule in both copies; `field` is the path the error names."""

    name: str
    change: Callable[[Tree], None]
    field: str

    def build(self) -> bytes:
        """Return the header, sure that the change took."""
        changed = tree()
        self.change(changed)
        assert changed != tree()
        return header(changed)


def _path(target: Tree, path: str) -> tuple[Any, str]:
    *way, last = path.split(".")
    for step in way:
        target = target[step]
    return target, last


def without(path: str) -> Broken:
    def change(target: Tree) -> None:
        parent, last = _path(target, path)
        del parent[last]

    return Broken(f"no {path}", change, path)


def put(path: str, value: Any, field: str | None = None) -> Broken:
    def change(target: Tree) -> None:
        parent, last = _path(target, path)
        parent[last] = copy.deepcopy(value)

    return Broken(f"{path} = {value!r}"[:60], change, path if field is None else field)


def second_slot(**area: Any) -> Broken:
    def change(target: Tree) -> None:
        slot = copy.deepcopy(target["keyslots"]["0"])
        slot["area"].update(area)
        target["keyslots"]["1"] = slot
        target["digests"]["0"]["keyslots"].append("1")

    return Broken(f"second slot {area}", change, "area.offset")


def segments(*changes: dict[str, Any], field: str) -> Broken:
    """Return a header with these segments, each differing from the valid one by its changes."""

    def change(target: Tree) -> None:
        valid = target["segments"].pop("0")
        for i, own in enumerate(changes):
            target["segments"][str(i)] = valid | own
        target["digests"]["0"]["segments"] = [str(i) for i in range(len(changes))]

    return Broken(f"segments {changes}"[:70], change, field)


MANDATORY = [
    *("keyslots", "tokens", "segments", "digests", "config"),
    *(f"segments.0.{name}" for name in ("type", "offset", "size", "iv_tweak", "encryption", "sector_size")),
    *(f"digests.0.{name}" for name in ("type", "keyslots", "segments")),
    *(f"keyslots.0.{name}" for name in ("type", "key_size", "af", "area", "kdf")),
    *(f"keyslots.0.area.{name}" for name in ("type", "offset", "size", "encryption", "key_size")),
    *(f"keyslots.0.af.{name}" for name in ("type", "stripes", "hash")),
    *(f"keyslots.0.kdf.{name}" for name in ("type", "hash", "iterations", "salt")),
    *("config.json_size", "config.keyslots_size"),
]

TWO64 = str(1 << 64)
TOKEN = {"type": "mine", "keyslots": []}
BROKEN: list[Broken] = [
    *map(without, MANDATORY),
    *(put(path, 5) for path in ("keyslots", "tokens", "segments", "digests", "config")),
    *(put(path, []) for path in ("keyslots", "tokens", "segments", "digests", "config")),
    put("segments", {}),
    put("keyslots.x", {"type": "luks2", "key_size": 32}, "keyslots.'x'"),
    put("keyslots.0.type", ""),
    put("keyslots.0.key_size", "32"),
    put("keyslots.0.key_size", -1),
    put("keyslots.0.key_size", 1 << 32),
    put("keyslots.0.key_size", 32.5),
    put("keyslots.0.kdf", "pbkdf2"),
    put("keyslots.0.kdf.iterations", "1000"),
    put("keyslots.0.kdf.salt", 5),
    put("keyslots.0.af.type", "luks3"),
    put("keyslots.0.area.type", "cooked"),
    put("keyslots.0.area.offset", 32768),
    put("keyslots.0.area.offset", "0x8000"),
    put("keyslots.0.area.offset", "-32768"),
    put("keyslots.0.area.offset", TWO64),
    put("keyslots.0.area.offset", "16384"),
    put("keyslots.0.area.offset", "32767"),
    put("keyslots.0.area.offset", "32769", "keyslots.0.area.size"),
    put("keyslots.0.area.size", "0"),
    put("keyslots.0.area.size", str(AREA + 1)),
    put("keyslots.0.area.size", str((1 << 64) - 1)),
    second_slot(),
    second_slot(offset="65536", size="65536"),
    put("tokens.x", TOKEN, "tokens.'x'"),
    put("tokens.0", {"keyslots": []}, "tokens.0.type"),
    put("tokens.0", {"type": "mine"}, "tokens.0.keyslots"),
    put("tokens.0", {"type": "mine", "keyslots": "0"}, "tokens.0.keyslots"),
    put("tokens.0", {"type": "mine", "keyslots": [0]}, "tokens.0.keyslots"),
    put("tokens.0", {"type": "mine", "keyslots": ["7"]}, "tokens.0.keyslots"),
    put("tokens.0", 5, "tokens.0"),
    put("digests.0.keyslots", ["0", "4"]),
    put("digests.0.segments", ["0", "4"]),
    put("digests.0.keyslots", [0]),
    put("digests.0.segments", {}),
    put("digests.0.segments", [], "segments.0"),
    put("digests.0.keyslots", [], "keyslots.0"),
    put("digests.1", {"type": "mine", "keyslots": ["0"], "segments": []}, "keyslots.0"),
    put("segments.0.offset", 0),
    put("segments.0.offset", "-512"),
    put("segments.0.offset", "1"),
    put("segments.0.offset", TWO64),
    put("segments.0.offset", str(2 * COPY + AREA - 512), "config.keyslots_size"),
    put("segments.0.size", "0"),
    put("segments.0.size", "100"),
    put("segments.0.size", "-512"),
    put("segments.0.size", TWO64),
    put("segments.0.size", "huge"),
    put("segments.0.iv_tweak", 0),
    put("segments.0.iv_tweak", "x"),
    put("segments.0.iv_tweak", TWO64),
    put("segments.0.encryption", ""),
    put("segments.0.sector_size", "512"),
    put("segments.0.sector_size", 0),
    put("segments.0.sector_size", -1),
    put("segments.0.sector_size", 511),
    put("segments.0.flags", "backup-final"),
    put("segments.0.flags", [5]),
    put("segments.0.flags", ["backup-final"], "segments"),
    put("segments.0.integrity", True),
    put("segments.0.integrity", {"type": "hmac(sha256)"}, "segments.0.integrity.journal_encryption"),
    segments({"size": "512", "sector_size": 4096}, field="segments.0.size"),
    segments({"size": "4096"}, {"offset": "2048"}, field="segments.1.offset"),
    segments({}, {"offset": "4096"}, field="segments.0.size"),
    put("config.json_size", 12288),
    put("config.json_size", "12289"),
    put("config.json_size", "28672", "keyslots.0.area.offset"),
    put("config.json_size", "0"),
    put("config.keyslots_size", "131073"),
    put("config.keyslots_size", str(256 << 20)),
    put("config.keyslots_size", "126976", "keyslots.0.area.size"),
    put("config.flags", "x"),
    put("config.flags", [1]),
    put("config.requirements", []),
    put("config.requirements", {"mandatory": "x"}, "config.requirements.mandatory"),
    put("config.requirements", {"mandatory": [1]}, "config.requirements.mandatory"),
]
"""Each is refused, by cryptsetup as well: compared with the real one in tests/peers."""


def jsons() -> dict[str, bytes]:
    """Return JSON areas that are refused before any rule of the contents is looked at."""
    good = dump_json(tree())
    return {
        "empty": b"",
        "no object": b"[" + good + b"]",
        "a string": b'"' + b"x" * 40 + b'"',
        "space before": b" " + good,
        "NUL and more": good + b"\0x",
        "cut": good[:-1],
        "two objects": good + good,
        "nested without end": b'{"a":' * 2000,
        "nested deeply": b'{"a":' * 40 + b"1" + b"}" * 40,
        "no JSON": good.replace(b":", b";"),
    }


def with_binary(index: int, **changes: Any) -> bytes:
    """Return a header whose copy `index` has binary fields changed, its checksum made right again."""
    good = header()
    fixed = {name: changes.pop(name) for name in ("magic", "hdr_offset", "hdr_size", "version") if name in changes}
    body = dump_json(tree())
    packed = bytearray(pack_copy(replace(binary(), **changes), body, index * COPY))
    made = replace(BinaryHeader.unpack_from(packed), **fixed)
    made.pack_into(packed)
    replace(made, csum=checksum(bytes(packed), "sha256")).pack_into(packed)
    return good[: index * COPY] + bytes(packed) + good[(index + 1) * COPY :]
