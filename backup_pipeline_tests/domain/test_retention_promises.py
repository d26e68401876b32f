"""What the retention promises, held for random catalogs."""

from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backup_pipeline.domain.backup import Backup, Lease, Verdict, newest_first
from backup_pipeline.domain.retention import plan_prune
from backup_pipeline_tests.domain.promises import must_stay
from backup_pipeline_tests.domain.values import NOW, backup

TIER_NAMES = ("daily", "weekly", "gone", "manual")

BACKUPS = st.lists(
    st.builds(
        lambda hours, tier, verdict, pinned, unreadable, expires: backup(
            at=NOW - timedelta(hours=hours),
            tier=tier,
            verdict=verdict,
            pinned=pinned,
            unreadable_verdict="damaged" if unreadable else "",
            expires_at=NOW + timedelta(hours=expires) if tier == "manual" and expires else None,
        ),
        hours=st.integers(-30, 200),
        tier=st.sampled_from(TIER_NAMES),
        verdict=st.sampled_from(list(Verdict)),
        pinned=st.integers(0, 9).map(lambda number: number == 0),
        unreadable=st.integers(0, 9).map(lambda number: number == 0),
        expires=st.integers(-5, 5),
    ),
    max_size=14,
    unique_by=lambda item: item.id,
)
TIERS = st.fixed_dictionaries({"daily": st.integers(1, 4), "weekly": st.integers(1, 3)})


def check(backups: list[Backup], tiers: dict[str, int], leased: list[int], damaged: list[int]) -> None:
    """Hold every promise against one catalog."""
    leases = [Lease(backups[i].id, "00", "restore", NOW) for i in leased if i < len(backups)]
    broken = {backups[i].id: "its object is missing" for i in damaged if i < len(backups)}
    plan = plan_prune(backups, tiers=tiers, leases=leases, now=NOW, damaged=broken)
    again = plan_prune(backups[::-1], tiers=tiers, leases=leases[::-1], now=NOW, damaged=broken)
    assert plan == again, "the order in which backups are listed plays no part"
    assert [item.backup for item in plan.decisions] == list(newest_first(backups))
    assert all(decision.reasons for decision in plan.decisions)

    stay = must_stay(backups, tiers=tiers, leases=leases, now=NOW, damaged=broken)
    assert stay <= {item.id for item in plan.keep}
    needless = {item.id for item in plan.keep} - stay
    assert needless <= {item.id for item in backups if item.id in broken and item.verdict is Verdict.PROVEN}

    # What goes at once goes in any order, in any number of steps: each is fine by itself.
    for step in range(len(plan.delete)):
        left = [item for item in backups if item not in plan.delete[step:]]
        after = plan_prune(left, tiers=tiers, leases=leases, now=NOW, damaged=broken)
        assert set(after.keep) == set(plan.keep)
    # More backups of other tiers, or bad ones, never cost a backup that would have stayed.
    bad = [item for item in backups if item.verdict is Verdict.FAILED or item.id in broken]
    without = plan_prune(
        [item for item in backups if item not in bad], tiers=tiers, leases=leases, now=NOW, damaged={}
    )
    assert {item.id for item in without.keep} <= {item.id for item in plan.keep}


EXAMPLES = given(
    BACKUPS, TIERS, st.lists(st.integers(0, 13), max_size=2), st.lists(st.integers(0, 13), max_size=2)
)


@EXAMPLES
@settings(max_examples=300, deadline=None)
def test_the_promises_hold(
    backups: list[Backup], tiers: dict[str, int], leased: list[int], damaged: list[int]
) -> None:
    check(backups, tiers, leased, damaged)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@EXAMPLES
@settings(max_examples=100_000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_the_promises_hold_a_hundred_thousand_times(
    backups: list[Backup], tiers: dict[str, int], leased: list[int], damaged: list[int]
) -> None:
    check(backups, tiers, leased, damaged)
