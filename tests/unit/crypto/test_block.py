"""BlockCrypto: requests become spans, and spans become pieces."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from qmpd.block.batch import Batch, Request
from qmpd.crypto.block import BlockCrypto, pieces, total
from qmpd.crypto.cipher import CipherSpec

SPEC = CipherSpec("aes", "xts", "plain64", None, 64)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), size=st.integers(1, 9))
def test_pieces_cover_everything_once_in_order(lengths: list[int], size: int) -> None:
    views = [memoryview(bytearray(length * 512)) for length in lengths]
    spans = [(1000 * i, view, view) for i, view in enumerate(views)]
    groups = pieces(spans, size * 512)
    assert all(total(group) == size * 512 for group in groups[:-1])
    assert 0 < total(groups[-1]) <= size * 512
    covered = [sector + at for group in groups for sector, _, target in group for at in range(len(target) // 512)]
    assert covered == [1000 * i + at for i, length in enumerate(lengths) for at in range(length)]
    for group in groups:
        for sector, source, target in group:
            assert source is target
            view = views[sector // 1000]
            at = sector % 1000 * 512
            marker = os.urandom(1)
            target[:1] = marker
            assert view[at : at + 1] == marker


def test_working_in_pieces_changes_nothing() -> None:
    key, plain = os.urandom(64), os.urandom(40 * 512)
    crypto = BlockCrypto(SPEC, key, first=5)
    batch = Batch([Request(1024, memoryview(plain)[: 10 * 512]), Request(1 << 40, memoryview(plain)[10 * 512 :])])
    whole, parts = bytearray(len(plain)), bytearray(len(plain))
    crypto.encrypt(crypto.onto(batch, memoryview(whole)))
    for group in pieces(crypto.onto(batch, memoryview(parts)), 7 * 512):
        crypto.encrypt(group)
    assert whole == parts
    assert whole != plain


def test_reading_back_in_place_leaves_out_failed_requests() -> None:
    crypto = BlockCrypto(SPEC, os.urandom(64))
    plain = os.urandom(1024)
    stored = bytearray(1024)
    crypto.encrypt(crypto.onto(Batch.single(0, memoryview(plain)), memoryview(stored)))
    batch = Batch([Request(0, memoryview(stored)[:512]), Request(512, memoryview(stored)[512:])])
    untouched = bytes(stored[512:])
    batch[1].fail(5)
    crypto.decrypt(crypto.in_place(batch))
    assert stored[:512] == plain[:512]
    assert stored[512:] == untouched


def test_the_source_of_a_write_is_not_changed() -> None:
    crypto = BlockCrypto(SPEC, os.urandom(64))
    source = bytes(2048)
    crypto.encrypt(crypto.onto(Batch.single(0, memoryview(source)), memoryview(bytearray(2048))))
    assert source == bytes(2048)
