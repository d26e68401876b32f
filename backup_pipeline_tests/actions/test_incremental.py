"""Incremental base backups: small, never listed without what they build on, and a recovery from a chain."""

import contextlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from backup_pipeline import process
from backup_pipeline.actions import bring, recover
from backup_pipeline.actions.recovery_place import workplace
from backup_pipeline.actions.unpack import unpack
from backup_pipeline.domain.backup import BackupId, ObjectRole, Proof, Verdict
from backup_pipeline.domain.base_backup import BaseManifest, base_to_json
from backup_pipeline.domain.base_chain import by_id, chain_of
from backup_pipeline.domain.layout import base_prefix, catalog_key
from backup_pipeline.domain.recovery_target import LATEST, parse_target
from backup_pipeline.engines.postgres import base_backup as engine
from backup_pipeline.engines.postgres import combine
from backup_pipeline.engines.postgres.cluster import LocalCluster, server_identity
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.scratch import private_folder
from backup_pipeline.engines.postgres.source_cluster import server_clock
from backup_pipeline.engines.postgres.unpack import Places, plan_places
from backup_pipeline.errors import BackupNotFound, Corrupt, Refused, ToolError
from backup_pipeline.process import Command
from backup_pipeline.storage import base_backups
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.s3 import S3Store
from backup_pipeline.storage.store import Store, read_all
from backup_pipeline_tests.actions.box import Meddling, Said, ask, execute, now
from backup_pipeline_tests.actions.cluster_box import ClusterBox, a_cluster, give
from backup_pipeline_tests.actions.cluster_box import started as started_with_wal
from backup_pipeline_tests.actions.protected_box import NAME
from backup_pipeline_tests.actions.recovery_box import RecoveryBox, a_recovery_box, started
from backup_pipeline_tests.background import meanwhile
from backup_pipeline_tests.servers import postgres as servers
from backup_pipeline_tests.servers.s3 import rclone_s3
from backup_pipeline_tests.storage.effects import CountingStore, Died, DyingStore
from backup_pipeline_tests.waiting import wait_until

BEFORE = """
CREATE TABLE public.big AS
  SELECT g, md5(random()::text) AS a, md5(random()::text) || md5(random()::text) || md5(random()::text) AS b
  FROM generate_series(1, 100000) g;
CREATE TABLE public.emptied AS SELECT g FROM generate_series(1, 5000) g;
CREATE TABLE public.shortened AS SELECT g, repeat('x', 500) AS t FROM generate_series(1, 5000) g;
CREATE TABLE public.gone AS SELECT g FROM generate_series(1, 5000) g;
CREATE TABLE public.moved TABLESPACE fast AS SELECT g, repeat('y', 500) AS t FROM generate_series(1, 5000) g
"""
BETWEEN = (
    """
    UPDATE public.big SET a = 'changed' WHERE g % 10000 = 7;
    TRUNCATE public.emptied;
    DROP TABLE public.gone;
    DELETE FROM public.shortened WHERE g > 100;
    CREATE TABLE public.made AS SELECT g FROM generate_series(1, 3000) g;
    UPDATE public.moved SET t = 'z' WHERE g < 20
    """,
    """
    UPDATE public.big SET a = 'again' WHERE g % 20000 = 7;
    INSERT INTO public.emptied SELECT g FROM generate_series(1, 100) g;
    INSERT INTO public.made SELECT g FROM generate_series(1, 3000) g;
    CREATE TABLE public.later AS SELECT g FROM generate_series(1, 10) g
    """,
)


def tablespace(box: RecoveryBox, name: str) -> None:
    folder = box.folder.parent / name
    folder.mkdir(mode=0o700)
    execute(box.cluster.endpoint(), f"CREATE TABLESPACE {name} LOCATION '{give(folder)}'")


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecoveryBox]:
    """Four base backups: a whole one, another, and two that build on that. All kinds of changes between."""
    store = DirectoryStore(tmp_path_factory.mktemp("store"))
    with a_recovery_box(servers.bin_dir_17(), store, summarize_wal="on") as made:
        endpoint = made.cluster.endpoint()
        tablespace(made, "fast")
        execute(endpoint, BEFORE)
        made.commit(1)
        made.take()
        made.commit(1)
        made.take()
        made.commit(1)
        execute(endpoint, BETWEEN[0])
        execute(endpoint, "VACUUM public.shortened")
        execute(endpoint, "CREATE DATABASE another")
        execute(made.cluster.endpoint("another"), "CREATE TABLE public.here AS SELECT 4711 AS n")
        made.take(incremental=True)
        made.commit(1)
        execute(endpoint, BETWEEN[1])
        execute(made.cluster.endpoint("another"), "INSERT INTO public.here VALUES (42)")
        made.take(incremental=True)
        made.commit(2)
        made.switch()
        yield made


@pytest.fixture
def copy(box: RecoveryBox, tmp_path: Path) -> DirectoryStore:
    """The store once more, to be damaged."""
    assert isinstance(box.store, DirectoryStore)
    shutil.copytree(box.store.root, tmp_path / "copy")
    return DirectoryStore(tmp_path / "copy")


@pytest.fixture(autouse=True)
def nothing_left(box: RecoveryBox) -> Iterator[None]:
    yield
    left = [path.name for path in box.folder.iterdir()]
    for name in left:
        shutil.rmtree(box.folder / name)
    assert set(left) <= {"recovered", "recovered.tablespaces"}


def bases(store: Store) -> list[BaseManifest]:
    """The base backups, oldest first."""
    found = base_backups.list_base_backups(store, NAME, fresh=True)
    return sorted((each.manifest for each in found.backups), key=lambda each: each.end.lsn)


def dump(bin_dir: str, endpoint: Endpoint) -> list[str]:
    """Both databases as SQL, as they are."""
    said = []
    for database in ("postgres", "another"):
        dsn = replace(endpoint, dsn=endpoint.dsn.replace("dbname=postgres", f"dbname={database}")).dsn
        argv = (f"{bin_dir}/pg_dump", "--restrict-key=test", f"--dbname={dsn}")
        said.append(process.run(Command(argv), timeout_s=60).stdout)
    return said


def test_one_holds_what_has_changed_and_names_its_parent(box: RecoveryBox) -> None:
    _first, whole, one, two = bases(box.store)
    assert (whole.parent, one.parent, two.parent) == (None, whole.id, one.id)
    assert two.source_bytes < 0.2 * whole.source_bytes
    for link in (one, two):
        assert link.size_bytes < 0.2 * whole.size_bytes
        assert abs(link.combined_bytes - whole.source_bytes) < 0.3 * whole.source_bytes
    assert any(f"what has changed since {one.id}, link 3 of its chain" in line for line in box.said.lines)


def test_a_chain_of_three_gives_what_the_source_holds(box: RecoveryBox) -> None:
    result = box.recover(LATEST)
    assert box.numbers() == [1, 2, 3, 4, 5, 6]
    with started(box.cluster.bin_dir, box.folder / "recovered") as recovered:
        found, wanted = (dump(box.cluster.bin_dir, each) for each in (recovered, box.cluster.endpoint()))
        assert [text.count("\n") for text in found] == [text.count("\n") for text in wanted]
        assert found == wanted
    assert result.recovered.timeline == 2
    beside = {path.name for path in (box.folder / "recovered.tablespaces").iterdir()}
    assert len(beside) == 1


def test_a_moment_between_two_links_is_reached_by_the_earlier(box: RecoveryBox) -> None:
    box.recover(parse_target(box.ledger[3].at.isoformat()))
    assert box.numbers() == [1, 2, 3, 4]
    assert any("combined 2 base backups" in line for line in box.said.lines[-20:])


def test_what_is_combined_is_checked_as_pg_verifybackup_does(box: RecoveryBox) -> None:
    with combined(box) as (output, verify):
        (place,) = output.tablespaces.values()
        file = max(
            (each for each in place.rglob("*") if each.is_file()), key=lambda each: each.stat().st_size
        )
        argv = (
            f"{box.cluster.bin_dir}/pg_verifybackup",
            "--no-parse-wal",
            "--exit-on-error",
            str(output.data),
        )
        data = file.read_bytes()

        def is_refused(said: str) -> None:
            with pytest.raises(Corrupt, match=said):
                verify()
            assert process.run(Command(argv), timeout_s=60, check=False).returncode == 1

        file.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
        is_refused("is not as it was combined")
        file.unlink()
        is_refused("1 files of what was combined are missing, 'pg_tblspc/")
        file.write_bytes(data)
        (output.data / "base" / "planted").write_text("1")
        is_refused("base/planted is not as it was combined")
        (output.data / "base" / "planted").unlink()
        assert "successfully verified" in process.run(Command(argv), timeout_s=60).stdout
        assert verify() > 10_000_000
        assert not (output.data / "backup_manifest").exists()


def flip(store: Store, link: BaseManifest) -> None:
    key = base_prefix(link.id) + "base.tar.zst"
    data = bytearray(read_all(store, key))
    data[len(data) // 2] ^= 1
    store.put(key, [bytes(data)])


@pytest.mark.parametrize("number", [1, 2, 3])
def test_damage_in_a_link_is_found_and_the_one_that_does_without_it_named(
    box: RecoveryBox, copy: DirectoryStore, number: int
) -> None:
    found = bases(copy)
    flip(copy, found[number])
    with pytest.raises(Corrupt) as caught:
        box.recover(LATEST, store=copy)
    assert caught.value.detail["damaged base backup"] == str(found[number].id)
    assert list(box.folder.iterdir()) == []
    instead = found[number - 1].id
    assert f"--base {instead}" in caught.value.hint
    if number == 2:
        box.recover(LATEST, store=copy, base=instead)
        assert box.numbers() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("what", ["record", "object", "truncated"])
def test_a_link_that_is_not_there_is_passed_over(box: RecoveryBox, copy: DirectoryStore, what: str) -> None:
    _first, whole, one, two = bases(copy)
    key = base_prefix(one.id) + "base.tar.zst"
    if what == "record":
        copy.delete([catalog_key(one.id)])
    elif what == "object":
        copy.delete([key])
    else:
        copy.put(key, [read_all(copy, key)[:-1]])
    with pytest.raises(Refused, match=f"{two.id} cannot be begun with: {one.id}") as caught:
        box.recover(LATEST, store=copy, base=two.id)
    assert f"--base {whole.id}" in caught.value.hint
    assert list(box.folder.iterdir()) == []
    if what == "object":
        box.recover(LATEST, store=copy)
        assert box.numbers() == [1, 2, 3, 4, 5, 6]


def test_the_plan_names_the_chain_and_what_was_passed_over(box: RecoveryBox, copy: DirectoryStore) -> None:
    _first, whole, one, two = bases(copy)
    request = recover.RecoverRequest(LATEST, box.folder / "recovered")
    lines = "\n".join(recover.plan(box.protected(copy), request, report=box.said).lines)
    assert f"begins with: {two.id}" in lines
    assert f"is combined with {whole.id} and {one.id}" in lines
    copy.delete([base_prefix(one.id) + "base.tar.zst"])
    lines = "\n".join(recover.plan(box.protected(copy), request, report=box.said).lines)
    assert f"begins with: {whole.id}" in lines
    assert "combined" not in lines
    assert f"note: {two.id} is passed over: {one.id}: its object" in lines


def fail(store: Store, backup: BackupId) -> None:
    """Record that a drill of it failed."""
    proof = Proof(Verdict.FAILED, now(), 1.0, 1.0, (), ("an index is spoiled",), (), "test")
    base_backups.record_proof(store, backup, proof, comparable=True)


def test_one_whose_drill_failed_is_begun_with_only_for_want_of_another_or_to_try_it(
    box: RecoveryBox, copy: DirectoryStore
) -> None:
    first, whole, one, two = bases(copy)

    def plan(**asked: Any) -> str:
        request = recover.RecoverRequest(LATEST, box.folder / "recovered", **asked)
        return "\n".join(recover.plan(box.protected(copy), request, report=box.said).lines)

    fail(copy, two.id)
    found = f"a drill of {two.id} failed: an index is spoiled"
    assert f"begins with: {one.id}" in plan()
    assert f"note: {two.id} is passed over: {found}" in plan()
    assert f"warning: {found}" in plan(base=two.id)
    assert f"begins with: {two.id}" in plan(try_failed=True)
    fail(copy, whole.id)
    assert f"begins with: {first.id}" in plan()
    assert f"warning: a drill of {whole.id} failed" in plan(base=one.id)
    fail(copy, first.id)
    last_resort = plan()
    assert f"begins with: {two.id}" in last_resort
    assert f"warning: a drill of {whole.id} failed: an index is spoiled" in last_resort


def test_links_that_do_not_belong_together_are_told_apart(box: RecoveryBox, copy: DirectoryStore) -> None:
    """A record that names another parent than it was taken against; the seal is right."""
    first, whole, one, _two = bases(copy)
    assert one.parent == whole.id
    copy.put(catalog_key(one.id), [base_to_json(replace(one, parent=first.id))])
    with pytest.raises(
        ToolError, match=r"pg_combinebackup ended with exit code 1: .* but expected"
    ) as caught:
        box.recover(LATEST, store=copy)
    assert "--base" in caught.value.hint
    assert list(box.folder.iterdir()) == []


def test_killed_while_it_combines_it_leaves_nothing_that_the_next_does_not_collect(
    box: RecoveryBox, copy: DirectoryStore
) -> None:
    program = (sys.executable, "-m", "backup_pipeline.cli", "--store", f"file://{copy.root}")
    into = str(box.folder / "recovered")
    command = Command((*program, "recover", NAME, "--to", "latest", "--into", into))
    two = bases(copy)[-1].id
    with process.start(command, stderr=subprocess.PIPE) as child:
        assert child.stderr is not None
        assert any(f"unpacked {two}".encode() in line for line in child.stderr)  # the last of its links
        child.kill()
    (left,) = box.folder.iterdir()
    assert left.name.startswith("backup-recovery-")
    assert len([path for path in left.iterdir() if path.name.startswith("link")]) >= 3
    box.recover(LATEST)
    assert {path.name for path in box.folder.iterdir()} == {"recovered", "recovered.tablespaces"}


def test_too_little_space_for_all_of_it_is_refused_first(box: RecoveryBox) -> None:
    request = recover.RecoverRequest(LATEST, box.folder / "recovered")
    planned = recover.plan(box.protected(), request, report=box.said)
    huge = replace(planned.manifest, cluster_bytes=1 << 60)
    others = [each for each in planned.facts.manifests if each.id != huge.id]
    facts = replace(planned.facts, manifests=(huge, *others))
    before = len(box.said.lines)
    with pytest.raises(Refused, match=r"too little space for .* all that it builds on"):
        recover.carry_out(box.protected(), replace(planned, facts=facts), clock=now, report=box.said)
    assert not any("unpacked" in line for line in box.said.lines[before:])
    assert bring.chain_lines(facts.chain(huge.id))


@contextlib.contextmanager
def combined(box: RecoveryBox) -> Iterator[tuple[Places, Callable[[], int]]]:
    """The newest chain unpacked and combined as a recovery does it, and the check that it makes then."""
    chain = chain_of(bases(box.store)[-1], by_id(bases(box.store)))
    final = plan_places(box.folder / "recovered", chain.last.tablespaces)
    with workplace(chain.last, final, owner=server_identity()) as work:
        links = []
        for number, link in enumerate(chain.links):
            place = work.places_beside(number, link)
            unpack(box.store, link, place, clock=now, report=Said(), owner=work.owner, durable=False)
            (item,) = link.of_role(ObjectRole.FILE_LIST)
            links.append(combine.Link(place, read_all(box.store, item.key)))
        beside = tuple(str(folder) for link in links for folder in link.places.all)
        cluster = LocalCluster(box.cluster.bin_dir, work.folder, confined=True, insists=True, readable=beside)
        cluster.writable = tuple(map(str, work.inside.tablespaces.values()))
        combine.combine(cluster, links, work.inside, size_bytes=chain.last.combined_bytes)
        yield work.inside, lambda: combine.verify(work.inside)


def test_pg_combinebackup_reads_nothing_but_the_links(box: RecoveryBox) -> None:
    """No archive brings a symbolic link; were there one, the program could not follow it."""
    found = bases(box.store)[0]
    outside = box.folder.parent / "outside"
    outside.mkdir(mode=0o700)
    final = plan_places(box.folder / "recovered", found.tablespaces)
    with workplace(found, final, owner=server_identity()) as work:
        place = work.places_beside(0, found)
        unpack(box.store, found, place, clock=now, report=Said(), owner=work.owner, durable=False)
        label = place.data / "backup_label"
        label.rename(outside / "label")
        label.symlink_to(give(outside) / "label")
        (item,) = found.of_role(ObjectRole.FILE_LIST)
        link = combine.Link(place, read_all(box.store, item.key))
        readable = tuple(map(str, place.all))
        cluster = LocalCluster(
            box.cluster.bin_dir, work.folder, confined=True, insists=True, readable=readable
        )
        with pytest.raises(ToolError, match=r"could not open file .*backup_label.*Permission denied"):
            combine.combine(cluster, [link], work.inside, size_bytes=found.combined_bytes)


def small(store: Store, **settings: str) -> contextlib.AbstractContextManager[RecoveryBox]:
    return a_recovery_box(servers.bin_dir_17(), store, **{"summarize_wal": "on", **settings})


def whole_listed(store: Store) -> set[BackupId]:
    """The base backups that are listed; each has all its objects, and so has all that it builds on."""
    found = base_backups.list_base_backups(store, NAME, fresh=True)
    assert not found.unreadable
    known = by_id(each.manifest for each in found.backups)
    for manifest in known.values():
        chain = chain_of(manifest, known)
        assert not chain.broken
        assert not [link for link in chain.links if base_backups.missing_objects(store, link)]
    return set(known)


@pytest.fixture(scope="module")
def taking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecoveryBox]:
    """A small cluster to take base backups of; one is there."""
    with small(DirectoryStore(tmp_path_factory.mktemp("store"))) as made:
        made.commit(1)
        made.take()
        yield made


def test_dying_before_any_effect_lists_nothing_without_its_chain(taking: RecoveryBox) -> None:
    parent = bases(taking.store)[0].id
    counting = CountingStore(taking.store)
    taking.take(store=counting, parent=parent)
    for number in range(1, len(counting.effects) + 1):
        before = whole_listed(taking.store)
        dying = DyingStore(taking.store, before=number)
        with contextlib.suppress(Died):
            taking.take(store=dying, parent=parent)
        assert dying.dead
        done = any(effect.startswith("put_if_absent catalog/") for effect in dying.effects)
        assert len(whole_listed(taking.store) - before) == int(done)
    assert len(base_backups.rebuild(taking.store, NAME)[0]) == 1  # the one whose record's copy was there
    whole_listed(taking.store)


def test_its_parent_is_kept_from_a_prune_meanwhile(taking: RecoveryBox) -> None:
    chain = [taking.take().id, taking.take(incremental=True).id]
    kept = []

    def prune() -> None:
        for each in chain:
            found = base_backups.load(taking.store, each)
            kept.append(base_backups.delete(taking.store, found, clock=now).kept)

    child = taking.take(store=Meddling(taking.store, "base.tar.zst", prune), incremental=True).id
    assert len(kept) == 2
    assert all("parent" in reason for reason in kept)
    assert {*chain, child} <= whole_listed(taking.store)


@pytest.mark.parametrize("number", [0, 1])
def test_one_whose_chain_went_all_the_same_is_not_listed(taking: RecoveryBox, number: int) -> None:
    chain = [taking.take().id, taking.take(incremental=True).id]
    before = {each.id for each in bases(taking.store)}
    unlisted = set(base_backups.unlisted(taking.store, NAME))
    lost = catalog_key(chain[number])
    record = read_all(taking.store, lost)
    store = Meddling(taking.store, "base.tar.zst", lambda: taking.store.delete([lost]))
    with pytest.raises(Refused, match=f"is not listed: {chain[number]}, which .* builds on, is not there"):
        taking.take(store=store, incremental=True)
    assert {each.id for each in bases(taking.store)} == before - {chain[number]}
    assert set(base_backups.unlisted(taking.store, NAME)) == unlisted | {chain[number]}
    taking.store.put(lost, [record])


@contextlib.contextmanager
def on_a_copy(box: RecoveryBox, folder: Path) -> Iterator[DirectoryStore]:
    """The box with a copy of its store, to be damaged."""
    was, shipped = box.store, set(box.shipped)
    assert isinstance(was, DirectoryStore)
    shutil.copytree(was.root, folder, dirs_exist_ok=True)
    box.store = DirectoryStore(folder)
    try:
        yield box.store
    finally:
        box.store, box.shipped = was, shipped


def test_where_none_fits_a_whole_one_is_taken_and_said(taking: RecoveryBox, tmp_path: Path) -> None:
    with on_a_copy(taking, tmp_path) as store:
        for each in bases(store):
            store.delete([base_prefix(each.id) + "base.tar.zst"])
        lines = len(taking.said.lines)
        with pytest.raises(Refused, match=r"cannot be built on: .* its object .* is missing"):
            taking.take(parent=bases(store)[0].id)
        with pytest.raises(BackupNotFound):
            taking.take(parent=BackupId(NAME, "20260101T000000Z-none"))
        taken = base_backups.load(store, taking.take(incremental=True).id).manifest
    assert taken.parent is None
    assert any("whole, though an incremental one was asked for" in note for note in taken.notes)
    said = [line for line in taking.said.lines[lines:] if "A WHOLE BASE BACKUP INSTEAD" in line]
    assert len(said) == 1
    assert "can be built on" in said[0]


def test_one_whose_drill_failed_is_not_built_on(taking: RecoveryBox, tmp_path: Path) -> None:
    with on_a_copy(taking, tmp_path) as store:
        for each in bases(store):
            fail(store, each.id)
        named = bases(store)[0].id
        with pytest.raises(Refused, match=f"cannot be built on: a drill of {named} failed"):
            taking.take(parent=named)
        taken = base_backups.load(store, taking.take(incremental=True).id).manifest
    assert taken.parent is None
    assert any("A WHOLE BASE BACKUP INSTEAD" in line for line in taking.said.lines)
    assert any("a drill of " in note for note in taken.notes)


def test_after_the_clock_was_set_back_a_whole_one_comes_first_and_then_a_chain(
    taking: RecoveryBox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = "backup_pipeline.actions.base_backup.server_clock"
    monkeypatch.setattr(asked, lambda session: server_clock(session) - timedelta(days=1))
    with on_a_copy(taking, tmp_path) as store:
        with pytest.raises(Refused, match="it is dated later than the server's clock"):
            taking.take(parent=bases(store)[-1].id)
        whole = base_backups.load(store, taking.take(incremental=True).id).manifest
        assert whole.parent is None
        assert any("dated later than the server's clock" in note for note in whole.notes)
        assert base_backups.load(store, taking.take(incremental=True).id).manifest.parent == whole.id


def test_a_parent_whose_own_manifest_is_damaged_is_not_built_on(taking: RecoveryBox, tmp_path: Path) -> None:
    with on_a_copy(taking, tmp_path) as store:
        newest = bases(store)[-1].id
        key = base_prefix(newest) + "backup_manifest"
        store.put(key, [read_all(store, key).replace(b"PG_VERSION", b"PG_VERSIOM")])
        with pytest.raises(Corrupt, match="the stored bytes are not those that were written"):
            taking.take(parent=newest)
        assert base_backups.load(store, taking.take(incremental=True).id).manifest.parent is None


def test_an_upload_that_fails_is_taken_away_and_no_whole_one_taken(taking: RecoveryBox) -> None:
    before = whole_listed(taking.store)

    def fail() -> None:
        raise Corrupt("not what it was")

    with pytest.raises(Corrupt):
        taking.take(store=Meddling(taking.store, "base.tar.zst", fail), incremental=True)
    assert whole_listed(taking.store) == before


def test_what_the_server_did_not_summarize_is_refused_or_taken_whole(tmp_path: Path) -> None:
    with small(DirectoryStore(tmp_path), summarize_wal="off") as box:
        box.commit(1)
        first = box.take().id
        counting = CountingStore(box.store)
        with pytest.raises(Refused, match="summarize_wal is off in cluster main") as caught:
            box.take(store=counting, incremental=True)
        assert "ALTER SYSTEM SET summarize_wal = on" in caught.value.hint
        assert not [effect for effect in counting.effects if "probe/" not in effect]
        box.commit(1, switch=True)
        execute(box.cluster.endpoint(), "ALTER SYSTEM SET summarize_wal = on")
        restart_with(box, summarize_wal="on")
        box.commit(1, switch=True)
        # Its checkpoint ends what is summarized, and what was summarized until it began is taken away.
        began = base_backups.load(box.store, box.take().id).manifest.start.lsn
        summarized = f"SELECT bool_or(end_lsn >= '{began}') FROM pg_available_wal_summaries()"
        wait_until(lambda: bool(ask(box.cluster.endpoint(), summarized)))
        for path in (box.cluster.data / "pg_wal" / "summaries").glob("[0-9A-F]*.summary"):
            path.unlink()
        with pytest.raises(engine.NotSinceParent, match="WAL summaries are required") as unknown:
            box.take(parent=first)
        assert "take a whole base backup" in unknown.value.hint
        assert not unknown.value.retryable


def restart_with(box: RecoveryBox, **settings: str) -> None:
    box.cluster.stop()
    box.cluster.settings = {**box.cluster.settings, **settings}
    box.cluster.start()


def test_after_a_promotion_a_whole_one_comes_first_and_then_a_chain(tmp_path: Path) -> None:
    """The new timeline's server has no summaries of the time before; from then on there are chains again."""
    with rclone_s3(tmp_path) as server, small(S3Store(server.store("prefix"))) as box:
        box.commit(1)
        box.take()
        box.commit(3)
        box.switch()
        box.recover(parse_target(box.ledger[-2].at.isoformat()), "second")
        box.go_on_with("second")
        with (box.cluster.data / "pg_hba.conf").open("a") as rules:
            rules.write("local replication all trust\n")
        execute(box.cluster.endpoint(), "SELECT pg_reload_conf()")
        del box.ledger[-1]
        box.commit(1)
        whole = base_backups.load(box.store, box.take(incremental=True).id).manifest
        assert whole.parent is None
        assert whole.end.timeline == 2
        box.commit(1)
        tablespace(box, "fresh")
        execute(box.cluster.endpoint(), "CREATE TABLE public.there TABLESPACE fresh AS SELECT 4711 AS n")
        child = base_backups.load(box.store, box.take(incremental=True).id).manifest
        assert child.parent == whole.id
        box.commit(1)
        box.switch()
        box.recover(LATEST)
        assert box.numbers() == [entry.number for entry in box.ledger]
        with started(box.cluster.bin_dir, box.folder / "recovered") as recovered:
            assert ask(recovered, "SELECT n FROM public.there") == 4711


def test_on_18_a_chain_gives_the_ledger(tmp_path: Path) -> None:
    with a_recovery_box(servers.bin_dir_18(), DirectoryStore(tmp_path), summarize_wal="on") as box:
        box.commit(1)
        box.take()
        for _ in range(2):
            box.commit(1)
            box.take(incremental=True)
        box.commit(1)
        box.switch()
        box.recover(LATEST)
        assert box.numbers() == [1, 2, 3, 4]
    assert any("combined 3 base backups" in line for line in box.said.lines)


def test_older_servers_take_none(tmp_path: Path) -> None:
    with a_cluster(servers.bin_dir_15(), tmp_path / "store") as box:
        with pytest.raises(Refused, match="runs PostgreSQL 15, and incremental base backups need 17"):
            box.take(incremental=True)
        assert not bases(box.store)


def test_from_a_standby(tmp_path: Path) -> None:
    with a_cluster(servers.bin_dir_17(), tmp_path / "store", summarize_wal="on") as primary:
        endpoint = primary.cluster.endpoint()
        execute(
            endpoint,
            "CREATE TABLE public.big AS SELECT g, md5(g::text) AS t FROM generate_series(1, 50000) g",
        )
        whole = primary.take().manifest
        with private_folder() as folder:
            places = plan_places(folder / "data", ())
            unpack(primary.store, whole, places, clock=now, report=Said(), owner=server_identity())
            (folder / "data" / "standby.signal").touch()
            settings = {
                "primary_conninfo": endpoint.dsn.replace("dbname=postgres", ""),
                "summarize_wal": "on",
            }
            with started_with_wal(primary, folder, **settings) as cluster:
                standby = replace(primary, cluster=cluster)
                execute(endpoint, "UPDATE public.big SET t = 'seen' WHERE g = 1; CHECKPOINT")
                seen = "SELECT redo_lsn FROM pg_control_checkpoint()"
                await_equal(standby, str(ask(endpoint, seen)))
                child = switching(primary, standby, whole.id)
        assert child.from_standby
        assert child.parent == whole.id
        assert child.size_bytes < 0.3 * whole.size_bytes


def await_equal(standby: ClusterBox, redo: str) -> None:
    """Until the standby has a restart point at the primary's checkpoint."""

    def is_there() -> bool:
        execute(standby.cluster.endpoint(), "CHECKPOINT")
        return str(ask(standby.cluster.endpoint(), "SELECT redo_lsn FROM pg_control_checkpoint()")) == redo

    wait_until(is_there)


def switching(primary: ClusterBox, standby: ClusterBox, parent: BackupId) -> BaseManifest:
    """One of the standby, while its primary begins new segments."""

    def switch(ended: threading.Event) -> None:
        while not ended.wait(0.2):
            execute(
                primary.cluster.endpoint(), "SELECT pg_logical_emit_message(true, '', ''), pg_switch_wal()"
            )

    with meanwhile(switch):
        return standby.take(parent=parent).manifest
