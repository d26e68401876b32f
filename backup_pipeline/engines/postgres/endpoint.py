"""Where a PostgreSQL server is, and how it is reached: the same for our sessions and for the client tools.

Called by everything that talks to PostgreSQL: sessions through `Endpoint.conninfo`, tools through
`Endpoint.environment`. Both get the same parameters, so that a dump and its fingerprint can never come
from two servers. Nothing is connected here.
"""

import contextlib
import getpass
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from backup_pipeline.config import Secret
from backup_pipeline.errors import ConfigError

APPLICATION = "backup_pipeline"
"""Begins the application_name of each of our sessions and tools, as pg_stat_activity shows it."""

_CONNECT_TIMEOUT_S = 10
_KEEPALIVES = {
    "keepalives": "1",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "6",
}
_SOCKET_FOLDERS = ("/var/run/postgresql", "/tmp")  # noqa: S108 - where builds listen
# Where operators keep connections and passwords. No other variable of ours reaches a session or a tool.
_HONOURED = ("PGSERVICE", "PGSERVICEFILE", "PGSYSCONFDIR", "PGPASSFILE")
_PASSWORD = "PGPASSWORD"  # noqa: S105 - a variable's name
# What libpq takes from no variable, and whoever lists processes may see.
_SHOWABLE = ("tcp_user_timeout", "oauth_issuer", "oauth_client_id", "oauth_scope", *_KEEPALIVES)
# libpq refuses "" for these, and has no default of its own to give back.
_NEUTRAL = {"sslcertmode": "allow", "min_protocol_version": "3.0", "max_protocol_version": "3.0"}


@dataclass(frozen=True)
class Endpoint:
    """A database on a server: a DSN (URI or key=value), and its password when that is kept apart.

    Frozen, and safe to show: neither `repr` nor `shown` holds the DSN, which may hold a password.
    Raises ConfigError for a DSN that libpq cannot read.
    """

    dsn: str = field(repr=False)
    password: Secret | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _ = self._given

    def __repr__(self) -> str:
        return f"Endpoint({self.shown})"

    @cached_property
    def _given(self) -> Mapping[str, str]:
        try:
            given = conninfo_to_dict(self.dsn)
        except psycopg.ProgrammingError:
            # libpq's own message quotes the part that it did not understand: perhaps a password.
            raise ConfigError(
                "a DSN cannot be read: neither a URI nor key=value pairs",
                hint="Write postgresql://user@host:5432/database, or host=… port=… dbname=… user=…; in URIs, "
                "special characters are percent-encoded; elsewhere, values with spaces are quoted with '.",
            ) from None
        return {name: str(value) for name, value in given.items() if value is not None}

    @property
    def database(self) -> str:
        """The database's name, as libpq would choose it; what a service file says is known to `resolved`."""
        return self._given.get("dbname") or self.user

    @property
    def user(self) -> str:
        """The role's name, as libpq would choose it; what a service file says is known to `resolved`."""
        return self._given.get("user") or getpass.getuser()

    @property
    def named(self) -> bool:
        """Whether `database` and `user` are what libpq would choose: not where a service file may say it."""
        return not _service(self._given) or {"dbname", "user"} <= self._given.keys()

    @property
    def by_service(self) -> bool:
        """Whether a service file says what the DSN does not, host and port included."""
        return bool(_service(self._given))

    @property
    def shown(self) -> str:
        """`user@host:port/database`, for messages."""
        given = self._given
        if service := _service(given):
            return f"service {service}" + (f", database {given['dbname']}" if "dbname" in given else "")
        host = given.get("host") or given.get("hostaddr") or _socket_folder(given)
        return f"{self.user}@{host}:{given.get('port') or '5432'}/{self.database}"

    @property
    def address(self) -> tuple[str, str]:
        """(host or socket's folder, port), as libpq would choose them; see `database` for service files."""
        given = self._given
        return given.get("host") or given.get("hostaddr") or _socket_folder(given), given.get(
            "port"
        ) or "5432"

    def with_database(self, name: str) -> "Endpoint":
        """The same server and role, another database."""
        return Endpoint(make_conninfo(self.dsn, dbname=name), self.password)

    @property
    def conninfo(self) -> dict[str, str]:
        """Keywords for psycopg. Holds the password."""
        wanted = self._wanted(overriding=_planted())
        return wanted | {"client_encoding": "UTF8"}

    def environment(self) -> dict[str, str]:
        """Variables for pg_dump, pg_restore and the other tools. Holds the password.

        The database comes this way too, and `tool_dbname` as the tools' `--dbname`, so that no name
        that people chose is ever parsed as an option or a connection string.
        """
        variables = {item.keyword.decode(): item.envvar for item in pq.Conninfo.get_defaults()}
        environment = {name: os.environ[name] for name in _HONOURED if name in os.environ}
        for keyword, value in self._wanted(overriding={}).items():
            variable = variables.get(keyword)
            if variable is not None and keyword != "client_encoding":  # it would recode the dump
                environment[variable.decode()] = value
        return environment

    @property
    def tool_dbname(self) -> str:
        """The `--dbname` of a tool beside `environment()`: what libpq takes from no variable. Not secret.

        Beside a service it says again what the DSN says: a service file wins over variables. But not its
        `options`, which come in PGOPTIONS beside those of the tool's caller. Raises ConfigError for what
        the tools can only be given in sight of all, `sslpassword` say.
        """
        variables = {item.keyword.decode() for item in pq.Conninfo.get_defaults() if item.envvar is not None}
        given = {name: value for name, value in self._given.items() if name != "fallback_application_name"}
        hidden = sorted(given.keys() - variables - {*_SHOWABLE})
        if hidden:
            raise ConfigError(
                f"the DSN of {self.shown} has {', '.join(hidden)}, which cannot be given to pg_dump unseen",
                hint="Say it in a service file, which only its owner may read, or do without it.",
            )
        beside = {"password", "service", "client_encoding", "options"} if _service(given) else variables
        said = {name: value for name, value in (_KEEPALIVES | given).items() if name not in beside}
        return make_conninfo("", **said)

    def _wanted(self, *, overriding: Mapping[str, str]) -> dict[str, str]:
        given = dict(self._given)
        wanted = {} if _service(given) else dict(overriding)  # what a service file says would lose against it
        wanted |= {"connect_timeout": str(_CONNECT_TIMEOUT_S), "application_name": APPLICATION, **_KEEPALIVES}
        if not _service(given):
            wanted |= {"dbname": self.database, "user": self.user}
            if not given.get("host") and not given.get("hostaddr"):
                wanted["host"] = _socket_folder(given)
        wanted |= given
        if self.password is not None:
            wanted["password"] = self.password.reveal()
        return wanted


def given_by_hand(dsn: str, key: str) -> Endpoint:
    """The endpoint of a DSN that a person gave with the option `key`: without a password in it,
    PGPASSWORD's is taken, because a password in a command line is seen by all on the machine.

    A service file says its own. Raises ConfigError for a DSN that libpq cannot read.
    """
    endpoint = Endpoint(dsn)
    given = endpoint._given
    if _PASSWORD not in os.environ or "password" in given or _service(given):
        return endpoint
    return Endpoint(dsn, Secret(env=_PASSWORD, key=key))


def without_secrets(dsn: str) -> str:
    """`dsn` as it is, or, when a password or key is in it, the same as key=value pairs without."""
    secrets = secret_options()
    given = conninfo_to_dict(dsn)
    if not secrets & given.keys():
        return dsn
    return make_conninfo("", **{name: value for name, value in given.items() if name not in secrets})


def secret_options() -> frozenset[str]:
    """The keywords of a DSN whose values libpq hides when they are typed."""
    return frozenset(item.keyword.decode() for item in pq.Conninfo.get_defaults() if item.dispchar == b"*")


def _service(given: Mapping[str, str]) -> str:
    return given.get("service") or os.environ.get("PGSERVICE", "")


def _socket_folder(given: Mapping[str, str]) -> str:
    """The local socket's folder. Left to libpq, psycopg and Debian's tools would look in two places."""
    name = f".s.PGSQL.{given.get('port') or '5432'}"
    for folder in _SOCKET_FOLDERS:
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.stat(f"{folder}/{name}").st_mode):
                return folder
    return "localhost"


def _planted() -> dict[str, str]:
    """What undoes the variables around us that libpq would read into a session of ours."""
    undo = {}
    for option in pq.Conninfo.get_defaults():
        variable, keyword = (option.envvar or b"").decode(), option.keyword.decode()
        if variable in os.environ and variable not in _HONOURED:
            undo[keyword] = (option.compiled or b"").decode() or _NEUTRAL.get(keyword, "")
    return undo
