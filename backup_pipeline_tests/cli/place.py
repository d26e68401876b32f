"""What the tests of the command line share: one run of it, its configuration, its store."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from backup_pipeline.domain.backup import BackupId
from backup_pipeline.storage import catalog
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline_tests.waiting import wait_until

SECRET = "hunter2-and-more"
TEXT = """
[store]
url = "file:store"

[scratch]
dsn = "{scratch}"
bin_dir = "{bin_dir}"

[databases.app]
dsn = "{dsn}"
restore_dsn = "{server}"
bin_dir = "{bin_dir}"
critical_tables = ["public.customer"]
lock_timeout = "500ms"

[databases.app.tiers.daily]
cron = "0 2 * * *"
keep = 1
"""


@dataclass(frozen=True)
class Ran:
    """What one command came to."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


def only(place: Path) -> str:
    """The id of the one backup."""
    (found,) = catalog.list_backups(DirectoryStore(place / "store"), fresh=True).backups
    return str(found.id)


def back_up_later(run: Run, first: str, *, times: int) -> None:
    """Back up again, not in the same second, where the ids' random suffixes would decide which is older."""
    next_second = BackupId.parse(first).taken_at + timedelta(seconds=1)
    wait_until(lambda: datetime.now(UTC) >= next_second)
    for _ in range(times):
        assert run("--quiet", "backup", "app", "--tier", "daily", "--no-prove").code == 0


def configure(place: Path, before: str, after: str) -> None:
    """Change the configuration's text."""
    path = place / "backups.toml"
    path.write_text(path.read_text().replace(before, after))
