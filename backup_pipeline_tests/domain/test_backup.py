"""Ids, their keys both ways, and which proof stands after another."""

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backup_pipeline.domain import layout
from backup_pipeline.domain.backup import BackupId, Proof, ProofRecord, Verdict, newest_first
from backup_pipeline.errors import ConfigError
from backup_pipeline_tests.domain import values

ID = BackupId("app", "20260301T020000Z-3f9a1c")


@pytest.mark.parametrize(
    "text",
    [
        "", "app", "app/", "/20260301T020000Z-3f9a1c", "app/20260301T020000Z", "app/20260301T020000Z-3F9A1C",
        "app/20260231T020000Z-3f9a1c", "app/20260301T250000Z-3f9a1c", "app/00000101T000000Z-3f9a1c",
        "../20260301T020000Z-3f9a1c", "a b/20260301T020000Z-3f9a1c", "app/20260301T020000Z-3f9a1c\n",
        "app/20260301T020000Z-3f9a1c/x",
        "app/\u0662\u0660260301T020000Z-3f9a1c", "-app/20260301T020000Z-3f9a1c",
    ],
)  # fmt: skip
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        BackupId.parse(text)


def test_an_id_holds_the_time_of_its_snapshot() -> None:
    berlin = timezone(timedelta(hours=1))
    made = BackupId.make("app", datetime(2026, 3, 1, 3, 0, 0, 999999, tzinfo=berlin), "3f9a1c")
    assert made == ID == BackupId.parse(str(ID))
    assert made.taken_at == datetime(2026, 3, 1, 2, tzinfo=UTC)
    assert not made.imported
    assert BackupId("app", "20260301T020000Z-imported-daily").imported


def test_keys_are_read_both_ways() -> None:
    for beside in layout.Beside:
        assert layout.parse_catalog_key(layout.catalog_key(ID, beside)) == (ID, beside)
        name = layout.COPY_NAMES[beside]
        assert layout.parse_data_key(layout.copy_key(ID, "daily", beside)) == (ID, "daily", name)
    key = layout.data_prefix(ID, "daily") + "dump/toc.dat"
    assert layout.parse_data_key(key) == (ID, "daily", "dump/toc.dat")
    assert layout.parse_lease_key(layout.lease_key(ID, "00ff")) == (ID, "00ff")
    assert layout.catalog_key(ID).startswith(layout.catalog_prefix("app"))


def made_again(key: str) -> set[str]:
    """The keys that we would make for what a key is read as; none when it is nobody's."""
    made = set()
    if (entry := layout.parse_catalog_key(key)) is not None:
        made.add(layout.catalog_key(*entry))
    if (found := layout.parse_data_key(key)) is not None:
        backup, tier, name = found
        made.add(layout.data_prefix(backup, tier) + name)
    if (lease := layout.parse_lease_key(key)) is not None:
        made.add(layout.lease_key(*lease))
    return made


@pytest.mark.parametrize(
    "key",
    [
        *(layout.catalog_key(ID, beside) for beside in layout.Beside),
        layout.data_prefix(ID, "daily") + "dump/toc.dat",
        layout.lease_key(ID, "00ff"),
    ],
)
def test_what_is_nearly_a_key_of_ours_is_nobodys_or_its_own(key: str) -> None:
    assert made_again(key) == {key}
    parts = [*re.split(r"(?<=[/.-])", key), ""]
    for at, other in product(range(len(parts)), ["weekly/", "20260302T020000Z-", "0", "\u0662", "/", "\n"]):
        for rest in (parts[at:], parts[at + 1 :]):  # put in, or put in the place of a part
            near = "".join([*parts[:at], other, *rest])
            assert made_again(near) <= {near}


@given(st.text(max_size=60) | st.from_regex(r"(catalog|databases|leases)/[a-z./0-9TZ-]{0,60}"))
def test_foreign_keys_are_nobodys(key: str) -> None:
    assert made_again(key) <= {key}


def test_keys_with_a_hostile_tier_are_nobodys() -> None:
    assert layout.parse_data_key(f"databases/app/dumps/../{ID.stamp}/x") is None


def test_order_is_by_the_time_in_the_id_then_by_the_rest() -> None:
    times = [datetime(2026, 3, day, 2, tzinfo=UTC) for day in (1, 3, 2)]
    backups = [values.backup(at=at, suffix=suffix) for at in times for suffix in ("bbbb", "aaaa")]
    stamps = [backup.id.stamp for backup in newest_first(backups)]
    assert stamps == sorted(stamps, reverse=True)
    assert newest_first(reversed(backups)) == newest_first(backups)


P, R, F, N = (
    values.proof(verdict)
    for verdict in (Verdict.PROVEN, Verdict.RESTORED, Verdict.FAILED, Verdict.NOT_PROVABLE)
)


@pytest.mark.parametrize(
    ("before", "then", "stands"),
    [
        (N, R, R), (N, P, P), (N, F, F), (R, N, R), (R, P, P), (R, F, F),
        (P, N, P), (P, R, P), (P, F, F), (F, N, F), (F, R, F), (F, P, P),
    ],
)  # fmt: skip
def test_a_proof_that_looked_less_closely_does_not_replace_another(
    before: Proof, then: Proof, stands: Proof
) -> None:
    record = ProofRecord(before).followed_by(then)
    assert record.standing == stands
    assert record.latest == (None if stands == then else then)


def test_the_newest_of_equal_proofs_stands() -> None:
    for proof in (P, R, F, N):
        later = replace(proof, at=proof.at + timedelta(days=1))
        assert ProofRecord(proof).followed_by(later) == ProofRecord(later)


def test_where_nothing_can_be_compared_a_restore_replaces_a_failure() -> None:
    assert ProofRecord(F).followed_by(R, comparable=False) == ProofRecord(R)
    assert ProofRecord(P).followed_by(R, comparable=False).standing == P
