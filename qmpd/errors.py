"""The exception tree; each class of QMP error has one branch here.

Above the data path every refusal is a `QmpdError` whose text is shown to users as it is. On the
data path there is only `OSError`: an errno is all that NBD, virtio and the events can carry.

    QmpdError                 GenericError
     +-- CommandError         a request that cannot be done
     |    +-- CommandNotFound, DeviceNotFound, DeviceNotActive   their own QMP class
     |    +-- PermissionConflict, FileTooLarge
     +-- ValidationError      arguments that do not fit the schema
     +-- ImageError           a file that breaks its format
     +-- StateError           an object in the wrong state for the request
"""

from __future__ import annotations

from typing import ClassVar


class QmpdError(Exception):
    """Base of everything that is answered to a client; `str()` is the text.

    `hint` is a second line for people at a command line; QMP replies leave it out, as QEMU does.
    """

    error_class: ClassVar[str] = "GenericError"

    def __init__(self, text: str, *, hint: str | None = None) -> None:
        super().__init__(text)
        self.hint = hint


class CommandError(QmpdError):
    """A well-formed request that cannot be carried out."""


class CommandNotFound(CommandError):
    """The command does not exist, or not in this mode of the session."""

    error_class = "CommandNotFound"


class DeviceNotFound(CommandError):
    """A device, or a path in the QOM tree, that does not exist."""

    error_class = "DeviceNotFound"


class DeviceNotActive(CommandError):
    """A device that exists but is not active."""

    error_class = "DeviceNotActive"


class PermissionConflict(CommandError):
    """Two parents of one node want what the other does not share."""


class FileTooLarge(CommandError):
    """A size that a file or a format cannot have (EFBIG in QEMU, whose callers often say it in their own words)."""


class ValidationError(QmpdError):
    """Arguments that do not fit the schema; the text carries the dotted path of the member."""


class ImageError(QmpdError):
    """Bytes that break their format.

    image   file or node name        offset  byte offset of the field, None if it has none
    field   the format's own name    found   value as shown to the user
    expected  what would have been accepted
    """

    def __init__(self, image: str, offset: int | None, field: str, found: str, expected: str) -> None:
        field, found, expected = (shortened(text) for text in (field, found, expected))
        place = image if offset is None else f"{image}: byte {offset}"
        super().__init__(f"{place}: {field} is {found}, expected {expected}")
        self.image, self.offset, self.field = image, offset, field
        self.found, self.expected = found, expected


def shortened(text: str, most: int = 200) -> str:
    """Return text from an image, which may be as long as the image makes it, fit to stand in an error."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


class StateError(QmpdError):
    """An object (job, export, session) that is in the wrong state for the request."""


def device_not_found(name: str) -> DeviceNotFound:
    """Return the error QEMU gives for an id or path that names nothing."""
    return DeviceNotFound(f"Device '{name}' not found")
