"""The operator's door: `backup-pipeline`, a thin shell over actions/. Works with Dagster down.

Parses, opens, calls one action, shows its result, and turns errors into exit codes
(errors.EXIT_CODES). Results go to standard output, what happens meanwhile to standard error.
"""

import dataclasses
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from backup_pipeline import terminal
from backup_pipeline.actions import backups, check_cluster, dump, setup
from backup_pipeline.actions import prove as proving
from backup_pipeline.actions.protected import Protected
from backup_pipeline.commands import base_backup as base_commands
from backup_pipeline.commands import cluster_tables
from backup_pipeline.commands import drill as drill_commands
from backup_pipeline.commands.context import Context, json_option, now, pass_context
from backup_pipeline.commands.heartbeat import heartbeat
from backup_pipeline.commands.promote import promote
from backup_pipeline.commands.prune import pin, prune, unpin
from backup_pipeline.commands.recover import recover
from backup_pipeline.commands.restore import restore, undo
from backup_pipeline.commands.wal import wal
from backup_pipeline.config import StoreConfig
from backup_pipeline.config_file import store_location
from backup_pipeline.domain.backup import MANUAL_TIER, Backup, BackupId, CatalogListing, Proof, Verdict
from backup_pipeline.errors import EXIT_CODES, BackupError
from backup_pipeline.storage import base_backups, catalog_rebuild
from backup_pipeline.units import show_count, show_line

_EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES)


@click.group(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config", metavar="FILE", help="The configuration; else $BACKUP_PIPELINE_CONFIG, else ./backups.toml."
)
@click.option(
    "--store", "store_url", metavar="URL", help="Work from a store alone, with the configuration lost."
)
@click.option("--endpoint", default="", metavar="URL", help="With --store: the S3 server's address.")
@click.option("--region", default="", help="With --store: the S3 region.")
@click.option("--quiet", is_flag=True, help="No progress, only results and errors.")
@click.version_option(package_name="backup-pipeline")
@click.pass_context
def cli(
    context: click.Context, config: str | None, store_url: str | None, endpoint: str, region: str, quiet: bool
) -> None:
    """PostgreSQL backups that are proven, or do not count."""
    if not store_url and (endpoint or region):
        raise click.UsageError(f"{'--endpoint' if endpoint else '--region'} is only read with --store")
    if store_url and config:
        raise click.UsageError("--store does without a configuration: leave out --config")
    store = (
        StoreConfig(store_location(store_url, Path.cwd() / "backups.toml"), endpoint, region)
        if store_url
        else None
    )
    context.obj = Context(config, store, quiet)


@cli.command()
@click.option(
    "--dsn",
    default="",
    help="The database to protect; else what PGHOST, PGPORT, PGUSER, PGDATABASE say; else the local server. "
    "Its password comes from PGPASSWORD, a passfile or a service file.",
)
@click.option(
    "--store", "store_url", default="", help="Where backups go; else a folder beside the configuration."
)
@click.option(
    "--output", default="backups.toml", show_default=True, help="The file to write; never overwritten."
)
@pass_context
def init(context: Context, dsn: str, store_url: str, output: str) -> None:
    """Look at what is there, write a commented backups.toml, check it, say what to do next."""
    written = setup.initialise(Path(output).absolute(), dsn=dsn, store_url=store_url)
    for line in written.lines:
        click.echo(line)
    context = Context(str(written.path), None, context.quiet)
    _check(context, list(context.config.databases))


@cli.command()
@click.argument("database", metavar="[DATABASE|CLUSTER]", required=False)
@json_option
@pass_context
def check(context: Context, database: str | None, as_json: bool) -> None:
    """Try everything that a backup needs; all that is written is a scratch object in the store."""
    _check(context, context.subjects(database), as_json=as_json)


def _check(context: Context, names: Sequence[str], *, as_json: bool = False) -> None:
    """Show each thing as soon as it is known, or all in the end as JSON."""
    failed: BackupError | None = None
    looked: list[dict[str, object]] = []
    show = (lambda _line: None) if as_json else click.echo
    for name in names:
        show(f"{name}:")
        found: list[dict[str, object]] = []
        is_cluster = name in context.config.clusters
        looked.append({"cluster" if is_cluster else "database": name, "checks": found, "error": None})
        try:
            for item in (
                check_cluster.check(context.cluster(name), now=now())
                if is_cluster
                else setup.check(context.protected(name))
            ):
                found.append(dataclasses.asdict(item))
                show(f"  {setup.in_words(item)}")
        except BackupError as error:
            show("  FAILED: " + str(error).replace("\n", "\n  "))
            looked[-1]["error"] = error.message
            failed = error
    if as_json:
        terminal.print_json(looked)
    if failed:
        raise SystemExit(failed.exit_code)


@cli.command()
@click.argument("database")
@click.option("--tier", default=MANUAL_TIER, show_default=True, help="Take it as a backup of this tier.")
@click.option("--prove/--no-prove", "wanted", default=None, help="Prove it now, or not; else as configured.")
@json_option
@pass_context
def backup(context: Context, database: str, tier: str, wanted: bool | None, as_json: bool) -> None:
    """Take a dump, and prove it. Without --tier it expires by itself."""
    context.configured(database)
    protected = context.protected(database)
    with terminal.reporting(quiet=context.quiet) as report:
        taken = dump.take(protected, tier=tier, scheduled_for=None, clock=now, report=report, proving=wanted)
        if wanted is None:
            wanted = proving.due_at_once(protected, taken)
        proof = proving.prove(protected, taken.id, clock=now, report=report) if wanted else None
    _show(protected, taken.id, as_json=as_json)
    _exit_unproven(protected, taken.id, proof)


@cli.command("list")
@click.argument("database", metavar="[DATABASE|CLUSTER]", required=False, default="")
@json_option
@pass_context
def list_(context: Context, database: str, as_json: bool) -> None:
    """Show the backups that exist in the store, newest first."""
    bases = base_commands.listing(context, database)
    windows = base_commands.windows(context, database, bases)
    drilled = drill_commands.listing(context, database)
    if database in context.config.clusters:
        found = CatalogListing(())
    elif database:
        found = backups.listing(context.protected(database))
    else:
        each = (context.protected(name) for name in context.config.databases)
        found = backups.listing_of_all(context.store(), each)
    if as_json:
        records = [terminal.backup_record(item) for item in found.backups]
        clusters = (
            *map(cluster_tables.base_record, bases.backups),
            *map(cluster_tables.windows_record, windows),
            *map(drill_commands.drill_record, drilled.drills),
        )
        terminal.print_json([*records, *clusters])
    elif not found.backups and not bases.backups:
        click.echo(f"no backups{f' of {database}' if database else ''} in {context.config.store.url}")
    if found.backups and not as_json:
        terminal.print_table(terminal.backups_table(found.backups, now()))
    if bases.backups and not as_json:
        terminal.print_table(cluster_tables.bases_table(bases.backups, now()))
    if windows and not as_json:
        terminal.print_table(cluster_tables.windows_table(windows))
    if drilled.drills and not as_json:
        terminal.print_table(drill_commands.drills_table(drilled.drills, now()))
    for key, reason in dict.fromkeys((*found.unreadable, *bases.unreadable, *drilled.unreadable)):
        click.echo(show_line(f"UNREADABLE {key}: {reason}"), err=True)


@cli.command()
@click.argument("backup_id", metavar="ID")
@json_option
@pass_context
def show(context: Context, backup_id: str, as_json: bool) -> None:
    """Everything that is known of one backup."""
    if (base := base_commands.find(context, backup_id)) is not None:
        base_commands.show(context, base, as_json=as_json)
        return
    protected = context.owner_of(backup_id)
    _show(protected, backups.find(protected, backup_id).id, as_json=as_json)


def _show(protected: Protected, backup_id: BackupId, *, as_json: bool) -> None:
    found = backups.load(protected, backup_id)
    if as_json:
        terminal.print_json(terminal.backup_record(found))
    else:
        where = (protected.imports or protected.store).url if found.manifest is None else protected.store.url
        terminal.print_table(terminal.backup_details(found, where, now()))
    _exit_failed(found)


def _exit_failed(found: Backup) -> None:
    """Let a script know of a backup that is known to be wrong."""
    if found.verdict is Verdict.FAILED:
        raise SystemExit(7)


@cli.command()
@click.argument("database")
@click.option("--backup", "wanted", default="latest", show_default=True, help='An id or "latest".')
@json_option
@pass_context
def prove(context: Context, database: str, wanted: str, as_json: bool) -> None:
    """Restore into an empty server and compare row for row; record the verdict."""
    protected = context.protected(database)
    found = backups.find(protected, wanted)
    with terminal.reporting(quiet=context.quiet) as report:
        proof = proving.prove(protected, found.id, clock=now, report=report)
    found = backups.load(protected, found.id)
    if as_json:
        terminal.print_json(terminal.proof_record(found, proof))
    else:
        terminal.print_table(terminal.proof_details(found, proof))
    _exit_failed(found)
    _exit_unproven(protected, found.id, proof)


def _exit_unproven(protected: Protected, backup_id: BackupId, proof: Proof | None) -> None:
    """Let a script know when a proof was made and does not say what the configuration asks for."""
    if proof is not None and not proving.as_asked(proof, backup_id, protected.config):
        raise SystemExit(8)


@cli.command()
@json_option
@pass_context
def probe(context: Context, as_json: bool) -> None:
    """Try what the store really does, on scratch keys, and print it."""
    from backup_pipeline.storage import bucket  # boto3 costs half a second

    results = bucket.probe(context.store())
    if as_json:
        terminal.print_json([dataclasses.asdict(result) for result in results])
    else:
        for result in results:
            click.echo(f"{result.status:<8} {result.name}: {result.found}")
            if result.consequence:
                click.echo(f"         {result.consequence}")
    if any(result.status == "failed" for result in results):
        raise SystemExit(5)


@cli.command()
@json_option
@pass_context
def rebuild(context: Context, as_json: bool) -> None:
    """Write a lost catalog anew from the copies that lie beside the backups."""
    rebuilt = catalog_rebuild.rebuild(context.store())
    refused, done = list(rebuilt.refused), list(rebuilt.backups)
    for name in context.config.clusters:
        found, problems = base_backups.rebuild(context.store(), name)
        refused, done = [*refused, *problems], [*done, *found]
    for key, reason in refused:
        click.echo(show_line(f"NOT REBUILT {key}: {reason}"), err=True)
    if as_json:
        told = [{"key": key, "reason": reason} for key, reason in refused]
        terminal.print_json({"rebuilt": [str(item) for item in done], "refused": told})
        return
    for item in done:
        click.echo(f"rebuilt {item}")
    click.echo(f"{show_count(len(done), 'manifest')} rebuilt")


for command in (
    restore,
    undo,
    wal,
    base_commands.base_backup,
    recover,
    promote,
    heartbeat,
    drill_commands.drill,
    prune,
    pin,
    unpin,
):
    cli.add_command(command)


def main() -> None:
    """Run the command line; the exit code says what kind of failure it was."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is taken back
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Abort:
        click.echo("aborted: what was finished stays, and the command may be run again", err=True)
        sys.exit(130)
    except BackupError as error:
        click.echo(f"ERROR: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
