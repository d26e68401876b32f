"""A protected cluster for the pictures: base backups, a look at its WAL, a drill, a recovery.

Called by take_screenshots.py. What is pictured is its caller's.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from backup_pipeline.config import load
from backup_pipeline.storage.store import open_store
from backup_pipeline.wal import client
from backup_pipeline_tests.actions.recovery_box import RecoveryBox, a_recovery_box
from backup_pipeline_tests.e2e.dagster_box import DagsterBox
from backup_pipeline_tests.servers import postgres as servers

CLUSTER = "main"
DAYS = 3
ROWS = 20_000
_DEMOS = re.compile(r"^\[clusters\.main\]$.*?(?=^\[)", re.MULTILINE | re.DOTALL)
_TABLE = """\
[clusters.main]
dsn = "{dsn}"
bin_dir = "{bin_dir}"
recovery_window = "1m"
base_backup = {{ cron = "0 2 * * *", checkpoint = "fast" }}
owner = "team:platform"

"""


@dataclass(frozen=True)
class ClusterStory:
    """The runs that the pictures show."""

    base_backup: str
    planned: str


@contextlib.contextmanager
def cluster(configuration: Path, folder: Path) -> Iterator[tuple[RecoveryBox, Path]]:
    """A cluster that archives into the store of `configuration`, and a configuration that names both."""
    store = open_store(load(str(configuration)).store)
    # `shipping` does what the agent would; the command is one that the checks take for ours.
    command = f"true {Path(client.__file__)}"
    with a_recovery_box(servers.bin_dir_17(), store, archive_command=command) as box:
        box.commit(1, switch=True)
        text = with_cluster(configuration.read_text(encoding="utf-8"), box.cluster.endpoint().dsn)
        named = folder / "backups.toml"
        named.write_text(text, encoding="utf-8")
        with box.shipping():
            yield box, named


def with_cluster(reference: str, dsn: str) -> str:
    """The reference configuration, with the pictures' cluster in the place of the demo's."""
    table = _TABLE.format(dsn=dsn, bin_dir=servers.bin_dir_17())
    text, count = _DEMOS.subn(lambda _: table, reference)
    if count != 1:
        raise ValueError(f"the reference has {count} tables [clusters.main], and should have one")
    return text


def tell_of_cluster(dagster: DagsterBox, box: RecoveryBox) -> ClusterStory:
    """What an operator's week brings, in a minute or two."""
    run = ""
    for day in range(DAYS):
        with box.session() as session:
            session.execute("CREATE TABLE IF NOT EXISTS public.days (n bigint, text text)")
            session.execute(
                "INSERT INTO public.days SELECT n, md5(n::text) FROM generate_series(1, %s) AS n",
                [ROWS * (day + 1)],
            )
        run = dagster.launch("take_base_backup")
        dagster.wait_for_run(run, timeout_s=180)
        box.commit(1, switch=True)
        dagster.wait_for_run(dagster.launch("__ASSET_JOB", assets=[[CLUSTER, "wal"]]))
    dagster.wait_for_run(dagster.launch("drill_recovery"), timeout_s=180)
    dagster.wait_for_run(dagster.launch("__ASSET_JOB", assets=[[CLUSTER, "wal"]]))
    planned = dagster.launch("recover_cluster", {"into": "/var/lib/postgresql/17/recovered"})
    dagster.wait_for_run(planned, timeout_s=180)
    return ClusterStory(run, planned)
