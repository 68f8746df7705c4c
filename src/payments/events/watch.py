"""Notices that the log went back: that it lacks what it had acknowledged to this process.

Each process remembers the last event that was acknowledged to it, and compares what stands at that
position: when the appender has connected again, before anything is given back, and every second.
The newest seal is remembered too, also in a file, since a restart forgets. Only a server that may
be written is asked: a standby may be behind, and is the log of nobody yet.
"""

import asyncio
import os
import socket
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import msgspec
import psycopg
from eventsourcing.persistence import StoredEvent
from loguru import logger

from payments.database.connections import READ_TIMEOUT_S, Database
from payments.errors import DatabaseUnavailable, LogRewound
from payments.events import losses
from payments.events.losses import Fetch
from payments.events.store import HEAD_POSITION
from payments.observability.logs import Repeats
from payments.observability.metrics import Telemetry
from payments.tasks import end

LOOK_S = 1.0
HEADS_MAX = 600  # remembered, one a second: a standby that is allowed to lag lags less than that

# Without a remembered event or seal the parameters are NULL, and so is what is found of them.
LOOK = """
SELECT pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean,
       (SELECT coalesce(max(notification_id), 0) FROM payment_events),
       coalesce((SELECT e.originator_id = %(stream)s AND e.originator_version = %(version)s
                    AND e.topic = %(topic)s AND e.state = %(state)s
                   FROM payment_events e WHERE e.notification_id = %(position)s), false),
       (SELECT s.hash FROM log_seals s WHERE s.position = %(sealed)s),
       newest.position, newest.hash,
       (SELECT coalesce(max(id), 0) FROM log_losses WHERE kind = 'found'),
       (SELECT coalesce(max(id), 0) FROM log_losses WHERE kind = 'accepted')
  FROM (SELECT) AS one
  LEFT JOIN LATERAL (
       SELECT position, hash FROM log_seals ORDER BY position DESC LIMIT 1) AS newest ON true
"""

_NOTHING: dict[str, Any] = dict.fromkeys(
    ("position", "stream", "version", "topic", "state", "sealed")
)

SEALS_AT = """
SELECT position, hash FROM log_seals WHERE position = ANY (%(positions)s::bigint[])
"""


class Seal(NamedTuple):
    position: int
    hash: bytes


class KeptHead(msgspec.Struct, frozen=True, kw_only=True):
    """The file: the newest seal that a process has seen of this log; `hash` in hexadecimal.

    `database` tells a restored copy, which has the same id, from the log itself; `accepted` is the
    id in log_losses of the last acceptance that was known.
    """

    log: UUID
    database: int
    position: int
    hash: str
    accepted: int = 0


class _Look(NamedTuple):
    read_only: bool
    end: int
    fits: bool
    seal: bytes | None
    newest_position: int | None
    newest_hash: bytes | None
    found_id: int
    accepted_id: int


class LogWatch:
    """One per process."""

    def __init__(
        self, database: Database, telemetry: Telemetry, data_dir: Path | None = None
    ) -> None:
        """The newest seal is kept in `data_dir`; without one a restart forgets it."""
        self._database = database
        self._telemetry = telemetry
        self._data_dir = data_dir
        self._log: tuple[UUID, int] | None = None  # its id and the database's
        self._last: tuple[int, StoredEvent] | None = None
        self._heads: deque[Seal] = deque(maxlen=HEADS_MAX)
        self._end = 0  # of the log, as of the last look
        self._accepted_id = 0
        self._unrecorded = False
        self._complained = 0
        self._repeats = Repeats()
        self._keeps = True  # whether the file could be written
        self._kept: KeptHead | None = None
        self._task: asyncio.Task[None] | None = None
        # As of the last look. `lost`: something is, and nobody has accepted it.
        self.lost = False
        self.read_only = False

    async def start(self) -> None:
        """Looks once, then every second; a database that is away is looked at later."""
        try:
            await self.take_up()
            await self.look()
        except DatabaseUnavailable:
            pass
        except psycopg.Error as error:
            self._log_failure(error)
        self._task = asyncio.create_task(self._run(), name="log watch")

    async def stop(self) -> None:
        if self._task is not None:
            await end({self._task}, 1)
        await self._keep()

    def acknowledged(self, position: int, event: StoredEvent) -> None:
        """An append was acknowledged: from now on its last event must stand at this position."""
        if self._last is None or position > self._last[0]:
            self._last = position, event

    async def refuse_if_lost(self) -> None:
        """Before anything is given back. Raises LogRewound or DatabaseUnavailable."""
        await self.look()
        self.refuse_if_known_lost()

    def refuse_if_known_lost(self) -> None:
        """The same as of the last look; raises LogRewound."""
        if self.lost:
            raise LogRewound(
                "The database lost events that it had acknowledged, perhaps in a failover. "
                "They may include refunds, so refunds are stopped until an operator has "
                "compared the log with the provider (`payments log accept-loss`). Retry then, "
                "with the same key."
            )

    async def look(
        self, database: Database | None = None, timeout_s: float = READ_TIMEOUT_S
    ) -> None:
        """Compares; raises DatabaseUnavailable."""
        await self._look(partial((database or self._database).fetch, timeout_s=timeout_s))

    async def look_through(self, cursor: psycopg.AsyncCursor[Any]) -> None:
        """The same on a connection that is about to write. What goes wrong with looking does not
        stop that; raises psycopg.Error if the connection is lost, or the server refuses to
        write."""

        async def fetch(query: str, params: dict[str, Any]) -> list[tuple[Any, ...]]:
            await cursor.execute(query.encode(), params)
            return await cursor.fetchall()

        try:
            await self._look(fetch)
        except psycopg.Error as error:
            if cursor.connection.closed:
                raise
            self._log_failure(error)
        if self.read_only:
            # It may become the primary before anything else is asked on this connection.
            raise psycopg.OperationalError("the server rejects writes")

    async def _look(self, fetch: Fetch) -> None:
        # As of now: another look may come back sooner than this one, with what came since.
        last, head, end = self._last, self._heads[-1] if self._heads else None, self._end
        look = _Look(*(await fetch(LOOK, _asked(last, head)))[0])
        self.read_only = look.read_only
        if not look.read_only:
            shorter = end if look.end < end else 0
            lost = max(_lost_event(look, last), _lost_seal(look, head), shorter)
            if lost and await self._found(lost, fetch):
                # From here on the record says it, and the log as it is counts.
                if self._last is last:
                    self._last = None
                if self._heads and self._heads[-1] is head:
                    self._heads.clear()
                self._end = 0
                look = _Look(*(await fetch(LOOK, _NOTHING))[0])
            elif not lost:
                self._remember(look)
        self.lost = self._unrecorded or look.found_id > look.accepted_id
        self._telemetry.log_rewound.set(self.lost)

    def _remember(self, look: _Look) -> None:
        self._accepted_id = look.accepted_id
        self._end = max(self._end, look.end)
        if look.newest_position is None or look.newest_hash is None:
            return
        if not self._heads or look.newest_position > self._heads[-1].position:
            self._heads.append(Seal(look.newest_position, bytes(look.newest_hash)))

    async def _found(self, lost: int, fetch: Fetch) -> bool:
        """Puts on record that the log lacks what stood at `lost`, unless that is accepted. False:
        the role may not, so this process alone knows, and tries again."""
        since = {"accepted": self._accepted_id, "position": lost}
        if not await fetch(losses.ACCEPTED_SINCE, since):
            self._complain(lost)
            self._unrecorded = self.lost = True
            self._telemetry.log_rewound.set(1)
            try:
                await self._put_on_record(lost, fetch)
            except psycopg.errors.InsufficientPrivilege:
                return False
        self._unrecorded = False
        return True

    async def _put_on_record(self, lost: int, fetch: Fetch) -> None:
        hashes = {head.position: head.hash for head in self._heads}
        stored: dict[int, bytes] = dict(await fetch(SEALS_AT, {"positions": list(hashes)}))
        # A head that fits behind one that does not is of the log as it is now.
        first_lost = min([lost, *(each for each in hashes if stored.get(each) != hashes[each])])
        fitting = [position for position in stored if position < first_lost]
        await losses.add(
            fetch,
            "found",
            f"{socket.gethostname()}:{os.getpid()}",
            "the log lacks what it had acknowledged to this process",
            kept_position=max(fitting, default=0),
            lost_position=lost,
            lost_hash=hashes.get(lost),
        )

    def _complain(self, lost: int) -> None:
        if self._complained != lost:
            self._complained = lost
            logger.bind(position=lost).critical(
                "the log was rewound: it lacks acknowledged events; no refund is sent until "
                "`payments log accept-loss`"
            )

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                if self._log is None:
                    await self.take_up()
                await self.look()
                await self._keep()
            except DatabaseUnavailable:
                continue
            except Exception as error:  # noqa: BLE001 - it must go on looking, whatever it is
                self._log_failure(error)

    def _log_failure(self, error: Exception) -> None:
        reason = type(error).__name__
        self._repeats.tell(
            "ERROR", "the log cannot be checked for losses", of=reason, reason=reason
        )

    async def take_up(self, heads: Sequence[Seal] = ()) -> None:
        """Takes up what a process before this one has kept, and these heads, and compares each.

        Raises DatabaseUnavailable.
        """
        fetch = self._database.fetch
        if (log := await losses.log_id(self._database)) is not None:
            ((database,),) = await fetch(losses.DATABASE_ID)
            self._log = log, database
        known = [*heads, *self._heads]
        if self._data_dir is not None and self._log is not None:
            kept = await asyncio.to_thread(read_head, self._data_dir, *self._log)
            if kept is not None:
                self._kept = kept
                self._accepted_id = kept.accepted
                known.append(Seal(kept.position, bytes.fromhex(kept.hash)))
        self._heads = deque(sorted(known), maxlen=HEADS_MAX)
        stored = dict(await fetch(SEALS_AT, {"positions": [head.position for head in known]}))
        ((end,),) = await fetch(HEAD_POSITION)
        lost = [head.position for head in known if _is_lost(head, stored.get(head.position), end)]
        if lost and await self._found(max(lost), fetch):
            self._heads.clear()

    async def _keep(self) -> None:
        if self._data_dir is None or self._log is None or not self._heads:
            return
        position, hash = self._heads[-1]
        log, database = self._log
        head = KeptHead(
            log=log,
            database=database,
            position=position,
            hash=hash.hex(),
            accepted=self._accepted_id,
        )
        if head == self._kept:
            return
        try:
            await asyncio.to_thread(write_head, self._data_dir, head)
            self._kept, self._keeps = head, True
        except OSError as error:
            if self._keeps:
                logger.bind(reason=error.strerror).info(
                    "the newest seal cannot be written to a file"
                )
            self._keeps = False


async def find_loss(database: Database, data_dir: Path | None, heads: Sequence[Seal]) -> None:
    """Looks at what is kept in `data_dir` and at these heads; what is lost is put on record.

    Raises DatabaseUnavailable.
    """
    await LogWatch(database, Telemetry(), data_dir).take_up(heads)


def read_head(data_dir: Path, log: UUID, database: int) -> KeptHead | None:
    """What was kept of this log; None if nothing was, or it cannot be read."""
    with suppress(OSError, msgspec.MsgspecError, ValueError):
        content = _head_file(data_dir, log, database).read_bytes()
        kept = msgspec.json.decode(content, type=KeptHead)
        if (kept.log, kept.database) == (log, database) and len(bytes.fromhex(kept.hash)) == 32:
            return kept
    return None


def write_head(data_dir: Path, head: KeptHead) -> None:
    """Replaces the file as a whole; OSError."""
    file = _head_file(data_dir, head.log, head.database)
    data_dir.mkdir(parents=True, exist_ok=True)
    written = file.with_suffix(f".{uuid4().hex}")  # containers that share it all have pid 1
    written.write_bytes(msgspec.json.encode(head))
    written.replace(file)


def _head_file(data_dir: Path, log: UUID, database: int) -> Path:
    return data_dir / f"log-head-{log}-{database}.json"


def _asked(last: tuple[int, StoredEvent] | None, head: Seal | None) -> dict[str, Any]:
    """The parameters of LOOK."""
    asked = dict(_NOTHING)
    if last is not None:
        position, event = last
        asked |= {
            "position": position,
            "stream": event.originator_id,
            "version": event.originator_version,
            "topic": event.topic,
            "state": event.state,
        }
    if head is not None:
        asked["sealed"] = head.position
    return asked


def _lost_event(look: _Look, last: tuple[int, StoredEvent] | None) -> int:
    """The position of the remembered event if it does not stand there any more, else 0."""
    return 0 if last is None or look.fits else last[0]


def _lost_seal(look: _Look, head: Seal | None) -> int:
    """The same for a seal."""
    return head.position if head is not None and _is_lost(head, look.seal, look.end) else 0


def _is_lost(head: Seal, stored: bytes | None, end: int) -> bool:
    """Whether another seal stands there, or the log ends before it. One that is not there, in a log
    that is long enough, is written anew soon, the same one or another: a crash of the server may
    undo the last ones."""
    return end < head.position if stored is None else bytes(stored) != head.hash
