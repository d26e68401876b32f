"""The demo's folder: one user at a time, private files, a shell that can read them; and its servers."""

import os
import subprocess
from pathlib import Path

import pytest

from backup_pipeline.config import Secret
from backup_pipeline.demo import place as places
from backup_pipeline.demo import servers
from backup_pipeline.demo.place import Place, empty, held, prepare, write_environment
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.errors import Busy


def test_a_second_user_is_told_who_has_it(folder: Path) -> None:
    with held(folder, "make demo"), pytest.raises(Busy) as refused, held(folder, "make dev"):
        pass
    assert f"`make demo`, process {os.getpid()}" in refused.value.message
    with held(folder, "make dev"):
        pass


def test_a_shell_reads_the_variables(folder: Path) -> None:
    with held(folder, "test") as place:
        write_environment(place, {"DEMO_DSN": "it's $HOME; `id`"}, paths=[Path("/a b/bin")])
    assert places.sourced(place.environment) == f". '{place.environment}'"
    assert place.environment.stat().st_mode & 0o077 == 0
    said = subprocess.run(
        ["/bin/sh", "-c", '. "$1"; echo "$DEMO_DSN"; echo "$PATH"', "sh", place.environment],
        check=True, capture_output=True, text=True, env={"PATH": "/bin"},
    ).stdout  # fmt: skip
    assert said == "it's $HOME; `id`\n/a b/bin:/bin\n"


def test_a_cluster_lies_elsewhere_where_the_server_may_not_enter(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_may_be_entered", lambda _folder: False)
    monkeypatch.setattr(places, "server_identity", lambda: "nobody")
    place = Place(folder)
    with held(folder, "test"):
        prepare(place)
        elsewhere = place.cluster
        assert place.is_split
        empty(place)
        assert not elsewhere.exists()
        assert list(folder.glob("postgres*")) == []


def test_servers_start_where_they_were_and_keep_what_they_had(folder: Path) -> None:
    with held(folder, "test") as place:
        with servers.running(place) as first:
            with connect(first.postgres.endpoint()) as session:
                session.execute("CREATE DATABASE kept")
            variables = dict(first.variables)
        with servers.running(place) as second:
            assert dict(second.variables) == variables
            dsn = variables["DEMO_DSN"].replace("agentweave", "kept")
            connect(Endpoint(dsn, Secret(variables["DEMO_PASSWORD"]))).close()
        for name in ("postgres", "s3"):
            assert place.secret(name).stat().st_mode & 0o077 == 0
        empty(place)
        assert not (folder / "postgres").exists()
