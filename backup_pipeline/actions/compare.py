"""Hold a restored database against the fingerprint that was taken with its dump.

Called by prove, and by restore before a copy counts as complete.
"""

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from backup_pipeline.actions.report import Report, timed
from backup_pipeline.domain.fingerprint import (
    Fingerprint,
    Statement,
    statements_without_owners,
    without_owners,
)
from backup_pipeline.domain.proof import Comparison, compare, schema_differs
from backup_pipeline.engines.postgres import fingerprint, schema
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.properties import read_properties
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.engines.postgres.tools import Tools

SpareDatabase = Callable[[], contextlib.AbstractContextManager[Endpoint]]
"""Makes an empty database like the restored one, on the same server, and drops it afterwards."""


@dataclass(frozen=True)
class Restored:
    """A restored database, the archive that it came from, and where a spare one can be made."""

    database: Endpoint
    archive: Path
    tools: Tools
    spare: SpareDatabase
    stall_s: float = 900.0  # of silence after which a tool counts as hung


def compare_restored(
    source: Fingerprint,
    restored: Restored,
    *,
    contents: bool,
    connections: int,
    report: Report,
    owners: bool = True,
) -> Comparison:
    """Take the restored database's fingerprint and compare it with the source's.

    Without `contents` rows are only counted; without `owners`, neither owners nor grants are looked at.
    Raises ServerError, ToolError.
    """
    pg_dump, database = restored.tools.path("pg_dump"), restored.database
    with contextlib.closing(connect(database, purpose="proof")) as session:
        properties = read_properties(session, database.database)
    found = fingerprint.of_database(
        database,
        pg_dump=pg_dump,
        critical_tables=source.critical_tables,
        contents=contents,
        connections=connections,
        stall_s=restored.stall_s,
        progress=timed(report, "compare"),
    )
    found = replace(found, properties=properties)
    if not owners:
        source, found = _without_owners(source), _without_owners(found)
    pg_restore = restored.tools.path("pg_restore")
    sequences = schema.archive_sequences(pg_restore, restored.archive, database)
    if not schema_differs(source, found):
        return compare(source, found, sequences)
    archived = schema.archive_schema(pg_restore, restored.archive, database)
    if not owners:
        archived = statements_without_owners(archived)
    rendered, archived_anew = _rendered(source, archived, restored)
    if not owners:
        rendered, archived_anew = map(statements_without_owners, (rendered, archived_anew))
    return compare(
        source, found, sequences, rendered=rendered, archived=archived, archived_anew=archived_anew
    )


def _without_owners(fingerprint: Fingerprint) -> Fingerprint:
    properties = fingerprint.properties
    return replace(without_owners(fingerprint), properties=properties and properties.without_roles())


def _rendered(
    source: Fingerprint, archived: tuple[Statement, ...], restored: Restored
) -> tuple[tuple[Statement, ...], tuple[Statement, ...]]:
    """The source's schema and the archive's as a server writes them once it has read them.

    The source's of after the dump, and the archive's, only where they hold something else.
    """
    before, after = source.schema_before, source.schema_after
    rendered = Counter(_once_read(before, restored))
    if set(after) != set(before):
        rendered |= Counter(_once_read(after, restored))
    archived_anew = _once_read(archived, restored) if {*archived} - {*before, *after} else ()
    return tuple(rendered.elements()), archived_anew


def _once_read(statements: tuple[Statement, ...], restored: Restored) -> tuple[Statement, ...]:
    with restored.spare() as spare:
        schema.replay(spare, statements)
        return schema.capture(restored.tools.path("pg_dump"), spare, stall_s=restored.stall_s).statements
