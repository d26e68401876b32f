"""From end to end on each version of PostgreSQL: a dump is proven, and recoveries reach whatever target."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from backup_pipeline.actions import prove, recover
from backup_pipeline.actions.recovery_plan import RecoverRequest
from backup_pipeline.actions.unpack import unpack
from backup_pipeline.config import ScratchConfig, Secret
from backup_pipeline.domain.backup import BackupId, Verdict
from backup_pipeline.domain.recovery_target import LATEST, RecoveryTarget, TargetKind, parse_target
from backup_pipeline.engines.postgres.cluster import LocalCluster, server_identity
from backup_pipeline.engines.postgres.scratch import private_folder
from backup_pipeline.engines.postgres.unpack import plan_places
from backup_pipeline.storage import base_backups
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline_tests.actions.box import DUE, Said, a_box, ask, execute, now
from backup_pipeline_tests.actions.cluster_box import give
from backup_pipeline_tests.actions.recovery_box import SETTINGS, RecoveryBox, a_recovery_box, started
from backup_pipeline_tests.servers import postgres as servers

NEW_IN_18 = """
CREATE EXTENSION btree_gist WITH SCHEMA public;
CREATE TABLE public.room (id int, open tstzrange, PRIMARY KEY (id, open WITHOUT OVERLAPS));
CREATE TABLE public.booking (
    code uuid DEFAULT uuidv7() PRIMARY KEY, room int, held tstzrange, note text,
    hours numeric GENERATED ALWAYS AS (extract(epoch FROM upper(held) - lower(held)) / 3600) VIRTUAL,
    CONSTRAINT short CHECK (note <> 'long') NOT ENFORCED,
    CONSTRAINT while_open FOREIGN KEY (room, PERIOD held) REFERENCES public.room (id, PERIOD open));
INSERT INTO public.room VALUES (1, '[2026-01-01Z,2026-02-01Z)'), (1, '[2026-02-01Z,2026-03-01Z)');
INSERT INTO public.booking (room, held, note)
    VALUES (1, '[2026-01-31Z,2026-02-02Z)', 'long'), (1, NULL, NULL);
ALTER TABLE public.booking ADD CONSTRAINT noted NOT NULL note NOT VALID
"""

RELOAD = "SELECT pg_reload_conf()"


@pytest.mark.parametrize("bin_dir", servers.EACH_VERSION)
def test_a_daily_backup_is_proven_on_a_server_of_its_own_version(
    bin_dir: Callable[[], str], tmp_path: Path
) -> None:
    with (
        servers.running_cluster(bin_dir()) as cluster,
        a_box(cluster, tmp_path / "store", scratch=cluster) as box,
    ):
        major = int(str(ask(box.endpoint, "SHOW server_version_num"))) // 10000
        if major >= 18:
            execute(box.endpoint, NEW_IN_18)
        backup = box.take("daily", scheduled_for=DUE)
        alone = replace(box.protected, scratch=ScratchConfig(bin_dir=cluster.bin_dir))
        proof = prove.prove(alone, backup.id, clock=now, report=box.said)
    assert proof.differences == ()
    assert proof.verdict is Verdict.PROVEN
    assert f"restored into PostgreSQL {major}" in "\n".join(proof.checked)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("bin_dir", servers.EACH_VERSION)
def test_every_kind_of_target_is_reached_across_timelines_from_a_standby_with_a_tablespace(
    bin_dir: Callable[[], str], tmp_path: Path
) -> None:
    with a_recovery_box(bin_dir(), DirectoryStore(tmp_path)) as box:
        space = box.folder.parent / "fast"
        space.mkdir(mode=0o700)
        give(space)
        execute(box.cluster.endpoint(), f"CREATE TABLESPACE fast LOCATION '{space}'")
        execute(box.cluster.endpoint(), "CREATE TABLE public.there TABLESPACE fast AS SELECT 1 AS a")
        box.commit(1)
        taken = take_from_a_standby(box, box.take().id)
        assert base_backups.load(box.store, taken).manifest.from_standby
        promote_twice(box)
        box.name_point("here")
        before, named = box.ledger[-1], len(box.ledger)
        box.commit(2)
        box.switch()
        plan = recover.plan(box.protected(), RecoverRequest(LATEST, box.folder / "x"), report=box.said)
        assert plan.manifest.id == taken
        for target, count in (
            (LATEST, named + 2),
            (parse_target("name:here"), named),
            (RecoveryTarget(TargetKind.LSN, lsn=box.ledger[-2].end, inclusive=False), named + 1),
            (RecoveryTarget(TargetKind.XID, xid=box.ledger[-1].xid, inclusive=False), named + 1),
            (RecoveryTarget(TargetKind.TIME, at=before.at), named),
            (RecoveryTarget(TargetKind.TIME, at=box.ledger[2].at), 3),
        ):
            result = box.recover(target)
            with started(box.cluster.bin_dir, box.folder / "recovered") as recovered:
                found = ask(recovered, "SELECT array_agg(number ORDER BY number) FROM public.ledger")
                assert ask(recovered, "SELECT a FROM public.there") == 1
            assert found == [entry.number for entry in box.ledger[:count]], target
            assert result.recovered.timeline == 4
            shutil.rmtree(box.folder / "recovered")
            shutil.rmtree(box.folder / "recovered.tablespaces")


def promote_twice(box: RecoveryBox) -> None:
    """Recover to before the last commit and go on with that, twice: the archive holds three timelines."""
    for into in ("second", "third"):
        box.commit(3)
        box.switch()
        last = box.ledger.pop()  # not in the history that is gone on with
        target = RecoveryTarget(TargetKind.XID, xid=last.xid, inclusive=False)
        box.recover(target if into == "second" else parse_target(box.ledger[-1].at.isoformat()), into)
        box.go_on_with(into)
        box.commit(1)
        box.switch()


def take_from_a_standby(box: RecoveryBox, base: BackupId) -> BackupId:
    """A base backup of a standby that was made of `base`, while others write to its primary."""
    with (
        private_folder() as folder,
        a_standby(box, base, folder / "standby") as standby,
        box.load(),
        box.session() as session,
    ):
        for statement in ("CHECKPOINT", "ALTER SYSTEM SET archive_timeout = '1s'", RELOAD):
            session.execute(statement)
        taken = box.take(dsn=Secret(standby.endpoint().dsn)).id
        for statement in ("ALTER SYSTEM RESET archive_timeout", RELOAD):
            session.execute(statement)
    return taken


@contextlib.contextmanager
def a_standby(box: RecoveryBox, base: BackupId, folder: Path) -> Iterator[LocalCluster]:
    """A standby of the box's cluster, which has replayed what is committed by now."""
    folder.mkdir(mode=0o711)
    manifest = base_backups.load(box.store, base).manifest
    places = plan_places(folder / "data", manifest.tablespaces)
    unpack(box.store, manifest, places, clock=now, report=Said(), owner=server_identity())
    (folder / "data" / "standby.signal").touch()
    primary = box.cluster.endpoint().dsn.replace("dbname=postgres", "")
    standby = LocalCluster(box.cluster.bin_dir, folder, settings={**SETTINGS, "primary_conninfo": primary})
    standby.create()
    try:
        standby.start()
        yield standby
    finally:
        standby.stop()
