"""Prove a backup: restore it into an empty server, take its fingerprint, compare, record the verdict.

Called by cli.py, by Dagster's check and by drills. The restore is the one that operators use
(engines/postgres/); only the place differs. A verdict is about the backup: what goes wrong around it
(a store that does not answer, a scratch server that dies, a full disk) is raised, and records nothing.
"""

import contextlib
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from backup_pipeline.actions import backups
from backup_pipeline.actions.compare import Restored, compare_restored
from backup_pipeline.actions.dump import SOFTWARE
from backup_pipeline.actions.fetch import Fetched, fetch_dump, fetch_imported, fetch_small, imported_header
from backup_pipeline.actions.protected import Clock, Protected
from backup_pipeline.actions.report import Report, loading
from backup_pipeline.config import DatabaseConfig
from backup_pipeline.domain.backup import (
    Backup,
    BackupId,
    DatabaseProperties,
    Manifest,
    ObjectRole,
    Proof,
    Source,
    Verdict,
)
from backup_pipeline.domain.fingerprint import Fingerprint, fingerprint_from_json
from backup_pipeline.domain.plausible import assess_size
from backup_pipeline.domain.proof import verdict_of
from backup_pipeline.engines.postgres import load, restore
from backup_pipeline.engines.postgres.blame import Blame
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.properties import read_properties
from backup_pipeline.engines.postgres.requirements import missing_requirements
from backup_pipeline.engines.postgres.scratch import Scratch, create_roles, scratch_server
from backup_pipeline.engines.postgres.server import connect, read_server_info
from backup_pipeline.engines.postgres.tools import Tools, find_tools, known_vulnerable
from backup_pipeline.errors import BackupError, Corrupt, NotProvable, ObjectNotFound, Refused, ToolError
from backup_pipeline.spool import private_folder, require_free
from backup_pipeline.storage import catalog, leases
from backup_pipeline.units import show_seconds

_ANOTHER_SERVER = "Install or preload it there, or name a server and role that have it with [scratch] dsn."
_REACHES = {Blame.FILES: "reads files of its machine", Blame.NETWORK: "connects to another server"}
_MAY_REACH = "Name a server that may, and is for nothing but proofs, with [scratch] dsn."
_WITH_NETWORK = (
    "the scratch server was not cut off from the network, which this system does not allow: "
    "what the dump runs could have reached other machines"
)
_WITH_FILES = (
    "the scratch server was not kept from this machine's files, which takes a Linux with Landlock, and a "
    "PostgreSQL whose libraries lie beside it or in the system's folders: "
    "what the dump runs could have read what its user may read"
)


@dataclass(frozen=True)
class _Found:
    """What an attempt at a proof came to."""

    verdict: Verdict
    restore_s: float = 0.0
    compare_s: float = 0.0
    checked: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def due_at_once(protected: Protected, backup: Backup) -> bool:
    """Whether this backup is to be proven right after it was taken."""
    if backup.verdict is Verdict.PROVEN or backup.manifest is None:
        return False
    return protected.config.prove.at_once(backup.manifest.source.size_bytes)


def as_asked(proof: Proof, backup_id: BackupId, database: DatabaseConfig) -> bool:
    """Whether a proof says all that the configuration asks for: equal contents, or equal counts.

    An imported dump has no fingerprint: that it restores is all that can be asked of it.
    """
    enough = database.proof == "counts" or backup_id.imported
    return proof.verdict is Verdict.PROVEN or (proof.verdict is Verdict.RESTORED and enough)


def prove(protected: Protected, backup_id: BackupId, *, clock: Clock, report: Report) -> Proof:
    """Restore, compare, record; return the proof, whatever its verdict.

    Raises BackupNotFound, StoreError, ServerError, ToolError, Busy; no verdict is recorded then.
    """
    with leases.hold(protected.store, backup_id, "proof", clock=clock) as lease:
        backup = backups.load(protected, backup_id)
        report.say(f"proving {backup_id}: it is restored into an empty server and compared")
        size = assess_size(*backups.dump_sizes(protected, backup))
        try:
            found = _attempt(protected, backup, report)
        except NotProvable as error:
            left = tuple(getattr(error, "__notes__", ()))
            found = _Found(Verdict.NOT_PROVABLE, differences=_lines(error), notes=left)
        except (Corrupt, ObjectNotFound) as error:
            found = _Found(Verdict.FAILED, differences=_lines(error))
        proof = Proof(
            verdict=found.verdict,
            at=clock(),
            restore_s=found.restore_s,
            compare_s=found.compare_s,
            checked=(*found.checked, *size.checked),
            differences=found.differences,
            notes=(*found.notes, *size.notes),
            by=f"{platform.node()}, backup-pipeline {SOFTWARE}",
        )
        lease.check()
        catalog.record_proof(protected.store, backup_id, proof)
    report.say(f"{backup_id} is {proof.verdict}; restored in {show_seconds(proof.restore_s)}")
    different = (f"DIFFERENT: {line}" for line in proof.differences)
    for line in (*proof.checked, *different, *(f"note: {line}" for line in proof.notes)):
        report.say(f"  {line}")
    return proof


def _attempt(protected: Protected, backup: Backup, report: Report) -> _Found:
    with private_folder("proof") as spool:
        if backup.manifest is None:
            return _imported(protected, backup, spool, report)
        source = backup.manifest.source
        tools = _tools(protected, source.client_version // 10000)
        begun_s = time.monotonic()
        try:
            fetched = fetch_dump(protected.store, backup.manifest, spool, report)
            need = source.size_bytes if protected.scratch.dsn is None else 0
            require_free(spool, need, f"proving {backup.id}")
        except Refused as error:
            raise NotProvable(error.message, hint=error.hint) from error
        for item in backup.manifest.of_role(ObjectRole.GLOBALS):
            fetch_small(protected.store, item)
        (item,) = backup.manifest.of_role(ObjectRole.FINGERPRINT)
        expected = fingerprint_from_json(fetch_small(protected.store, item), item.key)
        with _scratch(protected, source.server_version // 10000, source.system_identifier) as scratch:
            _require(scratch, source)
            create_roles(scratch, (source.database.owner, *source.roles))
            properties = replace(source.database, tablespace="pg_default")
            options = load.LoadOptions(jobs=backup.manifest.jobs, tablespaces=False)
            failed = _load(protected, scratch, properties, fetched, tools, options, report)
            restore_s = time.monotonic() - begun_s
            if failed:
                found = _Found(Verdict.FAILED, restore_s=restore_s, differences=_lines(failed))
            else:
                found = _compare(protected, backup.manifest, expected, scratch, fetched, tools, report)
                unknown = restore.try_analyze(scratch.endpoint, scratch.database)
                found = replace(found, notes=(*found.notes, *unknown))
        return replace(found, restore_s=restore_s, notes=(*found.notes, *_said_of(scratch)))


def _compare(
    protected: Protected,
    manifest: Manifest,
    source: Fingerprint,
    scratch: Scratch,
    fetched: Fetched,
    tools: Tools,
    report: Report,
) -> _Found:
    begun_s = time.monotonic()

    @contextlib.contextmanager
    def spare() -> Iterator[Endpoint]:
        properties = replace(manifest.source.database, tablespace="pg_default")
        with restore.temporary_database(scratch.endpoint, scratch.database, properties) as name:
            yield scratch.endpoint.with_database(name)

    stall_s = protected.config.stall_timeout.total_seconds()
    database = scratch.endpoint.with_database(scratch.database)
    restored = Restored(database, fetched.archive, tools, spare, stall_s)
    comparison = compare_restored(
        source,
        restored,
        contents=source.has_contents,
        connections=protected.config.fingerprint_connections,
        report=report,
    )
    objects = f"{len(manifest.objects)} objects in the store, every byte as it was written"
    return _Found(
        verdict=verdict_of(comparison, "content" if source.has_contents else "counts"),
        compare_s=time.monotonic() - begun_s,
        checked=(objects, f"restored into PostgreSQL {tools.major}", *comparison.checked),
        differences=comparison.differences,
        notes=comparison.notes,
    )


def _imported(protected: Protected, backup: Backup, spool: Path, report: Report) -> _Found:
    """A dump of an older layout has nothing to compare with: that it restores is all there is to find."""
    if protected.imports is None:
        raise NotProvable(f"{backup.id}: no import_from is configured")
    begun_s = time.monotonic()
    try:
        header = imported_header(protected.imports, backup)
    except ToolError as error:
        raise NotProvable(error.message, hint=error.hint) from error
    tools = _tools(protected, header.client_major)
    if hole := known_vulnerable(tools.version):
        raise NotProvable(
            f"{backup.imported_key} has no digest to verify, and {hole}", hint="Update the client tools."
        )
    try:
        fetched = fetch_imported(protected.imports, backup, spool, report)
    except Refused as error:
        raise NotProvable(error.message, hint=error.hint) from error
    with _scratch(protected, header.server_major, _identifier(protected)) as scratch:
        with contextlib.closing(connect(scratch.endpoint, purpose="proof")) as session:
            properties = read_properties(session, scratch.endpoint.database)
        plain = replace(properties, grants=None, settings=(), comment=None, is_template=False)
        options = load.LoadOptions(tablespaces=False, owners=False)
        failed = _load(protected, scratch, plain, fetched, tools, options, report)
        restore_s = time.monotonic() - begun_s
    notes = _said_of(scratch)
    if failed:
        return _Found(Verdict.FAILED, restore_s=restore_s, differences=_lines(failed), notes=notes)
    note = "no fingerprint was taken with it, so contents, owners and grants could not be compared"
    return _Found(
        Verdict.RESTORED,
        restore_s=restore_s,
        checked=(f"restored into PostgreSQL {header.server_major} without an error",),
        notes=(note, *notes),
    )


def _identifier(protected: Protected) -> str:
    """Of the source's cluster, where a proof could meet it. Raises ServerError."""
    if protected.scratch.dsn is None:
        return ""
    with contextlib.closing(connect(protected.source(), purpose="proof")) as session:
        return read_server_info(session).system_identifier


def _load(
    protected: Protected,
    scratch: Scratch,
    properties: DatabaseProperties,
    fetched: Fetched,
    tools: Tools,
    options: load.LoadOptions,
    report: Report,
) -> ToolError | None:
    """Restore; return the error when the backup is to blame for it.

    Raises NotProvable when the server lacks something, ToolError and ServerError for a mishap.
    """
    try:
        restore.create_database(scratch.endpoint, scratch.database, properties)
        restore.try_properties(scratch.endpoint, scratch.database, properties)
    except Refused as error:
        raise NotProvable(error.message, detail=error.detail, hint=error.hint) from error
    try:
        load.load(
            scratch.endpoint,
            scratch.database,
            fetched.archive,
            options,
            tools=tools,
            progress=loading(report),
            limits=load.LoadLimits(protected.config.stall_timeout.total_seconds()),
        )
    except ToolError as error:
        match scratch.blame(error):
            case Blame.BACKUP:
                return error
            case Blame.SERVER:
                said = f"the scratch server lacks what this backup needs: {error.message}"
                raise NotProvable(said, detail=error.detail, hint=_ANOTHER_SERVER) from error
            case Blame.FILES | Blame.NETWORK as reach:
                said = f"restoring this backup {_REACHES[reach]}, which a scratch server of ours may not"
                raise NotProvable(f"{said}: {error.message}", detail=error.detail, hint=_MAY_REACH) from error
            case Blame.CLIENT:
                said = f"pg_restore {tools.version_text} cannot read this backup: {error.message}"
                raise NotProvable(said, detail=error.detail, hint=error.hint) from error
            case Blame.MISHAP:
                raise
    restore.apply_properties(scratch.endpoint, scratch.database, properties)
    return None


def _said_of(scratch: Scratch) -> tuple[str, ...]:
    """What is worth knowing of the place, once it is gone."""
    with_network = scratch.ours and not scratch.cut_off
    with_files = scratch.ours and not scratch.hidden
    return (
        *((_WITH_NETWORK,) if with_network else ()),
        *((_WITH_FILES,) if with_files else ()),
        *scratch.left,
    )


@contextlib.contextmanager
def _scratch(protected: Protected, major: int, identifier: str) -> Iterator[Scratch]:
    existing, bin_dir = protected.scratch_server(), protected.scratch.bin_dir
    with scratch_server(major, existing=existing, bin_dir=bin_dir, source_identifier=identifier) as scratch:
        yield scratch


def _require(scratch: Scratch, source: Source) -> None:
    """Raise NotProvable naming what this server lacks; roles and tablespaces are not asked for."""
    with contextlib.closing(connect(scratch.endpoint, purpose="proof")) as session:
        lacking = missing_requirements(session, source)
    problems = replace(lacking, roles=(), tablespaces=()).problems
    if problems:
        raise NotProvable(
            f"the scratch server lacks what this backup needs: {'; '.join(problems)}",
            hint=_ANOTHER_SERVER,
        )


def _tools(protected: Protected, client_major: int) -> Tools:
    """The client that wrote the dump, or the next newer one: what renders the schema alike."""
    try:
        return find_tools(protected.config.bin_dir or protected.scratch.bin_dir, at_least=client_major)
    except ToolError as error:
        raise NotProvable(error.message, detail=error.detail, hint=error.hint) from error


def _lines(error: BackupError) -> tuple[str, ...]:
    facts = (f"{name}: {value}" for name, value in error.detail.items() if name != "command")
    return (error.message, *facts, *((f"what to do: {error.hint}",) if error.hint else ()))
