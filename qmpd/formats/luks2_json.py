"""The JSON of a LUKS2 header: parsed, every rule checked, returned as typed objects. Sans-io.

Source: LUKS2 On-Disk Format Specification 1.1.x, section 3. Rules and order of the checks are
cryptsetup's: requirements, tokens, digests, segments, keyslots, config, areas, then what each kind of
keyslot demands. Unknown kinds of objects pass, unused, as the format wants it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qmpd.formats._json_fields import Reader, parse_object
from qmpd.units import SECTOR, KiB, MiB

BINARY_SIZE = 4096
MAX_KEYSLOTS_SIZE = 128 * MiB
MAX_OBJECTS = 32
"""Keyslots, tokens or segments; the format's own limit, held so that checks stay cheap."""

STRIPES = 4000
METADATA_SIZES = tuple(16 * KiB << shift for shift in range(9))


@dataclass(frozen=True, slots=True)
class Kdf:
    """Key derivation of a keyslot; the members that its type does not use are 0 or empty.

    type    "pbkdf2", "argon2i", "argon2id"       hash, iterations   pbkdf2
    time, memory (KiB), cpus                      argon2             salt   in base64
    """

    type: str
    salt: str
    hash: str = ""
    iterations: int = 0
    time: int = 0
    memory: int = 0
    cpus: int = 0


@dataclass(frozen=True, slots=True)
class Keyslot:
    """A keyslot; `kdf` is None for the kinds that hold no volume key (reencrypt, unknown ones).

    area_offset, area_size   bytes          key_size, area_key_size   bytes
    priority                 0 ignore, 1 normal, 2 prefer
    """

    id: str
    type: str
    key_size: int
    area_offset: int
    area_size: int
    priority: int = 1
    kdf: Kdf | None = None
    af_hash: str = ""
    stripes: int = 0
    area_encryption: str = ""
    area_key_size: int = 0


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of the payload; size None is "dynamic", to the end of the device.

    offset, size, sector_size   bytes        iv_tweak   512-byte sectors
    """

    id: str
    type: str
    offset: int
    size: int | None
    flags: tuple[str, ...] = ()
    encryption: str = ""
    iv_tweak: int = 0
    sector_size: int = SECTOR
    integrity: bool = False

    @property
    def backup(self) -> bool:
        """True for the records that reencryption keeps beside the real segments."""
        return any(flag.startswith("backup-") for flag in self.flags)


@dataclass(frozen=True, slots=True)
class Digest:
    """What proves a volume key; hash, iterations, salt and digest as they stand, for type pbkdf2."""

    id: str
    type: str
    keyslots: tuple[str, ...]
    segments: tuple[str, ...]
    hash: str = ""
    iterations: int = 0
    salt: str = ""
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Token:
    """A token, kept as it is."""

    id: str
    type: str
    keyslots: tuple[str, ...]
    members: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Metadata:
    """All that the JSON says; `tree` is the parsed text itself, for what is written back unchanged."""

    keyslots: dict[str, Keyslot]
    tokens: dict[str, Token]
    segments: dict[str, Segment]
    digests: dict[str, Digest]
    json_size: int
    keyslots_size: int
    flags: tuple[str, ...]
    requirements: tuple[str, ...]
    tree: Mapping[str, Any]

    @property
    def metadata_size(self) -> int:
        """Bytes of one copy."""
        return self.json_size + BINARY_SIZE

    @property
    def total_size(self) -> int:
        """Bytes of both copies and the keyslot area: what the header's device must have."""
        return 2 * self.metadata_size + self.keyslots_size


def parse_json(area: bytes, image: str, offset: int) -> Metadata:
    """Return the contents of a JSON area (`area` is all of it, at byte `offset`).

    Raises ImageError whose field is the path of the first member that breaks a rule.
    """
    tree = parse_object(area, image, offset)
    top = Reader(tree, "JSON", image, offset)
    flags, requirements = _requirements(top)
    tokens = dict(_tokens(top))
    digests = dict(_digests(top))
    segments = dict(_segments(top, digests))
    keyslots = {key: _keyslot(slot) for key, slot in top.object("keyslots").numbered_objects(MAX_OBJECTS)}
    json_size, keyslots_size = _config(top, segments)
    metadata = Metadata(keyslots, tokens, segments, digests, json_size, keyslots_size, flags, requirements, tree)
    _check_areas(top, metadata)
    if metadata.json_size != len(area):
        top.object("config").refuse("json_size", str(json_size), f"{len(area)}, the size in the binary header")
    return _with_details(top, metadata)


def _requirements(top: Reader) -> tuple[tuple[str, ...], tuple[str, ...]]:
    config = top.object("config")
    mandatory: tuple[str, ...] = ()
    if "requirements" in config:
        requirements = config.object("requirements")
        if "mandatory" in requirements:
            mandatory = requirements.strings("mandatory")
    reencryption = [name for name in mandatory if name.startswith("online-reencrypt")]
    if len(reencryption) > 1:
        config.refuse("requirements.mandatory", repr(reencryption), "one reencryption flag at most")
    return (config.strings("flags") if "flags" in config else ()), mandatory


def _references(reader: Reader, name: str, section: Reader) -> tuple[str, ...]:
    ids = reader.strings(name)
    for key in ids:
        if not isinstance(section.tree.get(key), dict):
            reader.refuse(name, repr(key), f"an object of {section.path}")
    return ids


def _tokens(top: Reader) -> Iterator[tuple[str, Token]]:
    keyslots = top.object("keyslots")
    for key, token in top.object("tokens").numbered_objects(MAX_OBJECTS):
        kind = token.text("type")
        yield key, Token(key, kind, _references(token, "keyslots", keyslots), token.tree)


def _digests(top: Reader) -> Iterator[tuple[str, Digest]]:
    keyslots, segments = top.object("keyslots"), top.object("segments")
    for key, digest in top.object("digests").numbered_objects(MAX_OBJECTS):
        kind = digest.text("type")
        slots = _references(digest, "keyslots", keyslots)
        parts = _references(digest, "segments", segments)
        yield key, Digest(key, kind, slots, parts)


def _segments(top: Reader, digests: dict[str, Digest]) -> Iterator[tuple[str, Segment]]:
    section = top.object("segments")
    if not section.tree:
        section.refuse("", "empty", "at least one segment")
    found = []
    for key, reader in section.numbered_objects(MAX_OBJECTS):
        segment = _segment(key, reader, digests)
        found.append(segment)
        yield key, segment
    numbers = sorted(int(segment.id) for segment in found)
    if numbers != list(range(len(numbers))):
        section.refuse("", str(numbers), "numbers from 0 without a gap")
    found.sort(key=lambda segment: int(segment.id))
    regular = [segment for segment in found if not segment.backup]
    if not regular or found[: len(regular)] != regular:
        section.refuse("", "a backup segment first", "regular segments first")
    _check_segment_ranges(section, regular)


def _segment(key: str, reader: Reader, digests: dict[str, Digest]) -> Segment:
    kind = reader.text("type")
    offset = reader.u64("offset")
    size = None if reader.text("size") == "dynamic" else reader.u64("size")
    if size == 0:
        reader.refuse("size", "0", "more than 0")
    for name, value in (("offset", offset), ("size", size or 0)):
        if value % SECTOR:
            reader.refuse(name, str(value), f"a multiple of {SECTOR}")
    flags = reader.strings("flags") if "flags" in reader else ()
    if kind != "crypt":
        return Segment(key, kind, offset, size, flags)
    reader.text("iv_tweak")
    encryption = reader.text("encryption")
    sector_size = reader.u32("sector_size")
    integrity = "integrity" in reader
    if integrity:
        for name in ("type", "journal_encryption", "journal_integrity"):
            reader.object("integrity").text(name)
    if not sector_size or sector_size % SECTOR:
        reader.refuse("sector_size", str(sector_size), f"a multiple of {SECTOR}")
    iv_tweak = reader.u64("iv_tweak")
    if (size or 0) % sector_size:
        reader.refuse("size", str(size), f"a multiple of the sector size {sector_size}")
    if not any(key in digest.segments for digest in digests.values()):
        reader.refuse("", "without a digest", "one that proves its key")
    return Segment(key, kind, offset, size, flags, encryption, iv_tweak, sector_size, integrity)


def _check_segment_ranges(section: Reader, regular: list[Segment]) -> None:
    for i, one in enumerate(regular):
        if one.size is None and i != len(regular) - 1:
            section.refuse(f"{one.id}.size", "dynamic", "a number: only the last segment may be dynamic")
        for other in regular:
            before = other is not one and other.offset <= one.offset
            if before and (other.size is None or one.offset < other.offset + other.size):
                section.refuse(f"{one.id}.offset", str(one.offset), f"a place outside segment {other.id}")


def _keyslot(reader: Reader) -> Keyslot:
    """Check what every kind of keyslot has; details come in `_with_details`, as cryptsetup orders it."""
    kind = reader.text("type")
    key_size = reader.u32("key_size")
    return Keyslot(reader.name, kind, key_size, 0, 0)


def _config(top: Reader, segments: dict[str, Segment]) -> tuple[int, int]:
    config = top.object("config")
    json_size, keyslots_size = config.u64("json_size"), config.u64("keyslots_size")
    if json_size + BINARY_SIZE not in METADATA_SIZES:
        config.refuse("json_size", str(json_size), "4096 less than a power of two from 16 KiB to 4 MiB")
    if keyslots_size % 4096 or keyslots_size > MAX_KEYSLOTS_SIZE:
        config.refuse("keyslots_size", str(keyslots_size), f"a multiple of 4096 up to {MAX_KEYSLOTS_SIZE}")
    first = min((segment.offset for segment in segments.values() if not segment.backup), default=0)
    if first and first < keyslots_size + 2 * (json_size + BINARY_SIZE):
        config.refuse("keyslots_size", str(keyslots_size), f"to end before the payload at {first}")
    return json_size, keyslots_size


def _check_areas(top: Reader, metadata: Metadata) -> None:
    """Check that no two areas of keyslots overlap, and that all lie between the copies and the payload."""
    areas: list[tuple[Reader, int, int]] = []
    for _, slot in top.object("keyslots").numbered_objects(MAX_OBJECTS):
        area = slot.object("area")
        area.text("type")
        areas.append((area, area.u64("offset"), area.u64("size")))
    for i, (area, offset, size) in enumerate(areas):
        if offset < 2 * metadata.metadata_size:
            area.refuse("offset", str(offset), f"at least {2 * metadata.metadata_size}, behind the two headers")
        if not size:
            area.refuse("size", "0", "more than 0")
        if offset + size > metadata.total_size:
            area.refuse("size", str(size), f"to end by {metadata.total_size}, where the keyslot area does")
        for j, (other, low, length) in enumerate(areas):
            if i != j and low <= offset < low + length:
                area.refuse("offset", str(offset), f"a place outside {other.path}")


def _with_details(top: Reader, metadata: Metadata) -> Metadata:
    """Check what keyslots and digests of the known kinds demand, and fill it in."""
    reencryptions = 0
    for key, reader in top.object("keyslots").numbered_objects(MAX_OBJECTS):
        slot = metadata.keyslots[key]
        area = reader.object("area")
        place = (area.u64("offset"), area.u64("size"))
        reencryptions += slot.type == "reencrypt"
        if slot.type != "luks2":
            metadata.keyslots[key] = Keyslot(key, slot.type, slot.key_size, *place)
            continue
        metadata.keyslots[key] = _luks2_slot(reader, slot, place)
        if sum(key in digest.keyslots for digest in metadata.digests.values()) != 1:
            reader.refuse("", "without exactly one digest", "one digest")
    in_flight = any(name.startswith("online-reencrypt") for name in metadata.requirements)
    if reencryptions > 1 or bool(reencryptions) != in_flight:
        found = f"{reencryptions} reencrypt slots, requirement {'set' if in_flight else 'not set'}"
        top.object("keyslots").refuse("", found, "one slot with the requirement, or neither")
    for key, reader in top.object("digests").numbered_objects(MAX_OBJECTS):
        digest = metadata.digests[key]
        if digest.type == "pbkdf2":
            metadata.digests[key] = Digest(
                key,
                digest.type,
                digest.keyslots,
                digest.segments,
                reader.text("hash"),
                reader.u32("iterations"),
                reader.text("salt"),
                reader.text("digest"),
            )
    return metadata


def _luks2_slot(reader: Reader, slot: Keyslot, place: tuple[int, int]) -> Keyslot:
    kdf, af, area = reader.object("kdf"), reader.object("af"), reader.object("area")
    kind = kdf.text("type")
    if kind == "pbkdf2":
        derivation = Kdf(kind, kdf.text("salt"), hash=kdf.text("hash"), iterations=kdf.u32("iterations"))
    elif kind in ("argon2i", "argon2id"):
        derivation = Kdf(kind, kdf.text("salt"), time=kdf.u32("time"), memory=kdf.u32("memory"), cpus=kdf.u32("cpus"))
    else:
        derivation = Kdf(kind, "")  # not ours to use; other slots may be
    if af.text("type") != "luks1":
        af.refuse("type", repr(af.text("type")), "luks1")
    af_hash, stripes = af.text("hash"), af.u32("stripes")
    if stripes != STRIPES:
        af.refuse("stripes", str(stripes), str(STRIPES))
    if area.text("type") != "raw":
        area.refuse("type", repr(area.text("type")), "raw")
    encryption, area_key_size = area.text("encryption"), area.u32("key_size")
    priority = reader.u32("priority") if "priority" in reader else 1
    return Keyslot(
        slot.id, slot.type, slot.key_size, *place, priority, derivation, af_hash, stripes, encryption, area_key_size
    )


def dump_json(tree: Mapping[str, Any]) -> bytes:
    """Return a tree as it is written to a JSON area: as compact as cryptsetup writes it."""
    text = json.dumps(tree, separators=(",", ":"), ensure_ascii=False)
    try:
        return text.encode("utf-8", "surrogateescape")  # bytes that were no UTF-8 stay as they were
    except UnicodeEncodeError:
        return json.dumps(tree, separators=(",", ":")).encode()
