"""A chain of unpacked base backups made one data directory by pg_combinebackup, and every file of it checked.

Called by actions/combine.py, which unpacked the links. The program is kept to those directories, has no
network and none of our secrets: what it reads came out of a store. Links of tablespaces are ours.

Source: PostgreSQL, "pg_combinebackup".
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from backup_pipeline import process
from backup_pipeline.domain.base_backup import FILE_LIST_OBJECT
from backup_pipeline.domain.file_list import parse_file_list
from backup_pipeline.engines.postgres.cluster import LocalCluster, server_identity
from backup_pipeline.engines.postgres.unpack import LINKS, Places
from backup_pipeline.errors import Corrupt, ToolError
from backup_pipeline.process import Command, Identity

PROGRAM = "pg_combinebackup"

_BEGINNING_S = 600.0
_SLOWEST_BYTES_S = 1024 * 1024
_DO_NOT_USE = "Do not use what was combined; look at the disk, and begin again."


@dataclass(frozen=True)
class Link:
    """One base backup of a chain, unpacked, and PostgreSQL's own manifest of it."""

    places: Places
    manifest: bytes


def combine_argv(
    program: str, links: Sequence[Path], output: Path, moved: Mapping[Path, Path]
) -> tuple[str, ...]:
    """The command: `links` from the oldest on; `moved` says where each tablespace of the last one goes."""
    return (
        program,
        f"--output={output}",
        "--no-sync",  # the server makes all of it durable before it replays
        "--manifest-checksums=SHA256",
        *(f"--tablespace-mapping={_escaped(old)}={_escaped(new)}" for old, new in moved.items()),
        *map(str, links),
    )


def _escaped(path: Path) -> str:
    return str(path).replace("=", "\\=")


def combine(cluster: LocalCluster, links: Sequence[Link], output: Places, *, size_bytes: int) -> None:
    """Fill `output` with what the chain comes to, as the server's user, who owns it then.

    `output` is the cluster's own data directory, with its tablespaces. About `size_bytes` come to be. Raises
    ToolError where the links do not make one.
    """
    identity = server_identity()
    cluster.open()
    for link in links:
        _write(link.places.data / FILE_LIST_OBJECT, link.manifest, identity)
    for place in output.all:
        _make(place, identity)
    last = links[-1].places.tablespaces
    program = cluster.program(PROGRAM)
    argv = combine_argv(
        program,
        [link.places.data for link in links],
        output.data,
        {place: output.tablespaces[oid] for oid, place in last.items()},
    )
    command = Command(argv, {"LC_ALL": "C"}, identity=identity, cwd="/", confinement=cluster.kept_to(program))
    process.run(command, timeout_s=_BEGINNING_S + size_bytes / _SLOWEST_BYTES_S)


def verify(output: Places) -> int:
    """Compare every file with the list that came of combining, and remove that; returns the bytes read.

    Raises Corrupt when a file is another one, is missing, or is not in the list.
    """
    path = output.data / FILE_LIST_OBJECT
    try:
        listed = parse_file_list(path.read_bytes())
    except OSError as error:
        raise ToolError(f"{PROGRAM} left no list of files: {error.strerror}") from error
    missing, read_bytes = dict(listed.files), 0
    for name, file in _files(output):
        expected = missing.pop(name, None)
        with file.open("rb") as opened:
            size_bytes = os.fstat(opened.fileno()).st_size
            digest = hashlib.file_digest(opened, "sha256").digest()
        if expected is None or (size_bytes, digest) != (expected.size_bytes, expected.sha256):
            raise Corrupt(f"{file} is not as it was combined", hint=_DO_NOT_USE)
        read_bytes += size_bytes
    if missing:
        first = os.fsdecode(min(missing))
        raise Corrupt(
            f"{len(missing)} files of what was combined are missing, {first!r} the first", hint=_DO_NOT_USE
        )
    path.unlink()
    return read_bytes


def _files(output: Places) -> Iterator[tuple[bytes, Path]]:
    """(name in the list, path) of each file but the list itself. No link is followed but ours."""
    for root, inside in (
        (output.data, b""),
        *((p, f"{LINKS}/{o}/".encode()) for o, p in output.tablespaces.items()),
    ):
        for folder, _, names in os.walk(root):
            below = os.fsencode(os.path.relpath(folder, root) + "/").removeprefix(b"./")
            for name in names:
                if inside + below + os.fsencode(name) != FILE_LIST_OBJECT.encode():
                    yield inside + below + os.fsencode(name), Path(folder, name)


def _make(folder: Path, identity: Identity | None) -> None:
    """An empty folder of the server's user; what lies above it may be new too."""
    for each in (*([] if folder.parent.exists() else [folder.parent]), folder):
        each.mkdir(mode=0o700)
        if identity is not None:
            os.chown(each, identity.uid, identity.gid)


def _write(path: Path, data: bytes, identity: Identity | None) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        if identity is not None:
            os.fchown(handle, identity.uid, identity.gid)
