"""qcow2 tables and headers: values in and out, one rule broken at a time."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.errors import CommandError
from qmpd.formats import qcow2, qcow2_compress, qcow2_header, qcow2_snapshot
from qmpd.formats.qcow2 import COMPRESSED, COPIED, ClusterType, RefcountCodec
from qmpd.formats.qcow2_header import Header
from tests.gen.qcow2_header import BROKEN, EXTENSIONS, patched, with_extension


def image(**fields: int) -> bytes:
    """Return the first cluster of a valid version 3 image of 1 MiB with some fields changed."""
    header = Header(
        size=1 << 20, l1_size=1, l1_table_offset=3 << 16, refcount_table_offset=1 << 16, refcount_table_clusters=1
    )
    return patched(header.pack().ljust(1 << 16, b"\0"), **fields)


def opened(data: bytes, *, writable: bool = True) -> Header:
    """Check an image as far as its first cluster tells."""
    header = qcow2_header.parse(data, writable=writable)
    qcow2_header.check_encryption(header, None)
    qcow2_header.parse_extensions(header, data)
    qcow2_header.read_backing_name(header, data)
    return header


DRIVERS_OWN = ("'data-file' is required", "data-file-raw requires", "Missing CRYPTO")


@pytest.mark.parametrize(("fields", "text"), [one for one in BROKEN if not one[1].startswith(DRIVERS_OWN)], ids=str)
def test_a_broken_field_is_refused_in_the_references_words(fields: dict[str, int], text: str) -> None:
    with pytest.raises(CommandError) as caught:
        opened(image(**fields))
    assert str(caught.value) == text


def test_a_corrupt_image_may_be_read() -> None:
    assert opened(image(incompatible=2), writable=False).incompatible == qcow2_header.CORRUPT


def test_unknown_features_are_named_by_the_images_own_table() -> None:
    kind, body, length, fields = EXTENSIONS[-1]
    with pytest.raises(CommandError) as caught:
        opened(patched(with_extension(image(), kind, body, length=length), **fields))
    assert str(caught.value) == (
        "Unsupported qcow2 feature(s): frobnication, Unknown incompatible feature: 40000000000"
    )


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("cluster_bits", [9, 16])
def test_what_is_packed_is_parsed(version: int, cluster_bits: int) -> None:
    header = Header(
        version=version,
        cluster_bits=cluster_bits,
        size=12345 * 512,
        l1_size=2000,
        l1_table_offset=3 << cluster_bits,
        refcount_table_offset=1 << cluster_bits,
        refcount_table_clusters=1,
        backing_file=b"/a/base.qcow2",
        backing_format=b"qcow2",
        extensions=[(0x12345678, b"not known here")],
        unknown_fields=b"" if version == 2 else b"later123",
    )
    data = header.pack()
    assert len(data) <= 1 << cluster_bits
    found = opened(data.ljust(1 << cluster_bits, b"\0"))
    assert (found.backing_file, found.backing_format) == (b"/a/base.qcow2", b"qcow2")
    assert (0x12345678, b"not known here") in found.extensions
    assert found.unknown_fields == header.unknown_fields
    assert found.pack() == data


def test_a_header_that_does_not_fit_is_refused() -> None:
    with pytest.raises(CommandError, match="No space left"):
        Header(cluster_bits=9, backing_file=b"x" * 500).pack()


@given(st.binary(max_size=200), st.integers(0, 600))
def test_any_bytes_are_a_header_or_refused(junk: bytes, cut: int) -> None:
    data = bytearray(image())
    data[8 : 8 + len(junk)] = junk
    for text in (bytes(data), bytes(data)[:cut], b"QFI\xfb\0\0\0\3" + junk):
        try:
            opened(text)
        except CommandError:
            pass


@given(st.integers(0, 6), st.data())
def test_refcounts_of_every_width(order: int, data: st.DataObject) -> None:
    codec = RefcountCodec(order)
    values = data.draw(st.lists(st.integers(0, codec.maximum), min_size=64, max_size=64))
    table = codec.zeroes(64 * 8)
    assert codec.count(512) == len(table) == 4096 >> order
    table[: len(values)] = type(table)(table.typecode, values)
    stored = codec.pack(table)
    assert len(stored) == 512
    assert codec.unpack(stored) == table


def test_where_narrow_refcounts_lie_in_a_byte() -> None:
    assert list(RefcountCodec(0).unpack(b"\x05")) == [1, 0, 1, 0, 0, 0, 0, 0]
    assert list(RefcountCodec(1).unpack(b"\x1b")) == [3, 2, 1, 0]
    assert list(RefcountCodec(2).unpack(b"\x21")) == [1, 2]
    assert list(RefcountCodec(4).unpack(b"\x01\x02")) == [0x102]


@pytest.mark.parametrize(
    ("entry", "kind"),
    [
        (0, ClusterType.UNALLOCATED),
        (1, ClusterType.ZERO_PLAIN),
        (COPIED | 65537, ClusterType.ZERO_ALLOC),
        (COPIED | 65536, ClusterType.NORMAL),
        (65536, ClusterType.NORMAL),
        (COMPRESSED | 12345, ClusterType.COMPRESSED),
    ],
)
def test_kinds_of_entries(entry: int, kind: ClusterType) -> None:
    assert qcow2.cluster_type(entry) is kind


@given(st.integers(9, 21), st.integers(0, 1 << 40), st.integers(1, 512))
def test_compressed_descriptors(bits: int, offset: int, length: int) -> None:
    entry = qcow2.compressed_entry(offset, length, bits)
    start, room = qcow2.compressed_extent(entry, bits)
    assert start == offset
    assert length <= room < length + 512
    assert (start + room) % 512 == 0


def test_compressed_clusters_are_bounded() -> None:
    import zlib

    encoder = zlib.compressobj(9, zlib.DEFLATED, -12)
    stream = encoder.compress(bytes(1 << 24)) + encoder.flush()
    assert qcow2_compress.decompress(qcow2_compress.ZLIB, stream + b"rest of the sector", 65536) == bytes(65536)
    for bad in (b"", b"\xff" * 100, stream[:20]):
        with pytest.raises(ValueError, match="compressed cluster"):
            qcow2_compress.decompress(qcow2_compress.ZLIB, bad, 65536)


def test_snapshots() -> None:
    fixed = struct.pack(">QIHHIIQII", 65536, 1, 1, 3, 1700000000, 5, 3_000_000_007, 0, 24)
    entry = fixed + struct.pack(">QQQ", 77, 1 << 20, (1 << 64) - 1) + b"1one"
    assert qcow2_snapshot.snapshot_entry_size(entry, 0) == 72
    snapshot = qcow2_snapshot.parse_snapshot(entry)
    assert snapshot.to_qapi() == {
        "id": "1",
        "name": "one",
        "vm-state-size": 77,
        "date-sec": 1700000000,
        "date-nsec": 5,
        "vm-clock-sec": 3,
        "vm-clock-nsec": 7,
    }
    with pytest.raises(CommandError, match="Too much extra metadata in snapshot table entry 3"):
        qcow2_snapshot.snapshot_entry_size(fixed[:36] + struct.pack(">I", 1025), 3)


def directory(**changes: int) -> bytes:
    fields = {"table": 65536, "size": 1, "flags": 2, "kind": 1, "bits": 16, "name": 2, "extra": 0} | changes
    return struct.pack(">QIIBBHI", *fields.values()) + b"b0".ljust(8, b"\0")


def parsed(data: bytes, count: int = 1) -> list[qcow2_snapshot.StoredBitmap]:
    return qcow2_snapshot.parse_bitmap_directory(data, count, size=1 << 20, cluster_size=65536)


def test_bitmap_directory() -> None:
    [bitmap] = parsed(directory())
    assert bitmap.to_qapi() == {"name": "b0", "granularity": 65536, "flags": ["auto"]}
    assert parsed(directory(flags=3))[0].to_qapi()["flags"] == ["in-use", "auto"]
    assert qcow2_snapshot.pack_bitmap_directory([bitmap]) == (directory(), [bitmap])


@pytest.mark.parametrize(
    ("data", "count", "text"),
    [
        (b"", 1, "size is zero"),
        (directory() + b"x", 1, "Broken"),
        (directory(name=100), 1, "Broken"),
        (directory(extra=8), 1, "Broken"),
        (directory(name=0, extra=2), 1, "extra data is not supported"),
        (directory(), 2, "Less bitmaps"),
        (directory() + directory(), 1, "More bitmaps"),
        *(
            (directory(**fields), 1, "satisfy the constraints")
            for fields in ({"bits": 8}, {"bits": 32}, {"flags": 4}, {"kind": 0}, {"size": 0}, {"table": 512})
        ),
    ],
)
def test_bad_bitmap_directories(data: bytes, count: int, text: str) -> None:
    with pytest.raises(CommandError, match=text):
        parsed(data, count)
