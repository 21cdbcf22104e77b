"""SectorCipher: encrypts and decrypts whole runs of sectors, each under its own initial value.

Two engines with one interface: *compiled*, a C loop over OpenSSL (`_sectors_build.py`), and
*reference*, one context of the `cryptography` package per sector: the fallback where the loop was
not built, and the oracle in tests. Ciphers go by OpenSSL's names; none is implemented here.
A cipher may be used by several threads at once; both engines work without the interpreter's lock.
"""

from __future__ import annotations

import functools
import importlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeAlias

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from qmpd.crypto.ivgen import IvKind, essiv_key, kind_of, plain_iv
from qmpd.crypto.secretbytes import SecretBytes
from qmpd.errors import CommandError
from qmpd.native import compiled
from qmpd.units import KiB, is_power_of_two

Buffer: TypeAlias = memoryview | bytearray | bytes
Span: TypeAlias = tuple[int, Buffer, Buffer]
"""A run of sectors: number of the first one (in 512-byte units, whatever the sector size), source
and target of equal length, a multiple of the sector size. The target is writable, and is the source itself
or does not overlap it."""

SHARED = 128 * KiB
"""Bytes from which the work of one call is done by two threads."""

MIN_SECTOR, MAX_SECTOR = 512, 4096
MODES = ("xts", "cbc", "ctr", "ecb")
KEY_BITS = {"aes": (128, 192, 256), "camellia": (128, 192, 256)}
"""Bits of one cipher key by cipher; XTS takes two of them."""


@dataclass(frozen=True, slots=True)
class CipherSpec:
    """What a header says about the payload's encryption.

    cipher      "aes"                            mode      "xts", "cbc", "ctr" or "ecb"
    iv          "plain64", "essiv" and so on (`ivgen.KINDS`); ignored by ecb
    iv_hash     the hash of essiv, None otherwise
    key_length  bytes of the volume key, both halves with xts
    sector_size bytes, 512 to 4096
    """

    cipher: str
    mode: str
    iv: str
    iv_hash: str | None
    key_length: int
    sector_size: int = 512

    @property
    def key_bits(self) -> int:
        """Bits of one cipher key: half of an XTS key."""
        return self.key_length * 4 if self.mode == "xts" else self.key_length * 8

    @property
    def openssl_name(self) -> str:
        """Name of the cipher, such as "aes-256-xts"."""
        return f"{self.cipher}-{self.key_bits}-{self.mode}"

    @property
    def iv_kind(self) -> IvKind:
        """The generator of initial values. Raises CommandError."""
        return IvKind.NONE if self.mode == "ecb" else kind_of(self.iv)


class SectorCipher(Protocol):
    """One volume key, ready for use."""

    sector_size: int

    def encrypt(self, spans: Sequence[Span]) -> None:
        """Encrypt every span from its source to its target, in one call without the lock."""

    def decrypt(self, spans: Sequence[Span]) -> None:
        """Decrypt every span from its source to its target, in one call without the lock."""

    def wipe(self) -> None:
        """Destroy the key; the cipher is of no use afterwards."""


_native = compiled("qmpd.crypto._sectors")


def engine_name() -> str:
    """Return the engine in use and what it stands on, for logs and version texts."""
    if _native is None:
        return "reference engine (the compiled sector loop is not built: expect a tenth of the speed)"
    return f"compiled engine, {_native.ffi.string(_native.lib.qmpd_openssl_version()).decode()}"


@functools.cache
def supported(cipher: str, mode: str, bits: int) -> bool:
    """Say whether the cipher with keys of `bits` bits exists here in this mode."""
    if mode not in MODES or bits not in KEY_BITS.get(cipher, ()):
        return False
    if mode == "xts" and (cipher != "aes" or bits == 192):
        return False  # OpenSSL has no name for it
    if _native is not None:
        return bool(_native.lib.qmpd_key_length(f"{cipher}-{bits}-{mode}".encode()) > 0)
    try:
        _reference_context(cipher, mode, bytes(range(bits // 8 * (2 if mode == "xts" else 1))), bytes(16)).encryptor()
    except UnsupportedAlgorithm:
        return False
    return True


def check_spec(spec: CipherSpec) -> None:
    """Refuse what cannot be used. Raises CommandError (texts: QEMU)."""
    if not (is_power_of_two(spec.sector_size) and MIN_SECTOR <= spec.sector_size <= MAX_SECTOR):
        raise CommandError(f"Sector size {spec.sector_size} not supported")
    if spec.mode not in MODES:
        raise CommandError(f"Cipher mode '{spec.mode}' not supported")
    if (spec.mode == "xts" and spec.key_length % 2) or not supported(spec.cipher, spec.mode, spec.key_bits):
        raise CommandError(f"Algorithm '{spec.cipher}' with key size {spec.key_bits // 8} bytes not supported")
    if spec.iv_kind is IvKind.ESSIV:
        if not spec.iv_hash:
            raise CommandError("Missing IV generator hash specification")
        size = len(essiv_key(spec.iv_hash, b""))
        if not supported(spec.cipher, "ecb", size * 8):
            raise CommandError(f"No {spec.cipher.upper()} cipher with key size {size} available")


def open_cipher(spec: CipherSpec, key: Buffer, *, engine: str | None = None) -> SectorCipher:
    """Return a cipher for `spec` under `key`, which the caller may wipe afterwards.

    engine   "compiled" or "reference"; by default the first that is there
    Raises CommandError for what is not supported (`check_spec`), ValueError for a key of another
    length than the spec's.
    """
    check_spec(spec)
    if len(key) != spec.key_length:
        raise ValueError(f"a key of {len(key)} bytes for {spec.openssl_name}, which takes {spec.key_length}")
    if engine is None:
        engine = "reference" if _native is None else "compiled"
    if engine == "reference":
        return ReferenceCipher(spec, key)
    if _native is None:
        raise CommandError("the compiled sector loop is not built")
    return CompiledCipher(spec, key, _native)


def _refuse_span(sector: int, source: Buffer, target: Buffer) -> NoReturn:
    raise ValueError(f"{len(source)} bytes to {len(target)} at sector {sector} are no run of whole sectors")


class CompiledCipher:
    """The C loop. Contexts hold the expanded key and are pooled: a thread takes an idle one."""

    def __init__(self, spec: CipherSpec, key: Buffer, native: Any) -> None:
        self.sector_size = spec.sector_size
        self._ffi, self._lib = native.ffi, native.lib
        self._bytes_type, self._spans_type = native.ffi.typeof("uint8_t[]"), native.ffi.typeof("qmpd_span[]")
        self._name = spec.openssl_name.encode()
        self._kind = spec.iv_kind
        self._key = SecretBytes(key)
        self._essiv_name, self._essiv_key = b"", SecretBytes(b"")
        if self._kind is IvKind.ESSIV:
            assert spec.iv_hash is not None
            self._essiv_key = SecretBytes(essiv_key(spec.iv_hash, key))
            self._essiv_name = f"{spec.cipher}-{len(self._essiv_key) * 8}-ecb".encode()
        self._idle: tuple[list[Any], ...] = ([], [], [], [])  # decrypting, encrypting, the same for the helper thread
        self._wiped = False
        for encrypt in (False, True):  # find out now whether OpenSSL takes the key
            self._idle[encrypt].append(self._new(encrypt, False))

    def _new(self, encrypt: bool, helper: bool) -> Any:
        if self._wiped:
            raise ValueError("the key was wiped")
        ffi = self._ffi
        with self._key.view() as key, self._essiv_key.view() as essiv:
            context = self._lib.qmpd_sectors_new(
                self._name,
                int(encrypt),
                ffi.from_buffer(key),
                self.sector_size,
                int(self._kind),
                self._essiv_name,
                ffi.from_buffer(essiv),
                int(helper),
            )
        if not context:
            raise CommandError(f"OpenSSL refuses this key for {self._name.decode()}")
        return ffi.gc(context, self._lib.qmpd_sectors_free)

    def encrypt(self, spans: Sequence[Span]) -> None:
        """See `SectorCipher.encrypt`."""
        self._run(spans, True)

    def decrypt(self, spans: Sequence[Span]) -> None:
        """See `SectorCipher.decrypt`."""
        self._run(spans, False)

    def _run(self, spans: Sequence[Span], encrypt: bool) -> None:
        size = self.sector_size
        bytes_type, from_buffer = self._bytes_type, self._ffi.from_buffer
        rows = []
        for sector, source, target in spans:
            length = len(target)
            if length % size or len(source) != length or not 0 <= sector < 1 << 64:
                _refuse_span(sector, source, target)
            into = from_buffer(bytes_type, target, True)
            rows.append((sector, length, into if source is target else from_buffer(bytes_type, source), into))
        helped = len(rows) > 0 and sum(row[1] for row in rows) >= SHARED
        taken = self._take(encrypt, helped)
        try:
            if helped:
                table = self._ffi.new(self._spans_type, rows)
                failed = self._lib.qmpd_sectors_share(taken[0], taken[1], table, len(rows))
            elif len(rows) == 1:
                failed = self._lib.qmpd_sectors_one(taken[0], *rows[0])
            else:
                failed = self._lib.qmpd_sectors_run(taken[0], self._ffi.new(self._spans_type, rows), len(rows))
        finally:
            self._give(encrypt, taken)
        if failed:
            raise OSError("OpenSSL failed on a sector")

    def _take(self, encrypt: bool, helped: bool) -> list[Any]:
        """Return a context, and with `helped` one for the helper thread, for `_give`."""
        taken = []
        for helper in (False, True) if helped else (False,):
            try:
                taken.append(self._idle[encrypt + 2 * helper].pop())
            except IndexError:
                taken.append(self._new(encrypt, helper))
        return taken

    def _give(self, encrypt: bool, taken: list[Any]) -> None:
        if not self._wiped:
            for helper, context in enumerate(taken):
                self._idle[encrypt + 2 * helper].append(context)

    def extents(self, fd: int, table: Any, count: int, buffer: Any, *, writing: bool) -> int:
        """See `read_extents` and `write_extents`."""
        helped = len(buffer) >= SHARED
        taken = self._take(writing, helped)
        work = self._lib.qmpd_write_extents if writing else self._lib.qmpd_read_extents
        try:
            return int(work(taken[0], taken[1] if helped else self._ffi.NULL, fd, table, count, buffer, len(buffer)))
        finally:
            self._give(writing, taken)

    def wipe(self) -> None:
        """See `SectorCipher.wipe`."""
        self._wiped = True
        self._key.wipe()
        self._essiv_key.wipe()
        for idle in self._idle:
            while idle:
                self._ffi.release(idle.pop())


EXTENT = struct.Struct("=QQQQ")
"""One entry of an extent table: number of the first 512-byte sector (for the cipher), offset in the file, length,
and where it is in the buffer; bytes but for the first."""


class ExtentTable:
    """Room for `entries` extents, for `read_extents` and `write_extents`; fill `data` with EXTENT.

    Needs the compiled engine.
    """

    def __init__(self, entries: int) -> None:
        self.data = bytearray(entries * EXTENT.size)
        assert _native is not None
        self.native = _native.ffi.from_buffer("qmpd_extent[]", self.data)


def extents_work() -> bool:
    """Say whether `read_extents` and `write_extents` are there."""
    return hasattr(_native and _native.lib, "qmpd_write_extents")


def read_extents(cipher: SectorCipher | None, fd: int, table: ExtentTable, count: int, into: memoryview) -> int:
    """Read the first `count` extents of the table, as far as the page cache has them, and decrypt them in place.

    Runs without the interpreter's lock. Returns how many are complete, in order; what the buffer holds of the
    others is undefined. Raises ValueError if an extent does not lie in the buffer.
    """
    assert _native is not None
    return _run_extents(cipher, fd, table, count, _native.ffi.from_buffer("uint8_t[]", into, True), writing=False)


def write_extents(cipher: SectorCipher | None, fd: int, table: ExtentTable, count: int, source: memoryview) -> int:
    """Encrypt the first `count` extents of the table and write them to the page cache; `source` stays as it is.

    Runs without the interpreter's lock. Returns how many are complete, in order; of the others some may have been
    written. Raises ValueError if an extent does not lie in the buffer.
    """
    assert _native is not None
    return _run_extents(cipher, fd, table, count, _native.ffi.from_buffer("uint8_t[]", source), writing=True)


def _run_extents(
    cipher: SectorCipher | None, fd: int, table: ExtentTable, count: int, buffer: Any, *, writing: bool
) -> int:
    assert _native is not None
    if cipher is None:
        null = _native.ffi.NULL
        work = _native.lib.qmpd_write_extents if writing else _native.lib.qmpd_read_extents
        found = int(work(null, null, fd, table.native, count, buffer, len(buffer)))
    else:
        assert isinstance(cipher, CompiledCipher)
        found = cipher.extents(fd, table.native, count, buffer, writing=writing)
    if found < 0:
        raise ValueError("an extent leaves the buffer")
    return found


def _algorithm(cipher: str, key: bytes) -> Any:
    if cipher == "aes":
        return algorithms.AES(key)
    for place in ("decrepit.ciphers.algorithms", "primitives.ciphers.algorithms"):  # it moved in version 46
        try:
            return importlib.import_module(f"cryptography.hazmat.{place}").Camellia(key)
        except (ImportError, AttributeError):
            continue
    raise UnsupportedAlgorithm(f"this `cryptography` has no {cipher}")


def _reference_context(cipher: str, mode: str, key: Buffer, iv: bytes) -> Cipher[Any]:
    algorithm = _algorithm(cipher, bytes(key))
    made: modes.Mode
    if mode == "xts":
        made = modes.XTS(iv)
    elif mode == "cbc":
        made = modes.CBC(iv)
    elif mode == "ctr":
        made = modes.CTR(iv)
    else:
        made = modes.ECB()  # noqa: S305 -- an old volume may use it, and ESSIV does
    return Cipher(algorithm, made)


class ReferenceCipher:
    """One context of the `cryptography` package for each sector: slow, and simple to check."""

    def __init__(self, spec: CipherSpec, key: Buffer) -> None:
        self.sector_size = spec.sector_size
        self._spec = spec
        self._kind = spec.iv_kind
        self._key = SecretBytes(key)
        self._essiv: Cipher[Any] | None = None
        if self._kind is IvKind.ESSIV:
            assert spec.iv_hash is not None
            self._essiv = _reference_context(spec.cipher, "ecb", essiv_key(spec.iv_hash, key), b"")

    def _context(self, sector: int) -> Cipher[Any]:
        iv = plain_iv(self._kind, sector, 16)
        if self._essiv is not None:
            iv = self._essiv.encryptor().update(iv)
        with self._key.view() as key:
            return _reference_context(self._spec.cipher, self._spec.mode, key, iv)

    def _run(self, spans: Sequence[Span], encrypt: bool) -> None:
        if not len(self._key):
            raise ValueError("the key was wiped")
        size = self.sector_size
        for sector, source, target in spans:
            if len(source) != len(target) or len(source) % size or not 0 <= sector < 1 << 64:
                _refuse_span(sector, source, target)
            source, target = memoryview(source), memoryview(target)
            for at in range(0, len(source), size):
                context = self._context(sector + at // 512)
                work: CipherContext = context.encryptor() if encrypt else context.decryptor()
                target[at : at + size] = work.update(source[at : at + size]) + work.finalize()

    def encrypt(self, spans: Sequence[Span]) -> None:
        """See `SectorCipher.encrypt`."""
        self._run(spans, True)

    def decrypt(self, spans: Sequence[Span]) -> None:
        """See `SectorCipher.decrypt`."""
        self._run(spans, False)

    def wipe(self) -> None:
        """See `SectorCipher.wipe`."""
        self._key.wipe()
        self._essiv = None
