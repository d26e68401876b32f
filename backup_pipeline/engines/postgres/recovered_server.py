"""A server on a recovered directory, entered: whoever its roles are, a superuser of ours is among them.

Called for a recovered cluster that is looked into and thrown away. Its own superuser may have any name, or no
login.
"""

import contextlib
import secrets
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from backup_pipeline import process
from backup_pipeline.engines.postgres import recovery
from backup_pipeline.engines.postgres.cluster import LocalCluster, server_identity
from backup_pipeline.engines.postgres.event_triggers import OFF, SINCE_MAJOR
from backup_pipeline.engines.postgres.tools import Tools
from backup_pipeline.process import Command

_TIMEOUT_S = 120.0
_START_S = 300.0
_THROWN_AWAY = {"fsync": "off", "full_page_writes": "off", "autovacuum": "off"}
_ALWAYS_THERE = "template1"


@contextlib.contextmanager
def entered(server: LocalCluster, tools: Tools) -> Iterator[str]:
    """Start a server on a recovered directory, yield the name of a superuser of ours, and stop it.

    Its settings are those of recovery.lay_out, and no trigger runs at a login. Raises ToolError.
    """
    settings = {**_THROWN_AWAY, **(OFF if tools.major >= SINCE_MAJOR else {}), **server.settings}
    server.settings, server.answers = settings, partial(recovery.is_ready, server.log)
    server.create()  # opens its folder to the server's user
    role = f"backup_pipeline_{secrets.token_hex(6)}"
    _create_superuser(server, role, settings)
    server.log.unlink(missing_ok=True)  # what the replay said there is not what this server says
    server.start(timeout_s=_START_S)
    try:
        yield role
    finally:
        server.stop()


def single_user_argv(
    postgres: str, data: Path, settings: Mapping[str, str], database: str
) -> tuple[str, ...]:
    """The command that runs statements of its standard input as the bootstrap superuser, one a line.

    Source: PostgreSQL, "postgres", Options for Single-User Mode.
    """
    given = (part for name, value in settings.items() for part in ("-c", f"{name}={value}"))
    return (postgres, "--single", "-D", str(data), *given, database)


def _create_superuser(server: LocalCluster, role: str, settings: Mapping[str, str]) -> None:
    """No role of the source's is needed for it, and its own are left as they are."""
    argv = single_user_argv(server.program("postgres"), server.data, settings, _ALWAYS_THERE)
    command = Command(argv, {"LC_ALL": "C"}, identity=server_identity(), cwd="/")
    process.run(command, timeout_s=_TIMEOUT_S, stdin=f"CREATE ROLE {role} SUPERUSER LOGIN\n".encode())
