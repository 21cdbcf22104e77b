"""Payload binding: records beside a detached header that say which payloads are its own.

A record holds the size of a payload and, if the payload can carry one, a random id that is stored in it.
Each is authenticated under a key derived from the volume key: who has the header but no passphrase makes
none. LUKS2 keeps the list in a token, LUKS1 in a file beside the header. A volume without records is
bound to nothing, and opens with any payload.
"""

from __future__ import annotations

import base64
import hmac
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from qmpd.aio.pool import in_work_thread
from qmpd.block import chain
from qmpd.block.child import Child
from qmpd.block.exclusive import HostFile
from qmpd.block.node import BlockNode
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError
from qmpd.luks.luks2 import Luks2Volume
from qmpd.luks.update2 import update_header
from qmpd.luks.volume import Volume
from qmpd.units import KiB

TOKEN_TYPE = "qmpd-payload-binding"  # noqa: S105
SUFFIX = ".binding"
"""What the name of a LUKS1 header's file gets appended for that of its list."""

ID_SIZE = 16
MAX_RECORDS = 64
MAX_FILE = 64 * KiB
_KEY_LABEL = b"qmpd payload binding\0"


@dataclass(frozen=True, slots=True)
class Payload:
    """What a record can say of a payload: its bytes, and the id that it carries, b"" if none."""

    size: int
    identity: bytes = b""

    @property
    def binding(self) -> str:
        """LuksPayloadBinding: how tightly a payload like this is bound."""
        return "id" if self.identity else "size"


@runtime_checkable
class Markable(Protocol):
    """A node whose format can carry an id.

    payload_id   the id, b"" if there is none
    """

    @property
    def payload_id(self) -> bytes:
        """See the class."""

    async def set_payload_id(self, identity: bytes) -> None:
        """Store an id of ID_SIZE bytes, durably; runs on the data loop. Raises CommandError, OSError."""


@runtime_checkable
class BindableNode(Protocol):
    """A luks node as the commands see it; both run on the monitor's loop. Raise CommandError, OSError."""

    async def bind_payload(self, *, mark: bool) -> str:
        """Add a record for the payload of this node; return LuksPayloadBinding."""

    async def unbind_payload(self) -> int:
        """Remove every record; return how many there were."""


def below_filters(node: BlockNode) -> BlockNode:
    """Return the node whose data `node` shows."""
    return chain.image_of(node)


def payload_on(node: BlockNode) -> Payload:
    """Return what a record could say of the payload on `node`."""
    carrier = below_filters(node)
    return Payload(node.size, carrier.payload_id if isinstance(carrier, Markable) else b"")


def binding_key(volume_key: bytes | bytearray | memoryview, uuid: str) -> SecretBytes:
    """Return the key under which the records of volume `uuid` are authenticated."""
    return SecretBytes(hmac.digest(volume_key, _KEY_LABEL + uuid.encode(), "sha256"))


class Bindings:
    """The records of one volume.

    source   the edge to the node that its header is on
    """

    def __init__(self, source: Child, key: SecretBytes) -> None:
        self._source, self._key = source, key

    async def check(self, volume: Volume, payload: Payload) -> str | None:
        """Return how the payload is bound (LuksPayloadBinding), None if the volume has no records.

        Raises CommandError if no record is about this payload, OSError.
        """
        records = await self._read(volume)
        for identity in (payload.identity, b""):
            if self._record(Payload(payload.size, identity)) in records:
                return Payload(payload.size, identity).binding
        if not records:
            return None
        carries = f"the id {payload.identity.hex()}" if payload.identity else "no id"
        raise CommandError(
            f"The payload, of {payload.size} bytes and with {carries}, is none of those that the header is bound to; "
            "'force' opens it all the same"
        )

    async def add(self, volume: Volume, payload: Payload) -> None:
        """Add a record. Raises CommandError if there are too many, OSError."""
        records = list(await self._read(volume))
        record = self._record(payload)
        if record in records:
            return
        if len(records) >= MAX_RECORDS:
            raise CommandError(f"The header is bound to {MAX_RECORDS} payloads already")
        await self._write(volume, [*records, record])

    async def clear(self, volume: Volume) -> int:
        """Remove every record and return how many there were. Raises CommandError, OSError."""
        count = len(await self._read(volume))
        await self._write(volume, [])
        return count

    def wipe(self) -> None:
        """Destroy the key."""
        self._key.wipe()

    # --- storage ----------------------------------------------------------------------------------

    def _record(self, payload: Payload) -> dict[str, str]:
        text = f"{payload.size}\0{payload.identity.hex()}".encode()
        with self._key.view() as view:
            plain = bytearray(view)
        mac = hmac.digest(plain, text, "sha256")
        plain[:] = bytes(len(plain))
        record = {"size": str(payload.size), "mac": base64.b64encode(mac).decode()}
        return record | {"id": payload.identity.hex()} if payload.identity else record

    async def _read(self, volume: Volume) -> Sequence[Any]:
        if isinstance(volume, Luks2Volume):
            tokens = volume.metadata.tokens.values()
            return [one for token in tokens if token.type == TOKEN_TYPE for one in _list(token.members)]
        path = self._path()
        if path is None:
            return []
        text = await in_work_thread(lambda: _read_file(path))
        if text is None:
            return []
        try:
            tree = json.loads(text)
        except ValueError as error:
            raise CommandError(f"'{path}' is damaged: it is no JSON") from error
        if not isinstance(tree, dict) or tree.get("type") != TOKEN_TYPE:
            raise CommandError(f"'{path}' is damaged: it is no list of payload bindings")
        return _list(tree)

    async def _write(self, volume: Volume, records: list[Any]) -> None:
        body = {"type": TOKEN_TYPE, "keyslots": [], "records": records}
        if isinstance(volume, Luks2Volume):

            def change(tree: dict[str, Any]) -> None:
                tokens = tree["tokens"]
                for key in [key for key, token in tokens.items() if token["type"] == TOKEN_TYPE]:
                    del tokens[key]
                if records:
                    tokens[next(str(number) for number in range(33) if str(number) not in tokens)] = body

            await update_header(self._source, change, self._source.node.name)
            return
        path = self._path()
        if path is None:
            raise CommandError("A LUKS1 header that is not in a file of this host has no place for payload bindings")
        await in_work_thread(lambda: _write_file(path, json.dumps(body).encode() if records else None))

    def _path(self) -> Path | None:
        node = self._source.node
        while not isinstance(node, HostFile):
            primary = node.primary()
            if primary is None:
                return None
            node = primary.node
        return Path(node.path + SUFFIX)


def _list(members: Mapping[str, Any]) -> Sequence[Any]:
    """Return the records; what is none never equals one of ours, but is one to count."""
    records = members.get("records")
    return records if isinstance(records, list) else [records]


def _read_file(path: Path) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    with open(fd, "rb") as file:
        text = file.read(MAX_FILE + 1)
    if len(text) > MAX_FILE:
        raise CommandError(f"'{path}' is damaged: it has more than {MAX_FILE} bytes")
    return text


def _write_file(path: Path, text: bytes | None) -> None:
    """Replace the file as a whole, or remove it."""
    if text is None:
        path.unlink(missing_ok=True)
    else:
        temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
