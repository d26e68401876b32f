"""What a child wrote to its standard error, without what no error, log or verdict may repeat.

PostgreSQL's tools repeat the statement that failed, with the passwords in it, and the row that did not
fit. Called by process.py and whoever reads a tool's errors by himself. Pure.
"""

import re

_FIELD = r"(?:DETAIL|HINT|QUERY|CONTEXT|LOCATION|STATEMENT|LINE \d+):"
_NEXT = rf"(?=^pg_[a-z]+: |^{_FIELD}|^Command was: |\Z)"
_FLAGS = re.MULTILINE | re.DOTALL

# As pg_restore says it, and as pg_dump and pg_dumpall do; to the end, however many lines it has.
_COMMAND = re.compile(
    r"^(?:pg_[a-z]+: (?:error|detail|info): )?(?:Command|[Qq]uery) was: .*?(?=^pg_[a-z]+: |\Z)", _FLAGS
)
_EXCERPT = re.compile(rf"^(?:QUERY|STATEMENT|LINE \d+): .*?{_NEXT}", _FLAGS)
_LOGGED = re.compile(
    r"^\S[^\n]{0,79}? (?:STATEMENT|QUERY|CONTEXT|DETAIL):  .*?$(?:\n\t.*?$)*\n?", _FLAGS
)  # of a server's log
_CONTEXT = re.compile(rf"^CONTEXT:  (?P<lines>.*?){_NEXT}", _FLAGS)
_PLACE = re.compile(r"COPY .+?, line \d+(?:, column [^:\"]+)?|PL/pgSQL function .+ line \d+ at .+")
_DETAIL = re.compile(rf"^DETAIL:  .*?{_NEXT}", _FLAGS)
_ROW = re.compile(r" contains \(.*\)?|=\(.*\)(?=[^()]*\Z)|=\(.*|^(?P<token>DETAIL:  Token) .*", re.DOTALL)
_VALUE = re.compile(
    r"(?P<what>invalid input (?:syntax|value) for [^:\n]*|malformed [^:\n]*|field value out of range"
    rf"|COPY failed for table [^\n]*?ERROR:  [^:\n]*): \".*?{_NEXT}",
    _FLAGS,
)
_NUMBER = re.compile(rf"\bvalue \"(?:(?!{_NEXT}).)*?\" is out of range", _FLAGS)
_BEGINNING = re.compile(r"^(?:pg_[a-z]+: |\d{4}-\d\d-\d\d )", re.MULTILINE)


def without_values(said: str) -> str:
    """`said` without statements and the values of rows; which entry, table, line and column stays."""
    said = _COMMAND.sub("", said)
    said = _EXCERPT.sub("", said)
    said = _LOGGED.sub("", said)
    said = _VALUE.sub(lambda found: f'{found["what"]}: "…"\n', said)
    said = _NUMBER.sub('value "…" is out of range', said)
    said = _DETAIL.sub(lambda found: _ROW.sub(_of_row, found[0].rstrip("\n")) + "\n", said)
    return _CONTEXT.sub(_of_context, said)


def from_a_message_on(said: str) -> str:
    """`said`, which was cut anywhere, from where something begins: before may lie half a statement."""
    found = _BEGINNING.search(said)
    return said[found.start() :] if found else ""


def _of_row(found: re.Match[str]) -> str:
    if found["token"]:
        return f'{found["token"]} "…"'
    return " contains (…)" if found[0].startswith(" ") else "=(…)"


def _of_context(found: re.Match[str]) -> str:
    places = (_PLACE.match(line) for line in found["lines"].splitlines())
    kept = [place[0] for place in places if place]
    return f"CONTEXT:  {'; '.join(kept)}\n" if kept else ""
