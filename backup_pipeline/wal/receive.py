"""Receive a cluster's WAL through a replication slot of ours, and archive it: without an archive_command.

Called by `backup-pipeline wal receive`. The server forgets nothing that is not durable in the store: the slot
is told no more. So this process keeps nothing between two lives, but that its slot is a new one (new_slot.py,
in the store), and may be killed at any moment. What is done with the segments is shipping.py's; the protocol,
engines/postgres/wal_stream.py's.
"""

import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import datetime

from backup_pipeline.domain.wal import Lsn, WalSegment
from backup_pipeline.domain.wal_receiving import Beginning, archived_until, beginnings, gap_error, lowest_hole
from backup_pipeline.domain.wal_stream import NOWHERE, Ended, Keepalive, WalData, status_update
from backup_pipeline.engines.postgres import slots
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.replication import Session, replication_session
from backup_pipeline.engines.postgres.wal_stream import WalRemoved, WalStream, begin_stream
from backup_pipeline.errors import BackupError, BackupNotFound, Busy, ServerError, StoreError
from backup_pipeline.wal import new_slot
from backup_pipeline.wal.archive import WalArchive
from backup_pipeline.wal.listing import read_archive
from backup_pipeline.wal.shipping import AHEAD, WORKERS, Shipping

_TICK_S = 0.2
_STATUS_S = 5.0  # and a sign of life is asked for
_ANSWER_S = 60.0
_LET_GO_S = 10.0  # a server that shuts down waits for us; with the store away, it would for ever
_FINISH_S = 60.0
_BUSY_S = 5.0  # the server may not have seen yet that the one before us is gone
_BUSY_AGAIN_S = 120.0
_LAST_PAUSE_S = 10.0


@dataclass(frozen=True)
class ReceiveOptions:
    """How one cluster is received."""

    slot: str
    ship_every_s: float
    accept_gap: bool = False
    silent_s: float = 60.0  # so long the server may say nothing, not even when it is asked


@dataclass
class Receiver:
    """Receives one cluster. `source` resolves where it is, again for each connection."""

    archive: WalArchive
    source: Callable[[], Endpoint]
    options: ReceiveOptions
    clock: Callable[[], datetime]
    log: Callable[[str], object]
    _streamed: bool = field(default=False, init=False)
    _shipped: bool = field(default=True, init=False)  # all that was read of the last server that went away
    _new_until: Lsn | None = field(
        default=None, init=False
    )  # archived up to here, a new slot is none any more

    def run(self, stop: threading.Event) -> None:
        """Receive until `stop` is set; then ship what was read, and return.

        A server or store that is away is waited for, once all had worked. Raises Busy while another receiver
        is there; Refused for a gap, or another system; ServerError, StoreError, Corrupt, ConfigError.
        """
        pause_s, failing_since_s = 1.0, time.monotonic()
        while not stop.is_set():
            self._streamed, before = False, self._streamed
            try:
                self._receive(stop)
            except BackupError as error:
                if self._streamed:
                    pause_s, failing_since_s = 1.0, time.monotonic()
                self._streamed = self._streamed or before
                patience_s = _BUSY_AGAIN_S if self._streamed else _BUSY_S
                is_gone = isinstance(error, ServerError) and error.retryable
                if stop.is_set() and is_gone and self._streamed and self._shipped:
                    return  # told to end while the server is away: all that was read is archived
                is_over = isinstance(error, Busy) and time.monotonic() - failing_since_s > patience_s
                is_first = not self._streamed and not isinstance(error, Busy)
                if not error.retryable or is_over or is_first or stop.is_set():
                    raise
                self.log(f"{error.message}; trying again")
            stop.wait(pause_s)
            pause_s = min(_LAST_PAUSE_S, 2 * pause_s)

    def _receive(self, stop: threading.Event) -> None:
        if not self._stream(stop, behind_gap=False):
            self._stream(stop, behind_gap=True)

    def _stream(self, stop: threading.Event, *, behind_gap: bool) -> bool:
        """Receive over one connection, until told to stop; False when it is to begin behind a gap."""
        cluster, slot = self.archive.cluster, self.options.slot
        with replication_session(self.source(), purpose="wal receive", stall_s=_ANSWER_S) as session:
            _refuse_old(session, cluster)
            server = slots.identify(session)
            self.archive.enter(server.system_identifier)
            segment_bytes = slots.read_segment_bytes(session)
            self._new_until = None
            found = self._beginnings(session, server, segment_bytes)
            beginning = found[-1] if behind_gap else found[0]
            shipping = Shipping(
                self.archive, server.system_identifier, segment_bytes, self.options.ship_every_s, self.log
            )
            if behind_gap:
                self.confirm_slot(server.lsn)
            if beginning.gap:
                self.log(f"WARNING: {beginning.gap} missing in the archive of {cluster}, which was accepted")
            try:
                with closing(shipping):
                    self._follow_or_ship(session, beginning, shipping, stop)
            except WalRemoved as error:
                self.log(error.message)
                if beginning != found[-1] and self.options.accept_gap:
                    return False
                gap = found[-1].gap or f"the server no longer has its WAL from {beginning.start} on"
                raise gap_error(cluster, slot, gap) from error
        return True

    # --- where it begins

    def _beginnings(
        self, session: Session, server: slots.ServerPosition, segment_bytes: int
    ) -> tuple[Beginning, ...]:
        _, history = slots.read_history(session, server.timeline)
        archived, hole = None, None
        with suppress(BackupNotFound):
            listing = read_archive(
                self.archive.store, self.archive.cluster, system_identifier=server.system_identifier
            )
            archived = archived_until(listing, history)
            hole = lowest_hole(listing, history, within=AHEAD + WORKERS)
        position = self._position(session, is_new=archived is None)
        confirmed = WalSegment.holding(position.timeline, position.lsn or NOWHERE, segment_bytes)
        # Of a slot that is not new, all before it is archived, or is a gap that was accepted.
        if new_slot.is_new(self.archive.store, self.archive.cluster, self.options.slot):
            self._new_until = server.lsn  # a server that crashes has its slot fall back, not beyond this
        else:
            hole = None
        return beginnings(confirmed, archived, segment_bytes=segment_bytes, hole=hole)

    def _position(self, session: Session, *, is_new: bool) -> slots.SlotPosition:
        """Where our slot stands; it is made where there is none."""
        slot = self.options.slot
        found = slots.read_position(session, slot)
        if found is not None and found.lsn is None:
            if not (is_new or self.options.accept_gap):
                lost = "the slot is lost, and with it WAL that was not archived"
                raise gap_error(self.archive.cluster, slot, lost)
            slots.drop(session, slot)
            found = None
        if found is None:
            new_slot.begin(self.archive.store, self.archive.cluster, slot)
            slots.create(session, slot)
            self.log(f"made the replication slot {slot}")
            found = slots.read_position(session, slot)
        if found is None or found.lsn is None:
            raise ServerError(f"the server made the slot {slot}, and it holds nothing")
        return found

    def confirm_slot(self, durable: Lsn) -> None:
        """A slot that was new is none any more, once all that was there when it was made is archived."""
        if self._new_until is not None and durable >= self._new_until:
            new_slot.confirm(self.archive.store, self.archive.cluster, self.options.slot)
            self._new_until = None

    def _archive_history(self, session: Session, timeline: int, system: str) -> None:
        """Where a timeline came from goes first: without it none of its segments can be recovered."""
        if timeline > 1:
            data, _ = slots.read_history(session, timeline)
            self.archive.push_history(timeline, data, system)

    # --- what comes

    def _follow_or_ship(
        self, session: Session, beginning: Beginning, shipping: Shipping, stop: threading.Event
    ) -> None:
        """Follow; and when the server is gone, perhaps for ever, archive the last that was heard of it."""
        try:
            self._follow(session, beginning, shipping, stop)
        except WalRemoved:
            raise
        except ServerError as error:
            session.close()  # a server that wants to end waits for it
            if not shipping.is_done:
                self.log(f"{error.message}; what was read of it is shipped first")
            self._shipped = shipping.finish(_FINISH_S)
            if not (self._shipped and stop.is_set()):
                raise

    def _follow(
        self, session: Session, beginning: Beginning, shipping: Shipping, stop: threading.Event
    ) -> None:
        timeline, start = beginning.timeline, beginning.start
        while True:
            self._archive_history(session, timeline, shipping.system)
            shipping.begin(timeline, start)
            stream = begin_stream(session, self.options.slot, start, timeline)
            self._streamed = True
            self.log(
                f"receiving {self.archive.cluster} from {start}, timeline {timeline}, through slot "
                f"{self.options.slot}"
            )
            ended = _Pump(self, stream, shipping, stop).run()
            if ended is None:
                return
            if ended.timeline == 0:
                raise ServerError(f"{session.endpoint.shown} ended the stream: it shuts down, or was told to")
            shipping.end_timeline()
            self.log(f"timeline {timeline} ended at {ended.start}; {ended.timeline} follows")
            timeline = ended.timeline
            start = Lsn(ended.start.value - ended.start.value % shipping.segment_bytes)


def _refuse_old(session: Session, cluster: str) -> None:
    if session.connection.server_version // 10000 < slots.OLDEST_MAJOR:
        raise ServerError(
            f"`wal receive` needs PostgreSQL {slots.OLDEST_MAJOR} or newer, and {session.endpoint.shown} is "
            f"{session.connection.server_version // 10000}",
            hint=f"Archive by archive_command: backup-pipeline wal setup {cluster} --apply",
        )


@dataclass
class _Pump:
    """One timeline from the server into `shipping`, and back how much of it is durable."""

    receiver: Receiver
    stream: WalStream
    shipping: Shipping
    stop: threading.Event
    _told: Lsn | None = None
    _told_at_s: float = 0.0
    _asked_at_s: float | None = None  # since when the server may wait for us, to shut down
    _is_held: bool = False

    def run(self) -> Ended | None:
        """The end of the timeline; None when we were to stop, and all that was read is durable."""
        while not self.stop.is_set():
            self.shipping.tick()
            self._hold()
            if self._is_held:
                self.shipping.pause(_TICK_S)
                self.stream.heard_at_s = time.monotonic()  # it waits for us
            elif (message := self.stream.receive(_TICK_S)) is not None:
                if isinstance(message, Ended):
                    return message
                self._take(message)
            self._tell()
            self.receiver.confirm_slot(self.shipping.durable)
            self._look_after()
        self._finish()
        return None

    def _take(self, message: WalData | Keepalive) -> None:
        if isinstance(message, WalData):
            self.shipping.write(message.start, message.data)
            self._asked_at_s = None  # a server that waits for us, to shut down, has sent all
        elif message.asks:
            self.shipping.hurry()
            self._asked_at_s = self._asked_at_s or time.monotonic()

    def _hold(self) -> None:
        """Stop reading while the store is behind: WAL stays on the server, and does not fill this disk."""
        if self.shipping.is_full != self._is_held:
            self._is_held = self.shipping.is_full
            said = (
                "is behind: WAL stays on the server, which keeps it for the slot"
                if self._is_held
                else "keeps up again"
            )
            self.receiver.log(f"the store {said}")

    def _tell(self) -> None:
        now_s, durable = time.monotonic(), self.shipping.durable
        is_due = now_s - self._told_at_s >= min(_STATUS_S, self.receiver.options.silent_s / 3)
        if not is_due and durable == self._told and self._asked_at_s is None:
            return
        if self._asked_at_s is not None and durable == self._told and now_s - self._told_at_s < 1.0:
            return
        self.stream.send(
            status_update(
                received=self.shipping.received, durable=durable, at=self.receiver.clock(), ask=is_due
            )
        )
        self._told, self._told_at_s = durable, now_s

    def _look_after(self) -> None:
        now_s = time.monotonic()
        silent_s = self.receiver.options.silent_s
        if now_s - self.stream.heard_at_s > silent_s:
            raise self.stream.session.failed(f"the server said nothing for {silent_s:g} s")
        if self.shipping.is_done:
            self._asked_at_s = None
        if self._asked_at_s is not None:
            self.shipping.hurry()
        if self._asked_at_s is not None and now_s - self._asked_at_s > _LET_GO_S:
            raise ServerError(
                f"the server asked for an answer, as one does that is to shut down, and WAL up to "
                f"{self.shipping.received} is not archived after {_LET_GO_S:g} s: the slot keeps it"
            )

    def _finish(self) -> None:
        """Ship what was read. Raises StoreError when the store does not take it in time."""
        if not self.shipping.finish(_FINISH_S, meanwhile=self._tell):
            raise StoreError(
                f"WAL up to {self.shipping.received} was not shipped, only up to {self.shipping.durable}",
                hint="Nothing is lost while the server lives: the slot keeps it until this runs again.",
            )
