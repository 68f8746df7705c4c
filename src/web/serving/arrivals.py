"""When a request came in: that may be long before it was read.

While the process is stopped, or the machine does not get to it, requests wait in the kernel, and
their clients give up. Linux tells how long ago the last bytes of a connection came; elsewhere a
request came in when it was read.
"""

import asyncio
import math
import socket
import struct
import sys
import time

from uvicorn.protocols.http.flow_control import FlowControl

# In the scope's state, from our protocol: how long a request had waited when its head was read, in
# seconds; and from its start on, who waits for it (payments.commands.runs.Caller).
WAITED_S = "waited_s"
CALLER = "caller"

# tcpi_last_data_recv of struct tcp_info (linux/tcp.h), in milliseconds.
_LAST_DATA_RECV = struct.Struct("=I")
_OFFSET = 52
_TCP_INFO = (
    (int(socket.IPPROTO_TCP), int(socket.TCP_INFO), _OFFSET + _LAST_DATA_RECV.size)
    if sys.platform == "linux"
    else None
)


class Flow(FlowControl):
    """Knows since when what comes is read: what waited because we did not read is not late."""

    reading_since = -math.inf

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self._socket = transport.get_extra_info("socket")

    def came_in(self) -> float:
        """When what was just read had come, by time.monotonic."""
        now = time.monotonic()
        return max(now - self._unread_s(), min(now, self.reading_since))

    def _unread_s(self) -> float:
        if _TCP_INFO is None:
            return 0.0
        try:
            info = self._socket.getsockopt(*_TCP_INFO)
            return _LAST_DATA_RECV.unpack_from(info, _OFFSET)[0] / 1000  # type: ignore[no-any-return]
        except (OSError, struct.error):  # no TCP, or a kernel that says less
            return 0.0

    def resume_reading(self) -> None:
        if self.read_paused:
            self.reading_since = time.monotonic()
        super().resume_reading()
