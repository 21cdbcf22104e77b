"""LUKS1 headers: parsed, packed, and refused with one rule broken at a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.crypto.cipher import CipherSpec
from qmpd.errors import CommandError, QmpdError
from qmpd.formats import luks1
from qmpd.formats.luks1 import parse_header
from tests.gen import luks1 as gen


@pytest.mark.parametrize("detached", [False, True])
def test_a_header_survives_the_round_trip(detached: bool) -> None:
    data = gen.header(detached=detached)
    header = parse_header(data, detached=detached)
    assert header.pack() == data[: luks1.HEADER_SIZE]
    assert header.spec == CipherSpec("aes", "xts", "plain64", None, 32)
    assert header.uuid == "01234567-89ab-4def-8123-456789abcdef"
    assert header.payload_offset == (0 if detached else 1052672)
    assert [slot.enabled for slot in header.slots] == [True] + [False] * 7


def test_info_is_what_the_reference_shows() -> None:
    info = parse_header(gen.header(detached=False), detached=False).info()
    assert info.pop("slots") == [
        {"active": True, "key-offset": 4096, "iters": 1000, "stripes": 4000},
        *({"active": False, "key-offset": 4096 + i * 131072} for i in range(1, 8)),
    ]
    assert info == {
        "cipher-alg": "aes-128",
        "cipher-mode": "xts",
        "ivgen-alg": "plain64",
        "hash-alg": "sha256",
        "detached-header": False,
        "payload-offset": 1052672,
        "master-key-iters": 1000,
        "uuid": "01234567-89ab-4def-8123-456789abcdef",
    }


def test_info_names_the_hash_of_essiv_only() -> None:
    essiv = gen.patched(gen.header(detached=False), (gen.at("cipher_mode"), b"cbc-essiv:sha256\0"))
    assert parse_header(essiv, detached=False).info()["ivgen-hash-alg"] == "sha256"
    plain = gen.patched(gen.header(detached=False), (gen.at("cipher_mode"), b"cbc-plain64:sha1\0"))
    assert "ivgen-hash-alg" not in parse_header(plain, detached=False).info()


def test_a_detached_header_with_an_offset_keeps_it_and_is_shown_as_attached() -> None:
    """The reference tells the two apart by the offset alone."""
    data = gen.patched(gen.header(detached=True), (gen.at("payload_offset"), gen.u32(7)))
    header = parse_header(data, detached=True)
    assert header.payload_offset == 3584
    assert header.info()["detached-header"] is False


@pytest.mark.parametrize(
    ("key_bytes", "expected"), [(16, (65536, 528384)), (32, (131072, 1052672)), (64, (258048, 2068480))]
)
def test_layout_is_the_reference_layout(key_bytes: int, expected: tuple[int, int]) -> None:
    assert luks1.layout_length(key_bytes) == expected


@pytest.mark.parametrize("detached", [False, True], ids=["whole", "detached"])
@pytest.mark.parametrize("broken", gen.BROKEN, ids=lambda broken: broken.name)
def test_one_rule_broken(broken: gen.Broken, detached: bool) -> None:
    data = gen.patched(gen.header(detached=detached), *broken.patches)
    assert data != gen.header(detached=detached) or broken.patches == ((gen.at("payload_offset"), gen.u32(0)),)
    expected = broken.detached if detached else broken.whole
    if expected in ("", gen.INVALID):
        parse_header(data, detached=detached)
        return
    with pytest.raises(CommandError) as caught:
        parse_header(data, detached=detached)
    assert str(caught.value) == expected


@pytest.mark.parametrize("length", [0, 5, 207, 591])
def test_a_short_buffer_is_a_mistake_of_the_caller(length: int) -> None:
    with pytest.raises(ValueError, match="takes"):
        parse_header(gen.header(detached=True)[:length], detached=True)


@given(
    changes=st.lists(st.tuples(st.integers(0, luks1.HEADER_SIZE - 1), st.integers(0, 255)), min_size=1, max_size=8),
    detached=st.booleans(),
)
def test_mutated_headers_are_parsed_or_refused(changes: list[tuple[int, int]], detached: bool) -> None:
    data = bytearray(gen.header(detached=detached)[: luks1.HEADER_SIZE])
    for offset, value in changes:
        data[offset] = value
    try:
        header = parse_header(data, detached=detached)
    except QmpdError:
        return
    assert header.material_length <= 4000 * 64
    assert header.pack() == data


@given(data=st.binary(min_size=luks1.HEADER_SIZE, max_size=luks1.HEADER_SIZE + 10))
def test_noise_behind_the_magic_is_refused(data: bytes) -> None:
    with pytest.raises(CommandError):
        parse_header(b"LUKS\xba\xbe\0\1" + data[8:], detached=True)
