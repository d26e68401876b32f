"""What belongs to a database but to no dump of it: read from the source, written to a restored one.

Called by the dump, which records it in the manifest, by the restore, which makes a database like the
source's, and by the proof, which compares. The roles and tablespaces named here must exist where they
are written to: that is roles.py's and the restore's concern.
"""

# ruff: noqa: S608 - the queries are joined from constants of this module

from collections.abc import Iterable, Iterator

from psycopg import sql

from backup_pipeline.domain.backup import DatabaseProperties, Source
from backup_pipeline.domain.unfinished import unmarked
from backup_pipeline.engines.postgres.notes import read_notes
from backup_pipeline.engines.postgres.server import Connection, read_server_info
from backup_pipeline.engines.postgres.tools import Tools
from backup_pipeline.errors import ConfigError, ServerError

_ICU_RULES_SINCE = 160000
_LOCALE_FOR_ALL_SINCE = 170000
_FIRST_USER_OID = 16384
_BOOTSTRAP_OID = 10
_PROVIDERS = {"c": "libc", "i": "icu", "b": "builtin"}

# PostgreSQL keeps these as lists of quoted names; as one string they would become one name.
# Source: src/bin/pg_dump/dumputils.c, variable_is_guc_list_quote.
_QUOTED_LISTS = frozenset(
    (
        "local_preload_libraries",
        "search_path",
        "session_preload_libraries",
        "shared_preload_libraries",
        "temp_tablespaces",
        "unix_socket_directories",
    )
)

# Owners of what a dump holds; the bootstrap role's are not in pg_shdepend, because it cannot be dropped.
_OWNED = (
    ("pg_class", "relowner"),
    ("pg_namespace", "nspowner"),
    ("pg_proc", "proowner"),
    ("pg_type", "typowner"),
    ("pg_largeobject_metadata", "lomowner"),
    ("pg_foreign_server", "srvowner"),
    ("pg_foreign_data_wrapper", "fdwowner"),
    ("pg_event_trigger", "evtowner"),
    ("pg_publication", "pubowner"),
    ("pg_subscription", "subowner"),
    ("pg_operator", "oprowner"),
    ("pg_opclass", "opcowner"),
    ("pg_opfamily", "opfowner"),
    ("pg_collation", "collowner"),
    ("pg_conversion", "conowner"),
    ("pg_language", "lanowner"),
    ("pg_ts_dict", "dictowner"),
    ("pg_ts_config", "cfgowner"),
    ("pg_statistic_ext", "stxowner"),
)
_GRANTED = (
    ("pg_class", "relacl"),
    ("pg_namespace", "nspacl"),
    ("pg_proc", "proacl"),
    ("pg_type", "typacl"),
    ("pg_attribute", "attacl"),
    ("pg_default_acl", "defaclacl"),
)


def read_properties(connection: Connection, name: str) -> DatabaseProperties:
    """The properties of the database `name` of the server, through a session in any of its databases."""
    version = connection.info.server_version
    locale_column = "d.datlocale" if version >= _LOCALE_FOR_ALL_SINCE else "d.daticulocale"
    rules_column = "d.daticurules" if version >= _ICU_RULES_SINCE else "NULL::pg_catalog.text"
    query = f"""
        SELECT d.oid::bigint, pg_catalog.pg_get_userbyid(d.datdba),
               pg_catalog.pg_encoding_to_char(d.encoding), d.datcollate, d.datctype,
               d.datlocprovider::text, COALESCE({locale_column}, ''), COALESCE({rules_column}, ''),
               t.spcname, d.datconnlimit, d.datallowconn, d.datistemplate,
               pg_catalog.shobj_description(d.oid, 'pg_database'), d.datacl IS NOT NULL
          FROM pg_catalog.pg_database d JOIN pg_catalog.pg_tablespace t ON t.oid = d.dattablespace
         WHERE d.datname = %s
    """
    row = connection.execute(query.encode(), [name]).fetchone()
    if row is None:
        raise ServerError(
            f"there is no database {name!r} on this server", hint="`psql -l` lists the databases."
        )
    oid, owner, encoding, collate, ctype, provider, locale, rules, tablespace, limit, *rest = row
    allow_connections, is_template, comment, has_grants = rest
    return DatabaseProperties(
        name=name,
        owner=str(owner),
        encoding=str(encoding),
        collate=str(collate),
        ctype=str(ctype),
        locale_provider=_PROVIDERS.get(str(provider), str(provider)),
        locale=str(locale),
        icu_rules=str(rules),
        tablespace=str(tablespace),
        connection_limit=int(str(limit)),
        allow_connections=bool(allow_connections),
        is_template=bool(is_template),
        comment=unmarked(None if comment is None else str(comment)),
        settings=_read_settings(connection, oid),
        grants=_read_grants(connection, oid) if has_grants else None,
    )


def _read_settings(connection: Connection, oid: object) -> tuple[tuple[str, str], ...]:
    rows = connection.execute(
        "SELECT COALESCE(r.rolname, ''), pg_catalog.unnest(s.setconfig)"
        " FROM pg_catalog.pg_db_role_setting s LEFT JOIN pg_catalog.pg_roles r ON r.oid = s.setrole"
        " WHERE s.setdatabase = %s::bigint::oid AND (s.setrole = 0 OR r.oid IS NOT NULL)",
        [oid],
    )
    return tuple(sorted((str(role), str(setting)) for role, setting in rows))


def _read_grants(connection: Connection, oid: object) -> tuple[tuple[str, str, str, bool], ...]:
    rows = connection.execute(
        "SELECT pg_catalog.pg_get_userbyid(a.grantor),"
        " CASE WHEN a.grantee = 0 THEN '' ELSE pg_catalog.pg_get_userbyid(a.grantee) END,"
        " a.privilege_type, a.is_grantable"
        " FROM pg_catalog.pg_database d, pg_catalog.aclexplode(d.datacl) a WHERE d.oid = %s::bigint::oid",
        [oid],
    )
    return tuple(sorted((str(by), str(to), str(what), bool(grantable)) for by, to, what, grantable in rows))


def read_source(connection: Connection, tools: Tools) -> Source:
    """The source as a manifest records it: the database that `connection` is in, and what it leans on."""
    info = read_server_info(connection)
    row = connection.execute(
        "SELECT pg_catalog.current_database(), pg_catalog.pg_database_size(pg_catalog.current_database())"
    ).fetchone()
    if row is None:
        raise ServerError("the server did not say which database this is")
    properties = read_properties(connection, str(row[0]))
    return Source(
        server_version=info.version,
        server_version_text=info.version_text,
        client_version=tools.version,
        client_path=tools.path("pg_dump"),
        system_identifier=info.system_identifier,
        database=properties,
        size_bytes=int(str(row[1])),
        roles=_read_roles(connection, properties),
        extensions=_read_extensions(connection),
        tablespaces=_read_tablespaces(connection, properties),
        notes=read_notes(connection),
    )


def _read_roles(connection: Connection, properties: DatabaseProperties) -> tuple[str, ...]:
    """Roles that own or are granted something here, or that a policy or a setting names; not `pg_*`."""
    depended = """
        SELECT r.rolname FROM pg_catalog.pg_shdepend s JOIN pg_catalog.pg_roles r ON r.oid = s.refobjid
         WHERE s.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass
           AND s.dbid = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
    """
    found = {str(role) for (role,) in connection.execute(f"{depended} UNION {_bootstrap_query()}".encode())}
    found |= {properties.owner} | {role for role, _ in properties.settings if role}
    found |= {role for by, to, _, _ in properties.grants or () for role in (by, to) if role}
    return tuple(sorted(role for role in found if not role.startswith("pg_")))


def _bootstrap_query() -> str:
    """The role that initdb made, if it owns or is granted something that a dump holds."""
    owned = (
        f"EXISTS (SELECT FROM pg_catalog.{table}"
        f" WHERE oid >= {_FIRST_USER_OID} AND {owner} = {_BOOTSTRAP_OID})"
        for table, owner in _OWNED
    )
    granted = (
        f"EXISTS (SELECT FROM pg_catalog.{table} t, pg_catalog.aclexplode(t.{acl}) a"
        f" WHERE {'attrelid' if table == 'pg_attribute' else 'oid'} >= {_FIRST_USER_OID}"
        f" AND {_BOOTSTRAP_OID} IN (a.grantee, a.grantor))"
        for table, acl in _GRANTED
    )
    uses = " OR ".join((*owned, *granted))
    return f"SELECT rolname FROM pg_catalog.pg_roles WHERE oid = {_BOOTSTRAP_OID} AND ({uses})"


def _read_extensions(connection: Connection) -> tuple[tuple[str, str], ...]:
    """What CREATE EXTENSION made here: not plpgsql as every new database has it."""
    query = f"SELECT extname, extversion FROM pg_catalog.pg_extension WHERE oid >= {_FIRST_USER_OID}"
    return tuple(sorted((str(name), str(version)) for name, version in connection.execute(query.encode())))


def _read_tablespaces(connection: Connection, properties: DatabaseProperties) -> tuple[str, ...]:
    query = """
        SELECT DISTINCT t.spcname FROM pg_catalog.pg_class c
          JOIN pg_catalog.pg_tablespace t ON t.oid = c.reltablespace
    """
    found = {str(name) for (name,) in connection.execute(query)} | {properties.tablespace}
    return tuple(sorted(found - {"pg_default", "pg_global"}))


def create_statement(properties: DatabaseProperties, name: str, *, server_version: int) -> sql.Composed:
    """CREATE DATABASE as empty as can be, with the source's encoding, locale and tablespace. Pure.

    Raises ConfigError when a server of this version cannot have such a locale.
    """
    provider, since = properties.locale_provider, 0
    parts: list[sql.Composable] = [
        sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING {}").format(
            sql.Identifier(name), sql.Literal(properties.encoding)
        ),
        sql.SQL("LC_COLLATE {} LC_CTYPE {}").format(
            sql.Literal(properties.collate), sql.Literal(properties.ctype)
        ),
        sql.SQL("LOCALE_PROVIDER {}").format(sql.Identifier(provider)),
    ]
    if provider == "icu":
        parts.append(sql.SQL("ICU_LOCALE {}").format(sql.Literal(properties.locale)))
    if provider == "builtin":
        since = _LOCALE_FOR_ALL_SINCE
        parts.append(sql.SQL("BUILTIN_LOCALE {}").format(sql.Literal(properties.locale)))
    if properties.icu_rules:
        since = max(since, _ICU_RULES_SINCE)
        parts.append(sql.SQL("ICU_RULES {}").format(sql.Literal(properties.icu_rules)))
    if server_version < since:
        raise ConfigError(
            f"database {properties.name!r} has the {provider} locale {properties.locale!r}, which PostgreSQL "
            f"{server_version // 10000} does not know",
            hint=f"Restore into PostgreSQL {since // 10000} or newer.",
        )
    if properties.tablespace != "pg_default":
        parts.append(sql.SQL("TABLESPACE {}").format(sql.Identifier(properties.tablespace)))
    return sql.SQL(" ").join(parts)


def statements(properties: DatabaseProperties, name: str) -> list[sql.Composed]:
    """What gives the database `name` these properties, beside what CREATE DATABASE gave it. Pure.

    For one session of a superuser, or of a member of the owner, in another database or, for the last
    one, with no more sessions to come; when all else is restored, because the settings and the
    connection limit apply to whoever connects next. Each may be run twice.
    """
    database = sql.Identifier(name)
    alter = sql.SQL("ALTER DATABASE {} ").format(database)
    made = [alter + sql.SQL("OWNER TO {}").format(sql.Identifier(properties.owner))]
    if properties.grants is not None:
        made += _grant_statements(properties.grants, properties.owner, database)
    if properties.comment is not None:
        made.append(sql.SQL("COMMENT ON DATABASE {} IS {}").format(database, sql.Literal(properties.comment)))
    for role, setting in properties.settings:
        made.append(_setting_statement(role, setting, database))
    if properties.connection_limit != -1:
        made.append(alter + sql.SQL("CONNECTION LIMIT {}").format(sql.Literal(properties.connection_limit)))
    if properties.is_template:
        made.append(alter + sql.SQL("IS_TEMPLATE true"))
    if not properties.allow_connections:
        made.append(alter + sql.SQL("ALLOW_CONNECTIONS false"))
    return made


def _grant_statements(
    grants: Iterable[tuple[str, str, str, bool]], owner: str, database: sql.Identifier
) -> Iterator[sql.Composed]:
    """Take away what a new database grants, then grant again, each by its grantor, givers first.

    A superuser grants in the owner's name; what others granted must be granted as them.
    """
    for holder in (sql.SQL("PUBLIC"), sql.Identifier(owner)):
        yield sql.SQL("REVOKE ALL ON DATABASE {} FROM {} CASCADE").format(database, holder)
    waiting, may_grant = list(grants), {(owner, privilege) for _, _, privilege, _ in grants}
    while waiting:
        ready = [grant for grant in waiting if (grant[0], grant[2]) in may_grant]
        for grantor, grantee, privilege, grantable in ready or waiting:
            statement = sql.SQL("GRANT {} ON DATABASE {} TO {}{}").format(
                sql.SQL(_privilege(privilege)),
                database,
                sql.Identifier(grantee) if grantee else sql.SQL("PUBLIC"),
                sql.SQL(" WITH GRANT OPTION" if grantable else ""),
            )
            if grantor != owner:
                # One string is one transaction: a refused GRANT takes the SET ROLE back with it.
                statement = sql.SQL("SET ROLE {}; {}; RESET ROLE").format(sql.Identifier(grantor), statement)
            yield statement
            if grantable:
                may_grant.add((grantee, privilege))
        waiting = [grant for grant in waiting if grant not in ready] if ready else []


def _privilege(name: str) -> str:
    """A keyword, from a manifest that someone may have written: nothing but a word passes."""
    if name not in {"CREATE", "CONNECT", "TEMPORARY"}:
        raise ConfigError(f"not a privilege of a database: {name!r}")
    return name


def _setting_statement(role: str, setting: str, database: sql.Identifier) -> sql.Composed:
    parameter, _, value = setting.partition("=")
    values = split_quoted_list(value) if parameter.lower() in _QUOTED_LISTS else [value]
    whose = (
        sql.SQL("ALTER ROLE {} IN DATABASE {}").format(sql.Identifier(role), database)
        if role
        else sql.SQL("ALTER DATABASE {}").format(database)
    )
    return sql.SQL("{} SET {} TO {}").format(
        whose, sql.Identifier(parameter), sql.SQL(", ").join(map(sql.Literal, values or [""]))
    )


def split_quoted_list(value: str) -> list[str]:
    """The names of a list as PostgreSQL keeps it: `"$user", public` -> `$user` and `public`. Pure."""
    names: list[str] = []
    at = 0
    while at < len(value):
        if value[at] in ", \t\n":
            at += 1
        elif value[at] == '"':
            name = ""
            at += 1
            while at < len(value) and not (value[at] == '"' and value[at + 1 : at + 2] != '"'):
                name += value[at]
                at += 2 if value[at] == '"' else 1
            names.append(name)
            at += 1
        else:
            end = next((i for i in range(at, len(value)) if value[i] in ", \t\n"), len(value))
            names.append(value[at:end])
            at = end
    return names
