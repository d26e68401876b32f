"""The demo's second part: a whole cluster, recovered to the second before an accident.

Called by story.py, while its servers run and its application writes. What is claimed was compared here.
"""

import contextlib
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from backup_pipeline.demo import contents, filler
from backup_pipeline.demo.contents import Named, Rows
from backup_pipeline.demo.place import Place, shown
from backup_pipeline.demo.servers import CLUSTER, Servers, receiving
from backup_pipeline.demo.stage import PROGRAM, DemoFailed, Stage, expect
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import connect

LOST = "workflow_versions"
_LEGIBLE = timedelta(seconds=1)
_ARCHIVED_WITHIN_S = 60.0
_NEWEST = "SELECT max(started_at) FROM public.executions"


@dataclass(frozen=True)
class Lost:
    """What was dropped, by the server's clock `at`."""

    at: datetime
    rows: Rows
    names: frozenset[Named]


@contextlib.contextmanager
def archived(stage: Stage, place: Place, running: Servers) -> Iterator[None]:
    """Every change goes to the store as it is written, while the block runs; a base backup is taken first."""
    stage.step("Its WAL goes to the store too, and a copy of the whole cluster to begin with")
    begin(stage)
    with receiving(place, running):
        stage.say(f"$ {PROGRAM} wal receive {CLUSTER} &    (its log: {shown(place.receive_log)})")
        stage.command("heartbeat", CLUSTER, show="heartbeat of")  # so that one lies before any second
        stage.command("base-backup", CLUSTER, "--fast", show="^published ")
        yield


def begin(stage: Stage) -> None:
    """Begin the archive, and make the heartbeat's table; done twice, it does nothing."""
    stage.command("heartbeat", CLUSTER, "--setup", "--apply", show="^-- made")
    stage.command("wal", "setup", CLUSTER, "--receive", "--apply", show="belongs to")


def recover(stage: Stage, place: Place, running: Servers) -> tuple[float, Lost]:
    """A table is dropped at a known second, and the cluster recovered to the one before."""
    stage.step("A second accident, when the last dump is too old: to the second before")
    stage.command("heartbeat", CLUSTER, show="heartbeat of")
    time.sleep(2 * _LEGIBLE.total_seconds())  # so that a whole second lies between
    lost = _drop(stage, running)
    target = (lost.at - _LEGIBLE).replace(microsecond=0)
    text = f"{target:%Y-%m-%dT%H:%M:%SZ}"
    _await_archived(stage, lost.at)
    place.recovered.mkdir(mode=0o711)
    into = place.recovered / "data"
    shows = "^(begins with|replays): |^recovered |^last transaction"
    (unquoted,) = shlex.split(shown(into))
    took_s = stage.command("recover", CLUSTER, "--to", text, "--into", unquoted, show=shows)
    _compare(stage, place, running, lost, target)
    return took_s, lost


def drill(stage: Stage, lost: Lost) -> str:
    """One moment of the window, looked into as every night a random one is; returns the verdict."""
    stage.step("A drill: a second of the window, recovered and looked into; every night it is a random one")
    target = lost.at + _LEGIBLE
    stage.command("heartbeat", CLUSTER, show="heartbeat of")
    _await_archived(stage, datetime.now(UTC))
    arguments = ("drill", CLUSTER, "--to", f"{target:%Y-%m-%dT%H:%M:%SZ}")
    found, _ = stage.ask(*arguments, show=r"^drill main/|^  (the|amcheck|every)")
    verdict = str(found["verdict"])
    expect(verdict == "proven", f"the drill's verdict is {verdict!r}, not 'proven'")
    stage.command("list", CLUSTER)
    return verdict


def _drop(stage: Stage, running: Servers) -> Lost:
    live = running.database()
    rows, names = contents.rows(live, LOST), contents.named(live)
    with contextlib.closing(connect(live)) as session:
        session.execute(f"DROP TABLE public.{LOST} CASCADE")
        found = session.execute("SELECT clock_timestamp()").fetchone()
    at = found[0] if found else None
    if not isinstance(at, datetime):
        raise DemoFailed("the server did not say when the table was dropped")
    stage.say(f"DROP TABLE {LOST} CASCADE;    at {at.astimezone(UTC):%H:%M:%S.%f} UTC: {rows.count:,} rows")
    return Lost(at.astimezone(UTC), rows, names - contents.named(live))


def _await_archived(stage: Stage, at: datetime) -> None:
    """Wait until the archive goes beyond a moment: a second or two."""
    deadline = time.monotonic() + _ARCHIVED_WITHIN_S
    while time.monotonic() < deadline:
        windows = [each for each in stage.look("list", CLUSTER) if each["kind"] == "recovery windows"]
        if any(datetime.fromisoformat(each["to"]) > at for found in windows for each in found["windows"]):
            return
        time.sleep(0.2)
    raise DemoFailed("the WAL of the accident did not come into the archive")


def _compare(stage: Stage, place: Place, running: Servers, lost: Lost, target: datetime) -> None:
    with _started(running, place.recovered) as recovered:
        names, rows = contents.named(recovered), contents.rows(recovered, LOST)
        with contextlib.closing(connect(recovered)) as session:
            found = session.execute(_NEWEST).fetchone()
    newest = found[0] if found else None
    expect(lost.names <= names, f"not back: {lost.names - names}")
    expect(rows == lost.rows, f"{LOST} was {lost.rows} before the accident, and is {rows} recovered")
    if not isinstance(newest, datetime):
        raise DemoFailed("the recovered cluster has no executions")
    before = (target - newest).total_seconds()
    expect(0 <= before < 2, f"the newest row of the application is {before} s older than the target")
    stage.say(f"Compared: {LOST} is there, each of its {rows.count:,} rows equal to what it was; the newest")
    stage.say(f"row of the application is {before * 1000:.0f} ms older than the target, and none is younger.")


@contextlib.contextmanager
def _started(running: Servers, folder: Path) -> Iterator[Endpoint]:
    """The recovered cluster's server, with the settings that the recovery left it, on a socket of its own."""
    server = LocalCluster(running.postgres.bin_dir, folder, confined=True)
    try:
        server.create()
        server.start()
        yield server.endpoint(filler.DATABASE)
    finally:
        server.stop()
