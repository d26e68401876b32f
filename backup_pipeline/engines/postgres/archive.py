"""What an archive says of itself, read by pg_restore: for dumps that have no manifest.

The digest of an archive that we wrote is verified before; an imported one has none, and only tools
without a known hole should open it (tools.known_vulnerable).
"""

import re
from dataclasses import dataclass
from pathlib import Path

from backup_pipeline import process
from backup_pipeline.engines.postgres.tools import Tools
from backup_pipeline.errors import Corrupt, ToolError
from backup_pipeline.process import Command

_LIST_TIMEOUT_S = 600.0
_FIELD = re.compile(
    r"^; +(?P<name>dbname|Dumped from database version|Dumped by pg_dump version): (?P<value>.*)$", re.M
)


@dataclass(frozen=True)
class ArchiveHeader:
    """The beginning of an archive's table of contents. Versions as majors, 17 for 17.10."""

    database: str
    server_major: int
    client_major: int


def read_header(archive: Path, tools: Tools) -> ArchiveHeader:
    """Raises Corrupt when pg_restore cannot read the archive's table of contents."""
    command = Command((tools.path("pg_restore"), "--list", "--", str(archive)), {"LC_ALL": "C"})
    try:
        listed = process.run(command, timeout_s=_LIST_TIMEOUT_S).stdout
    except ToolError as error:
        raise Corrupt(
            f"{archive.name}: pg_restore {tools.version_text} cannot read its table of contents",
            detail=error.detail,
            hint="It is damaged, or written by a newer pg_dump than this pg_restore.",
        ) from error
    found = {match["name"]: match["value"].strip() for match in _FIELD.finditer(listed)}
    return ArchiveHeader(
        found.get("dbname", ""),
        _major(found.get("Dumped from database version", "")),
        _major(found.get("Dumped by pg_dump version", "")),
    )


def _major(text: str) -> int:
    match = re.match(r"\d+", text)
    return int(match[0]) if match else 0
