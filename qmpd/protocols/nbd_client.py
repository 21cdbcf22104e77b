"""The client's side of NBD option haggling: bytes in, bytes out, no socket.

`ClientHandshake.feed` takes what arrived, `take_output` gives what is to be sent, and `stage` says what
happens next. Everything the server says is checked before it is used, and an error names what was wrong.
Source: proto.md, "Handshake" and "Option types"; the order of options, and the texts, are those of QEMU's client.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Generator
from dataclasses import dataclass, replace

from qmpd.protocols.nbd import (
    MAX_PAYLOAD,
    MAX_STRING,
    NBD_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    Style,
    TransmissionFlag,
)

OLDSTYLE_MAGIC = 0x00420281861253
"""Second magic of a server that knows no options."""

MAX_OPTION_REPLY = 32 << 20
"""Bytes that a server may send in one option reply, QEMU's limit; what nobody wants is not kept."""

MAX_KEPT_REPLY = 64 << 10
"""Bytes of an option reply that are kept: names and texts are 4096 at most each."""

MAX_REPLIES = 100_000
"""Replies to one option: a listing may be long, but has an end."""

_REPLY = struct.Struct(">QIII")
_OPTION_NAMES: dict[int, str] = {
    Option.EXPORT_NAME: "export name",
    Option.ABORT: "abort",
    Option.LIST: "list",
    Option.STARTTLS: "starttls",
    Option.INFO: "info",
    Option.GO: "go",
    Option.STRUCTURED_REPLY: "structured reply",
    Option.LIST_META_CONTEXT: "list meta context",
    Option.SET_META_CONTEXT: "set meta context",
    Option.EXTENDED_HEADERS: "extended headers",
}
_REPLY_NAMES: dict[int, str] = {
    OptionReply.ACK: "ack",
    OptionReply.SERVER: "server",
    OptionReply.INFO: "info",
    OptionReply.META_CONTEXT: "meta context",
    OptionReply.ERR_UNSUP: "unsupported",
    OptionReply.ERR_POLICY: "denied by policy",
    OptionReply.ERR_INVALID: "invalid",
    OptionReply.ERR_PLATFORM: "platform lacks support",
    OptionReply.ERR_TLS_REQD: "TLS required",
    OptionReply.ERR_UNKNOWN: "export unknown",
    OptionReply.ERR_SHUTDOWN: "server shutting down",
    OptionReply.ERR_BLOCK_SIZE_REQD: "block size required",
    OptionReply.ERR_TOO_BIG: "option payload too big",
    OptionReply.ERR_EXT_HEADER_REQD: "extended headers required",
}
_ERROR_BIT = 1 << 31


class ClientStage(enum.Enum):
    """What the owner of the connection does next."""

    OPTIONS = "options"
    STARTTLS = "starttls"
    READY = "ready"


class ProtocolError(Exception):
    """The server broke the protocol, or refused; `hint` is what it said about it."""

    def __init__(self, text: str, *, hint: str | None = None) -> None:
        super().__init__(text)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Negotiated:
    """What holds in the transmission phase.

    size           bytes                        flags            what the server can do
    minimum_block  bytes, a power of two; 0 if the server did not say
    preferred_block, maximum_payload  bytes     context          (id, name) of the selected metadata context
    """

    size: int
    flags: TransmissionFlag
    style: Style = Style.SIMPLE
    minimum_block: int = 0
    preferred_block: int = 0
    maximum_payload: int = MAX_PAYLOAD
    context: tuple[int, bytes] | None = None


Steps = Generator[int, bytes, None]
"""A conversation: yields how many bytes it needs and is sent exactly those."""


@dataclass(slots=True)
class _Reply:
    """One option reply; `length` bytes follow it on the wire."""

    code: int
    length: int


class ClientHandshake:
    """One handshake, for the export `name`.

    context   the metadata context to ask for     tls   the connection must become a TLS one
    extended  64-bit headers are asked for first
    """

    def __init__(self, name: bytes, context: bytes, *, tls: bool, extended: bool = True) -> None:
        self._name, self._context, self._tls, self._extended = name, context, tls, extended
        self._buffer = bytearray()
        self._steps = self._run()
        self._phase = "initial magic"
        self.output = bytearray()
        self.stage = ClientStage.OPTIONS
        self.result: Negotiated | None = None
        self._needed = next(self._steps)

    def take_output(self) -> bytes:
        """Return what is to be sent now, and forget it."""
        data = bytes(self.output)
        self.output.clear()
        return data

    def feed(self, data: bytes | memoryview) -> None:
        """Take bytes of the server. Raises ProtocolError; `output` then holds a farewell."""
        if self.stage is not ClientStage.OPTIONS:
            raise ProtocolError(f"server sent {len(data)} bytes that nobody asked for")
        self._buffer += data
        waiting = True
        while waiting and len(self._buffer) >= self._needed:
            piece = bytes(self._buffer[: self._needed])
            del self._buffer[: self._needed]
            waiting = self._advance(piece)
        if self._buffer and not waiting:
            raise ProtocolError(f"server sent {len(self._buffer)} bytes ahead of {self._phase}")

    def _advance(self, piece: bytes) -> bool:
        """Go on with what was waited for; say whether more options are."""
        try:
            self._needed = self._steps.send(piece)
        except StopIteration:
            self.stage = ClientStage.READY
        return self.stage is ClientStage.OPTIONS

    def tls_started(self) -> None:
        """TLS runs: go on."""
        assert self.stage is ClientStage.STARTTLS
        self.stage = ClientStage.OPTIONS
        self._advance(b"")

    def end_of_stream(self) -> ProtocolError:
        """Return the error that the end of the server's bytes is at this place."""
        return ProtocolError(f"Failed to read {self._phase}: Unexpected end-of-file before all data were read")

    # --- the conversation -----------------------------------------------------------------------------

    def _run(self) -> Steps:
        (magic,) = struct.unpack(">Q", (yield 8))
        if magic != NBD_MAGIC:
            raise ProtocolError(f"Bad initial magic received: 0x{magic:016x}")
        self._phase = "server magic"
        (magic,) = struct.unpack(">Q", (yield 8))
        if magic == OLDSTYLE_MAGIC:
            yield from self._oldstyle()
            return
        if magic != OPTION_MAGIC:
            raise ProtocolError(f"Bad server magic received: 0x{magic:016x}")
        self._phase = "server flags"
        (offered,) = struct.unpack(">H", (yield 2))
        flags = offered & (HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
        self.output += struct.pack(">I", flags)
        fixed = bool(flags & HandshakeFlag.FIXED_NEWSTYLE)
        if self._tls:
            if not fixed:
                raise ProtocolError("Server does not support STARTTLS")
            yield from self._starttls()
        result = Negotiated(0, TransmissionFlag(0))
        if fixed:
            style = yield from self._style()
            result = replace(result, style=style)
            if style is not Style.SIMPLE:
                result = replace(result, context=(yield from self._set_context()))
            found = yield from self._go(result)
            if found is not None:
                self.result = found
                return
            yield from self._check_listed()
        yield from self._export_name(result, zeroes=not flags & HandshakeFlag.NO_ZEROES)

    def _oldstyle(self) -> Steps:
        if self._tls:
            raise ProtocolError("Server does not support STARTTLS")
        if self._name:
            raise ProtocolError("Server does not support non-empty export names")
        self._phase = "export length"
        (size,) = struct.unpack(">Q", (yield 8))
        self._phase = "export flags"
        (flags,) = struct.unpack(">I", (yield 4))
        if flags & ~0xFFFF:
            raise ProtocolError(f"Unexpected export flags {flags:0x}")
        self._phase = "reserved block"
        yield 124
        self.result = Negotiated(_checked_size(size), TransmissionFlag(flags))

    def _starttls(self) -> Steps:
        self._send(Option.STARTTLS)
        reply = yield from self._reply(Option.STARTTLS)
        if (yield from self._refused(Option.STARTTLS, reply)):
            raise self._farewell("Server does not support STARTTLS", None)
        if reply.code != OptionReply.ACK:
            raise self._farewell(f"Server answered option {_named(Option.STARTTLS)} with {_answer(reply.code)}", None)
        if reply.length:
            raise self._farewell("Server answered option 0x5 (starttls) with data", None)
        self._phase = "the TLS handshake"
        self.stage = ClientStage.STARTTLS
        yield 0

    def _style(self) -> Generator[int, bytes, Style]:
        """Agree on the shape of replies, the richest that the server has."""
        if self._extended and (yield from self._simple_option(Option.EXTENDED_HEADERS)):
            return Style.EXTENDED
        if (yield from self._simple_option(Option.STRUCTURED_REPLY)):
            return Style.STRUCTURED
        return Style.SIMPLE

    def _simple_option(self, option: Option) -> Generator[int, bytes, bool]:
        self._send(option)
        reply = yield from self._reply(option)
        if (yield from self._refused(option, reply, tolerant=True)):
            return False
        if reply.code != OptionReply.ACK:
            text = f"Server answered option {int(option)} ({_OPTION_NAMES[option]}) with unexpected reply "
            raise self._farewell(f"{text}{reply.code} ({_REPLY_NAMES.get(reply.code, '<unknown>')})", None)
        if reply.length:
            text = f"Option {int(option)} ('{_OPTION_NAMES[option]}') response length is {reply.length}"
            raise self._farewell(f"{text} (it should be zero)", None)
        return True

    def _set_context(self) -> Generator[int, bytes, tuple[int, bytes] | None]:
        option = Option.SET_META_CONTEXT
        queries = struct.pack(">I", 1) + _string(self._context)
        self._send(option, _string(self._name) + queries)
        found = yield from self._one_context()
        if found is None:
            return None
        if found[1] != self._context:
            asked, answered = _shown(self._context), _shown(found[1])
            text = f"Failed to negotiate meta context '{asked}', server answered with different context '{answered}'"
            raise self._farewell(text, None)
        if (yield from self._one_context()) is not None:
            raise self._farewell("Server answered with more than one context", None)
        return found

    def _one_context(self) -> Generator[int, bytes, tuple[int, bytes] | None]:
        """Return one answer to the context query, None at the end of them, or if the server knows no such option."""
        option = Option.SET_META_CONTEXT
        reply = yield from self._reply(option)
        if (yield from self._refused(option, reply, tolerant=True)):
            return None
        if reply.code == OptionReply.ACK:
            if reply.length:
                raise self._farewell("Unexpected length to ACK response", None)
            return None
        if reply.code != OptionReply.META_CONTEXT:
            raise self._farewell(f"U{_unexpected(reply.code, OptionReply.META_CONTEXT)}", None)
        if not 4 < reply.length <= 4 + MAX_STRING:
            text = f"Failed to negotiate meta context, server answered with unexpected length {reply.length}"
            raise self._farewell(text, None)
        self._phase = "context name"
        data = yield reply.length
        return struct.unpack_from(">I", data)[0], data[4:]

    def _go(self, agreed: Negotiated) -> Generator[int, bytes, Negotiated | None]:
        """Ask for the export with its block sizes; None if the server knows no such option."""
        option = Option.GO
        self._send(option, _string(self._name) + struct.pack(">HH", 1, Info.BLOCK_SIZE))
        result = agreed
        for _ in range(MAX_REPLIES):
            reply = yield from self._reply(option)
            if (yield from self._refused(option, reply)):
                return None
            if reply.code == OptionReply.ACK:
                if reply.length:
                    raise self._farewell("server sent invalid NBD_REP_ACK", None)
                if not result.flags:
                    raise self._farewell("broken server omitted NBD_INFO_EXPORT", None)
                return result
            if reply.code != OptionReply.INFO:
                raise self._farewell(f"u{_unexpected(reply.code, OptionReply.INFO)}", None)
            if reply.length < 2:
                raise self._farewell(f"NBD_REP_INFO length {reply.length} is too short", None)
            self._phase = "info type"
            (kind,) = struct.unpack(">H", (yield 2))
            left = reply.length - 2
            if kind == Info.EXPORT:
                result = yield from self._info_export(left, result)
            elif kind == Info.BLOCK_SIZE:
                result = yield from self._info_block_size(left, result)
            else:
                yield from self._skip(left)
        raise self._farewell(f"server sent more than {MAX_REPLIES} replies to one option", None)

    def _info_export(self, length: int, result: Negotiated) -> Generator[int, bytes, Negotiated]:
        if length != 10:
            raise self._farewell(f"remaining export info len {length} is unexpected size", None)
        self._phase = "info size"
        size, flags = struct.unpack(">QH", (yield 10))
        if result.minimum_block and size % result.minimum_block:
            minimum = result.minimum_block
            text = f"export size {size} is not multiple of minimum block size {minimum}"
            raise self._farewell(text, None)
        return replace(result, size=_checked_size(size), flags=TransmissionFlag(flags))

    def _info_block_size(self, length: int, result: Negotiated) -> Generator[int, bytes, Negotiated]:
        if length != 12:
            raise self._farewell(f"remaining export info len {length} is unexpected size", None)
        self._phase = "info minimum block size"
        minimum, preferred, largest = struct.unpack(">3I", (yield 12))
        if not _power_of_two(minimum):
            raise self._farewell(f"server minimum block size {minimum} is not a power of two", None)
        if minimum > MAX_PAYLOAD:
            raise self._farewell(f"server minimum block size {minimum} is larger than {MAX_PAYLOAD}", None)
        if not _power_of_two(preferred) or preferred < minimum:
            raise self._farewell(f"server preferred block size {preferred} is not valid", None)
        if largest < minimum:
            raise self._farewell(f"server maximum block size {largest} is not valid", None)
        return replace(result, minimum_block=minimum, preferred_block=preferred, maximum_payload=largest)

    def _check_listed(self) -> Steps:
        """(Servers without GO) Look for the export among those listed: a wrong name would just end the connection."""
        option = Option.LIST
        self._send(option)
        found = False
        for _ in range(MAX_REPLIES):
            reply = yield from self._reply(option)
            if (yield from self._refused(option, reply)):
                return
            if reply.code == OptionReply.ACK:
                if reply.length:
                    raise self._farewell("length too long for option end", None)
                if not found:
                    raise self._farewell(f"No export with name '{_shown(self._name)}' available", None)
                return
            if reply.code != OptionReply.SERVER:
                raise self._farewell(f"U{_unexpected(reply.code, OptionReply.SERVER)}", None)
            if reply.length < 4 or reply.length > MAX_KEPT_REPLY:
                raise self._farewell(f"incorrect option length {reply.length}", None)
            self._phase = "export name"
            data = yield reply.length
            (length,) = struct.unpack_from(">I", data)
            if length > min(len(data) - 4, MAX_STRING):
                raise self._farewell("incorrect name length in server's list response", None)
            found = found or data[4 : 4 + length] == self._name
        raise self._farewell(f"server lists more than {MAX_REPLIES} exports", None)

    def _export_name(self, agreed: Negotiated, *, zeroes: bool) -> Steps:
        self._send(Option.EXPORT_NAME, self._name)
        self._phase = "export length"
        (size,) = struct.unpack(">Q", (yield 8))
        self._phase = "export flags"
        (flags,) = struct.unpack(">H", (yield 2))
        if zeroes:
            self._phase = "reserved block"
            yield 124
        self.result = replace(agreed, size=_checked_size(size), flags=TransmissionFlag(flags))

    # --- common ---------------------------------------------------------------------------------------

    def _send(self, option: Option, data: bytes = b"") -> None:
        self.output += struct.pack(">QII", OPTION_MAGIC, option, len(data)) + data

    def _farewell(self, text: str, hint: str | None) -> ProtocolError:
        self._send(Option.ABORT)
        return ProtocolError(text, hint=hint)

    def _reply(self, option: Option) -> Generator[int, bytes, _Reply]:
        self._phase = "option reply"
        magic, answered, code, length = _REPLY.unpack((yield _REPLY.size))
        if magic != OPTION_REPLY_MAGIC:
            raise self._farewell("Unexpected option reply magic", None)
        if answered != option:
            name = _OPTION_NAMES.get(answered, "<unknown>")
            expected = f"expected {int(option)} ({_OPTION_NAMES[option]})"
            raise self._farewell(f"Unexpected option type {answered} ({name}), {expected}", None)
        if length > MAX_OPTION_REPLY:
            raise self._farewell(f"option reply of {length} bytes is longer than {MAX_OPTION_REPLY}", None)
        return _Reply(code, length)

    def _skip(self, length: int) -> Steps:
        while length:
            piece = min(length, MAX_KEPT_REPLY)
            yield piece
            length -= piece

    def _refused(self, option: Option, reply: _Reply, *, tolerant: bool = False) -> Generator[int, bytes, bool]:
        """Read the text of an error reply. True: the server does not know the option; False: it is no error.

        tolerant   any error means that the server cannot do it
        """
        if not reply.code & _ERROR_BIT:
            return False
        self._phase = "option error message"
        kept = yield min(reply.length, MAX_STRING)
        yield from self._skip(reply.length - len(kept))
        if reply.code == OptionReply.ERR_UNSUP or tolerant:
            return True
        text = _refusal(reply.code, option)
        hint = "Did you forget a valid tls-creds?\n" if reply.code == OptionReply.ERR_TLS_REQD else ""
        if kept:
            hint += f"server reported: {_shown(kept)}"
        raise self._farewell(text, hint or None)


def _refusal(code: int, option: Option) -> str:
    texts: dict[int, str] = {
        OptionReply.ERR_POLICY: "Denied by server for option",
        OptionReply.ERR_INVALID: "Invalid parameters for option",
        OptionReply.ERR_PLATFORM: "Server lacks support for option",
        OptionReply.ERR_TLS_REQD: "TLS negotiation required before option",
        OptionReply.ERR_SHUTDOWN: "Server shutting down before option",
        OptionReply.ERR_BLOCK_SIZE_REQD: "Server requires INFO_BLOCK_SIZE for option",
    }
    if code == OptionReply.ERR_UNKNOWN:
        return "Requested export not available"
    text = texts.get(code, "Unknown error code when asking for option")
    return f"{text} {int(option)} ({_OPTION_NAMES[option]})"


def _named(option: Option) -> str:
    return f"{int(option)} ({_OPTION_NAMES[option]})"


def _answer(value: int) -> str:
    return f"{value} ({_REPLY_NAMES.get(value, '<unknown>')})"


def _unexpected(found: int, expected: OptionReply) -> str:
    return f"nexpected reply type {_answer(found)}, expected {_answer(expected)}"


def _string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def _shown(data: bytes) -> str:
    return data.decode(errors="replace")


def _power_of_two(value: int) -> bool:
    return value > 0 and not value & (value - 1)


def _checked_size(size: int) -> int:
    if size > (1 << 63) - 1:
        raise ProtocolError(f"export size {size} is larger than {(1 << 63) - 1}")
    return size
