"""The records of drills in a store: the newest first, and damage told."""

from datetime import timedelta

from backup_pipeline.domain.layout import drill_key
from backup_pipeline.storage import drills
from backup_pipeline.storage.store import read_all
from backup_pipeline_tests.domain.values import NOW, drill
from backup_pipeline_tests.storage.memory import MemoryStore


def test_they_are_listed_newest_first_and_no_more_than_asked_for() -> None:
    store = MemoryStore()
    made = [drill(at=NOW + timedelta(days=day)) for day in (1, 0, 2)]
    for each in (*made, drill("other")):
        drills.put(store, each)
    assert drills.drills(store, "main").drills == (made[2], made[0], made[1])
    assert drills.drills(store, "main", newest=2).drills == (made[2], made[0])
    assert drills.drills(store, "none").drills == ()


def test_what_cannot_be_read_is_told_and_hides_nothing() -> None:
    store = MemoryStore()
    good, bad = drill(), drill(at=NOW + timedelta(days=1))
    for each in (good, bad):
        drills.put(store, each)
    key, foreign = drill_key(bad.id), "clusters/main/drills/notes.txt"
    store.put(key, [read_all(store, key).replace(b'"segments": 40', b'"segments": 41')])
    store.put(foreign, [b"by hand"])
    found = drills.drills(store, "main")
    assert found.drills == (good,)
    assert {each for each, _ in found.unreadable} == {key, foreign}
