"""When a request arrived, which may be long before it was read.

While the process is stopped or gets no CPU, requests wait in the kernel, and their clients time
out. Linux reports how long ago the last bytes of a connection arrived; elsewhere the time of
reading counts.
"""

import asyncio
import math
import socket
import struct
import sys
import time

from uvicorn.protocols.http.flow_control import FlowControl

# Set by our protocol in the scope's state: how long the request had waited when its header section
# was read, in seconds; and, once it is started, its client (payments.commands.runs.Caller).
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
    """Flow control that knows since when we read: data is not late while we paused reading."""

    reading_since = -math.inf

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self._socket = transport.get_extra_info("socket")

    def came_in(self) -> float:
        """When the data that was just read had arrived, by time.monotonic."""
        now = time.monotonic()
        return max(now - self._unread_s(), min(now, self.reading_since))

    def _unread_s(self) -> float:
        if _TCP_INFO is None:
            return 0.0
        try:
            info = self._socket.getsockopt(*_TCP_INFO)
            return _LAST_DATA_RECV.unpack_from(info, _OFFSET)[0] / 1000  # type: ignore[no-any-return]
        except (OSError, struct.error):  # not TCP, or a kernel with a shorter struct
            return 0.0

    def resume_reading(self) -> None:
        if self.read_paused:
            self.reading_since = time.monotonic()
        super().resume_reading()
