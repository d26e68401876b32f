"""Tiers that share one dump: what is copied, and what is dumped anew."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest

from backup_pipeline.actions import dump, prove
from backup_pipeline.domain.backup import ObjectRole, Verdict
from backup_pipeline.errors import (
    CopyUnsupported,
)
from backup_pipeline.storage import catalog
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import read_all
from backup_pipeline_tests.actions.box import DUE, Box, now, stored
from backup_pipeline_tests.actions.dumping import Watching, whole
from backup_pipeline_tests.domain.values import proof
from backup_pipeline_tests.storage.effects import CountingStore


def test_tiers_that_are_due_together_share_one_dump(box: Box) -> None:
    first = box.take("daily", scheduled_for=DUE)
    prove.prove(box.protected, first.id, clock=now, report=box.said)
    box.execute("INSERT INTO public.customer (name, added) VALUES ('later', now())")
    second = box.take("weekly", scheduled_for=DUE)
    third = box.take("monthly", scheduled_for=DUE)
    assert first.manifest is not None
    for copy in (second, third):
        assert copy.manifest is not None
        assert copy.manifest.copied_from is not None
        whole(box.protected, copy)
        assert {(item.name, item.sha256) for item in copy.manifest.objects} == {
            (item.name, item.sha256) for item in first.manifest.objects
        }
        assert copy.verdict is Verdict.PROVEN
        assert copy.proof is not None
        assert "every byte equal to" in copy.proof.checked[0]
        assert copy.taken_at == first.taken_at
    # The copy is a backup of its own: it outlives the original.
    box.store.delete([item.key for item in first.manifest.objects])
    again = prove.prove(box.protected, second.id, clock=now, report=box.said)
    assert again.verdict is Verdict.PROVEN


def test_a_copy_of_an_unproven_dump_is_unproven(proven: Box) -> None:
    verdicts = [key for key in stored(proven.store) if key.endswith("verdict.json")]
    assert len(verdicts) == 2  # in the catalog, and beside the objects
    proven.store.delete(verdicts)
    second = proven.take("weekly", scheduled_for=DUE)
    assert second.manifest is not None
    assert second.manifest.copied_from is not None
    assert second.verdict is Verdict.NONE


def test_a_proven_dump_is_shared_before_copies_that_did_not_inherit_its_proof(proven: Box) -> None:
    (first,) = (item for item in catalog.list_backups(proven.store).backups if item.tier == "daily")
    for _ in range(8):  # their ids sort to both sides of the first's
        copy = dump.dump_and_upload(
            proven.protected, tier="weekly", scheduled_for=DUE, clock=now, report=proven.said
        )
        catalog.publish(proven.store, copy)  # and dead before the proof was recorded
    monthly = proven.take("monthly", scheduled_for=DUE)
    assert monthly.manifest is not None
    assert monthly.manifest.copied_from == first.id
    assert monthly.verdict is Verdict.PROVEN


@pytest.mark.parametrize("why", ["failed", "another time", "the same tier", "not scheduled"])
def test_what_may_not_be_shared_is_dumped_anew(proven: Box, why: str) -> None:
    (first,) = (item for item in catalog.list_backups(proven.store).backups if item.tier == "daily")
    if why == "failed":
        catalog.record_proof(proven.store, first.id, proof(Verdict.FAILED))
    at = {"another time": DUE + timedelta(days=1), "not scheduled": None}.get(why, DUE)
    second = proven.take("daily" if why == "the same tier" else "weekly", scheduled_for=at)
    assert second.manifest is not None
    assert second.manifest.copied_from is None
    assert second.taken_at > first.taken_at


def test_a_tier_gets_no_copy_of_its_own_older_dump(box: Box) -> None:
    first = box.take("daily", scheduled_for=DUE)
    for tier in ("weekly", "monthly"):
        copy = box.take(tier, scheduled_for=DUE).manifest
        assert copy is not None
        assert copy.copied_from is not None
    again = box.take("daily", scheduled_for=DUE)
    assert first.manifest is not None
    assert again.manifest is not None
    assert again.manifest.copied_from is None
    assert again.manifest.snapshot_at > first.manifest.snapshot_at


def flip_a_bit(store: DirectoryStore, key: str) -> None:
    data = bytearray(read_all(store, key))
    data[len(data) // 2] ^= 1
    store.put(key, [bytes(data)])


def make_unreadable(store: DirectoryStore, key: str) -> None:
    store.delete([key])
    (store.root / key).mkdir()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip_a_bit, "not those that were written"),
        (lambda store, key: store.delete([key]), "no object"),
        (make_unreadable, "cannot "),
    ],
    ids=["a bit flipped", "deleted", "unreadable"],
)
def test_what_cannot_be_copied_is_dumped_anew(
    proven: Box, damage: Callable[[DirectoryStore, str], object], said: str
) -> None:
    (first,) = (item for item in catalog.list_backups(proven.store).backups if item.tier == "daily")
    assert first.manifest is not None
    (item,) = first.manifest.of_role(ObjectRole.GLOBALS)  # copied after the dump itself
    damage(proven.store, item.key)
    before = set(stored(proven.store))
    second = proven.take("weekly", scheduled_for=DUE)
    whole(proven.protected, second)
    assert second.manifest is not None
    assert second.manifest.copied_from is None
    assert second.taken_at > first.taken_at
    left = [key for key in stored(proven.store) if key not in before and second.id.stamp not in key]
    assert not left
    (why,) = (line for line in proven.said.lines if "a dump of its own" in line)
    assert str(first.id) in why
    assert said in why


@pytest.mark.parametrize("streamed", [False, True])
def test_a_copy_tells_how_far_it_is(proven: Box, streamed: bool) -> None:
    class NoCopies(CountingStore):
        def copy(self, source: str, target: str, *, storage_class: str = "") -> None:
            raise CopyUnsupported(f"{source} to {target} as {storage_class}")

    box = replace(proven, said=(said := Watching()))
    protected = box.on(NoCopies(box.store)) if streamed else box.protected
    backup = box.take("monthly", scheduled_for=DUE, protected=protected)
    assert backup.manifest is not None
    assert backup.manifest.copied_from is not None
    assert said.of("check the copy")[-1].share == 1.0
    assert [item.share for item in said.of("copy")[-1:]] == ([1.0] if streamed else [])
