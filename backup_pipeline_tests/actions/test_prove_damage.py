"""A byte that was changed, anywhere in a backup: found before it is used, and never proven."""

from collections.abc import Callable, Iterator

import pytest

from backup_pipeline.actions import restore
from backup_pipeline.domain.backup import Backup, ObjectRole, Verdict
from backup_pipeline.domain.layout import Beside, catalog_key, copy_key
from backup_pipeline.engines.postgres import load
from backup_pipeline.errors import BackupNotFound, Corrupt, StoreError
from backup_pipeline.storage import catalog, catalog_rebuild
from backup_pipeline.storage.store import read_all
from backup_pipeline_tests.actions.box import Box, databases, now
from backup_pipeline_tests.actions.proving import daily, one, record, run, weekly

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "first byte": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "middle byte": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0x80]) + data[len(data) // 2 + 1 :]
    ),
    "last byte": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "truncated": lambda data: data[:-1],
    "emptied": lambda data: data[:0],
    "extended": lambda data: data + b"\0",
}
OBJECTS = (ObjectRole.DUMP, ObjectRole.GLOBALS, ObjectRole.FINGERPRINT)


def never_proven(box: Box, backup: Backup) -> None:
    """Assert that a proof of what was damaged fails, and that a restore of it touches nothing."""
    before = databases(box.cluster, box.endpoint.database)
    found = run(box, backup)
    assert found.verdict is Verdict.FAILED
    assert "not those that were written" in found.differences[0] or "no object" in found.differences[0]
    assert catalog.load(box.store, backup.id).verdict is Verdict.FAILED
    asked = restore.RestoreRequest(str(backup.id), accept_failed=True)
    with pytest.raises((Corrupt, StoreError)):
        restore.carry_out(
            box.protected, restore.plan(box.protected, asked, clock=now), clock=now, report=box.said
        )
    assert databases(box.cluster, box.endpoint.database) == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_dump_is_found_before_it_is_used(
    proven: Box, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup = daily(proven)
    item = one(backup, ObjectRole.DUMP)
    proven.store.put(item.key, [DAMAGES[damage](read_all(proven.store, item.key))])

    def opened(*_args: object, **_options: object) -> None:
        raise AssertionError("pg_restore was given bytes that nobody had checked")

    monkeypatch.setattr(load, "load", opened)
    never_proven(proven, backup)


@pytest.mark.parametrize("role", OBJECTS[1:])
def test_what_rides_along_is_checked_as_well(proven: Box, role: ObjectRole) -> None:
    backup = daily(proven)
    item = one(backup, role)
    proven.store.put(item.key, [DAMAGES["middle byte"](read_all(proven.store, item.key))])
    found = run(proven, backup)
    assert found.verdict is Verdict.FAILED
    assert item.key in found.differences[0]


@pytest.mark.parametrize("role", OBJECTS)
def test_a_missing_object_fails_the_proof(proven: Box, role: ObjectRole) -> None:
    backup = daily(proven)
    proven.store.delete([one(backup, role).key])
    found = run(proven, backup)
    assert found.verdict is Verdict.FAILED
    assert one(backup, role).key in found.differences[0]


def test_objects_that_were_swapped_are_found(proven: Box) -> None:
    backup, stranger = daily(proven), weekly(proven)
    mine, theirs = (one(item, ObjectRole.DUMP).key for item in (backup, stranger))
    bytes_of = {key: read_all(proven.store, key) for key in (mine, theirs)}
    proven.store.put(mine, [bytes_of[theirs]])
    proven.store.put(theirs, [bytes_of[mine]])
    never_proven(proven, backup)
    assert run(proven, stranger).verdict is Verdict.FAILED


def test_a_file_of_a_directory_dump_is_checked_too(box: Box) -> None:
    backup = box.take(protected=box.configured(jobs=2))
    files = record(backup).of_role(ObjectRole.DUMP)
    one_, other = files[0], files[1]
    bytes_of = [read_all(box.store, item.key) for item in (one_, other)]
    box.store.put(one_.key, [bytes_of[1]])
    box.store.put(other.key, [bytes_of[0]])
    assert run(box, backup).verdict is Verdict.FAILED
    box.store.put(one_.key, [bytes_of[0]])
    box.store.put(other.key, [bytes_of[1]])
    assert run(box, backup).verdict is Verdict.PROVEN


def flips(data: bytes) -> Iterator[bytes]:
    """The data with one bit flipped, at every fifth byte and in each of the last hundred."""
    for place in sorted({*range(0, len(data), 5), *range(max(0, len(data) - 100), len(data))}):
        yield data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :]


def test_no_flip_in_a_manifest_goes_unseen(proven: Box) -> None:
    backup = daily(proven)
    key = catalog_key(backup.id)
    data = read_all(proven.store, key)
    for flipped in flips(data):
        (proven.store.root / key).write_bytes(flipped)  # as a disk does it: nobody is told
        found = catalog.list_backups(proven.store, fresh=True)
        assert backup.id not in {item.id for item in found.backups}
        assert [bad for bad, _ in found.unreadable] == [key]
    with pytest.raises(Corrupt):
        run(proven, backup)
    with pytest.raises(BackupNotFound):
        restore.plan(proven.protected, restore.RestoreRequest(str(backup.id)), clock=now)
    assert catalog_rebuild.rebuild(proven.store).backups == (backup.id,)
    assert read_all(proven.store, key) == data


def test_no_flip_in_the_copy_of_a_manifest_is_rebuilt_from(proven: Box) -> None:
    backup = daily(proven)
    copy = copy_key(backup.id, backup.tier, Beside.MANIFEST)
    data = read_all(proven.store, copy)
    proven.store.delete([catalog_key(backup.id)])
    for flipped in list(flips(data))[::8]:
        proven.store.put(copy, [flipped])
        rebuilt = catalog_rebuild.rebuild(proven.store)
        assert not rebuilt.backups
        assert [key for key, _ in rebuilt.refused] == [copy]
    proven.store.put(copy, [data])
    assert catalog_rebuild.rebuild(proven.store).backups == (backup.id,)
    assert daily(proven) == backup


def test_no_flip_in_a_verdict_counts_as_proven(proven: Box) -> None:
    backup = daily(proven)
    key = catalog_key(backup.id, Beside.VERDICT)
    data = read_all(proven.store, key)
    for flipped in flips(data):
        (proven.store.root / key).write_bytes(flipped)  # as a disk does it: nobody is told
        found = daily(proven)
        assert found.verdict is Verdict.NONE
        assert found.unreadable_verdict
    with pytest.raises(BackupNotFound):
        restore.plan(proven.protected, restore.RestoreRequest(), clock=now)
    assert run(proven, backup).verdict is Verdict.PROVEN


def test_another_backups_verdict_proves_nothing(proven: Box) -> None:
    theirs, mine = daily(proven), weekly(proven)
    data = read_all(proven.store, catalog_key(theirs.id, Beside.VERDICT))
    proven.store.put(catalog_key(mine.id, Beside.VERDICT), [data])
    assert weekly(proven).verdict is Verdict.NONE
    assert weekly(proven).unreadable_verdict
