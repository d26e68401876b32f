"""What pg_dump says of a schema, statement by statement; and what an archive holds of it and of sequences.

Called by fingerprint.py, and by the action that proves a backup. Statements are cut at pg_dump's own
comments (`-- Name: …; Type: …`), found by reading SQL's quotes, so that a function's body or a comment
that looks like one is what it is: text. What is done with two schemas is domain/proof.py's.
"""

import codecs
import contextlib
import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg

from backup_pipeline import process
from backup_pipeline.domain.fingerprint import Statement
from backup_pipeline.engines.postgres.blame import MISHAP_STATES
from backup_pipeline.engines.postgres.dump import tool_command
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import OUT_OF_LOCKS, OUT_OF_LOCKS_HINT, connect, server_errors
from backup_pipeline.errors import ToolError
from backup_pipeline.process import Command

SECRET_KINDS = ("SUBSCRIPTION", "USER MAPPING")
"""Statements that may hold passwords: kept as a digest, which is enough to compare."""

_LEXEMES = r"""
    (?P<header>^--\n--\ Name:\ [^\n]*\n--$)
  | (?P<end>^--\n--\ PostgreSQL\ database\ dump\ complete\n--$)
  | (?P<setting>^SET\ default_(?:tablespace|table_access_method)\ =\ (?P<value>[^\n]*);$)
  | (?P<setval>^SELECT\ pg_catalog\.setval\(E?'(?P<sequence>(?:[^'\\]++|''|ESCAPED)*+)',
        \ (?P<last_value>-?\d+),\ (?P<is_called>true|false)\);$)
  | --[^\n]*
  | (?<![\w$])[eE]'(?:[^'\\]++|\\.|'')*+'
  | '(?:[^'\\]++|''|ESCAPED)*+'
  | "[^"]*"
  | (?P<dollar>(?<![\w$])\$(?:[A-Za-z_\x80-\U0010ffff][\w]*)?\$).*?(?P=dollar)
"""


def _tokens(plain_backslash: str) -> re.Pattern[str]:
    return re.compile(_LEXEMES.replace("ESCAPED", plain_backslash), re.VERBOSE | re.MULTILINE | re.DOTALL)


# A backslash in '…' is itself, or, in dumps of databases that turn standard_conforming_strings off, escapes.
_STANDARD, _ESCAPED = _tokens(r"\\"), _tokens(r"\\.")
_STRINGS_OFF = "\nSET standard_conforming_strings = off;\n"
_HEADER = re.compile(
    r"--\n-- Name: (?P<name>.*); Type: (?P<kind>[^;]*); Schema: (?P<schema>.*); Owner: (?P<owner>.*?)"
    r"(?:; Tablespace: .*)?\n--"
)
_IDENTIFIER = re.compile(r'"((?:[^"]|"")*)"|([^".]+)')
_CLIENT = re.compile(r"^-- Dumped by pg_dump version (\d+)(?:\.(\d+))?", re.MULTILINE)
_ENCODING = re.compile(rb"^SET client_encoding = '(\w+)';$", re.MULTILINE)
_HEAD_BYTES = 4096
_LISTED = re.compile(rb"^(\d+); \d+ \d+ SEQUENCE SET ", re.MULTILINE)
_SAID_OF = ("ACL", "COMMENT", "SECURITY LABEL")  # entries whose name begins with the kind of their object
_HEAP = "heap"
_ATTEMPTS = 5
_DROPPED = re.compile("query failed.*(does not exist|cache lookup failed|could not open relation)")
_PREAMBLE = (
    "SET check_function_bodies = false",
    "SET xmloption = content",
    "SET client_min_messages = warning",
    "SET row_security = off",
    "SET standard_conforming_strings = on",
)


@dataclass(frozen=True)
class Schema:
    """A database's schema in the order in which it can be created, and the pg_dump that wrote it."""

    statements: tuple[Statement, ...]
    client_version: int  # 170010 is 17.10


def schema_argv(
    pg_dump: str, dbname: str, *, lock_timeout_s: float, snapshot_id: str = ""
) -> tuple[str, ...]:
    """The command that writes a schema as SQL. Tablespaces are placement, and left out."""
    return (
        pg_dump,
        f"--dbname={dbname}",
        "--schema-only",
        "--encoding=UTF8",
        "--no-tablespaces",
        "--no-password",
        f"--lock-wait-timeout={lock_timeout_s * 1000:.0f}",
        *((f"--snapshot={snapshot_id}",) if snapshot_id else ()),
    )


def capture(
    pg_dump: str,
    endpoint: Endpoint,
    *,
    lock_timeout_s: float = 60.0,
    stall_s: float = 900.0,
    snapshot_id: str = "",
) -> Schema:
    """The schema of `endpoint`'s database as it is now, or in an exported snapshot.

    While a Snapshot of it is open, wait for locks only briefly: pg_dump locks every table, and waits for
    who waits for the snapshot. Raises ToolError when pg_dump fails, or is silent for `stall_s` seconds.
    """
    argv = schema_argv(pg_dump, endpoint.tool_dbname, lock_timeout_s=lock_timeout_s, snapshot_id=snapshot_id)
    command = tool_command(argv, endpoint, "schema")
    text = _output(command, stall_s, attempts=1 if snapshot_id else _ATTEMPTS)
    client = _CLIENT.search(text)
    version = int(client[1]) * 10000 + int(client[2] or 0) if client else 0
    return Schema(split_statements(text), version)


def _output(command: Command, stall_s: float, *, attempts: int) -> str:
    """What pg_dump writes, of another try when what it had just listed was dropped."""
    for left in reversed(range(attempts)):
        try:
            with process.stream(command, stall_s=stall_s) as chunks:
                # Names in a database without an encoding may be any bytes; they come through as they are.
                return b"".join(chunks).decode("utf-8", "surrogateescape")
        except ToolError as error:
            if OUT_OF_LOCKS in str(error):
                error.hint = OUT_OF_LOCKS_HINT
            if left == 0 or _DROPPED.search(str(error)) is None:
                raise
    raise AssertionError("unreachable")


def split_statements(text: str) -> tuple[Statement, ...]:
    """Cut the output of `pg_dump --schema-only` into its entries, in their order.

    What differs between two dumps of the same schema is taken out: versions, \\restrict tokens, and
    the settings between entries, of which a table's access method is put into the table's own body.
    """
    statements: list[Statement] = []
    header: re.Match[str] | None = None
    start, parts, access_method, next_method = 0, [""], _HEAP, _HEAP
    for token in _lexer(text).finditer(text):
        kind = token.lastgroup
        if kind not in ("header", "end", "setting"):
            continue
        parts.append(text[start : token.start()])
        start = token.end()
        if kind == "setting":
            if token["setting"].startswith("SET default_table_access_method"):
                next_method = token["value"]
            continue
        if header is not None:
            statements += _statement(header, "".join(parts), access_method)
        header = _HEADER.fullmatch(token[0]) if kind == "header" else None
        parts, access_method = [], next_method
    return tuple(statements)


def _statement(header: re.Match[str], body: str, access_method: str) -> Iterator[Statement]:
    kind, name = header["kind"], header["name"]
    if kind.startswith("DATABASE") or (kind in _SAID_OF and name.startswith("DATABASE ")):
        return  # properties hold what belongs to the database itself
    body = body.strip()
    if kind in SECRET_KINDS:
        body = f"sha256 {hashlib.sha256(body.encode('utf-8', 'surrogateescape')).hexdigest()}"
    elif kind in ("TABLE", "MATERIALIZED VIEW") and access_method != _HEAP:
        body += f"\n\n-- access method {access_method}"
    yield Statement(
        kind=kind,
        schema="" if header["schema"] == "-" else header["schema"],
        name=name,
        owner="" if header["owner"] == "-" else header["owner"],
        body=body,
    )


def _lexer(text: str) -> re.Pattern[str]:
    return _ESCAPED if _STRINGS_OFF in text[:4096] else _STANDARD


def replay(empty: Endpoint, statements: Sequence[Statement]) -> None:
    """Create a schema in an empty scratch database, without what may hold passwords.

    A capture of it then shows the schema as PostgreSQL writes it once it has read it, for compare's
    `rendered`. What cannot be created there is missing from it, and stays a difference. Raises
    ServerError for a mishap, a lost session or a full disk, which says nothing of the schema.
    """
    with (
        contextlib.closing(connect(empty, purpose="schema")) as session,
        server_errors(empty, "cannot replay the schema"),
    ):
        for setting in _PREAMBLE:
            session.execute(setting.encode())
        for statement in statements:
            if statement.kind not in SECRET_KINDS:
                try:
                    session.execute(statement.body.encode("utf-8", "surrogateescape"))
                except psycopg.Error as error:
                    if session.closed or (error.sqlstate or "").startswith(MISHAP_STATES):
                        raise


def archive_schema(
    pg_restore: str, dump: Path, server: Endpoint, *, timeout_s: float = 600.0
) -> tuple[Statement, ...]:
    """The schema that an archive (custom file or directory) would create, as `capture` would read it.

    `server` is asked to decode what Python cannot. The archive's digest must have been verified before.
    Raises ToolError, ServerError.
    """
    argv = (pg_restore, "--schema-only", "--no-tablespaces", "--file=-", "--", str(dump))
    with process.stream(Command(argv), stall_s=timeout_s) as chunks:
        script = b"".join(chunks)
    return split_statements(_decoded(script, server))


def archive_sequences(
    pg_restore: str, dump: Path, server: Endpoint, *, timeout_s: float = 600.0
) -> dict[tuple[str, str], tuple[int, bool]]:
    """What an archive (custom file or directory) sets its sequences to: (last_value, is_called).

    Only the list of its contents and those few entries are read. `server` is asked to decode what Python
    cannot. The archive's digest must have been verified before: pg_restore trusts what it opens. Raises
    ToolError, ServerError.
    """
    with process.stream(Command((pg_restore, "--list", "--", str(dump))), stall_s=timeout_s) as chunks:
        numbers = _LISTED.findall(b"".join(chunks))
    if not numbers:
        return {}
    with tempfile.NamedTemporaryFile() as wanted:
        wanted.write(b"".join(number + b";\n" for number in numbers))
        wanted.flush()
        argv = (pg_restore, f"--use-list={wanted.name}", "--file=-", "--", str(dump))
        with process.stream(Command(argv), stall_s=timeout_s) as chunks:
            script = b"".join(chunks)
    return dict(_set_sequences(_decoded(script, server)))


def _decoded(script: bytes, server: Endpoint) -> str:
    """What pg_restore writes: in the encoding of the database that was dumped, which it says first."""
    said = _ENCODING.search(script, 0, _HEAD_BYTES)
    name = said[1].decode() if said else "UTF8"
    if name == "SQL_ASCII":  # any bytes, which `capture` reads in the same way
        return script.decode("utf-8", "surrogateescape")
    try:
        codec = codecs.lookup(name.replace("WIN", "cp").replace("KOI8", "koi8-")).name
    except LookupError:  # EUC_TW
        return _decoded_there(script, name, server)
    return script.decode(codec, "surrogateescape")


def _decoded_there(script: bytes, encoding: str, server: Endpoint) -> str:
    with (
        contextlib.closing(connect(server, purpose="schema")) as session,
        server_errors(server, f"cannot decode {encoding}"),
    ):
        row = session.execute("SELECT convert_from(%s, %s)", [script, encoding]).fetchone()
    return str(row[0]) if row else ""


def _set_sequences(text: str) -> Iterator[tuple[tuple[str, str], tuple[int, bool]]]:
    lexer = _lexer(text)
    for token in lexer.finditer(text):
        if token.lastgroup == "setval":
            quoted = token["sequence"].replace("''", "'")
            if lexer is _ESCAPED:
                quoted = quoted.replace("\\\\", "\\")
            parts = [name.replace('""', '"') or bare for name, bare in _IDENTIFIER.findall(quoted)]
            if len(parts) == 2:
                yield (parts[0], parts[1]), (int(token["last_value"]), token["is_called"] == "true")
