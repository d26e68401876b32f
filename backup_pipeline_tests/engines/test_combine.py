"""The command line of pg_combinebackup; what it does is tested where chains are recovered."""

from pathlib import Path

from backup_pipeline.engines.postgres.combine import combine_argv


def test_the_command() -> None:
    links = [Path("/new/link0/data"), Path("/new/link1/data")]
    moved = {Path("/new/link1.tablespaces/16384"): Path("/fast/16384"), Path("/a=b"): Path("/c=d")}
    assert combine_argv("/bin/pg_combinebackup", links, Path("/new/data"), moved) == (
        "/bin/pg_combinebackup",
        "--output=/new/data",
        "--no-sync",
        "--manifest-checksums=SHA256",
        "--tablespace-mapping=/new/link1.tablespaces/16384=/fast/16384",
        "--tablespace-mapping=/a\\=b=/c\\=d",
        "/new/link0/data",
        "/new/link1/data",
    )
