"""Sizes: constants, alignment, and the texts people write and read."""

from __future__ import annotations

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40
SECTOR = 512
"""Bytes in the sector that QEMU's interfaces and LUKS1 count in."""

_SUFFIXES = {"B": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}


def align_down(value: int, alignment: int) -> int:
    """Round `value` down to a multiple of `alignment` (any positive integer)."""
    return value - value % alignment


def align_up(value: int, alignment: int) -> int:
    """Round `value` up to a multiple of `alignment` (any positive integer)."""
    return -(-value // alignment) * alignment


def is_power_of_two(value: int) -> bool:
    """Say whether `value` is 1, 2, 4, ..."""
    return value > 0 and value & (value - 1) == 0


def parse_size(text: str) -> int:
    """Return the bytes that a size such as "10G", "1.5M", "0x200" or "512" stands for.

    The suffixes are powers of 1024, upper or lower case. Raises ValueError for anything else, and
    for what does not fit in 64 bits.
    """
    body = text.strip()
    if not body:
        raise ValueError("a size may not be empty")
    if body[:2].lower() == "0x":
        value = int(body, 16)
    else:
        shift = 0
        if body[-1].upper() in _SUFFIXES:
            shift = _SUFFIXES[body[-1].upper()]
            body = body[:-1]
        whole, dot, fraction = body.partition(".")
        if not whole.isascii() or not whole.isdigit() or (dot and not (fraction.isascii() and fraction.isdigit())):
            raise ValueError(f"'{text}' is not a size")
        value = int(whole) << shift
        if fraction:
            unit = 10 ** len(fraction)
            value += ((int(fraction) << shift) + unit // 2) // unit
    if value >= 1 << 64:
        raise ValueError(f"'{text}' is more than 64 bits can hold")
    return value


def human_size(value: int) -> str:
    """Return `value` bytes as QEMU prints them: three significant digits and a binary unit."""
    exponent = 0
    while exponent < 6 and value / (1 << 10 * exponent) >= 1000:
        exponent += 1
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    return f"{value / (1 << 10 * exponent):0.3g} {units[exponent]}"
