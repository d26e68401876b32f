"""Databases, tables and roles whose names mean something to a shell, to libpq, to SQL or to a path."""

import contextlib
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from psycopg import sql

from backup_pipeline.actions import prove, restore
from backup_pipeline.actions.protected import Protected
from backup_pipeline.config import DatabaseConfig, ScratchConfig, Secret
from backup_pipeline.domain.backup import Verdict
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline_tests.actions.box import NAME, Box, Said, ask, now, stored, swap_back

OURS = re.compile(
    rf"(databases/{NAME}/dumps/manual|catalog/{NAME})/[0-9]{{8}}T[0-9]{{6}}Z-[0-9a-f]{{6}}[/.]"
    r"(manifest\.json|verdict\.json|json|dump/[0-9]+\.dat(\.\w+)?|dump/(toc|blobs_[0-9]+)\.\w+"
    r"|database\.dump|globals\.sql|fingerprint\.json)"
)
NAMES = {
    "a shell's": "-x $(touch {canary}) `touch {canary}`; touch {canary} | %s",
    "a connection string": "host=evil dbname='x' user=y\n= \\",
    "a path": "../../../{folder}/up/..",
    "SQL": "x\"; DROP TABLE t; --'\t\\! touch {canary}",
    "63 bytes of UTF-8": "é" * 31 + "x",
    "a URI": "postgresql://evil@elsewhere:1/x?options=-c",
}


@pytest.fixture(params=NAMES)
def hostile(
    request: pytest.FixtureRequest, postgres: LocalCluster, other: LocalCluster, tmp_path: Path
) -> Iterator[tuple[str, Box]]:
    """A database of a hostile name, with a table, a schema and an owner of the same name."""
    name = NAMES[request.param].format(canary="canary", folder=tmp_path.name)[:63]
    identifier = sql.Identifier(name)
    before = all_databases(postgres)
    try:
        with contextlib.closing(connect(postgres.endpoint())) as session:
            session.execute(sql.SQL("CREATE ROLE {}").format(identifier))
            session.execute(sql.SQL("CREATE DATABASE {0} TEMPLATE template0 OWNER {0}").format(identifier))
            session.execute(sql.SQL("ALTER DATABASE {} SET work_mem = '8MB'").format(identifier))
        endpoint = postgres.endpoint(name)
        with contextlib.closing(connect(endpoint)) as session:
            for text in (
                "CREATE SCHEMA {0} AUTHORIZATION {0}",
                "CREATE TABLE {0}.{0} ({0} serial PRIMARY KEY, other text)",
                "INSERT INTO {0}.{0} (other) SELECT md5(n::text) FROM generate_series(1, 50) n",
                "ALTER TABLE {0}.{0} OWNER TO {0}",
                "CREATE INDEX ON {0}.{0} (other)",
                "CREATE VIEW {0}.view AS SELECT * FROM {0}.{0}",
                "GRANT SELECT ON {0}.view TO {0}",
            ):
                session.execute(sql.SQL(text).format(identifier))
        (tmp_path / "store").mkdir()
        store = DirectoryStore(tmp_path / "store")
        config = DatabaseConfig(
            NAME,
            dsn=Secret(endpoint.dsn),
            restore_dsn=Secret(postgres.endpoint().dsn),
            bin_dir=postgres.bin_dir,
            lock_timeout=timedelta(seconds=20),
        )
        scratch = ScratchConfig(dsn=Secret(other.endpoint().dsn), bin_dir=postgres.bin_dir)
        yield name, Box(postgres, endpoint, name, name, store, Protected(config, store, scratch=scratch))
    finally:
        with contextlib.closing(connect(postgres.endpoint())) as session:
            for left in all_databases(postgres) - before:
                drop = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)")
                session.execute(drop.format(sql.Identifier(left)))
            session.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(identifier))


def all_databases(cluster: LocalCluster) -> set[str]:
    with contextlib.closing(connect(cluster.endpoint())) as session:
        return {str(name) for (name,) in session.execute("SELECT datname FROM pg_database").fetchall()}


def rows(endpoint: Endpoint, name: str) -> object:
    table = sql.Identifier(name, name).as_string()
    return ask(endpoint, f"SELECT count(*) || max(other) FROM {table}")


def test_a_hostile_name_goes_all_the_way_and_back(
    hostile: tuple[str, Box], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, box = hostile
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    said = Said()
    before, expected = all_databases(box.cluster), rows(box.endpoint, name)
    jobs = 2 if "dbname" in name else 1
    backup = box.take(protected=box.configured(jobs=jobs, critical_tables=()))
    proof = prove.prove(box.protected, backup.id, clock=now, report=said)
    assert proof.differences == ()
    assert proof.verdict is Verdict.PROVEN
    assert all(OURS.fullmatch(key) for key in stored(box.store)), list(stored(box.store))

    new = restore.carry_out(
        box.protected,
        restore.plan(box.protected, restore.RestoreRequest(), clock=now),
        clock=now,
        report=said,
    )
    assert rows(box.cluster.endpoint(new.database), name) == expected
    with contextlib.closing(connect(box.endpoint)) as session:
        session.execute(sql.SQL("TRUNCATE {}").format(sql.Identifier(name, name)))
    asked = restore.RestoreRequest(replace=True, confirm=name, check="counts")
    plan = restore.plan(box.protected, asked, clock=now)
    assert all(line.isprintable() for line in plan.lines), plan.lines
    swapped = restore.carry_out(box.protected, plan, clock=now, report=said)
    assert all(line.isprintable() for line in swapped.lines), swapped.lines
    assert swapped.database == name
    assert rows(box.endpoint, name) == expected
    undone = swap_back(box.protected)
    assert rows(box.endpoint, name) is None  # emptied, as it was when it was put aside
    assert all_databases(box.cluster) == before | {new.database, undone.kept_as}

    assert not list((tmp_path / "here").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"here", "store"}
    assert not [path for path in tmp_path.parent.iterdir() if path.name in ("up", "canary")]
