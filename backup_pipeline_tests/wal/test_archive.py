"""archive_command's contract, file by file, on each kind of store."""

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from backup_pipeline.domain.layout import parse_wal_key, wal_identity_key, wal_key
from backup_pipeline.domain.wal import WalKind, parse_wal_name
from backup_pipeline.errors import (
    ConfigError,
    Corrupt,
    Refused,
)
from backup_pipeline.storage import files
from backup_pipeline.storage.directory import DirectoryStore
from backup_pipeline.storage.store import read_all
from backup_pipeline.wal.archive import WalArchive
from backup_pipeline.wal.fetch import fetch
from backup_pipeline.wal.listing import read_archive
from backup_pipeline_tests.wal.archives import HISTORY, LABEL, archive_in, keys
from backup_pipeline_tests.wal.box import begin
from backup_pipeline_tests.wal.segments import MIB, OTHER, SEGMENT_BYTES, SYSTEM, DataDirectory, segment


def test_every_kind_of_file_is_archived_and_comes_back(
    archive: WalArchive, data: DataDirectory, tmp_path: Path
) -> None:
    files = {
        "000000010000000000000003": segment(3),
        "000000010000000000000004.partial": segment(4),
        "000000010000000000000003.00000028.backup": LABEL,
        "00000002.history": HISTORY,
    }
    for name, content in files.items():
        pushed = archive.push(data.put(name, content))
        assert (pushed.name, pushed.plain_bytes, pushed.already) == (name, len(content), False)
        assert archive.store.head(pushed.key).size_bytes == pushed.stored_bytes
    for name, content in files.items():
        got = tmp_path / "RECOVERYXLOG"
        assert fetch(archive.store, "main", name, got).plain_bytes == len(content)
        assert got.read_bytes() == content
    assert [path.name for path in tmp_path.glob("*RECOVERY*")] == ["RECOVERYXLOG"]
    kinds = {found.name.kind for key in keys(archive.store) if (found := parse_wal_key(key))}
    assert kinds == set(WalKind)


def test_the_same_bytes_again_are_done_and_others_refused(archive: WalArchive, data: DataDirectory) -> None:
    first = archive.push(data.segment(3))
    written = list(archive.store.list(""))
    again = archive.push(data.segment(3))
    assert (again.key, again.stored_bytes, again.already) == (first.key, first.stored_bytes, True)
    with pytest.raises(Refused, match="already, with other bytes") as caught:
        archive.push(data.segment(3, seed=1))
    assert hashlib.sha256(segment(3)).hexdigest() in str(caught.value)
    assert "what is archived may be the copy's: look with pg_waldump" in str(caught.value)
    assert list(archive.store.list("")) == written


def test_a_history_is_compared_byte_for_byte(archive: WalArchive, data: DataDirectory) -> None:
    assert not archive.push(data.put("00000002.history", HISTORY)).already
    assert archive.push(data.put("00000002.history", HISTORY)).already
    for other in (HISTORY + b"\n", HISTORY.replace(b"5", b"6")):
        with pytest.raises(Refused, match=r"00000002\.history is in the archive of main already"):
            archive.push(data.put("00000002.history", other))
    assert read_all(archive.store, wal_key("main", SYSTEM, parse_wal_name("00000002.history"), "")) == HISTORY


class Killed(BaseException):
    """The process ended here."""


def push_in(store: DirectoryStore, path: Path) -> None:
    archive_in(store).push(path)


def begin_in(store: DirectoryStore, path: Path) -> None:
    begin(store)


@pytest.mark.parametrize(
    ("name", "write"),
    [("000000010000000000000003", push_in), ("00000002.history", push_in), ("identity.json", begin_in)],
)
def test_what_a_killed_writer_left_is_durable_before_it_counts(
    here: DirectoryStore,
    data: DataDirectory,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    write: Callable[[DirectoryStore, Path], None],
) -> None:
    """It died between giving the object its name and syncing the folders."""
    path = data.put(name, HISTORY if name.endswith(".history") else segment(3))
    if write is begin_in:
        here.delete([wal_identity_key("main")])

    def killed(_: int) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(files, "sync_folder", killed)
        with pytest.raises(Killed):
            write(here, path)
    (key,) = (info.key for info in here.list("clusters/") if info.key.split("/")[-1].startswith(name))
    synced: list[Path] = []
    real = os.fsync

    def note(file: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{file}")))
        real(file)

    monkeypatch.setattr(os, "fsync", note)
    write(here, path)
    expected = [here.root / key, *(here.root / key).parents]
    assert synced == expected[: expected.index(here.root) + 1]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("000000010000000000000003", segment(4), "begins at 0/400000"),
        ("000000010000000000000003", segment(3, timeline=2), "timeline 2"),
        ("000000010000000000000003", segment(3)[:-8192], "it has 1040384 bytes"),
        ("000000010000000000000003", segment(3, system=OTHER), "it is of cluster"),
        ("000000010000000000000003", b"", "too short"),
        ("000000010000000000000003", bytes(SEGMENT_BYTES), "does not begin like a WAL segment"),
        ("000000010000000000000003.partial", segment(4), "begins at 0/400000"),
        ("000000010000000000000003", segment(1, size_bytes=2 * MIB), "begins at"),
        ("00000002.history", b"nonsense", "cannot be read in line 1"),
        ("00000001.history", HISTORY, "names 1 as its origin"),
        ("000000010000000000000003.00000028.backup", b"", "should be a short text"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_not_archived(
    here: DirectoryStore, data: DataDirectory, name: str, content: bytes, said: str
) -> None:
    with pytest.raises((Corrupt, Refused), match=re.escape(said)):
        archive_in(here).push(data.put(name, content))
    assert keys(here) == []


@pytest.mark.parametrize(
    "name", ["000000010000000000000003.ready", "postgresql.conf", "00000001000000000000000g", "1.history"]
)
def test_a_file_with_another_name_is_not_archived(
    here: DirectoryStore, data: DataDirectory, name: str
) -> None:
    with pytest.raises(ConfigError, match="not a WAL file's name"):
        archive_in(here).push(data.put(name, segment(3)))


def test_only_regular_files_of_the_clusters_own_pg_wal_are_read(
    here: DirectoryStore, data: DataDirectory, tmp_path: Path
) -> None:
    elsewhere = DataDirectory(tmp_path / "elsewhere")
    with pytest.raises(Refused, match="the data directory of cluster main"):
        archive_in(here, data).push(elsewhere.segment(3))
    archive_in(here, data).push(data.segment(3))
    name = "000000010000000000000004"
    makers: list[Callable[[Path], object]] = [
        lambda path: path.symlink_to(elsewhere.segment(4)),
        os.mkfifo,
        Path.mkdir,
        Path.exists,
    ]
    for make in makers:
        make(data.wal / name)
        with pytest.raises(ConfigError, match=name):
            archive_in(here).push(data.wal / name)
        path = data.wal / name
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    assert read_archive(here, "main").numbers(1) == (3,)
