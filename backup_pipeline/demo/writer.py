"""An application that never stops writing: the demo's backups are taken from under its hands.

Real transactions, some tens a second: executions begin, take steps and end, workflows are edited,
keys are handed out and withdrawn, old executions are deleted. It survives being disconnected, as an
application has to when its database is swapped. Called by the demo, the benchmarks and the tests.
"""

import random
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.types.json import Jsonb

from backup_pipeline.demo.filler import APPLICATION
from backup_pipeline.engines.postgres.endpoint import Endpoint
from backup_pipeline.engines.postgres.server import Connection, connect
from backup_pipeline.errors import ServerError

_NODES = ("plan", "search", "call-tool", "write", "review")
_AWAY_S = 0.05


class Writer:
    """A thread that writes to `endpoint`, whose user is the application's, until it is stopped.

    `committed` counts transactions; `interruptions` how often the database went away under it, and
    `longest_gap_s` the longest time without a commit. What else goes wrong is kept in `failure`, and ends it.
    """

    def __init__(self, endpoint: Endpoint, *, per_second: float = 40.0, seed: int = 1) -> None:
        self.committed = 0
        self.interruptions = 0
        self.longest_gap_s = 0.0
        self.failure: Exception | None = None
        self._last_commit_s = 0.0
        self._endpoint = endpoint
        self._pause_s = 1.0 / per_second
        self._random = random.Random(seed)  # noqa: S311 - the same values in each run, nothing secret
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End after the transaction in hand."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def wait_for(self, transactions: int, *, timeout_s: float = 30.0) -> bool:
        """Whether that many more were committed within the time; false at once when it has failed."""
        wanted, deadline = self.committed + transactions, time.monotonic() + timeout_s
        while self.committed < wanted and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.committed >= wanted

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                with connect(self._endpoint, autocommit=False) as session:
                    session.execute("SET search_path = public")
                    session.commit()
                    self._write(session)
            except (ServerError, psycopg.OperationalError):
                self.interruptions += 1
                self._stopping.wait(_AWAY_S)
            except psycopg.Error as error:
                self.failure = error
                return

    def _write(self, session: Connection) -> None:
        bounds = session.execute("SELECT count(*), (SELECT count(*) FROM users) FROM workflows").fetchone()
        workflows, users = (int(str(value)) for value in bounds or (1, 1))
        while not self._stopping.is_set():
            self._transaction()(session, workflows, users)
            session.commit()
            self._count(time.monotonic())
            self._stopping.wait(self._pause_s)

    def _count(self, now_s: float) -> None:
        if self.committed:
            self.longest_gap_s = max(self.longest_gap_s, now_s - self._last_commit_s)
        self.committed += 1
        self._last_commit_s = now_s

    def _transaction(self) -> Callable[[Connection, int, int], None]:
        kinds: dict[Callable[[Connection, int, int], None], int] = {
            self._run_workflow: 6,
            self._edit: 2,
            self._exchange_key: 1,
            self._forget: 1,
        }
        return self._random.choices(list(kinds), weights=list(kinds.values()))[0]

    def _run_workflow(self, session: Connection, workflows: int, _users: int) -> None:
        workflow, version = 1 + self._random.randrange(workflows), 1 + self._random.randrange(3)
        begun = session.execute(
            "INSERT INTO executions (workflow_id, workflow_version, status, input)"
            " VALUES (%s, %s, 'running', %s) RETURNING id, started_at",
            [workflow, version, Jsonb({"ticket": self._random.randrange(10**6), "text": "live"})],
        ).fetchone()
        if begun is None:
            return
        for step in range(1, 2 + self._random.randrange(4)):
            node, tokens = self._random.choice(_NODES), self._random.randrange(8000)
            session.execute(
                "INSERT INTO execution_steps (execution_id, started_at, step, node, status, tokens, log)"
                " VALUES (%s, %s, %s, %s, 'succeeded', %s, 'live')",
                [*begun, step, node, tokens],
            )
        session.execute(
            "UPDATE executions SET status = 'succeeded', finished_at = clock_timestamp(), output = %s"
            " WHERE id = %s AND started_at = %s",
            [Jsonb({"answer": self._random.randrange(10**6)}), *begun],
        )

    def _edit(self, session: Connection, workflows: int, _users: int) -> None:
        session.execute(
            "UPDATE workflows SET description = %s, is_active = NOT is_active, updated_at = now()"
            " WHERE id = %s",
            [f"edited {self._random.randrange(10**6)} times", 1 + self._random.randrange(workflows)],
        )

    def _exchange_key(self, session: Connection, _workflows: int, users: int) -> None:
        user, digest = 1 + self._random.randrange(users), self._random.randbytes(32)
        session.execute(
            "INSERT INTO api_keys (user_id, prefix, key_sha256, scopes, valid)"
            " VALUES (%s, %s, %s, '{run}', tstzrange(now(), now() + interval '1 year'))",
            [user, digest.hex()[:8], digest],
        )
        session.execute("DELETE FROM api_keys WHERE id = (SELECT min(id) FROM api_keys)")

    def _forget(self, session: Connection, _workflows: int, _users: int) -> None:
        session.execute(
            "DELETE FROM executions WHERE (id, started_at) ="
            " (SELECT id, started_at FROM executions ORDER BY started_at LIMIT 1)"
        )


def application(endpoint: Endpoint) -> Endpoint:
    """`endpoint` as the application connects to it: a role that owns nothing."""
    return Endpoint(make_conninfo(endpoint.dsn, user=APPLICATION))
