"""The bucket policies of docs/security.md, on a server that holds to policies: enough, and no more."""

import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from backup_pipeline.actions import prune
from backup_pipeline.config import DatabaseConfig, Secret, TierConfig
from backup_pipeline.domain.backup import Verdict
from backup_pipeline.domain.layout import INDEX, Beside, catalog_key
from backup_pipeline.errors import StoreError
from backup_pipeline.storage import catalog, leases
from backup_pipeline.storage.store import Store, open_store, read_all
from backup_pipeline_tests.domain.values import NOW, manifest, proof
from backup_pipeline_tests.servers.s3 import BUCKET, S3Server, moto_s3
from backup_pipeline_tests.storage.backups import put_backup, put_objects

DOCUMENT = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
POLICIES = dict(re.findall(r"^### (\w+)\n\n((?:    .*\n)+)", DOCUMENT, re.MULTILINE))
CONFIG = DatabaseConfig("app", Secret("postgresql:///app"), tiers=(TierConfig("daily", "0 2 * * *", 2),))
M = manifest(at=datetime(2026, 3, 8, 2, tzinfo=UTC))

StoreAs = Callable[[str], Store]
MayDelete = Callable[[str, str], bool]


def clock() -> datetime:
    return NOW


@pytest.fixture(scope="module")
def roles() -> Iterator[dict[str, S3Server]]:
    """The server as each role sees it; "" may do all."""
    with moto_s3(authorized=True) as server:
        iam, seen = server._client("iam"), {"": server}
        for name, policy in POLICIES.items():
            document = json.loads(policy.replace("agentweave-backups", BUCKET))
            if (
                "DeleteObject" in policy
            ):  # for a deletion in bulk this server asks for the bucket, AWS for each key
                bucket = {
                    "Effect": "Allow",
                    "Action": "s3:DeleteObject",
                    "Resource": f"arn:aws:s3:::{BUCKET}",
                }
                document["Statement"].append(bucket)
            iam.create_user(UserName=f"only-{name}")
            iam.put_user_policy(UserName=f"only-{name}", PolicyName=name, PolicyDocument=json.dumps(document))
            key = iam.create_access_key(UserName=f"only-{name}")["AccessKey"]
            seen[name] = server.with_keys(key["AccessKeyId"], key["SecretAccessKey"])
        yield seen


@pytest.fixture
def store_as(roles: dict[str, S3Server]) -> Iterator[StoreAs]:
    """Opens the store by the keys of a role; "" is who may do all. Three daily backups lie in it."""

    def open_as(name: str) -> Store:
        return open_store(roles[name].store("prod"))

    store = open_as("")
    for day in (1, 2, 3):
        put_backup(store, manifest(at=datetime(2026, 3, day, 2, tzinfo=UTC)))
    yield open_as
    store.delete([info.key for info in store.list("")])


@pytest.fixture
def may_delete(roles: dict[str, S3Server]) -> MayDelete:
    """Whether a role may delete one key; if so, it is gone."""

    def look(name: str, key: str) -> bool:
        client = roles[name].client()
        try:
            client.delete_object(Bucket=BUCKET, Key=f"prod/{key}")
        except client.exceptions.ClientError as error:
            return error.response["Error"]["Code"] != "AccessDenied"
        return True

    return look


def days(store: Store) -> list[int]:
    return sorted(backup.taken_at.day for backup in catalog.list_backups(store).backups)


def test_all_roles_are_tried() -> None:
    assert set(POLICIES) == {"backup", "proof", "prune", "restore"}


def test_a_backup_is_published_and_deletes_none(store_as: StoreAs, may_delete: MayDelete) -> None:
    store = store_as("backup")
    store.put("probe/preflight", [b"x"])
    assert not store.delete(["probe/preflight"])
    with leases.hold(store, M.id, "dump", clock=clock):
        put_objects(store, M)
        catalog.publish(store, M)
    assert days(store) == [1, 2, 3, 8]
    assert not list(store.list("leases/"))
    assert may_delete("backup", "probe/preflight")
    assert not may_delete("backup", catalog_key(M.id))
    assert not may_delete("backup", M.objects[0].key)


def test_a_proof_records_its_verdict_and_touches_no_backup(store_as: StoreAs, may_delete: MayDelete) -> None:
    store, backup = store_as("proof"), catalog.list_backups(store_as("")).backups[0]
    assert backup.manifest is not None
    with leases.hold(store, backup.id, "proof", clock=clock):
        read_all(store, backup.manifest.objects[0].key)
        catalog.record_proof(store, backup.id, proof())
    assert catalog.load(store, backup.id).verdict is Verdict.PROVEN
    for key in (backup.manifest.objects[0].key, catalog_key(backup.id), catalog_key(backup.id, Beside.PIN)):
        with pytest.raises(StoreError):
            store.put(key, [b"forged"])
    assert not may_delete("proof", catalog_key(backup.id, Beside.VERDICT))


def test_a_prune_deletes_and_writes_no_data(
    store_as: StoreAs, may_delete: MayDelete, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune, "INDEX_FROM", 1)
    store = store_as("prune")
    planned = prune.plan(store, CONFIG, now=NOW)
    done = prune.carry_out(store, planned, clock=clock, log=lambda _: None)
    assert not done.denied
    assert days(store) == [2, 3]
    assert INDEX in {info.key for info in store.list("")}
    assert may_delete("prune", manifest(at=datetime(2026, 3, 2, 2, tzinfo=UTC)).objects[0].key)
    with pytest.raises(StoreError):
        put_objects(store, M)


def test_a_restore_reads_and_is_told_that_nothing_shields_it(
    store_as: StoreAs, may_delete: MayDelete
) -> None:
    store = store_as("restore")
    backup = catalog.list_backups(store).backups[0]
    assert backup.manifest is not None
    with leases.hold(store, backup.id, "restore", clock=clock, required=False) as held:
        assert held.unshielded
        read_all(store, backup.manifest.objects[0].key)
    assert not may_delete("restore", catalog_key(backup.id))
    with pytest.raises(StoreError):
        store.put("probe/x", [b"x"])
