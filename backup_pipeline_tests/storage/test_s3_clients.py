"""One set of credentials, one endpoint and one region for both clients, and imports that cost little."""

import datetime
import ipaddress
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from backup_pipeline import process
from backup_pipeline.config import Secret, StoreConfig
from backup_pipeline.errors import ConfigError, StoreError
from backup_pipeline.storage.s3_clients import S3Clients
from backup_pipeline.storage.store import Store, open_store, read_all
from backup_pipeline_tests.servers.s3 import S3Server, rclone_s3
from backup_pipeline_tests.storage import peers
from backup_pipeline_tests.storage.peers import Answer


@pytest.fixture(autouse=True)
def no_credentials_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


def works(store: Store) -> None:
    """Whether bytes and control both get through."""
    store.put("k", [b"x"])
    assert read_all(store, "k") == b"x"
    assert [found.key for found in store.list("")] == ["k"]
    assert store.delete(["k"]) == {}


def keyless(server: S3Server, prefix: str) -> StoreConfig:
    return replace(server.store(prefix), access_key_id=None, secret_access_key=None)


# Credentials


def test_keys_from_the_environment(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", moto.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", moto.secret_access_key)
    works(open_store(keyless(moto, "environment")))


def test_keys_from_a_profile(moto: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text(
        f"[backup]\naws_access_key_id={moto.access_key_id}\naws_secret_access_key={moto.secret_access_key}\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "backup")
    works(open_store(keyless(moto, "profile")))


def test_keys_that_a_role_hands_out(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container or a virtual machine has them: a session's keys, with a token, for an hour."""
    handed_out = moto.assume_role("backup-role")

    with peers.answering(lambda _: Answer(200, json.dumps(handed_out, default=str).encode())) as address:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", address)
        works(open_store(keyless(moto, "role")))


def test_configured_keys_come_first(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another-access-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret-key")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "another-token")
    works(open_store(moto.store("configured")))


def test_no_credentials_at_all(moto: S3Server) -> None:
    store = open_store(keyless(moto, "none"))
    for verb in (lambda: store.put("k", [b"x"]), lambda: list(store.list(""))):
        with pytest.raises(StoreError, match="no credentials were found") as caught:
            verb()
        assert "boto3" in caught.value.hint


def test_a_profile_that_does_not_exist(moto: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    store = open_store(keyless(moto, "none"))
    for verb in (lambda: store.put("k", [b"x"]), lambda: list(store.list(""))):
        with pytest.raises(StoreError, match="nobody"):
            verb()


# Endpoint


def test_nothing_in_the_environment_sends_backups_elsewhere(
    moto: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = peers.refusing()
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"):
        monkeypatch.setenv(name, elsewhere)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    monkeypatch.setenv("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true")
    monkeypatch.setenv("AWS_BUCKET", "another")
    monkeypatch.setenv("AWS_REGION", "eu-west-3")
    works(open_store(moto.store("pinned")))


def test_an_endpoint_from_the_environment_serves_both_clients(
    moto: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto.endpoint)
    works(open_store(replace(moto.store("from-environment"), endpoint="")))


def test_a_password_in_the_endpoint_is_not_shown() -> None:
    endpoint = peers.refusing().replace("//", "//someone:hidden-word@")
    store = open_store(replace(S3Server(endpoint, "access-key", "secret-key").store(), timeout_s=1.0))
    for verb in (lambda: store.put("k", [b"x"]), lambda: list(store.list(""))):
        with pytest.raises(StoreError) as caught:
            verb()
        assert "hidden-word" not in str(caught.value)


@pytest.mark.parametrize(
    ("region", "endpoint", "host", "digest"),
    [
        ("eu-central-1", "", "https://s3.eu-central-1.amazonaws.com", "SHA256"),
        ("cn-north-1", "", "https://s3.cn-north-1.amazonaws.com.cn", "SHA256"),
        ("", "", "https://s3.amazonaws.com", "SHA256"),
        ("", "https://s3.example.net", "https://s3.example.net", None),
    ],
)
def test_where_requests_go(region: str, endpoint: str, host: str, digest: str | None) -> None:
    """AWS alone is sent a digest with each part, which a bucket with a lock insists on."""
    key, secret = Secret("access-key"), Secret("secret-key")
    place = StoreConfig(
        "s3://bucket", region=region, endpoint=endpoint, access_key_id=key, secret_access_key=secret
    )
    clients = S3Clients(place, "bucket")
    told: Any = clients.bytes(1.0).config
    assert told["endpoint"] == told["endpoint_url_s3"] == clients.endpoint == host
    assert told["region"] == clients.control(1.0).meta.region_name == (region or "us-east-1")
    assert told.get("checksum_algorithm") == digest


# TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority's certificate, and a server's with its key."""
    folder = tmp_path_factory.mktemp("tls")
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Test authority")])
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Test server")])
    loopback = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    ca = certificate(ca_name, ca_name, ca_key, ca_key, x509.BasicConstraints(ca=True, path_length=None))
    (folder / "ca.crt").write_bytes(ca)
    (folder / "server.crt").write_bytes(certificate(name, ca_name, key, ca_key, loopback))
    form, kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "server.secret").write_bytes(key.private_bytes(form, kind, serialization.NoEncryption()))
    return folder


def certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    extension: x509.ExtensionType,
) -> bytes:
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(2099, 1, 1, tzinfo=datetime.UTC))
        .add_extension(extension, critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False
        )
        .sign(issuer_key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="module")
def tls_server(authority: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    folder = tmp_path_factory.mktemp("rclone-tls")
    with rclone_s3(folder, cert=authority / "server.crt", key=authority / "server.secret") as server:
        assert server.endpoint.startswith("https://")
        yield server


def test_an_authority_of_ones_own_is_trusted_when_named(
    tls_server: S3Server, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(authority / "ca.crt"))
    store = open_store(tls_server.store("tls"))
    works(store)
    store.put("large", (b"x" * 1_000_000 for _ in range(10)))
    store.copy("large", "copy")
    assert store.head("copy").size_bytes == 10_000_000


def test_a_certificate_that_nobody_vouches_for_is_refused(tls_server: S3Server) -> None:
    store = open_store(tls_server.store("tls", timeout_s=2))
    for verb in (lambda: store.put("k", [b"x"]), lambda: list(store.list(""))):
        with pytest.raises(StoreError, match="certificate is not trusted") as caught:
            verb()
        assert "AWS_CA_BUNDLE" in caught.value.hint


def test_an_authority_that_cannot_be_read_is_named(
    tls_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "nowhere.crt"))
    with pytest.raises(ConfigError, match=r"nowhere\.crt"):
        open_store(tls_server.store("tls")).put("k", [b"x"])


# Imports


def imported_by(program: str) -> set[str]:
    """Which of the costly packages a program has imported at its end."""
    program += "\nimport sys; print(*{'boto3', 'botocore', 'obstore', 'dagster'} & set(sys.modules))"
    command = process.Command((sys.executable, "-c", program), {"PYTHONPATH": ":".join(sys.path)})
    return set(process.run(command, timeout_s=60).stdout.split())


def test_the_protocol_costs_no_client(tmp_path: Path) -> None:
    assert imported_by("import backup_pipeline.storage.store, backup_pipeline.storage.directory") == set()


def test_bytes_with_keys_that_were_given_cost_no_boto3(rclone: S3Server) -> None:
    place = rclone.store("no-boto3")
    program = f"""
from backup_pipeline.config import Secret, StoreConfig
from backup_pipeline.errors import ObjectNotFound
from backup_pipeline.storage.store import open_store, read_all
key, secret = Secret({rclone.access_key_id!r}), Secret({rclone.secret_access_key!r})
place = StoreConfig({place.url!r}, endpoint={place.endpoint!r}, access_key_id=key, secret_access_key=secret)
store = open_store(place)
store.put("k", [b"x"])
store.put("large", (b"x" * 1000000 for _ in range(9)))
store.put_if_absent("l", b"x")
assert read_all(store, "k") == b"x"
try:
    store.head("absent")
except ObjectNotFound:
    pass
"""
    assert imported_by(program) == {"obstore"}
