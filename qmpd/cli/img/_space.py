"""How much room an image takes: the sizes that `measure` tells, computed as the reference does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qmpd.cli.img._status import stretches
from qmpd.errors import CommandError
from qmpd.qapi.keyval import BOOLEANS
from qmpd.units import align_up, is_power_of_two

if TYPE_CHECKING:
    from qmpd.block.node import BlockNode

MAX_L1_BYTES = 32 << 20
MAX_CLUSTER = 2 << 20


async def qcow2_sizes(given: Mapping[str, str], virtual_size: int, source: BlockNode | None) -> tuple[int, int]:
    """Return the bytes that a new qcow2 image takes for its content, and when all of it is allocated.

    given   creation options as text        source   what would be converted, None for an empty image
    Raises CommandError, OSError.
    """
    cluster = int(given.get("cluster_size", "65536"))
    bits = int(given.get("refcount_bits", "16"))
    extended = BOOLEANS.get(given.get("extended_l2", "off"), False)
    if not is_power_of_two(cluster) or not 512 <= cluster <= MAX_CLUSTER:
        raise CommandError("Cluster size must be a power of two between 512 and 2048k")
    if not is_power_of_two(bits) or bits > 64:
        raise CommandError("Refcount width must be a power of two and may not exceed 64 bits")
    entry = 16 if extended else 8
    virtual_size = align_up(virtual_size, cluster)
    tables = -(-virtual_size // cluster // (cluster // entry))
    if tables * 8 > MAX_L1_BYTES:
        raise CommandError("The image size is too large (try using a larger cluster size)")
    required = 0
    if given.get("preallocation") in ("full", "falloc") or (source is not None and "backing_file" in given):
        required = virtual_size
    elif source is not None:
        done = 0
        async for one in stretches(source, 0, source.size):
            if one.zero or not (one.data and one.present):
                continue
            start, end = one.start - one.start % cluster, align_up(one.end, cluster)
            required += max(end - max(start, done), 0)
            done = max(done, end)
    full = _with_metadata(virtual_size, cluster, bits, entry)
    return full - virtual_size + required, full


def _with_metadata(size: int, cluster: int, refcount_bits: int, entry: int) -> int:
    """Return the bytes of a file with every cluster of `size` bytes allocated."""
    entries = align_up(size // cluster, cluster // entry)
    metadata = cluster + entries * entry
    metadata += align_up(entries * entry // cluster, cluster // 8) * 8
    clusters = (metadata + size) // cluster
    per_block = cluster * 8 // refcount_bits
    blocks = table = 0
    total = -1
    while total != clusters + blocks + table:
        total = clusters + blocks + table
        blocks = -(-total // per_block)
        table = -(-blocks // (cluster // 8))
    return size + metadata + (blocks + table) * cluster
