"""The runbook's commands for a dump, run as they stand, with this software and without it."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from backup_pipeline.config import Secret
from backup_pipeline.engines.postgres.cluster import FREE_PORT, LocalCluster
from backup_pipeline.engines.postgres.scratch import private_folder
from backup_pipeline.storage import catalog
from backup_pipeline_tests.actions.box import ask, databases, execute
from backup_pipeline_tests.runbook import Reader, a_reader
from backup_pipeline_tests.servers import postgres as servers

LIST, BESIDE, REPLACE, NEW_SERVER, BY_HAND = "1", "2", "3", "4", "8"
COUNT = "SELECT count(*) FROM app.orders"
OWNER = "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = 'agentweave'"


@dataclass(frozen=True)
class Night:
    """A server with a database that is backed up, and who reads the runbook."""

    server: LocalCluster
    reader: Reader


@pytest.fixture(scope="module", params=["folder", "s3"])
def night(request: pytest.FixtureRequest) -> Iterator[Night]:
    bin_dir = servers.bin_dir_17()
    with (
        private_folder() as folder,
        a_reader(request.param, folder, bin_dir) as reader,
        servers.running_cluster(bin_dir) as server,
    ):
        fill(server)
        store = f"[store]\nurl = '{reader.place.url}'\n{reader.place.lines}"
        dsn = server.endpoint("agentweave").dsn
        database = f'[databases.agentweave]\ndsn = "{dsn}"\nrestore_dsn = "{dsn}"\n'
        reader.write("backups.toml", store + database)
        reader.install("backup-pipeline", "backup_pipeline.cli")
        reader.do("backup-pipeline backup agentweave --tier daily")
        yield Night(server, reader)


def fill(server: LocalCluster) -> None:
    execute(server.endpoint(), "CREATE ROLE agentweave_owner; CREATE ROLE reader; CREATE ROLE restorer")
    execute(
        server.endpoint(),
        "GRANT agentweave_owner TO restorer, reader; GRANT pg_read_all_data TO reader;"
        "ALTER ROLE reader SET search_path = app",
    )
    locale = "TEMPLATE template0 ENCODING UTF8 LOCALE 'C.UTF-8'"
    execute(server.endpoint(), f"CREATE DATABASE agentweave OWNER agentweave_owner {locale}")
    database = server.endpoint("agentweave")
    execute(
        database,
        "CREATE SCHEMA app AUTHORIZATION agentweave_owner; SET ROLE agentweave_owner;"
        "CREATE TABLE app.orders AS SELECT i AS number, i::money AS paid FROM generate_series(1, 500) AS i;"
        "GRANT SELECT ON app.orders TO reader",
    )


def test_what_is_there_is_listed(night: Night) -> None:
    assert "proven" in night.reader.run(LIST, {})


def test_a_dump_comes_back_beside_the_live_one(night: Night) -> None:
    night.reader.run(BESIDE, {})
    assert ask(night.server.endpoint("agentweave_restored"), COUNT) == 500
    execute(night.server.endpoint(), "DROP DATABASE agentweave_restored")


def test_a_dump_takes_the_live_one_s_place_and_is_swapped_back(night: Night) -> None:
    execute(night.server.endpoint("agentweave"), "DELETE FROM app.orders WHERE number > 10")
    typed = {
        "--replace": "--replace --confirm agentweave",
        "undo agentweave": "undo agentweave --confirm agentweave",
    }
    night.reader.run(REPLACE, typed)
    assert ask(night.server.endpoint("agentweave"), COUNT) == 10
    (undone,) = databases(night.server, "agentweave_undone") - {"agentweave"}
    assert ask(night.server.endpoint(undone), COUNT) == 500
    execute(night.server.endpoint(), "DROP DATABASE agentweave")
    execute(night.server.endpoint(), f"ALTER DATABASE {undone} RENAME TO agentweave")


def test_a_dump_comes_back_on_a_new_server_with_the_configuration_and_without(night: Night) -> None:
    password = Secret("known")
    with private_folder() as folder:
        new = LocalCluster(
            servers.bin_dir_17(), folder / "cluster", relaxed=True, port=FREE_PORT, password=password
        )
        new.create()
        new.start()
        try:
            dsn = f"postgresql://postgres@127.0.0.1:{new.port}/postgres"
            lost = f"backup-pipeline {night.reader.place.options}"
            told = "backup-pipeline --store s3://agentweave-backups/prod --endpoint https://s3.example.net"
            night.reader.run(
                NEW_SERVER,
                {
                    "read -rs PGPASSWORD": f"read -rs PGPASSWORD <<< {password.reveal()}",
                    f"{told} list": f"psql {dsn} -c 'DROP DATABASE agentweave'; {lost} list",
                    told: lost,
                    "postgresql://postgres@new-server/postgres": dsn,
                },
            )
            assert ask(new.endpoint("agentweave"), COUNT) == 500
            assert ask(new.endpoint(), OWNER) == "agentweave_owner"
        finally:
            new.stop()


def test_a_dump_comes_back_without_this_software(night: Night) -> None:
    backups = catalog.list_backups(night.reader.place.store, fresh=True).backups
    # What a person does in the editor: the line goes whose other role this server has not.
    night.reader.write("editor", '#!/bin/sh\nexec sed -i /restorer/d "$1"\n')
    with servers.running_cluster(servers.bin_dir_17()) as bare:
        said = night.reader.run(
            BY_HAND, {**night.reader.place.by_hand, "<stamp>": backups[-1].id.stamp}, bare.endpoint()
        )
        assert "database.dump: OK" in said
        assert ask(bare.endpoint("agentweave"), COUNT) == 500
        assert ask(bare.endpoint(), OWNER) == "agentweave_owner"
        assert ask(bare.endpoint(), "SELECT pg_has_role('reader', 'agentweave_owner', 'MEMBER')") is True
        roles = "SELECT count(*) FROM pg_roles WHERE rolname IN ('agentweave_owner', 'reader', 'restorer')"
        assert ask(bare.endpoint(), roles) == 2
    shutil.rmtree(night.reader.folder / "restore")
