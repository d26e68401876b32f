"""Dumps of an older layout, under misleading names: listed, proven as far as they can be, restored."""

from dataclasses import replace
from pathlib import Path

import pytest

from backup_pipeline import process
from backup_pipeline.actions import backups, prove, restore
from backup_pipeline.actions.restore import RestoreRequest
from backup_pipeline.domain.backup import Verdict
from backup_pipeline.engines.postgres import tools
from backup_pipeline.errors import Refused
from backup_pipeline.process import Command
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline_tests.actions.box import Box, ask, now

HOLE = "pg_restore has a hole"


@pytest.fixture
def imported(box: Box, tmp_path: Path) -> Box:
    """A box whose only backup is a dump of the older layout."""
    folder = tmp_path / "dumps"
    (folder / "daily").mkdir(parents=True)
    dump = folder / "daily" / "backup_daily_20260301_020000.sql.gz"
    argv = (f"{box.cluster.bin_dir}/pg_dump", "--format=custom", f"--file={dump}")
    process.run(Command(argv, box.endpoint.environment()), timeout_s=60)
    return replace(box, protected=replace(box.protected, imports=DirectoryStore(folder)))


def test_it_is_listed_proven_as_restored_and_restored(imported: Box) -> None:
    (found,) = backups.listing(imported.protected).backups
    assert (str(found.id), found.tier) == (
        "shop/20260301T020000Z-imported-daily".replace("shop", imported.protected.name),
        "daily",
    )
    proof = prove.prove(imported.protected, found.id, clock=now, report=imported.said)
    assert proof.verdict is Verdict.RESTORED, proof.differences
    assert backups.load(imported.protected, found.id).verdict is Verdict.RESTORED
    name = f"{imported.endpoint.database}_older"
    asked = RestoreRequest(str(found.id), into=name, accept_unverified=True)
    plan = restore.plan(imported.protected, asked, clock=now)
    restore.carry_out(imported.protected, plan, clock=now, report=imported.said)
    query = "SELECT count(*) FROM public.customer"
    assert ask(imported.cluster.endpoint(name), query) == ask(imported.endpoint, query)


def test_a_client_with_a_known_hole_does_not_open_it_unasked(
    imported: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore, "known_vulnerable", lambda _version: HOLE)
    asked = RestoreRequest("latest", into=f"{imported.endpoint.database}_older")
    with pytest.raises(Refused, match=HOLE):
        restore.plan(imported.protected, asked, clock=now)
    assert tools.known_vulnerable(170010)
