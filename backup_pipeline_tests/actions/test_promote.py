"""A recovered directory that becomes production: only when it is right, and whatever dies meanwhile."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from backup_pipeline import process
from backup_pipeline.actions import promote
from backup_pipeline.actions.promote import PromoteRequest
from backup_pipeline.actions.promotion_checks import owner_of
from backup_pipeline.actions.protected_cluster import ProtectedCluster, open_cluster
from backup_pipeline.actions.source_configuration import is_configured
from backup_pipeline.config import StoreConfig
from backup_pipeline.config_file import parse
from backup_pipeline.domain.layout import wal_system_prefix
from backup_pipeline.domain.recovered import PROMOTED_NAME, RECORD_NAME
from backup_pipeline.engines.postgres import daemon
from backup_pipeline.engines.postgres.cluster import (
    LocalCluster,
    free_port,
    server_identity,
    server_in,
)
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.scratch import private_folder
from backup_pipeline.engines.postgres.unpack import tablespaces_beside
from backup_pipeline.errors import Refused, ServerError, ToolError
from backup_pipeline.process import Command, Completed, Identity
from backup_pipeline.storage import base_backups
from backup_pipeline.wal.setup import archive_command
from backup_pipeline_tests.actions.box import Said, ask, execute, now
from backup_pipeline_tests.actions.cluster_box import give
from backup_pipeline_tests.servers import postgres as servers
from backup_pipeline_tests.storage.effects import Died
from backup_pipeline_tests.waiting import wait_until
from backup_pipeline_tests.wal.box import WalBox, python_for

SETTINGS = {"archive_mode": "on", "wal_level": "replica", "max_wal_senders": "5", "fsync": "off"}
LEFT_OUT_RULE = "host all all 127.0.0.8/32 trust"
RULES = f"""
host all all 127.0.0.9/32 reject # ldapbindpasswd=hunter
{LEFT_OUT_RULE}
"""
CONFIGURATION = """
port = {port}
listen_addresses = ''
unix_socket_directories = '{sockets}'
work_mem = '7MB'
fsync = off
shared_preload_libraries = 'planted'
archive_cleanup_command = 'touch {planted}'
ssl_passphrase_command = 'touch {planted} # hunter'
primary_conninfo = 'host=old password=hunter'
restore_command = 'fetch --key hunter'
synchronous_standby_names = 'gone'
"""


@dataclass
class Site:
    """An old production, what was recovered from it, and the configuration that reads both."""

    old: LocalCluster
    box: WalBox
    data: Path
    planted: Path
    sockets: Path
    port: int
    planned_early: promote.Plan | None = None  # before the first was promoted

    def run(self, *words: str) -> Completed:
        """The command line, as the server's user."""
        return process.run(self.box.program("--quiet", *words), timeout_s=120, check=False)

    def must(self, *words: str) -> Completed:
        done = self.run(*words)
        assert done.returncode == 0, done.stderr
        return done

    @property
    def cluster(self) -> ProtectedCluster:
        return open_cluster(parse(self.box.path.read_text(), self.box.path), "main")

    def request(self, **changes: Any) -> PromoteRequest:
        command = archive_command(self.cluster.config, self.box.path, python=self.box.python)
        given = PromoteRequest(self.data, command, source_is_gone=True, confirm="main", as_nobody=True)
        return replace(given, **changes)

    def plan(self, **changes: Any) -> promote.Plan:
        return promote.plan(self.cluster, self.request(**changes), clock=now)

    @property
    def twin(self) -> Path:
        """Another directory, recovered to the same target."""
        return self.data.with_name("twin")

    @property
    def early(self) -> Path:
        """A third one, whose promotion was broken off before the first began."""
        return self.data.with_name("early")

    @property
    def early_cluster(self) -> ProtectedCluster:
        config = replace(self.cluster.config, data_directory=str(self.early))
        return replace(self.cluster, config=config)

    def plan_early(self) -> promote.Plan:
        return promote.plan(self.early_cluster, self.request(data=self.early), clock=now)

    @property
    def new(self) -> Endpoint:
        return Endpoint(f"host={self.sockets} port={self.port} user=postgres dbname=postgres")


@contextlib.contextmanager
def a_site(bin_dir: str) -> Iterator[Site]:
    """A cluster that archives by the real client, a base backup, a row behind it; recovered, and running."""
    identity = server_identity()
    with private_folder() as folder:
        place = folder / "box"
        for name in ("store", "sockets"):
            (place / name).mkdir(parents=True, mode=0o711)
        old = LocalCluster(bin_dir, folder / "cluster", settings=SETTINGS)
        old.create()
        planted, port = place / "planted", free_port()
        conf = old.data / "postgresql.conf"
        added = CONFIGURATION.format(port=port, sockets=place / "sockets", planted=planted)
        conf.write_text(conf.read_text() + added)
        rules = old.data / "pg_hba.conf"
        rules.write_text(rules.read_text() + RULES)
        # Those would keep this very server from starting, or its commits from ending.
        hindering = ("archive_cleanup_command", "synchronous_standby_names")
        old.settings = {**SETTINGS, **dict.fromkeys(hindering, "")}
        old.start()
        python = python_for(identity, folder)
        dsn, store = old.endpoint().dsn, StoreConfig((place / "store").as_uri())
        box = WalBox(place, store, dsn=dsn, data_directory=str(old.data), identity=identity, python=python)
        give_all(place)
        made = Site(old, box, place / "new", planted, place / "sockets", port)
        try:
            prepare(made)
            yield made
        finally:
            old.stop(grace_s=0.0)
            with contextlib.suppress(ToolError):
                daemon.stop(f"{old.bin_dir}/pg_ctl", made.data, owner=identity)
            with contextlib.suppress(ToolError):
                daemon.stop(f"{old.bin_dir}/pg_ctl", made.early, owner=identity)


@pytest.fixture(scope="module", params=[servers.bin_dir_15, servers.bin_dir_17], ids=["15", "17"])
def shared(request: pytest.FixtureRequest) -> Iterator[Site]:
    with a_site(request.param()) as made:
        yield made


@pytest.fixture
def site(shared: Site) -> Iterator[Site]:
    """One that is not promoted: another than the shared one, where a test that came first promoted that."""
    if (shared.data / RECORD_NAME).exists():
        yield shared
    else:
        with a_site(shared.old.bin_dir) as made:
            yield made


def give_all(place: Path) -> None:
    """Let the server's user own what we, as root, may have written."""
    for path in (place, *place.rglob("*")):
        give(path)


def prepare(site: Site) -> None:
    site.must("wal", "setup", "main", "--apply")
    execute(site.old.endpoint(), "CREATE TABLE public.kept AS SELECT 1 AS number")
    site.must("base-backup", "main")
    execute(site.old.endpoint(), "INSERT INTO public.kept VALUES (2)")
    switch(site.old.endpoint())
    site.must("recover", "main", "--to", "latest", "--into", str(site.data), "--port", str(free_port()))
    site.must("recover", "main", "--to", "latest", "--into", str(site.twin))
    process.run(Command(("cp", "-a", str(site.twin), str(site.early))), timeout_s=60)
    conf = site.early / "postgresql.conf.source"
    conf.write_text(conf.read_text() + f"port = {free_port()}\n")
    site.box = replace(site.box, data_directory=str(site.data))
    dying = Said(dying_at("configuration is in force"))
    with contextlib.suppress(Died):
        promote.carry_out(site.early_cluster, site.plan_early(), clock=now, report=dying)
    site.planned_early = site.plan_early()


def switch(endpoint: Endpoint) -> None:
    """Begin a new segment, and wait until the one before it is archived."""
    name = str(ask(endpoint, "SELECT pg_walfile_name(pg_switch_wal())"))
    wait_until(lambda: str(ask(endpoint, "SELECT last_archived_wal FROM pg_stat_archiver")) >= name)


def test_while_the_source_may_be_alive_nothing_is_done(site: Site) -> None:
    """It answers, and after its end its WAL is young; a person says that it is gone, and types the name."""
    told = ("promote", "main", str(site.data), "--confirm", "main")
    refused = site.run(*told)
    assert refused.returncode == 6
    assert "may be alive" in refused.stderr
    assert "answers at" in refused.stderr
    site.old.stop(grace_s=0.0)
    refused = site.run(*told)
    assert (refused.returncode, "it archived WAL at" in refused.stderr) == (6, True), refused.stderr
    assert "answers at" not in refused.stderr
    refused = site.run("promote", "main", str(site.data), "--source-is-gone")
    assert (refused.returncode, "is not confirmed" in refused.stderr) == (6, True), refused.stderr
    assert server_in(site.data) is not None  # as `recover --port` left it
    assert not is_configured(site.data)
    assert (site.data / RECORD_NAME).exists()


def test_the_plan_shows_what_comes_back_and_what_does_not(site: Site) -> None:
    told = ("promote", "main", str(site.data), "--source-is-gone", "--dry-run")
    said = site.must(*told, "--json").stdout
    lines = json.loads(said)["plan"]
    assert "setting: work_mem = '7MB'" in lines
    assert any(line.startswith("LEFT OUT: shared_preload_libraries (") for line in lines)
    assert any(line.startswith("LEFT OUT: synchronous_standby_names") for line in lines)
    assert "pg_hba.conf: local all all trust" in [" ".join(line.split()) for line in lines]
    assert any("client.py" in line for line in lines if line.startswith("archiving: archive_command"))
    assert any(line.startswith("pg_hba.conf: host all all 127.0.0.9/32 reject") for line in lines)
    allowed = site.must(*told, "--allow", "shared_preload_libraries").stdout
    assert "setting: shared_preload_libraries (" in allowed
    assert "hunter" not in said + allowed
    assert list(site.data.glob("*.new")) == []


def test_what_is_not_a_finished_recovery_is_refused(site: Site, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="is not a directory that `recover` finished"):
        site.plan(data=tmp_path)
    elsewhere = replace(site.cluster, config=replace(site.cluster.config, data_directory=str(tmp_path)))
    with pytest.raises(Refused, match="data_directory is"):
        promote.plan(elsewhere, site.request(), clock=now)
    another = replace(site.cluster, config=replace(site.cluster.config, name="other"))
    with pytest.raises(Refused, match="was recovered from cluster main, not from other"):
        promote.plan(another, site.request(), clock=now)


def test_production_does_not_run_as_nobody(site: Site, tmp_path: Path) -> None:
    """Run as root, `recover` leaves its directory to nobody, in a group of our own."""
    if (identity := server_identity()) is None:
        assert site.plan(as_nobody=False).owner is None
        return
    assert site.plan().owner == identity
    with pytest.raises(Refused, match="belongs to nobody still") as refused:
        site.plan(as_nobody=False)
    then = f"Then give it to PostgreSQL's user: `chown -R postgres: {site.data}`."
    assert refused.value.hint == f"End its server: `kill -INT {server_in(site.data)}`. {then}"
    tablespace = tmp_path / "its space"
    (tmp_path / "pg_tblspc").mkdir()
    (tmp_path / "pg_tblspc" / "1").symlink_to(tablespace)
    os.chown(tmp_path, 1, identity.gid)
    beside = tablespaces_beside(tmp_path)
    (tmp_path / "pg_tblspc" / "2").symlink_to(beside / "2")
    with pytest.raises(Refused) as refused:
        owner_of(tmp_path, as_nobody=False)
    chown = f"`chown -R postgres: {tmp_path} '{tablespace}' {beside}`"
    assert refused.value.hint == f"First give it to PostgreSQL's user: {chown}."
    os.chown(tmp_path, 1, 1)
    assert owner_of(tmp_path, as_nobody=False) == Identity(1, 1)


def test_a_timeline_that_another_branch_took_is_refused(site: Site) -> None:
    store, system = site.cluster.store, site.plan().record.system_identifier
    key = f"{wal_system_prefix('main', system)}00000002.history"
    store.put(key, [b"1\t0/3000000\tanother branch\n"])
    try:
        with pytest.raises(Refused, match="timeline 2 in the archive of main is another branch's"):
            site.plan()
    finally:
        store.delete([key])


def test_whatever_dies_it_is_gone_on_with_until_it_is_production(site: Site) -> None:
    site.old.stop(grace_s=0.0)
    for words in ("configuration is in force", "the server runs", "taking the first base backup"):
        with pytest.raises(Died):
            promote.carry_out(site.cluster, site.plan(), clock=now, report=Said(dying_at(words)))
        assert (site.data / RECORD_NAME).exists()
    losing = Said(dying_at("taking the first base backup", ServerError("the server is lost")))
    with pytest.raises(ServerError) as lost:
        promote.carry_out(site.cluster, site.plan(), clock=now, report=losing)
    again = f"run this again: backup-pipeline promote main {site.data} --source-is-gone"
    assert lost.value.detail["to go on"] == again
    with pytest.raises(Died):
        promote.carry_out(site.cluster, site.plan(), clock=now, report=Said(dying_at("published")))
    assert (site.data / RECORD_NAME).exists()
    give_all(site.box.folder / "store")
    done = site.must("promote", "main", str(site.data), "--source-is-gone", "--confirm", "main", "--json")
    answer = json.loads(done.stdout)
    assert (answer["timeline"], answer["port"]) == (2, site.port)
    assert any("never start the old server again" in line for line in answer["lines"])
    (left,) = [line for line in answer["lines"] if "look at what was left out" in line]
    assert "; shared_preload_libraries; " in left
    assert f"; pg_hba.conf: {LEFT_OUT_RULE}" in left
    assert not (site.data / RECORD_NAME).exists()
    assert (site.data / PROMOTED_NAME).exists()
    assert ask(site.new, "SELECT array_agg(number) FROM public.kept") == [1, 2]
    assert ask(site.new, "SHOW work_mem") == "7MB"
    assert ask(site.new, "SHOW archive_mode") == "on"
    assert ask(site.new, "SHOW shared_preload_libraries") == ""
    assert not site.planted.exists()
    assert "hunter" not in (site.data / "postgresql.conf").read_text() + done.stdout
    taken = base_backups.list_base_backups(site.cluster.store, "main", fresh=True).backups
    assert [each.manifest.start.timeline for each in taken] == [2, 1]
    assert str(taken[0].id) == answer["base_backup"]
    with pytest.raises(Refused, match="it was promoted already"):
        site.plan()


@pytest.fixture
def promoted(shared: Site) -> Site:
    """The shared one as production: promoted here, where the test before this one ran in another process."""
    if (shared.data / RECORD_NAME).exists():
        shared.old.stop(grace_s=0.0)
        shared.must("promote", "main", str(shared.data), "--source-is-gone", "--confirm", "main")
    return shared


def test_what_is_committed_afterwards_can_be_recovered(promoted: Site) -> None:
    execute(promoted.new, "INSERT INTO public.kept VALUES (3)")
    switch(promoted.new)
    into, port = promoted.box.folder / "third", free_port()
    promoted.must("recover", "main", "--to", "latest", "--into", str(into), "--port", str(port))
    try:
        third = Endpoint(f"host={into} port={port} user=postgres dbname=postgres")
        assert ask(third, "SELECT array_agg(number) FROM public.kept") == [1, 2, 3]
        assert not (into / PROMOTED_NAME).exists()
    finally:
        daemon.stop(f"{promoted.old.bin_dir}/pg_ctl", into, owner=server_identity())


def test_other_directories_that_were_recovered_to_the_same_target_are_refused(
    promoted: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that was configured before, and where the first archived only after the plan; and none of its
    base backups is listed, or waits, where the first has none yet.
    """
    store = promoted.cluster.store
    config = replace(promoted.cluster.config, data_directory=str(promoted.twin))
    twin, request = replace(promoted.cluster, config=config), promoted.request(data=promoted.twin)
    with pytest.raises(Refused, match="timeline 2 of main has WAL in the archive already"):
        promote.plan(twin, request, clock=now)
    with pytest.raises(Refused, match=r"has WAL in the archive already, and \w{24} is another one in"):
        promoted.plan_early()
    assert promoted.planned_early is not None
    before = [info.key for info in store.list("clusters/main/base/")]
    monkeypatch.setattr(promote, "_taken", lambda *_: None)
    with pytest.raises(Refused, match=r"is another one in .*/early: another directory") as refused:
        promote.carry_out(promoted.early_cluster, promoted.planned_early, clock=now, report=Said())
    assert "to go on" not in refused.value.detail
    assert [info.key for info in store.list("clusters/main/base/")] == before
    assert (promoted.early / RECORD_NAME).exists()


def dying_at(words: str, error: BaseException | None = None) -> Callable[[str], None]:
    """What dies, or fails, when a line with these words is said."""

    def hear(line: str) -> None:
        if words in line:
            raise error or Died()

    return hear
