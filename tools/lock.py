"""Write constraints.txt anew: the newest versions that pyproject.toml admits, with their hashes.

Run by `make lock`, with uv from `.venv`. The file covers every extra, for CPython 3.11 to 3.14 on
Linux (glibc; x86_64 and arm64). It names wheels only, so that nothing is built, and no addresses,
so that it works with any index. A version already in the file stays unless `--upgrade` is given.
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
HEADER = "# All that `make` installs. Written by `make lock`: do not edit.\n"

# Installing this checkout as an editable package, without fetching a build environment, needs it.
BUILD = "setuptools>=77\n"

# In a wheel's name: what interpreter it is for, and what platform.
PYTHONS = re.compile(r"(^|\.)py3[.-]|^cp31[1-4]-cp31[1-4]-|^cp3\d+-abi3-")
PLATFORMS = re.compile(r"-(any|manylinux\w*_(x86_64|aarch64)(\.\w+)*)\.whl$")


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        lock = Path(scratch) / "pylock.toml"
        resolve(lock, upgrade="--upgrade" in sys.argv[1:])
        packages = tomllib.loads(lock.read_text())["packages"]
    requirements = [requirement(package) for package in packages if wanted(package)]
    CONSTRAINTS.write_text(HEADER + "".join(requirements))
    print(f"{CONSTRAINTS.name}: {len(requirements)} packages")
    return 0


def resolve(lock: Path, *, upgrade: bool) -> None:
    argv = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "-", "--all-extras", "--quiet"]
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
