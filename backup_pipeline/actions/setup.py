"""The first steps: write a configuration from what is there, and check one that exists.

Called by `init` and `check`. Neither changes anything on a server or in a store, but for the new
file, the folder of a local store, and a scratch object.
"""

import contextlib
import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from backup_pipeline.actions import backups, target
from backup_pipeline.actions.dump import try_store
from backup_pipeline.actions.protected import Protected
from backup_pipeline.config import CONFIG_NAME, CONFIG_VARIABLE
from backup_pipeline.config_file import parse
from backup_pipeline.engines.postgres.endpoint import Endpoint, given_by_hand, secret_options
from backup_pipeline.engines.postgres.lock import NEUTRAL_DATABASE
from backup_pipeline.engines.postgres.preflight import Check, CheckStatus, check_source
from backup_pipeline.engines.postgres.server import Connection, connect, read_server_info
from backup_pipeline.engines.postgres.tools import SERVER, find_tools
from backup_pipeline.errors import BackupError, ConfigError, Refused, ServerError, ToolError
from backup_pipeline.storage.directory import create_root, folder_of
from backup_pipeline.units import show_count, show_line

STORE_FOLDER = "backups"
_STORE_HINT = "Name the store with --store: s3://bucket/prefix, or file:///folder."
_LARGEST = 3
_VARIABLES = {
    "PGHOST": "host",
    "PGPORT": "port",
    "PGUSER": "user",
    "PGPASSWORD": "password",
    "PGDATABASE": "dbname",
    "PGSSLMODE": "sslmode",
    "PGSSLROOTCERT": "sslrootcert",
}


@dataclass(frozen=True)
class Written:
    """A configuration that was written, and what to tell about it."""

    path: Path
    lines: tuple[str, ...]


@dataclass(frozen=True)
class _Found:
    """A database that the configuration will protect."""

    name: str  # in the configuration
    database: str
    largest: tuple[str, ...]


def initialise(path: Path, *, dsn: str, store_url: str) -> Written:
    """Write a commented configuration to `path` for what `dsn`, else the variables of libpq, reach.

    What they say is written, because nothing else of ours reads them; but no password. Without a
    database it covers all of the server. Raises Refused when the file exists, ConfigError when it cannot
    be written or `store_url` cannot be used, ServerError when no server is reached: nothing is written then.
    """
    if path.exists():
        raise Refused(f"{path} exists and is not overwritten", hint="Name another file with --output.")
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent}", hint="Make it, or name another file.")
    given = given_by_hand(dsn, "--dsn") if dsn else Endpoint(_from_environment())
    parts = conninfo_to_dict(given.dsn)
    password = given.password.reveal() if given.password else parts.get("password")
    server = given if parts.get("dbname") else given.with_database(NEUTRAL_DATABASE)
    with contextlib.closing(connect(server, purpose="init")) as session:
        version = read_server_info(session).version_text
        names = [given.database] if parts.get("dbname") else _databases(session)
    found = [_look(server.with_database(name), names) for name in names]
    if not found:
        raise Refused(f"no database to protect on {server.shown}", hint="Create one, or name one in --dsn.")
    lines = [f"found PostgreSQL {version} on {server.shown}: {', '.join(names)}"]
    variable = f"{_name(found[0].name).upper().replace('-', '_')}_PASSWORD" if password else ""
    if password:
        os.environ.setdefault(variable, str(password))
        lines.append(f"the password is not written: set {variable} wherever backup-pipeline runs")
    if hidden := sorted((parts.keys() & secret_options()) - {"password"}):
        lines.append(f"not written, being secret: {', '.join(hidden)}; say it in a service file")
    plain = {key: str(value) for key, value in parts.items() if key not in secret_options()}
    text = _text(found, plain, store_url or f"file:{STORE_FOLDER}", variable)
    store = _store_of(text, path)
    if store.startswith("file:"):
        folder = folder_of(store)
        create_root(folder)
        lines.append(f"backups go to {folder}; use another disk or an S3 bucket for real ones")
    _write(path, text)
    lines.append(f"wrote {path}")
    lines.append(f"next: {shlex.join([*_program(path), 'backup', found[0].name])}")
    return Written(path, tuple(lines))


def _store_of(text: str, path: Path) -> str:
    """The store's URL, once the whole text is known to be good: a dead file would bar the next attempt."""
    try:
        return parse(text, path).store.url
    except ConfigError as error:
        raise ConfigError(f"nothing was written: {error.message}", hint=error.hint or _STORE_HINT) from error


def _write(path: Path, text: str) -> None:
    """Make the file, for its owner alone. Raises ConfigError."""
    try:
        made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(made, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written: {error.strerror}", hint="Name another file with --output."
        ) from error


def _program(path: Path) -> tuple[str, ...]:
    """What begins a command that reads this configuration."""
    found = Path(os.environ.get(CONFIG_VARIABLE) or CONFIG_NAME).absolute() == path
    return ("backup-pipeline",) if found else ("backup-pipeline", "--config", str(path))


def check(protected: Protected) -> Iterator[Check]:
    """Look at source, store, scratch and target, and yield each thing as soon as it is known.

    Raises the first failure at the end, after everything was looked at.
    """
    failures: list[BackupError] = []
    config = protected.config
    try:
        found = check_source(
            protected.source(),
            bin_dir=config.bin_dir,
            critical_tables=config.critical_tables,
            role_passwords=config.role_passwords,
        )
    except BackupError as error:
        found = (Check("source", CheckStatus.FAILED, error.message, error.hint),)
    yield from found
    failures += [
        ServerError(item.found, hint=item.hint) for item in found if item.status is CheckStatus.FAILED
    ]
    looks = (("store", _check_store), ("proof", _check_proof), ("restore", _check_restore))
    for name, look in (*looks, *([("imports", _check_imports)] if protected.open_imports else [])):
        try:
            yield look(protected)
        except BackupError as error:
            failures.append(error)
            yield Check(name, CheckStatus.FAILED, error.message, error.hint)
    if failures:
        raise failures[0]


def in_words(item: Check) -> str:
    """A line for one thing that was looked at, and one for what to do."""
    hint = f"\n           {show_line(item.hint)}" if item.hint and item.status is not CheckStatus.OK else ""
    return f"{item.status:<8} {item.name}: {show_line(item.found)}{hint}"


def _check_store(protected: Protected) -> Check:
    try_store(protected)
    return Check("store", CheckStatus.OK, f"{protected.store.url} can be written to")


def _check_imports(protected: Protected) -> Check:
    found = show_count(len(backups.imported_listing(protected).backups), "older dump")
    return Check("imports", CheckStatus.OK, f"{found} in {protected.config.import_from}")


def _check_proof(protected: Protected) -> Check:
    endpoint = protected.scratch_server()
    with contextlib.closing(connect(protected.source(), purpose="check")) as session:
        source = read_server_info(session)
    major = source.major
    if endpoint is not None:
        with contextlib.closing(connect(endpoint, purpose="check")) as session:
            found = read_server_info(session)
        if found.major != major:
            shown = f"the scratch server is PostgreSQL {found.version_text}, the source {major}"
            return Check("proof", CheckStatus.WARNING, shown, "Proofs need the same major version.")
        if source.system_identifier and found.system_identifier == source.system_identifier:
            shown = f"the scratch server {endpoint.shown} is the cluster that backups are taken from"
            hint = "Name another server with [scratch] dsn, or none: we start one."
            return Check("proof", CheckStatus.WARNING, shown, hint)
        return Check("proof", CheckStatus.OK, f"proofs restore to {endpoint.shown}")
    try:
        tools = find_tools(protected.scratch.bin_dir, exactly=major, needs=SERVER)
    except ToolError as error:
        shown = f"no PostgreSQL {major} server here to restore proofs into: {error.message}"
        return Check("proof", CheckStatus.WARNING, shown, error.hint)
    return Check("proof", CheckStatus.OK, f"proofs restore into a cluster of {tools.bin_dir}")


def _check_restore(protected: Protected) -> Check:
    if protected.config.restore_dsn is None:
        hint = f"Set databases.{protected.name}.restore_dsn, or give the server with --to when you restore."
        return Check("restore", CheckStatus.WARNING, "no restore_dsn: where to restore is not known", hint)
    endpoint, live = target.maintenance(protected.target()), protected.source().database
    with contextlib.closing(connect(endpoint, purpose="check")) as session:
        may_create = target.may_create(session)
        there = target.exists(session, live)
        problems = tuple(target.swap_problems(endpoint, session, live)) if there else ()
        grant = target.signal_grant(session)
    if not may_create:
        shown = f"{endpoint.user} may not create databases on {endpoint.shown}"
        return Check("restore", CheckStatus.WARNING, shown, "Grant it: ALTER ROLE … CREATEDB.")
    shown = f"restores go to {endpoint.shown}"
    for problem, fix in problems:
        return Check("restore", CheckStatus.WARNING, f"{shown}; {live} could not be swapped: {problem}", fix)
    if there and grant:
        shown += f"; a swap of {live} could not end the sessions of other roles"
        return Check("restore", CheckStatus.WARNING, shown, f"As a superuser: {grant}")
    return Check("restore", CheckStatus.OK, shown)


def _from_environment() -> str:
    if service := os.environ.get("PGSERVICE"):
        return make_conninfo("", service=service)
    return make_conninfo("", **{name: os.environ[v] for v, name in _VARIABLES.items() if os.environ.get(v)})


def _databases(session: Connection) -> list[str]:
    rows = session.execute(
        "SELECT datname FROM pg_catalog.pg_database"
        " WHERE datallowconn AND NOT datistemplate AND datname <> %s ORDER BY datname",
        [NEUTRAL_DATABASE],
    )
    return [str(name) for (name,) in rows]


def _look(endpoint: Endpoint, names: Sequence[str]) -> _Found:
    with contextlib.closing(connect(endpoint, purpose="init")) as session:
        rows = session.execute(
            "SELECT n.nspname || '.' || c.relname FROM pg_catalog.pg_class c"
            " JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace"
            " WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition"
            " AND pg_catalog.left(n.nspname, 3) <> 'pg_' AND n.nspname <> 'information_schema'"
            " ORDER BY pg_catalog.pg_total_relation_size(c.oid) DESC LIMIT %s",
            [_LARGEST],
        ).fetchall()
    name = _name(endpoint.database)
    taken = [other for other in names if _name(other) == name]
    suffix = f"-{taken.index(endpoint.database) + 1}" if len(taken) > 1 else ""
    return _Found(f"{name[:58]}{suffix}", endpoint.database, tuple(str(row[0]) for row in rows))


def _name(database: str) -> str:
    """A database's name as the configuration can use it."""
    return re.sub(r"[^A-Za-z0-9]+", "-", database).strip("-").lower()[:60] or "database"


def _text(found: Sequence[_Found], parts: dict[str, str], store: str, variable: str) -> str:
    tables = "\n".join(_table(item, parts, variable) for item in found)
    return f"""# What backup-pipeline protects, and where the backups go. Times are UTC.

[store]
url = {_toml(store)}    # or "s3://bucket/prefix"
# endpoint = "https://s3.example.net"         # S3 only; leave it out for AWS
# access_key_id = {{ env = "S3_KEY" }}          # leave out for boto3's own chain
# secret_access_key = {{ env = "S3_SECRET" }}

{tables}
# Left out, these tiers apply to each database:
# [databases.<name>.tiers.daily]
# cron = "0 2 * * *"
# keep = 7
# weekly: "0 2 * * 0", keep 4; monthly: "0 2 1 * *", keep 12

# [scratch]                                   # where proofs restore to; left out: a cluster of our own
# dsn = "postgresql://prover@scratch.internal/postgres"
"""


def _table(item: _Found, parts: dict[str, str], variable: str) -> str:
    dsn = make_conninfo("", **{**parts, "dbname": item.database})
    restore = make_conninfo("", **{**parts, "dbname": NEUTRAL_DATABASE})
    password = f"password = {{ env = {_toml(variable)} }}\n" if variable else ""
    again = f"# restore_password = {{ env = {_toml(variable)} }}\n" if variable else ""
    largest = ", ".join(_toml(table) for table in item.largest)
    return f"""[databases.{item.name}]
dsn = {_toml(dsn)}
{password}# restore_dsn = {_toml(restore)}    # may create and rename databases; only restores read it
{again}# critical_tables = [{largest}]    # counted one by one in every proof
"""


def _toml(text: str) -> str:
    """A TOML basic string; JSON's escapes are a part of TOML's."""
    return json.dumps(text, ensure_ascii=True)
