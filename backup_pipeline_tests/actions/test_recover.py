"""Recovery to any moment, held against a ledger of what was really committed."""

import random
import re
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from backup_pipeline.actions import recover
from backup_pipeline.actions.recovery_plan import Plan, RecoverRequest
from backup_pipeline.domain.layout import wal_archive_prefix
from backup_pipeline.domain.recovery_target import RecoveryTarget, TargetKind, parse_target
from backup_pipeline.errors import Refused, ToolError
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline_tests.actions.recovery_box import RecoveryBox, a_recovery_box
from backup_pipeline_tests.servers import postgres as servers

POINT = "before it's too late; $(true)"


@pytest.fixture(scope="module", params=servers.OLDEST_AND_NEWEST)
def box(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RecoveryBox]:
    """Two base backups, a dozen commits around them, a restore point; all archived."""
    store = DirectoryStore(tmp_path_factory.mktemp("store"))
    with a_recovery_box(request.param(), store) as made:
        made.commit(2)
        made.take()
        made.commit(3, switch=True)
        made.take()
        made.commit(4, switch=True)
        made.name_point(POINT)
        made.commit(3)
        made.switch()
        yield made


Target = Callable[[RecoveryBox], RecoveryTarget]


def at(number: int, *, inclusive: bool = True, days: int = 0) -> Target:
    return lambda box: RecoveryTarget(
        TargetKind.TIME, at=box.ledger[number - 1].at + timedelta(days=days), inclusive=inclusive
    )


def lsn(number: int) -> Target:
    return lambda box: RecoveryTarget(TargetKind.LSN, lsn=box.ledger[number - 1].end, inclusive=False)


def xid(number: int, *, inclusive: bool = True) -> Target:
    return lambda box: RecoveryTarget(TargetKind.XID, xid=box.ledger[number - 1].xid, inclusive=inclusive)


def typed(text: str) -> Target:
    return lambda _: parse_target(text)


def forget(box: RecoveryBox) -> None:
    """Remove what was recovered; nothing else is there."""
    shutil.rmtree(box.folder / "recovered")
    assert list(box.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "last"),
    [
        (at(4), 4),
        (at(8), 8),
        (at(8, inclusive=False), 7),
        (lsn(7), 7),
        (xid(7), 7),
        (xid(7, inclusive=False), 6),
        (typed(f"name:{POINT}"), 9),
        (typed("latest"), 12),
        (at(12), 12),
    ],
    ids=["time", "time 8", "before", "lsn", "xid", "before xid", "name", "latest", "last commit"],
)
def test_a_recovery_holds_just_what_was_committed_by_then(
    box: RecoveryBox, target: Target, last: int
) -> None:
    result = box.recover(target(box))
    try:
        assert box.numbers() == list(range(1, last + 1))
    finally:
        forget(box)
    assert result.recovered.timeline == 2


def test_the_server_is_asked_whether_it_has_been_idle_since(box: RecoveryBox) -> None:
    """It is not: the box's own switch left a record. So the newest moment is the last commit."""
    plan = recover.plan(
        box.protected(), RecoverRequest(parse_target("latest"), box.folder / "x"), report=box.said
    )
    assert plan.ending.last_commit_at == box.ledger[-1].at


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (typed("latest"), r"replays: \d+ segments?, .* compressed, to timeline 1"),
        (at(4), r"replays: about \d+ segments?, .* compressed, to timeline 1"),
    ],
)
def test_how_many_segments_lead_to_a_moment_is_no_promise(
    box: RecoveryBox, target: Target, said: str
) -> None:
    plan = recover.plan(box.protected(), RecoverRequest(target(box), box.folder / "x"), report=box.said)
    assert [line for line in plan.lines if re.fullmatch(said, line)]


def test_latest_waits_for_a_segment_that_may_be_under_way(box: RecoveryBox) -> None:
    """The agent archives what follows a segment that is slow."""
    keys = [each.key for each in box.store.list(wal_archive_prefix("main"))]
    key = sorted(key for key in keys if key.endswith(".zst") and ".backup" not in key)[-2]
    content = b"".join(box.store.read(key))
    box.store.delete([key])
    waits: list[float] = []

    def plan(text: str) -> Plan:
        request = RecoverRequest(parse_target(text), box.folder / "x")
        return recover.plan(box.protected(), request, report=box.said, pause=pause)

    def pause(wait_s: float) -> None:
        waits.append(wait_s)
        if len(waits) == 2:
            box.store.put(key, [content])

    try:
        with pytest.raises(Refused, match="lies beyond a gap"):
            plan("lsn:FF/0")
        assert waits == []
        assert plan("latest").ending.last_commit_at == box.ledger[-1].at
        assert len(waits) == 2
    finally:
        box.store.put(key, [content])


@pytest.mark.parametrize(
    ("target", "said", "nearest"),
    [
        (at(1), "lies before the first moment that can be recovered", "first"),
        (at(12, days=1), "lies past the end of what is archived", "newest"),
        (typed("lsn:FF/0"), "lies past the end of what is archived", "newest"),
        (typed("lsn:0/1"), "lies before the first moment that can be recovered", "first"),
    ],
)
def test_what_cannot_be_reached_is_refused_with_the_nearest_that_can(
    box: RecoveryBox, target: Target, said: str, nearest: str
) -> None:
    with pytest.raises(Refused, match=said) as caught:
        box.recover(target(box))
    assert "LSN" in str(caught.value.detail[nearest])
    assert list(box.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "said"), [("name:never", "restore point never"), ("4000000", "transaction")]
)
def test_a_name_or_transaction_that_the_replay_does_not_meet_leaves_nothing(
    box: RecoveryBox, text: str, said: str
) -> None:
    with pytest.raises(ToolError, match=f"{said}.* was not met: the replay ended at") as caught:
        box.recover(parse_target(text))
    assert str(box.ledger[-1].at)[:19] in str(caught.value.detail["last transaction"])
    assert list(box.folder.iterdir()) == []


def at_random(box: RecoveryBox, chance: random.Random) -> tuple[RecoveryTarget, int]:
    """Any target right before or right after a commit, and the last number that it leaves in."""
    number = chance.randint(box.first + 1, len(box.ledger) - 1)
    inclusive = chance.random() < 0.5
    last = number if inclusive else number - 1
    match chance.choice(("time", "xid", "lsn", "between")):
        case "time":
            return at(number, inclusive=inclusive)(box), last
        case "xid" if number > box.last + 1:  # the newest base backup has to begin before it
            return xid(number, inclusive=inclusive)(box), last
        case "lsn":
            return lsn(number)(box), number
        case _:
            one, next_ = box.ledger[number - 1].at, box.ledger[number].at
            between = one + (next_ - one) * chance.random()
            return RecoveryTarget(TargetKind.TIME, at=between), number


def hold_random_targets(store: DirectoryStore, *, targets: int, seed: int) -> None:
    """Commits under load of others, base backups in between; each target gives just the ledger until it."""
    chance = random.Random(seed)
    with a_recovery_box(servers.bin_dir_17(), store) as box, box.load():
        for _ in range(3):
            box.commit(10, switch=chance.random() < 0.5)
            box.take()
            box.first, box.last = box.first or len(box.ledger), len(box.ledger)
        box.commit(20)
        box.switch()
        for _ in range(targets):
            target, last = at_random(box, chance)
            box.recover(target)
            found = box.numbers()
            assert found == list(range(1, last + 1)), f"seed {seed}: {target} gave {found[-1]}, not {last}"
            forget(box)


def test_random_targets_under_load(tmp_path: Path) -> None:
    hold_random_targets(DirectoryStore(tmp_path), targets=5, seed=random.randrange(10**6))


@pytest.mark.slow
def test_a_hundred_random_targets_under_load(tmp_path: Path) -> None:
    hold_random_targets(DirectoryStore(tmp_path), targets=100, seed=random.randrange(10**6))
