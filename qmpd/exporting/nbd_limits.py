"""How much one NBD client may have at a time, and in what portions its connection works."""

from __future__ import annotations

from qmpd.protocols.nbd import MAX_PAYLOAD
from qmpd.units import KiB, MiB

RECEIVE = 256 * KiB
"""Bytes of the buffer that requests are received into: several 64 KiB writes in one call."""

PAYLOAD_TURNS = 8
"""Receives in a row for the payload of a large write, which comes in pieces of a socket's buffer."""

HANDSHAKE_RECEIVE = 8 * KiB
"""Bytes taken at a time before a client has chosen an export."""

IN_FLIGHT = 2 * MAX_PAYLOAD
"""Bytes of reads and writes of one client that may be under way, replies not yet sent included."""

READ_BATCH = 1 * MiB
"""Bytes of one piece of reading: enough to save calls, few enough to overlap it with sending."""

UNSENT = 2 * MiB
"""Bytes of replies that may wait for the client before no more reads are begun: it is slower than
we are, and what is read ahead of it only leaves the processor's cache."""

TURN = 8 * MiB
"""Bytes of reads that one client may have done inline before the loop sees to the others."""

SEND_BUFFER = 1 * MiB
"""Bytes of replies that the kernel may hold, as far as its own limit allows: a full buffer costs a turn of the loop."""

SEND_PARTS = 256
"""Pieces handed to one sendmsg."""

TLS_CHUNK = 64 * KiB
"""Bytes joined before they are encrypted: a record of its own for each header would be waste."""

SMALL_REQUEST = 4 * KiB
"""Bytes that a request without data counts for."""

LINGER = 1.0
"""Seconds that a client of a removed export has to take the replies that are ready for it."""
