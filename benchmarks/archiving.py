"""How long PostgreSQL's archiver takes to drain a backlog by a given archive_command.

Called by wal.py. The server runs on; the same segments are made to wait again for each drain.
"""

import contextlib
import time
from collections.abc import Sequence

from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.errors import ToolError
from benchmarks.measure import Work, working
from benchmarks.wal_ground import Ground

_WITHIN_S = 900.0
_POLL_S = 0.003
_LOOK_S = 10.0
_DONE = ".done"


def drain(ground: Ground, command: str, names: Sequence[str]) -> Work:
    """Have `names`, and nothing else, archived by `command`. Raises ToolError when that fails."""
    status = ground.wal / "archive_status"
    ground.is_waiting(names)
    failed, last = _failures(ground), status / f"{names[-1]}{_DONE}"
    ground.sync()
    with working() as work:
        ground.archive_by(command)
        look_s = _LOOK_S
        while not last.exists():
            time.sleep(_POLL_S)
            if work.elapsed_s < look_s:
                continue
            look_s += _LOOK_S  # seldom: a session costs the server as much as archiving a segment
            if look_s > _WITHIN_S or _failures(ground) > failed:
                raise ToolError(f"archiving failed by: {command}", detail={"log": ground.last_words()})
    ground.archive_by("")
    left = [name for name in names if not (status / f"{name}{_DONE}").exists()]
    if left or _failures(ground) > failed:
        raise ToolError(f"not everything was archived by: {command}", detail={"log": ground.last_words()})
    return work.done


def _failures(ground: Ground) -> int:
    with contextlib.closing(connect(ground.cluster.endpoint())) as session:
        row = session.execute("SELECT failed_count FROM pg_stat_archiver").fetchone()
    return int(str(row[0])) if row else 0
