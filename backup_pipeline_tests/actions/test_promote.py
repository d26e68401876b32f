"""A recovered directory that becomes production: only when it is right, and whatever dies meanwhile."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from backup_pipeline import process
from backup_pipeline.actions import promote
from backup_pipeline.actions.promote import PromoteRequest
from backup_pipeline.actions.promotion_checks import owner_of, refuse_doubt
from backup_pipeline.actions.protected_cluster import ProtectedCluster, open_cluster
from backup_pipeline.actions.source_configuration import is_configured
from backup_pipeline.config import ClusterConfig, Secret, StoreConfig
from backup_pipeline.config_file import parse
from backup_pipeline.domain.backup import BackupId
from backup_pipeline.domain.layout import wal_system_prefix
from backup_pipeline.domain.recovered import PROMOTED_NAME, RECORD_NAME, RecoveredRecord
from backup_pipeline.domain.wal import Lsn
from backup_pipeline.domain.wal_archive import ArchiveListing
from backup_pipeline.engines.postgres import daemon
from backup_pipeline.engines.postgres.cluster import (
    FREE_PORT,
    LocalCluster,
    free_port,
    server_identity,
    server_in,
)
from backup_pipeline.engines.postgres.daemon import Address
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.scratch import private_folder
from backup_pipeline.engines.postgres.unpack import tablespaces_beside
from backup_pipeline.errors import Refused, ServerError, ToolError
from backup_pipeline.process import Command, Completed, Identity
from backup_pipeline.storage import base_backups
from backup_pipeline.storage.directory import DirectoryStore
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


@pytest.fixture(scope="module")
def by_password() -> Iterator[LocalCluster]:
    """A server that listens by TCP, and asks for the password `known`."""
    with private_folder() as folder:
        known = Secret("known")
        server = LocalCluster(
            servers.bin_dir_17(), folder / "cluster", relaxed=True, port=FREE_PORT, password=known
        )
        server.create()
        server.start()
        try:
            yield server
        finally:
            server.stop()


def test_the_new_server_is_asked_at_its_own_address_by_tcp_where_its_socket_lets_nobody_in(
    by_password: LocalCluster, tmp_path: Path
) -> None:
    config = ClusterConfig("main", Secret("host=old.example user=postgres password=known"))
    cluster = ProtectedCluster(config, DirectoryStore(tmp_path))
    address = Address(by_password.port or 0, str(tmp_path), "*")
    found = promote.at_its_own_address(cluster, address)
    assert ask(found.source(), "SELECT inet_server_port()") == by_password.port
    with pytest.raises(ServerError):
        promote.at_its_own_address(cluster, replace(address, host=""))


def doubts_about(source: str, folder: Path) -> list[str]:
    """Of a directory that was recovered from a system which is no server's here."""
    cluster = ProtectedCluster(ClusterConfig("main", Secret(source)), DirectoryStore(folder))
    base = BackupId.make("main", now(), "abcdef")
    record = RecoveredRecord("main", "7", base, "latest", 1, 2, Lsn(1), now())
    listing = ArchiveListing("main", "7", 16 * 1024 * 1024)
    return refuse_doubt(cluster, record, listing, folder, gone=True, at=now())


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("host=127.0.0.1 port={port} user=postgres password=wrong", "authentication failed"),
        ("host=127.0.0.1,127.0.0.1 port={free},{port} user=postgres password=wrong", "authentication failed"),
        ("host=127.0.0.1,127.0.0.1 port={port},{free} user=postgres password=wrong", "could not be asked"),
        ("host=127.0.0.1 port={port} user=postgres password=known dbname=none", "does not exist"),
    ],
)
def test_a_server_that_answers_and_cannot_be_asked_is_not_taken_for_gone(
    by_password: LocalCluster, tmp_path: Path, source: str, said: str
) -> None:
    place = source.format(port=by_password.port, free=free_port())
    doubt, *_ = doubts_about(place, tmp_path)
    assert "could not be asked whether it is the old one" in doubt
    assert said in doubt


@pytest.mark.parametrize(
    "source",
    [
        "host=127.0.0.1 port={free}",
        "host={folder} port={free}",
        "host=127.0.0.1,{folder} port={free}",
        "host=127.0.0.1 port={port} user=postgres password=known",  # of another system
    ],
)
def test_where_nobody_listens_or_another_system_does_there_is_no_doubt(
    by_password: LocalCluster, tmp_path: Path, source: str
) -> None:
    place = source.format(port=by_password.port, free=free_port(), folder=tmp_path)
    (warning,) = doubts_about(place, tmp_path)
    assert warning.startswith("the dsn of main leads to this machine alone (")


@pytest.mark.parametrize(
    ("code", "doubtful"),
    [("NONAME", False), ("NODATA", False), ("AGAIN", True), ("FAIL", True)],
)
@pytest.mark.parametrize("others", ["", "127.0.0.1,"])
def test_only_a_name_that_leads_nowhere_is_gone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, doubtful: bool, others: str
) -> None:
    """Beside another host, nobody says why the name led nowhere: that is a doubt as well."""
    asked = socket.getaddrinfo

    def fails(host: str, *given: Any, **options: Any) -> Any:
        if host != "old.example":
            return asked(host, *given, **options)
        error = getattr(socket, f"EAI_{code}")
        raise socket.gaierror(error, "as a resolver of another system says it")

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    found = doubts_about(f"host={others}old.example port={free_port()}", tmp_path)
    assert ["could not be asked whether it is the old one" in each for each in found] == (
        [True] if doubtful or others else []
    )


def test_its_own_server_that_lets_nobody_in_is_no_doubt(by_password: LocalCluster, tmp_path: Path) -> None:
    """As when the promotion is gone on with, and the rules that let the role in were held back."""
    source = f"host=127.0.0.1 port={by_password.port} user=postgres password=wrong"
    (doubt, _) = doubts_about(source, tmp_path)
    assert "could not be asked" in doubt
    (warning,) = doubts_about(source, by_password.data)
    assert "leads to this machine alone" in warning


def test_where_a_service_file_knows_what_the_dsn_does_not_a_server_is_nobodys_own(
    by_password: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "services"
    file.write_text(f"[old]\nhost=127.0.0.1\nport={by_password.port}\nuser=postgres\npassword=wrong\n")
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    monkeypatch.setenv("PGSERVICE", "old")
    (doubt,) = doubts_about("dbname=postgres", by_password.data)
    assert "could not be asked" in doubt
    file.write_text(f"[old]\nhost=127.0.0.1\nport={free_port()}\nuser=postgres\n")
    assert doubts_about("dbname=postgres", by_password.data) == []


class dying_at:  # noqa: N801 - reads as the verb that it is
    """Dies, or fails, when a line with these words is said."""

    def __init__(self, words: str, error: BaseException | None = None) -> None:
        self.words, self.error = words, error or Died()

    def __call__(self, line: str) -> None:
        if self.words in line:
            raise self.error
