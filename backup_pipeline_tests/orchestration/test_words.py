"""What the UI says: numbers that can be plotted, tables, sentences."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from backup_pipeline.config import DatabaseConfig, ProvePolicy, Secret
from backup_pipeline.domain.backup import Verdict
from backup_pipeline.orchestration import words
from backup_pipeline.units import show_bytes
from backup_pipeline_tests.domain.values import NOW, backup, proof

DATABASE = DatabaseConfig("app", Secret(key="databases.app.dsn"))


def test_the_plotted_numbers_are_numbers_and_always_the_same() -> None:
    taken = backup(at=NOW - timedelta(days=1))
    assert taken.manifest is not None
    shown = words.backup_metadata(taken, "s3://backups")
    numbers = words.manifest_numbers(taken.manifest)
    assert set(numbers) == {"size_bytes", "duration_s", "throughput_mib_s", "compression_ratio"}
    assert all(isinstance(value, int | float) for value in numbers.values())
    assert numbers.items() <= shown.items()
    assert shown["size"] == f"{taken.manifest.size_bytes} B"
    assert shown["stored_in"] == f"s3://backups/databases/app/dumps/daily/{taken.id.stamp}/"


def rows_of(table: object) -> list[dict[str, object]]:
    return [dict(record.data) for record in table.records]  # type: ignore[attr-defined]


def test_the_table_says_what_exists_and_until_when() -> None:
    newest = replace(backup(at=NOW - timedelta(hours=10), verdict=Verdict.PROVEN), proof=proof())
    failed = backup(at=NOW - timedelta(days=1, hours=10), verdict=Verdict.FAILED)
    older = backup(at=NOW - timedelta(days=2, hours=10))
    manual = backup(at=NOW - timedelta(days=3), tier="manual", expires_at=NOW + timedelta(days=11))
    pinned = backup(at=NOW - timedelta(days=90), tier="monthly", pinned=True)
    gone = backup(at=NOW - timedelta(days=91), tier="hourly")
    found = (newest, failed, older, manual, pinned, gone)
    rows = rows_of(words.backups_table(found, DATABASE, NOW))
    assert [row["backup"] for row in rows] == [item.id.stamp for item in found]
    assert [row["kept until"] for row in rows] == [
        "~2026-03-17",  # seven newer ones, one a day
        "~2026-03-16",
        "~2026-03-16",  # a failed one pushes nothing out
        "2026-03-21",
        "pinned",
        "-",  # no such tier is configured
    ]
    assert rows[0] == {
        "backup": newest.id.stamp,
        "age": "10\u00a0h",
        "tier": "daily",
        "size": show_bytes(newest.size_bytes),
        "proof": "proven",
        "kept until": "~2026-03-17",
    }


@pytest.mark.parametrize(
    ("verdict", "start", "end"),
    [
        (Verdict.PROVEN, "app/", "restored in 12.5 s and is equal, row for row"),
        (Verdict.RESTORED, "WARNING: app/", "but not all was compared"),
        (Verdict.FAILED, "app/", "FAILED its proof: public.orders: 10 rows instead of 12"),
        (Verdict.NOT_PROVABLE, "app/", "could not be proven here: something is missing"),
    ],
)
def test_a_verdict_is_one_sentence(verdict: Verdict, start: str, end: str) -> None:
    said = words.verdict_sentence(backup(at=NOW), proof(verdict))
    assert said.startswith(start)
    assert said.endswith(end)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (ProvePolicy(), "right after each dump"),
        (ProvePolicy(always=False, cron="0 4 * * 6"), "the newest one at 04:00 on Saturday (UTC)"),
        (
            ProvePolicy(up_to_bytes=2 * 1024**3, cron="0 4 * * 6"),
            "right after each dump of up to 2.0 GiB of database, "
            "and the newest one at 04:00 on Saturday (UTC)",
        ),
    ],
)
def test_the_policy_of_proofs_in_words(policy: ProvePolicy, said: str) -> None:
    assert words.prove_rule(replace(DATABASE, prove=policy)) == said


@pytest.mark.parametrize(
    ("cron", "days"),
    [("0 2 * * *", 1), ("0 2 * * 0", 7), ("0 2 1 * *", 31), ("0 2 * * 1-5", 3), ("0 2 29 2 *", 2921)],
)
def test_the_longest_gap_of_a_cron(cron: str, days: int) -> None:
    assert words.longest_gap(cron) == timedelta(days=days)


@pytest.mark.parametrize(
    ("span", "said"),
    [
        (timedelta(seconds=-3), "0 s"),
        (timedelta(seconds=59), "59 s"),
        (timedelta(minutes=59, seconds=59), "59 min"),
        (timedelta(hours=47), "1 d"),
        (timedelta(days=400), "400 d"),
    ],
)
def test_an_age_is_short(span: timedelta, said: str) -> None:
    assert words.age(span) == said.replace(" ", "\u00a0")


def test_an_estimate_never_lies_in_the_past() -> None:
    """More good ones than the tier keeps, as right before a prune."""
    many = [backup(at=NOW - timedelta(days=age)) for age in range(12)]
    rows = rows_of(words.backups_table(many, DATABASE, datetime(2026, 3, 10, 12, tzinfo=UTC)))
    assert rows[-1]["kept until"] == "~2026-03-11"
