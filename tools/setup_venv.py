"""Make `.venv` ready: what the Makefile's targets run first.

Installs exactly what constraints.txt names, hashes checked, then this checkout as an editable
package. Done again only when pyproject.toml, constraints.txt, the interpreter or the checkout's
place has changed. Safe to start twice at once, and to kill: a `.venv` counts only once its stamp
is written. Standard library only, and syntax that an old Python can read far enough to be told so.
"""

import fcntl
import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

OLDEST = (3, 11)
CHECKOUT = Path(__file__).resolve().parent.parent
VENV = CHECKOUT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "ready"
CONSTRAINTS = CHECKOUT / "constraints.txt"

# Only what the file names, with its hashes; it is complete, and `pip check` says so.
LOCKED = ("--require-hashes", "--no-deps", "--only-binary", ":all:")


def main() -> int:
    if sys.version_info < OLDEST:
        found = "{}.{}".format(*sys.version_info[:2])
        print(f"Python 3.11 or newer is needed, {sys.executable} is {found}.", file=sys.stderr)
        print("Name a newer one: make PYTHON=python3.12 ...", file=sys.stderr)
        return 1
    if is_ready():
        return 0
    with (CHECKOUT / ".venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_ready():  # made by the one we waited for
            return 0
        try:
            make()
        except subprocess.CalledProcessError as error:
            failed = " ".join(map(str, error.cmd))
            print(f"setting up .venv failed: exit {error.returncode} from {failed}", file=sys.stderr)
            return 1
    return 0


def place() -> str:
    """What a virtual environment cannot survive a change of."""
    return f"{CHECKOUT} {sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]}"


def contents() -> str:
    digest = hashlib.sha256()
    for path in (CHECKOUT / "pyproject.toml", CONSTRAINTS, Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def stamped() -> "list[str]":
    try:
        return STAMP.read_text().splitlines()
    except OSError:
        return []


def is_ready() -> bool:
    return PYTHON.exists() and stamped() == [place(), contents()]


def make() -> None:
    started = time.monotonic()
    print("setting up .venv (once; a minute or so)", flush=True)
    wanted = contents()
    # A finished environment is brought up to date in place, for what may be running from it. One
    # that was left half made, or made for another interpreter or folder, is begun anew.
    in_place = PYTHON.exists() and stamped()[:1] == [place()]
    STAMP.unlink(missing_ok=True)
    if not in_place:
        run(sys.executable, "-m", "venv", "--clear", VENV)
    install()
    STAMP.with_suffix(".new").write_text(f"{place()}\n{wanted}\n")
    STAMP.with_suffix(".new").replace(STAMP)
    print(f"ready in {time.monotonic() - started:.0f} s", flush=True)


def install() -> None:
    """Install by uv, which takes a tenth of pip's time; by pip where uv cannot.

    uv does not read pip's settings: where those name an index of their own, pip is used.
    """
    if not pip_has_its_own_index():
        try:
            install_uv()
            uv("sync", "--require-hashes", "--only-binary", ":all:", CONSTRAINTS)
            uv("install", "--no-deps", "--no-build-isolation", "--editable", CHECKOUT)
        except subprocess.CalledProcessError as error:
            print(f"uv could not (exit {error.returncode}); going on with pip", file=sys.stderr, flush=True)
        else:
            return
    pip("install", *LOCKED, "--no-compile", "-r", CONSTRAINTS)
    pip("install", "--no-deps", "--no-build-isolation", "--editable", CHECKOUT)
    pip("check")


def install_uv() -> None:
    requirement = re.search(r"^uv==.*\n(?: +--hash=.*\n)*", CONSTRAINTS.read_text(), re.MULTILINE)
    if requirement is None:
        raise SystemExit(f"{CONSTRAINTS} does not name uv")
    only_uv = VENV / "uv.txt"
    only_uv.write_text(requirement.group())
    pip("install", *LOCKED, "-r", only_uv)


def pip_has_its_own_index() -> bool:
    if "PIP_INDEX_URL" in os.environ:
        return True
    settings = subprocess.check_output(
        [PYTHON, "-m", "pip", "config", "list"], stdin=subprocess.DEVNULL, text=True
    )
    return re.search(r"^(global|install)\.(index-url|no-index)=", settings, re.MULTILINE) is not None


def pip(verb: str, *arguments: "str | Path") -> None:
    quiet = [] if verb == "check" else ["--quiet", "--quiet"]
    run(PYTHON, "-m", "pip", "--disable-pip-version-check", "--no-input", verb, *quiet, *arguments)


def uv(verb: str, *arguments: "str | Path") -> None:
    # The machine's own certificates, for where a proxy or a mirror has one of the house's.
    run(PYTHON, "-m", "uv", "--quiet", "--system-certs", "pip", verb, "--python", PYTHON, *arguments)


def run(*argv: "str | Path") -> None:
    subprocess.run(argv, stdin=subprocess.DEVNULL, cwd=CHECKOUT, check=True)


if __name__ == "__main__":
    sys.exit(main())
