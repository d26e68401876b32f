"""Dumps of an older layout, under misleading names: listed, proven as far as they can be, restored."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from backup_pipeline import process
from backup_pipeline.actions import backups, prove, prune, restore, setup, target
from backup_pipeline.actions.restore import RestoreRequest
from backup_pipeline.config import Secret, StoreConfig
from backup_pipeline.domain.backup import Verdict
from backup_pipeline.engines.postgres import load, tools
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.errors import Refused, StoreError
from backup_pipeline.process import Command
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import open_store
from backup_pipeline_tests.actions.box import Box, ask, drop_all, now
from backup_pipeline_tests.servers import postgres as servers

HOLE = "pg_restore has a hole"
AWAY = StoreConfig("file:///nonexistent/older")


@pytest.fixture
def imported(box: Box, tmp_path: Path) -> Box:
    """A box whose only backup is a dump of the older layout."""
    folder = tmp_path / "dumps"
    (folder / "daily").mkdir(parents=True)
    dump = folder / "daily" / "backup_daily_20260301_020000.sql.gz"
    argv = (f"{box.cluster.bin_dir}/pg_dump", "--format=custom", f"--file={dump}")
    process.run(Command(argv, box.endpoint.environment()), timeout_s=60)
    return replace(box, protected=replace(box.protected, open_imports=lambda: DirectoryStore(folder)))


def test_it_is_listed_proven_as_restored_and_restored(imported: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = backups.listing(imported.protected).backups
    assert (str(found.id), found.tier) == (
        "shop/20260301T020000Z-imported-daily".replace("shop", imported.protected.name),
        "daily",
    )
    monkeypatch.setattr(prove, "known_vulnerable", lambda _version: None)
    proof = prove.prove(imported.protected, found.id, clock=now, report=imported.said)
    assert proof.verdict is Verdict.RESTORED, proof.differences
    assert backups.load(imported.protected, found.id).verdict is Verdict.RESTORED
    name = f"{imported.endpoint.database}_older"
    asked = RestoreRequest(str(found.id), into=name, accept_unverified=True)
    plan = restore.plan(imported.protected, asked, clock=now)
    restore.carry_out(imported.protected, plan, clock=now, report=imported.said)
    query = "SELECT count(*) FROM public.customer"
    assert ask(imported.cluster.endpoint(name), query) == ask(imported.endpoint, query)


def test_a_plan_says_when_the_dump_is_of_another_database(imported: Box) -> None:
    asked = RestoreRequest("latest", into=f"{imported.endpoint.database}_older", accept_unverified=True)
    note = f"the dump says that it is of database {imported.endpoint.database}, not of postgres"
    assert not any(
        "the dump says" in line for line in restore.plan(imported.protected, asked, clock=now).lines
    )
    other = imported.configured(dsn=Secret(imported.cluster.endpoint("postgres").dsn))
    assert any(note in line for line in restore.plan(other, asked, clock=now).lines)


def test_a_client_with_a_known_hole_does_not_open_it_unasked(
    imported: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "known_vulnerable", lambda _version: HOLE)
    asked = RestoreRequest("latest", into=f"{imported.endpoint.database}_older")
    with pytest.raises(Refused, match=HOLE):
        restore.plan(imported.protected, asked, clock=now)
    assert tools.known_vulnerable(170010)


def test_a_proof_does_not_open_it_with_such_a_client_at_all(
    imported: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_args: object, **_options: object) -> None:
        raise AssertionError("pg_restore was given an archive that nobody vouches for")

    monkeypatch.setattr(prove, "known_vulnerable", lambda _version: HOLE)
    monkeypatch.setattr(load, "load", opened)
    (found,) = backups.listing(imported.protected).backups
    proof = prove.prove(imported.protected, found.id, clock=now, report=imported.said)
    assert proof.verdict is Verdict.NOT_PROVABLE
    assert HOLE in proof.differences[0]
    assert proof.differences[-1] == "what to do: Update the client tools."


def test_it_is_opened_by_the_client_of_the_version_that_wrote_it(
    imported: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers.bin_dir_15()  # both are installed, and the older one is found first
    monkeypatch.setattr(prove, "known_vulnerable", lambda _version: None)
    anywhere = replace(
        imported.protected,
        config=replace(imported.protected.config, bin_dir=""),
        scratch=replace(imported.protected.scratch, bin_dir=""),
    )
    (found,) = backups.listing(anywhere).backups
    proof = prove.prove(anywhere, found.id, clock=now, report=imported.said)
    assert proof.verdict is Verdict.RESTORED, proof.differences


@pytest.fixture
def gone(imported: Box, tmp_path: Path) -> Box:
    """A box with a backup of its own, whose folder of older dumps is not there."""
    away = replace(
        imported,
        protected=replace(imported.configured(import_from=AWAY.url), open_imports=lambda: open_store(AWAY)),
    )
    away.take()
    return away


def test_a_folder_of_older_dumps_that_is_gone_hides_no_backup(gone: Box) -> None:
    found = backups.listing(gone.protected)
    assert [backup.tier for backup in found.backups] == ["manual"]
    ((key, why),) = found.unreadable
    assert (key, "does not exist" in why) == (gone.protected.config.import_from, True)
    assert backups.listing_of_all(gone.store, [gone.protected]) == found
    newest = backups.find(gone.protected, "latest")
    assert prove.prove(gone.protected, newest.id, clock=now, report=gone.said).verdict is Verdict.PROVEN


def test_where_an_older_dump_is_meant_or_pruned_the_folder_has_to_be_there(gone: Box) -> None:
    for wanted in ("20260301", f"{gone.protected.name}/20260301T020000Z-imported-daily"):
        with pytest.raises(StoreError, match="does not exist"):
            backups.find(gone.protected, wanted)
    with pytest.raises(StoreError, match="does not exist"):
        prune.plan(gone.store, gone.protected.config, imports=gone.protected.imports, now=now())
    with pytest.raises(StoreError, match="does not exist"):
        list(setup.check(gone.protected))


@pytest.fixture
def server(imported: Box, other: LocalCluster) -> Iterator[LocalCluster]:
    """A server of which the configuration knows nothing, and that is all there is."""
    yield other
    drop_all(other, imported.endpoint.database, ())


def test_another_server_is_the_only_one_that_is_asked(imported: Box, server: LocalCluster) -> None:
    nowhere = Secret("host=/nonexistent dbname=x user=nobody")
    protected = replace(
        imported.configured(restore_dsn=nowhere), open_imports=imported.protected.open_imports
    )
    name = f"{imported.endpoint.database}_older"
    asked = RestoreRequest("latest", into=name, to=server.endpoint(), accept_unverified=True)
    done = restore.carry_out(
        protected, restore.plan(protected, asked, clock=now), clock=now, report=imported.said
    )
    owner = "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()"
    assert ask(server.endpoint(done.database), owner) == ask(server.endpoint(), "SELECT current_user")


def test_what_it_does_not_bring_is_said_before_and_after_it_replaces_anything(imported: Box) -> None:
    name = imported.endpoint.database
    asked = RestoreRequest("latest", replace=True, confirm=name, accept_unverified=True)
    plan = restore.plan(imported.protected, asked, clock=now)
    done = restore.carry_out(imported.protected, plan, clock=now, report=imported.said)
    for lines in (plan.lines, done.lines):
        (said,) = (line for line in lines if "are not carried over" in line)
        assert f"owner, grants, settings, comment and connection limit of {name}" in said
    assert "check: none; with a dump of an older layout there is nothing to compare" in plan.lines
    assert ask(imported.endpoint, "SELECT current_setting('work_mem')") != "8MB"


def test_it_is_not_proven_on_the_server_of_its_source(imported: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove, "known_vulnerable", lambda _version: None)
    scratch = replace(imported.protected.scratch, dsn=Secret(imported.cluster.endpoint().dsn))
    (found,) = backups.listing(imported.protected).backups
    itself = replace(imported.protected, scratch=scratch)
    proof = prove.prove(itself, found.id, clock=now, report=imported.said)
    assert proof.verdict is Verdict.NOT_PROVABLE
    assert "is the cluster that the backup was taken from" in proof.differences[0]
