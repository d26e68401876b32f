"""A data directory made from tars: what PostgreSQL writes is taken, and nothing that it does not write."""

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backup_pipeline.domain.base_backup import Tablespace
from backup_pipeline.domain.file_list import FileList, ListedFile
from backup_pipeline.engines.postgres.tar import entries
from backup_pipeline.engines.postgres.unpack import Places, plan_places, unfinished, unpacking
from backup_pipeline.errors import BackupError, ConfigError, Corrupt, Refused, ToolError

LONG = "base/" + "n" * 90
FILES = {
    "backup_label": b"START WAL LOCATION: 0/2000028\n",
    "tablespace_map": b"16384 /production/fast\n",
    "PG_VERSION": b"17\n",
    "base/1": b"x" * 5000,
    LONG: b"",
    "global/pg_control": b"c" * 512,
}
FOLDERS = ("base", "global", "pg_wal", "pg_wal/archive_status", "pg_tblspc")
FAST = {"PG_17_1/5": b"in the tablespace"}


def tar_of(files: dict[str, bytes], folders: tuple[str, ...] = (), *more: tarfile.TarInfo) -> bytes:
    """A tar as the server writes it; `more` are entries without content."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in folders:
            folder = tarfile.TarInfo(f"{name}/")
            folder.type, folder.mode = tarfile.DIRTYPE, 0o777
            tar.addfile(folder)
        for name, content in files.items():
            file = tarfile.TarInfo(name)
            file.size, file.mode = len(content), 0o4777
            tar.addfile(file, io.BytesIO(content))
        for item in more:
            tar.addfile(item)
    return made.getvalue()


def listed(files: dict[str, bytes]) -> FileList:
    found = {
        name.encode(): ListedFile(len(data), hashlib.sha256(data).digest()) for name, data in files.items()
    }
    return FileList(found, ())


WHOLE = listed(FILES | {f"pg_tblspc/16384/{name}": data for name, data in FAST.items()})
BASE = tar_of(FILES, FOLDERS)
SPACE = tar_of(FAST, ("PG_17_1",))
PLAIN = listed(FILES)


def cut(data: bytes, size_bytes: int) -> Iterator[bytes]:
    return (data[at : at + size_bytes] for at in range(0, len(data), size_bytes))


def unpack(places: Places, base: bytes, files: FileList, spaces: dict[int, bytes] | None = None) -> None:
    with unpacking(places, files) as work:
        work.add("base.tar", 0, cut(base, 700))
        for oid, data in (spaces or {}).items():
            work.add(f"{oid}.tar", oid, cut(data, 100))


def nothing_is_left(folder: Path) -> None:
    assert not list(folder.iterdir())


def test_it_is_the_source_again_with_its_tablespaces_elsewhere(tmp_path: Path) -> None:
    places = plan_places(tmp_path / "new", [Tablespace(16384, "/production/fast", 1)])
    assert places.tablespaces == {16384: tmp_path / "new.tablespaces" / "16384"}
    unpack(places, BASE, WHOLE, {16384: SPACE})
    found = {
        str(path.relative_to(tmp_path / "new")): path.read_bytes()
        for path in (tmp_path / "new").rglob("*")
        if path.is_file()
    }
    assert found == {name: data for name, data in FILES.items() if name != "tablespace_map"}
    link = tmp_path / "new" / "pg_tblspc" / "16384"
    assert os.readlink(link) == str(tmp_path / "new.tablespaces" / "16384")
    assert (link / "PG_17_1" / "5").read_bytes() == FAST["PG_17_1/5"]
    for path in (tmp_path / "new", *(tmp_path / "new").rglob("*"), link / "PG_17_1", link / "PG_17_1" / "5"):
        if not path.is_symlink():
            assert path.stat().st_mode & 0o7777 == (0o700 if path.is_dir() else 0o600)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "new.tablespaces"}


def test_a_tablespace_goes_where_it_is_mapped_to_or_stays_within(tmp_path: Path) -> None:
    (tmp_path / "ssd").mkdir()
    both = [Tablespace(16384, "/production/fast", 1), Tablespace(16385, "pg_tblspc/16385", 1)]
    places = plan_places(tmp_path / "new", both, {16384: tmp_path / "ssd" / "fast"})
    inside = {f"pg_tblspc/16385/{name}": data for name, data in FAST.items()}
    files = FileList({**WHOLE.files, **listed(inside).files}, ())
    unpack(places, BASE, files, {16384: SPACE, 16385: SPACE})
    assert os.readlink(tmp_path / "new" / "pg_tblspc" / "16384") == str(tmp_path / "ssd" / "fast")
    assert (tmp_path / "new" / "pg_tblspc" / "16385" / "PG_17_1" / "5").read_bytes() == FAST["PG_17_1/5"]
    assert not (tmp_path / "new.tablespaces").exists()


@pytest.mark.parametrize("size_bytes", [1, 511, 512, 513, 1 << 20])
def test_a_tar_may_come_in_pieces_of_any_size(size_bytes: int) -> None:
    found = {entry.name.decode(): b"".join(entry.data) for entry in entries(cut(BASE, size_bytes), "it")}
    assert found == {**dict.fromkeys(FOLDERS, b""), **FILES}


def test_a_name_in_two_fields_is_put_together() -> None:
    long = "/".join(["d" * 60, "e" * 60, "f"])
    found = [entry.name.decode() for entry in entries([tar_of({long: b""})], "it")]
    assert found == [long]


def linked(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    item = tarfile.TarInfo(name)
    item.type, item.linkname = kind, target
    return item


def renamed(name: str) -> bytes:
    """The good tar with one more file, named so."""
    return tar_of({**FILES, name: b"evil"}, FOLDERS)


HOSTILE: list[tuple[bytes, str]] = [
    (renamed("../evil"), "below its root"),
    (renamed(".."), "below its root"),
    (renamed("base/../../evil"), "below its root"),
    (renamed("/etc/evil"), "below its root"),
    (renamed("./evil"), "not in the list"),
    (renamed(".//etc/evil"), "below its root"),
    (renamed("././evil"), "below its root"),
    (renamed("base//evil"), "below its root"),
    (renamed("absent/evil"), "did not make"),
    (renamed("unlisted"), "not in the list"),
    (tar_of(FILES, (*FOLDERS, "..")), "below its root"),
    (tar_of(FILES, (*FOLDERS, "base/../x")), "below its root"),
    (tar_of(FILES, (*FOLDERS, "base")), "twice"),
    (tar_of(FILES, FOLDERS, linked("pg_tblspc/16384", "/etc", tarfile.SYMTYPE)), "neither a file nor"),
    (tar_of(FILES, FOLDERS, linked("hard", "PG_VERSION", tarfile.LNKTYPE)), "neither a file nor"),
    (tar_of(FILES, FOLDERS, linked("device", "", tarfile.CHRTYPE)), "neither a file nor"),
    (tar_of(FILES, FOLDERS, linked("disk", "", tarfile.BLKTYPE)), "neither a file nor"),
    (tar_of(FILES, FOLDERS, linked("pipe", "", tarfile.FIFOTYPE)), "neither a file nor"),
    (tar_of(FILES, FOLDERS, linked("pax", "", b"x")), "neither a file nor"),
    (tar_of(FILES, FOLDERS, linked("long", "", b"L")), "neither a file nor"),
    (tar_of(FILES, FOLDERS, linked("PG_VERSION", "", tarfile.REGTYPE)), "twice"),
    (tar_of({**FILES, "PG_VERSION": b"18\n"}, FOLDERS), "not the file that the list says"),
    (tar_of({**FILES, "PG_VERSION": b"17"}, FOLDERS), "not the file that the list says"),
    (tar_of({name: data for name, data in FILES.items() if name != "PG_VERSION"}, FOLDERS), "1 files of"),
    (BASE[:1000], "cut short"),
    (BASE[:-10240], "cut short"),
    (BASE + b"x" * 512, "something follows"),
    (BASE + BASE, "something follows"),
    (b"\0" * 512 + BASE, "two empty blocks"),
    (b"x" * 2048, "header of the tar is damaged"),
    (BASE[:100] + b"9" + BASE[101:], "damaged"),
    (b"", "cut short"),
]


@pytest.mark.parametrize(("base", "said"), HOSTILE)
def test_what_postgresql_does_not_write_is_refused_and_nothing_is_left(
    tmp_path: Path, base: bytes, said: str
) -> None:
    folder = tmp_path / "place"
    folder.mkdir()
    with pytest.raises(Corrupt, match=said):
        unpack(plan_places(folder / "new", []), base, PLAIN)
    nothing_is_left(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_every_flipped_bit_of_a_header_is_found_or_harmless(tmp_path: Path) -> None:
    """Owners and times are not ours to keep; all else is summed, or compared with the list."""
    for number, position in enumerate(range(0, 512, 3)):
        damaged = bytearray(BASE)
        damaged[position] ^= 4
        places = plan_places(tmp_path / str(number), [])
        with pytest.raises(Corrupt):
            unpack(places, bytes(damaged), PLAIN)
    nothing_is_left(tmp_path)


def full(places: Places) -> None:
    places.data.mkdir()
    (places.data / "precious").write_text("x")


def a_link(places: Places) -> None:
    places.data.symlink_to("/tmp")


@pytest.mark.parametrize("occupy", [full, a_link])
def test_what_is_there_is_not_touched(tmp_path: Path, occupy: Callable[[Places], None]) -> None:
    occupy(Places(tmp_path / "new", {}))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(Refused, match="not an empty directory"):
        plan_places(tmp_path / "new", [])
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_directory_may_be_filled_and_a_mount_point_not(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    unpack(plan_places(tmp_path / "new", []), BASE, PLAIN)
    assert (tmp_path / "new" / "PG_VERSION").exists()
    with pytest.raises(Refused, match=r"mounted|not an empty directory"):
        plan_places(Path("/proc"), [])


def test_places_that_overlap_and_tablespaces_that_are_not_there(tmp_path: Path) -> None:
    one = [Tablespace(16384, "/a", 1)]
    for place in (tmp_path / "new", tmp_path / "new" / "x", tmp_path):
        with pytest.raises(ConfigError, match="lie within one another"):
            plan_places(tmp_path / "new", one, {16384: place})
    with pytest.raises(ConfigError, match="no tablespace 7"):
        plan_places(tmp_path / "new", one, {7: tmp_path / "x"})


def test_a_second_one_in_the_same_place_waits_for_nobody(tmp_path: Path) -> None:
    places = plan_places(tmp_path / "new", [])
    unfinished(places.data).mkdir()
    with pytest.raises(Refused, match=r"new\.unfinished is there"):
        unpack(places, BASE, PLAIN)
    assert unfinished(places.data).exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_whatever_comes_in_between_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def failing() -> Iterator[bytes]:
        yield BASE[:3000]
        raise error

    places = plan_places(tmp_path / "new", [Tablespace(16384, "/production/fast", 1)])
    with pytest.raises((BackupError, KeyboardInterrupt)) as caught, unpacking(places, WHOLE) as work:
        work.add("base.tar", 0, failing())
    if isinstance(error, OSError):
        assert isinstance(caught.value, ToolError)
        assert "No space left" in str(caught.value)
    nothing_is_left(tmp_path)
