"""A whole Dagster on loopback: code server, webserver and daemon, as in production, in a folder of its own.

Used by the tests beside it and by docs/take_screenshots.py. Each process leads a group, and the
groups are ended whole: a run's process is the code server's child, and pg_dump is the run's.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg

CHECKOUT = Path(__file__).parents[2]
LOCATION = "backup_pipeline"
START_WITHIN_S = 90.0
FINISHED = {"SUCCESS", "FAILURE", "CANCELED"}

T = TypeVar("T")
_FAILURES_DONE = f"EVENT_LOG_CONSUMER_CURSOR-{dg.DagsterEventType.RUN_FAILURE.value}"


@dataclass(frozen=True)
class Run:
    """What the webserver says of one run."""

    id: str
    job: str
    status: str
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Event:
    """One event of a run: its kind, its step, what it says, its metadata by label."""

    kind: str
    step: str
    message: str
    metadata: Mapping[str, Any]


class DagsterBox:
    """A running Dagster, spoken to over GraphQL as the UI does."""

    def __init__(self, home: Path, port: int) -> None:
        self.home = home
        self.url = f"http://127.0.0.1:{port}"

    def query(self, text: str, **variables: object) -> dict[str, Any]:
        """The data of a GraphQL answer. Raises AssertionError with the server's errors."""
        body = json.dumps({"query": text, "variables": variables}).encode()
        request = urllib.request.Request(
            f"{self.url}/graphql", body, {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            said = json.load(answer)
        assert not said.get("errors"), said["errors"]
        data: dict[str, Any] = said["data"]
        return data

    def launch(
        self,
        job: str,
        form: Mapping[str, object] | None = None,
        *,
        assets: Sequence[Sequence[str]] = (),
        checks: Sequence[tuple[Sequence[str], str]] | None = None,
    ) -> str:
        """Launch a job as the Launchpad does, or only some of its assets and checks; the run's id."""
        selector: dict[str, object] = {
            "repositoryLocationName": LOCATION,
            "repositoryName": "__repository__",
            "jobName": job,
        }
        if assets or checks:
            selector["assetSelection"] = [{"path": list(path)} for path in assets]
            selector["assetCheckSelection"] = (
                None
                if checks is None
                else [{"assetKey": {"path": list(path)}, "name": name} for path, name in checks]
            )
        said = self.query(_LAUNCH, params={"selector": selector, "runConfigData": dict(form or {})})[
            "launchRun"
        ]
        assert said["__typename"] == "LaunchRunSuccess", said
        run_id: str = said["run"]["runId"]
        return run_id

    def launch_again(self, run_id: str, strategy: str = "ALL_STEPS") -> str:
        """Re-execute a run, or from its failed step with FROM_FAILURE, as the menu does; the new run's id."""
        said = self.query(_AGAIN, parent={"parentRunId": run_id, "strategy": strategy})
        new: str = said["launchRunReexecution"]["run"]["runId"]
        return new

    def terminate(self, run_id: str) -> None:
        """End a run as the button does."""
        said = self.query(_TERMINATE, run=run_id)["terminateRun"]
        assert said["__typename"] == "TerminateRunSuccess", said

    def runs(self, **tags: str) -> list[Run]:
        """The runs with these tags of ours, newest first."""
        wanted = [{"key": f"backup/{name}", "value": value} for name, value in tags.items()]
        found = self.query(_RUNS, filter={"tags": wanted})["runsOrError"]["results"]
        return [_run(item) for item in found]

    def run(self, run_id: str) -> Run:
        """One run as it is now."""
        return _run(self.query(_RUN, run=run_id)["runOrError"])

    def events(self, run_id: str) -> list[Event]:
        """All events of a run, in order."""
        found = self.query(_EVENTS, run=run_id)["logsForRun"]["events"]
        return [
            Event(
                kind=item["__typename"],
                step=item.get("stepKey") or "",
                message=item.get("message") or "",
                metadata={entry["label"]: _value(entry) for entry in item.get("metadataEntries") or []},
            )
            for item in found
        ]

    def failure(self, run_id: str) -> str:
        """The first red line of a failed run's page, and what follows it."""
        for item in self.query(_FAILURES, run=run_id)["logsForRun"]["events"]:
            if item["__typename"] == "ExecutionStepFailureEvent":
                told: str = (item.get("failureMetadata") or {}).get("description") or item["error"]["message"]
                return told
        raise AssertionError(f"run {run_id} has no failed step")

    def wait_for_run(self, run_id: str, *, timeout_s: float = 90.0) -> Run:
        """The run once it has ended."""
        return self.wait(
            lambda: found if (found := self.run(run_id)).status in FINISHED else None,
            f"run {run_id} to end",
            timeout_s=timeout_s,
        )

    def wait(self, look: Callable[[], T | None], what: str, *, timeout_s: float = 90.0) -> T:
        """What `look` gives as soon as it gives something."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = look()
            if found is not None:
                return found
            time.sleep(0.3)
        raise AssertionError(f"waited {timeout_s:g} s for {what}")

    def failures_handled(self, run_id: str) -> bool:
        """Whether the daemon has been through the failures up to this run's, starting again what it will."""
        with dg.DagsterInstance.from_config(str(self.home)) as instance:
            newest = instance.fetch_run_status_changes(dg.DagsterEventType.RUN_FAILURE, limit=20).records
            failed = [record.storage_id for record in newest if record.run_id == run_id]
            done = instance.daemon_cursor_storage.get_cursor_values({_FAILURES_DONE})
        return bool(failed) and int(done.get(_FAILURES_DONE, 0)) >= failed[0]

    def checks(self, *path: str) -> list[dict[str, Any]]:
        """The newest evaluations of an asset's checks."""
        data = self.query(_CHECKS, key={"path": list(path)})["assetNodeOrError"]
        checks: list[dict[str, Any]] = data["assetChecksOrError"]["checks"]
        return checks

    def stop_schedule(self, name: str) -> None:
        """Stop a schedule as the switch does."""
        selector = {
            "repositoryLocationName": LOCATION,
            "repositoryName": "__repository__",
            "scheduleName": name,
        }
        self.query(_STOP, id=self.query(_SCHEDULE, selector=selector)["scheduleOrError"]["id"])


@contextlib.contextmanager
def running_dagster(home: Path, configuration: Path, environment: Mapping[str, str]) -> Iterator[DagsterBox]:
    """Start all three processes over a configuration; end them, and what they started, at the end."""
    home.mkdir(parents=True, exist_ok=True)
    shutil.copy(CHECKOUT / "dagster.yaml", home / "dagster.yaml")
    grpc, web = _free_port(), _free_port()
    workspace = home / "workspace.yaml"
    workspace.write_text(
        f"load_from:\n  - grpc_server: {{host: 127.0.0.1, port: {grpc}, location_name: {LOCATION}}}\n"
    )
    env = {
        **os.environ,
        **environment,
        "DAGSTER_HOME": str(home),
        "BACKUP_PIPELINE_CONFIG": str(configuration),
    }
    box = DagsterBox(home, web)
    with contextlib.ExitStack() as stack:
        code = ["api", "grpc", "-m", "backup_pipeline.definitions", "-h", "127.0.0.1", "-p", str(grpc)]
        _start(stack, home, env, "code", ["dagster", *code])
        _until(lambda: _listens(grpc), "the code server")
        _start(
            stack,
            home,
            env,
            "web",
            ["dagster-webserver", "-h", "127.0.0.1", "-p", str(web), "-w", str(workspace)],
        )
        _start(stack, home, env, "daemon", ["dagster-daemon", "run", "-w", str(workspace)])
        _until(lambda: _listens(web) and _loaded(box), "the webserver")
        yield box


def _start(
    stack: contextlib.ExitStack, home: Path, env: Mapping[str, str], name: str, argv: Sequence[str]
) -> None:
    program = str(Path(sys.executable).parent / argv[0])
    log = stack.enter_context((home / f"{name}.log").open("wb"))
    child = subprocess.Popen(
        [program, *argv[1:]], env=dict(env), cwd=home, stdout=log, stderr=log, start_new_session=True
    )
    stack.callback(_end, child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the whole group: children outlive their leader when it is asked nicely."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(timeout=8)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _until(ready: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + START_WITHIN_S
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not start within {START_WITHIN_S:g} s")
        time.sleep(0.2)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _loaded(box: DagsterBox) -> bool:
    try:
        said = box.query(
            "{ repositoriesOrError { __typename ... on RepositoryConnection { nodes { name } } } }"
        )
    except (OSError, urllib.error.URLError):
        return False
    return bool(said["repositoriesOrError"].get("nodes"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _run(item: Mapping[str, Any]) -> Run:
    tags = {tag["key"]: tag["value"] for tag in item["tags"]}
    return Run(item["runId"], item["jobName"], item["status"], tags)


def _value(entry: Mapping[str, Any]) -> Any:
    for name in ("intValue", "floatValue", "text", "timestamp", "table"):
        if entry.get(name) is not None:
            return entry[name]
    return None


_RUN_FIELDS = "runId jobName status tags { key value }"
_METADATA = """
metadataEntries {
  label
  ... on IntMetadataEntry { intValue }
  ... on FloatMetadataEntry { floatValue }
  ... on TextMetadataEntry { text }
  ... on TimestampMetadataEntry { timestamp }
  ... on TableMetadataEntry { table { records schema { columns { name } } } }
}
"""
_LAUNCH = """mutation ($params: ExecutionParams!) { launchRun(executionParams: $params) {
  __typename
  ... on LaunchRunSuccess { run { runId } }
  ... on RunConfigValidationInvalid { errors { message } }
  ... on PythonError { message }
} }"""
_AGAIN = """mutation ($parent: ReexecutionParams!) {
  launchRunReexecution(reexecutionParams: $parent) { ... on LaunchRunSuccess { run { runId } } }
}"""
_TERMINATE = "mutation ($run: String!) { terminateRun(runId: $run) { __typename } }"
_RUNS = f"""query ($filter: RunsFilter!) {{
  runsOrError(filter: $filter) {{ ... on Runs {{ results {{ {_RUN_FIELDS} }} }} }}
}}"""
_RUN = f"query ($run: ID!) {{ runOrError(runId: $run) {{ ... on Run {{ {_RUN_FIELDS} }} }} }}"
_EVENTS = f"""query ($run: ID!) {{ logsForRun(runId: $run) {{ ... on EventConnection {{ events {{
  __typename
  ... on MessageEvent {{ message stepKey }}
  ... on DisplayableEvent {{ {_METADATA} }}
}} }} }} }}"""
_FAILURES = """query ($run: ID!) { logsForRun(runId: $run) { ... on EventConnection { events {
  __typename
  ... on ExecutionStepFailureEvent { error { message } failureMetadata { description } }
} } } }"""
_CHECKS = f"""query ($key: AssetKeyInput!) {{ assetNodeOrError(assetKey: $key) {{ ... on AssetNode {{
  assetChecksOrError {{ ... on AssetChecks {{ checks {{
    name blocking canExecuteIndividually
    executionForLatestMaterialization {{ status evaluation {{ severity description success {_METADATA} }} }}
  }} }} }}
}} }} }}"""
_SCHEDULE = """query ($selector: ScheduleSelector!) {
  scheduleOrError(scheduleSelector: $selector) { ... on Schedule { id } }
}"""
_STOP = "mutation ($id: String!) { stopRunningSchedule(id: $id) { __typename } }"
