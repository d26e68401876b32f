"""`wal receive`, and what `wal setup --receive` shows: WAL read through a replication slot.

Called by commands/wal.py's group. The receiver is wal/receive.py.
"""

import signal
import threading
from collections.abc import Iterator

import click

from backup_pipeline.actions.heartbeat import keep_beating
from backup_pipeline.commands.context import Context, now, pass_context
from backup_pipeline.config import ClusterConfig, ReceiveConfig
from backup_pipeline.engines.postgres import slots
from backup_pipeline.engines.postgres.replication import Session, replication_session
from backup_pipeline.errors import ConfigError
from backup_pipeline.wal.archive import WalArchive
from backup_pipeline.wal.identity import System, adopt, claim, read_identity
from backup_pipeline.wal.receive import ReceiveOptions, Receiver
from backup_pipeline.wal.slot_status import NO_LIMIT

_ANSWER_S = 60.0


@click.command()
@click.argument("cluster")
@click.option(
    "--accept-gap", is_flag=True, help="Begin behind WAL that the server no longer has, and leave the gap."
)
@pass_context
def receive(context: Context, cluster: str, accept_gap: bool) -> None:
    """Read a cluster's WAL through a replication slot, and archive it, until SIGTERM or Ctrl-C."""
    protected = context.cluster(cluster)
    wanted = _wanted(protected.config)
    stop = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: stop.set())

    def log(line: str) -> None:
        click.echo(line, err=True)

    if protected.config.heartbeat:
        beats = (protected.config, stop)
        threading.Thread(target=keep_beating, args=beats, kwargs={"log": log}, daemon=True).start()
    receiver = Receiver(
        WalArchive(protected.store, cluster),
        protected.source,
        ReceiveOptions(wanted.slot, wanted.ship_every.total_seconds(), accept_gap),
        now,
        log,
    )
    receiver.run(stop)
    click.echo("what was read is archived; the slot keeps what follows", err=True)


def show_setup(context: Context, cluster: str, *, apply_: bool, adopt_: bool) -> None:
    """Try the connection that the receiver will have, and say what is missing; begin the archive if asked."""
    protected = context.cluster(cluster)
    wanted = _wanted(protected.config)
    with replication_session(protected.source(), purpose="wal setup", stall_s=_ANSWER_S) as session:
        server = slots.identify(session)
        system = System(server.system_identifier, slots.read_segment_bytes(session))
        lines = list(_setup_lines(session, wanted))
    click.echo(f"# the server lets us read the WAL of PostgreSQL system {system.identifier}")
    for line in lines:
        click.echo(line)
    if apply_ or adopt_:
        (adopt if adopt_ else claim)(protected.store, cluster, system, at=now())
        click.echo(f"# the archive of {cluster} belongs to PostgreSQL system {system.identifier}")
    elif read_identity(protected.store, cluster) is None:
        click.echo(f"# there is no WAL archive of {cluster} in {protected.store.url} yet; --apply begins it")


def _setup_lines(session: Session, wanted: ReceiveConfig) -> Iterator[str]:
    found = slots.read_position(session, wanted.slot)
    if found is None:
        free = f"max_replication_slots is {slots.read_setting(session, 'max_replication_slots')}"
        yield f"# there is no slot {wanted.slot} yet: `wal receive` makes it ({free}; it takes one)"
    elif found.lsn is None:
        yield f"# the slot {wanted.slot} is there, and keeps nothing: it was never used, or is LOST"
    else:
        yield f"# the slot {wanted.slot} is there: archived up to {found.lsn}"
    limit = slots.read_setting(session, "max_slot_wal_keep_size")
    if limit == "-1":
        yield (
            f"# NOTE: a slot keeps WAL with {NO_LIMIT}: while nothing is received, pg_wal grows. A limit "
            "saves the server's disk, and costs a gap when it is reached"
        )
    else:
        yield f"# NOTE: beyond {limit} (max_slot_wal_keep_size) that is not archived, the slot is lost: a gap"
    yield (
        "# to give it up, or the server keeps its WAL for ever: "
        f"SELECT pg_drop_replication_slot('{wanted.slot}');"
    )


def _wanted(config: ClusterConfig) -> ReceiveConfig:
    if config.receive is None:
        raise ConfigError(
            f"cluster {config.name} is not to be received",
            hint=f"Add to [clusters.{config.name}]: receive = {{}}",
        )
    return config.receive
