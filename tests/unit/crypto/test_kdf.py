"""Key derivation: published vectors, limits, calibration."""

from __future__ import annotations

import pytest

from qmpd.crypto import kdf
from qmpd.crypto.hashes import NAMES, available, digest_size
from qmpd.errors import CommandError


@pytest.mark.parametrize(
    ("hash_name", "password", "salt", "iterations", "expected"),
    [
        # RFC 6070
        ("sha1", b"password", b"salt", 2, "ea6c014dc72d6f8ccd1ed92ace1d41f0d8de8957"),
        # RFC 7914, section 11
        (
            "sha256",
            b"passwd",
            b"salt",
            1,
            "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc"
            "49ca9cccf179b645991664b39d77ef317c71b845b1e30bd509112041d3a19783",
        ),
        (
            "sha256",
            b"Password",
            b"NaCl",
            80000,
            "4ddcd8f60b98be21830cee5ef22701f9641a4418d04c0414aeff08876b34ab56"
            "a1d425a1225833549adb841b51c9b3176a272bdebba1d078478f62b397f33c8d",
        ),
    ],
)
def test_published_vectors(hash_name: str, password: bytes, salt: bytes, iterations: int, expected: str) -> None:
    assert kdf.pbkdf2(hash_name, password, salt, iterations, len(expected) // 2).hex() == expected


@pytest.mark.parametrize("count", [0, kdf.MAX_PBKDF2_ITERATIONS + 1, (1 << 32) - 1])
def test_counts_out_of_range_are_refused_before_any_work(count: int) -> None:
    with pytest.raises(CommandError, match=f"asks for {count} PBKDF2 iterations, expected 1 to 200000000"):
        kdf.pbkdf2("sha256", b"x", b"y", count, 32)


def test_a_time_buys_iterations() -> None:
    rate = kdf.pbkdf2_rate("sha256", 32)
    assert kdf.iterations_for("sha256", 32, 1000) == rate
    assert kdf.iterations_for("sha256", 32, 500) == rate // 2
    assert kdf.iterations_for("sha256", 32, 0) == kdf.MIN_ITERATIONS


def test_a_time_beyond_what_the_header_holds_has_the_reference_text() -> None:
    with pytest.raises(CommandError, match=r"^PBKDF iterations \d+ larger than 4294967295: Numerical result out of"):
        kdf.iterations_for("sha256", 32, 10**11)


def test_hashes() -> None:
    assert set(available()) <= set(NAMES)
    assert {"sha1", "sha224", "sha256", "sha384", "sha512"} <= set(available())
    assert [digest_size(name) for name in ("sha1", "sha256", "sha512")] == [20, 32, 64]


@pytest.mark.parametrize("name", ["foohash", "", "SHA256", "blake2b", "sha3_256"])
def test_unknown_hashes_are_refused_by_name(name: str) -> None:
    with pytest.raises(CommandError) as caught:
        digest_size(name)
    assert str(caught.value) == f"Hash algorithm '{name}' not supported"
