"""Where a server of ours listens: a private folder, short of path, and a link that says where it is.

Called by cluster.py, and by scratch.py for what a killed process left.
"""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from backup_pipeline.errors import ToolError

_LINK = "socket"
_PATH_BYTES = 107  # sun_path, less its closing zero


def make_socket_folder(folder: Path, port: int) -> Path:
    """A new private folder for the socket: in `folder`, or elsewhere when its path is too long.

    A link in `folder` says where, for `remove_socket_folder`.
    """
    places = (str(folder), tempfile.gettempdir(), "/tmp", "/var/tmp")  # noqa: S108 - mkdtemp makes it private
    for place in places:
        name = f"{place}/backup-xxxxxxxx/.s.PGSQL.{port}"
        # PostgreSQL reads a quoted list there, and libpq an abstract name or a list.
        odd = not place.startswith("/") or any(mark in place for mark in '",')
        if len(os.fsencode(name)) <= _PATH_BYTES and not odd and os.access(place, os.W_OK):
            made = Path(tempfile.mkdtemp(prefix="backup-", dir=place))
            (folder / _LINK).symlink_to(made)
            return made
    raise ToolError("no folder for a server's socket is writable and short of path, not even /tmp")


def remove_socket_folder(folder: Path) -> None:
    """Remove where the cluster in `folder` listens or, before a kill, has listened."""
    link = folder / _LINK
    with contextlib.suppress(OSError):
        shutil.rmtree(folder / os.readlink(link), ignore_errors=True)
        link.unlink()
