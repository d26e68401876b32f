"""The replay of a recovery: a server of its own, handed the WAL that it asks for, until it is at its target.

Called by recover.py, once the base backup is in place. How PostgreSQL is told, and what its log says, is
engines/postgres/recovery.py's; WAL is fetched ahead by wal/prefetch.py.
"""

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.actions.recovery_place import Workplace
from backup_pipeline.actions.recovery_plan import Plan
from backup_pipeline.actions.report import Report
from backup_pipeline.domain.recovery_target import RecoveryTarget
from backup_pipeline.engines.postgres import recovery
from backup_pipeline.engines.postgres.cluster import LocalCluster, runs_as
from backup_pipeline.engines.postgres.recovery import ControlFile, Recovered
from backup_pipeline.errors import BackupError, ServerError, ToolError
from backup_pipeline.process import Identity
from backup_pipeline.spool import private_folder
from backup_pipeline.wal import client
from backup_pipeline.wal.fetch import fetch
from backup_pipeline.wal.prefetch import Prefetch, serving

_LATEST_ANSWER_S = 30 * 24 * 3600.0
_SPOOL = "pg_wal/backup_pipeline"  # its own file system, where pg_wal has one
_PYTHONS = ("/usr/bin/python3", "/usr/local/bin/python3")


def replay(
    cluster: ProtectedCluster, planned: Plan, work: Workplace, control: ControlFile, report: Report
) -> Recovered:
    """Let PostgreSQL replay, and see what it came to; the server has ended on return.

    Raises Refused, ToolError for a target that it did not meet, ServerError, and what fetching WAL raises.
    """
    target, identity, data = planned.request.target, work.owner, work.inside.data
    prefetch = Prefetch(
        partial(_fetch, cluster, planned, planned.facts.keys(planned.judged.route.segments), report),
        [segment.name(planned.manifest.segment_bytes) for segment in planned.judged.route.segments],
        data / _SPOOL,
        owner=identity,
        patience_s=planned.request.patience_s,
        tell=report.say,
    )
    with _socket_folder(identity) as beside, serving(prefetch, beside / "fetch"):
        python = _python(identity)
        settings = recovery.recovery_settings(
            target,
            to_the_end=planned.judged.to_the_end,
            timeline=planned.judged.route.timeline,
            restore_command=restore_command(python, beside / "fetch", beside),
            control=control,
        )
        server = LocalCluster(
            planned.tools.bin_dir,
            work.folder,
            settings=settings,
            # WAL may make a tablespace where its source has one: files that are not ours.
            confined=not planned.request.unconfined,
            insists=not planned.request.unconfined,
            readable=(str(beside), *_installation(python)),
            writable=tuple(map(str, (*work.inside.tablespaces.values(), *planned.request.also_write))),
        )
        server.answers = partial(recovery.is_ready, server.log)
        try:
            recovered = _await(server, planned, prefetch)
        finally:
            server.stop()
    recovery.check_stopped(planned.tools.path("pg_controldata"), data, recovered)
    shutil.rmtree(data / _SPOOL)
    return recovered


def _fetch(
    cluster: ProtectedCluster,
    planned: Plan,
    keys: Mapping[str, str],
    report: Report,
    name: str,
    path: Path,
) -> None:
    manifest, route = planned.manifest, planned.judged.route
    system = manifest.system_identifier
    fetched = fetch(cluster.store, cluster.name, name, path, system_identifier=system, key=keys.get(name, ""))
    if route.partial is not None and name == route.partial.name(manifest.segment_bytes):
        # More of it may have been archived since. A recovery keeps to its plan.
        os.truncate(path, route.end.value - route.partial.start(manifest.segment_bytes).value)
        os.truncate(path, manifest.segment_bytes)
    report.say(f"fetched {fetched.name}")


def _await(server: LocalCluster, planned: Plan, prefetch: Prefetch) -> Recovered:
    target = planned.request.target
    try:
        server.create()  # opens its folder to the server's user
        server.start(timeout_s=_LATEST_ANSWER_S)
    except ToolError as error:
        log = _log_of(server)
        if prefetch.failure is not None:
            raise _while_recovering(prefetch.failure, target) from error
        raise recovery.explain(error, log, target, server.data) or error from error
    recovered = recovery.read_recovered(
        _log_of(server), target, to_the_end=planned.judged.to_the_end, route=planned.judged.route
    )
    if planned.judged.to_the_end:
        missed = [name for name in prefetch.order if name not in prefetch.brought]
        if missed:
            raise ServerError(
                f"the recovery to {target} cannot be believed: {missed[0]} was archived and not replayed",
                detail={"replayed to": str(recovered.replayed_to)},
            )
    return recovered


def _while_recovering(error: BackupError, target: RecoveryTarget) -> BackupError:
    error.detail["while"] = f"recovering to {target}"
    return error


def _log_of(server: LocalCluster) -> str:
    # There is none where it was not started at all.
    return server.log.read_text(encoding="utf-8", errors="replace") if server.log.exists() else ""


def restore_command(python: str, socket: Path, folder: Path) -> str:
    """The setting: our client, copied into `folder`, where the server's user can read it."""
    program = folder / "client.py"
    shutil.copyfile(client.__file__, program)
    program.chmod(0o644)
    words = (python, "-I", "-S", str(program), "fetch", "--socket", str(socket))
    return f"{shlex.join(words).replace('%', '%%')} %f %p"


def _python(identity: Identity | None) -> str:
    """A Python that the server's user can run; the client needs no library."""
    python = next((path for path in (sys.executable, *_PYTHONS) if runs_as(Path(path), identity)), "")
    if not python:
        raise ToolError(
            f"the server's user can run no Python: neither {sys.executable} nor {' nor '.join(_PYTHONS)}",
            hint="Install python3 for all users, or run this as a user other than root.",
        )
    return python


def _installation(python: str) -> tuple[str, ...]:
    """The folders that a Python loads itself from."""
    if python != sys.executable:
        return ()  # the system's own
    return tuple(dict.fromkeys((sys.prefix, sys.base_prefix, str(Path(python).resolve().parent.parent))))


@contextlib.contextmanager
def _socket_folder(identity: Identity | None) -> Iterator[Path]:
    """A folder with a short path that only we and the server's user may enter."""
    with private_folder("fetch") as folder:
        if identity is not None:
            os.chown(folder, os.getuid(), identity.gid)
            folder.chmod(0o710)
        yield folder
