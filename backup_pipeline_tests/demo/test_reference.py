"""The top-level backups.toml: what the demo runs, and the reference for every key."""

import re
import runpy
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from backup_pipeline import config_tables
from backup_pipeline.config import DEFAULT_TIERS, Config
from backup_pipeline.config_file import parse

PATH = Path(__file__).parents[2] / "backups.toml"
COMMENTED_KEY = re.compile(r"^#(?=[a-z_]+ = |\[)", re.MULTILINE)  # or the head of a table


def complete_text() -> str:
    """The file with every commented key taken in."""
    return COMMENTED_KEY.sub("", PATH.read_text(encoding="utf-8"))


def reference() -> dict[str, Any]:
    return tomllib.loads(complete_text())


MODELS: tuple[tuple[tuple[str, ...], type[BaseModel]], ...] = (
    ((), config_tables.FileTable),
    (("store",), config_tables.StoreTable),
    (("databases", "agentweave"), config_tables.DatabaseTable),
    (("databases", "agentweave", "tiers", "daily"), config_tables.TierTable),
    (("clusters", "main"), config_tables.ClusterTable),
    (("clusters", "main", "base_backup"), config_tables.BaseBackupTable),
    (("clusters", "main", "receive"), config_tables.ReceiveTable),
    (("scratch",), config_tables.ScratchTable),
)


@pytest.mark.parametrize(("where", "model"), MODELS)
def test_every_key_stands_in_the_reference(where: tuple[str, ...], model: type[BaseModel]) -> None:
    table = reference()
    for part in where:
        table = table[part]
    assert set(table) == set(model.model_fields)


def test_every_table_of_the_file_is_held_against_its_model() -> None:
    models = {value for value in vars(config_tables).values() if isinstance(value, type)}
    tables = {model.__name__ for model in models if issubclass(model, config_tables.Table)}
    one_of_a_key = {"FromEnv", "FromFile", "UpToTable"}
    same_as_a_database = {"DefaultsTable"}
    checked = {model.__name__ for _, model in MODELS}
    assert tables == {"Table"} | checked | one_of_a_key | same_as_a_database


def test_the_file_parses_as_it_is_and_with_every_key() -> None:
    as_it_is: Config = parse(PATH.read_text(encoding="utf-8"), PATH)
    complete: Config = parse(complete_text(), PATH)
    for config in (as_it_is, complete):
        assert list(config.databases) == ["agentweave"]
        assert config.databases["agentweave"].tiers == DEFAULT_TIERS


def test_commented_keys_show_the_default_unless_called_an_example() -> None:
    text = PATH.read_text(encoding="utf-8")
    shown = parse(COMMENTED_KEY.sub("", _without_examples(text)), PATH)
    assert shown == parse(text, PATH)


def test_the_pictures_have_their_cluster_in_the_place_of_the_demos() -> None:
    story = runpy.run_path(str(PATH.parent / "docs" / "cluster_story.py"))
    text = PATH.read_text(encoding="utf-8")
    demos, theirs = parse(text, PATH), parse(story["with_cluster"](text, "host=/pictures"), PATH)
    assert theirs.clusters["main"].dsn.reveal() == "host=/pictures"
    assert replace(theirs, clusters=demos.clusters) == demos


def _without_examples(text: str) -> str:
    """The text without the keys, or whole tables, that follow a comment that says "example"."""
    kept: list[str] = []
    comment, in_example = "", False
    for line in text.splitlines():
        head = line.lstrip("#").startswith("[")
        if COMMENTED_KEY.match(line) and ("xample" in comment or (in_example and not head)):
            in_example = in_example or head
            continue
        in_example = in_example and not head
        comment = comment + line if line.startswith("# ") else ""
        kept.append(line)
    return "\n".join(kept)
