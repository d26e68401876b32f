"""Restores beside a prune: what is being restored is kept, and what was pruned touches nothing."""

from datetime import timedelta

import pytest

from backup_pipeline.actions import prune, restore
from backup_pipeline.actions.restore import RestoreRequest
from backup_pipeline.config import TierConfig
from backup_pipeline.errors import (
    BackupNotFound,
)
from backup_pipeline.storage import leases
from backup_pipeline_tests.actions.box import (
    Box,
    now,
    stored,
)
from backup_pipeline_tests.actions.restoring import at, only, orders, publish_newer, run, untouched


def pruned_away(box: Box) -> prune.Pruned:
    """A prune that would give up everything, if nothing else spoke for it."""
    old = box.configured(tiers=(TierConfig("daily", "0 2 * * *", 1),)).config
    later = now() + timedelta(minutes=1)
    plan = prune.plan(box.store, old, now=later)
    return prune.carry_out(box.store, plan, clock=lambda: later, log=box.said.say)


def test_what_is_being_restored_is_not_pruned(live: Box) -> None:
    backup = only(live)
    for minutes in (1, 2):
        publish_newer(live, minutes)
    seen: list[prune.Pruned] = []
    report = at("gathering", lambda: seen.append(pruned_away(live)))
    done = run(live, backup=str(backup.id), report=report)
    assert orders(live.cluster.endpoint(done.database)) == 1000
    assert not seen[0].deleted
    assert backup.id in pruned_away(live).deleted  # as soon as nobody uses it


def test_what_was_pruned_between_plan_and_restore_touches_nothing(live: Box) -> None:
    name = live.endpoint.database
    request = RestoreRequest("latest", replace=True, confirm=name)
    plan = restore.plan(live.protected, request, clock=now)
    live.store.delete(list(stored(live.store)))
    with untouched(live), pytest.raises(BackupNotFound, match="pruned a moment ago"):
        restore.carry_out(live.protected, plan, clock=now, report=live.said)


def test_a_lease_is_held_while_a_restore_runs(live: Box) -> None:
    held: list[str] = []
    report = at(
        "gathering",
        lambda: held.extend(item.purpose for item in leases.live_leases(live.store, "app", now())),
    )
    run(live, check="none", report=report)
    assert held == ["restore"]
    assert not leases.live_leases(live.store, "app", now())
