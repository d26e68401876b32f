"""How long PostgreSQL's recovery takes to replay segments that a given restore_command brings.

Called by wal.py. Each replay begins with the same data directory, copied anew, and ends at the same record.
"""

import re
import shutil
from collections.abc import Sequence
from functools import partial

from backup_pipeline import process
from backup_pipeline.domain.wal import parse_wal_name
from backup_pipeline.engines.postgres import recovery
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.errors import ToolError
from backup_pipeline.process import Command
from benchmarks.measure import Work, working
from benchmarks.wal_contenders import Contender
from benchmarks.wal_ground import Ground

_BEGIN = re.compile(r"^(?P<at>[0-9.]+) .*starting point-in-time recovery", re.MULTILINE)
_END = re.compile(r"^(?P<at>[0-9.]+) .*redo done at", re.MULTILINE)
_RESTORED = re.compile(r'restored log file "(?P<name>[0-9A-F]{24})"')
_SEGMENT_BYTES = 16 * 1024 * 1024
_WITHIN_S = 900.0


def replay(ground: Ground, contender: Contender, turn: str, names: Sequence[str]) -> Work:
    """Recover to the last of `names`, from its archive of this `turn`. Raises ToolError when that fails.

    The time is PostgreSQL's own, from the beginning of the recovery to the end of the redo.
    """
    if contender.fetch is None:
        raise ToolError(f"{contender.title} fetches nothing")
    folder = ground.made("replay")
    copying = Command(("cp", "--archive", "--reflink=auto", str(ground.template), str(folder / "data")))
    process.run(copying, timeout_s=600.0)
    (folder / "data" / "recovery.signal").touch()
    ground.give(folder / "data" / "recovery.signal")
    ground.sync()
    with contender.fetch(ground, turn) as command, working() as work:
        server = LocalCluster(ground.cluster.bin_dir, folder, settings=_settings(command, names[-1]))
        server.answers = partial(recovery.is_ready, server.log)
        try:
            server.start(timeout_s=_WITHIN_S)
        finally:
            server.stop()
    log = server.log.read_text(encoding="utf-8", errors="replace")
    shutil.rmtree(folder)
    begin, end = _BEGIN.search(log), _END.search(log)
    brought = set(_RESTORED.findall(log))
    if begin is None or end is None or set(names) - brought:
        raise ToolError(f"no recovery as wanted by: {command}", detail={"log": log[-2000:]})
    return work.done.lasting(float(end["at"]) - float(begin["at"]))


def _settings(command: str, last: str) -> dict[str, str]:
    """A recovery that ends with the last whole record of a segment."""
    number = parse_wal_name(last).number(_SEGMENT_BYTES)
    end = (number + 1) * _SEGMENT_BYTES - 8192
    return {
        "restore_command": command,
        "recovery_target_lsn": f"{end >> 32:X}/{end & 0xFFFFFFFF:X}",
        "recovery_target_action": "promote",
        "recovery_prefetch": "off",  # as our recoveries have it
        "hot_standby": "off",
        "log_line_prefix": "%n ",
        "shared_buffers": "512MB",
        "max_wal_size": "4GB",  # no restart point on the way
        "checkpoint_timeout": "1h",
    }
