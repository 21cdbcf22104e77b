"""The anti-forensic splitter."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.crypto import af
from qmpd.crypto.hashes import available
from qmpd.errors import CommandError


@given(
    key=st.binary(min_size=1, max_size=200),
    stripes=st.integers(1, 30),
    hash_name=st.sampled_from(available()),
    seed=st.randoms(use_true_random=False),
)
def test_what_was_split_is_merged_again(key: bytes, stripes: int, hash_name: str, seed: object) -> None:
    material = af.split(key, stripes, hash_name, seed.randbytes)  # type: ignore[attr-defined]
    assert len(material) == len(key) * stripes
    assert af.merge(material, len(key), stripes, hash_name) == key


def test_two_stripes_by_hand() -> None:
    """Key of 40 bytes, sha256: pieces of 32 and 8 bytes, each hashed with its number before it."""
    random = bytes(range(40))
    first = hashlib.sha256(b"\0\0\0\0" + random[:32]).digest()
    second = hashlib.sha256(b"\0\0\0\1" + random[32:]).digest()[:8]
    key = bytes(range(100, 140))
    expected = random + bytes(a ^ b for a, b in zip(first + second, key, strict=True))
    assert af.split(key, 2, "sha256", lambda length: random[:length]) == expected
    assert af.merge(expected, 40, 2, "sha256") == key


def test_one_changed_bit_destroys_the_key() -> None:
    """All of it where a digest is as long as the key; else the digest-sized piece it falls in."""
    key = bytes(64)
    for hash_name, destroyed in (("sha512", 64), ("sha1", 20)):
        material = af.split(key, 4000, hash_name)
        material[64 * 1000] ^= 1
        damaged = af.merge(material, 64, 4000, hash_name)
        assert damaged[destroyed:] == key[destroyed:]
        assert sum(map(bool, damaged[:destroyed])) > destroyed * 3 // 4


@pytest.mark.parametrize(("length", "stripes"), [(0, 1), (1, 0), (1 << 20, 4000), (-1, -1)])
def test_sizes_beyond_the_limit_are_refused_before_anything_is_made(length: int, stripes: int) -> None:
    with pytest.raises(ValueError, match="beyond"):
        af.merge(b"", length, stripes, "sha256")


def test_missing_material_is_refused() -> None:
    with pytest.raises(ValueError, match="31 bytes of key material, 32 needed"):
        af.merge(bytes(31), 16, 2, "sha256")


def test_an_unknown_hash_is_refused() -> None:
    with pytest.raises(CommandError, match="Hash algorithm 'whirlpool' not supported"):
        af.split(bytes(16), 2, "whirlpool")
