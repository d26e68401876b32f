"""Hold a restored database against the fingerprint that was taken with its dump.

Called by prove, and by restore before a copy counts as complete.
"""

import contextlib
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
from backup_pipeline.engines.postgres.properties import read_properties
from backup_pipeline.engines.postgres.server import Endpoint, connect
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
        critical_tables=tuple(dict.fromkeys(item.table for item in source.newest)),
        contents=contents,
        connections=connections,
        progress=timed(report, "compare"),
    )
    found = replace(found, properties=properties)
    if not owners:
        source, found = without_owners(source), without_owners(found)
    sequences = schema.archive_sequences(restored.tools.path("pg_restore"), restored.archive)
    rendered: tuple[Statement, ...] = ()
    archived: tuple[Statement, ...] = ()
    if schema_differs(source, found):
        rendered = _rendered(source, restored)
        archived = schema.archive_schema(restored.tools.path("pg_restore"), restored.archive)
    if not owners:
        rendered, archived = statements_without_owners(rendered), statements_without_owners(archived)
    return compare(source, found, sequences, rendered=rendered, archived=archived)


def _rendered(source: Fingerprint, restored: Restored) -> tuple[Statement, ...]:
    """The source's schema as a server writes it once it has read it."""
    with restored.spare() as spare:
        schema.replay(spare, source.schema_before)
        return schema.capture(restored.tools.path("pg_dump"), spare).statements
