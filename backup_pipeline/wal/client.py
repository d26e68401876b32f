"""What archive_command and restore_command start for each file: ask a socket, and be gone in milliseconds.

Started by PostgreSQL in its data directory, by this file's path, so that it loads nothing else:

    python -I -S /…/backup_pipeline/wal/client.py push --socket S --config C --cluster N [--timeout T] %p
    python -I -S /…/backup_pipeline/wal/client.py fetch --socket S %f %p

`push` asks the agent, `fetch` the recovery that set restore_command. Where no agent answers, or none that
this client understands, the full program is started for the one file, with the same contract. It imports
nothing of ours, and of the standard library as little as can be: PostgreSQL waits for it at every segment.
What the lines of the protocol hold is written down in protocol.py.

Exit codes of `push`: 0 only when the file is in the archive, durable; else 1 to 125, whatever happens.
(PostgreSQL tries again after those. After a higher code its archiver ends, and pg_stat_archiver counts no
failure.) Of `fetch`: 0 only when the file is in place; 1 only when it is known not to exist, which PostgreSQL
reads as the end of the WAL; else 200, which stops the recovery.
"""

import os
import sys
import time

try:
    import _socket as socket  # the module `socket` costs as much time as all else here together
except ImportError:  # another build of Python
    import socket  # type: ignore[no-redef]  # the same names, where `_socket` lacks

VERSION = 1
SILENCE_S = 5.0
"""How long an agent may say nothing, not even that it is at work, before it counts as absent."""

FAILED = 1
ABSENT, FATAL = 1, 200
NOT_MINE = 64
_MOST_CODES = 125
_TIMEOUT_S = 90.0
_MAX_ANSWER_BYTES = 65536
_USAGE = "push --socket SOCKET --config FILE --cluster NAME [--timeout SECONDS] PATH"
_PLAIN = frozenset(range(32, 127)) - {34, 92}  # what stands in JSON as it is


def main(argv: "list[str]") -> int:
    """Archive or fetch the file that `argv` names; what the command ends with."""
    if argv[:1] == ["fetch"]:
        return _fetch(argv)
    options = _options(argv)
    if options is None:
        return _failed(f"usage: {_USAGE}")
    path = os.path.join(os.getcwd(), options["path"])
    try:
        answer = _ask(options, "push", path.rpartition("/")[2], path)
    except OSError as error:
        return _full_program(options, path, f"no agent at {options['socket']} ({error.strerror or error})")
    if isinstance(answer, str):
        return _full_program(options, path, f"the agent at {options['socket']} {answer}")
    code, said = answer
    if said:
        _say(said)
    return _mapped(code)


def _options(argv: "list[str]") -> "dict[str, str] | None":
    found = {"timeout": str(_TIMEOUT_S)}
    rest = argv[1:]
    while len(rest) > 2 and rest[0] in ("--socket", "--config", "--cluster", "--timeout"):
        found[rest[0][2:]] = rest[1]
        rest = rest[2:]
    if argv[:1] != ["push"] or len(rest) != 1 or {"socket", "config", "cluster"} - found.keys():
        return None
    found["path"] = rest[0]
    try:
        return found if float(found["timeout"]) > 0 else None
    except ValueError:
        return None


def _fetch(argv: "list[str]") -> int:
    """Have a file put where PostgreSQL wants it."""
    if len(argv) != 5 or argv[1] != "--socket":
        return _failed("usage: fetch --socket SOCKET NAME PATH", FATAL)
    _, _, socket_path, name, path = argv
    options = {"socket": socket_path, "cluster": "", "timeout": "inf"}  # the recovery has its own patience
    try:
        answer = _ask(options, "fetch", name, os.path.join(os.getcwd(), path))
    except OSError as error:
        return _failed(f"no recovery at {socket_path} ({error.strerror or error})", FATAL)
    if isinstance(answer, str):
        return _failed(f"the recovery at {socket_path} {answer}", FATAL)
    code, said = answer
    if said:
        _say(said)
    return code if code in (0, ABSENT) else FATAL


def _ask(options: "dict[str, str]", op: str, name: str, path: str) -> "tuple[int, str] | str":
    """The agent's answer, or what is wrong with it. Raises OSError when it does not answer."""
    deadline_s = time.monotonic() + float(options["timeout"])
    about = f'"cluster": {_quoted(options["cluster"])}, "name": {_quoted(name)}, "path": {_quoted(path)}'
    request = f'{{"version": {VERSION}, "op": "{op}", {about}}}\n'
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(SILENCE_S)
        connection.connect(options["socket"])
        connection.sendall(request.encode())
        answer = b""
        while not answer.endswith(b"\n"):
            got = connection.recv(4096)
            if not got:
                return "went away"
            answer = (answer + got).lstrip(b"\n")  # an empty line: it is at work
            if len(answer) > _MAX_ANSWER_BYTES:
                return "says too much"
            if time.monotonic() > deadline_s:
                return FAILED, f"the agent has not archived {name} within {options['timeout']} s"
    finally:
        connection.close()
    if answer == b'{"version": %d, "name": "%s", "code": 0, "said": ""}\n' % (VERSION, name.encode()):
        return 0, ""
    return _understood(answer, name)


def _understood(answer: bytes, name: str) -> "tuple[int, str] | str":
    import json  # only for bad news: it costs as much time as Python itself

    try:
        told = json.loads(answer)
        if told["version"] != VERSION:
            return f"speaks version {told['version']}, not {VERSION}: restart it"
        if told["name"] != name:
            return f"answered for {told['name']}"
        code, said = int(told["code"]), str(told["said"])
        if code == NOT_MINE:
            return f"does not serve this: {said}"
    except (ValueError, KeyError, TypeError):
        return f"gave an answer that is none: {answer[:200]!r}"
    return code, said


def _full_program(options: "dict[str, str]", path: str, why: str) -> int:
    """Archive one file without an agent, by a child of ours."""
    import subprocess

    name = path.rpartition("/")[2]
    _say(f"{why}; archiving {name} by the full program")
    argv = [sys.executable, "-I", "-m", "backup_pipeline.cli", "--config", options["config"]]
    argv += ["wal", "push", options["cluster"], path]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, timeout=float(options["timeout"]), check=False)
    except subprocess.TimeoutExpired:
        return _failed(f"{name} was not archived within {options['timeout']} s")
    if done.returncode < 0:
        _say(f"the program that archived {name} was killed by signal {-done.returncode}")
    return _mapped(done.returncode)


def _quoted(text: str) -> str:
    if _PLAIN.issuperset(text.encode("utf-8", "surrogateescape")):
        return f'"{text}"'
    import json

    return json.dumps(text)


def _mapped(code: int) -> int:
    return code if 0 <= code <= _MOST_CODES else FAILED


def _failed(why: str, code: int = FAILED) -> int:
    _say(why)
    return code


def _say(line: str) -> None:
    try:
        os.write(2, b"backup-pipeline: " + line.encode("utf-8", "replace") + b"\n")
    except OSError:  # nobody listens; the exit code says it too
        return


if __name__ == "__main__":
    try:
        code = main(sys.argv[1:])
    except BaseException as error:
        code = _failed(f"{type(error).__name__}: {error}", FATAL if sys.argv[1:2] == ["fetch"] else FAILED)
    os._exit(code)  # nothing is left to be tidied up, and that would take as long as asking did
