"""Compressed clusters of qcow2: zlib (raw deflate) and, where a decoder is installed, zstd."""

from __future__ import annotations

import functools
import importlib
import zlib
from typing import Any

ZLIB, ZSTD = 0, 1
"""Compression types of the header."""

_WINDOW_BITS = -15
_WRITE_WINDOW_BITS = -12
"""Raw deflate; QEMU writes and reads with a window of 12 bits, other writers may use more."""


_MEMORY_LEVEL = 9


@functools.cache
def _zstd() -> Any:
    """Return the module for zstd, None if there is none; looked for when the first image needs it."""
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def _damage(kind: int) -> type[Exception]:
    return zlib.error if kind == ZLIB else _zstd().ZstdError


def can_decompress(kind: int) -> bool:
    """Say whether clusters of this compression type can be read here."""
    return kind == ZLIB or (kind == ZSTD and _zstd() is not None)


def compress(kind: int, data: bytes | bytearray | memoryview, limit: int) -> bytes | None:
    """Return the compressed bytes of a cluster, None if they are more than `limit`. Runs in any thread."""
    packed: bytes
    if kind == ZLIB:
        packer = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, _WRITE_WINDOW_BITS, _MEMORY_LEVEL)
        packed = packer.compress(data) + packer.flush()
    else:
        packed = _zstd().compress(data)
    return packed if len(packed) <= limit else None


def decompress(kind: int, data: bytes | bytearray | memoryview, size: int) -> bytes:
    """Return the `size` bytes of a cluster; what follows the stream in `data` is ignored.

    Raises ValueError if the stream is damaged or ends early; never makes more than `size` bytes.
    """
    try:
        if kind == ZLIB:
            cluster = zlib.decompressobj(_WINDOW_BITS).decompress(data, size)
        else:
            cluster = _decompress_zstd(data, size)
    except _damage(kind) as error:
        raise ValueError(f"compressed cluster is damaged: {error}") from error
    if len(cluster) != size:
        raise ValueError(f"compressed cluster holds {len(cluster)} bytes, expected {size}")
    return cluster


def _decompress_zstd(data: bytes | bytearray | memoryview, size: int) -> bytes:
    """Decompress one frame; it may come in several pieces even where all input is there."""
    decoder = _zstd().ZstdDecompressor()
    cluster: bytes = decoder.decompress(bytes(data), size)
    while len(cluster) < size and not decoder.eof and not decoder.needs_input:
        cluster += decoder.decompress(b"", size - len(cluster))
    return cluster
