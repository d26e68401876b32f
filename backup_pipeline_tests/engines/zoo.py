"""A database of oddities, and one way to dump, restore and compare it, for the tests of this folder."""

import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from backup_pipeline.domain.fingerprint import Fingerprint, Statement
from backup_pipeline.domain.proof import Comparison, compare, schema_differs
from backup_pipeline.engines.postgres import dump, fingerprint, schema
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import connect
from backup_pipeline.engines.postgres.snapshot import exported_snapshot
from backup_pipeline_tests.servers import postgres as servers

ZOO = Path(__file__).with_suffix(".sql").read_text(encoding="utf-8")
ZOO_WITHOUT_XML = ZOO.replace("x xml,", "x text,")
"""For a server that was built without it."""

HOSTILE_NAMES = (
    'quo"te',
    "apo'strophe",
    "new\nline",
    ";$();`id`",
    "-leading --dash",
    "a=b",
    "../up",
    "back\\slash",
    "dot.ted",
    "%s %%",
    "x; Type: TABLE; Schema: public; Owner: y",
    "é" * 31 + "x",  # 63 bytes
)


def tool(name: str) -> str:
    """A program of PostgreSQL 17."""
    return f"{servers.bin_dir_17()}/{name}"


def execute(endpoint: Endpoint, statements: str) -> None:
    """Run SQL as it is, each statement in a transaction of its own or all in one."""
    with closing(connect(endpoint)) as session:
        session.execute("SET search_path = public")
        session.execute(statements.encode())


def backup(endpoint: Endpoint, archive: Path, *, critical_tables: Sequence[str] = ()) -> Fingerprint:
    """Dump into `archive`, custom format, and take the fingerprint beside it, as a backup does."""
    with exported_snapshot(endpoint, lock_timeout_s=20) as snapshot:
        prepared = fingerprint.prepare(
            endpoint, pg_dump=tool("pg_dump"), critical_tables=critical_tables, snapshot=snapshot
        )
        with (
            ThreadPoolExecutor(1) as pool,
            dump.stream_custom(
                tool("pg_dump"), endpoint, snapshot, compress_option="--compress=zstd:1"
            ) as chunks,
            archive.open("wb") as file,
        ):
            taking = pool.submit(fingerprint.take, prepared, snapshot)
            try:
                file.writelines(chunks)
                found = taking.result()
            except BaseException:
                snapshot.cancel()
                raise
        snapshot.release()
        return fingerprint.finish(found, prepared)


def restore(archive: Path, target: Endpoint) -> None:
    """pg_restore into an empty database, ending at the first error."""
    argv = [tool("pg_restore"), "--exit-on-error", f"--dbname={target.tool_dbname}", str(archive)]
    done = subprocess.run(argv, env=target.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def hold_against(
    source: Fingerprint, archive: Path, restored: Endpoint, cluster: LocalCluster, *, contents: bool = True
) -> Comparison:
    """What a proof does: fingerprint the restored database, and compare."""
    found = fingerprint.of_database(restored, pg_dump=tool("pg_dump"), connections=2, contents=contents)
    sequences = schema.archive_sequences(tool("pg_restore"), archive, restored)
    rendered = rendering(source, cluster) if schema_differs(source, found) else None
    return compare(source, found, sequences, rendered=rendered)


def rendering(source: Fingerprint, cluster: LocalCluster) -> tuple[Statement, ...]:
    """The source's schema once PostgreSQL has read it."""
    with servers.fresh_database(cluster) as empty:
        schema.replay(empty, source.schema_before)
        return schema.capture(tool("pg_dump"), empty).statements
