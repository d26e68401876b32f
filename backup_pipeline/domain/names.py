"""How long a database's name may be, and how a longer one is cut to fit. Pure.

Called wherever a name is made from another one: for a new database, an unfinished one, a copy that is kept.
"""

import hashlib

NAME_BYTES = 63
"""The longest name that PostgreSQL keeps (NAMEDATALEN - 1); it cuts longer ones without an error."""


def cut_name(name: str, limit_bytes: int) -> str:
    """`name`, or, when it is longer than that, as much of it as fits, ending in a digest of the whole.

    Never splits a character, and two long names with one beginning stay two.
    """
    encoded = name.encode()
    if len(encoded) <= limit_bytes:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:8]
    return f"{encoded[: limit_bytes - 9].decode(errors='ignore')}~{digest}"
