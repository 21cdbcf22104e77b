"""qmpd-img luks encrypt: an image becomes the payload of a LUKS2 volume where it lies, by the job of the daemon."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from qmpd.cli.img._common import parse_number, refuse
from qmpd.errors import CommandError

if TYPE_CHECKING:
    from qmpd.cli.image import Workshop

FORMATS = ("raw", "qcow2")
KEY, PAYLOAD, HEADER, VOLUME = "encrypt-key", "encrypt-payload", "encrypt-header", "encrypt-volume"


async def encrypt(shop: Workshop, args: argparse.Namespace, image: str, header: str) -> None:
    """Encrypt `image`, its header going to the file `header`; go on if that was begun. Raises CommandError, OSError."""
    from qmpd.jobs.job import JobManager
    from qmpd.jobtypes.encrypt import EncryptJob

    image_format = args.format or "raw"
    if image_format not in FORMATS or args.image_opts:
        refuse("luks", f"'encrypt' takes an image file of format {' or '.join(FORMATS)}")
    options: dict[str, Any] = {"file": PAYLOAD, "header": HEADER, "key-secret": _key(shop, args)}
    for name in ("iter-time", "iterations", "pbkdf-memory", "pbkdf-parallel"):
        text = getattr(args, name.replace("-", "_"))
        if text is not None:
            options[name] = parse_number(name, text, 0, (1 << 32) - 1)
    if args.pbkdf is not None:
        options["pbkdf"] = args.pbkdf
    await shop.graph.blockdev_add(
        {"driver": image_format, "node-name": PAYLOAD, "file": {"driver": "file", "filename": image}}
    )
    os.close(os.open(header, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    await shop.graph.blockdev_add({"driver": "file", "node-name": HEADER, "filename": header})
    jobs = JobManager(shop.graph.events)
    job = jobs.add(lambda: EncryptJob(jobs, "encrypt", shop.graph, VOLUME, options), "encrypt")
    job.start()
    assert job.task is not None
    await job.task
    if job.error is not None:
        raise CommandError(job.error)


def _key(shop: Workshop, args: argparse.Namespace) -> str:
    """Return the id of the secret with the passphrase."""
    if (args.secret is None) == (args.key_file is None):
        refuse("luks", "'encrypt' takes the passphrase from --secret or from --key-file")
    if args.secret is not None:
        return str(args.secret)
    file = "/dev/stdin" if args.key_file == "-" else args.key_file
    shop.add_object({"qom-type": "secret", "id": KEY, "file": file})
    return KEY
