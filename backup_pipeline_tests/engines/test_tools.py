"""PostgreSQL's programs: found where they are, chosen by version, refused with both versions named."""

from pathlib import Path

import pytest

from backup_pipeline.engines.postgres import tools
from backup_pipeline.engines.postgres.tools import (
    SERVER,
    Compression,
    choose_compression,
    find_tools,
    known_vulnerable,
)
from backup_pipeline.errors import ToolError
from backup_pipeline_tests.servers.postgres import bin_dir_15, bin_dir_17


def installation(folder: Path, version: str, programs: tuple[str, ...] = tools.CLIENT) -> str:
    """A folder of programs that say a version, and nothing else."""
    folder.mkdir(parents=True)
    for name in programs:
        program = folder / name
        program.write_text(f"#!/bin/sh\necho '{name} (PostgreSQL) {version}'\n")
        program.chmod(0o755)
    return str(folder)


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine where programs are on PATH alone, below this folder."""
    monkeypatch.setattr(tools, "_PATTERNS", ())
    monkeypatch.setattr(tools, "_WHEEL", "no_such_module")
    monkeypatch.setenv("PATH", "")
    return tmp_path


def on_path(monkeypatch: pytest.MonkeyPatch, *folders: str) -> None:
    monkeypatch.setenv("PATH", ":".join((*folders, "/nonexistent")))


def test_the_lowest_fitting_major_and_its_newest_minor_win(
    only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {version: installation(only / version, version) for version in ("15.9", "16.3", "16.14", "18.1")}
    on_path(monkeypatch, *names.values())
    assert find_tools(at_least=16) == tools.Tools(names["16.14"], 160014, "16.14")
    assert find_tools(at_least=15).version_text == "15.9"
    assert find_tools(at_least=17).major == 18
    assert find_tools(exactly=18).version == 180001


def test_a_refusal_names_both_versions_and_every_place(only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path(
        monkeypatch,
        old := installation(only / "a b", "15.9"),
        installation(only / "half", "18.1", ("pg_dump",)),
    )
    with pytest.raises(ToolError) as refused:
        find_tools(at_least=18)
    assert refused.value.message == (
        "cannot find pg_dump, pg_dumpall, pg_restore of PostgreSQL 18 or newer;"
        f" the newest found is 15.9 in {old}"
    )
    assert f"{old}: 15.9" in str(refused.value.detail["looked at"])
    assert "half: has no pg_dumpall" in str(refused.value.detail["looked at"])
    assert "postgresql-client-18" in refused.value.hint


def test_a_given_folder_is_the_only_one(only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path(monkeypatch, installation(only / "good", "17.1"))
    with pytest.raises(
        ToolError, match=r"PostgreSQL 17 or newer\n  looked at: \S+elsewhere: has no pg_dump\n"
    ):
        find_tools(str(only / "elsewhere"), at_least=17)
    old = installation(only / "old", "16.1")
    with pytest.raises(ToolError, match=r"the newest found is 16\.1"):
        find_tools(old, at_least=17)


def test_folders_that_mix_versions_or_hold_wrappers_are_passed_over(
    only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = installation(only / "mixed", "17.1", ("pg_dump", "pg_dumpall"))
    (only / "mixed" / "pg_restore").write_text("#!/bin/sh\necho 'pg_restore (PostgreSQL) 16.2'\n")
    (only / "mixed" / "pg_restore").chmod(0o755)
    (only / "pg_wrapper").write_text("#!/bin/sh\nexit 1\n")
    (only / "pg_wrapper").chmod(0o755)
    (only / "wrapped").mkdir()
    for name in tools.CLIENT:
        (only / "wrapped" / name).symlink_to(only / "pg_wrapper")
    on_path(monkeypatch, mixed, str(only / "wrapped"))
    with pytest.raises(ToolError) as refused:
        find_tools(at_least=15)
    places = str(refused.value.detail["looked at"])
    assert "mixes versions 17.1, 16.2" in places
    assert "wrapped: Debian's wrappers" in places


@pytest.mark.parametrize(
    ("said", "version"),
    [("19devel", 190000), ("18beta2", 180000), ("17.10 (Debian 17.10-1.pgdg12+1)", 170010)],
)
def test_versions_are_read_as_every_build_says_them(only: Path, said: str, version: int) -> None:
    assert find_tools(installation(only / "x", said)).version == version


def test_the_wheel_is_found_and_compresses_with_zstd() -> None:
    found = find_tools(bin_dir_17(), exactly=17, needs=(*tools.CLIENT, *SERVER))
    assert found.major == 17
    assert choose_compression(found) == Compression("zstd:1", "--compress=zstd:1")


def test_a_client_before_16_compresses_with_gzip() -> None:
    assert choose_compression(find_tools(bin_dir_15())) == Compression("gzip:1", "--compress=1")


def test_a_client_built_without_zstd_compresses_with_gzip(only: Path) -> None:
    folder = installation(only / "x", "17.1")
    (only / "x" / "pg_dump").write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo 'pg_dump (PostgreSQL) 17.1' && exit\n"
        "echo 'pg_dump: error: invalid compression specification: this build does not support compression"
        " with zstd' >&2\nexit 1\n"
    )
    assert choose_compression(find_tools(folder)) == Compression("gzip:1", "--compress=gzip:1")


def test_a_missing_program_is_named() -> None:
    with pytest.raises(ToolError, match="has no pg_nothing"):
        find_tools(bin_dir_17()).path("pg_nothing")


@pytest.mark.parametrize(
    ("version", "vulnerable"),
    [
        (170010, True),
        (170012, False),
        (180006, True),
        (180007, False),
        (150020, False),
        (130099, True),
        (190000, False),
    ],
)
def test_clients_that_run_code_from_an_archive_are_known(version: int, vulnerable: bool) -> None:
    assert (known_vulnerable(version) is not None) is vulnerable
