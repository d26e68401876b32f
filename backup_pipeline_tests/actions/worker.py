"""A process that dumps, prunes and restores over its source, to be killed at any moment.

python -m backup_pipeline_tests.actions.worker STORE DATABASE_DSN SERVER_DSN BIN_DIR forever|once
"""

import sys
from datetime import timedelta
from pathlib import Path

from backup_pipeline.actions import dump, prune, restore
from backup_pipeline.actions.protected import Protected
from backup_pipeline.config import DatabaseConfig, Secret, TierConfig
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.process import Command
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline_tests.actions.box import NAME, Box, Said, now

READY = b"ready\n"


def command(box: Box, how_long: str) -> Command:
    """The process that works on the source and store of `box`."""
    config = box.protected.config
    assert config.restore_dsn is not None
    places = (str(box.store.root), config.dsn.reveal(), config.restore_dsn.reveal(), config.bin_dir)
    return Command((sys.executable, "-m", __name__, *places, how_long))


def main(root: str, dsn: str, server: str, bin_dir: str, how_long: str) -> None:
    """Work until killed, or once."""
    config = DatabaseConfig(
        NAME,
        dsn=Secret(dsn),
        restore_dsn=Secret(server),
        bin_dir=bin_dir,
        tiers=(TierConfig("daily", "0 2 * * *", 1),),
        lock_timeout=timedelta(seconds=30),
    )
    protected, said = Protected(config, DirectoryStore(Path(root))), Said()
    asked = restore.RestoreRequest("latest", replace=True, confirm=Endpoint(dsn).database, check="counts")
    sys.stdout.buffer.write(READY)
    sys.stdout.flush()
    while True:
        dump.take(protected, tier="daily", scheduled_for=None, clock=now, report=said)
        planned = prune.plan(protected.store, config, now=now())
        prune.carry_out(protected.store, planned, clock=now, log=said.say)
        plan = restore.plan(protected, asked, clock=now)
        restore.carry_out(protected, plan, clock=now, report=said)
        if how_long == "once":
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
