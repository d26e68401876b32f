"""Recoveries from chains of base backups: what they give, and links that are damaged or gone."""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backup_pipeline import process
from backup_pipeline.actions import bring, recover
from backup_pipeline.actions.recovery_place import workplace
from backup_pipeline.actions.recovery_plan import RecoverRequest
from backup_pipeline.actions.unpack import unpack
from backup_pipeline.domain.backup import ObjectRole
from backup_pipeline.domain.base_backup import BaseManifest, base_to_json
from backup_pipeline.domain.base_chain import by_id, chain_of
from backup_pipeline.domain.layout import base_prefix, catalog_key
from backup_pipeline.domain.recovery_target import LATEST, parse_target
from backup_pipeline.engines.postgres import combine
from backup_pipeline.engines.postgres.cluster import LocalCluster, server_identity
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.unpack import Places, plan_places
from backup_pipeline.errors import Corrupt, Refused, ToolError
from backup_pipeline.process import Command
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import Store, read_all
from backup_pipeline_tests.actions.box import Said, execute, now
from backup_pipeline_tests.actions.chains import bases, fail, tablespace
from backup_pipeline_tests.actions.cluster_box import give
from backup_pipeline_tests.actions.protected_box import NAME
from backup_pipeline_tests.actions.recovery_box import RecoveryBox, a_recovery_box, started
from backup_pipeline_tests.servers import postgres as servers

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
    return box.copy_of_store(tmp_path / "copy")


@pytest.fixture(autouse=True)
def nothing_left(box: RecoveryBox) -> Iterator[None]:
    yield
    left = [path.name for path in box.folder.iterdir()]
    for name in left:
        shutil.rmtree(box.folder / name)
    assert set(left) <= {"recovered", "recovered.tablespaces"}


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
    request = RecoverRequest(LATEST, box.folder / "recovered")
    lines = "\n".join(recover.plan(box.protected(copy), request, report=box.said).lines)
    assert f"begins with: {two.id}" in lines
    assert f"is combined with {whole.id} and {one.id}" in lines
    copy.delete([base_prefix(one.id) + "base.tar.zst"])
    lines = "\n".join(recover.plan(box.protected(copy), request, report=box.said).lines)
    assert f"begins with: {whole.id}" in lines
    assert "combined" not in lines
    assert f"note: {two.id} is passed over: {one.id}: its object" in lines


def test_one_whose_drill_failed_is_begun_with_only_for_want_of_another_or_to_try_it(
    box: RecoveryBox, copy: DirectoryStore
) -> None:
    first, whole, one, two = bases(copy)

    def plan(**asked: Any) -> str:
        request = RecoverRequest(LATEST, box.folder / "recovered", **asked)
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
    request = RecoverRequest(LATEST, box.folder / "recovered")
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
