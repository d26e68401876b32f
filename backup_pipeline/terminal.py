"""What a person at a terminal reads: tables, one backup in full, a progress bar, JSON for scripts.

Called by cli.py; decides nothing.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from backup_pipeline.actions.prune import Prune, Pruned
from backup_pipeline.actions.report import Lines, Progress, Report
from backup_pipeline.domain.backup import Backup, Proof, Verdict
from backup_pipeline.units import show_bytes, show_line, show_seconds

_STYLES = {
    Verdict.PROVEN: "green",
    Verdict.RESTORED: "yellow",
    Verdict.FAILED: "bold red",
    Verdict.NOT_PROVABLE: "yellow",
    Verdict.NONE: "dim",
}


def console(*, stderr: bool = False) -> Console:
    """A console that never cuts a line short where nobody looks at a screen."""
    screen = Console(stderr=stderr, highlight=False, soft_wrap=True)
    return (
        screen if screen.is_terminal else Console(stderr=stderr, highlight=False, width=200, soft_wrap=True)
    )


def show_age(moment: datetime, now: datetime) -> str:
    """ "3 h 2 min ago"."""
    seconds = (now - moment).total_seconds()
    return f"{show_seconds(seconds)} ago" if seconds >= 0 else f"in {show_seconds(-seconds)}"


def show_verdict(verdict: Verdict) -> Text:
    """A verdict in its colour."""
    return Text(str(verdict), style=_STYLES[verdict])


def backups_table(backups: Sequence[Backup], now: datetime) -> Table:
    """The backups, newest first, a line each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("ID", "TIER", "AGE", "SIZE", "VERDICT", "RESTORE", "NOTE"):
        table.add_column(column, no_wrap=True, justify="right" if column == "SIZE" else "left")
    for backup in backups:
        notes = [
            *(["pinned"] if backup.pinned else []),
            *([f"until {backup.expires_at:%Y-%m-%d %H:%M}Z"] if backup.expires_at else []),
            *(["imported"] if backup.manifest is None else []),
            *(
                [f"copy of {backup.manifest.copied_from.stamp}"]
                if backup.manifest and backup.manifest.copied_from
                else []
            ),
        ]
        proof = backup.proof
        table.add_row(
            Text(str(backup.id)),
            Text(backup.tier),
            show_age(backup.taken_at, now),
            show_bytes(backup.size_bytes),
            show_verdict(backup.verdict),
            show_seconds(proof.restore_s) if proof and proof.restore_s else "",
            Text(", ".join(notes)),
        )
    return table


def backup_record(backup: Backup) -> dict[str, object]:
    """One backup as JSON for scripts; times ISO 8601 in UTC, sizes in bytes."""
    manifest, proof = backup.manifest, backup.proof
    return {
        "id": str(backup.id),
        "database": backup.id.database,
        "tier": backup.tier,
        "taken_at": backup.taken_at.isoformat(),
        "size_bytes": backup.size_bytes,
        "verdict": str(backup.verdict),
        "proven_at": proof.at.isoformat() if proof and proof.verdict is Verdict.PROVEN else None,
        "restore_s": proof.restore_s if proof else None,
        "pinned": backup.pinned,
        "expires_at": backup.expires_at.isoformat() if backup.expires_at else None,
        "imported": manifest is None,
        "copied_from": str(manifest.copied_from) if manifest and manifest.copied_from else None,
        "duration_s": manifest.duration_s if manifest else None,
        "proof": proof_values(proof) if proof else None,
        "last_attempt": proof_values(backup.last_attempt) if backup.last_attempt else None,
    }


def proof_record(backup: Backup, proof: Proof) -> dict[str, object]:
    """One proof of a backup as JSON for scripts; `standing` is the verdict that the backup has after it."""
    return {"id": str(backup.id), **proof_values(proof), "standing": str(backup.verdict)}


def proof_values(proof: Proof) -> dict[str, object]:
    """A proof as JSON for scripts."""
    return dataclasses.asdict(proof) | {"verdict": str(proof.verdict), "at": proof.at.isoformat()}


def prune_record(plan: Prune) -> dict[str, object]:
    """What a prune of one database would do, as JSON for scripts."""
    return {
        "database": plan.database,
        "decisions": [
            {"id": str(each.backup.id), "tier": each.backup.tier, "keep": each.keep, "reasons": each.reasons}
            for each in plan.plan.decisions
        ],
        "unreadable": [{"key": key, "reason": reason} for key, reason in plan.plan.unreadable],
        "unlisted": [
            {"id": str(each.objects.id), "keep": each.keep, "reason": each.reason} for each in plan.orphans
        ],
    }


def pruned_record(done: Pruned) -> dict[str, object]:
    """What a prune of one database did, as JSON for scripts."""
    return {
        "deleted": [str(backup) for backup in done.deleted],
        "kept_after_all": [{"id": str(backup), "reason": why} for backup, why in done.kept_after_all],
        "collected": done.collected,
        "freed_bytes": done.freed_bytes,
        "locked": done.locked,
    }


def backup_details(backup: Backup, where: str, now: datetime) -> Table:
    """Everything of one backup that helps to decide whether to restore it."""
    rows: list[tuple[str, str]] = [
        ("backup", str(backup.id)),
        ("tier", backup.tier + (", pinned" if backup.pinned else "")),
        ("taken", f"{backup.taken_at:%Y-%m-%d %H:%M:%S} UTC, {show_age(backup.taken_at, now)}"),
        ("size", show_bytes(backup.size_bytes)),
    ]
    if backup.expires_at:
        rows.append(("expires", f"{backup.expires_at:%Y-%m-%d %H:%M} UTC"))
    if manifest := backup.manifest:
        source = manifest.source
        rows += [
            (
                "database",
                f"{source.database.name!r}, owner {source.database.owner!r}, {show_bytes(source.size_bytes)}",
            ),
            ("server", f"PostgreSQL {source.server_version_text}, dumped by {manifest.source.client_path}"),
            ("format", f"{manifest.format}, {manifest.compression}, jobs {manifest.jobs}"),
            ("roles", ", ".join(source.roles) or "-"),
            ("extensions", ", ".join(f"{name} {version}" for name, version in source.extensions) or "-"),
            *(("note", note) for note in source.notes),
            *(
                ("object", f"{item.name}  {show_bytes(item.size_bytes)}  sha256 {item.sha256}")
                for item in manifest.objects[:8]
            ),
        ]
        if len(manifest.objects) > 8:
            rows.append(("object", f"… {len(manifest.objects) - 8} more"))
        prefix = manifest.objects[0].key.rpartition("/")[0]
        rows.append(("stored", f"{where}/{prefix}/"))
    else:
        rows.append(("stored", f"{where}/{backup.imported_key} (older layout, no manifest)"))
    rows.append(("verdict", str(backup.verdict)))
    if backup.proof:
        rows += _proof_rows(backup.proof)
    if last := backup.last_attempt:
        rows += [("last attempt", f"{last.verdict}, {_made(last)}"), *_found_rows(last)]
    return two_columns(rows)


def proof_details(backup: Backup, proof: Proof) -> Table:
    """What one proof came to, and, where another one stands after it, which."""
    rows = [("backup", str(backup.id)), ("verdict", str(proof.verdict)), *_proof_rows(proof)]
    if backup.proof and backup.proof != proof:
        rows.append(("stands", f"{backup.verdict}, {_made(backup.proof)}"))
    return two_columns(rows)


def _proof_rows(proof: Proof) -> list[tuple[str, str]]:
    return [("proof", f"{_made(proof)}, in {show_seconds(proof.restore_s)}"), *_found_rows(proof)]


def _made(proof: Proof) -> str:
    return f"{proof.at:%Y-%m-%d %H:%M:%S} UTC by {proof.by}"


def _found_rows(proof: Proof) -> list[tuple[str, str]]:
    different = "MISSING" if proof.verdict is Verdict.NOT_PROVABLE else "DIFFERENT"
    return [
        *(("checked", line) for line in proof.checked),
        *((different, line) for line in proof.differences),
        *(("note", line) for line in proof.notes),
    ]


def two_columns(rows: Sequence[tuple[str, str]]) -> Table:
    """Names and values."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def print_table(table: Table) -> None:
    """A table on standard output, without the blanks that fill its last column."""
    screen = console()
    with screen.capture() as captured:
        screen.print(table)
    for line in captured.get().splitlines():
        print(line.rstrip())


def print_json(value: object) -> None:
    """One JSON value on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


@contextlib.contextmanager
def reporting(*, quiet: bool) -> Iterator[Report]:
    """A progress bar where a person looks on, plain lines elsewhere; all of it on standard error."""
    screen = console(stderr=True)
    if quiet:
        yield Lines(lambda _line: None)
    elif not screen.is_terminal:
        yield Lines(lambda line: print(line, file=sys.stderr, flush=True))
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[said]}"),
            TimeElapsedColumn(),
        )
        with Bar(*columns, console=screen, transient=True) as bar:
            yield _BarReport(bar)


class _BarReport:
    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._tasks: dict[str, TaskID] = {}

    def say(self, line: str) -> None:
        self._bar.console.print(Text(show_line(line)))

    def progress(self, progress: Progress) -> None:
        if progress.step not in self._tasks:
            self._tasks[progress.step] = self._bar.add_task(progress.step, total=None, said="")
        task, share, said = self._tasks[progress.step], progress.share, show_bytes(progress.done_bytes)
        if share is None:
            self._bar.update(task, said=said)
        else:
            self._bar.update(task, total=1.0, completed=share, said=said)
