"""The lines that pass between archive_command's client and the agent: one JSON object each way.

    {"version": 1, "op": "push", "cluster": "main", "name": "0000…", "path": "/…/pg_wal/0000…"}
    {"version": 1, "name": "0000…", "code": 0, "said": ""}

Read and written here for the agent, for `wal status` and for a recovery; client.py, which imports nothing
of ours, has its own few lines, and a test holds them against these. `op` is `push` or `status`, and `fetch`
where a recovery listens: `path` is then where the file is to be put. Who is at work sends an empty line each
second. `code` is what the command ends with; 0 only when the file is in place, durable.
"""

import json
from dataclasses import dataclass

from backup_pipeline.errors import ConfigError

VERSION = 1
PULSE_S = 1.0
"""How often the agent shows that it is at work; the client gives it five times as long."""

MAX_LINE_BYTES = 16 * 1024
NOT_MINE = 64
"""The code for a request that this agent does not serve: of another version, cluster or kind."""


@dataclass(frozen=True)
class Request:
    """What is asked of the agent."""

    op: str
    cluster: str
    name: str = ""
    path: str = ""
    version: int = VERSION


@dataclass(frozen=True)
class Answer:
    """What it says. `told` are facts for `status`."""

    code: int
    said: str = ""
    name: str = ""
    version: int = VERSION
    told: tuple[tuple[str, str], ...] = ()


def request_line(request: Request) -> bytes:
    """A request as bytes."""
    values = {"version": request.version, "op": request.op, "cluster": request.cluster}
    return _line(values | {"name": request.name, "path": request.path})


def read_request(line: bytes) -> Request:
    """Read a request. Raises ConfigError for what is none."""
    values = _values(line)
    texts = [values.get(name, "") for name in ("op", "cluster", "name", "path")]
    op, cluster, name, path = (text if isinstance(text, str) else "" for text in texts)
    version = values.get("version")
    return Request(op, cluster, name, path, version if isinstance(version, int) else 0)


def answer_line(answer: Answer) -> bytes:
    """An answer as bytes; the client compares the good one as it stands."""
    values = {"version": answer.version, "name": answer.name, "code": answer.code, "said": answer.said}
    return _line(values | ({"told": dict(answer.told)} if answer.told else {}))


def read_answer(line: bytes) -> Answer:
    """Read an answer. Raises ConfigError for what is none."""
    values = _values(line)
    version, code, told = values.get("version"), values.get("code"), values.get("told", {})
    if not isinstance(version, int) or not isinstance(code, int) or not isinstance(told, dict):
        raise ConfigError(f"not an agent's answer: {line[:200]!r}")
    facts = tuple((str(name), str(value)) for name, value in told.items())
    return Answer(code, str(values.get("said", "")), str(values.get("name", "")), version, facts)


def _line(values: dict[str, object]) -> bytes:
    return json.dumps(values).encode() + b"\n"


def _values(line: bytes) -> dict[str, object]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"not a line of the agent's protocol: {line[:200]!r}")
    return values
