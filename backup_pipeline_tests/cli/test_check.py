"""What `check` and `probe` tell."""

from pathlib import Path

from psycopg.conninfo import make_conninfo

from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline_tests.actions.box import Box, stored
from backup_pipeline_tests.cli.place import Run


def test_check_looks_at_everything(run: Run, place: Path) -> None:
    done = run("check")
    assert done.code == 0, done.out
    for part in ("app:", "store: ", "proof: ", "restore: "):
        assert part in done.out
    text = (place / "backups.toml").read_text().replace("public.customer", "public.nothing")
    (place / "backups.toml").write_text(text)
    failed = run("check", "app")
    assert failed.code == 4
    assert "public.nothing" in failed.out
    assert "restore: restores go to" in failed.out  # after a failure the rest is still looked at


def test_check_says_what_a_swap_needs(run: Run, place: Path, shared: Box) -> None:
    name, role = shared.endpoint.database, f"{shared.endpoint.database}_plain"
    path = place / "backups.toml"
    path.write_text(path.read_text().replace(shared.cluster.endpoint().dsn, plain_dsn(shared, role)))
    shared.execute(f'CREATE ROLE "{role}" LOGIN CREATEDB', "postgres")
    try:
        done = run("check", "app")
        assert done.code == 0, done.out
        assert f"{name} could not be swapped: role {role} may not rename {name}" in done.out
        assert f'GRANT "{shared.owner}" TO "{role}";' in done.out
        shared.execute(f'GRANT "{shared.owner}" TO "{role}"', "postgres")
        assert f'As a superuser: GRANT pg_signal_backend TO "{role}";' in run("check", "app").out
        shared.execute(f'GRANT pg_signal_backend TO "{role}"', "postgres")
        assert "ok       restore: restores go to" in run("check", "app").out
    finally:
        shared.execute(f'DROP ROLE "{role}"', "postgres")


def plain_dsn(box: Box, role: str) -> str:
    return make_conninfo(box.cluster.endpoint().dsn, user=role)


def test_probe_tells_what_the_store_does(run: Run, place: Path) -> None:
    before = stored(DirectoryStore(place / "store"))
    done = run("probe")
    assert done.code == 0, done.out
    assert len(done.out.splitlines()) > 3
    assert stored(DirectoryStore(place / "store")) == before
