"""LUKS2 headers: both copies, and the JSON with one rule broken at a time."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpd.errors import ImageError
from qmpd.formats import luks2
from qmpd.formats.luks2 import parse_binary, parse_copy
from qmpd.formats.luks2_json import dump_json, parse_json
from tests.gen import luks2 as gen

IMAGE = "h.img"


def both(data: bytes) -> list[luks2.Copy | ImageError]:
    found: list[luks2.Copy | ImageError] = []
    for i in range(2):
        try:
            found.append(parse_copy(data[i * gen.COPY :], i * gen.COPY, IMAGE))
        except ImageError as error:
            found.append(error)
    return found


def test_a_header_is_taken_apart() -> None:
    primary, secondary = both(gen.header())
    assert isinstance(primary, luks2.Copy)
    assert isinstance(secondary, luks2.Copy)
    assert luks2.choose(primary, secondary) == luks2.Found(primary, None)
    metadata = primary.metadata
    assert metadata.total_size == len(gen.header())
    assert metadata.keyslots["0"].kdf is not None
    assert metadata.keyslots["0"].kdf.iterations == 1000
    assert metadata.segments["0"].size is None
    assert (primary.uuid, primary.label) == ("01234567-89ab-4def-8123-456789abcdef", "")
    assert dump_json(metadata.tree) == dump_json(gen.tree())
    assert luks2.pack_copy(primary.binary, dump_json(metadata.tree), 0) == primary.data


@pytest.mark.parametrize("broken", gen.BROKEN, ids=lambda broken: broken.name)
def test_one_rule_broken(broken: gen.Broken) -> None:
    for found in both(broken.build()):
        assert isinstance(found, ImageError)
        assert broken.field in found.field, str(found)
        assert str(found).startswith("h.img: ")


@pytest.mark.parametrize("name", gen.jsons())
def test_areas_that_hold_no_object(name: str) -> None:
    for found in both(gen.header(text=gen.jsons()[name])):
        assert isinstance(found, ImageError)
        assert found.field == "LUKS2 JSON area"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"magic": b"LUKS\xba\xbd"}, "magic"),
        ({"version": 1}, "version"),
        ({"version": 3}, "version"),
        ({"hdr_offset": 512}, "hdr_offset"),
        ({"hdr_size": 0}, "hdr_size"),
        ({"hdr_size": 4096}, "hdr_size"),
        ({"hdr_size": 16385}, "hdr_size"),
        ({"hdr_size": 1 << 63}, "hdr_size"),
        ({"csum_alg": b"sha256" + b"\0" * 25 + b"x"}, None),
    ],
)
@pytest.mark.parametrize("index", [0, 1])
def test_one_binary_field_broken(changes: dict[str, Any], field: str | None, index: int) -> None:
    found = both(gen.with_binary(index, **changes))
    other = found[1 - index]
    assert isinstance(other, luks2.Copy)
    if field is None:
        assert isinstance(found[index], luks2.Copy)
        return
    broken = found[index]
    assert isinstance(broken, ImageError)
    assert broken.field == f"LUKS2 header {field}"
    chosen = luks2.choose(found[0], found[1])
    assert chosen.copy is other
    assert field in (chosen.problem or "")


def test_an_unknown_checksum_algorithm_is_refused() -> None:
    data = bytearray(gen.header())
    data[luks2.BinaryHeader.offset_of("csum_alg") :][:6] = b"md5\0\0\0"
    data[72:78] = b"md5\0\0\0"
    with pytest.raises(ImageError, match="csum_alg is 'md5', expected sha256 or"):
        parse_copy(bytes(data), 0, IMAGE)


@given(at=st.integers(0, 2 * gen.COPY - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_costs_one_copy_only(at: int, bit: int) -> None:
    data = bytearray(gen.header())
    data[at] ^= 1 << bit
    found = both(bytes(data))
    damaged, intact = found[at // gen.COPY], found[1 - at // gen.COPY]
    assert isinstance(intact, luks2.Copy)
    at %= gen.COPY
    beyond = luks2.BinaryHeader.offset_of("csum") + 32
    if not beyond <= at < beyond + 32:  # the field is longer than the digest
        assert isinstance(damaged, ImageError)
        assert luks2.choose(found[0], found[1]).copy is intact


@pytest.mark.parametrize(("seqids", "index"), [((5, 4), 0), ((4, 5), 1)])
def test_the_newer_copy_wins(seqids: tuple[int, int], index: int) -> None:
    primary, secondary = both(gen.header(seqids=seqids))
    found = luks2.choose(primary, secondary)
    assert found.copy is (primary, secondary)[index]
    assert found.problem is not None
    assert "older" in found.problem


def test_neither_copy() -> None:
    primary, secondary = both(bytes(2 * gen.COPY))
    with pytest.raises(ImageError, match=r"^h.img: byte 0: LUKS2 header magic is 000000000000, expected 4c554b53babe"):
        luks2.choose(primary, secondary)


def test_leftover_members_of_a_derivation_do_not_matter() -> None:
    """cryptsetup once wrote them, and drops them when it reads."""
    tree = gen.tree()
    tree["keyslots"]["0"]["kdf"]["memory"] = 5
    assert all(isinstance(found, luks2.Copy) for found in both(gen.header(tree)))


def test_unknown_kinds_pass_unused() -> None:
    tree = gen.tree()
    tree["tokens"]["3"] = {"type": "theirs", "keyslots": ["0"], "anything": [1, {"x": None}]}
    tree["config"]["requirements"] = {"mandatory": ["from-the-future"]}
    found = both(gen.header(tree))[0]
    assert isinstance(found, luks2.Copy)
    assert found.metadata.tokens["3"].members["anything"] == [1, {"x": None}]
    assert found.metadata.requirements == ("from-the-future",)


def test_white_space_around_members_is_no_matter() -> None:
    text = json.dumps(gen.tree(), indent=1).encode() + b" \n"
    assert all(isinstance(found, luks2.Copy) for found in both(gen.header(text=text)))


def test_too_many_objects_are_refused() -> None:
    tree = gen.tree()
    tree["tokens"] = {str(i): {"type": "t", "keyslots": []} for i in range(33)}
    found = both(gen.header(tree))[0]
    assert isinstance(found, ImageError)
    assert "33 objects, expected at most 32" in str(found)


def test_json_that_does_not_fit_is_not_packed() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        luks2.pack_copy(gen.binary(), b"x" * (gen.COPY - 4096), 0)


@given(seed=st.integers(0, 1 << 32))
def test_mutated_trees_are_parsed_or_refused(seed: int) -> None:
    rng = random.Random(seed)
    tree = copy.deepcopy(gen.tree())
    for _ in range(rng.randrange(1, 4)):
        place: Any = tree
        while isinstance(place, dict) and place:
            name = rng.choice(list(place))
            if rng.random() < 0.3 or not isinstance(place[name], dict):
                place[name] = rng.choice([None, True, -1, 1 << 70, 0.5, "", "0", "\ud800", [], ["0"], {}, {"0": {}}])
                break
            place = place[name]
    area = dump_json(tree)
    try:
        parse_json(area + bytes(gen.COPY - 4096 - len(area)), IMAGE, 4096)
    except ImageError:
        pass


@given(noise=st.binary(max_size=512))
def test_noise_in_the_binary_header_is_refused(noise: bytes) -> None:
    block = noise + bytes(512 - len(noise))
    with pytest.raises(ImageError):
        parse_binary(block, 0, IMAGE)


def test_the_generator_makes_what_it_says() -> None:
    changed = gen.with_binary(1, label=b"x")
    found = both(changed)[1]
    assert isinstance(found, luks2.Copy)
    assert found.label == "x"
    assert replace(found.binary, label=b"").uuid == found.binary.uuid
