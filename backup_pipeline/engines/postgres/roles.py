"""Roles that a backup needs and a server lacks: planned from globals.sql, created, removed.

Called by the restore (`--create-roles`) and by proofs in scratch servers. Existing roles are never
altered. Which roles a database needs is decided by whoever took the dump; the database's own grants
and settings are properties.py's, the reading of globals.sql is globals.py's.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import psycopg
from psycopg import sql

from backup_pipeline.engines.postgres.globals import ATTRIBUTES, POWERS, Globals, Membership, Role
from backup_pipeline.engines.postgres.server import Connection
from backup_pipeline.errors import ServerError


@dataclass(frozen=True)
class RolePlan:
    """What will be created, and what will not: `withheld` are statements for a person to decide on,
    `absent` are needed roles that neither the server nor globals.sql has."""

    create: tuple[Role, ...]
    memberships: tuple[Membership, ...]
    withheld: tuple[str, ...]
    absent: tuple[str, ...]


NO_ROLES = RolePlan((), (), (), ())


def plan_roles(known: Globals, *, needed: Iterable[str], existing: Iterable[str]) -> RolePlan:
    """Decide which roles to create: those `needed`, and whoever acts through them.

    The members of a role that is created come too, and theirs, because applications log in as
    members of the owner. Roles that exist are never altered, not even by a membership. What reaches beyond
    the database (superuser and the like, memberships in roles that are not created here) is
    withheld.
    """
    there, described = frozenset(existing), {role.name: role for role in known.roles}
    missing = [name for name in dict.fromkeys(needed) if name not in there]
    wanted = list(missing)
    for name in wanted:  # it grows: members of members
        members = [each.member for each in known.memberships if each.role == name]
        wanted += [member for member in members if member not in there and member not in wanted]
    roles = [described[name] for name in wanted if name in described and not name.startswith("pg_")]
    names = {role.name for role in roles}
    withheld: list[str] = []
    memberships: list[Membership] = []
    for role in roles:
        powers = [power for power in POWERS if power in role.attributes]
        withheld += [f"ALTER ROLE {_quoted(role.name)} WITH {power};" for power in powers]
    roles = [_without_powers(role) for role in roles]
    for each in known.memberships:
        ends = {each.role, each.member}
        if ends <= names:
            memberships.append(each)
        elif ends & names:
            withheld.append(f"GRANT {_quoted(each.role)} TO {_quoted(each.member)};")
    return RolePlan(
        create=tuple(roles),
        memberships=tuple(memberships),
        withheld=tuple(withheld),
        absent=tuple(sorted(name for name in missing if name not in names)),
    )


def existing_roles(conn: Connection) -> frozenset[str]:
    """The names of all roles of the server."""
    return frozenset(str(name) for (name,) in conn.execute("SELECT rolname FROM pg_catalog.pg_roles"))


def create_roles(conn: Connection, plan: RolePlan) -> tuple[str, ...]:
    """Create what `plan` holds, in one transaction; return statements that were left out, to be shown:
    without the values of settings, some of which are secrets.

    Memberships are granted by the current role; the grantors of the source are not rebuilt.
    Settings that only a superuser may give are left out, and so are
    those that this server does not accept. A role that is no superuser is given membership in what
    it creates, or it could not hand over objects to it.
    Raises ServerError, and creates nothing, when the server refuses one of them.
    """
    version = conn.info.server_version
    left: list[str] = []
    try:
        with conn.transaction():
            superuser = _is_superuser(conn)
            if not superuser and version >= 160000:
                conn.execute("SET LOCAL createrole_self_grant = 'set, inherit'")
            for role in plan.create:
                conn.execute(_create_statement(role))
                if not superuser and version < 160000:
                    conn.execute(sql.SQL("GRANT {} TO CURRENT_USER").format(sql.Identifier(role.name)))
                if role.comment is not None:
                    comment = sql.SQL("COMMENT ON ROLE {} IS {}")
                    conn.execute(comment.format(sql.Identifier(role.name), sql.Literal(role.comment)))
                left += _apply_settings(conn, role)
            for membership in plan.memberships:
                conn.execute(_grant_statement(membership, version))
    except psycopg.Error as error:
        raise ServerError(
            f"the roles could not be created: {error.diag.message_primary or error}",
            detail={"roles": ", ".join(_quoted(role.name) for role in plan.create)},
            hint="Connect as a superuser, or as a role with CREATEROLE that may grant these.",
        ) from None
    return tuple(left)


def create_plain_roles(
    conn: Connection, names: Iterable[str], *, comment: str | None = None
) -> tuple[str, ...]:
    """Create the roles of these names that are missing, without login or any right.

    Returns the names created, for `drop_plain_roles`. Names that PostgreSQL reserves are passed over.
    """
    there = existing_roles(conn)
    missing = [name for name in dict.fromkeys(names) if name not in there and not name.startswith("pg_")]
    plan = RolePlan(tuple(Role(name, comment=comment) for name in missing), (), (), ())
    create_roles(conn, plan)
    return tuple(missing)


def drop_plain_roles(conn: Connection, names: Sequence[str]) -> tuple[str, ...]:
    """Drop roles that `create_plain_roles` made; return those that stay because something uses them."""
    staying: list[str] = []
    for name in names:
        try:
            with conn.transaction():
                conn.execute(sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(name)))
        except psycopg.errors.DependentObjectsStillExist:
            staying.append(name)
    return tuple(staying)


def _quoted(name: str) -> str:
    """The identifier as text, for reports; line breaks shown as spaces."""
    escaped = " ".join(name.replace('"', '""').splitlines())
    return f'"{escaped}"'


def _without_powers(role: Role) -> Role:
    return replace(role, attributes=tuple(name for name in role.attributes if name not in POWERS))


def _create_statement(role: Role) -> sql.Composed:
    words = [name if name in role.attributes else f"NO{name}" for name in ATTRIBUTES if name not in POWERS]
    words += [name for name in POWERS if name in role.attributes]
    parts: list[sql.Composable] = [sql.SQL("CREATE ROLE {} WITH").format(sql.Identifier(role.name))]
    parts += [sql.SQL(word) for word in words]
    if role.connection_limit != -1:
        parts.append(sql.SQL("CONNECTION LIMIT {}").format(sql.Literal(role.connection_limit)))
    if role.password:
        parts.append(sql.SQL("PASSWORD {}").format(sql.Literal(role.password)))
    if role.valid_until:
        parts.append(sql.SQL("VALID UNTIL {}").format(sql.Literal(role.valid_until)))
    return sql.SQL(" ").join(parts)


def _apply_settings(conn: Connection, role: Role) -> list[str]:
    left: list[str] = []
    for name, values in role.settings:
        statement = sql.SQL("ALTER ROLE {} SET {} TO {}").format(
            sql.Identifier(role.name), sql.Identifier(name), sql.SQL(", ").join(map(sql.Literal, values))
        )
        try:
            if not _anyone_may_set(conn, name):
                raise psycopg.errors.InsufficientPrivilege
            with conn.transaction():
                conn.execute(statement)
        except (psycopg.ProgrammingError, psycopg.DataError, psycopg.NotSupportedError):
            left.append(f"ALTER ROLE {_quoted(role.name)} SET {_quoted(name)} TO …; (as in globals.sql)")
    return left


def _anyone_may_set(conn: Connection, name: str) -> bool:
    row = conn.execute(
        "SELECT context FROM pg_catalog.pg_settings WHERE pg_catalog.lower(name) = pg_catalog.lower(%s)",
        [name],
    ).fetchone()
    return row is None or row[0] == "user"


def _grant_statement(membership: Membership, version: int) -> sql.Composed:
    options: list[str] = []
    if version >= 160000:
        options.append(f"ADMIN {str(membership.admin).upper()}")
        if membership.inherit is not None:
            options.append(f"INHERIT {str(membership.inherit).upper()}")
        if membership.set_role is not None:
            options.append(f"SET {str(membership.set_role).upper()}")
    elif membership.admin:
        options.append("ADMIN OPTION")
    parts: list[sql.Composable] = [
        sql.SQL("GRANT {} TO {}").format(sql.Identifier(membership.role), sql.Identifier(membership.member))
    ]
    if options:
        parts.append(sql.SQL("WITH {}").format(sql.SQL(", ").join(map(sql.SQL, options))))
    return sql.SQL(" ").join(parts)


def _is_superuser(conn: Connection) -> bool:
    row = conn.execute("SELECT rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user").fetchone()
    return bool(row and row[0])
