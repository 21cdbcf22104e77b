"""The client's side of option haggling: every cut of the stream, and plain text before TLS."""

from __future__ import annotations

import struct

import pytest

from qmpd.protocols import nbd_client
from qmpd.protocols.nbd import Style
from qmpd.protocols.nbd_client import ClientHandshake, ClientStage, ProtocolError
from tests.support import nbd_liar as liar
from tests.support.nbd_liar import NEWSTYLE, Script, context, info_export, info_sizes, reply
from tests.support.nbd_wire import ACK, EXTENDED, GO, LIST, SET_META, STARTTLS, STRUCTURED

ANSWERS = (
    NEWSTYLE + reply(EXTENDED, liar.UNSUP, b"no") + reply(STRUCTURED, ACK) + context() + reply(SET_META, ACK)
    + info_sizes(512, 4096, 1 << 20) + info_export() + reply(GO, ACK)
)  # fmt: skip


def handshake(*, tls: bool = False) -> ClientHandshake:
    return ClientHandshake(b"exp", b"base:allocation", tls=tls)


@pytest.mark.parametrize("step", [1, 2, 3, 7, len(ANSWERS)])
def test_the_stream_may_be_cut_anywhere(step: int) -> None:
    client = handshake()
    for at in range(0, len(ANSWERS), step):
        client.feed(ANSWERS[at : at + step])
    assert client.stage is ClientStage.READY
    found = client.result
    assert found is not None
    assert (found.size, found.style, found.context) == (liar.SIZE, Style.STRUCTURED, (1, b"base:allocation"))
    assert (found.minimum_block, found.preferred_block, found.maximum_payload) == (512, 4096, 1 << 20)


def test_an_end_at_every_byte_is_an_error_with_a_place() -> None:
    for end in range(len(ANSWERS)):
        client = handshake()
        client.feed(ANSWERS[:end])
        assert client.stage is ClientStage.OPTIONS
        assert str(client.end_of_stream()).startswith("Failed to read ")


def test_extended_headers_are_taken_first() -> None:
    client = handshake()
    client.feed(NEWSTYLE + reply(EXTENDED, ACK) + context() + reply(SET_META, ACK) + info_export() + reply(GO, ACK))
    assert client.result is not None
    assert client.result.style is Style.EXTENDED


def test_nothing_is_said_in_the_clear_when_tls_is_asked_for() -> None:
    client = handshake(tls=True)
    client.feed(NEWSTYLE)
    assert client.take_output() == struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", STARTTLS, 0)
    client.feed(reply(STARTTLS, ACK))
    assert client.stage is ClientStage.STARTTLS
    assert client.take_output() == b""
    client.tls_started()
    assert b"exp" not in client.take_output()
    client.feed(ANSWERS[len(NEWSTYLE) :])
    assert client.stage is ClientStage.READY


def test_plain_text_behind_starttls_is_an_attack() -> None:
    client = handshake(tls=True)
    with pytest.raises(ProtocolError, match="bytes ahead of the TLS handshake"):
        client.feed(NEWSTYLE + reply(STARTTLS, ACK) + reply(EXTENDED, ACK))


@pytest.mark.parametrize("code", [liar.UNSUP, liar.POLICY, ACK])
def test_a_server_without_tls_is_not_talked_to(code: int) -> None:
    client = handshake(tls=True)
    with pytest.raises(ProtocolError):
        client.feed(NEWSTYLE + reply(STARTTLS, code, b"x"))
    assert b"exp" not in client.take_output()


def test_replies_that_come_before_requests_are_refused() -> None:
    with pytest.raises(ProtocolError, match="4 bytes ahead"):
        handshake().feed(ANSWERS + b"data")


def test_an_endless_listing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_client, "MAX_REPLIES", 10)
    client = handshake()
    client.feed(NEWSTYLE + reply(EXTENDED, liar.UNSUP) + reply(STRUCTURED, liar.UNSUP) + reply(GO, liar.UNSUP))
    with pytest.raises(ProtocolError, match="lists more than 10 exports"):
        client.feed(reply(LIST, 2, struct.pack(">I", 1) + b"x") * 20)


def test_long_refusals_are_passed_over_and_endless_ones_refused() -> None:
    client = handshake()
    client.feed(NEWSTYLE + reply(EXTENDED, liar.UNSUP, bytes(1 << 20)))
    client.feed(reply(STRUCTURED, ACK))
    with pytest.raises(ProtocolError, match="longer than 33554432"):
        client.feed(reply(SET_META, liar.UNSUP, b"", length=0xFFFFFFFF))


def test_what_a_server_says_of_itself_is_shown_as_a_hint() -> None:
    client = handshake()
    client.feed(NEWSTYLE + Script().polite(EXTENDED) + Script().polite(STRUCTURED) + Script().polite(SET_META))
    with pytest.raises(ProtocolError, match="Requested export not available") as caught:
        client.feed(reply(GO, liar.UNKNOWN, b"no such thing"))
    assert caught.value.hint == "server reported: no such thing"
