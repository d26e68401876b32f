"""Passwords and keys: where they are taken from, and that nothing shows them."""

import contextlib
import shlex
from pathlib import Path

import pytest

from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline_tests.cli.place import SECRET, Run
from backup_pipeline_tests.servers.s3 import rclone_s3


def test_a_wrong_password_is_not_shown(run: Run, place: Path, guarded: LocalCluster) -> None:
    dsn = f"postgresql://postgres:wrong-{SECRET}@127.0.0.1:{guarded.port}/postgres"
    done = run("restore", "app", "--backup", "latest", "--to", dsn)
    assert done.code == 4
    assert "password" in done.err


def test_a_server_given_with_to_takes_its_password_from_pgpassword(
    run: Run, place: Path, guarded: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = ("--to", f"postgresql://postgres@127.0.0.1:{guarded.port}/postgres")
    asked = ("restore", "app", "--backup", "latest", "--check", "none", "--without-owners", *to)
    monkeypatch.delenv("PGPASSWORD", raising=False)
    without = run(*asked)
    assert without.code == 4
    assert "PGPASSWORD" in without.err.partition("HINT: ")[2]
    monkeypatch.setenv("PGPASSWORD", SECRET)
    replaced = ("--into", "replaced")
    try:
        assert run(*asked, *replaced).code == 0
        done = run(*asked, *replaced, "--replace", "--confirm", "replaced")
        assert done.code == 0, done.err
        (line,) = (line for line in done.out.splitlines() if "swaps it back" in line)
        assert "PGPASSWORD" in line
        _, command, _ = line.split("`")
        undone = run(*shlex.split(command)[1:], "--confirm", "replaced")
        assert undone.code == 0, undone.err
        assert f"127.0.0.1:{guarded.port}" in command
    finally:
        with contextlib.closing(connect(guarded.endpoint())) as session:
            query = "SELECT datname FROM pg_database WHERE datname LIKE 'replaced%'"
            for (name,) in session.execute(query).fetchall():
                session.execute(f'DROP DATABASE "{name}" WITH (FORCE)'.encode())


def test_wrong_keys_to_a_store_are_not_shown(
    run: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rclone_s3(tmp_path / "s3") as server:
        text = (place / "backups.toml").read_text()
        store = f'url = "s3://{server.bucket}"\nendpoint = "{server.endpoint}"\n'
        store += 'access_key_id = { env = "S3_KEY" }\nsecret_access_key = { env = "S3_SECRET" }'
        (place / "backups.toml").write_text(text.replace('url = "file:store"', store))
        monkeypatch.setenv("S3_KEY", server.access_key_id)
        monkeypatch.setenv("S3_SECRET", SECRET)
        done = run("list")
        assert done.code == 5
        assert "HINT: " in done.err
        monkeypatch.setenv("S3_SECRET", server.secret_access_key)
        assert "no backups" in run("list").out
        monkeypatch.delenv("S3_SECRET")
        assert run("list").code == 3
