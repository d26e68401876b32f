"""The roles in a dump's globals.sql, read as values.

globals.sql comes from a store, and psql can be made to run what lies in such a file, so it is never
replayed as text: `parse_globals` accepts the few statements that pg_dumpall writes for roles, and
roles.py composes new ones from the values. Which of these roles a restore wants is decided there.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from backup_pipeline.errors import Refused

POWERS = ("SUPERUSER", "CREATEROLE", "CREATEDB", "REPLICATION", "BYPASSRLS")
"""Attributes that reach beyond the restored database: only given on request."""

ATTRIBUTES = (*POWERS, "INHERIT", "LOGIN")
"""Everything that CREATE ROLE turns on, or off by a leading NO."""

_HASHED = re.compile(r"SCRAM-SHA-256\$\d+:[A-Za-z0-9+/=]+\$[A-Za-z0-9+/=]+:[A-Za-z0-9+/=]+|md5[0-9a-f]{32}")
_TOKEN = re.compile(
    r"""(?P<blank>[ \t\r\n]+|--[^\n]*|^\\(?:un)?restrict\ [0-9A-Za-z]+$)
      | E'(?P<escaped>(?:[^'\\]|''|\\\\)*)'
      | '(?P<text>(?:[^'\\]|'')*)'
      | "(?P<name>(?:[^"\0]|"")+)"
      | (?P<word>[A-Za-z_][A-Za-z0-9_$]*)
      | (?P<number>-?[0-9]+(?:\.[0-9]+)?)
      | (?P<mark>[;,()=])""",
    re.VERBOSE | re.MULTILINE,
)
_BY_HAND = "Create the roles by hand, reading globals.sql of the backup, and run the restore again."


@dataclass(frozen=True)
class Role:
    """One role as globals.sql describes it. `settings` are (name, values) of ALTER ROLE ... SET."""

    name: str
    attributes: tuple[str, ...] = ("INHERIT",)  # without the NO forms
    connection_limit: int = -1
    password: str = field(default="", repr=False)  # a hash, or empty
    valid_until: str = ""
    comment: str | None = None
    settings: tuple[tuple[str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True)
class Membership:
    """`member` belongs to `role`. None: the server's default (before PostgreSQL 16, no choice)."""

    role: str
    member: str
    admin: bool = False
    inherit: bool | None = None
    set_role: bool | None = None


@dataclass(frozen=True)
class Globals:
    """What globals.sql says of roles. `skipped` names statements that are none of ours."""

    roles: tuple[Role, ...]
    memberships: tuple[Membership, ...]
    tablespaces: tuple[str, ...]
    skipped: tuple[str, ...]


def parse_globals(data: bytes) -> Globals:
    """Read the output of `pg_dumpall --globals-only`.

    Raises Refused, naming the line, for bytes that pg_dumpall does not write between its
    statements: a meta-command, a dollar quote, a string that does not end.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused("globals.sql is not UTF-8", detail={"byte": error.start}, hint=_BY_HAND) from None
    found = _Found()
    for statement in _statements(text):
        try:
            _read_statement(statement, found)
        except _NotOursError:
            found.skipped.append(statement.title())
    return Globals(
        roles=tuple(found.roles.values()),
        memberships=_merged(found.memberships),
        tablespaces=tuple(found.tablespaces),
        skipped=tuple(dict.fromkeys(found.skipped)),
    )


class _NotOursError(Exception):
    """A statement that is not one of those we accept."""


@dataclass
class _Found:
    roles: dict[str, Role] = field(default_factory=dict)
    memberships: list[Membership] = field(default_factory=list)
    tablespaces: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


class _Statement:
    """The tokens of one statement, (kind, value), taken from the left."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._tokens = tokens
        self._at = 0

    def take(self, *words: str) -> bool:
        """Take these keywords when they come next."""
        ahead = self._tokens[self._at : self._at + len(words)]
        found = [value.upper() for kind, value in ahead if kind in {"word", "mark"}]
        if found != list(words):
            return False
        self._at += len(words)
        return True

    def need(self, *words: str) -> None:
        if not self.take(*words):
            raise _NotOursError

    def value(self, *kinds: str) -> str:
        """Take one token of these kinds."""
        if self._at >= len(self._tokens) or self._tokens[self._at][0] not in kinds:
            raise _NotOursError
        self._at += 1
        return self._tokens[self._at - 1][1]

    def name(self) -> str:
        """Take an identifier. One that the server would fold to lower case is none of pg_dumpall's."""
        kind = self._tokens[self._at][0] if not self.ended() else ""
        name = self.value("name", "word")
        if kind == "word" and name != name.lower():
            raise _NotOursError
        return name

    def ended(self) -> bool:
        return self._at == len(self._tokens)

    def title(self) -> str:
        """Its leading keywords: fit to be shown, because values may be secret."""
        words: list[str] = []
        for kind, value in self._tokens[:4]:
            if kind != "word" or not value.isupper():
                break
            words.append(value)
        return " ".join(words) or "an unknown statement"


def _statements(text: str) -> Iterator[_Statement]:
    tokens: list[tuple[str, str]] = []
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        kind = match.lastgroup if match else None
        if match is None or kind is None or (text[at] == "\\" and tokens):
            raise _not_a_statement(text, at)
        at = match.end()
        value = match.group(kind)
        if kind == "mark" and value == ";":
            yield _Statement(tokens)
            tokens = []
        elif kind == "escaped":
            tokens.append(("text", value.replace("\\\\", "\\").replace("''", "'")))
        elif kind == "text":
            tokens.append((kind, value.replace("''", "'")))
        elif kind == "name":
            tokens.append((kind, value.replace('""', '"')))
        elif kind != "blank":
            tokens.append((kind, value))
    if tokens:
        raise _not_a_statement(text, len(text))


def _not_a_statement(text: str, at: int) -> Refused:
    return Refused(
        "globals.sql holds something that pg_dumpall does not write",
        detail={"line": text.count("\n", 0, at) + 1},
        hint=f"Do not feed it to psql. {_BY_HAND}",
    )


def _read_statement(statement: _Statement, found: _Found) -> None:
    if statement.take("CREATE", "ROLE"):
        name = statement.name()
        _must_end(statement)
        found.roles.setdefault(name, Role(name))
    elif statement.take("ALTER", "ROLE"):
        name = statement.name()
        if name not in found.roles:
            raise _NotOursError
        role = found.roles[name]
        reader = _read_setting if statement.take("SET") else _read_attributes
        found.roles[name] = reader(statement, role)
    elif statement.take("COMMENT", "ON", "ROLE"):
        name = statement.name()
        statement.need("IS")
        comment = statement.value("text")
        _must_end(statement)
        if name not in found.roles:
            raise _NotOursError
        found.roles[name] = replace(found.roles[name], comment=comment)
    elif statement.take("CREATE", "TABLESPACE"):
        found.tablespaces.append(statement.name())
    elif statement.take("GRANT"):
        found.memberships.append(_read_membership(statement))
    elif statement.take("SET"):
        _read_session_setting(statement)
    else:
        raise _NotOursError


def _must_end(statement: _Statement) -> None:
    if not statement.ended():
        raise _NotOursError


def _read_session_setting(statement: _Statement) -> None:
    """The file's own settings change nothing here; only its encoding must be the one we read it in."""
    name = statement.name()
    if name == "client_encoding" and statement.take("="):
        encoding = statement.value("text")
        if encoding.upper() not in {"UTF8", "SQL_ASCII"}:
            raise Refused(f"globals.sql is written in {encoding}, not in UTF8", hint=_BY_HAND)
    elif name not in {"default_transaction_read_only", "standard_conforming_strings"}:
        raise _NotOursError


def _read_attributes(statement: _Statement, role: Role) -> Role:
    statement.need("WITH")
    attributes = set(role.attributes)
    while not statement.ended():
        if statement.take("CONNECTION", "LIMIT"):
            role = replace(role, connection_limit=int(statement.value("number")))
        elif statement.take("PASSWORD"):
            role = replace(role, password=statement.value("text"))
            if _HASHED.fullmatch(role.password) is None:
                raise _NotOursError
        elif statement.take("VALID", "UNTIL"):
            role = replace(role, valid_until=statement.value("text"))
        else:
            word = statement.value("word")
            attribute = word.removeprefix("NO")
            if attribute not in ATTRIBUTES:
                raise _NotOursError
            attributes.discard(attribute)
            attributes |= {word} & {attribute}
    return replace(role, attributes=tuple(name for name in ATTRIBUTES if name in attributes))


def _read_setting(statement: _Statement, role: Role) -> Role:
    name = statement.name()
    statement.need("TO")
    values = [statement.value("text")]
    while statement.take(","):
        values.append(statement.value("text"))
    _must_end(statement)
    return replace(role, settings=(*role.settings, (name, tuple(values))))


def _read_membership(statement: _Statement) -> Membership:
    role = statement.name()
    statement.need("TO")
    membership = Membership(role, statement.name())
    if statement.take("WITH"):
        while True:
            option = statement.value("word")
            given = not statement.take("FALSE") and (statement.take("OPTION") or statement.take("TRUE"))
            if option == "ADMIN":
                membership = replace(membership, admin=given)
            elif option == "INHERIT":
                membership = replace(membership, inherit=given)
            elif option == "SET":
                membership = replace(membership, set_role=given)
            else:
                raise _NotOursError
            if not statement.take(","):
                break
    if statement.take("GRANTED", "BY"):
        statement.name()
    _must_end(statement)
    return membership


def _merged(memberships: Iterable[Membership]) -> tuple[Membership, ...]:
    """One for each pair: what several grantors gave adds up."""
    merged: dict[tuple[str, str], Membership] = {}
    for each in memberships:
        before = merged.get((each.role, each.member))
        merged[each.role, each.member] = (
            each
            if before is None
            else replace(
                each,
                admin=each.admin or before.admin,
                inherit=_either(each.inherit, before.inherit),
                set_role=_either(each.set_role, before.set_role),
            )
        )
    return tuple(merged.values())


def _either(one: bool | None, other: bool | None) -> bool | None:
    """The wider of two options; None is the default, which gives."""
    return None if one is None or other is None else one or other
