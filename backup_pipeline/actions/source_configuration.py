"""The configuration that a recovered cluster's source had: found in its directory, judged, and put in force.

Called by promote.py. What may come back is domain/server_configuration.py's to decide. Files become the
server's all at once: the main one, whose first line says that it is done, comes last.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from backup_pipeline import process
from backup_pipeline.actions.recovered_directory import write_owned
from backup_pipeline.domain.server_configuration import (
    HEADER,
    LEFT_OUT,
    Decision,
    Rule,
    Setting,
    decide,
    decide_rules,
    is_include,
    parse_settings,
    render,
    render_rules,
    setting_line,
)
from backup_pipeline.engines.postgres.recovery import CARRIED, SOURCE_SUFFIX
from backup_pipeline.errors import ToolError
from backup_pipeline.process import Command, Identity
from backup_pipeline.storage.files import sync_names

MAIN = "postgresql.conf"
_AUTO = "postgresql.auto.conf"
_RULES = ("pg_hba.conf", "pg_ident.conf")
_MOST_INCLUDES = 10  # PostgreSQL's own depth
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class SourceConfiguration:
    """What would be in force: each setting and rule, kept or not, and what could not be read."""

    decisions: tuple[Decision, ...]
    rules: Mapping[str, tuple[Rule, ...]]  # of each file of _RULES that was found
    notes: tuple[str, ...]

    @property
    def lines(self) -> tuple[str, ...]:
        """The plan in words: what comes back, and all that does not; no value that may hold a secret."""
        kept = [each for each in self.decisions if each.kept]
        left = [each for each in self.decisions if not each.kept and each.reason]
        rules = [(name, rule) for name, found in self.rules.items() for rule in found]
        return (
            *(f"note: {note}" for note in self.notes),
            *(f"setting: {each.shown}" for each in kept),
            *(f"LEFT OUT: {each.shown}: {_why(each)}" for each in left),
            *(f"{name}: {rule.shown}" for name, rule in rules if rule.kept),
            *(f"LEFT OUT of {name}: {rule.shown}: {rule.reason}" for name, rule in rules if not rule.kept),
        )

    @property
    def left_out(self) -> tuple[str, ...]:
        """What somebody has to look at afterwards: names of settings, and rules."""
        names = [each.setting.name for each in self.decisions if not each.kept and each.reason]
        names += [
            f"{name}: {rule.shown}" for name, found in self.rules.items() for rule in found if not rule.kept
        ]
        return tuple(names)


def _why(decision: Decision) -> str:
    allow = f" (--allow {decision.setting.name} brings it back)" if decision.allowable else ""
    return f"{decision.reason}{allow}"


def read_source_configuration(data: Path, *, allowed: Collection[str]) -> SourceConfiguration:
    """Find and judge what the source had. Nothing of it is run or loaded."""
    notes: list[str] = []
    main = _find(data, MAIN)
    settings: list[Setting] = []
    if main is None:
        notes.append(
            f"no {MAIN} of the source is here: it lay outside of its data directory, and the role of the "
            "base backup could not read it; what is not set has PostgreSQL's default"
        )
    for path in (main, data / f"{_AUTO}{SOURCE_SUFFIX}"):
        if path is not None and path.exists():
            settings += _settings(data, path, notes, 0)
    rules = {}
    for name in _RULES:
        found = _find(data, name)
        if found is None:
            notes.append(
                f"no {name} of the source is here: ours stays, which lets in its own user by the socket"
            )
        else:
            rules[name] = decide_rules(_text(found), allowed=allowed)
    decisions = decide(settings, allowed=allowed, exists=lambda path: (data / path).exists())
    return SourceConfiguration(decisions, rules, tuple(notes))


def _find(data: Path, name: str) -> Path | None:
    """The source's file: that from outside was in force, wherever there was one."""
    outside = sorted(path for path in (data / CARRIED).rglob(name) if path.is_file())
    inside = data / f"{name}{SOURCE_SUFFIX}"
    return outside[0] if outside else inside if inside.exists() else None


def _settings(data: Path, path: Path, notes: list[str], depth: int) -> Iterator[Setting]:
    """The settings of a file and of those that it includes, in the order in which they are read."""
    shown = str(path.relative_to(data))
    found, odd = parse_settings(_text(path), shown)
    notes += [f"{where} cannot be read, and is left out" for where in odd]
    for setting in found:
        if not is_include(setting):
            yield setting
            continue
        included = list(_included(data, path, setting)) if depth < _MOST_INCLUDES else []
        if not included and setting.name != "include_if_exists":
            notes.append(f"{setting.where} includes {setting.value}, which is not here")
        for each in included:
            yield from _settings(data, each, notes, depth + 1)


def _included(data: Path, path: Path, setting: Setting) -> Iterator[Path]:
    """The files that an include means, among those that were carried along."""
    value = setting.value
    wanted = data / CARRIED / value.lstrip("/") if value.startswith("/") else path.parent / value
    if not wanted.resolve().is_relative_to(data.resolve()):
        return  # a planted path: nothing but the directory's own is read
    if setting.name == "include_dir":
        files = sorted(wanted.glob("*.conf")) if wanted.is_dir() else []
        yield from (each for each in files if each.is_file() and not each.name.startswith("."))
    elif wanted.is_file():
        yield wanted


def is_configured(data: Path) -> bool:
    """Whether `put_in_force` came to its end here."""
    main = data / MAIN
    return main.exists() and _text(main).startswith(HEADER)


def left_out_before(data: Path) -> tuple[str, ...]:
    """What `put_in_force` left out here in an earlier run, as SourceConfiguration says it."""
    names = [each.partition(" (")[0] for each in _left_out(data / MAIN)]
    return (*names, *(f"{name}: {each}" for name in _RULES for each in _left_out(data / name)))


def _left_out(path: Path) -> list[str]:
    lines = _text(path).split("\n") if path.exists() else []
    return [line.removeprefix(LEFT_OUT) for line in lines if line.startswith(LEFT_OUT)]


def put_in_force(
    data: Path,
    configuration: SourceConfiguration,
    archiving: Mapping[str, str],
    postgres: str,
    *,
    owner: Identity | None,
) -> None:
    """Write the files, have PostgreSQL read them, and give them their names, the main one last.

    May be run again until it is done. Raises ToolError when PostgreSQL refuses them; then ours are in force.
    """
    auto = "\n".join([HEADER, *(setting_line(name, value) for name, value in archiving.items())]) + "\n"
    texts = {name: render_rules(rules) for name, rules in configuration.rules.items()}
    texts |= {_AUTO: auto, MAIN: render(configuration.decisions, configuration.notes)}
    for name, text in texts.items():
        write_owned(data / f"{name}.new", text.encode("utf-8", "surrogateescape"), owner)
    _check(postgres, data, owner)
    for name in texts:
        os.replace(data / f"{name}.new", data / name)
    sync_names(data)


def check_argv(postgres: str, data: Path) -> tuple[str, ...]:
    """The command that reads a configuration, says a setting of it, and starts nothing."""
    return (postgres, "-D", str(data), "-c", f"config_file={data / MAIN}.new", "-C", "port")


def _check(postgres: str, data: Path, owner: Identity | None) -> None:
    command = Command(check_argv(postgres, data), {"LC_ALL": "C"}, identity=owner, cwd="/")
    try:
        process.run(command, timeout_s=_TIMEOUT_S)
    except ToolError as error:
        raise ToolError(
            f"PostgreSQL does not take the configuration that {data} would have",
            detail=error.detail,
            hint="Correct what it names in the file of the source, below that directory, and run this again.",
        ) from error


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="surrogateescape")
