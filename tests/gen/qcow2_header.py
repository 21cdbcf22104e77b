"""Headers of qcow2 images with one field changed: where the fields lie, and what to put there."""

from __future__ import annotations

import struct

FIELDS = {
    "magic": (0, "I"),
    "version": (4, "I"),
    "backing_file_offset": (8, "Q"),
    "backing_file_size": (16, "I"),
    "cluster_bits": (20, "I"),
    "size": (24, "Q"),
    "crypt_method": (32, "I"),
    "l1_size": (36, "I"),
    "l1_table_offset": (40, "Q"),
    "refcount_table_offset": (48, "Q"),
    "refcount_table_clusters": (56, "I"),
    "nb_snapshots": (60, "I"),
    "snapshots_offset": (64, "Q"),
    "incompatible": (72, "Q"),
    "compatible": (80, "Q"),
    "autoclear": (88, "Q"),
    "refcount_order": (96, "I"),
    "header_length": (100, "I"),
    "compression_type": (104, "B"),
}
"""Offset and struct code of each field of the header."""

BROKEN: tuple[tuple[dict[str, int], str], ...] = (
    ({"magic": 0}, "Image is not in qcow2 format"),
    ({"version": 1}, "Unsupported qcow2 version 1"),
    ({"version": 4}, "Unsupported qcow2 version 4"),
    ({"cluster_bits": 8}, "Unsupported cluster size: 2^8"),
    ({"cluster_bits": 22}, "Unsupported cluster size: 2^22"),
    ({"cluster_bits": 2**32 - 1}, "Unsupported cluster size: 2^4294967295"),
    ({"header_length": 103}, "qcow2 header too short"),
    ({"header_length": 65537}, "qcow2 header exceeds cluster size"),
    ({"header_length": 120}, "Header extension too large"),
    ({"backing_file_offset": 65537}, "Invalid backing file offset"),
    ({"backing_file_offset": 1000, "backing_file_size": 1024}, "Backing file name too long"),
    ({"backing_file_offset": 65530, "backing_file_size": 8}, "Backing file name too long"),
    ({"compression_type": 2}, "qcow2: unknown compression type: 2"),
    ({"compression_type": 1}, "qcow2: Compression type incompatible feature bit must be set"),
    ({"incompatible": 8}, "qcow2: Compression type incompatible feature bit must not be set"),
    ({"incompatible": 32}, "Unsupported qcow2 feature(s): Unknown incompatible feature: 20"),
    ({"incompatible": 2**63 + 2}, "Unsupported qcow2 feature(s): Unknown incompatible feature: 8000000000000000"),
    ({"incompatible": 2}, "qcow2: Image is corrupt; cannot be opened read/write"),
    ({"incompatible": 4}, "'data-file' is required for this image"),
    ({"autoclear": 2}, "data-file-raw requires a data file"),
    ({"refcount_order": 7}, "Reference count entry width too large; may not exceed 64 bits"),
    ({"refcount_table_clusters": 0}, "Image does not contain a reference count table"),
    ({"refcount_table_clusters": 129}, "Reference count table too large"),
    ({"refcount_table_offset": 1}, "Reference count table offset invalid"),
    ({"refcount_table_offset": 2**63}, "Reference count table offset invalid"),
    ({"nb_snapshots": 65537}, "Snapshot table too large"),
    ({"nb_snapshots": 1, "snapshots_offset": 1}, "Snapshot table offset invalid"),
    ({"l1_size": 4194305}, "Active L1 table too large"),
    ({"l1_table_offset": 1}, "Active L1 table offset invalid"),
    ({"l1_table_offset": 2**63}, "Active L1 table offset invalid"),
    ({"size": 2**63}, "Image is too big"),
    ({"size": 2**40}, "L1 table is too small"),
    ({"l1_size": 0}, "L1 table is too small"),
    ({"crypt_method": 3}, "Unsupported encryption method 3"),
    ({"crypt_method": 2}, "Missing CRYPTO header for crypt method 2"),
)
"""Fields of a version 3 image with 64 KiB clusters and 1 MiB, and what opening it for writing says."""


def patched(image: bytes, **fields: int) -> bytes:
    """Return the image with fields of its header set."""
    data = bytearray(image)
    for name, value in fields.items():
        offset, code = FIELDS[name]
        struct.pack_into(f">{code}", data, offset, value)
    return bytes(data)


def with_extension(image: bytes, kind: int, body: bytes, *, length: int | None = None) -> bytes:
    """Return the image with one header extension and no other, whose length field may lie."""
    data = bytearray(image)
    start = struct.unpack_from(">I", data, 100)[0]
    text = struct.pack(">II", kind, len(body) if length is None else length) + body
    text = text.ljust(-(-len(text) // 8) * 8, b"\0") + bytes(8)
    data[start : start + 1024] = text.ljust(1024, b"\0")
    return bytes(data)


EXTENSIONS: tuple[tuple[int, bytes, int | None, dict[str, int]], ...] = (
    (0xE2792ACA, b"qcow2", None, {}),
    (0xE2792ACA, b"x" * 15, None, {}),
    (0xE2792ACA, b"x" * 16, None, {}),
    (0xE2792ACA, b"x", 65536, {}),
    (0x0537BE77, bytes(16), None, {}),
    (0x0537BE77, bytes(15), None, {"crypt_method": 2}),
    (0x0537BE77, struct.pack(">QQ", 1, 512), None, {"crypt_method": 2}),
    (0x23852875, bytes(23), None, {"autoclear": 1}),
    (0x23852875, bytes(24), None, {"autoclear": 1}),
    (0x23852875, bytes(24), None, {}),
    (0x23852875, struct.pack(">IIQQ", 1, 1, 32, 65536), None, {"autoclear": 1}),
    (0x23852875, struct.pack(">IIQQ", 65536, 0, 32, 65536), None, {"autoclear": 1}),
    (0x23852875, struct.pack(">IIQQ", 1, 0, 32, 65537), None, {"autoclear": 1}),
    (0x23852875, struct.pack(">IIQQ", 1, 0, 2**32, 65536), None, {"autoclear": 1}),
    (0x12345678, b"unknown", None, {}),
    (0x6803F857, bytes((0, 40)) + b"frobnication".ljust(46, b"\0"), None, {"incompatible": 1 << 40}),
    (0x6803F857, bytes((0, 40)) + b"frobnication".ljust(46, b"\0"), None, {"incompatible": 5 << 40}),
)
"""Header extensions: type, body, a false length or None, fields that go with it."""
