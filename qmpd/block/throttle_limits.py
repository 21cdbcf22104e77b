"""The limits of throttling as values: their names, their defaults, and which go together.

Model: ThrottleLimits and throttle_is_valid (QEMU util/throttle.c); texts as the reference.
"""

from __future__ import annotations

from collections.abc import Mapping

from qmpd.errors import CommandError

_RATE_MAX = 10**15
"""Bytes or requests a second that a limit may be at most."""
LENGTH_MAX = (1 << 32) - 1
"""Seconds that a burst may last at most."""
_U64 = 1 << 64

BUCKETS = ("bps-total", "bps-read", "bps-write", "iops-total", "iops-read", "iops-write")
"""The limits in the order in which they are checked."""
LIMITS = (
    *(f"{bucket}{suffix}" for bucket in (*BUCKETS[3:], *BUCKETS[:3]) for suffix in ("", "-max", "-max-length")),
    "iops-size",
)
"""Members of ThrottleLimits in the schema's order: rates a second, burst lengths in seconds, iops-size in bytes."""


def no_limits() -> dict[str, int]:
    """Return the limits of a group that limits nothing."""
    return {name: 1 if name.endswith("-length") else 0 for name in LIMITS}


def merge(old: Mapping[str, int], new: Mapping[str, int]) -> dict[str, int]:
    """Return `old` with the members of `new`, checked; negative numbers wrap as in the reference.

    Raises CommandError.
    """
    merged = dict(old)
    for suffix in ("", "-max", "-max-length"):
        for bucket in BUCKETS:
            name = bucket + suffix
            if name not in new:
                continue
            if suffix == "-max-length" and new[name] > LENGTH_MAX:
                raise CommandError(f"{name} value must be in the range [0, {LENGTH_MAX}]")
            merged[name] = new[name] % _U64
    if "iops-size" in new:
        merged["iops-size"] = new["iops-size"] % _U64
    check(merged)
    return merged


def check(limits: Mapping[str, int]) -> None:
    """Raise CommandError if the limits contradict each other."""
    for suffix in ("", "-max"):
        for kind in ("bps", "iops"):
            total, read, write = (limits[f"{kind}-{what}{suffix}"] for what in ("total", "read", "write"))
            if total and (read or write):
                raise CommandError("bps/iops/max total values and read/write values cannot be used at the same time")
    if limits["iops-size"] and not any(limits[f"iops-{what}"] for what in ("total", "read", "write")):
        raise CommandError("iops size requires an iops value to be set")
    for bucket in BUCKETS:
        _check_bucket(limits[bucket], limits[f"{bucket}-max"], limits[f"{bucket}-max-length"])


def _check_bucket(rate: int, burst: int, length: int) -> None:
    if rate > _RATE_MAX or burst > _RATE_MAX:
        raise CommandError(f"bps/iops/max values must be within [0, {_RATE_MAX}]")
    if length == 0:
        raise CommandError("the burst length cannot be 0")
    if length > 1 and burst == 0:
        raise CommandError("burst length set without burst rate")
    if burst and length > _RATE_MAX // burst:
        raise CommandError("burst length too high for this burst rate")
    if burst and not rate:
        raise CommandError("bps_max/iops_max require corresponding bps/iops values")
    if burst and burst < rate:
        raise CommandError("bps_max/iops_max cannot be lower than bps/iops")
