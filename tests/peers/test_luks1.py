"""LUKS1 against QEMU and cryptsetup: their volumes through us, ours through them, and the same refusals."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qmpd.crypto.secretbytes import SecretBytes
from qmpd.luks.create import Luks1Options, create_luks1, header_length
from tests.gen import luks1 as gen
from tests.peers.conftest import need
from tests.support.daemon import RawClient
from tests.support.peers import find
from tests.support.reference import reference
from tests.unit.luks.memory import MemoryNode, edge, opened

SIZE = 192 * 1024
SECRET = ["--object", "secret,id=s,data=abc123"]


def run(*command: str | Path, data: bytes = b"", check: bool = True) -> subprocess.CompletedProcess[bytes]:
    program = find(str(command[0]))
    assert program is not None
    done = subprocess.run([program, *map(str, command[1:])], input=data, capture_output=True, timeout=60)
    assert not check or done.returncode == 0, done.stderr.decode(errors="replace")
    return done


def opts(payload: Path, header: Path | None) -> str:
    """Return a json: name for QEMU's tools."""
    tree: dict[str, object] = {
        "driver": "luks",
        "key-secret": "s",
        "file": {"driver": "file", "filename": str(payload)},
    }
    if header is not None:
        tree["header"] = {"driver": "file", "filename": str(header)}
    return "json:" + json.dumps(tree)


def read_by_qemu(payload: Path, header: Path | None) -> bytes:
    out = payload.with_suffix(".out")
    run("qemu-img", "convert", *SECRET, "-O", "raw", opts(payload, header), out)
    return out.read_bytes()


def write_by_qemu(payload: Path, header: Path | None, content: bytes) -> None:
    source = payload.with_suffix(".in")
    source.write_bytes(content)
    target = f"driver=luks,key-secret=s,file.filename={payload}"
    if header is not None:
        target += f",header.driver=file,header.filename={header}"
    run("qemu-img", "convert", "-n", *SECRET, "-f", "raw", "--target-image-opts", source, target)


async def read_by_us(payload: Path, header: Path | None) -> bytes:
    node = await opened(MemoryNode(payload.read_bytes()), MemoryNode(header.read_bytes()) if header else None)
    return bytes(await edge(node).pread(0, node.size))


async def write_by_us(payload: Path, header: Path | None, content: bytes) -> None:
    below = MemoryNode(payload.read_bytes())
    node = await opened(below, MemoryNode(header.read_bytes()) if header else None)
    rng = random.Random(len(content))
    at = 0
    while at < len(content):
        length = rng.randrange(1, 70_000)
        await edge(node).pwrite(at, content[at : at + length])
        at += length
    payload.write_bytes(below.data)


@dataclass(frozen=True)
class Case:
    """One combination."""

    alg: str
    mode: str
    iv: str
    iv_hash: str | None
    hash: str

    def __str__(self) -> str:
        return f"{self.alg}-{self.mode}-{self.iv}:{self.iv_hash}-{self.hash}"

    @property
    def options(self) -> Luks1Options:
        return Luks1Options(self.alg, self.mode, self.iv, self.iv_hash, self.hash, iterations=1000)

    @property
    def qemu(self) -> str:
        text = f"key-secret=s,iter-time=1,cipher-alg={self.alg},cipher-mode={self.mode},ivgen-alg={self.iv}"
        return f"{text},hash-alg={self.hash}" + (f",ivgen-hash-alg={self.iv_hash}" if self.iv_hash else "")


CASES = [
    Case("aes-128", "xts", "plain64", None, "sha256"),
    Case("aes-256", "xts", "plain64", None, "sha256"),
    Case("aes-256", "xts", "plain", None, "sha512"),
    Case("aes-128", "cbc", "plain64", None, "sha1"),
    Case("aes-256", "cbc", "plain64", None, "sha384"),
    Case("aes-128", "cbc", "essiv", "sha256", "sha224"),
    Case("aes-256", "cbc", "essiv", "sha256", "sha512"),
    Case("aes-256", "cbc", "essiv", "md5", "sha1"),
    Case("aes-256", "xts", "essiv", "sha256", "md5"),
    Case("aes-256", "xts", "plain64", "sha1", "ripemd160"),
    Case("aes-128", "xts", "plain64", None, "sm3"),
    Case("aes-256", "ctr", "plain64", None, "sha256"),
    Case("aes-256", "ecb", "plain64", None, "sha256"),
]
CONTENT = random.Random(1).randbytes(SIZE)
OTHER = random.Random(2).randbytes(SIZE)


# Every combination once, alternately whole and detached: each costs QEMU seconds of timing its hash.
@pytest.mark.parametrize(("detached", "case"), [(bool(i % 2), case) for i, case in enumerate(CASES)], ids=str)
async def test_a_volume_that_qemu_made(case: Case, detached: bool, tmp_path: Path, reference: Reference) -> None:
    need("qemu-img")
    payload, header = tmp_path / "p.img", tmp_path / "h.img" if detached else None
    if header is None:
        run("qemu-img", "create", "-q", *SECRET, "-f", "luks", "-o", case.qemu, payload, str(SIZE))
    else:
        reference.create(case, header)
        payload.write_bytes(bytes(SIZE))
    write_by_qemu(payload, header, CONTENT)
    assert await read_by_us(payload, header) == CONTENT
    await write_by_us(payload, header, OTHER)
    assert read_by_qemu(payload, header) == OTHER


@pytest.mark.parametrize("detached", [False, True], ids=["whole", "detached"])
@pytest.mark.parametrize("case", CASES, ids=str)
async def test_a_volume_that_we_made(case: Case, detached: bool, tmp_path: Path) -> None:
    need("qemu-img", "cryptsetup")
    payload, header = tmp_path / "p.img", tmp_path / "h.img" if detached else None
    area = MemoryNode(bytes(header_length(case.options)))
    made = await create_luks1(edge(area), case.options, SecretBytes(b"abc123"), detached=detached)
    payload.write_bytes(bytes(SIZE) if header else bytes(area.data) + bytes(SIZE))
    holder = header or payload
    if header is not None:
        header.write_bytes(area.data)
    await write_by_us(payload, header, CONTENT)
    assert read_by_qemu(payload, header) == CONTENT
    info = json.loads(run("qemu-img", "info", "--output=json", *SECRET, opts(payload, header)).stdout)
    ours = json.loads(json.dumps(made.info()))
    assert info["format-specific"]["data"] == ours
    if case.hash not in ("md5", "sm3"):  # cryptsetup takes no digest below 20 bytes, its crypto library no sm3
        dump = run("cryptsetup", "luksDump", holder).stdout.decode()
        assert made.uuid in dump
        assert "Key Slot 0: ENABLED" in dump
        run("cryptsetup", "isLuks", "--type", "luks1", holder)
        unlock = ["cryptsetup", "open", "--disable-locks", "--test-passphrase", "--key-file=-", holder]
        if case.mode != "ecb" and not (case.iv_hash and case.iv != "essiv"):  # it wants the kernel for those
            run(*unlock, data=b"abc123")
            assert run(*unlock, data=b"abc1234", check=False).returncode == 2


@pytest.mark.parametrize("detached", [False, True], ids=["whole", "detached"])
@pytest.mark.parametrize(
    ("cipher", "bits", "hash_name"),
    [
        ("aes-xts-plain64", 256, "sha256"),
        ("aes-xts-plain64", 512, "sha512"),
        ("aes-xts-plain", 512, "sha1"),
        ("aes-cbc-essiv:sha256", 256, "sha256"),
        ("aes-cbc-plain64", 192, "sha1"),
        ("aes-ctr-plain64", 256, "sha256"),
        ("aes-cbc-plain64be", 256, "sha256"),
        ("aes-cbc-benbi", 128, "sha256"),
        ("camellia-cbc-plain64", 256, "sha256"),
        ("aes-xts-plain64", 512, "ripemd160"),
    ],
)
async def test_a_header_that_cryptsetup_made(
    cipher: str, bits: int, hash_name: str, detached: bool, tmp_path: Path
) -> None:
    need("cryptsetup")
    payload, header = tmp_path / "p.img", tmp_path / "h.img"
    payload.write_bytes(bytes(4 << 20))
    command = ["cryptsetup", "luksFormat", "--type", "luks1", "--batch-mode", "--disable-locks", "--use-urandom"]
    command += ["--pbkdf-force-iterations", "1000", "--hash", hash_name, "--cipher", cipher, "--key-size", str(bits)]
    place = ["--header", str(header)] if detached else []
    run(*command, *place, payload, "-", data=b"abc123")
    run("cryptsetup", "luksAddKey", "--batch-mode", "--disable-locks", "--pbkdf-force-iterations", "1000",
        "--key-file=-", header if detached else payload, _keyfile(tmp_path), data=b"abc123")  # fmt: skip
    node = await opened(MemoryNode(payload.read_bytes()), MemoryNode(header.read_bytes()) if detached else None)
    info = node.image_info()["format-specific"]["data"]
    assert [slot["active"] for slot in info["slots"]] == [True, True] + [False] * 6
    assert node.size == (4 << 20) - info["payload-offset"]
    assert info["detached-header"] is detached
    if cipher.startswith("aes-") and cipher.endswith(("plain", "plain64", "sha256")) and bits != 192:
        need("qemu-img")
        await write_by_us(payload, header if detached else None, CONTENT)
        assert read_by_qemu(payload, header if detached else None)[:SIZE] == CONTENT


def _keyfile(folder: Path) -> Path:
    path = folder / "second"
    path.write_bytes(b"second passphrase")
    return path


async def test_the_second_slot_that_cryptsetup_added_opens(tmp_path: Path) -> None:
    need("cryptsetup")
    header = tmp_path / "h.img"
    header.write_bytes(gen.header(detached=True))
    key = tmp_path / "new"
    key.write_bytes(b"abc1234")
    run("cryptsetup", "luksAddKey", "--batch-mode", "--disable-locks", "--pbkdf-force-iterations", "1000",
        "--key-file=-", header, key, data=gen.PASSPHRASE)  # fmt: skip
    node = await opened(MemoryNode(bytes(512)), MemoryNode(header.read_bytes()), secret="wrong")
    assert node.size == 512


class Reference:
    """A storage daemon of QEMU's."""

    def __init__(self, client: RawClient) -> None:
        self.client = client

    def answer(self, payload: Path, header: Path | None) -> str:
        """Open and close a volume; return "" or the error's text."""
        tree = json.loads(opts(payload, header).removeprefix("json:"))
        reply = self.client.send({"execute": "blockdev-add", "arguments": {**tree, "node-name": "l"}})
        if "error" in reply:
            return str(reply["error"]["desc"])
        self.client.ok("blockdev-del", node_name="l")
        return ""

    def create(self, case: Case, header: Path) -> None:
        """Make a header apart from its payload: qemu-img of this version refuses its own option for that,
        and a payload named in blockdev-create stays locked."""
        header.touch()
        self.client.ok("blockdev-add", driver="file", node_name="h", filename=str(header))
        options: dict[str, object] = {"driver": "luks", "header": "h", "size": SIZE, "key-secret": "s", "iter-time": 1}
        options |= {"cipher-alg": case.alg, "cipher-mode": case.mode, "ivgen-alg": case.iv, "hash-alg": case.hash}
        if case.iv_hash:
            options["ivgen-hash-alg"] = case.iv_hash
        self.client.ok("blockdev-create", job_id="j", options=options)
        while self.client.wait_event("JOB_STATUS_CHANGE")["data"]["status"] != "concluded":
            pass
        assert "error" not in self.client.ok("query-jobs")[0]
        self.client.ok("job-dismiss", id="j")
        self.client.ok("blockdev-del", node_name="h")


@pytest.fixture(scope="module", name="reference")
def _reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    need("qemu-storage-daemon")
    with reference(tmp_path_factory.mktemp("qsd"), *SECRET) as client:
        yield Reference(client)


WRAPS = ("slot 7 at the end of all",)
"""Where QEMU's 32-bit sum wraps around and lets the slot pass."""


@pytest.mark.parametrize("detached", [False, True], ids=["whole", "detached"])
@pytest.mark.parametrize("broken", gen.BROKEN, ids=lambda broken: broken.name)
def test_the_reference_gives_the_same_verdict_and_text(
    broken: gen.Broken, detached: bool, reference: Reference, tmp_path: Path
) -> None:
    data = gen.patched(gen.header(detached=detached), *broken.patches)
    payload, header = tmp_path / "p.img", tmp_path / "h.img" if detached else None
    payload.write_bytes(bytes(1 << 20) if header else data + bytes(SIZE))
    if header is not None:
        header.write_bytes(data)
    expected = broken.detached if detached else broken.whole
    answer = reference.answer(payload, header)
    assert answer == ("" if broken.name in WRAPS else expected)


def test_unbroken_headers_open_in_the_reference(reference: Reference, tmp_path: Path) -> None:
    payload, header = tmp_path / "p.img", tmp_path / "h.img"
    payload.write_bytes(gen.header(detached=False) + bytes(SIZE))
    assert reference.answer(payload, None) == ""
    header.write_bytes(gen.header(detached=True))
    assert reference.answer(payload, header) == ""
