"""Options of the qcow2 driver: BlockdevOptionsQcow2, and what follows from them for one image."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qmpd.block.child import Child
from qmpd.errors import CommandError
from qmpd.formats.qcow2 import MIN_CLUSTER_BITS
from qmpd.formats.qcow2_header import LAZY_REFCOUNTS, Header, check_encryption
from qmpd.units import MiB, is_power_of_two

L2_CACHE_MAX = 32 * MiB
"""Bytes of the L2 cache unless an option says otherwise; never more than the image can use."""
SLICE_LENGTH = 4096
"""Bytes read and written at once of an L2 table or refcount block, if clusters are not smaller."""
MIN_L2_TABLES = 2
MIN_REFCOUNT_BLOCKS = 4
"""Tables that each cache holds at least."""
CLEAN_INTERVAL = 600
"""Seconds after which unused slices are dropped, by default."""

_INT_MAX = (1 << 31) - 1
_UINT_MAX = (1 << 32) - 1
_LARGEST_CACHE = 1 << 38
"""Bytes that the reference could not allocate for a cache either; more is refused."""

OVERLAP_KINDS = (
    "main-header",
    "active-l1",
    "active-l2",
    "refcount-table",
    "refcount-block",
    "snapshot-table",
    "inactive-l1",
    "inactive-l2",
    "bitmap-directory",
)
CHANGEABLE = (
    "lazy-refcounts",
    "pass-discard-request",
    "pass-discard-snapshot",
    "pass-discard-other",
    "discard-no-unref",
    "overlap-check",
    "overlap-check.",
    "cache-size",
    "l2-cache-size",
    "l2-cache-entry-size",
    "refcount-cache-size",
    "cache-clean-interval",
)
"""Options that an open image may get other values of, or their defaults again."""

_TEMPLATES = {
    "none": frozenset[str](),
    "constant": frozenset(("main-header", "active-l1", "refcount-table", "snapshot-table", "bitmap-directory")),
    "cached": frozenset(OVERLAP_KINDS) - {"inactive-l2"},
    "all": frozenset(OVERLAP_KINDS),
}


@dataclass(frozen=True, slots=True, eq=False)
class Qcow2Options:
    """BlockdevOptionsQcow2; None where the image or the node decides. Sizes in bytes, times in s."""

    file: Child
    backing: Child | None = None
    lazy_refcounts: bool | None = None
    pass_discard_request: bool | None = None
    pass_discard_snapshot: bool | None = None
    pass_discard_other: bool | None = None
    discard_no_unref: bool | None = None
    overlap_check: Any = None
    cache_size: int | None = None
    l2_cache_size: int | None = None
    l2_cache_entry_size: int | None = None
    refcount_cache_size: int | None = None
    cache_clean_interval: int | None = None
    encrypt: dict[str, Any] | None = None
    data_file: Child | None = None


@dataclass(slots=True, eq=False, repr=False)
class Settings:
    """The options resolved for one image.

    l2_slices, refcount_blocks   what the caches may hold      slice_length   bytes
    pass_discard                 reasons ("request", "snapshot", "other") that reach the file
    """

    l2_slices: int = MIN_L2_TABLES
    slice_length: int = SLICE_LENGTH
    refcount_blocks: int = MIN_REFCOUNT_BLOCKS
    clean_interval: int = CLEAN_INTERVAL
    lazy_refcounts: bool = False
    discard_no_unref: bool = False
    overlap_check: frozenset[str] = _TEMPLATES["cached"]
    pass_discard: frozenset[str] = field(default_factory=frozenset)


def resolve(options: Qcow2Options, header: Header, *, unmap: bool) -> Settings:
    """Check the options against the image, in the reference's order, and return what they mean.

    unmap   the node's discard option lets requests through. Raises CommandError.
    """
    settings = Settings()
    _caches(options, header, settings)
    interval = CLEAN_INTERVAL if options.cache_clean_interval is None else options.cache_clean_interval
    if not 0 <= interval <= _UINT_MAX:
        raise CommandError("Cache clean interval too big")
    settings.clean_interval = interval
    lazy = options.lazy_refcounts
    settings.lazy_refcounts = bool(header.compatible & LAZY_REFCOUNTS) if lazy is None else lazy
    if header.version < 3 and settings.lazy_refcounts:
        raise CommandError("Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level")
    settings.overlap_check = _overlap(options.overlap_check)
    request = unmap if options.pass_discard_request is None else options.pass_discard_request
    snapshot = True if options.pass_discard_snapshot is None else options.pass_discard_snapshot
    reasons = {"request": request, "snapshot": snapshot, "other": bool(options.pass_discard_other)}
    settings.pass_discard = frozenset(name for name, passed in reasons.items() if passed)
    settings.discard_no_unref = bool(options.discard_no_unref)
    if settings.discard_no_unref and header.version < 3:
        raise CommandError("discard-no-unref is only supported since qcow2 version 3")
    encrypt = options.encrypt
    check_encryption(header, None if encrypt is None else _encryption_format(encrypt))
    return settings


def _encryption_format(encrypt: dict[str, Any]) -> str | None:
    """Return the method that the options name; tools may leave it to the image."""
    return encrypt.get("format")


def _size(value: int | None) -> int:
    """Return a size option; a negative one wraps, as it does on the reference's wire."""
    return 0 if value is None else value & (1 << 64) - 1


def _caches(options: Qcow2Options, header: Header, settings: Settings) -> None:
    cluster = header.cluster_size
    l2_tables = -(-header.size >> header.cluster_bits + header.l2_bits)
    most_l2 = max(-(-header.size // cluster), 0) * 8
    most_l2 = -(-most_l2 // cluster) * cluster if l2_tables else 0
    least_refcounts = MIN_REFCOUNT_BLOCKS * cluster
    total, l2, refcounts = _size(options.cache_size), _size(options.l2_cache_size), _size(options.refcount_cache_size)
    l2_size = min(most_l2, L2_CACHE_MAX if options.l2_cache_size is None else l2)
    if options.cache_size is not None:
        if options.l2_cache_size is not None and options.refcount_cache_size is not None:
            raise CommandError("cache-size, l2-cache-size and refcount-cache-size may not be set at the same time")
        if options.l2_cache_size is not None and l2 > total:
            raise CommandError("l2-cache-size may not exceed cache-size")
        if refcounts > total:
            raise CommandError("refcount-cache-size may not exceed cache-size")
        if options.l2_cache_size is not None:
            refcounts = total - l2_size
        elif options.refcount_cache_size is not None:
            l2_size = total - refcounts
        elif total >= most_l2 + least_refcounts:
            l2_size = most_l2
            refcounts = total - most_l2
        else:
            refcounts = min(total, least_refcounts)
            l2_size = total - refcounts
    slice_length = _size(options.l2_cache_entry_size)
    if options.l2_cache_entry_size is None:
        slice_length = min(SLICE_LENGTH, cluster)
    if not 1 << MIN_CLUSTER_BITS <= slice_length <= cluster or not is_power_of_two(slice_length):
        raise CommandError(
            f"L2 cache entry size must be a power of two between {1 << MIN_CLUSTER_BITS} and the cluster size"
            f" ({cluster})"
        )
    settings.slice_length = slice_length
    settings.l2_slices = max(l2_size // slice_length, MIN_L2_TABLES)
    settings.refcount_blocks = max(refcounts // cluster, MIN_REFCOUNT_BLOCKS)
    if settings.l2_slices > _INT_MAX:
        raise CommandError("L2 cache size too big")
    if settings.refcount_blocks > _INT_MAX:
        raise CommandError("Refcount cache size too big")
    if max(l2_size, refcounts) > _LARGEST_CACHE:
        raise CommandError("Could not allocate metadata caches")


def _overlap(value: Any) -> frozenset[str]:
    """Return the kinds of metadata to check, from the alternate of a mode and a struct of flags."""
    if value is None:
        return _TEMPLATES["cached"]
    if isinstance(value, str):
        return _TEMPLATES[value]
    chosen = set(_TEMPLATES[value.get("template") or "cached"])
    for kind in OVERLAP_KINDS:
        flag = value.get(kind)
        if flag is True:
            chosen.add(kind)
        elif flag is False:
            chosen.discard(kind)
    return frozenset(chosen)
