"""The demo, told from beginning to end: a backup is taken, proven, needed, and restored.

Called by __main__.py. Each step uses the product as its users do, by its command line; what is claimed
at the end was compared here, from the side (contents.py), and not read from the product's words.
"""

import contextlib
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import psycopg

from backup_pipeline.demo import contents, filler, servers, story_recovery
from backup_pipeline.demo.contents import Named, Rows
from backup_pipeline.demo.place import Place, empty, shown, sourced
from backup_pipeline.demo.servers import Servers
from backup_pipeline.demo.stage import PROGRAM, DemoFailed, Stage, expect
from backup_pipeline.demo.story_recovery import LOST
from backup_pipeline.demo.writer import Writer
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.units import show_bytes, show_seconds

_EQUAL = r"\d.* equal\b"

BESIDE = "agentweave_restored"
_SOME = 20


@dataclass(frozen=True)
class Taken:
    """The daily backup: its id, its size, how long it took, and how far the application was then."""

    backup: str
    size_bytes: int
    took_s: float
    committed: int


@dataclass(frozen=True)
class Accident:
    """What was lost, and what it was before."""

    gone: frozenset[Named]
    rows: Rows


def tell(place: Place, *, rows: int) -> None:
    """Run the demo in `place`, which is emptied first. Raises DemoFailed when anything is not as claimed."""
    stage = Stage(place.log)
    stage.heading("A database is backed up while an application writes to it; then the backup is needed.")
    stage.step("Two servers of our own")
    started = time.monotonic()
    empty(place)
    with servers.running(place) as running:
        stage.variables = running.variables
        took = show_seconds(time.monotonic() - started)
        stage.say(
            f"PostgreSQL {running.tools.version_text} and an S3 server, for this machine alone ({took})."
        )
        stage.say(f"All that they keep is in {shown(place.folder)}; nothing else here is touched.")
        if place.is_split:
            stage.say(f"(PostgreSQL's user may not enter there: its data is in {shown(place.cluster)}.)")
        filled = _fill(stage, running, rows)
        with Writer(running.application()) as writer, story_recovery.archived(stage, place, running):
            _still_writing(writer)
            taken = _take(stage, writer)
            prove_s = _prove(stage, taken)
            accident = _lose(stage, running, writer)
            restore_s = _restore_beside(stage, running, accident)
            swap_s = _replace(stage, running, writer, accident)
            after = writer.committed - taken.committed
            recover_s, lost = story_recovery.recover(stage, place, running)
            verdict = story_recovery.drill(stage, lost)
            _keep(stage)
        stage.heading("What happened")
        for name, value in (
            ("database", f"{filled.rows:,} rows, {show_bytes(filled.size_bytes)}, written to all the time"),
            ("backup", f"{show_bytes(taken.size_bytes)} in the store, in {show_seconds(taken.took_s)}"),
            ("proof", f"proven, in {show_seconds(prove_s)}"),
            ("accident", f"{contents.counted(accident.gone)} and {accident.rows.count:,} rows lost"),
            (
                "restore",
                f"beside the live database, in {show_seconds(restore_s)}: all of it is back, and equal",
            ),
            ("swap", f"restored again and swapped in {show_seconds(swap_s)}"),
            (
                "recovery",
                f"the cluster as it was a second before {lost.at:%H:%M:%S} UTC, in {show_seconds(recover_s)}",
            ),
            ("drill", f"{verdict}: a second of the window was recovered, and held against the source"),
            ("writer", f"{writer.committed:,} transactions, never more than {_gap(writer)} without one;"),
            ("", f"the {after:,} since the backup are in the old database, which was kept"),
        ):
            stage.say(f"{name:<9} {value}")
        _farewell(stage, place, taken.backup)


def _fill(stage: Stage, running: Servers, rows: int) -> filler.Filled:
    stage.step("A database, and an application that writes to it")
    started = time.monotonic()
    filler.create_database(running.postgres.endpoint())
    filled = filler.fill(running.database(), rows=rows, today=datetime.now(UTC).date())
    took = show_seconds(time.monotonic() - started)
    stage.say(f"{filler.DATABASE}: {filled.rows:,} rows, {show_bytes(filled.size_bytes)} ({took}).")
    stage.say("From now on an application inserts, updates and deletes, 40 transactions a second.")
    return filled


def _take(stage: Stage, writer: Writer) -> Taken:
    stage.step("The daily backup, taken while the application writes")
    before = writer.committed
    arguments = ("backup", filler.DATABASE, "--tier", "daily", "--no-prove")
    taken, took_s = stage.ask(*arguments, show="^published ")
    stage.say(f"Meanwhile the application committed {writer.committed - before} transactions.")
    expect(writer.committed > before, "the application could not write while the dump was taken")
    return Taken(str(taken["id"]), int(taken["size_bytes"]), took_s, before)


def _prove(stage: Stage, taken: Taken) -> float:
    stage.step("The proof: restored into an empty server, and compared row for row")
    arguments = ("prove", filler.DATABASE, "--backup", taken.backup)
    proven, took_s = stage.ask(*arguments, show=f" is proven|{_EQUAL}")
    verdict = proven["verdict"]
    expect(verdict == "proven", f"the verdict on {taken.backup} is {verdict!r}, not 'proven'")
    return took_s


def _lose(stage: Stage, running: Servers, writer: Writer) -> Accident:
    stage.step("The accident")
    before, rows = contents.named(running.database()), contents.rows(running.database(), LOST)
    stage.say(f"DROP TABLE {LOST} CASCADE;")
    _drop(running, LOST)
    after = contents.named(running.database())
    gone = before - after
    expect(Named("table", LOST) in gone, f"{LOST} is still there")
    stage.say(
        f"Gone: {contents.counted(gone)}; {rows.count:,} rows. The application goes on writing elsewhere."
    )
    _still_writing(writer)
    return Accident(gone, rows)


def _restore_beside(stage: Stage, running: Servers, accident: Accident) -> float:
    stage.step("The newest proven backup, restored beside the live database")
    took = stage.command(
        "restore", filler.DATABASE, "--into", BESIDE, show=f"^(backup|into|then): |^restored |{_EQUAL}"
    )
    live, restored = contents.named(running.database()), contents.named(running.database(BESIDE))
    stage.say("Compared:")
    width = max(len(thing.name) for thing in accident.gone if thing.kind in ("table", "view"))
    for thing in sorted(accident.gone):
        if thing.kind in ("table", "view"):
            found = "there" if thing in restored else "MISSING"
            stage.say(f"  {thing.kind:<6} {thing.name:<{width}}   live: missing   restored: {found}")
    expect(accident.gone <= restored - live, f"not back: {accident.gone - restored}; or not lost")
    rows = contents.rows(running.database(BESIDE), LOST)
    expect(rows == accident.rows, f"{LOST} was {accident.rows} before the accident, and is {rows} restored")
    stage.say(f"  rows of {LOST}: {rows.count:,}, each equal to what it was before the accident")
    return took


def _replace(stage: Stage, running: Servers, writer: Writer, accident: Accident) -> float:
    stage.step("Restored once more, it takes the live database's place")
    arguments = ("restore", filler.DATABASE, "--replace", "--confirm", filler.DATABASE)
    took = stage.command(*arguments, show="^then: |^restored | is kept as | were ended")
    expect(accident.gone <= contents.named(running.database()), "the live database still lacks what was lost")
    rows = contents.rows(running.database(), LOST)
    expect(rows == accident.rows, f"{LOST} was {accident.rows} before the accident, and is {rows} now")
    _still_writing(writer)
    stage.say(f"The application found its database again after {_gap(writer)}, and goes on writing.")
    stage.say(f"The old one is kept until you drop it: `{PROGRAM} undo {filler.DATABASE}` swaps it back.")
    return took


def _keep(stage: Stage) -> None:
    stage.step("What is there, and what the retention would delete")
    stage.command("list")
    stage.command("prune", "--dry-run")


def _farewell(stage: Stage, place: Place, backup: str) -> None:
    stage.heading("See it yourself")
    stage.say("`make dev` starts the same servers over the same data, with Dagster's UI beside them.")
    stage.say(f"All that the commands above said is in {shown(place.log)}.")
    stage.say("While `make dev` runs, in another terminal:")
    stage.say(f"  {sourced(place.environment)}")
    for command in ("list", f"show {backup}", f"restore {filler.DATABASE} --into another"):
        stage.say(f"  {PROGRAM} {command}")


def _drop(running: Servers, table: str) -> None:
    """Drop it as somebody would: again, when the application's locks came in between."""
    for attempt in range(10):
        with contextlib.closing(connect(running.database())) as session:
            try:
                session.execute(f"DROP TABLE public.{table} CASCADE")
                return
            except psycopg.errors.DeadlockDetected:
                if attempt == 9:
                    raise


def _still_writing(writer: Writer) -> None:
    if not writer.wait_for(_SOME):
        raise DemoFailed(f"the application stopped writing: {writer.failure or 'no connection'}")


def _gap(writer: Writer) -> str:
    return show_seconds(writer.longest_gap_s)
