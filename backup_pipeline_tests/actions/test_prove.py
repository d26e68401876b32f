"""Proofs on real servers: that a good backup is proven, and that nothing else ever is."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
from psycopg import sql

from backup_pipeline.actions import backups, prove, restore, setup
from backup_pipeline.config import Secret
from backup_pipeline.domain.backup import Backup, Manifest, Verdict
from backup_pipeline.domain.layout import catalog_key, data_prefix
from backup_pipeline.engines.postgres import cluster, load
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.errors import BackupNotFound, Refused, ServerError, StoreError
from backup_pipeline.storage import catalog
from backup_pipeline_tests.actions.box import Box, Meddling, now, stored
from backup_pipeline_tests.actions.proving import daily, record, run, weekly


def test_a_good_backup_is_proven_and_the_verdict_is_recorded(taken: Box) -> None:
    backup = daily(taken)
    assert backup.verdict is Verdict.PROVEN
    assert backup.proof is not None
    said = "\n".join(backup.proof.checked)
    for fact in (
        "3 objects in the store, every byte as it was written",
        "restored into PostgreSQL 17",
        "2 tables, 1,100 rows equal row for row",
        "critical table public.customer: 100 rows",
        "newest data: public.customer.added 2026-01-05 04:00:00+00",
        "1 large object, 4 B equal byte for byte",
        "3 sequences where the dump set them",
        "1 setting and grants equal",
    ):
        assert fact in said
    assert not backup.proof.differences
    assert backup.proof.restore_s > 0
    assert backup.proof.compare_s > 0
    assert f"{backup.id} is proven" in "\n".join(taken.said.lines)


def test_nothing_of_a_proof_stays_on_a_server_that_was_named(taken: Box, other: LocalCluster) -> None:
    with contextlib.closing(connect(other.endpoint())) as session:
        query = "SELECT datname FROM pg_database WHERE datname LIKE 'backup_scratch%'"
        assert session.execute(query.encode()).fetchall() == []
        roles = session.execute("SELECT FROM pg_roles WHERE rolname IN (%s, %s)", [taken.owner, taken.reader])
        assert roles.fetchall() == []


def test_proofs_beside_each_other_on_one_server_do_not_meet(proven: Box, other: LocalCluster) -> None:
    with ThreadPoolExecutor(2) as pool:  # both need the same owner and reader
        proofs = list(pool.map(partial(run, proven), (daily(proven), weekly(proven))))
    assert [proof.verdict for proof in proofs] == [Verdict.PROVEN, Verdict.PROVEN]
    assert not [note for proof in proofs for note in proof.notes if note.startswith("left")]
    test_nothing_of_a_proof_stays_on_a_server_that_was_named(proven, other)


def test_a_network_that_could_not_be_cut_off_is_said(proven: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_args: object, network: bool = True, **_options: object) -> bool:
        return network

    monkeypatch.setattr(cluster, "runs_as", forbidden)
    alone = replace(proven.protected, scratch=replace(proven.protected.scratch, dsn=None))
    proof = prove.prove(alone, weekly(proven).id, clock=now, report=proven.said)
    assert proof.verdict is Verdict.PROVEN
    assert any("was not cut off from the network" in note for note in proof.notes)


def test_a_cluster_of_our_own_is_made_where_no_server_is_named(proven: Box) -> None:
    backup = weekly(proven)
    alone = replace(proven.protected, scratch=replace(proven.protected.scratch, dsn=None))
    assert prove.prove(alone, backup.id, clock=now, report=proven.said).verdict is Verdict.PROVEN
    assert weekly(proven).verdict is Verdict.PROVEN


def test_numbers_of_dropped_objects_are_numbers_in_a_cluster_of_our_own(box: Box) -> None:
    box.execute(
        "CREATE TABLE public.audit AS SELECT g::oid::regclass AS subject FROM generate_series(16384, 18000) g"
        " WHERE NOT EXISTS (SELECT FROM pg_class WHERE oid = g)"
    )
    backup = box.take()
    alone = replace(box.protected, scratch=replace(box.protected.scratch, dsn=None))
    found = prove.prove(alone, backup.id, clock=now, report=box.said)
    assert found.differences == ()
    assert found.verdict is Verdict.PROVEN


def test_rows_that_were_only_counted_prove_nothing(box: Box) -> None:
    protected = box.configured(proof="counts")
    backup = box.take(protected=protected)
    found = prove.prove(protected, backup.id, clock=now, report=box.said)
    assert found.verdict is Verdict.RESTORED
    assert "their contents were not compared" in "\n".join(found.checked)
    assert catalog.load(box.store, backup.id).verdict is Verdict.RESTORED
    with pytest.raises(BackupNotFound, match="proven"):
        restore.plan(protected, restore.RestoreRequest(), clock=now)


def test_what_looks_odd_is_said_beside_the_verdict(box: Box) -> None:
    protected = box.configured(critical_tables=("public.orders", "public.parted", "public.dated"))
    box.execute(
        "CREATE TABLE public.parted (n int) PARTITION BY RANGE (n);"
        "CREATE TABLE public.part PARTITION OF public.parted FOR VALUES FROM (0) TO (10);"
        "INSERT INTO public.parted VALUES (1), (2);"
        "CREATE TABLE public.dated (at date);"
        "CREATE TABLE public.bulk AS SELECT sha512(n::text::bytea) AS c FROM generate_series(1, 5000) n"
    )
    for _ in range(3):
        box.take(protected=protected)
    box.execute("TRUNCATE public.orders, public.bulk")
    backup = box.take(protected=protected)
    proof = prove.prove(protected, backup.id, clock=now, report=box.said)
    assert proof.verdict is Verdict.PROVEN, proof.differences
    assert {"critical table public.parted: 2 rows", "critical table public.dated: 0 rows"} < set(
        proof.checked
    )
    said = "\n".join(box.said.lines)
    assert "note: critical table public.orders was empty in the source: is that meant?" in said
    assert "note: the dump is much smaller than usual: " in said


def test_an_encoding_that_python_does_not_know_is_provable(box: Box) -> None:
    name = f"{box.endpoint.database}_tw"  # dropped with the box
    box.execute(f"CREATE DATABASE \"{name}\" TEMPLATE template0 ENCODING 'EUC_TW' LOCALE 'C'", "postgres")
    box.execute('CREATE TABLE public."中" (id serial)', name)
    protected = box.configured(dsn=Secret(box.cluster.endpoint(name).dsn), critical_tables=())
    backup = box.take(protected=protected)
    found = prove.prove(protected, backup.id, clock=now, report=box.said)
    assert found.differences == ()
    assert found.verdict is Verdict.PROVEN


# --- a proof can fail ----------------------------------------------------------------------

CHANGES: dict[str, tuple[str, str]] = {
    # what is done to the restored copy before it is compared: how it must be named
    "one value": (
        "UPDATE public.orders SET price = price + 0.01 WHERE id = 500",
        "table public.orders: 1,000 rows as expected, but their content differs",
    ),
    "two values swapped": (
        "UPDATE public.customer c SET name = o.name FROM public.customer o"
        " WHERE (c.id, o.id) IN ((7, 9), (9, 7))",
        "table public.customer: 100 rows as expected, but their content differs",
    ),
    "a row too few": (
        "DELETE FROM public.orders WHERE id = 1",
        "table public.orders: expected 1,000 rows, found 999",
    ),
    "a row twice": (
        "INSERT INTO public.orders (customer, item, price) SELECT customer, item, price"
        " FROM public.orders WHERE id = 1",
        "table public.orders: expected 1,000 rows, found 1,001",
    ),
    "the newest row": (
        "UPDATE public.customer SET added = '2020-01-01Z' WHERE added = (SELECT max(added)"
        " FROM public.customer)",
        "newest public.customer.added: expected 2026-01-05 04:00:00+00, found 2026-01-05 03:00:00+00",
    ),
    "a table more": ("CREATE TABLE public.more ()", "table public.more: not in the source"),
    "a table less": (
        "DROP TABLE public.orders CASCADE",
        "table public.orders: expected 1,000 rows, found no such table",
    ),
    "a sequence": ("SELECT setval('public.tickets', 4712)", "sequence public.tickets: expected 4,711"),
    "a grant": ("REVOKE SELECT ON public.customer FROM {reader}", "acl public.TABLE customer"),
    "a grant more": ("GRANT INSERT ON public.customer TO {reader}", "acl public.TABLE customer"),
    "an owner": ("ALTER TABLE public.customer OWNER TO {reader}", "customer"),
    "a constraint": ("ALTER TABLE public.customer DROP CONSTRAINT named", "table public.customer"),
    "a foreign key": (
        "ALTER TABLE public.orders DROP CONSTRAINT of_customer",
        "fk constraint public.orders of_customer: not found",
    ),
    "a constraint not valid": (
        "ALTER TABLE public.orders DROP CONSTRAINT of_customer, ADD CONSTRAINT of_customer"
        " FOREIGN KEY (customer) REFERENCES public.customer NOT VALID",
        "of_customer",
    ),
    "an index": ("DROP INDEX public.orders_item", "index public.orders_item: not found"),
    "a default": ("ALTER TABLE public.orders ALTER item SET DEFAULT ''", "public.orders"),
    "a view": ("CREATE OR REPLACE VIEW public.dear AS SELECT id FROM public.orders", "view public.dear"),
    "a function": (
        "CREATE OR REPLACE FUNCTION public.twice(n int) RETURNS int LANGUAGE sql IMMUTABLE RETURN n * 3",
        "function public.twice(integer)",
    ),
    "a database setting": (
        "ALTER DATABASE {database} SET work_mem = '9MB'",
        "the database's setting work_mem: its value differs",
    ),
    "a database grant": ("GRANT CREATE ON DATABASE {database} TO {reader}", "the database's grants"),
    "a database's owner": ("ALTER DATABASE {database} OWNER TO {reader}", "the database's owner"),
    "a database's comment": ("COMMENT ON DATABASE {database} IS NULL", "the database's comment"),
    "a large object": (
        "SELECT lo_put(4242, 0, '\\x00')",
        "large object 4242: 4 bytes as expected, but their content differs",
    ),
    "a large object less": ("SELECT lo_unlink(4242)", "large object 4242: expected 4 B, found none"),
    "a large object's grant": ("GRANT SELECT ON LARGE OBJECT 4242 TO {reader}", "large object 4242"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_proof_finds_and_names(proven: Box, tampered: Callable[[str], None], what: str) -> None:
    statement, named = CHANGES[what]
    reader = sql.Identifier(proven.reader).as_string()
    tampered(statement.replace("{reader}", reader))
    found = run(proven, daily(proven))
    assert found.verdict is Verdict.FAILED
    assert named in "\n".join(found.differences)
    assert daily(proven).verdict is Verdict.FAILED  # also where it was proven before
    assert f"DIFFERENT: {found.differences[0]}" in "\n".join(proven.said.lines)


def test_a_failed_backup_is_not_restored_unless_accepted(
    proven: Box, tampered: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    tampered("DELETE FROM public.orders WHERE id = 1")
    backup = daily(proven)
    run(proven, backup)
    monkeypatch.undo()
    with pytest.raises(Refused, match="expected 1,000 rows, found 999"):
        restore.plan(proven.protected, restore.RestoreRequest(str(backup.id)), clock=now)
    asked = restore.RestoreRequest(str(backup.id), accept_failed=True)
    plan = restore.plan(proven.protected, asked, clock=now)
    assert "expected 1,000 rows, found 999" in "\n".join(plan.lines)
    assert run(proven, backup).verdict is Verdict.PROVEN  # the backup was good; only the copy was not


# --- not provable, and not the backup's fault ----------------------------------------------


def publish_as(box: Box, changed: Manifest) -> Backup:
    """The same dump under another id, told of by another manifest."""
    base = record(daily(box))
    new = replace(changed, id=replace(base.id, stamp=f"{base.id.stamp[:16]}-abcdef"))
    prefix = data_prefix(new.id, new.tier)
    objects = tuple(replace(item, key=prefix + item.name) for item in base.objects)
    for old, item in zip(base.objects, objects, strict=True):
        box.store.copy(old.key, item.key)
    return catalog.publish(box.store, replace(new, objects=objects))


@pytest.mark.parametrize(
    ("what", "named"),
    [("extension", "no_such_extension"), ("server", "18"), ("client", "99"), ("locale", "de_XX.ISO-8859-1")],
)
def test_what_is_missing_here_makes_it_not_provable(proven: Box, what: str, named: str) -> None:
    base = record(daily(proven))
    locale = "de_XX.ISO-8859-1"
    latin = replace(base.source.database, encoding="LATIN1", collate=locale, ctype=locale)
    source = {
        "extension": replace(base.source, extensions=(("no_such_extension", "1.0"),)),
        "server": replace(base.source, server_version=180000),
        "client": replace(base.source, client_version=990000),
        "locale": replace(base.source, database=latin),  # of another encoding than the server's databases
    }[what]
    backup = publish_as(proven, replace(base, source=source))
    found = run(proven, backup)
    assert found.verdict is Verdict.NOT_PROVABLE
    assert named in "\n".join(found.differences)
    assert "what to do: " in found.differences[-1]
    assert catalog.load(proven.store, backup.id).verdict is Verdict.NOT_PROVABLE


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("lc_monetary=xx_XX.UTF-8", 'invalid value for parameter "lc_monetary"'),
        ('session_preload_libraries="no_such_library"', 'could not access file "no_such_library"'),
    ],
)
def test_a_setting_that_this_server_cannot_take_is_not_provable_before_the_load(
    proven: Box, monkeypatch: pytest.MonkeyPatch, setting: str, named: str, own: bool
) -> None:
    base = record(daily(proven))
    database = replace(base.source.database, settings=(("", setting), ("", "work_mem=8MB")))
    backup = publish_as(proven, replace(base, source=replace(base.source, database=database)))

    def loaded(*_args: object, **_options: object) -> None:
        raise AssertionError("the load was begun")

    monkeypatch.setattr(load, "load", loaded)
    place = replace(proven.protected.scratch, dsn=None) if own else proven.protected.scratch
    protected = replace(proven.protected, scratch=place)
    found = prove.prove(protected, backup.id, clock=now, report=proven.said)
    assert found.verdict is Verdict.NOT_PROVABLE
    assert named in "\n".join(found.differences)
    assert "server runs on this machine" not in "\n".join(found.differences)
    assert "another server" in found.differences[-1]
    assert not found.notes


def test_the_source_itself_is_no_scratch_server(proven: Box) -> None:
    scratch = replace(proven.protected.scratch, dsn=Secret(proven.cluster.endpoint().dsn))
    itself = replace(proven.protected, scratch=scratch)
    found = prove.prove(itself, weekly(proven).id, clock=now, report=proven.said)
    assert found.verdict is Verdict.NOT_PROVABLE
    assert "is the cluster that the backup was taken from" in found.differences[0]
    (said,) = (setup.in_words(item) for item in setup.check(itself) if item.name == "proof")
    assert said.startswith("warning")
    assert "is the cluster that backups are taken from" in said


def test_what_goes_wrong_around_a_proof_records_no_verdict(proven: Box) -> None:
    before = stored(proven.store)
    gone = replace(proven.protected.scratch, dsn=Secret("host=/nonexistent dbname=postgres"))
    with pytest.raises(ServerError):
        prove.prove(replace(proven.protected, scratch=gone), weekly(proven).id, clock=now, report=proven.said)

    class Failing(Meddling):
        def read(self, key: str) -> Iterator[bytes]:
            if key.endswith("database.dump"):
                raise StoreError("the store does not answer")
            return super().read(key)

    with pytest.raises(StoreError, match="does not answer"):
        prove.prove(
            proven.on(Failing(proven.store, "never", lambda: None)),
            weekly(proven).id,
            clock=now,
            report=proven.said,
        )
    assert stored(proven.store) == before


def test_not_provable_does_not_hide_that_it_was_proven(proven: Box) -> None:
    backup = daily(proven)
    itself = replace(
        proven.protected,
        scratch=replace(proven.protected.scratch, dsn=Secret(proven.cluster.endpoint().dsn)),
    )
    assert prove.prove(itself, backup.id, clock=now, report=proven.said).verdict is Verdict.NOT_PROVABLE
    found = daily(proven)
    assert found.verdict is Verdict.PROVEN
    assert found.last_attempt is not None
    assert found.last_attempt.verdict is Verdict.NOT_PROVABLE


def test_a_backup_that_is_gone_is_not_proven(proven: Box) -> None:
    backup = daily(proven)
    proven.store.delete([catalog_key(backup.id)])
    with pytest.raises(BackupNotFound):
        run(proven, backup)
    assert backups.listing(proven.protected).backups == (weekly(proven),)
