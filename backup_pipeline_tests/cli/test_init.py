"""`init`: the configuration that it writes, and what it never writes."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict

from backup_pipeline.config_file import parse
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline_tests.cli.place import SECRET, Run


def test_init_writes_what_check_and_backup_accept(
    run: Run, guarded: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MY_SHOP_PASSWORD", raising=False)
    dsn = f"postgresql://postgres:{SECRET}@127.0.0.1:{guarded.port}"
    done = run("init", "--dsn", dsn)
    assert done.code == 0, done.out + done.err
    assert "next: backup-pipeline backup my-shop" in done.out
    text = (tmp_path / "backups.toml").read_text()
    assert SECRET not in text
    assert list(tomllib.loads(text)["databases"]) == ["my-shop"]
    assert parse(text, tmp_path / "backups.toml").database("my-shop").tiers
    again = run("init", "--dsn", dsn)
    assert again.code == 6
    assert "not overwritten" in again.err
    monkeypatch.setenv("MY_SHOP_PASSWORD", SECRET)
    assert run("check").code == 0
    taken = run("backup", "my-shop", "--no-prove")
    assert taken.code == 0, taken.err
    assert "'My Shop'" in taken.out
    uncommented = re.sub(r"^# (restore_dsn|restore_password|critical)", r"\1", text, flags=re.MULTILINE)
    (tmp_path / "backups.toml").write_text(uncommented)
    checked = run("check", "my-shop")
    assert checked.code == 0, checked.out
    assert "restores go to" in checked.out
    monkeypatch.delenv("MY_SHOP_PASSWORD")
    unset = run("backup", "my-shop")
    assert unset.code == 3
    assert "MY_SHOP_PASSWORD" in unset.err


def test_init_takes_the_server_from_libpq_s_variables(
    run: Run, guarded: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MY_SHOP_PASSWORD", raising=False)
    said = {"PGHOST": "127.0.0.1", "PGPORT": str(guarded.port), "PGUSER": "postgres", "PGPASSWORD": SECRET}
    for name, value in {**said, "PGDATABASE": "My Shop"}.items():
        monkeypatch.setenv(name, value)
    done = run("init")
    assert done.code == 0, done.out + done.err
    assert f"on postgres@127.0.0.1:{guarded.port}/My Shop: My Shop" in done.out
    text = (tmp_path / "backups.toml").read_text()
    assert SECRET not in text
    (database,) = tomllib.loads(text)["databases"].values()
    assert conninfo_to_dict(database["dsn"]) == {
        "host": "127.0.0.1",
        "port": str(guarded.port),
        "user": "postgres",
        "dbname": "My Shop",
    }


def test_init_takes_the_password_of_its_dsn_from_pgpassword(
    run: Run, guarded: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MY_SHOP_PASSWORD", raising=False)
    monkeypatch.setenv("PGPASSWORD", SECRET)
    done = run("init", "--dsn", f"postgresql://postgres@127.0.0.1:{guarded.port}/My%20Shop")
    assert done.code == 0, done.out + done.err
    text = (tmp_path / "backups.toml").read_text()
    assert tomllib.loads(text)["databases"]["my-shop"]["password"] == {"env": "MY_SHOP_PASSWORD"}
    assert SECRET not in text


def test_init_writes_no_secret_of_any_kind_and_only_for_its_owner(
    run: Run, guarded: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MY_SHOP_PASSWORD", raising=False)
    server = f"postgresql://postgres:{SECRET}@127.0.0.1:{guarded.port}/My%20Shop"
    done = run("init", "--dsn", f"{server}?sslpassword={SECRET}")
    assert done.code == 0, done.out + done.err
    assert "sslpassword" in done.out
    path = tmp_path / "backups.toml"
    assert SECRET not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--store", "/srv/backups"), r"nothing was written: .*store\.url: expected"),
        (("--output", "nowhere/b.toml"), "there is no folder"),
        (("--output", "nowhere/b.toml", "--store", "s3://bucket"), "there is no folder"),
        (("--output", "file/b.toml", "--store", "s3://bucket"), "there is no folder"),
    ],
)
def test_init_that_cannot_write_leaves_nothing(
    run: Run,
    guarded: LocalCluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    dsn = f"postgresql://postgres:{SECRET}@127.0.0.1:{guarded.port}/My%20Shop"
    done = run("init", "--dsn", dsn, *args)
    assert done.code == 3, done.err
    assert re.search(said, done.err)
    assert "HINT: " in done.err
    assert "wrote" not in done.out
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("folder", ["pc%20x", "sp ace", "h#sh", "qu?ry"])
def test_init_and_check_mean_the_same_folder(
    run: Run, guarded: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    dsn = f"postgresql://postgres:{SECRET}@127.0.0.1:{guarded.port}/My%20Shop"
    done = run("init", "--dsn", dsn)
    assert done.code == 0, done.out + done.err
    assert {item.name for item in (tmp_path / folder).iterdir()} == {"backups", "backups.toml"}
    assert run("--store", "file:backups", "list").code == 0


def test_init_reads_a_store_s_url_as_all_others_do(
    run: Run, guarded: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dsn = f"postgresql://postgres:{SECRET}@127.0.0.1:{guarded.port}/My%20Shop"
    done = run("init", "--dsn", dsn, "--store", f"file://{tmp_path}/u%20v")
    assert done.code == 0, done.out + done.err
    assert (tmp_path / "u v").is_dir()


def test_init_tells_a_command_that_finds_its_file(
    run: Run, guarded: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dsn = f"postgresql://postgres:{SECRET}@127.0.0.1:{guarded.port}/My%20Shop"
    output = tmp_path / "else where.toml"
    done = run("init", "--dsn", dsn, "--output", str(output))
    assert done.code == 0, done.out + done.err
    (line,) = (line for line in done.out.splitlines() if line.startswith("next: "))
    words = shlex.split(line.removeprefix("next: "))
    assert words == ["backup-pipeline", "--config", str(output), "backup", "my-shop"]


def test_init_where_no_server_is(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("init", "--dsn", f"postgresql://x:{SECRET}@127.0.0.1:1")
    assert done.code == 4
    assert not list(tmp_path.iterdir())
