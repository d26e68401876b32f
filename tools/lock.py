"""Write the locks anew: the newest versions that pyproject.toml admits, with their hashes.

Run by `make lock`, with uv from `.venv`. constraints.txt covers every extra; deploy/requirements.txt is
what of it a service needs. Both are for CPython 3.11 to 3.14 on Linux (glibc; x86_64 and arm64), name
wheels only, so that nothing is built, and no addresses, so that they work with any index. A version
already in constraints.txt stays unless `--upgrade` is given.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parent.parent
CONSTRAINTS = CHECKOUT / "constraints.txt"
SERVICE = CHECKOUT / "deploy" / "requirements.txt"
HEADER = "# All that {what}. Written by `make lock`: do not edit.\n"

# Installing this checkout as an editable package, without fetching a build environment, needs it.
BUILD = "setuptools>=77\n"

# In a wheel's name: what interpreter it is for, and what platform.
PYTHONS = re.compile(r"(^|\.)py3[.-]|^cp31[1-4]-cp31[1-4]-|^cp3\d+-abi3-")
PLATFORMS = re.compile(r"-(any|manylinux\w*_(x86_64|aarch64)(\.\w+)*)\.whl$")


def main() -> int:
    write(CONSTRAINTS, "`make` installs", "--all-extras", upgrade="--upgrade" in sys.argv[1:])
    write(SERVICE, "a service installs")  # in the versions that were just written
    return 0


def write(path: Path, what: str, *extras: str, upgrade: bool = False) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        lock = Path(scratch) / "pylock.toml"
        resolve(lock, *extras, upgrade=upgrade)
        packages = tomllib.loads(lock.read_text())["packages"]
    requirements = [requirement(package) for package in packages if wanted(package)]
    path.write_text(HEADER.format(what=what) + "".join(requirements))
    print(f"{path.relative_to(CHECKOUT)}: {len(requirements)} packages")


def resolve(lock: Path, *extras: str, upgrade: bool) -> None:
    argv = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "-", *extras, "--quiet"]
    argv += ["--universal", "--python-version", "3.11", "--generate-hashes", "--no-build"]
    argv += ["--format", "pylock.toml", "--output-file", str(lock)]
    if not upgrade and CONSTRAINTS.exists():
        argv += ["--constraints", str(kept_versions(lock.parent))]
    subprocess.run(argv, input=BUILD, text=True, cwd=CHECKOUT, check=True)


def kept_versions(scratch: Path) -> Path:
    """What the file pins now, without hashes; a pin that no longer fits has to go by `--upgrade`."""
    kept = scratch / "kept.txt"
    pins = re.findall(r"^\S+==[^\\\n]+", CONSTRAINTS.read_text(), re.MULTILINE)
    kept.write_text("".join(f"{pin.strip()}\n" for pin in pins))
    return kept


def wanted(package: Mapping[str, Any]) -> bool:
    marker = package.get("marker", "")
    return "sys_platform == " not in marker or "linux" in marker


def requirement(package: Mapping[str, Any]) -> str:
    marker = f" ; {package['marker']}" if "marker" in package else ""
    hashes = sorted(wheel_hashes(package))
    if not hashes:
        raise SystemExit(f"{package['name']} {package['version']} has no wheel for Linux")
    return " \\\n    ".join([f"{package['name']}=={package['version']}{marker}", *hashes]) + "\n"


def wheel_hashes(package: Mapping[str, Any]) -> Iterator[str]:
    for wheel in package.get("wheels", []):
        name = wheel.get("name") or wheel["url"].rsplit("/", 1)[-1]
        tags = name.split("-", 2)[2]
        if PYTHONS.search(tags) and PLATFORMS.search(name):
            yield f"--hash=sha256:{wheel['hashes']['sha256']}"


if __name__ == "__main__":
    sys.exit(main())
