"""The counting and dying stores do what kill tests take them to do."""

from pathlib import Path

import pytest

from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import Store, read_all
from backup_pipeline_tests.storage.effects import CountingStore, Died, DyingStore

EFFECTS = ["put a", "put_if_absent b", "copy c", "delete a", "delete b"]


def act(store: Store) -> None:
    store.put("a", iter([b"1", b"2"]))
    store.put_if_absent("b", read_all(store, "a"))
    store.copy("b", "c")
    store.delete(["a", "b"])


def keys(store: Store) -> list[str]:
    return [found.key for found in store.list("")]


def test_effects_are_noted_in_order(tmp_path: Path) -> None:
    store = CountingStore(DirectoryStore(tmp_path))
    act(store)
    assert store.effects == EFFECTS
    assert keys(store) == ["c"]


@pytest.mark.parametrize(
    ("before", "left"), [(1, []), (2, ["a"]), (3, ["a", "b"]), (4, ["a", "b", "c"]), (5, ["b", "c"])]
)
def test_death_comes_before_the_effect(tmp_path: Path, before: int, left: list[str]) -> None:
    real = DirectoryStore(tmp_path)
    store = DyingStore(real, before=before)
    with pytest.raises(Died):
        act(store)
    assert store.dead
    assert store.effects == EFFECTS[: before - 1]
    assert keys(real) == left
    with pytest.raises(Died):
        store.head("c")


def test_an_action_with_fewer_effects_survives(tmp_path: Path) -> None:
    store = DyingStore(DirectoryStore(tmp_path), before=len(EFFECTS) + 1)
    act(store)
    assert not store.dead
