"""Event triggers of a restored database, kept from running in our sessions and tools.

Called by restores and proofs, before they connect to a copy: from PostgreSQL 17 on a trigger may run at
each login, and then changes the copy that is about to be compared. The source's own run as its owner
wished.
"""

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import Connection

OFF = {"event_triggers": "off"}
"""As a setting of a whole server."""

SINCE_MAJOR = 17


def without_event_triggers(endpoint: Endpoint, session: Connection) -> tuple[Endpoint, str]:
    """The same with no event trigger running in its sessions; and the GRANT without which it cannot be.

    The second is "" where nothing is needed. `session` is one of the same role on the server.
    """
    if session.info.server_version // 10000 < SINCE_MAJOR:
        return endpoint, ""
    try:
        session.execute("SET event_triggers = off")
    except psycopg.errors.InsufficientPrivilege:
        row = session.execute("SELECT current_user").fetchone()
        role = sql.Identifier(str(row[0]) if row else "")
        grant = sql.SQL("GRANT SET ON PARAMETER event_triggers TO {};").format(role)
        return endpoint, grant.as_string(session)
    # What a service file says would be lost against options of ours.
    given = conninfo_to_dict(endpoint.dsn).get("options") or session.info.get_parameters().get("options")
    options = f"{given or ''} -c event_triggers=off".strip()
    return Endpoint(make_conninfo(endpoint.dsn, options=options), endpoint.password), ""
