"""NBD option haggling: what the server answers, byte for byte, and what it takes from liars.

Where a text is compared it is the one that qemu-storage-daemon 10.0.2 sends (tests/peers/test_nbd_wire.py
asks it again).
"""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qmpd.protocols.nbd import ALLOCATION, DEPTH, ExportInfo, Style, TransmissionFlag
from qmpd.protocols.nbd_handshake import Agreement, Handshake, Stage
from tests.support import nbd_wire as wire
from tests.support.nbd_wire import info_data, meta_data, option

READ_ONLY = TransmissionFlag(0x50F)
WRITABLE = TransmissionFlag(0xD6D)
EXPORTS = {
    b"ro": ExportInfo(b"ro", b"text", 65536, READ_ONLY),
    b"d": ExportInfo(b"d", None, 1 << 20, WRITABLE, contexts=((0, ALLOCATION), (1, DEPTH))),
    b"luks": ExportInfo(b"luks", None, 1 << 20, WRITABLE, minimum_block=512),
}
GREETING = b"NBDMAGICIHAVEOPT\0\3"
FIXED = b"\0\0\0\3"
ERR = {
    "UNSUP": 0x80000001, "POLICY": 0x80000002, "INVALID": 0x80000003, "TLS_REQD": 0x80000005,
    "UNKNOWN": 0x80000006, "BLOCK_SIZE_REQD": 0x80000008, "TOO_BIG": 0x80000009, "EXT_HEADER_REQD": 0x8000000A,
}  # fmt: skip


class Names:
    """The server's exports."""

    def find(self, name: bytes) -> ExportInfo | None:
        return EXPORTS.get(name)

    def listed(self) -> list[ExportInfo]:
        return list(EXPORTS.values())


def session(*, tls: bool = False, flags: bytes = FIXED) -> Handshake:
    handshake = Handshake(Names(), offer_tls=tls)
    assert handshake.take_output() == GREETING
    handshake.feed(flags)
    return handshake


def replies(handshake: Handshake) -> list[tuple[int, int, bytes]]:
    """Return (option, type, data) of what is to be sent."""
    data, found = handshake.take_output(), []
    while data:
        magic, number, kind, length = struct.unpack(">8sIII", data[:20])
        assert magic == wire.REPLY_MAGIC
        found.append((number, kind, data[20 : 20 + length]))
        data = data[20 + length :]
    return found


def ask(handshake: Handshake, number: int, data: bytes = b"", length: int | None = None) -> list[tuple[int, bytes]]:
    handshake.feed(option(number, data, length))
    found = replies(handshake)
    assert all(echoed == number for echoed, _, _ in found)
    return [(kind, data) for _, kind, data in found]


HEX = [
    # what the client sends after its flags, what comes back
    (option(99), "0003e889045565a9 00000063 80000001 00000021" + b"Unsupported option 99 (<unknown>)".hex()),
    (option(wire.STRUCTURED), "0003e889045565a9 00000008 00000001 00000000"),
    (option(wire.ABORT), "0003e889045565a9 00000002 00000001 00000000"),
    (
        option(wire.GO, info_data(b"d")),
        "0003e889045565a9 00000007 00000003 0000000e 0003 00000001 00001000 02000000"
        "0003e889045565a9 00000007 00000003 0000000c 0000 0000000000100000 0d6d"
        "0003e889045565a9 00000007 00000001 00000000",
    ),
    (option(wire.EXPORT_NAME, b"d"), "0000000000100000 0d6d"),
    (
        option(wire.STRUCTURED) + option(wire.SET_META, meta_data(b"d", b"base:allocation")),
        "0003e889045565a9 00000008 00000001 00000000"
        "0003e889045565a9 0000000a 00000004 00000013 00000000" + b"base:allocation".hex() + "0003e889045565a9 0000000a"
        "00000001 00000000",
    ),
]


@pytest.mark.parametrize(("sent", "answer"), HEX)
def test_bytes_on_the_wire(sent: bytes, answer: str) -> None:
    handshake = session()
    handshake.feed(sent)
    assert handshake.take_output() == bytes.fromhex(answer)


def test_old_clients_get_the_padding() -> None:
    for flags, padding in ((b"\0\0\0\1", 124), (b"\0\0\0\0", 124), (b"\0\0\0\2", 0)):
        handshake = session(flags=flags)
        handshake.feed(option(wire.EXPORT_NAME, b"ro"))
        assert handshake.take_output() == bytes.fromhex("0000000000010000 050f") + bytes(padding)
        assert handshake.stage is Stage.TRANSMISSION


LONG = b"n" * 4096
REFUSALS = [
    (wire.LIST, b"x", "INVALID", "option 'list' has unexpected length"),
    (wire.STARTTLS, b"", "POLICY", "TLS not configured"),
    (wire.STARTTLS, b"x", "INVALID", "option 'starttls' has unexpected length"),
    (wire.STRUCTURED, b"x", "INVALID", "option 'structured reply' has unexpected length"),
    (wire.EXTENDED, b"x", "INVALID", "option 'extended headers' has unexpected length"),
    (wire.INFO, b"", "INVALID", "Inconsistent lengths in option info"),
    (wire.GO, b"\0\0", "INVALID", "Inconsistent lengths in option go"),
    (wire.GO, info_data(b"d", 1, 2)[:-1], "INVALID", "Inconsistent lengths in option go"),
    (wire.INFO, info_data(b"d") + b"x", "INVALID", "option 'info' has unexpected length"),
    (wire.INFO, info_data(LONG + b"n"), "INVALID", "Invalid name length: 4097"),
    (wire.INFO, b"\xff\xff\xff\xff\0\0", "INVALID", "Invalid name length: 4294967295"),
    (wire.INFO, info_data(LONG), "UNKNOWN", f"export '{'n' * 80}...' not present"),
    (wire.INFO, info_data(b""), "UNKNOWN", "export '' not present"),
    (wire.LIST_META, b"", "INVALID", "Inconsistent lengths in option list meta context"),
    (wire.LIST_META, meta_data(b"nosuch"), "UNKNOWN", "export 'nosuch' not present"),
    (wire.LIST_META, meta_data(b"d", count=1), "INVALID", "Inconsistent lengths in option list meta context"),
    (wire.LIST_META, meta_data(b"d") + b"z", "INVALID", "option 'list meta context' has unexpected length"),
    (
        wire.SET_META, meta_data(b"d", b"base:allocation"), "INVALID",
        "request option 'set meta context' when structured reply is not negotiated",
    ),
    (4, b"", "UNSUP", "Unsupported option 4 (<unknown>)"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "data", "code", "text"), REFUSALS)
def test_a_refused_option_leaves_the_session_usable(number: int, data: bytes, code: str, text: str) -> None:
    handshake = session()
    assert ask(handshake, number, data) == [(ERR[code], text.encode())]
    assert ask(handshake, wire.STRUCTURED) == [(wire.ACK, b"")]


def test_the_list_names_every_export_with_its_description() -> None:
    assert ask(session(), wire.LIST) == [
        (2, b"\0\0\0\2rotext"),
        (2, b"\0\0\0\1d"),
        (2, b"\0\0\0\4luks"),
        (wire.ACK, b""),
    ]


def test_info_answers_what_was_asked_and_what_the_client_must_know() -> None:
    answers = ask(session(), wire.INFO, info_data(b"ro", 1, 3, 9))
    assert [data[:2].hex() for kind, data in answers if kind == 3] == ["0001", "0002", "0003", "0000"]
    assert answers[-1] == (wire.ACK, b"")


def test_block_sizes_bind_only_clients_that_asked() -> None:
    def minimum(answers: list[tuple[int, bytes]]) -> int:
        return next(struct.unpack(">I", data[2:6])[0] for kind, data in answers if data[:2] == b"\0\3" and kind == 3)

    handshake = session()
    answers = ask(handshake, wire.INFO, info_data(b"luks"))
    assert minimum(answers) == 512
    assert answers[-1] == (ERR["BLOCK_SIZE_REQD"], b"request NBD_INFO_BLOCK_SIZE to use this export")
    assert minimum(ask(handshake, wire.INFO, info_data(b"luks", 3))) == 512
    assert minimum(ask(session(), wire.GO, info_data(b"luks"))) == 1
    assert minimum(ask(session(), wire.GO, info_data(b"luks", 3))) == 512


def test_structured_replies_and_extended_headers_are_agreed_once() -> None:
    handshake = session()
    assert ask(handshake, wire.STRUCTURED) == [(wire.ACK, b"")]
    assert ask(handshake, wire.STRUCTURED) == [(ERR["INVALID"], b"structured reply already negotiated")]
    assert ask(handshake, wire.EXTENDED) == [(wire.ACK, b"")]
    assert ask(handshake, wire.EXTENDED) == [(ERR["INVALID"], b"extended headers already negotiated")]
    assert ask(handshake, wire.STRUCTURED) == [(ERR["EXT_HEADER_REQD"], b"extended headers already negotiated")]


LISTED = [
    ((), [ALLOCATION, DEPTH]),
    ((b"base:",), [ALLOCATION]),
    ((b"qemu:",), [DEPTH]),
    ((b"qemu:allocation-depth", b"base:allocation"), [ALLOCATION, DEPTH]),
    ((b"qemu:dirty-bitmap:",), []),
    ((b"foo:", b"nocolon", b"", b"base:allocationx", b"x" * 5000), []),
]


@pytest.mark.parametrize(("queries", "names"), LISTED)
def test_contexts_are_listed_by_query(queries: tuple[bytes, ...], names: list[bytes]) -> None:
    answers = ask(session(), wire.LIST_META, meta_data(b"d", *queries))
    assert answers == [*((4, b"\0\0\0\0" + name) for name in names), (wire.ACK, b"")]


def agreed(handshake: Handshake, name: bytes = b"d") -> Agreement:
    ask(handshake, wire.GO, info_data(name))
    assert handshake.agreement is not None
    return handshake.agreement


def test_only_the_last_selection_for_the_same_export_counts() -> None:
    handshake = session()
    ask(handshake, wire.STRUCTURED)
    assert ask(handshake, wire.SET_META, meta_data(b"d", b"base:")) == [(wire.ACK, b"")]
    assert len(ask(handshake, wire.SET_META, meta_data(b"d", b"base:allocation", b"base:allocation"))) == 2
    assert ask(handshake, wire.SET_META, meta_data(b"d", b"qemu:allocation-depth")) == [
        (4, b"\0\0\0\1qemu:allocation-depth"),
        (wire.ACK, b""),
    ]
    assert agreed(handshake).contexts == ((1, DEPTH),)


@pytest.mark.parametrize(
    "spoiler", [meta_data(b"d"), meta_data(b"nosuch", ALLOCATION), b"", meta_data(b"ro", ALLOCATION)]
)
def test_a_later_selection_that_fails_or_means_another_export_leaves_none(spoiler: bytes) -> None:
    handshake = session()
    ask(handshake, wire.STRUCTURED)
    ask(handshake, wire.SET_META, meta_data(b"d", ALLOCATION))
    ask(handshake, wire.SET_META, spoiler)
    assert agreed(handshake).contexts == ()


def test_the_payload_form_of_block_status_needs_extended_headers_and_contexts() -> None:
    for options, flag in (((wire.STRUCTURED,), 0), ((wire.EXTENDED,), 0), ((wire.EXTENDED, wire.SET_META), 1 << 12)):
        handshake = session()
        for number in options:
            ask(handshake, number, meta_data(b"d", ALLOCATION) if number == wire.SET_META else b"")
        assert agreed(handshake).flags == WRITABLE | TransmissionFlag.SEND_DF | flag


# what ends a session


@pytest.mark.parametrize("flags", [b"\0\0\0\4", b"\0\0\0\7", b"\xff\xff\xff\xff"])
def test_unknown_client_flags_end_the_session(flags: bytes) -> None:
    """Regression: flags beside known ones passed, for ~ on an IntFlag only inverts the flags it knows."""
    handshake = session(flags=flags)
    assert handshake.stage is Stage.CLOSED
    assert handshake.take_output() == b""


@pytest.mark.parametrize(
    "sent",
    [
        b"IHAVEOP?" + bytes(8),
        option(99, length=(32 << 20) + 1),
        option(wire.LIST, length=0xFFFFFFFF),
        option(wire.EXPORT_NAME, b"nosuch"),
        option(wire.EXPORT_NAME, b"n" * 4097),
        option(wire.EXTENDED) + option(wire.EXPORT_NAME, b"d"),
    ],
)
def test_what_cannot_be_answered_ends_the_session(sent: bytes) -> None:
    handshake = session()
    handshake.feed(sent)
    assert handshake.stage is Stage.CLOSED
    assert handshake.reason


def test_a_client_without_fixed_newstyle_may_only_name_an_export() -> None:
    handshake = session(flags=b"\0\0\0\0")
    handshake.feed(option(wire.LIST))
    assert handshake.stage is Stage.CLOSED


# long options


@pytest.mark.parametrize("length", [256 * 1024 + 1, 32 << 20])
@pytest.mark.parametrize("number", [99, wire.LIST, wire.SET_META, wire.GO])
def test_long_option_data_is_passed_over_and_not_kept(number: int, length: int) -> None:
    handshake = session()
    handshake.feed(option(number, length=length))
    piece = bytes(64 * 1024)
    left = length
    while left:
        assert handshake.take_output() == b""
        assert len(handshake._buffer) == 0
        handshake.feed(piece[: min(left, len(piece))])
        left -= min(left, len(piece))
    code = {99: "UNSUP", wire.LIST: "INVALID"}.get(number, "TOO_BIG")
    assert [kind for _, kind, _ in replies(handshake)] == [ERR[code]]
    assert ask(handshake, wire.STRUCTURED) == [(wire.ACK, b"")]


# TLS


def test_before_tls_nothing_is_told() -> None:
    handshake = session(tls=True)
    for number in (0, wire.LIST, wire.INFO, wire.GO, wire.STRUCTURED, wire.LIST_META, wire.SET_META, wire.EXTENDED, 99):
        [(kind, _)] = ask(handshake, number, b"some data")
        assert kind == ERR["TLS_REQD"]
    assert ask(handshake, wire.STARTTLS, b"x") == [(ERR["INVALID"], b"option 'starttls' has unexpected length")]
    assert ask(handshake, wire.STARTTLS) == [(wire.ACK, b"")]
    assert handshake.stage is Stage.STARTTLS


@pytest.mark.parametrize("number", [wire.EXPORT_NAME, wire.ABORT])
def test_before_tls_these_end_the_session(number: int) -> None:
    handshake = session(tls=True)
    handshake.feed(option(number))
    assert handshake.stage is Stage.CLOSED


def test_with_tls_the_options_are_there_and_tls_is_not_started_twice() -> None:
    handshake = session(tls=True)
    ask(handshake, wire.STARTTLS)
    handshake.tls_started()
    assert ask(handshake, wire.STARTTLS) == [(ERR["INVALID"], b"TLS already enabled")]
    assert ask(handshake, wire.LIST)[-1] == (wire.ACK, b"")
    ask(handshake, wire.STRUCTURED)
    assert agreed(handshake).style is Style.STRUCTURED


@pytest.mark.parametrize("injected", [b"I", option(wire.STRUCTURED), option(wire.GO, info_data(b"d"))])
def test_bytes_in_the_clear_behind_starttls_end_the_session(injected: bytes) -> None:
    """What a man in the middle adds must not be read as if it had come through TLS."""
    handshake = session(tls=True)
    handshake.feed(option(wire.STARTTLS) + injected)
    assert handshake.stage is Stage.CLOSED
    assert handshake.take_output() == b""


# any split


OPTIONS = st.lists(
    st.one_of(
        st.builds(option, st.sampled_from([0, 2, 3, 4, 5, 8, 9, 10, 11, 99]), st.binary(max_size=20)),
        st.builds(
            lambda number, name, infos: option(number, info_data(name, *infos)),
            st.sampled_from([wire.INFO, wire.GO]),
            st.sampled_from([b"d", b"ro", b"luks", b"nosuch", b""]),
            st.lists(st.integers(0, 9), max_size=4),
        ),
        st.builds(
            lambda number, name, queries: option(number, meta_data(name, *queries)),
            st.sampled_from([wire.LIST_META, wire.SET_META]),
            st.sampled_from([b"d", b"ro", b"nosuch"]),
            st.lists(st.sampled_from([b"base:", b"base:allocation", b"qemu:", DEPTH, b"x"]), max_size=4),
        ),
        st.binary(max_size=30),
    ),
    max_size=8,
)


@example([option(wire.ABORT, b"data")], FIXED, [], True)
@given(OPTIONS, st.sampled_from([FIXED, b"\0\0\0\1", b"\0\0\0\0"]), st.lists(st.integers(0, 400)), st.booleans())
def test_any_split_of_the_stream_gives_the_same_replies(
    options: list[bytes], flags: bytes, cuts: list[int], tls: bool
) -> None:
    stream = flags + b"".join(options)

    def run(pieces: list[bytes]) -> tuple[bytes, Stage, Agreement | None]:
        handshake = Handshake(Names(), offer_tls=tls)
        sent, rest = b"", b""
        for position, piece in enumerate(pieces):
            handshake.feed(piece)
            if handshake.stage is not Stage.OPTIONS:
                rest = b"".join(pieces[position + 1 :])
                break
        sent = handshake.take_output()
        found = handshake.agreement
        if found is not None:  # what the client sent ahead may have arrived or not
            found = Agreement(found.export, found.style, found.contexts, found.flags, found.rest + rest)
        return sent, handshake.stage, found

    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    pieces = [stream[low:high] for low, high in itertools.pairwise(edges)]
    if tls and option(wire.STARTTLS) in stream:  # there a split may matter: bytes behind it are an attack
        return
    assert run(pieces) == run([stream]) == run([stream[at : at + 1] for at in range(len(stream))])
