"""pgBackRest as its users set it up: asynchronous, two processes, zstd, S3 by TLS. Pure but for `configure`.

The same compression as ours, and as many processes as ours has threads.
"""

from pathlib import Path
from urllib.parse import urlsplit

from psycopg.conninfo import conninfo_to_dict

from backup_pipeline.demo.place import BUCKET
from backup_pipeline.demo.servers import ACCESS_KEY
from benchmarks.wal_ground import Ground

STANZA = "main"
_CONFIG = """
[global]
repo1-type=s3
repo1-path=/{prefix}
repo1-s3-bucket={bucket}
repo1-s3-endpoint=localhost
repo1-s3-region=us-east-1
repo1-s3-uri-style=path
repo1-s3-key={key}
repo1-s3-key-secret={secret}
repo1-storage-host=localhost
repo1-storage-port={port}
repo1-storage-ca-file={authority}
repo1-retention-full=9
archive-async=y
compress-type=zst
compress-level=1
process-max=2
start-fast=y
spool-path={folder}
lock-path={folder}
log-path={folder}
log-level-file=off
log-level-console=warn

[{stanza}]
pg1-path={data}
pg1-socket-path={socket}
pg1-port={port_pg}
pg1-user=postgres
"""


def configure(ground: Ground, prefix: str) -> Path:
    """A configuration whose repository is below `prefix` in the bucket, with a spool of its own."""
    folder = ground.folder / f"{prefix}.spool"
    if not folder.exists():
        ground.made(folder.name)
    endpoint = urlsplit(ground.endpoint)
    dsn = conninfo_to_dict(ground.cluster.endpoint().dsn)
    text = _CONFIG.format(
        prefix=prefix,
        bucket=BUCKET,
        key=ACCESS_KEY,
        secret=ground.secret,
        port=endpoint.port,
        authority=ground.authority,
        folder=folder,
        data=ground.cluster.data,
        socket=dsn["host"],
        port_pg=dsn["port"],
        stanza=STANZA,
    )
    return ground.write("pgbackrest.conf", text)


def argv(program: str, config: Path, *command: str) -> tuple[str, ...]:
    """One of its commands."""
    return (program, f"--config={config}", f"--stanza={STANZA}", *command)
