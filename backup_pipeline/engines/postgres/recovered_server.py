"""A server on a recovered directory, entered: whoever its roles are, a superuser of ours is among them.

Called for recovered clusters that are looked into and thrown away. Their own superuser may have any name, or
no login. Nothing runs here that is less kept to itself than the server.
"""

import contextlib
import re
import secrets
from collections.abc import Iterator
from functools import partial

from backup_pipeline.engines.postgres import recovery
from backup_pipeline.engines.postgres.cluster import LocalCluster
from backup_pipeline.engines.postgres.event_triggers import OFF, SINCE_MAJOR
from backup_pipeline.engines.postgres.server_argv import single_user_arguments
from backup_pipeline.engines.postgres.tools import Tools
from backup_pipeline.errors import ToolError
from backup_pipeline.units import show_line

ALWAYS_THERE = "template1"
"""A database that every cluster has; a recovered copy's may be entered, whatever the source's may."""

_SINGLE_USER_S = 600.0
_START_S = 300.0
_THROWN_AWAY = {"fsync": "off", "full_page_writes": "off", "autovacuum": "off"}
_REFUSED = re.compile(r"^.*(ERROR|FATAL|PANIC): .*", re.MULTILINE)


@contextlib.contextmanager
def entered(server: LocalCluster, tools: Tools) -> Iterator[str]:
    """Start a server on a recovered directory, yield the name of a superuser of ours, and stop it.

    Its settings are those of recovery.lay_out, and no trigger runs at a login. Raises ToolError.
    """
    settings = {**_THROWN_AWAY, **(OFF if tools.major >= SINCE_MAJOR else {}), **server.settings}
    server.settings, server.answers = settings, partial(recovery.is_ready, server.log)
    server.create()  # opens its folder to the server's user
    role = make_superuser(server)
    server.log.unlink(missing_ok=True)  # what the replay said there is not what this server says
    server.start(timeout_s=_START_S)
    try:
        yield role
    finally:
        server.stop()


def make_superuser(server: LocalCluster, *statements: str) -> str:
    """Make a superuser of ours in a stopped cluster, and carry out `statements` of one line; its name.

    Without a session: no role of the source's is needed for it, and its own are left as they are. Raises
    ToolError, also when a statement fails.
    """
    role = f"backup_pipeline_{secrets.token_hex(8)}"
    settings = {**server.settings, "dynamic_shared_memory_type": "mmap"}  # in its own folder
    arguments = single_user_arguments(server.data, settings, ALWAYS_THERE)
    lines = "".join(f"{line}\n" for line in (f"CREATE ROLE {role} SUPERUSER LOGIN", *statements))
    done = server.run("postgres", *arguments, stdin=lines.encode(), timeout_s=_SINGLE_USER_S)
    # It goes on after a statement that failed, and ends with 0.
    refused = _REFUSED.search(done.stderr)
    if done.returncode or refused:
        said = refused[0] if refused else done.stderr.strip()[-300:]
        raise ToolError(
            "the recovered cluster cannot be entered: a single-user server ended with "
            f"{done.returncode}: {show_line(said)}"
        )
    return role
