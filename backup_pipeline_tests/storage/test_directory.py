"""What a directory adds to the contract: durability, privacy, crashes, and what others plant in it."""

import contextlib
import errno
import os
import resource
import signal
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backup_pipeline.config import StoreConfig
from backup_pipeline.errors import ConfigError, ObjectNotFound, StoreError
from backup_pipeline.storage import files
from backup_pipeline.storage.directory import STALE_AFTER_S, DirectoryStore, create_root, folder_of
from backup_pipeline.storage.store import SPOOL, open_store, read_all
from backup_pipeline_tests.storage import child

NOBODY = 65534


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    return folder


@pytest.fixture
def store(root: Path) -> DirectoryStore:
    return DirectoryStore(root)


def keys(store: DirectoryStore) -> list[str]:
    return [found.key for found in store.list("")]


def spooled(root: Path) -> list[str]:
    return os.listdir(root / SPOOL) if (root / SPOOL).exists() else []


# The root


def test_a_missing_root_is_refused_and_not_created(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist") as caught:
        open_store(StoreConfig((tmp_path / "nowhere").as_uri()))
    assert str(tmp_path / "nowhere") in caught.value.message
    assert f"mkdir -m 700 {tmp_path / 'nowhere'}" in caught.value.hint
    assert not (tmp_path / "nowhere").exists()


def test_a_root_that_vanishes_is_an_error_not_an_empty_store(store: DirectoryStore, root: Path) -> None:
    root.rmdir()
    attempts: list[Callable[[], object]] = [
        lambda: keys(store),
        lambda: store.put("k", [b"x"]),
        lambda: store.head("k"),
        lambda: store.delete(["k"]),
    ]
    for attempt in attempts:
        with pytest.raises(StoreError, match="does not exist") as caught:
            attempt()
        assert not isinstance(caught.value, ObjectNotFound)
    assert not root.exists()


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="Not a directory"):
        DirectoryStore(tmp_path / "file")


def test_a_root_may_be_reached_by_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    DirectoryStore(tmp_path / "link").put("k", [b"x"])
    assert (root / "k").read_bytes() == b"x"


def test_create_root_makes_private_folders(tmp_path: Path) -> None:
    create_root(tmp_path / "a" / "b")
    create_root(tmp_path / "a" / "b")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


@pytest.mark.parametrize("url", ["file://host/x", "file://relative", "file://", "file:///a%00b"])
def test_urls_that_name_no_local_folder(url: str) -> None:
    with pytest.raises(ConfigError):
        folder_of(url)


def test_a_url_may_hold_anything_that_a_path_may(tmp_path: Path) -> None:
    folder = tmp_path / "ä b#c?d%41"
    folder.mkdir()
    store = open_store(StoreConfig(folder.as_uri()))
    store.put("k", [b"x"])
    assert (folder / "k").read_bytes() == b"x"
    assert store.url == folder.as_uri()


# Privacy


def test_what_is_written_is_private(store: DirectoryStore, root: Path) -> None:
    before = os.umask(0)
    try:
        store.put("a/b/c", [b"x"])
        store.put_if_absent("a/d", b"x")
        store.copy("a/d", "e/f")
    finally:
        os.umask(before)
    for path in root.rglob("*"):
        assert stat.S_IMODE(path.lstat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def as_another(act: Callable[[], object]) -> str:
    """What `act` gives or raises in a process of its own, which is not root."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = "nothing"
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            said = repr(act())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(writing, said.encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        said = answer.read().decode()
    os.waitpid(pid, 0)
    return said


@pytest.fixture
def read_only() -> Iterator[DirectoryStore]:
    """A store with one object, which everyone may read and only root could change."""
    with tempfile.TemporaryDirectory() as folder:
        store = DirectoryStore(Path(folder))
        store.put("folder/object", [b"x"])
        (store.root / "folder" / "object").chmod(0o444)
        folders = (store.root / SPOOL, store.root / "folder", store.root)
        for each in folders:
            each.chmod(0o555)
        yield store
        for each in reversed(folders):
            each.chmod(0o700)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_rights_that_are_missing_are_named(read_only: DirectoryStore) -> None:
    assert as_another(lambda: read_all(read_only, "folder/object")) == "b'x'"
    attempts: list[Callable[[], object]] = [
        lambda: read_only.put("new", [b"x"]),
        lambda: read_only.put_if_absent("new", b"x"),
        lambda: read_only.copy("folder/object", "new"),
    ]
    for attempt in attempts:
        said = as_another(attempt)
        assert said.startswith("StoreError: cannot write new in file:///")
        assert "Permission denied" in said
        assert "HINT: Let the user that runs this" in said
    refused = as_another(lambda: read_only.delete(["folder/object", "absent"]))
    assert refused == "{'folder/object': 'Permission denied'}"
    assert keys(read_only) == ["folder/object"]


# What others plant


def test_links_are_not_followed(store: DirectoryStore, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (root / "folder").symlink_to(outside)
    (root / "file").symlink_to(outside / "secret")
    (root / "loop").symlink_to(root)
    store.put("real", [b"x"])
    assert keys(store) == ["real"]
    for key in ("folder/secret", "file"):
        with pytest.raises(ObjectNotFound):
            read_all(store, key)
        with pytest.raises(ObjectNotFound):
            store.copy(key, "copied")
    with pytest.raises(StoreError, match="Not a directory"):
        store.put("folder/planted", [b"x"])
    store.delete(["folder/secret"])
    store.put("file", [b"own"])
    assert (outside / "secret").read_text() == "secret"
    assert os.listdir(outside) == ["secret"]
    assert read_all(store, "file") == b"own"


def test_what_is_no_file_is_no_object(store: DirectoryStore, root: Path) -> None:
    os.mkfifo(root / "pipe")
    (root / "folder").mkdir()
    with open(os.fsencode(root) + b"/not-utf8-\xff", "wb"):
        pass
    assert keys(store) == []
    for key in ("pipe", "folder"):
        with pytest.raises(ObjectNotFound):
            store.head(key)
    assert store.delete(["folder"]) == {}


def test_an_object_in_the_way_of_a_folder_is_named(store: DirectoryStore) -> None:
    store.put("a", [b"x"])
    with pytest.raises(StoreError, match=r"cannot write a/b in file://.*Not a directory"):
        store.put("a/b", [b"x"])
    store.put("c/d", [b"x"])
    with pytest.raises(StoreError, match=r"cannot write c in file://.*Is a directory"):
        store.put("c", [b"x"])
    assert keys(store) == ["a", "c/d"]
    assert spooled(Path(store.root)) == []


# Crashes


def test_killed_in_mid_put_nothing_is_listed_and_the_rest_is_collected(
    store: DirectoryStore, root: Path
) -> None:
    child.kill_while_hanging(StoreConfig(root.as_uri()))
    assert keys(store) == []
    (left,) = spooled(root)
    store.put("next", [b"x"])
    assert spooled(root) == [left]  # it might still be written to
    written = (root / SPOOL / left).stat().st_mtime
    os.utime(root / SPOOL / left, (written, written - STALE_AFTER_S - 60))
    store.put("after a day", [b"x"])
    assert spooled(root) == []
    assert keys(store) == ["after a day", "next"]


class Crash(BaseException):
    """The power went off."""


@pytest.mark.parametrize("step", ["sync_file", "rename", "sync_folder"])
def test_what_is_visible_was_synced_before(
    store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The file is on disk before it has a name, and each folder before the put returns."""
    done: list[str] = []

    def noting(name: str) -> None:
        real = getattr(files, name)

        def note(*args: object) -> None:
            if name == step:
                raise Crash
            done.append(name)
            real(*args)

        monkeypatch.setattr(files, name, note)

    for name in ("sync_file", "rename", "sync_folder"):
        noting(name)
    with pytest.raises(Crash):
        store.put("a/b/c", [b"x"])
    before = {"sync_file": [], "rename": ["sync_file"], "sync_folder": ["sync_file", "rename"]}
    assert done == before[step]
    assert keys(store) == (["a/b/c"] if step == "sync_folder" else [])
    assert spooled(root) == []


def test_every_folder_up_to_the_root_is_synced(
    store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def note(file: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{file}").removeprefix(str(root)))
        real(file)

    monkeypatch.setattr(os, "fsync", note)
    store.put("a/b/c", [b"x"])
    assert synced[0].startswith(f"/{SPOOL}/")
    assert synced[1:] == ["/a/b", "/a", ""]
    synced.clear()
    store.delete(["a/b/c"])
    assert synced == ["/a/b"]


def test_settling_syncs_an_object_and_every_folder_up_to_the_root(
    store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a writer made that died before it synced the folders."""
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "c").write_bytes(b"x")
    synced: list[str] = []
    real = os.fsync

    def note(file: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{file}").removeprefix(str(root)))
        real(file)

    monkeypatch.setattr(os, "fsync", note)
    store.settle("a/b/c")
    assert synced == ["/a/b/c", "/a/b", "/a", ""]
    with pytest.raises(ObjectNotFound):
        store.settle("a/b/d")

    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError, match="cannot settle a/b/c"):
        store.settle("a/b/c")


@pytest.mark.parametrize("failing", [errno.EIO, errno.ENOSPC])
def test_a_sync_that_fails_fails_the_put(
    store: DirectoryStore, root: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    def fail(_: int) -> None:
        raise OSError(failing, os.strerror(failing))

    store.put("k", [b"before"])
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError, match=os.strerror(failing)):
        store.put("k", [b"after"])
    assert read_all(store, "k") == b"before"
    assert spooled(root) == []


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_full_disk_is_named_and_nothing_stays(store: DirectoryStore, root: Path) -> None:
    """The limit on the size of files stands in for the disk: it needs no rights and no mount."""

    def put() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        store.put("large", (b"x" * 300_000 for _ in range(10)))

    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            try:
                put()
            except StoreError as error:
                os._exit(7 if "File too large" in str(error) and "ulimit" in error.hint else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert keys(store) == []
    assert spooled(root) == []


# Folders that come and go


def test_empty_folders_go_with_their_last_object(store: DirectoryStore, root: Path) -> None:
    store.put("a/b/one", [b"x"])
    store.put("a/two", [b"x"])
    store.delete(["a/b/one"])
    assert sorted(os.listdir(root)) == [SPOOL, "a"]
    assert os.listdir(root / "a") == ["two"]
    store.delete(["a/two"])
    assert os.listdir(root) == [SPOOL]


def test_puts_and_deletes_of_one_folder_do_not_hinder_each_other(store: DirectoryStore) -> None:
    barrier = threading.Barrier(4)

    def churn(n: int) -> None:
        barrier.wait()
        for _ in range(60):
            store.put(f"deep/folder/{n}", [b"x"])
            assert store.head(f"deep/folder/{n}").size_bytes == 1
            assert store.delete([f"deep/folder/{n}"]) == {}

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(churn, range(4)))
    assert keys(store) == []


def test_listing_survives_what_goes_meanwhile(store: DirectoryStore) -> None:
    for n in range(10):
        store.put(f"{n}/object", [b"x"])
    listing = store.list("")
    assert next(listing).key == "0/object"
    store.delete([f"{n}/object" for n in range(1, 9)])
    assert [found.key for found in listing] == ["9/object"]


def test_descriptors_are_closed(store: DirectoryStore) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for n in range(20):
        store.put(f"a/b/{n}", [b"x"])
        next(store.list(""))
        next(store.read(f"a/b/{n}"))
        with contextlib.suppress(ObjectNotFound):
            store.head("a/b/absent")
    assert len(os.listdir("/proc/self/fd")) == before


# Copies


def test_a_copy_shares_no_inode(store: DirectoryStore, root: Path) -> None:
    store.put("one", [b"x" * 100_000])
    store.copy("one", "two")
    assert (root / "one").stat().st_ino != (root / "two").stat().st_ino
    assert (root / "two").stat().st_nlink == 1


@pytest.mark.parametrize("refused", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_copy_that_the_kernel_refuses_is_made_by_hand(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(refused, os.strerror(refused))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    store.put("one", [bytes(range(256)) * 40_000])
    store.copy("one", "two")
    assert read_all(store, "two") == read_all(store, "one")


def test_put_if_absent_leaves_one_name(store: DirectoryStore, root: Path) -> None:
    store.put_if_absent("once", b"x")
    assert (root / "once").stat().st_nlink == 1
    assert spooled(root) == []
