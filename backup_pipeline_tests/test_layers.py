"""The package is built in layers, and imports run one way; read from the source, nothing is imported."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import backup_pipeline

PACKAGE = "backup_pipeline"
ROOT = Path(backup_pipeline.__file__).parent

# Each may import what stands in lines below its own, and its own part.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"definitions"}),
    frozenset({"orchestration", "cli", "demo"}),
    frozenset({"commands"}),
    frozenset({"terminal"}),
    frozenset({"actions"}),
    frozenset({"wal"}),
    frozenset({"engines", "storage", "alerts"}),
    frozenset({"config_file"}),
    frozenset({"config_tables"}),
    frozenset({"config", "process", "read_ahead", "spool", "zstd"}),
    frozenset({"domain", "confinement"}),
    frozenset({"errors"}),
    frozenset({"units", "stderr"}),
)
BESIDE = {("config", "config_file"): "the shape of the file is read when the file is"}
DOMAIN_MAY_USE = frozenset({"domain", "units", "errors"})
ONLY_IN: dict[str, tuple[str, ...]] = {
    "dagster": ("orchestration/", "definitions.py"),
    "dagster_aws": ("orchestration/",),
    "subprocess": ("process.py", "wal/client.py"),  # the client imports nothing of ours
    "obstore": ("storage/",),
    "boto3": ("storage/",),
    "botocore": ("storage/",),
    "psycopg": ("engines/", "actions/", "demo/"),
    "click": ("cli.py", "commands/", "demo/"),
    "rich": ("terminal.py", "commands/"),
}
MODULES = sorted(ROOT.rglob("*.py"))


def part_of(module: str) -> str:
    """The layer's name of `backup_pipeline.storage.store`: `storage`."""
    return module.split(".")[1] if "." in module else ""


def own_part(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(module, names) of each import in a file, wherever in it; a relative one is none of ours."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            names = tuple(alias.name for alias in node.names)
            if node.module == PACKAGE:
                yield from ((f"{PACKAGE}.{name}", ()) for name in names)
            else:
                yield node.module, names
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            hidden = called in ("__import__", "import_module")
            assert not hidden or PACKAGE not in ast.unparse(node), f"{path} hides an import of ours"


def level(part: str) -> int:
    (found,) = (number for number, names in enumerate(LAYERS) if part in names)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    part = own_part(path)
    if part == "__init__":
        assert not path.read_text(encoding="utf-8")
        return
    for module, _ in imported(path):
        if module.split(".")[0] != PACKAGE or (part, part_of(module)) in BESIDE:
            continue
        below = part_of(module)
        assert below == part or level(below) > level(part), f"{path} imports {module}"
        if part == "domain":
            assert below in DOMAIN_MAY_USE, f"{path} imports {module}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_heavy_and_the_dangerous_stay_in_their_places(path: Path) -> None:
    where = str(path.relative_to(ROOT))
    for module, names in imported(path):
        package = module.split(".")[0]
        places = ONLY_IN.get(package)
        if places is None or where.startswith(places):
            continue
        # Elsewhere subprocess only names types: of what process.start returns, and what that raises.
        types = {"Popen", "TimeoutExpired"}
        assert package == "subprocess", f"{where} imports {module}"
        assert names, f"{where} imports all of {module}"
        assert set(names) <= types, f"{where} imports {names} of {module}"
        assert "Popen" not in set(calls(path)), f"{where} starts a process by itself"


def calls(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    yield from (ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))


@pytest.mark.parametrize("path", sorted((ROOT / "domain").glob("*.py")), ids=lambda path: path.name)
def test_the_domain_is_pure(path: Path) -> None:
    """No clock, no network, no environment, no files: neither imported nor called."""
    known = {module.split(".")[0] for module, _ in imported(path)}
    assert not known & {"os", "sys", "socket", "pathlib", "time", "random", "secrets", "tempfile", "shutil"}
    for called in calls(path):
        assert called not in ("open", "input", "print"), f"{path}: {called}"
        assert not called.endswith((".now", ".utcnow", ".today")), f"{path}: {called}"


def test_only_the_doors_read_the_clock() -> None:
    clocks = {
        str(path.relative_to(ROOT))
        for path in MODULES
        if {"datetime.now", "datetime.utcnow"} & set(calls(path))
    }
    doors = ("commands/", "orchestration/", "demo/")
    assert clocks
    assert {where for where in clocks if not where.startswith(doors)} <= {"storage/bucket.py"}


def test_every_part_has_a_place() -> None:
    parts = {own_part(path) for path in MODULES} - {"__init__"}
    assert parts <= frozenset().union(*LAYERS)
