"""Fingerprints for tests: that of a source, and that of a faithful restore."""

from dataclasses import replace

from backup_pipeline.domain.fingerprint import (
    Fingerprint,
    LargeObjectGroup,
    LargeObjects,
    NewestValue,
    SequenceValue,
    Statement,
    TableContent,
)
from backup_pipeline.domain.proof import compare
from backup_pipeline_tests.domain import values

PROPERTIES = replace(
    values.PROPERTIES,
    owner="keeper",
    comment=None,
    settings=(("", "work_mem=8MB"),),
    grants=(("keeper", "", "CONNECT", False),),
)
TABLE = Statement("TABLE", "public", "runs", "keeper", "CREATE TABLE public.runs (\n    id integer\n);")
INDEX = Statement("INDEX", "public", "runs_idx", "keeper", "CREATE INDEX runs_idx ON public.runs (id);")
VIEW = Statement("VIEW", "public", "v", "keeper", "CREATE VIEW public.v AS\n SELECT 1;")
SOURCE = Fingerprint(
    server_version=170010,
    client_version=170010,
    tables=(TableContent("app", "runs", 12000, "row:17"), TableContent("public", "users", 345, "row:-4")),
    newest=(
        NewestValue("app.runs", "started_at", "2026-03-01 02:00:00+00"),
        NewestValue("app.runs", "d", None),
    ),
    large_objects=LargeObjects(
        1, (LargeObjectGroup(7001, 1, 3145728, "1", "2"), LargeObjectGroup(7002, 1, 0, "3", "4"))
    ),
    sequences_before=(SequenceValue("app", "ids", 40, True), SequenceValue("app", "still", 1, False)),
    sequences_after=(SequenceValue("app", "ids", 50, True), SequenceValue("app", "still", 1, False)),
    schema_before=(TABLE, INDEX),
    schema_after=(TABLE, INDEX),
    properties=PROPERTIES,
    extensions=(("hstore", "1.8"), ("plpgsql", "1.0")),
    constraints=3,
    unvalidated=("app.runs loose",),
    indexes=2,
    invalid_indexes=(),
    notes=("foreign table app.remote: kept elsewhere, and neither dumped nor compared",),
)
ARCHIVE = {("app", "ids"): (44, True), ("app", "still"): (1, False)}
RESTORED = replace(
    SOURCE,
    sequences_before=(SequenceValue("app", "ids", 44, True), SequenceValue("app", "still", 1, False)),
    sequences_after=(),
    schema_after=(),
    notes=(),
)


def differences(restored: Fingerprint, source: Fingerprint = SOURCE) -> tuple[str, ...]:
    return compare(source, restored, ARCHIVE).differences


def with_schema(*statements: Statement) -> Fingerprint:
    return replace(RESTORED, schema_before=statements)
