"""SecretBytes gives its bytes to whom asks for a view, and to nobody by accident."""

from __future__ import annotations

import copy
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from qmpd.crypto.secretbytes import SecretBytes

PHRASE = b"correct horse battery staple"


def test_no_text_of_it_shows_the_bytes() -> None:
    secret = SecretBytes(PHRASE)
    for text in (repr(secret), str(secret), f"{secret}", "%s" % secret, repr([secret])):  # noqa: UP031
        assert "<secret 28 bytes>" in text
        assert "horse" not in text


def test_it_cannot_be_pickled_copied_hashed_or_turned_into_bytes() -> None:
    secret = SecretBytes(PHRASE)
    attempts: list[Callable[[Any], object]] = [pickle.dumps, copy.copy, copy.deepcopy, hash, bytes, iter]
    for attempt in attempts:
        with pytest.raises(TypeError) as caught:
            attempt(secret)
        assert "horse" not in "".join(traceback.format_exception(caught.value))


def test_equality_compares_contents() -> None:
    assert SecretBytes(PHRASE) == SecretBytes(PHRASE)
    assert SecretBytes(PHRASE) == PHRASE
    assert SecretBytes(PHRASE) != SecretBytes(PHRASE[:-1])
    assert SecretBytes(PHRASE) != "correct horse battery staple"
    assert SecretBytes(b"") == b""


def test_a_view_is_read_only_and_reads_zeroes_after_wipe() -> None:
    secret = SecretBytes(PHRASE)
    view = secret.view()
    assert bytes(view) == PHRASE
    with pytest.raises(TypeError):
        view[0] = 0
    secret.wipe()
    assert bytes(view) == bytes(len(PHRASE))
    assert len(secret) == 0
    secret.wipe()
    assert secret == b""


def test_take_zeroes_the_buffer_it_came_from() -> None:
    buffer = bytearray(PHRASE)
    secret = SecretBytes.take(buffer)
    assert secret == PHRASE
    assert buffer == bytes(len(PHRASE))


def test_a_clone_lives_on_when_the_original_is_wiped() -> None:
    secret = SecretBytes(PHRASE)
    other = secret.clone()
    secret.wipe()
    assert other == PHRASE


def test_leaving_the_block_wipes() -> None:
    with SecretBytes(PHRASE) as secret:
        view = secret.view()
    assert not any(view)


def test_its_pages_are_locked_in_memory_and_left_out_of_dumps() -> None:
    """Read back from /proc/self/smaps: the mapping carries `lo` (unless the limit forbids) and `dd`."""
    secret = SecretBytes(PHRASE * 1000)
    with open("/proc/self/smaps") as smaps:
        flags = [line.split()[1:] for line in smaps if line.startswith("VmFlags")]
    assert any("dd" in line for line in flags)
    assert len(secret) == 28000
