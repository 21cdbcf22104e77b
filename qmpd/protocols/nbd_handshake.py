"""The server's side of NBD option haggling: bytes in, bytes out, no socket.

`Handshake.feed` takes whatever arrived; `output` holds what is to be sent, and `stage` says what
happens next. State that was agreed in the clear is forgotten when TLS begins, and bytes that follow
STARTTLS before TLS does are taken for an attack.
Source: proto.md, "Handshake" and "Option types"; order of checks and texts are QEMU's.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from qmpd.protocols.nbd import (
    ALLOCATION,
    BITMAP_PREFIX,
    DEPTH,
    MAX_BUFFERED_OPTION,
    MAX_OPTION,
    MAX_STRING,
    NBD_MAGIC,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    Directory,
    ExportInfo,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    Style,
    TransmissionFlag,
)

_GREETING = struct.Struct(">QQH")
_OPTION = struct.Struct(">QII")
_REPLY = struct.Struct(">QIII")
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")

_NAMES = {
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
_WITHOUT_DATA = (Option.LIST, Option.STARTTLS, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS)
_SHOWN_NAME = 80
"""Bytes of a client's export name that are repeated in an error text."""


class Stage(enum.Enum):
    """What the owner of the connection does next."""

    OPTIONS = "options"
    STARTTLS = "starttls"
    TRANSMISSION = "transmission"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class Agreement:
    """What holds in the transmission phase.

    contexts   (id, name) of the metadata contexts that the client selected
    rest       bytes that the client sent ahead, the beginning of its requests
    """

    export: ExportInfo
    style: Style
    contexts: tuple[tuple[int, bytes], ...]
    flags: TransmissionFlag
    rest: bytes


class _Refused(Exception):
    """An option that is answered with an error."""

    def __init__(self, code: OptionReply, text: str | bytes) -> None:
        super().__init__(text)
        self.code, self.text = code, text.encode() if isinstance(text, str) else text


class _Cursor:
    """Reads the data of one option; a length that does not fit refuses the option."""

    def __init__(self, data: bytes, option: Option) -> None:
        self._data, self._at, self._name = data, 0, _NAMES[option]

    def take(self, length: int) -> bytes:
        if length > len(self._data) - self._at:
            raise _Refused(OptionReply.ERR_INVALID, f"Inconsistent lengths in option {self._name}")
        piece = self._data[self._at : self._at + length]
        self._at += length
        return piece

    def u16(self) -> int:
        return int(_U16.unpack(self.take(2))[0])

    def u32(self) -> int:
        return int(_U32.unpack(self.take(4))[0])

    def name(self) -> bytes:
        length = self.u32()
        if length > MAX_STRING:
            raise _Refused(OptionReply.ERR_INVALID, f"Invalid name length: {length}")
        return self.take(length)

    def end(self) -> None:
        if self._at != len(self._data):
            raise _Refused(OptionReply.ERR_INVALID, f"option '{self._name}' has unexpected length")


class Handshake:
    """One client's handshake.

    offer_tls   the server has credentials: nothing but STARTTLS is answered before TLS runs
    stage       see `Stage`; after STARTTLS call `tls_started`, after TRANSMISSION read `agreement`
    reason      why the session was closed, "" if the client ended it in order
    """

    def __init__(self, directory: Directory, *, offer_tls: bool = False) -> None:
        self._directory = directory
        self._offer_tls, self._tls = offer_tls, False
        self._buffer = bytearray()
        self._step: Callable[[], bool] = self._client_flags
        self._skip = 0
        self._after_skip: Callable[[], None] = lambda: None
        self._fixed = self._zeroes = False
        self._style = Style.SIMPLE
        self._selected: tuple[bytes, tuple[tuple[int, bytes], ...]] | None = None
        self.output = bytearray(_GREETING.pack(NBD_MAGIC, OPTION_MAGIC, _OURS))
        self.stage = Stage.OPTIONS
        self.agreement: Agreement | None = None
        self.reason = ""

    def take_output(self) -> bytes:
        """Return what is to be sent now, and forget it."""
        data = bytes(self.output)
        self.output.clear()
        return data

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes of the client. Only while `stage` is OPTIONS."""
        assert self.stage is Stage.OPTIONS
        wanted = self._pass_over(memoryview(data))
        if self._closed():  # with what was passed over
            return
        self._buffer += wanted
        while not self._skip and self._step():
            pass

    def _closed(self) -> bool:
        return self.stage is Stage.CLOSED

    def _pass_over(self, data: memoryview) -> memoryview:
        """Return what follows the option data that nobody wants."""
        if not self._skip:
            return data
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        if not self._skip:
            self._after_skip()
        return data[skipped:]

    def tls_started(self) -> None:
        """TLS runs: begin again, with nothing of what was agreed before."""
        assert self.stage is Stage.STARTTLS
        self._tls = True
        self._style = Style.SIMPLE
        self._selected = None
        self.stage = Stage.OPTIONS

    def end_of_stream(self) -> None:
        """Tell that the client sends no more."""
        self._close("" if not self._buffer and not self._skip else "client went away within an option")

    # --- steps: each says whether it made progress -------------------------------------------------

    def _client_flags(self) -> bool:
        if len(self._buffer) < 4:
            return False
        flags = self._take_u32()
        if flags & ~_OURS:
            return self._close(f"Unknown client flags 0x{flags & ~_OURS:x} received")
        self._fixed = bool(flags & HandshakeFlag.FIXED_NEWSTYLE)
        self._zeroes = not flags & HandshakeFlag.NO_ZEROES
        self._step = self._option
        return True

    def _take_u32(self) -> int:
        value = int(_U32.unpack_from(self._buffer)[0])
        del self._buffer[:4]
        return value

    def _option(self) -> bool:
        if len(self._buffer) < _OPTION.size:
            return False
        magic, number, length = _OPTION.unpack_from(self._buffer)
        if magic != OPTION_MAGIC:
            return self._close("Bad magic received")
        if length > MAX_OPTION:
            return self._close(f"len ({length}) is larger than max len ({MAX_OPTION})")
        if self._offer_tls and not self._tls and number != Option.STARTTLS:
            return self._before_tls(number, length)
        if not self._fixed and number != Option.EXPORT_NAME:
            return self._close(f"Unsupported option {number} of a client without fixed newstyle")
        option = _BY_NUMBER.get(number)
        if option is None:
            return self._refuse_unread(number, length, OptionReply.ERR_UNSUP, _unsupported(number))
        if option is Option.EXPORT_NAME and length > MAX_STRING:
            return self._close("Bad length received")
        if option is Option.ABORT:
            self._reply(option, OptionReply.ACK)
            return self._close("")
        if option in _WITHOUT_DATA and length:
            text = f"option '{_NAMES[option]}' has unexpected length"
            return self._refuse_unread(number, length, OptionReply.ERR_INVALID, text)
        if length > MAX_BUFFERED_OPTION:
            text = f"option '{_NAMES[option]}' is longer than {MAX_BUFFERED_OPTION} bytes"
            return self._refuse_unread(number, length, OptionReply.ERR_TOO_BIG, text)
        if len(self._buffer) < _OPTION.size + length:
            return False
        data = bytes(self._buffer[_OPTION.size : _OPTION.size + length])
        del self._buffer[: _OPTION.size + length]
        try:
            self._handlers[option](self, option, data)
        except _Refused as refused:
            self._reply(option, refused.code, refused.text)
        return self.stage is Stage.OPTIONS

    def _before_tls(self, number: int, length: int) -> bool:
        """(Credentials, but no TLS yet) Refuse everything, without a look at it."""
        if number == Option.EXPORT_NAME:
            return self._close(f"Option 0x{number:x} not permitted before TLS")
        text = f"Option 0x{number:x} not permitted before TLS"
        return self._refuse_unread(number, length, OptionReply.ERR_TLS_REQD, text, close=number == Option.ABORT)

    def _refuse_unread(self, number: int, length: int, code: OptionReply, text: str, *, close: bool = False) -> bool:
        """Skip the data of an option, however long, answer with an error, and `close` if that was the last one."""

        def answer() -> None:
            self._reply(number, code, text.encode())
            if close:
                self._close("")

        present = min(length, len(self._buffer) - _OPTION.size)
        del self._buffer[: _OPTION.size + present]
        self._skip, self._after_skip = length - present, answer
        if not self._skip:
            answer()
        return self.stage is Stage.OPTIONS

    def _close(self, reason: str) -> bool:
        self.stage, self.reason = Stage.CLOSED, reason
        self._buffer.clear()
        return False

    def _reply(self, number: int, code: OptionReply, data: bytes = b"") -> None:
        self.output += _REPLY.pack(OPTION_REPLY_MAGIC, number, code, len(data))
        self.output += data

    # --- options --------------------------------------------------------------------------------

    def _list(self, option: Option, _: bytes) -> None:
        for export in self._directory.listed():
            self._reply(option, OptionReply.SERVER, _string(export.name) + (export.description or b""))
        self._reply(option, OptionReply.ACK)

    def _starttls(self, option: Option, _: bytes) -> None:
        if self._tls:
            raise _Refused(OptionReply.ERR_INVALID, "TLS already enabled")
        if not self._offer_tls:
            raise _Refused(OptionReply.ERR_POLICY, "TLS not configured")
        if self._buffer:
            self._close("data follows STARTTLS in the clear")
            return
        self._reply(option, OptionReply.ACK)
        self.stage = Stage.STARTTLS

    def _structured_reply(self, option: Option, _: bytes) -> None:
        if self._style is Style.EXTENDED:
            raise _Refused(OptionReply.ERR_EXT_HEADER_REQD, "extended headers already negotiated")
        if self._style is Style.STRUCTURED:
            raise _Refused(OptionReply.ERR_INVALID, "structured reply already negotiated")
        self._style = Style.STRUCTURED
        self._reply(option, OptionReply.ACK)

    def _extended_headers(self, option: Option, _: bytes) -> None:
        if self._style is Style.EXTENDED:
            raise _Refused(OptionReply.ERR_INVALID, "extended headers already negotiated")
        self._style = Style.EXTENDED
        self._reply(option, OptionReply.ACK)

    def _export_name(self, _: Option, data: bytes) -> None:
        if self._style is Style.EXTENDED:
            self._close("export name after extended headers")
            return
        export = self._directory.find(data)
        if export is None:
            self._close("export not found")
            return
        self.output += struct.pack(">QH", export.size, self._flags(export))
        if self._zeroes:
            self.output += bytes(124)
        self._enter(export)

    def _info(self, option: Option, data: bytes) -> None:
        cursor = _Cursor(data, option)
        name = cursor.name()
        wanted = {cursor.u16() for _ in range(cursor.u16())}
        cursor.end()
        export = self._find(name)
        sized = Info.BLOCK_SIZE in wanted
        minimum = export.minimum_block if sized or option is Option.INFO else 1
        if Info.NAME in wanted:
            self._reply(option, OptionReply.INFO, _U16.pack(Info.NAME) + export.name)
        if export.description is not None:
            self._reply(option, OptionReply.INFO, _U16.pack(Info.DESCRIPTION) + export.description)
        sizes = minimum, export.preferred_block, export.maximum_payload
        self._reply(option, OptionReply.INFO, struct.pack(">H3I", Info.BLOCK_SIZE, *sizes))
        flags = self._flags(export)
        self._reply(option, OptionReply.INFO, struct.pack(">HQH", Info.EXPORT, export.size, flags))
        if option is Option.INFO and not sized and export.minimum_block > 1:
            raise _Refused(OptionReply.ERR_BLOCK_SIZE_REQD, "request NBD_INFO_BLOCK_SIZE to use this export")
        self._reply(option, OptionReply.ACK)
        if option is Option.GO:
            self._enter(export)

    def _meta_context(self, option: Option, data: bytes) -> None:
        selecting = option is Option.SET_META_CONTEXT
        if selecting:
            self._selected = None
            if self._style is Style.SIMPLE:
                text = f"request option '{_NAMES[option]}' when structured reply is not negotiated"
                raise _Refused(OptionReply.ERR_INVALID, text)
        cursor = _Cursor(data, option)
        export = self._find(cursor.name())
        count = cursor.u32()
        matched: set[int] = set()
        first = {name: number for number, name in reversed(export.contexts)}
        for _ in range(count):
            query = cursor.take(cursor.u32())
            if query in first:
                matched.add(first[query])
            elif not selecting:
                matched.update(number for number, name in export.contexts if _in_group(query, name))
        cursor.end()
        everything = not selecting and not count
        chosen = tuple(one for one in export.contexts if everything or one[0] in matched)
        for number, name in chosen:
            self._reply(option, OptionReply.META_CONTEXT, _U32.pack(number if selecting else 0) + name)
        if selecting:
            self._selected = export.name, chosen
        self._reply(option, OptionReply.ACK)

    _handlers: ClassVar[dict[Option, Callable[[Handshake, Option, bytes], None]]] = {
        Option.EXPORT_NAME: _export_name,
        Option.LIST: _list,
        Option.STARTTLS: _starttls,
        Option.INFO: _info,
        Option.GO: _info,
        Option.STRUCTURED_REPLY: _structured_reply,
        Option.LIST_META_CONTEXT: _meta_context,
        Option.SET_META_CONTEXT: _meta_context,
        Option.EXTENDED_HEADERS: _extended_headers,
    }

    # --- common -----------------------------------------------------------------------------------

    def _find(self, name: bytes) -> ExportInfo:
        export = self._directory.find(name)
        if export is None:
            shown = name if len(name) < _SHOWN_NAME else name[:_SHOWN_NAME] + b"..."
            raise _Refused(OptionReply.ERR_UNKNOWN, b"export '%b' not present" % shown)
        return export

    def _contexts(self, export: ExportInfo) -> tuple[tuple[int, bytes], ...]:
        """Return the contexts that the client selected for the export that it now enters."""
        if self._selected is None or self._selected[0] != export.name:
            return ()
        return self._selected[1]

    def _flags(self, export: ExportInfo) -> TransmissionFlag:
        flags = export.flags
        if self._style is not Style.SIMPLE:
            flags |= TransmissionFlag.SEND_DF
        if self._style is Style.EXTENDED and self._contexts(export):
            flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
        return flags

    def _enter(self, export: ExportInfo) -> None:
        rest = bytes(self._buffer)
        self._buffer.clear()
        contexts = self._contexts(export) if self._style is not Style.SIMPLE else ()
        self.agreement = Agreement(export, self._style, contexts, self._flags(export), rest)
        self.stage = Stage.TRANSMISSION


_OURS = int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)  # an IntFlag would lose unknown bits in ~
_BY_NUMBER: dict[int, Option] = {int(one): one for one in Option}


def _unsupported(number: int) -> str:
    return f"Unsupported option {number} (<unknown>)"


def _string(text: bytes) -> bytes:
    return _U32.pack(len(text)) + text


def _in_group(query: bytes, name: bytes) -> bool:
    """Say whether `query`, when contexts are listed, means a group to which the context `name` belongs."""
    if query == b"base:":
        return name == ALLOCATION
    if query == b"qemu:":
        return name == DEPTH or name.startswith(BITMAP_PREFIX)
    return query == BITMAP_PREFIX and name.startswith(BITMAP_PREFIX)
