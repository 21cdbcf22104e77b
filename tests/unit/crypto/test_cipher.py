"""SectorCipher: published vectors, and both engines against each other."""

from __future__ import annotations

import hashlib
import os
import threading

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from qmpd.crypto import cipher
from qmpd.crypto.cipher import CipherSpec, check_spec, open_cipher
from qmpd.errors import CommandError

ENGINES = [
    pytest.param(
        "compiled",
        marks=pytest.mark.skipif(
            cipher._native is None and os.environ.get("QMPD_PEERS") != "required",
            reason="the compiled sector loop is not built (python -m qmpd.crypto._sectors_build)",
        ),
    ),
    "reference",
]

ORDINARY = bytes(range(256)) * 2

# IEEE Std 1619-2007, annex B, vectors 4 (aes-128), 10 and 12 (aes-256): 512 bytes 00 .. ff 00 .. ff.
XTS_VECTORS = [
    (
        "2718281828459045235360287471352631415926535897932384626433832795",
        0,
        "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89cc78cf7f5e543445f8333d8fa7f560000"
        "05279fa5d8b5e4ad40e736ddb4d35412328063fd2aab53e5ea1e0a9f332500a5df9487d07a5c92cc512c8866c7e860ce"
        "93fdf166a24912b422976146ae20ce846bb7dc9ba94a767aaef20c0d61ad02655ea92dc4c4e41a8952c651d33174be51"
        "a10c421110e6d81588ede82103a252d8a750e8768defffed9122810aaeb99f9172af82b604dc4b8e51bcb08235a6f434"
        "1332e4ca60482a4ba1a03b3e65008fc5da76b70bf1690db4eae29c5f1badd03c5ccf2a55d705ddcd86d449511ceb7ec3"
        "0bf12b1fa35b913f9f747a8afd1b130e94bff94effd01a91735ca1726acd0b197c4e5b03393697e126826fb6bbde8ecc"
        "1e08298516e2c9ed03ff3c1b7860f6de76d4cecd94c8119855ef5297ca67e9f3e7ff72b1e99785ca0a7e7720c5b36dc6"
        "d72cac9574c8cbbc2f801e23e56fd344b07f22154beba0f08ce8891e643ed995c94d9a69c9f1b5f499027a78572aeebd"
        "74d20cc39881c213ee770b1010e4bea718846977ae119f7a023ab58cca0ad752afe656bb3c17256a9f6e9bf19fdd5a38"
        "fc82bbe872c5539edb609ef4f79c203ebb140f2e583cb2ad15b4aa5b655016a8449277dbd477ef2c8d6c017db738b18d"
        "eb4a427d1923ce3ff262735779a418f20a282df920147beabe421ee5319d0568",
    ),
    (
        "27182818284590452353602874713526624977572470936999595749669676273141592653589793238462643383279502884197"
        "169399375105820974944592",
        0xFF,
        "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b5d31e276f8fe4a8d66b317f9ac683f44"
        "680a86ac35adfc3345befecb4bb188fd5776926c49a3095eb108fd1098baec70aaa66999a72a82f27d848b21d4a741b0"
        "c5cd4d5fff9dac89aeba122961d03a757123e9870f8acf1000020887891429ca2a3e7a7d7df7b10355165c8b9a6d0a7d"
        "e8b062c4500dc4cd120c0f7418dae3d0b5781c34803fa75421c790dfe1de1834f280d7667b327f6c8cd7557e12ac3a0f"
        "93ec05c52e0493ef31a12d3d9260f79a289d6a379bc70c50841473d1a8cc81ec583e9645e07b8d9670655ba5bbcfecc6"
        "dc3966380ad8fecb17b6ba02469a020a84e18e8f84252070c13e9f1f289be54fbc481457778f616015e1327a02b140f1"
        "505eb309326d68378f8374595c849d84f4c333ec4423885143cb47bd71c5edae9be69a2ffeceb1bec9de244fbe15992b"
        "11b77c040f12bd8f6a975a44a0f90c29a9abc3d4d893927284c58754cce294529f8614dcd2aba991925fedc4ae74ffac"
        "6e333b93eb4aff0479da9a410e4450e0dd7ae4c6e2910900575da401fc07059f645e8b7e9bfdef33943054ff84011493"
        "c27b3429eaedb4ed5376441a77ed43851ad77f16f541dfd269d50d6a5f14fb0aab1cbb4c1550be97f7ab4066193c4caa"
        "773dad38014bd2092fa755c824bb5e54c4f36ffda9fcea70b9c6e693e148c151",
    ),
]

# NIST SP 800-38A, F.2.1 and F.2.5: four blocks of CBC under the IV 00 01 .. 0f.
NIST_PLAIN = bytes.fromhex(
    "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
    "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
)
CBC_VECTORS = [
    (
        "2b7e151628aed2a6abf7158809cf4f3c",
        "7649abac8119b246cee98e9b12e9197d5086cb9b507219ee95db113a917678b2"
        "73bed6b8e3c1743b7116e69e222295163ff1caa1681fac09120eca307586e1a7",
    ),
    (
        "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
        "f58c4c04d6e5f1ba779eabfb5f7bfbd69cfc4e967edb808d679f777bc6702c7d"
        "39f23369a9d9bacfa530e26304231461b2eb05e2c39be9fcda6c19078c6a9d1b",
    ),
]


def spec(name: str, iv: str = "plain64", iv_hash: str | None = None, sector_size: int = 512) -> CipherSpec:
    algorithm, bits, mode = name.split("-")
    return CipherSpec(algorithm, mode, iv, iv_hash, int(bits) // 8 * (2 if mode == "xts" else 1), sector_size)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("key", "sector", "expected"), XTS_VECTORS)
def test_published_xts_vectors(engine: str, key: str, sector: int, expected: str) -> None:
    raw = bytes.fromhex(key)
    work = open_cipher(spec(f"aes-{len(raw) * 4}-xts"), raw, engine=engine)
    buffer = bytearray(ORDINARY)
    work.encrypt([(sector, buffer, buffer)])
    assert buffer.hex() == expected
    work.decrypt([(sector, buffer, buffer)])
    assert buffer == ORDINARY


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("key", "expected"), CBC_VECTORS)
def test_published_cbc_vectors(engine: str, key: str, expected: str) -> None:
    """Sector 0 has an IV of zeroes, so the vector's own IV goes into the first plain block."""
    raw = bytes.fromhex(key)
    first = bytes(a ^ b for a, b in zip(NIST_PLAIN[:16], bytes(range(16)), strict=True))
    buffer = bytearray(first + NIST_PLAIN[16:] + bytes(448))
    open_cipher(spec(f"aes-{len(raw) * 8}-cbc"), raw, engine=engine).encrypt([(0, buffer, buffer)])
    assert buffer[:64].hex() == expected


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("iv", "iv_hash", "expected"),
    [
        ("plain", None, "efbeadde000000000000000000000000"),
        ("plain64", None, "efbeadde785634120000000000000000"),
        ("plain64be", None, "000000000000000012345678deadbeef"),
        ("benbi", None, "0000000000000000468acf1bd5b7dde1"),
        ("null", None, "00000000000000000000000000000000"),
        ("essiv", "sha256", None),
        ("essiv", "md5", None),
    ],
)
def test_initial_values(engine: str, iv: str, iv_hash: str | None, expected: str | None) -> None:
    """CBC of a zero block is the encryption of its IV: so the IV can be read off."""
    key, sector = bytes(range(32)), 0x12345678_DEADBEEF
    if expected is None:
        essiv = Cipher(algorithms.AES(hashlib.new(iv_hash or "", key).digest()), modes.ECB()).encryptor()
        expected = essiv.update(sector.to_bytes(8, "little") + bytes(8)).hex()
    buffer = bytearray(512)
    open_cipher(spec("aes-256-cbc", iv, iv_hash), key, engine=engine).encrypt([(sector, buffer, buffer)])
    undo = Cipher(algorithms.AES(key), modes.ECB()).decryptor()
    assert undo.update(bytes(buffer[:16])).hex() == expected


NAMES = [
    "aes-128-xts",
    "aes-256-xts",
    "aes-128-cbc",
    "aes-192-cbc",
    "aes-256-cbc",
    "aes-256-ctr",
    "aes-192-ecb",
    "camellia-128-ecb",
    "camellia-256-cbc",
]
IVS = [("plain", None), ("plain64", None), ("plain64be", None), ("benbi", None), ("null", None), ("essiv", "sha256")]


@pytest.mark.skipif(cipher._native is None, reason="the compiled sector loop is not built")
@given(data=st.data())
def test_engines_agree(data: st.DataObject) -> None:
    name, (iv, iv_hash) = data.draw(st.sampled_from(NAMES)), data.draw(st.sampled_from(IVS))
    size = data.draw(st.sampled_from([512, 1024, 2048, 4096]))
    one = spec(name, iv, iv_hash, size)
    key = data.draw(st.binary(min_size=one.key_length, max_size=one.key_length).filter(lambda k: len(set(k)) > 2))
    if one.mode == "xts" and key[: len(key) // 2] == key[len(key) // 2 :]:
        key = bytes([key[0] ^ 1]) + key[1:]
    counts = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    in_place = data.draw(st.booleans())
    top = (1 << 64) - 5 * 8
    starts = [data.draw(st.integers(0, 1 << 33) | st.integers(0, top)) for _ in counts]
    plain = [os.urandom(count * size) for count in counts]
    results = []
    for engine in ("compiled", "reference"):
        work = open_cipher(one, key, engine=engine)
        targets = [bytearray(text) if in_place else bytearray(len(text)) for text in plain]
        sources = targets if in_place else plain
        work.encrypt([(s, a, b) for s, a, b in zip(starts, sources, targets, strict=True)])
        results.append([bytes(target) for target in targets])
        work.decrypt([(s, b, b) for s, b in zip(starts, targets, strict=True)])
        assert targets == plain
    assert results[0] == results[1]


@pytest.mark.parametrize("engine", ENGINES)
def test_sectors_of_one_span_are_numbered_in_512_bytes(engine: str) -> None:
    key = os.urandom(64)
    work = open_cipher(spec("aes-256-xts", sector_size=4096), key, engine=engine)
    plain = os.urandom(8192)
    whole, parts = bytearray(8192), bytearray(8192)
    work.encrypt([(16, plain, whole)])
    work.encrypt([(16, plain[:4096], memoryview(parts)[:4096]), (24, plain[4096:], memoryview(parts)[4096:])])
    assert whole == parts


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("span", [(0, 100, 100), (0, 512, 1024), (-1, 512, 512), (1 << 64, 512, 512)])
def test_spans_that_are_no_sectors_are_refused(engine: str, span: tuple[int, int, int]) -> None:
    work = open_cipher(spec("aes-128-xts"), bytes(range(32)), engine=engine)
    with pytest.raises(ValueError, match="whole sectors"):
        work.decrypt([(span[0], bytes(span[1]), bytearray(span[2]))])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_read_only_target_is_refused(engine: str) -> None:
    work = open_cipher(spec("aes-128-xts"), bytes(range(32)), engine=engine)
    with pytest.raises((BufferError, TypeError)):
        work.encrypt([(0, bytes(512), memoryview(bytes(512)))])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_wiped_cipher_is_of_no_use(engine: str) -> None:
    work = open_cipher(spec("aes-128-xts"), bytes(range(32)), engine=engine)
    work.wipe()
    with pytest.raises(ValueError, match="wiped"):
        work.decrypt([(0, bytearray(512), bytearray(512))])


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_share_a_cipher(engine: str) -> None:
    work = open_cipher(spec("aes-256-xts"), os.urandom(64), engine=engine)
    plain = os.urandom(64 * 512)
    expected = bytearray(plain)
    work.encrypt([(7, expected, expected)])
    wrong = []

    def run() -> None:
        for _ in range(20):
            mine = bytearray(plain)
            work.encrypt([(7, mine, mine)])
            if mine != expected:
                wrong.append(1)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("one", "text"),
    [
        (spec("aes-192-xts"), "Algorithm 'aes' with key size 24 bytes not supported"),
        (spec("serpent-256-xts"), "Algorithm 'serpent' with key size 32 bytes not supported"),
        (spec("camellia-256-xts"), "Algorithm 'camellia' with key size 32 bytes not supported"),
        (CipherSpec("aes", "xts", "plain64", None, 33), "Algorithm 'aes' with key size 16 bytes not supported"),
        (CipherSpec("aes", "xts", "plain64", None, 0), "Algorithm 'aes' with key size 0 bytes not supported"),
        (spec("aes-256-gcm"), "Cipher mode 'gcm' not supported"),
        (spec("aes-256-xts", "random"), "IV generator 'random' not supported"),
        (spec("aes-256-xts", "essiv"), "Missing IV generator hash specification"),
        (spec("aes-256-cbc", "essiv", "sha1"), "No AES cipher with key size 20 available"),
        (spec("aes-256-xts", sector_size=520), "Sector size 520 not supported"),
        (spec("aes-256-xts", sector_size=8192), "Sector size 8192 not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(one: CipherSpec, text: str) -> None:
    with pytest.raises(CommandError) as caught:
        check_spec(one)
    assert str(caught.value) == text


def test_a_key_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="a key of 32 bytes for aes-256-xts, which takes 64"):
        open_cipher(spec("aes-256-xts"), bytes(32))


def test_the_engine_says_what_it_is() -> None:
    assert cipher.engine_name().startswith(("compiled engine, OpenSSL", "reference engine"))
