"""`wal agent`, `push`, `receive`, `setup`, `status`: a cluster's WAL on its way into the archive.

Called by cli.py. What archive_command starts is wal/client.py, which comes here when no agent answers.
"""

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

import click

from backup_pipeline import terminal
from backup_pipeline.actions.heartbeat import keep_beating
from backup_pipeline.actions.protected_cluster import ProtectedCluster
from backup_pipeline.actions.wal_look import wal_status
from backup_pipeline.commands import cluster_tables, wal_receive
from backup_pipeline.commands.context import Context, json_option, now, pass_context
from backup_pipeline.config import ClusterConfig
from backup_pipeline.engines.postgres.archiving import (
    alter_system,
    find_missing,
    read_archiving,
)
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import Connection, connect, read_server_info, server_errors
from backup_pipeline.errors import ConfigError, ServerError
from backup_pipeline.wal.agent import Agent, AgentConfig
from backup_pipeline.wal.archive import WalArchive
from backup_pipeline.wal.identity import System, adopt, claim, read_identity
from backup_pipeline.wal.setup import (
    SetupPlan,
    archive_command,
    needed_files,
    plan_setup,
    refuse_elsewhere,
    refuse_unreadable,
    refuse_unseen,
)
from backup_pipeline.wal.status import ask_agent

_TIMED_OUT = 75


@click.group()
def wal() -> None:
    """Archive a cluster's WAL, so that any moment can be recovered."""


@wal.command()
@click.argument("cluster")
@pass_context
def agent(context: Context, cluster: str) -> None:
    """Run beside PostgreSQL, as its own user, and archive what it hands over, and what comes next."""
    config = context.config.cluster(cluster)
    _refuse_another_user(config)
    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())
    served = Agent(
        AgentConfig(
            Path(config.agent_socket),
            config.name,
            config.push_timeout.total_seconds(),
            version("backup_pipeline"),
        ),
        _archive(context, config),
        log=lambda line: click.echo(line, err=True),
    )
    if config.heartbeat:
        log = partial(click.echo, err=True)
        beats = threading.Thread(target=keep_beating, args=(config, stop), kwargs={"log": log}, daemon=True)
        beats.start()
    served.serve(stop)


@wal.command()
@click.argument("cluster")
@click.argument("path", type=click.Path(path_type=Path))
@pass_context
def push(context: Context, cluster: str, path: Path) -> None:
    """Archive one file of pg_wal; ends with 0 only when it is there, durable."""
    config = context.config.cluster(cluster)
    with _deadline(config.push_timeout.total_seconds(), f"{path.name} was not archived in time"):
        pushed = _archive(context, config).push(path.absolute())
    if not context.quiet:
        click.echo(f"{pushed.name} {'was archived already' if pushed.already else 'is archived'}", err=True)


@wal.command()
@click.argument("cluster")
@click.option(
    "--apply", "apply_", is_flag=True, help="Begin the archive, and change the settings, by ALTER SYSTEM."
)
@click.option("--adopt", "adopt_", is_flag=True, help="Have the archive go over to this server's system.")
@click.option("--replace-command", is_flag=True, help="Replace another archive_command or archive_library.")
@click.option("--receive", "receive_", is_flag=True, help="For `wal receive`: no setting is changed.")
@pass_context
def setup(
    context: Context, cluster: str, apply_: bool, adopt_: bool, replace_command: bool, receive_: bool
) -> None:
    """Show what the server needs in order to archive here; with --apply, set it and begin the archive."""
    if receive_:
        wal_receive.show_setup(context, cluster, apply_=apply_, adopt_=adopt_)
        return
    config, store = context.config.cluster(cluster), context.store()
    with _session(config, "wal setup") as (endpoint, session):
        info, archiving = read_server_info(session), read_archiving(session)
        if not info.system_identifier:
            raise ServerError(
                f"the role of clusters.{cluster} may not see the server's system identifier",
                hint="Name a superuser's dsn, or grant it pg_monitor and execution of pg_control_system().",
            )
        command = archive_command(config, context.config.path)
        plan = plan_setup(archiving, config, context.config.store, command, replace_command=replace_command)
        if apply_:
            refuse_elsewhere(cluster, archiving.data_directory)
            refuse_unreadable(Path(archiving.data_directory))
            refuse_unseen(cluster, find_missing(session, needed_files(context.config.path)))
        system = System(info.system_identifier, archiving.segment_bytes)
        if adopt_ or apply_:
            (adopt if adopt_ else claim)(store, config.name, system, at=now())
            click.echo(f"# the archive of {cluster} belongs to PostgreSQL system {system.identifier}")
        elif read_identity(store, config.name) is None:
            click.echo(f"# there is no WAL archive of {cluster} in {store.url} yet; --apply begins it")
        if apply_ and plan.changes:
            alter_system(session, endpoint, plan.values)
    _show_plan(plan, cluster, applied=apply_)


def _show_plan(plan: SetupPlan, cluster: str, *, applied: bool) -> None:
    for change in plan.changes:
        click.echo(change.line)
    said = "set by ALTER SYSTEM, and reloaded" if applied else "for postgresql.conf; --apply sets it"
    click.echo(f"# {said}" if plan.changes else f"# the server of {cluster} is set up")
    if plan.restart:
        click.echo(f"# RESTART the server: {', '.join(plan.restart)} take effect no sooner")
    for note in plan.notes:
        click.echo(f"# NOTE: {note}")


@wal.command()
@click.argument("cluster")
@json_option
@pass_context
def status(context: Context, cluster: str, as_json: bool) -> None:
    """Show whether WAL arrives in the archive, and how far behind it is; 5 when something is wrong."""
    config = context.config.cluster(cluster)
    found = wal_status(ProtectedCluster(config, context.store()), agent=ask_agent(config), at=now())
    if as_json:
        terminal.print_json(cluster_tables.wal_record(found))
    else:
        terminal.print_table(cluster_tables.wal_details(found))
    if found.problems:
        raise SystemExit(5)


def _archive(context: Context, config: ClusterConfig) -> WalArchive:
    folder = Path(config.data_directory) if config.data_directory else None
    return WalArchive(context.store(), config.name, data_directory=folder)


@contextlib.contextmanager
def _session(config: ClusterConfig, purpose: str) -> Iterator[tuple[Endpoint, Connection]]:
    endpoint = Endpoint(config.dsn.reveal(), config.password)
    connection = connect(endpoint, purpose=purpose)
    with contextlib.closing(connection) as session, server_errors(endpoint, f"{purpose} failed"):
        yield endpoint, session


def _refuse_another_user(config: ClusterConfig) -> None:
    """PostgreSQL's own user reads pg_wal and may speak to the agent; nobody else can do both."""
    with contextlib.suppress(OSError):
        if config.data_directory and os.stat(config.data_directory).st_uid != os.getuid():
            raise ConfigError(
                f"the agent of {config.name} has to run as the user that {config.data_directory} belongs to",
                hint=f"runuser -u postgres -- {shlex.join(sys.argv)}",
            )


@contextlib.contextmanager
def _deadline(timeout_s: float, said: str) -> Iterator[None]:
    """End this process when the block takes longer: a store that hangs must not hold PostgreSQL up.

    A thread does it: what waits inside a library is not reached by an exception.
    """

    def end() -> None:
        os.write(2, f"ERROR: {said} ({timeout_s:g} s)\n".encode())
        os._exit(_TIMED_OUT)

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


wal.add_command(wal_receive.receive)
