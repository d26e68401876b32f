"""A server that is received and destroyed: what was committed seconds before is recovered, no more."""

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backup_pipeline.actions import recover
from backup_pipeline.actions.recovery_plan import RecoverRequest
from backup_pipeline.domain.recovery_target import RecoveryTarget, TargetKind, parse_target
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline_tests.actions.box import Said, ask, now
from backup_pipeline_tests.actions.recovery_box import started
from backup_pipeline_tests.background import meanwhile
from backup_pipeline_tests.servers import postgres as servers
from backup_pipeline_tests.servers.s3 import S3Server
from backup_pipeline_tests.waiting import wait_until
from backup_pipeline_tests.wal.receive_box import ReceiveBox, a_receive_box

WITHIN_S = 3.0  # ship_every is 0.2 s here; the rest is for a machine that others use too


@pytest.fixture(params=["15, folder", "17, S3"])
def server(request: pytest.FixtureRequest) -> Iterator[ReceiveBox]:
    version, _, where = str(request.param).partition(", ")
    bin_dir = servers.bin_dir_15() if version == "15" else servers.bin_dir_17()
    place = None
    if where == "S3":
        rclone: S3Server = request.getfixturevalue("rclone")
        place = rclone.store("received")
    with a_receive_box(bin_dir, place) as made:
        yield made


def recovered(server: ReceiveBox, target: RecoveryTarget, name: str) -> list[int]:
    """The ledger of a cluster recovered to `target`."""
    cluster, said, into = server.protected(), Said(), server.folder / name
    plan = recover.plan(cluster, RecoverRequest(target, into), report=said)
    recover.carry_out(cluster, plan, clock=now, report=said)
    with started(server.cluster.bin_dir, into) as endpoint:
        rows = ask(endpoint, "SELECT array_agg(number ORDER BY number) FROM public.ledger")
    return list(rows) if isinstance(rows, list) else []


def test_what_was_committed_seconds_before_the_end_is_recovered(server: ReceiveBox) -> None:
    committed: list[float] = []
    server.execute("CREATE TABLE public.ledger (number int PRIMARY KEY, filler text)")

    def write(ended: threading.Event) -> None:
        query = (
            "INSERT INTO public.ledger SELECT %s, string_agg(md5(i::text), '') FROM generate_series(1, 9) i"
        )
        with (
            contextlib.closing(connect(server.cluster.endpoint())) as session,
            contextlib.suppress(Exception),
        ):
            while not ended.wait(0.002):  # until the server is gone
                session.execute(query, [len(committed) + 1])
                committed.append(time.monotonic())

    with server.receiving() as child:
        server.await_archived()
        server.take()  # with archive_mode off
        with meanwhile(write):
            wait_until(lambda: len(committed) > 200)
            wait_until(lambda: bool(committed) and time.monotonic() - committed[0] > 2 * WITHIN_S)
            pid = int((server.cluster.data / "postmaster.pid").read_text().split()[0])
            for each in server_processes(pid):
                kill(each)
            gone_at = time.monotonic()
        server.kill(child)
    shutil.rmtree(server.cluster.data)
    listing = server.listing()
    assert listing.partials, server.log
    found = recovered(server, parse_target("latest"), "latest")
    surely = sum(at < gone_at - WITHIN_S for at in committed)
    assert found == list(range(1, len(found) + 1))
    assert surely > 0
    assert len(found) >= surely


def server_processes(pid: int) -> list[int]:
    """A postmaster and its children, which would else go on for a moment."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_a_time_within_the_last_part_is_reached() -> None:
    with a_receive_box(servers.bin_dir_17()) as server:
        server.execute("CREATE TABLE public.ledger (number int PRIMARY KEY)")
        with server.receiver():
            server.await_archived()
            server.take()
            server.execute("INSERT INTO public.ledger VALUES (1)", "INSERT INTO public.ledger VALUES (2)")
            between = ask(server.cluster.endpoint(), "SELECT clock_timestamp()::text")
            server.execute("INSERT INTO public.ledger VALUES (3)")
            server.await_archived()
        assert server.listing().partials
        target = RecoveryTarget(TargetKind.TIME, at=parse_target(str(between)).at)
        assert recovered(server, target, "between") == [1, 2]
        # More that arrives behind the plan is not taken.
        request = RecoverRequest(parse_target("latest"), server.folder / "planned")
        plan = recover.plan(server.protected(), request, report=Said())
        server.execute("INSERT INTO public.ledger VALUES (4)")
        with server.receiver():
            server.await_archived()
            server.execute("SELECT pg_switch_wal()")
            server.await_archived()
        recover.carry_out(server.protected(), plan, clock=now, report=Said())
        with started(server.cluster.bin_dir, server.folder / "planned") as endpoint:
            assert ask(endpoint, "SELECT array_agg(number ORDER BY number) FROM public.ledger") == [1, 2, 3]
