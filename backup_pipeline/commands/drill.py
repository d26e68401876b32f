"""`drill`: a recovery to a random second, into scratch; and how `list` shows the drills of a cluster.

Called by cli.py. How a drill is made, and what its verdicts mean, is actions/drill_recovery.py's.
"""

from collections.abc import Sequence
from datetime import datetime

import click
from rich.table import Table
from rich.text import Text

from backup_pipeline import terminal
from backup_pipeline.actions import drill_recovery
from backup_pipeline.commands.context import Context, json_option, now, pass_context
from backup_pipeline.domain.backup import Verdict
from backup_pipeline.domain.drill import Drill, DrillListing
from backup_pipeline.domain.recovery_target import show_moment
from backup_pipeline.storage import drills
from backup_pipeline.units import show_bytes, show_count, show_line, show_seconds

SHOWN = 10
"""How many drills a listing shows."""


@click.command()
@click.argument("cluster")
@click.option(
    "--to",
    "target",
    default=drill_recovery.RANDOM,
    show_default=True,
    metavar="TIME",
    help="A time with its zone (2026-03-01T02:00:00Z), or a random second of the window.",
)
@json_option
@pass_context
def drill(context: Context, cluster: str, target: str, as_json: bool) -> None:
    """Recover to a random second of the window, into scratch; look into it, record what it came to."""
    at = drill_recovery.parse_moment(target)
    protected = context.cluster(cluster)
    with terminal.reporting(quiet=context.quiet) as report:
        done = drill_recovery.drill(protected, clock=now, report=report, target_at=at)
    if as_json:
        terminal.print_json(drill_record(done))
    else:
        terminal.print_table(drill_details(done))
    if not drill_recovery.as_asked(done, protected.config):
        raise SystemExit(7 if done.verdict is Verdict.FAILED else 8)


def listing(context: Context, name: str) -> DrillListing:
    """The newest drills of a cluster; none where no cluster is named."""
    if not name or (not context.alone and name not in context.config.clusters):
        return DrillListing(())
    return drills.drills(context.store(), name)


def drills_table(found: Sequence[Drill], at: datetime) -> Table:
    """The newest drills, a line each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("DRILL", "AGE", "VERDICT", "TARGET", "RECOVERED IN", "LOSS", "WAL"):
        table.add_column(column, no_wrap=True)
    for each in found[:SHOWN]:
        table.add_row(
            Text(str(each.id)),
            terminal.show_age(each.id.taken_at, at),
            terminal.show_verdict(each.verdict),
            show_moment(each.target_at) if each.target_at else "",
            show_seconds(each.recovery_s) if each.recovery_s is not None else "",
            show_seconds(each.loss_s) if each.loss_s is not None else "",
            show_count(each.segments, "segment") if each.segments else "",
        )
    return table


def drill_record(each: Drill) -> dict[str, object]:
    """One drill as JSON for scripts; times ISO 8601 in UTC, sizes in bytes."""
    took, loss = each.recovery, each.loss
    return {
        "kind": "drill",
        "id": str(each.id),
        "cluster": each.id.database,
        "verdict": str(each.verdict),
        "finished_at": each.finished_at.isoformat(),
        "target_at": each.target_at.isoformat() if each.target_at else None,
        "seed": each.seed,
        "base_backup": str(each.base) if each.base else None,
        "timeline": each.timeline,
        "segments": each.segments,
        "wal_bytes": each.wal_bytes,
        "base_bytes": each.base_bytes,
        "source_bytes": each.source_bytes,
        "recovery_s": each.recovery_s,
        "plan_s": took.plan_s if took else None,
        "unpack_s": took.unpack_s if took else None,
        "replay_s": took.replay_s if took else None,
        "start_s": took.start_s if took else None,
        "check_s": each.check_s,
        "loss_s": each.loss_s,
        "newest_at": loss.newest_at.isoformat() if loss else None,
        "checked": list(each.checked),
        "differences": list(each.differences),
        "notes": list(each.notes),
        "by": each.by,
    }


def drill_details(each: Drill) -> Table:
    """Everything that a drill found."""
    took, loss = each.recovery, each.loss
    rows = [("drill", str(each.id)), ("verdict", str(each.verdict))]
    if each.target_at:
        drawn = ", drawn at random" if each.seed is not None else ""
        rows.append(("target", show_moment(each.target_at) + drawn))
    if each.base:
        wal = f"{show_count(each.segments, 'WAL segment')}, {show_bytes(each.wal_bytes)}"
        rows.append(("from", f"{each.base}, {show_bytes(each.base_bytes)}; {wal}"))
    if took:
        parts = (
            f"plan {show_seconds(took.plan_s)}, unpack {show_seconds(took.unpack_s)}, "
            f"replay {show_seconds(took.replay_s)}, start {show_seconds(took.start_s)}"
        )
        rows.append(("recovered in", f"{show_seconds(took.total_s)} ({parts})"))
        rows.append(("checked in", show_seconds(each.check_s)))
    if loss:
        newest = f"the newest that can be recovered is {show_moment(loss.newest_at)}"
        rows.append(("loss", f"{show_seconds(loss.loss_s)}: {newest}"))
    rows += [("checked", line) for line in each.checked]
    rows += [("WRONG", line) for line in each.differences]
    rows += [("note", line) for line in each.notes]
    return terminal.two_columns([(name, show_line(value)) for name, value in rows])
