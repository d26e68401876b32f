"""Client and agent: the protocol, the look-ahead, who may come in, and what a client does by itself."""

import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backup_pipeline import process
from backup_pipeline.config import StoreConfig
from backup_pipeline.errors import Busy, ConfigError, StoreError
from backup_pipeline.process import Command
from backup_pipeline.wal import client, protocol
from backup_pipeline.wal.agent import FAILED, TOO_LATE, Agent, AgentConfig
from backup_pipeline.wal.ahead import AHEAD
from backup_pipeline.wal.archive import Pushed, WalArchive
from backup_pipeline.wal.listing import read_archive
from backup_pipeline.wal.protocol import Answer, Request, answer_line, read_answer, read_request, request_line
from backup_pipeline.wal.status import ask_agent
from backup_pipeline_tests.waiting import wait_until
from backup_pipeline_tests.wal.box import CLIENT, WalBox, begin
from backup_pipeline_tests.wal.segments import SYSTEM, DataDirectory


@pytest.fixture
def box(tmp_path: Path) -> WalBox:
    """A cluster that archives into a directory."""
    (tmp_path / "store").mkdir()
    made = WalBox(tmp_path, StoreConfig((tmp_path / "store").as_uri()))
    begin(made.store)
    return made


class Held(WalArchive):
    """An archive that tells what it is asked to push, and waits until it may."""

    def __init__(self, box: WalBox) -> None:
        super().__init__(box.store, "main")
        self.pushed: list[str] = []
        self.go = threading.Event()
        self.failing = False
        self.error: Exception = StoreError("the store is away")

    def push(self, path: Path) -> Pushed:
        self.pushed.append(path.name)
        assert self.go.wait(30)
        if self.failing:
            raise self.error
        return super().push(path)


def numbers(box: WalBox) -> tuple[int, ...]:
    return read_archive(box.store, "main").numbers(1)


# The protocol


def test_the_client_speaks_as_the_protocol_says() -> None:
    assert (client.VERSION, client.NOT_MINE) == (protocol.VERSION, protocol.NOT_MINE)
    assert client.SILENCE_S >= 3 * protocol.PULSE_S
    for text in ("plain", "pg_wal/ü", 'a "quoted" \\ one', "line\nend", "\udcff"):
        line = f'{{"version": 1, "op": "push", "cluster": "main", "path": {client._quoted(text)}}}\n'
        assert read_request(line.encode()).path == text
    assert read_answer(answer_line(Answer(3, "why", "n"))) == Answer(3, "why", "n")
    assert read_request(request_line(Request("status", "main"))) == Request("status", "main")
    for garbage in (b"", b"[]", b"{", b'"x"', b"[" * 100_000):
        with pytest.raises(ConfigError):
            read_request(garbage)


def test_the_client_loads_next_to_nothing() -> None:
    said = process.run(
        Command((sys.executable, "-I", "-S", "-X", "importtime", CLIENT)), timeout_s=30, check=False
    )
    loaded = set(re.findall(r"\|\s+(\S+)$", said.stderr, re.MULTILINE))
    assert said.returncode == 1
    assert "usage: push" in said.stderr
    assert "_socket" in loaded
    assert not {"json", "socket", "subprocess", "re", "argparse", "enum", "site"} & loaded
    assert not [name for name in loaded if name.startswith("backup_pipeline")]


@contextlib.contextmanager
def false_agent(box: WalBox, answer: bytes) -> Iterator[None]:
    """Something that listens where the agent should, reads a line, says `answer`, and hangs up."""
    box.socket.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(box.socket))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection = listener.accept()[0]
                    connection.recv(65536)
                    connection.sendall(answer)
                    connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


# Pushing through the agent


def test_a_segment_is_archived_and_the_next_ones_with_it(box: WalBox, data: DataDirectory) -> None:
    paths = [data.segment(number, ready=True) for number in range(3, 15)]
    held = Held(box)
    with box.agent(held) as agent:
        held.go.set()
        assert box.push(paths[0]).returncode == 0
        wait_until(lambda: len(held.pushed) == 1 + AHEAD)
        (data.ready / f"{paths[0].name}.ready").unlink()
        for path in paths[1:]:
            assert box.push(path) == process.Completed(0, "", "")
            (data.ready / f"{path.name}.ready").unlink()
        assert sorted(held.pushed) == [path.name for path in paths]  # each once
        assert agent.pusher.waiting == 0
    assert numbers(box) == tuple(range(3, 15))
    assert not box.socket.exists()


def test_a_result_is_not_believed_of_another_file(box: WalBox, data: DataDirectory) -> None:
    first, second = data.segment(3, ready=True), data.segment(4, ready=True)
    held = Held(box)
    held.go.set()
    with box.agent(held) as agent:
        assert box.push(first).returncode == 0
        (data.ready / f"{first.name}.ready").unlink()
        wait_until(lambda: agent.pusher.done == 2)
        data.segment(4, seed=1)
        refused = box.push(second)
    assert refused.returncode == 1
    assert "already, with other bytes" in refused.stderr
    assert held.pushed == [first.name, second.name, second.name]


def test_what_failed_ahead_is_tried_again_when_it_is_asked_for(box: WalBox, data: DataDirectory) -> None:
    first, second = data.segment(3, ready=True), data.segment(4, ready=True)
    held = Held(box)
    held.failing = True
    with box.agent(held) as agent:
        asking = process.start(Command(box.client_argv(str(first))), stderr=subprocess.PIPE)
        wait_until(lambda: len(held.pushed) == 2)
        held.go.set()
        assert b"the store is away" in asking.communicate(timeout=30)[1]
        assert asking.returncode == 1
        wait_until(lambda: agent.pusher.failed == 2)
        assert box.push(first).returncode == 1
        assert held.pushed == [first.name, second.name, first.name]  # no look ahead while it fails
        held.failing = False
        assert [box.push(path).returncode for path in (first, second)] == [0, 0]
    assert numbers(box) == (3, 4)


def test_two_clients_of_one_file_share_one_push(box: WalBox, data: DataDirectory) -> None:
    path, held = data.segment(3), Held(box)
    with box.agent(held):
        argv = box.client_argv(str(path))
        clients = [process.start(Command(argv), stderr=subprocess.PIPE) for _ in range(2)]
        wait_until(lambda: len(held.pushed) >= 1)
        held.go.set()
        for each in clients:
            each.communicate(timeout=30)
        assert [each.returncode for each in clients] == [0, 0]
    assert numbers(box) == (3,)


def test_a_slow_push_is_told_in_time_and_goes_on(box: WalBox, data: DataDirectory) -> None:
    path, held = data.segment(3), Held(box)
    with box.agent(held, push_timeout_s=1.5):
        late = box.push(path)
        assert (late.returncode, "still being tried" in late.stderr) == (TOO_LATE, True)
        late = box.push(path, timeout_s=1.0)
        assert (late.returncode, "within 1 s" in late.stderr) == (1, True)
        assert held.pushed == [path.name]  # one push, asked for twice
        held.go.set()
        assert box.push(path).returncode == 0
    assert numbers(box) == (3,)


def test_a_push_that_timed_out_is_a_failure_and_not_under_way(box: WalBox, data: DataDirectory) -> None:
    held, pulses = Held(box), 0

    def pulse() -> None:
        nonlocal pulses
        pulses += 1

    held.failing, held.error = True, TimeoutError("the disk did not answer")
    held.go.set()
    agent = Agent(AgentConfig(box.socket, "main", 1.0), held, log=box.said.append)
    path = str(data.segment(3))
    answer = agent.answer(request_line(Request("push", "main", path)), pulse)
    agent.pusher.close()
    assert answer is not None
    assert (answer.code, answer.said) == (FAILED, "the disk did not answer")
    assert pulses == 0


def test_a_client_that_is_killed_leaves_the_push_to_the_next(box: WalBox, data: DataDirectory) -> None:
    path, held = data.segment(3), Held(box)
    with box.agent(held):
        killed = process.start(Command(box.client_argv(str(path))))
        wait_until(lambda: held.pushed == [path.name])
        killed.kill()
        killed.wait()
        held.go.set()
        assert box.push(path).returncode == 0
    assert numbers(box) == (3,)


def test_an_agent_that_stops_finishes_what_it_began_and_leaves_the_rest(
    box: WalBox, data: DataDirectory
) -> None:
    paths = [data.segment(number, ready=True) for number in range(3, 9)]
    held = Held(box)

    def go_when_it_stops() -> None:
        wait_until(lambda: not box.socket.exists())
        held.go.set()

    with box.agent(held):
        asking = process.start(Command(box.client_argv(str(paths[0]))))
        wait_until(lambda: len(held.pushed) == 2)
        going = threading.Thread(target=go_when_it_stops)
        going.start()
    going.join()
    asking.wait(30)
    assert asking.returncode == 0
    assert held.pushed == [paths[0].name, paths[1].name]
    assert numbers(box) == (3, 4)


def test_an_agent_tells_how_it_is(box: WalBox) -> None:
    assert not ask_agent(box.cluster).answers
    with box.agent():
        told = dict(ask_agent(box.cluster).told)
        assert (told["program"], told["pid"], told["archived"]) == ("1.2", str(os.getpid()), "0")
        wait_until(lambda: f"the archive of main takes WAL of PostgreSQL system {SYSTEM}" in box.said)


def test_without_an_archive_neither_the_agent_nor_the_full_program_acknowledges(
    box: WalBox, data: DataDirectory, tmp_path: Path
) -> None:
    """Its disk is not mounted, and PostgreSQL's user may write to the folder beneath."""
    (tmp_path / "store").rename(tmp_path / "disk")
    (tmp_path / "store").mkdir()
    path = data.segment(3)
    with box.agent():
        wait_until(lambda: any("takes WAL of nobody: it has not begun" in line for line in box.said))
        by_agent = box.push(path)
    by_itself = box.push(path)
    assert (by_agent.returncode, by_itself.returncode) == (1, 5)
    assert "there is no WAL archive of main" in by_agent.stderr
    assert "there is no WAL archive of main" in by_itself.stderr
    assert list((tmp_path / "store").iterdir()) == []


def test_an_agent_says_at_once_that_the_store_is_away(box: WalBox, tmp_path: Path) -> None:
    archive = WalArchive(box.store, "main")
    shutil.rmtree(tmp_path / "store")
    with box.agent(archive):
        wait_until(lambda: any("cannot be used: the store's folder" in line for line in box.said))


# Who may come in


def test_only_its_user_reaches_the_agent(box: WalBox) -> None:
    with box.agent():
        assert stat.S_IMODE(box.socket.stat().st_mode) == 0o600
        assert stat.S_IMODE(box.socket.parent.stat().st_mode) == 0o700
    box.socket.parent.chmod(0o755)
    archive = WalArchive(box.store, "main")
    agent = Agent(AgentConfig(box.socket, "main", 1.0), archive, log=box.said.append)
    with pytest.raises(ConfigError, match="lets in others than this user"):
        agent.serve(threading.Event())
    far = AgentConfig(Path("/nowhere/at/all/x.sock"), "main", 1.0)
    with pytest.raises(ConfigError, match="cannot listen at"):
        Agent(far, archive, log=box.said.append).serve(threading.Event())
    long = AgentConfig(Path("/tmp") / ("x" * 120), "main", 1.0)
    with pytest.raises(ConfigError, match="longer than 107 bytes"):
        Agent(long, archive, log=box.said.append).serve(threading.Event())


def test_a_second_agent_is_refused_and_the_first_goes_on(box: WalBox, data: DataDirectory) -> None:
    with box.agent():
        second = Agent(
            AgentConfig(box.socket, "main", 1.0),
            WalArchive(box.store, "main"),
            log=box.said.append,
        )
        with pytest.raises(Busy, match="another agent listens"):
            second.serve(threading.Event())
        done = box.push(data.segment(3))
        assert (done.returncode, done.stderr) == (0, "")


def test_clients_that_say_nothing_or_nonsense_do_no_harm(box: WalBox, data: DataDirectory) -> None:
    with box.agent(), contextlib.ExitStack() as stack:
        for said in (b"", b"x" * 100_000, b"{}\n", b"\n", b'{"version": 1, "op": "push"', b"\xff\n"):
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.connect(str(box.socket))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(said)
        assert box.push(data.segment(3)).stderr == ""
        missing = box.push(data.wal / "000000010000000000000009")
        assert (missing.returncode, "cannot read" in missing.stderr) == (1, True)


# Without an agent


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "went away"),
        (b"\n\n", "went away"),
        (b'{"version": 2, "name": "{name}", "code": 0, "said": ""}\n', "speaks version 2, not 1"),
        (b'{"version": 1, "name": "other", "code": 0, "said": ""}\n', "answered for other"),
        (b"nonsense\n", "gave an answer that is none"),
        (answer_line(Answer(64, "this is the agent of cluster other")), "answered for"),
    ],
)
def test_an_agent_that_is_not_understood_is_done_without(
    box: WalBox, data: DataDirectory, answer: bytes, said: str
) -> None:
    path = data.segment(3)
    with false_agent(box, answer.replace(b"{name}", path.name.encode())):
        done = box.push(path)
    assert (done.returncode, said in done.stderr) == (0, True), done.stderr
    assert f"archiving {path.name} by the full program" in done.stderr
    assert numbers(box) == (3,)


def test_an_agent_that_stands_still_is_done_without(box: WalBox, data: DataDirectory) -> None:
    with box.agent_process() as agent:
        assert box.push(data.segment(3)).stderr == ""
        os.kill(agent.pid, signal.SIGSTOP)
        try:
            done = box.push(data.segment(4))
            assert (done.returncode, "by the full program" in done.stderr) == (0, True)
        finally:
            os.kill(agent.pid, signal.SIGCONT)
        assert box.push(data.segment(5)).stderr == ""
        agent.terminate()
        assert agent.wait(30) == 0
    assert numbers(box) == (3, 4, 5)


def test_without_an_agent_failures_end_with_1_to_125(box: WalBox, data: DataDirectory) -> None:
    path = data.segment(3)
    assert box.push(path).returncode == 0
    data.segment(3, seed=1)
    refused = box.push(path)
    assert (refused.returncode, "with other bytes" in refused.stderr) == (6, True)
    box.path.write_text("[store\n", encoding="utf-8")
    assert box.push(path).returncode == 3
    box.path.unlink()
    assert box.push(path).returncode == 3


@pytest.mark.parametrize(
    ("program", "code"), [("exit 0", 0), ("exit 7", 7), ("exit 125", 125), ("exit 126", 1), ("kill -9 $$", 1)]
)
def test_the_full_programs_end_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, code: int
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{program}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    argv = ["push", "--socket", "/none", "--config", "c", "--cluster", "n", "--timeout", "9", "pg_wal/x"]
    assert client.main(argv) == code


def test_a_full_program_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    argv = ["push", "--socket", "/none", "--config", "c", "--cluster", "n", "--timeout", "0.2", "pg_wal/x"]
    assert client.main(argv) == 1


@pytest.mark.parametrize(
    "change",
    [lambda argv: argv[1:], lambda argv: argv[:-1], lambda argv: [*argv, "x"], lambda argv: argv[:3]],
)
def test_a_command_line_that_is_none_ends_with_1(change: Callable[[list[str]], list[str]]) -> None:
    argv = ["push", "--socket", "s", "--config", "c", "--cluster", "n", "--timeout", "1", "p"]
    assert client._options(argv) is not None
    assert client.main(change(argv)) == 1
    assert client._options([*argv[:-2], "never", "p"]) is None
