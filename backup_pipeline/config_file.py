"""The shape of backups.toml, and the errors that name its keys. Called by config.load.

The models mirror the file, key by key; nothing else of the program sees them.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from pydantic import BaseModel, ValidationError

from backup_pipeline.config import (
    DEFAULT_TIERS,
    ClusterConfig,
    Config,
    DatabaseConfig,
    ProvePolicy,
    ReceiveConfig,
    ScratchConfig,
    Secret,
    StoreConfig,
    TierConfig,
)
from backup_pipeline.config_tables import (
    BaseBackupTable,
    ClusterTable,
    DatabaseTable,
    FileTable,
    FromEnv,
    FromFile,
    ReceiveTable,
    ScratchTable,
    StoreTable,
    TierTable,
    UpToTable,
)
from backup_pipeline.domain.backup import MANUAL_TIER, is_subject_name
from backup_pipeline.errors import ConfigError
from backup_pipeline.units import parse_duration, parse_size_bytes

RESERVED_TIERS = ("backups", "base_backup", "drill", "wal", "prune", "prove", "latest", "proven")
"""Names of other assets and jobs, and words that name a backup; no tier may take them."""


def parse(text: str, path: Path) -> Config:
    """Read the file's text. Raises ConfigError that names the file, the key and the nearest valid one."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    shared = _validate({name: value for name, value in raw.items() if name != "databases"}, path)
    if shared.defaults.import_from:
        raise ConfigError(
            f"{path}: defaults.import_from: expected only below [databases.…]", hint=_APART_HINT
        )
    databases = raw.get("databases", {})
    if isinstance(databases, dict):
        defaults = raw.get("defaults", {})
        raw["databases"] = {
            name: {**defaults, **table} if isinstance(table, dict) else table
            for name, table in databases.items()
        }
    file = _validate(raw, path)
    if (file.store.access_key_id is None) != (file.store.secret_access_key is None):
        given, missing = "access_key_id", "secret_access_key"
        if file.store.access_key_id is None:
            given, missing = missing, given
        raise ConfigError(f"{path}: store.{missing}: missing", hint=f"Give it with {given}, or neither.")
    _check_names(path, "databases", list(file.databases))
    _check_names(path, "clusters", list(file.clusters), beside=list(file.databases))
    protected = {name: _database(name, table, path) for name, table in file.databases.items()}
    _check_tiers(path, protected)
    _check_imports(path, protected)
    return Config(
        path=path,
        store=_store(file.store, path),
        databases=protected,
        clusters={name: _cluster(name, table, path) for name, table in file.clusters.items()},
        scratch=ScratchConfig(
            dsn=_secret(file.scratch.dsn, "scratch.dsn", path),
            password=_secret(file.scratch.password, "scratch.password", path),
            bin_dir=_local(file.scratch.bin_dir, path),
        ),
    )


def nearest(name: str, known: Sequence[str]) -> str:
    """A sentence with the likeliest of `known`, or all of them; "" when there are none."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]}?"
    return f"Known here: {', '.join(sorted(known))}." if known else ""


def _validate(raw: Mapping[str, Any], path: Path) -> FileTable:
    try:
        return FileTable.model_validate(raw)
    except ValidationError as invalid:
        errors = invalid.errors(include_url=False, include_input=False)
    unknown = [error for error in errors if error["type"] == "extra_forbidden"]
    error = (unknown or errors)[0]
    where = _keys_of(error["loc"], raw)
    key = ".".join(str(part) for part in where)
    if error["type"] == "extra_forbidden":
        hint = nearest(str(where[-1]), _known_keys(where[:-1]))
        raise ConfigError(f"{path}: {key}: unknown key", hint=hint)
    if error["type"] == "missing":
        raise ConfigError(f"{path}: {key}: missing", hint="This key must be given.")
    said = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    expected = _EXPECTED.get(str(where[-1]), "")
    if expected:  # one of several forms, of which pydantic tells each apart
        found = [
            each["msg"] for each in errors if each["type"] == "value_error" and each["loc"][:3] == where[:3]
        ]
        expected = "; ".join([expected, *(text.removeprefix("Value error, ") for text in found[:1])])
    raise ConfigError(f"{path}: {key}: {expected or said}", hint=_HINTS.get(str(where[-1]), ""))


_EXPECTED_SOURCE = 'expected { env = "VARIABLE" } or { file = "/path" }, never the secret itself'
_EXPECTED = {
    "password": _EXPECTED_SOURCE,
    "restore_password": _EXPECTED_SOURCE,
    "access_key_id": _EXPECTED_SOURCE,
    "secret_access_key": _EXPECTED_SOURCE,
    "prove": 'expected "always", a cron such as "0 4 * * 6", or { up_to = "200GB", cron = "0 4 * * 6" }',
}
_HINTS = {
    "endpoint": 'For example "https://s3.example.net"; leave it out for AWS.',
    "storage_class": "A backup is re-read and proven: use STANDARD_IA, GLACIER_IR or INTELLIGENT_TIERING.",
}
_BRANCH = re.compile(r"From(Env|File)$|UpToTable$|function-|literal\[|str$|constrained")
_APART_HINT = (
    "No name there says whose dump it is: move each database's dumps to a folder of its own, name that one."
)


def _keys_of(location: tuple[int | str, ...], raw: Any) -> tuple[int | str, ...]:
    """The location without the parts that pydantic put there to name a branch of a union."""
    keys: list[int | str] = []
    for part in location:
        if isinstance(raw, Mapping) and part in raw:
            raw = raw[part]
        elif isinstance(part, str) and _BRANCH.match(part):
            continue
        keys.append(part)
    return tuple(keys)


def _known_keys(where: Sequence[int | str]) -> list[str]:
    match [str(part) for part in where]:
        case []:
            model: type[BaseModel] = FileTable
        case ["store"]:
            model = StoreTable
        case ["scratch"]:
            model = ScratchTable
        case ["defaults"] | ["databases", _]:
            model = DatabaseTable
        case ["clusters", _]:
            model = ClusterTable
        case ["clusters", _, "base_backup"]:
            model = BaseBackupTable
        case ["clusters", _, "receive"]:
            model = ReceiveTable
        case [*_, "tiers", _]:
            model = TierTable
        case [*_, "prove"]:
            model = UpToTable
        case _:
            return ["env", "file"]
    return list(model.model_fields)


def _check_names(
    path: Path, where: str, names: Sequence[str], *, reserved: Sequence[str] = (), beside: Sequence[str] = ()
) -> None:
    """Names become object keys, Dagster keys and tags: refuse what cannot, and what would be the same."""
    seen = {_in_dagster(name): name for name in beside}
    for name in names:
        # Dagster's steps are named <database>__<tier>, and - becomes _ there.
        if not is_subject_name(name) or name in reserved or re.search("[_-]{2}", name):
            raise ConfigError(
                f"{path}: {where}.{name}: this name cannot be used",
                hint="Use letters, digits, _ and - (63 at most, beginning and ending with none of - , no two "
                "of _ and - in a row)" + (f"; {', '.join(reserved)} are taken." if reserved else "."),
            )
        same = _in_dagster(name)
        if same in seen:
            raise ConfigError(
                f"{path}: {where}: {seen[same]} and {name} become one name in Dagster ({same})",
                hint="Rename one of them so that they differ in letters or digits.",
            )
        seen[same] = name


def _in_dagster(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "_", name.lower())


def _check_tiers(path: Path, databases: Mapping[str, DatabaseConfig]) -> None:
    """Refuse tiers of two databases that would be one job: a tier of one name is one, in all of them."""
    seen: dict[str, tuple[str, str]] = {}
    for name, database in databases.items():
        for tier in database.tiers:
            other, whose = seen.setdefault(_in_dagster(tier.name), (tier.name, name))
            if other != tier.name:
                raise ConfigError(
                    f"{path}: databases.{name}.tiers.{tier.name}: this and {other} of {whose} become one "
                    f"name in Dagster ({_in_dagster(tier.name)})",
                    hint="Write both in the same way, or let them differ in letters or digits.",
                )


def _check_imports(path: Path, databases: Mapping[str, DatabaseConfig]) -> None:
    """Refuse two databases that would take, and prune, each other's dumps for their own."""
    seen: dict[str, str] = {}
    for name, database in databases.items():
        if not database.import_from:
            continue
        place = _place(database.import_from)
        for other, whose in seen.items():
            if place.startswith(other) or other.startswith(place):
                raise ConfigError(
                    f"{path}: databases.{name}.import_from: {whose} and {name} import from one place, "
                    f"{other.rstrip('/')} and {place.rstrip('/')}",
                    hint=_APART_HINT,
                )
        seen[place] = name


def _place(url: str) -> str:
    """The one form of all URLs that lead to the same place; what lies in it begins so."""
    if url.startswith("file://"):
        return f"file://{os.path.realpath(unquote(url.removeprefix('file://')))}/"
    return re.sub("/+", "/", f"{url}/").replace(":/", "://", 1)


def _secret(source: str | FromEnv | FromFile | None, key: str, path: Path) -> Secret | None:
    where = f"{path}: {key}"
    match source:
        case None:
            return None
        case str():
            return Secret(value=source, key=where)
        case FromEnv():
            return Secret(env=source.env, key=where)
        case FromFile():
            return Secret(file=_local(source.file, path), key=where)


def _local(text: str, path: Path) -> str:
    """A path in the file is meant from the file's folder."""
    return str(path.parent / text) if text else ""


def store_location(url: str, path: Path) -> str:
    """The store's URL; the folder of a file: URL is meant from the folder of `path`."""
    if not url.startswith("file:"):
        return url
    folder = Path(quote(str(path.parent))) / url.removeprefix("file:").removeprefix("//")
    return f"file://{folder}"


def _store(table: StoreTable, path: Path) -> StoreConfig:
    return StoreConfig(
        url=store_location(table.url, path),
        endpoint=table.endpoint if isinstance(table.endpoint, str) else "",
        endpoint_from=_secret(
            None if isinstance(table.endpoint, str) else table.endpoint, "store.endpoint", path
        ),
        region=table.region,
        storage_class=table.storage_class,
        access_key_id=_secret(table.access_key_id, "store.access_key_id", path),
        secret_access_key=_secret(table.secret_access_key, "store.secret_access_key", path),
        timeout_s=parse_duration(table.timeout).total_seconds(),
    )


def _database(name: str, table: DatabaseTable, path: Path) -> DatabaseConfig:
    key = f"databases.{name}"
    _check_names(path, f"{key}.tiers", list(table.tiers), reserved=(MANUAL_TIER, *RESERVED_TIERS))
    dsn = _secret(table.dsn, f"{key}.dsn", path)
    if dsn is None:
        raise ConfigError(f"{path}: {key}.dsn: missing", hint="This key must be given.")
    return DatabaseConfig(
        name=name,
        engine=table.engine,
        dsn=dsn,
        password=_secret(table.password, f"{key}.password", path),
        restore_dsn=_secret(table.restore_dsn, f"{key}.restore_dsn", path),
        restore_password=_secret(table.restore_password, f"{key}.restore_password", path),
        critical_tables=tuple(table.critical_tables),
        jobs=table.jobs,
        proof=table.proof,
        prove=_prove(table.prove),
        import_from=store_location(table.import_from, path),
        tiers=tuple(TierConfig(tier, t.cron, t.keep, t.storage_class) for tier, t in table.tiers.items())
        or DEFAULT_TIERS,
        bin_dir=_local(table.bin_dir, path),
        owner=table.owner,
        lock_timeout=parse_duration(table.lock_timeout),
        stall_timeout=parse_duration(table.stall_timeout),
        manual_keep=parse_duration(table.manual_keep),
        role_passwords=table.role_passwords,
        fingerprint_connections=table.fingerprint_connections,
    )


def _prove(raw: str | UpToTable) -> ProvePolicy:
    if isinstance(raw, UpToTable):
        return ProvePolicy(up_to_bytes=parse_size_bytes(raw.up_to), cron=raw.cron)
    return ProvePolicy() if raw == "always" else ProvePolicy(always=False, cron=raw)


def _receive(name: str, table: ReceiveTable | None) -> ReceiveConfig | None:
    if table is None:
        return None
    slot = table.slot or f"backup_pipeline_{name.lower().replace('-', '_')}"[:63]
    return ReceiveConfig(slot, parse_duration(table.ship_every))


def _cluster(name: str, table: ClusterTable, path: Path) -> ClusterConfig:
    key = f"clusters.{name}"
    dsn = _secret(table.dsn, f"{key}.dsn", path)
    if dsn is None:
        raise ConfigError(f"{path}: {key}.dsn: missing", hint="This key must be given.")
    rate = table.base_backup.max_rate
    return ClusterConfig(
        name=name,
        dsn=dsn,
        password=_secret(table.password, f"{key}.password", path),
        data_directory=_local(table.data_directory, path),
        recovery_window=parse_duration(table.recovery_window),
        base_backup_cron=table.base_backup.cron,
        incremental_cron=table.base_backup.incremental,
        checkpoint=table.base_backup.checkpoint,
        max_rate_bytes_s=parse_size_bytes(rate) if rate else None,
        receive=_receive(name, table.receive),
        archive_timeout=parse_duration(table.archive_timeout),
        push_timeout=parse_duration(table.push_timeout),
        socket=_local(table.socket, path),
        bin_dir=_local(table.bin_dir, path),
        owner=table.owner,
        stall_timeout=parse_duration(table.stall_timeout),
        drill_cron=table.drill,
        heartbeat=table.heartbeat,
        heartbeat_database=table.heartbeat_database,
    )
