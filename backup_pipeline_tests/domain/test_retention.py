"""What the retention keeps and gives up, case by case, with the time fixed."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta

import pytest

from backup_pipeline.domain.backup import Backup, BackupId, Lease, Verdict
from backup_pipeline.domain.retention import PrunePlan, UnlistedObjects, plan_orphans, plan_prune
from backup_pipeline_tests.domain.values import NOW, backup, imported

TIERS = {"daily": 3, "weekly": 2}


def day(number: int, hour: int = 2) -> datetime:
    """A day of March 2026; NOW is noon on the tenth."""
    return datetime(2026, 3, 1, hour, tzinfo=UTC) + timedelta(days=number - 1)


def plan(
    backups: Iterable[Backup],
    *,
    tiers: Mapping[str, int] = TIERS,
    leases: Iterable[Lease] = (),
    now: datetime = NOW,
    damaged: Mapping[BackupId, str] | None = None,
) -> PrunePlan:
    return plan_prune(backups, tiers=tiers, leases=leases, now=now, damaged=damaged)


def kept_days(made: PrunePlan) -> list[int]:
    return sorted(backup.taken_at.day for backup in made.keep)


def why(made: PrunePlan, at: datetime) -> str:
    return next("; ".join(item.reasons) for item in made.decisions if item.backup.taken_at == at)


def test_each_tier_keeps_its_newest_and_says_why() -> None:
    made = plan(
        [backup(at=day(number)) for number in range(1, 8)]
        + [backup(at=day(number, 3), tier="weekly") for number in (1, 3, 5)]
    )
    assert [str(decision) for decision in made.decisions] == [
        "keep app/20260307T020000Z-3f9a1c (daily): one of the 2 newest good backups; "
        "number 1 of the 3 newest of daily",
        "keep app/20260306T020000Z-3f9a1c (daily): one of the 2 newest good backups; "
        "number 2 of the 3 newest of daily",
        "keep app/20260305T030000Z-3f9a1c (weekly): number 1 of the 2 newest of weekly",
        "keep app/20260305T020000Z-3f9a1c (daily): number 3 of the 3 newest of daily",
        "delete app/20260304T020000Z-3f9a1c (daily): older than the 3 newest of daily",
        "keep app/20260303T030000Z-3f9a1c (weekly): number 2 of the 2 newest of weekly",
        "delete app/20260303T020000Z-3f9a1c (daily): older than the 3 newest of daily",
        "delete app/20260302T020000Z-3f9a1c (daily): older than the 3 newest of daily",
        "delete app/20260301T030000Z-3f9a1c (weekly): older than the 2 newest of weekly",
        "delete app/20260301T020000Z-3f9a1c (daily): older than the 3 newest of daily",
    ]


def test_nothing_goes_once_backups_stop() -> None:
    old = [backup(at=day(number)) for number in range(1, 4)]
    assert not plan(old, now=NOW + timedelta(days=3650)).delete


def test_the_newest_proven_stays_however_many_unproven_are_newer() -> None:
    proven = [backup(at=day(number), verdict=Verdict.PROVEN) for number in (1, 2)]
    made = plan(proven + [backup(at=day(number)) for number in range(3, 10)])
    assert kept_days(made) == [2, 7, 8, 9]
    assert why(made, day(2)) == "the newest proven backup"


@pytest.mark.parametrize("verdict", [Verdict.NONE, Verdict.RESTORED, Verdict.NOT_PROVABLE])
def test_only_proven_is_proven(verdict: Verdict) -> None:
    made = plan(
        [backup(at=day(1), verdict=Verdict.PROVEN)]
        + [backup(at=day(number), verdict=verdict) for number in range(2, 9)]
    )
    assert kept_days(made) == [1, 6, 7, 8]


def test_what_failed_pushes_nothing_out() -> None:
    good = [backup(at=day(number)) for number in (1, 2, 3)]
    failed = [backup(at=day(number), verdict=Verdict.FAILED) for number in range(4, 10)]
    assert not plan(good + failed).delete


def test_what_failed_goes_once_enough_good_ones_are_newer() -> None:
    made = plan(
        [backup(at=day(1), verdict=Verdict.FAILED), backup(at=day(6), verdict=Verdict.FAILED)]
        + [backup(at=day(number)) for number in (3, 4, 5, 8)]
    )
    assert kept_days(made) == [4, 5, 6, 8]
    assert why(made, day(1)) == "its proof failed; 4 good ones of daily are newer, and 3 are wanted"
    assert why(made, day(6)) == "its proof failed; 1 good ones of daily are newer, and 3 are wanted"


def test_a_backup_without_its_objects_counts_for_nothing() -> None:
    backups = [backup(at=day(number)) for number in range(1, 6)]
    damaged = {backups[4].id: "its object x is missing", backups[0].id: "its object y is missing"}
    made = plan(backups, damaged=damaged)
    assert kept_days(made) == [2, 3, 4, 5]
    assert "its object x is missing" in why(made, day(5))
    assert not made.decisions[0].floor


def test_a_damaged_proven_backup_is_the_floor_only_where_there_is_no_other() -> None:
    newer = backup(at=day(9), verdict=Verdict.PROVEN)
    old = [backup(at=day(1), verdict=Verdict.PROVEN)] + [backup(at=day(n)) for n in (2, 3, 4, 5)]
    made = plan([newer, *old], damaged={newer.id: "its object x is missing"})
    assert kept_days(made) == [1, 3, 4, 5, 9]
    made = plan([newer, *old[1:], backup(at=day(10)), backup(at=day(10, 3)), backup(at=day(10, 4))],
                damaged={newer.id: "its object x is missing"})  # fmt: skip
    assert kept_days(made) == [9, 10, 10, 10]


def test_the_two_newest_good_ones_stay_whatever_their_tier() -> None:
    made = plan(
        [
            backup(at=day(8), tier="manual", expires_at=day(9)),
            backup(at=day(7), tier="manual", expires_at=day(9)),
            backup(at=day(6), tier="manual", expires_at=day(9)),
            backup(at=day(9), verdict=Verdict.FAILED),
        ]
    )
    assert kept_days(made) == [7, 8, 9]


def test_manual_backups_go_by_their_expiry() -> None:
    daily = [backup(at=day(number)) for number in (7, 8, 9)]
    made = plan(
        [
            *daily,
            backup(at=day(1), tier="manual", expires_at=NOW),
            backup(at=day(2), tier="manual", expires_at=NOW + timedelta(seconds=1)),
            backup(at=day(3), tier="manual"),
        ]
    )
    assert kept_days(made) == [2, 3, 7, 8, 9]
    assert why(made, day(1)) == "taken by hand, and expired at 2026-03-10T12:00:00Z"


def test_many_manual_backups_push_no_scheduled_one_out() -> None:
    daily = [backup(at=day(number)) for number in (1, 2, 3)]
    manual = [backup(at=day(9, hour), tier="manual", expires_at=day(9, 23)) for hour in range(20)]
    assert [item.tier for item in plan(daily + manual).keep] == ["manual"] * 2 + ["daily"] * 3


def test_a_tier_that_is_no_longer_configured_keeps_what_it_has() -> None:
    backups = [backup(at=day(number), tier="monthly") for number in range(1, 10)]
    made = plan(backups)
    assert not made.delete
    assert why(made, day(1)) == "no tier monthly is configured any more: nothing of it is deleted"
    assert not plan(backups, tiers={}).delete


def test_a_pin_and_a_lease_keep() -> None:
    backups = [backup(at=day(number), pinned=number == 1) for number in range(1, 8)]
    leases = [
        Lease(backups[1].id, "00", "restore", NOW + timedelta(minutes=5)),
        Lease(backups[2].id, "01", "prune", NOW + timedelta(minutes=5)),
    ]
    made = plan(backups, leases=leases)
    assert kept_days(made) == [1, 2, 5, 6, 7]
    assert why(made, day(1)) == "pinned"
    assert why(made, day(2)) == "in use: restore until 2026-03-10T12:05:00Z"


def test_a_pinned_backup_within_the_newest_still_counts() -> None:
    backups = [backup(at=day(number), pinned=number == 7) for number in range(1, 8)]
    assert kept_days(plan(backups)) == [5, 6, 7]


def test_what_is_dated_in_the_future_stays_and_counts_for_nothing() -> None:
    forged = [backup(at=NOW + timedelta(days=number), verdict=Verdict.PROVEN) for number in range(1, 8)]
    made = plan(forged + [backup(at=day(number), verdict=Verdict.PROVEN) for number in range(1, 6)])
    assert [item.taken_at for item in made.keep if item.taken_at < NOW] == [day(5), day(4), day(3)]
    assert len(made.keep) == 10
    assert "dated in the future" in made.decisions[0].reasons[0]
    assert sum("the newest proven backup" in item.reasons for item in made.decisions) == 1


def test_clocks_that_differ_a_little_are_no_future() -> None:
    backups = [backup(at=NOW + timedelta(minutes=5))] + [backup(at=day(number)) for number in range(1, 5)]
    assert len(plan(backups).delete) == 2


def test_a_clock_that_went_back_deletes_nothing() -> None:
    backups = [backup(at=day(number)) for number in range(1, 10)]
    assert not plan(backups, now=day(1) - timedelta(days=30)).delete


def test_a_verdict_that_cannot_be_read_may_be_proven() -> None:
    backups = [
        backup(at=day(number), unreadable_verdict="damaged" * (number in (1, 7))) for number in range(1, 8)
    ]
    made = plan(backups)
    assert kept_days(made) == [1, 4, 5, 6, 7]
    assert "cannot be read" in why(made, day(1))


def test_imported_dumps_are_under_the_same_tiers_and_counts() -> None:
    made = plan([imported(at=day(number)) for number in range(1, 5)] + [backup(at=day(5)), backup(at=day(6))])
    assert kept_days(made) == [4, 5, 6]
    assert plan([imported(at=day(number), verdict=Verdict.RESTORED) for number in range(1, 5)]).delete


def test_databases_are_judged_by_themselves() -> None:
    app = [backup(at=day(number), verdict=Verdict.PROVEN) for number in range(1, 6)]
    other = [backup(at=day(number), database="other") for number in range(6, 10)]
    made = plan(app + other)
    assert [item.id.database for item in made.keep] == ["other"] * 3 + ["app"] * 3


def test_two_backups_of_one_second_are_ordered_by_the_rest_of_the_id() -> None:
    backups = [backup(at=day(1), suffix=suffix) for suffix in ("aaaa", "bbbb", "cccc", "dddd")]
    for order in (backups, backups[::-1]):
        assert [item.id.stamp[-4:] for item in plan(order).delete] == ["aaaa"]


def test_what_cannot_be_read_is_handed_on() -> None:
    unreadable = (("catalog/app/x.json", "damaged"),)
    assert plan_prune([], tiers=TIERS, leases=(), now=NOW, unreadable=unreadable).unreadable == unreadable


OLD = BackupId("app", "20260301T020000Z-3f9a1c")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"copy": "unlisted but complete: run `backup-pipeline rebuild`"}, "unlisted but complete"),
        ({"pinned": True}, "pinned"),
        ({"newest_at": NOW - timedelta(hours=23)}, "younger than 24 hours"),
        ({"id": BackupId("app", "20260310T020000Z-3f9a1c")}, "younger than 24 hours"),
        ({"id": BackupId("app", "20270310T020000Z-3f9a1c")}, "younger than 24 hours"),
        ({"id": BackupId("app", "20260302T020000Z-aaaa")}, "holds a lease"),
    ],
)
def test_unlisted_objects_are_collected_when_nothing_speaks_for_them(
    change: dict[str, object], reason: str
) -> None:
    found = UnlistedObjects(OLD, "daily", ("a", "b"), 2048, NOW - timedelta(hours=25))
    for name, value in change.items():
        found = UnlistedObjects(**{**vars(found), name: value})
    leases = [Lease(BackupId("app", "20260302T020000Z-aaaa"), "00", "dump", NOW)]
    (decision,) = plan_orphans([found], leases=leases, now=NOW)
    assert decision.keep == bool(reason)
    assert reason in decision.reason
    verb = "leave" if reason else "collect"
    assert str(decision).startswith(f"{verb} 2 unlisted objects of {found.id}, 2.0 KiB: ")
