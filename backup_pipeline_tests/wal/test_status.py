"""What `wal status` has somebody look at: of values, and of an archive that fills while it is listed."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from backup_pipeline.config import ClusterConfig, Secret
from backup_pipeline.domain.wal import Lsn, WalSegment
from backup_pipeline.domain.wal_archive import ArchivedSegment, ArchiveIdentity, ArchiveListing
from backup_pipeline.engines.postgres.archiving import ArchiverCounts, Archiving
from backup_pipeline.engines.postgres.server import ServerInfo
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import ObjectInfo
from backup_pipeline.wal.archive import WalArchive
from backup_pipeline.wal.setup import archive_command
from backup_pipeline.wal.status import AgentStatus, WalStatus, look
from backup_pipeline_tests.wal.box import begin
from backup_pipeline_tests.wal.segments import MIB, OTHER, SYSTEM, DataDirectory

AT = datetime(2026, 3, 1, 12, tzinfo=UTC)
CLUSTER = ClusterConfig("main", Secret("postgresql://nobody@127.0.0.1:1/postgres"))
SETTINGS = {
    "wal_level": "replica",
    "archive_mode": "on",
    "archive_command": archive_command(CLUSTER, Path("/etc/backups.toml")),
    "archive_library": "",
    "archive_timeout": "60",
}


def name(number: int, timeline: int = 1) -> str:
    return WalSegment(timeline, number).name(MIB)


def listing(numbers: Sequence[int], *, age: timedelta = timedelta(seconds=30)) -> ArchiveListing:
    found = tuple(ArchivedSegment(WalSegment(1, number), 10, AT - age, "") for number in numbers)
    return ArchiveListing("main", SYSTEM, MIB, {1: found} if found else {})


def archiver(
    *,
    last: str = name(5),
    lsn: int = 6 * MIB,
    ready: int | None = 0,
    oldest: timedelta | None = None,
) -> ArchiverCounts:
    oldest_at = AT - oldest if oldest is not None else None
    return ArchiverCounts(3, last, AT, 0, "", None, 1, Lsn(lsn), ready, oldest_at)


GOOD = WalStatus(
    cluster=CLUSTER,
    at=AT,
    agent=AgentStatus(True),
    server=ServerInfo(170010, "17.10", SYSTEM, in_recovery=False, is_superuser=True),
    archiving=Archiving(SETTINGS, (), "/data", MIB),
    archiver=archiver(),
    identity=ArchiveIdentity("main", SYSTEM, MIB, AT),
    archive=listing((3, 4, 5)),
)


def setting(**values: str) -> Archiving:
    return replace(GOOD.archiving, settings={**SETTINGS, **values})


def test_an_archive_that_keeps_up_has_no_problem() -> None:
    assert GOOD.problems == ()
    idle = replace(GOOD, archive=listing((3, 4, 5), age=timedelta(days=9)))
    assert idle.problems == ()  # nothing was written since
    draining = replace(GOOD, archiver=archiver(lsn=90 * MIB, ready=80, oldest=timedelta(seconds=40)))
    assert draining.problems == ()


@pytest.mark.parametrize(
    ("archiving", "said"),
    [
        (setting(archive_mode="off"), "archive_mode is off: nothing is archived; .*--apply, and restart"),
        (setting(archive_command=""), "archive_command is empty: .*wal setup main --apply"),
        (setting(archive_command="/bin/true"), "archive_command is /bin/true, .*--replace-command"),
        (setting(archive_library="basic_archive"), "archive_library is basic_archive, .*--replace-command"),
        (replace(GOOD.archiving, pending=("archive_mode",)), "archive_mode waits for a restart"),
    ],
)
def test_a_server_that_does_not_archive_by_this_program_is_told(archiving: Archiving, said: str) -> None:
    (problem,) = replace(GOOD, archiving=archiving).problems
    assert re.search(said, problem), problem


def test_a_standby_that_leaves_archiving_to_its_primary_is_right() -> None:
    server = replace(GOOD.server, in_recovery=True)
    assert replace(GOOD, server=server, archiving=setting(archive_command="")).problems == ()
    always = replace(GOOD, server=server, archiving=setting(archive_mode="always", archive_command=""))
    assert len(always.problems) == 1


def test_a_command_that_hangs_is_told_by_what_waits() -> None:
    """PostgreSQL counts no failure of it."""
    waiting = replace(GOOD, archiver=archiver(ready=6, oldest=2 * CLUSTER.push_timeout))
    assert waiting.problems == ()
    hung = replace(GOOD, archiver=archiver(ready=6, oldest=timedelta(minutes=12)))
    (problem,) = hung.problems
    assert problem.startswith("a file has waited for 12 min 0 s: ")


@pytest.mark.parametrize("ready", [0, None])
def test_wal_that_was_taken_and_is_not_there_is_told(ready: int | None) -> None:
    lost = replace(
        GOOD,
        archiver=archiver(lsn=8 * MIB, ready=ready),
        archive=listing((3, 4, 5), age=timedelta(minutes=6)),
    )
    (problem,) = lost.problems
    assert problem.startswith("the archive ends 2.0 MiB before the server, 6 min 0 s ago")
    assert "base-backup main" in problem
    nearly = replace(lost, archiver=archiver(lsn=8 * MIB - 1, ready=ready))
    assert nearly.problems == ()  # one whole segment and a part
    recent = replace(lost, archive=listing((3, 4, 5), age=timedelta(minutes=5)))
    assert recent.problems == ()
    slow = replace(lost, archiving=setting(archive_timeout="600"))
    assert slow.problems == ()


def test_an_archive_that_is_another_systems_now_is_told() -> None:
    over = replace(GOOD, identity=ArchiveIdentity("main", OTHER, MIB, AT, (SYSTEM,)))
    (problem,) = over.problems
    assert problem.startswith(f"the archive belongs to PostgreSQL system {OTHER}, not to {SYSTEM}, ")
    assert "wal setup main --adopt" in problem
    unknown = replace(over, server=replace(GOOD.server, system_identifier=""))
    assert unknown.problems == ()  # the role may not see it


@pytest.mark.parametrize(
    ("last", "ready", "gap"),
    [
        (name(3), 3, False),  # 4 is slow, and what follows was archived ahead of it
        (f"{name(3)}.00000028.backup", 3, False),
        (name(3), None, False),
        (name(3), 0, True),  # PostgreSQL has nothing left to hand over
        (name(4), 3, True),  # PostgreSQL was told that it is archived
        (name(6), 3, True),
    ],
)
def test_what_is_yet_to_be_handed_over_is_no_gap(last: str, ready: int | None, gap: bool) -> None:
    found = replace(GOOD, archiver=archiver(last=last, lsn=7 * MIB, ready=ready), archive=listing((3, 5, 6)))
    assert found.problems == ((f"missing: {name(4)}",) if gap else ())


class Filling(DirectoryStore):
    """A store in which something is archived behind a listing that has passed its place."""

    def __init__(self, root: Path, archive: WalArchive, late: Path) -> None:
        super().__init__(root)
        self.archive, self.late, self.listed = archive, late, 0

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        found = list(super().list(prefix))
        self.listed += 1
        self.archive.push(self.late)
        return iter(found)


def test_a_gap_is_believed_only_when_it_is_seen_twice(tmp_path: Path, data: DataDirectory) -> None:
    (tmp_path / "store").mkdir()
    begin(DirectoryStore(tmp_path / "store"))
    archive = WalArchive(DirectoryStore(tmp_path / "store"), "main")
    for number in (3, 5):
        archive.push(data.segment(number))
    store = Filling(tmp_path / "store", archive, data.segment(4))
    found = look(store, CLUSTER, GOOD.server, GOOD.archiving, archiver(), agent=GOOD.agent, at=AT)
    assert (found.gaps, found.problems, store.listed) == ((), (), 2)
    assert found.archive is not None
    assert found.archive.numbers(1) == (3, 4, 5)
