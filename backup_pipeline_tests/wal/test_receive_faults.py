"""Receivers whose server, store or fellow is away: they go on, or say loudly why not."""

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backup_pipeline.domain.wal import Lsn
from backup_pipeline.engines.postgres import slots
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.errors import Busy, Refused, StoreError
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.wal import new_slot
from backup_pipeline.wal.archive import WalArchive
from backup_pipeline.wal.receive import ReceiveOptions, Receiver
from backup_pipeline.wal.shipping import AHEAD
from backup_pipeline_tests.actions.box import ask, execute, now
from backup_pipeline_tests.actions.cluster_box import give
from backup_pipeline_tests.servers import postgres as servers
from backup_pipeline_tests.storage.effects import Died
from backup_pipeline_tests.waiting import wait_until
from backup_pipeline_tests.wal.receive_box import SEGMENT_BYTES, SLOT, ReceiveBox, a_receive_box


@pytest.fixture(scope="module")
def server() -> Iterator[ReceiveBox]:
    """One for those that leave it as it was."""
    with a_receive_box(servers.bin_dir_17()) as made:
        yield made


class Away(DirectoryStore):
    """Takes nothing while it is away."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.is_away = False

    def put(
        self, key: str, chunks: Iterable[bytes], *, size_hint_bytes: int = 0, storage_class: str = ""
    ) -> None:
        if self.is_away:
            raise StoreError("it is away")
        super().put(key, chunks, size_hint_bytes=size_hint_bytes, storage_class=storage_class)


def store_of(box: ReceiveBox) -> Away:
    return Away(box.folder / "store")


def test_a_second_receiver_is_told_that_there_is_one(server: ReceiveBox) -> None:
    with server.receiver():
        server.await_archived()
        second = server.command("wal", "receive", "main")
        assert second.returncode == Busy.exit_code, second.stderr
        assert "somebody else receives" in second.stderr
        status = server.command("wal", "status", "main")
        assert status.returncode == 0, status.stdout
        assert "read by a receiver" in status.stdout
    status = server.command("wal", "status", "main")
    assert status.returncode == 5
    assert "no receiver reads from slot" in status.stdout


def test_a_connection_that_the_server_ends_is_made_again(server: ReceiveBox) -> None:
    with server.receiver():
        server.await_archived()
        server.execute(
            f"SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = '{SLOT}'"
        )
        server.write()
        server.await_archived()
    server.assert_acknowledged_is_there()
    assert any("trying again" in line for line in server.said)


def test_a_server_that_falls_silent_is_left_and_found_again(server: ReceiveBox) -> None:
    """As behind a network that is cut: the old connection still holds the slot when we come back."""
    with server.receiver(silent_s=3.0):
        server.await_archived()
        pid = int(str(server.ask(f"SELECT active_pid FROM pg_replication_slots WHERE slot_name = '{SLOT}'")))
        before = len(server.said)
        os.kill(pid, signal.SIGSTOP)
        try:
            wait_until(lambda: any("somebody else" in line for line in server.said[before:]))
        finally:
            os.kill(pid, signal.SIGCONT)
        server.write()
        server.await_archived()
    server.assert_acknowledged_is_there()


def test_a_store_that_is_away_stops_the_reading_and_no_segment_is_acknowledged(server: ReceiveBox) -> None:
    store = store_of(server)
    with server.receiver(store=store):
        server.await_archived()
        store.is_away, before = True, server.confirmed()
        server.write(AHEAD + 3)
        wait_until(lambda: any("is behind" in line for line in server.said))
        read = "SELECT write_lsn::text FROM pg_stat_replication"
        there = before.value + (AHEAD - 1) * SEGMENT_BYTES
        wait_until(lambda: Lsn.parse(str(server.ask(read))).value > there)  # it was told how far we are
        assert Lsn.parse(str(server.ask(read))).value - before.value <= (AHEAD + 1) * SEGMENT_BYTES
        assert server.confirmed() == before
        store.is_away = False
        server.await_archived()
    assert any("keeps up again" in line for line in server.said)
    server.assert_acknowledged_is_there()
    assert server.listing().gaps() == ()


def test_a_server_stops_at_once_with_all_archived_and_is_received_again() -> None:
    """It waits for its receivers; one that told it only of whole segments would hold it up."""
    with a_receive_box(servers.bin_dir_17()) as server, server.receiver():
        server.write()
        server.await_archived()
        server.execute("INSERT INTO public.load VALUES (1, 'the last')")
        begun_s = time.monotonic()
        server.cluster.stop()
        assert time.monotonic() - begun_s < 15
        assert not any("asked for an answer" in line for line in server.said)
        server.cluster.start()
        server.write()
        server.await_archived()
        server.assert_acknowledged_is_there()


def test_a_server_may_stop_while_the_store_is_away() -> None:
    with a_receive_box(servers.bin_dir_17()) as server:
        store = store_of(server)
        with server.receiver(store=store):
            server.await_archived()
            store.is_away = True
            server.execute("CREATE TABLE public.t (i int)")
            begun_s = time.monotonic()
            server.cluster.stop()
            assert time.monotonic() - begun_s < 25  # it would be killed after 30
            assert any("asked for an answer" in line for line in server.said)
            server.cluster.start()
            store.is_away = False
            server.await_archived()
        server.assert_acknowledged_is_there()


def test_the_last_that_was_heard_of_a_server_that_dies_is_archived() -> None:
    with a_receive_box(servers.bin_dir_17()) as server:
        with server.receiver(ship_every_s=3600.0):
            server.execute("CREATE TABLE public.t (i int)")
            end, read = server.position(), "SELECT write_lsn::text FROM pg_stat_replication"
            wait_until(lambda: Lsn.parse(str(server.ask(read) or "0/0")) >= end)  # told every few seconds
            assert server.listing().partials == ()
            server.cluster.relaxed = True  # stopped at once: nobody is asked
            server.cluster.stop()
            wait_until(lambda: server.listing().partials != ())
        number = end.value // SEGMENT_BYTES
        found, plain = server.fetch(f"0000000100000000{number:08X}")
        assert found.partial
        inside = end.value % SEGMENT_BYTES
        original = server.cluster.data / "pg_wal" / f"0000000100000000{number:08X}"
        assert plain[:inside] == original.read_bytes()[:inside]


def test_a_slot_that_is_lost_is_a_gap_that_has_to_be_accepted() -> None:
    with a_receive_box(servers.bin_dir_17(), max_slot_wal_keep_size="32MB", wal_keep_size="0") as server:
        with server.receiver():
            server.write()
            server.await_archived()
        server.write(6)
        server.execute("CHECKPOINT")
        status = server.command("wal", "status", "main")
        assert status.returncode == 5
        assert "is LOST" in status.stdout
        assert "which is a GAP" in " ".join(status.stdout.split())
        refused = server.command("wal", "receive", "main")
        assert refused.returncode == Refused.exit_code, refused.stderr
        assert "--accept-gap" in refused.stderr
        with server.receiving("--accept-gap"):
            server.await_archived()
            server.write()
            server.await_archived()
        assert "WARNING" in server.log
        (gap,) = server.listing().gaps()
        assert gap.last - gap.first >= 3
        status = server.command("wal", "status", "main")
        assert "missing: 0000" in status.stdout
        with server.receiving():  # it is asked for once
            server.await_archived()


def test_a_slot_that_was_dropped_costs_nothing_while_the_server_has_the_wal() -> None:
    with a_receive_box(servers.bin_dir_17()) as server:
        with server.receiver():
            server.write(4)
            server.await_archived()
        # Of two that were under way when a receiver was killed, the later one came in.
        name = server.listing().segments[1][-2].segment.name(SEGMENT_BYTES)
        assert not server.store.delete([info.key for info in server.store.list("") if name in info.key])
        assert server.listing().gaps() != ()
        server.drop_slot()
        server.write(3)
        server.execute("CHECKPOINT")  # a slot that is made now begins behind it
        with server.receiver():
            server.await_archived()
        assert server.listing().gaps() == ()
        server.assert_acknowledged_is_there()


@pytest.mark.parametrize("moment", ["made", "begun"])
def test_a_receiver_that_is_killed_once_it_made_its_slot_hides_no_hole(
    moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = slots.create
    place, done = {"made": (slots, "create"), "begun": (Receiver, "_follow_or_ship")}[moment]

    def dies(*given: Any) -> None:
        if moment == "made":
            create(*given)
        raise Died

    with a_receive_box(servers.bin_dir_17()) as server:
        with server.receiver():
            server.write(4)
            server.await_archived()
            wait_until(lambda: not new_slot.is_new(server.store, "main", SLOT))
        name = server.listing().segments[1][-2].segment.name(SEGMENT_BYTES)
        assert not server.store.delete([info.key for info in server.store.list("") if name in info.key])
        server.drop_slot()
        server.write(3)
        server.execute("CHECKPOINT")
        receiver = Receiver(
            WalArchive(server.store, "main"),
            server.cluster.endpoint,
            ReceiveOptions(SLOT, 0.2),
            now,
            server.said.append,
        )
        with monkeypatch.context() as patch:
            patch.setattr(place, done, dies)
            with pytest.raises(Died):
                receiver.run(threading.Event())
        assert server.slot() is not None
        with server.receiver():
            server.await_archived()
            wait_until(lambda: not new_slot.is_new(server.store, "main", SLOT))
        assert server.listing().gaps() == ()


def test_a_slot_that_was_idle_for_too_long_is_to_be_dropped_and_is_no_gap() -> None:
    with a_receive_box(servers.bin_dir_18(), idle_replication_slot_timeout="1s") as server:
        with server.receiver():
            server.write()
            server.await_archived()
        reason = f"SELECT invalidation_reason FROM pg_replication_slots WHERE slot_name = '{SLOT}'"

        def is_invalidated() -> bool:
            server.execute("CHECKPOINT")
            return server.ask(reason) == "idle_timeout"

        wait_until(is_invalidated)
        refused = server.command("wal", "receive", "main")
        assert "pg_drop_replication_slot" in refused.stderr
        assert "gap" not in refused.stderr
        server.execute(f"SELECT pg_drop_replication_slot('{SLOT}')")
        with server.receiver():
            server.await_archived()
        assert server.listing().gaps() == ()


def test_no_archive_is_begun_by_a_receiver_and_none_of_another_system_is_written_to() -> None:
    with a_receive_box(servers.bin_dir_17(), begun=False) as server:
        early = server.command("wal", "receive", "main")
        assert early.returncode == StoreError.exit_code, early.stderr
        shown = server.command("wal", "setup", "main", "--receive")
        assert "--apply begins it" in shown.stdout
        assert f"pg_drop_replication_slot('{SLOT}')" in shown.stdout
        begun = server.command("wal", "setup", "main", "--receive", "--apply")
        assert begun.returncode == 0, begun.stderr
        assert server.ask("SELECT setting FROM pg_settings WHERE name = 'archive_mode'") == "off"
        with server.receiver():
            server.await_archived()
        with a_receive_box(servers.bin_dir_17(), begun=False) as other:
            receiver = Receiver(
                WalArchive(server.store, "main"),
                other.cluster.endpoint,
                ReceiveOptions(SLOT, 0.2),
                now,
                other.said.append,
            )
            with pytest.raises(Refused, match="belongs to PostgreSQL system"):
                receiver.run(threading.Event())


def test_a_standby_that_is_promoted_is_followed_to_its_timeline() -> None:
    with a_receive_box(servers.bin_dir_17()) as server:
        server.write()
        server.cluster.stop()
        settings = {**server.cluster.settings}
        standby = LocalCluster(
            server.cluster.bin_dir, server.folder.parent / "standby", relaxed=True, settings=settings
        )
        standby.folder.mkdir(mode=0o711)
        shutil.copytree(server.cluster.data, standby.data, symlinks=True)
        for path in (standby.data, *standby.data.rglob("*")):
            give(path)
        server.cluster.start()
        dsn = server.cluster.endpoint().dsn.replace("'", "''")
        standby.settings = {**settings, "primary_conninfo": dsn}
        give_signal = standby.data / "standby.signal"
        give_signal.touch()
        give(give_signal)
        standby.create()
        standby.start()
        try:
            with server.receiver(endpoint=standby.endpoint()):
                server.write()
                wait_until(lambda: bool(server.listing().segments))
                execute(server.cluster.endpoint(), "INSERT INTO public.load VALUES (1, 'the last')")
                wanted = server.position()
                replayed = f"SELECT pg_last_wal_replay_lsn() >= '{wanted}'"
                wait_until(lambda: bool(ask(standby.endpoint(), replayed)))
                execute(standby.endpoint(), "SELECT pg_promote()")
                server.cluster.stop()
                execute(standby.endpoint(), "INSERT INTO public.load VALUES (2, 'behind it')")
                with contextlib.closing(connect(standby.endpoint())) as session:
                    session.execute("SELECT pg_switch_wal()")
                wait_until(lambda: bool(server.listing().numbers(2)))
            listing = server.listing()
            assert listing.timelines == (1, 2)
            assert listing.histories[2].ancestors[0].timeline == 1
            switched = listing.histories[2].ancestors[0].end.value // SEGMENT_BYTES
            assert (listing.gaps(), listing.conflicts) == ((), ())
            assert listing.numbers(1)[-1] == switched - 1
            assert listing.numbers(2)[0] == switched
            assert [
                each.segment.timeline for each in listing.partials if each.segment.number == switched
            ] == [1]
            name = listing.segments[2][0].segment.name(SEGMENT_BYTES)
            assert server.fetch(name)[1] == (standby.data / "pg_wal" / name).read_bytes()
        finally:
            standby.stop()


def test_archived_and_received_at_once_it_is_the_same() -> None:
    with a_receive_box(servers.bin_dir_17(), archive_mode="on", archive_command="true") as server:
        archive = WalArchive(server.store, "main")
        with server.receiver():
            server.write(3)
            server.await_archived()
            done = sorted((server.cluster.data / "pg_wal" / "archive_status").glob("*.done"))
            pushed = [archive.push(server.cluster.data / "pg_wal" / path.stem) for path in done]
            assert len(pushed) >= 3
            assert all(each.already for each in pushed)
            server.execute("INSERT INTO public.load VALUES (1, 'x')")
            server.await_archived()
        # A part beside the whole, as a receiver that is killed before it removes it leaves.
        (number,) = [each.segment.number for each in server.listing().partials]
        server.execute("INSERT INTO public.load VALUES (2, 'y')", "SELECT pg_switch_wal()")
        name = f"0000000100000000{number:08X}"
        archive.push(server.cluster.data / "pg_wal" / name)
        listing = server.listing()
        assert [each.segment.number for each in listing.partials] == [number] == [listing.numbers(1)[-1]]
        assert (listing.conflicts, listing.gaps(), listing.odd) == ((), (), ())
        found, plain = server.fetch(name)
        assert not found.partial
        assert plain == (server.cluster.data / "pg_wal" / name).read_bytes()
        with server.receiver():
            server.await_archived()
        assert number not in [each.segment.number for each in server.listing().partials]
