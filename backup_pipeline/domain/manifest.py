"""Manifests, verdicts and leases as JSON, both ways. The form itself is in domain/sealed.py.

A record is believed only under its own key: a copy of another backup's manifest, or a manifest that
points at objects outside of its backup's prefix, is unreadable here. storage/ writes and reads
them; nobody else should parse these objects.
"""

import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

from backup_pipeline.domain.backup import (
    BackupId,
    DatabaseProperties,
    Lease,
    Manifest,
    ObjectDigest,
    ObjectRole,
    Proof,
    ProofRecord,
    Source,
    Verdict,
    is_subject_name,
)
from backup_pipeline.domain.layout import (
    COPY_NAMES,
    Beside,
    data_prefix,
    parse_base_key,
    parse_catalog_key,
    parse_data_key,
    parse_lease_key,
)
from backup_pipeline.domain.sealed import Fields, Unreadable, corrupt, moment_text, open_sealed, seal
from backup_pipeline.errors import ConfigError

MANIFEST_KIND = "backup-pipeline manifest"
VERDICT_KIND = "backup-pipeline verdict"
LEASE_KIND = "backup-pipeline lease"

MAX_RECORD_BYTES = 64 * 1024 * 1024
"""No record is longer; a longer object is not read at all."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_BY_HAND = {
    "custom": "Without backup-pipeline: get the objects, compare each with sha256sum, create the roles "
    "from the globals, createdb -T template0 NEW, PGOPTIONS='-c lc_monetary=C' pg_restore --exit-on-error "
    "-d NEW THE-DUMP.",
    "directory": "Without backup-pipeline: get the objects under their names into a folder, compare each "
    "with sha256sum, create the roles from the globals, createdb -T template0 NEW, "
    "PGOPTIONS='-c lc_monetary=C' pg_restore --exit-on-error -d NEW dump/.",
}

Record = TypeVar("Record")


def manifest_to_json(manifest: Manifest) -> bytes:
    """The manifest for people and for manifest_from_json. Equal manifests make equal bytes."""
    about = _BY_HAND.get(manifest.format, "Compare each object with sha256sum before it is used.")
    return seal(
        MANIFEST_KIND,
        {
            "about": f"One finished backup. {about}",
            "id": str(manifest.id),
            "tier": manifest.tier,
            "engine": manifest.engine,
            "scheduled_for": manifest.scheduled_for and moment_text(manifest.scheduled_for),
            "started_at": moment_text(manifest.started_at),
            "snapshot_at": moment_text(manifest.snapshot_at),
            "finished_at": moment_text(manifest.finished_at),
            "expires_at": manifest.expires_at and moment_text(manifest.expires_at),
            "copied_from": manifest.copied_from and str(manifest.copied_from),
            "format": manifest.format,
            "compression": manifest.compression,
            "jobs": manifest.jobs,
            "software": manifest.software,
            "objects": [digest_values(item) for item in manifest.objects],
            "source": _source_values(manifest.source),
        },
    )


def manifest_from_json(data: bytes, key: str) -> Manifest:
    """The manifest that lies at `key`, in the catalog or beside the objects. Raises Corrupt."""
    return _reading("manifest", key, lambda: _manifest(open_sealed(data, MANIFEST_KIND), key))


def verdict_to_json(backup: BackupId, record: ProofRecord) -> bytes:
    """The verdict's file: the proof that stands, and the newest when it is another."""
    return seal(
        VERDICT_KIND,
        {
            "id": str(backup),
            "standing": _proof_values(record.standing),
            "latest": record.latest and _proof_values(record.latest),
        },
    )


def verdict_from_json(data: bytes, key: str) -> ProofRecord:
    """The proofs recorded at `key`, in the catalog or beside the objects. Raises Corrupt."""

    def read() -> ProofRecord:
        fields = open_sealed(data, VERDICT_KIND)
        _agree(id_from(fields, "id"), _owner(key, Beside.VERDICT)[0])
        latest = fields.optional_section("latest")
        return ProofRecord(_proof(fields.section("standing")), _proof(latest) if latest else None)

    return _reading("verdict", key, read)


def lease_to_json(lease: Lease) -> bytes:
    """The lease's file."""
    return seal(
        LEASE_KIND,
        {
            "id": str(lease.id),
            "token": lease.token,
            "purpose": lease.purpose,
            "until": moment_text(lease.until),
        },
    )


def lease_from_json(data: bytes, key: str) -> Lease:
    """The lease that lies at `key`. Raises Corrupt."""

    def read() -> Lease:
        fields = open_sealed(data, LEASE_KIND)
        lease = Lease(
            id_from(fields, "id"), fields.text("token"), fields.text("purpose"), fields.moment("until")
        )
        if parse_lease_key(key) != (lease.id, lease.token):
            raise Unreadable(f"it is the lease {lease.token} of {lease.id}, under another's key")
        return lease

    return _reading("lease", key, read)


def _reading(what: str, key: str, read: Callable[[], Record]) -> Record:
    try:
        return read()
    except Unreadable as error:
        raise corrupt(what, key, error) from error


def _manifest(fields: Fields, key: str) -> Manifest:
    manifest = Manifest(
        id=id_from(fields, "id"),
        tier=fields.text("tier"),
        scheduled_for=fields.optional_moment("scheduled_for"),
        started_at=fields.moment("started_at"),
        snapshot_at=fields.moment("snapshot_at"),
        finished_at=fields.moment("finished_at"),
        expires_at=fields.optional_moment("expires_at"),
        format=fields.text("format"),
        compression=fields.text("compression"),
        jobs=fields.integer("jobs", minimum=1),
        objects=tuple(digest_from(item) for item in fields.sections("objects")),
        source=_source(fields.section("source")),
        software=fields.text("software"),
        copied_from=None if fields.optional_text("copied_from") is None else id_from(fields, "copied_from"),
        engine=fields.text("engine"),
    )
    owner, tier = _owner(key, Beside.MANIFEST)
    _agree(manifest.id, owner)
    if not is_subject_name(manifest.tier) or (tier and tier != manifest.tier):
        raise Unreadable(f"its tier {manifest.tier!r} does not agree with its key")
    if abs(manifest.snapshot_at - manifest.id.taken_at) >= timedelta(seconds=1):
        raise Unreadable(
            f"its snapshot of {moment_text(manifest.snapshot_at)} is not that of its id {manifest.id}"
        )
    if manifest.copied_from and manifest.copied_from.database != manifest.id.database:
        raise Unreadable(f"it is a copy of another database's backup {manifest.copied_from}")
    check_digests(manifest.objects, data_prefix(manifest.id, manifest.tier))
    if not manifest.of_role(ObjectRole.DUMP):
        raise Unreadable("it has no object that is the dump")
    return manifest


def check_digests(objects: Sequence[ObjectDigest], prefix: str) -> None:
    """Each object is our own: below its backup's prefix, with a name that stays in its folder.

    Raises Unreadable.
    """
    for item in objects:
        below = item.key.removeprefix(prefix)
        if not item.key.startswith(prefix) or not _is_inside(below) or below in COPY_NAMES.values():
            raise Unreadable(f"its object {item.key!r} does not lie below {prefix}")
        if not _is_inside(item.name):
            raise Unreadable(
                f"its object {item.key!r} would be laid out as {item.name!r}, outside of its folder"
            )
        if _SHA256.fullmatch(item.sha256) is None:
            raise Unreadable(f"the sha256 of {item.key!r} is not 64 hexadecimal digits")
    for what, values in (
        ("key", [item.key for item in objects]),
        ("name", [item.name for item in objects]),
    ):
        if len(set(values)) != len(values):
            raise Unreadable(f"two of its objects have the same {what}")


def _is_inside(path: str) -> bool:
    plain = path.isprintable() and "\\" not in path
    return plain and all(part not in ("", ".", "..") for part in path.split("/"))


def _owner(key: str, beside: Beside) -> tuple[BackupId, str]:
    """Whose record a key is for, and the tier where the key says it."""
    in_catalog = parse_catalog_key(key)
    if in_catalog and in_catalog[1] is beside:
        return in_catalog[0], ""
    copy = parse_data_key(key)
    if copy and copy[2] == COPY_NAMES[beside]:
        return copy[0], copy[1]
    of_base = parse_base_key(key)
    if of_base and of_base[1] == COPY_NAMES[beside] and beside is Beside.VERDICT:
        return of_base[0], ""
    raise Unreadable("its key is not one that we give")


def _agree(found: BackupId, owner: BackupId) -> None:
    if found != owner:
        raise Unreadable(f"it is that of {found}, under another backup's key")


def id_from(fields: Fields, name: str) -> BackupId:
    """The backup id in a field. Raises Unreadable."""
    text = fields.text(name)
    try:
        return BackupId.parse(text)
    except ConfigError:
        raise Unreadable(f"{name} is not a backup id: {text!r}") from None


def digest_values(item: ObjectDigest) -> dict[str, object]:
    """One stored object, as it stands in a record."""
    return {
        "key": item.key,
        "name": item.name,
        "role": item.role.value,
        "size_bytes": item.size_bytes,
        "sha256": item.sha256,
    }


def digest_from(fields: Fields) -> ObjectDigest:
    """One stored object of a record; `check_digests` looks at them together. Raises Unreadable."""
    role = fields.text("role")
    if role not in list(ObjectRole):
        raise Unreadable(f"the role {role!r} of an object is not known here")
    return ObjectDigest(
        fields.text("key"),
        fields.text("name"),
        ObjectRole(role),
        fields.integer("size_bytes"),
        fields.text("sha256"),
    )


def _source_values(source: Source) -> dict[str, object]:
    return {
        "server_version": source.server_version,
        "server_version_text": source.server_version_text,
        "client_version": source.client_version,
        "client_path": source.client_path,
        "system_identifier": source.system_identifier,
        "size_bytes": source.size_bytes,
        "roles": list(source.roles),
        "extensions": [{"name": name, "version": version} for name, version in source.extensions],
        "tablespaces": list(source.tablespaces),
        "notes": list(source.notes),
        "database": _properties_values(source.database),
    }


def _source(fields: Fields) -> Source:
    return Source(
        server_version=fields.integer("server_version"),
        server_version_text=fields.text("server_version_text"),
        client_version=fields.integer("client_version"),
        client_path=fields.text("client_path"),
        system_identifier=fields.text("system_identifier"),
        database=_properties(fields.section("database")),
        size_bytes=fields.integer("size_bytes"),
        roles=fields.texts("roles"),
        extensions=tuple((item.text("name"), item.text("version")) for item in fields.sections("extensions")),
        tablespaces=fields.texts("tablespaces"),
        notes=fields.texts("notes"),
    )


def _properties_values(database: DatabaseProperties) -> dict[str, object]:
    return {
        "name": database.name,
        "owner": database.owner,
        "encoding": database.encoding,
        "collate": database.collate,
        "ctype": database.ctype,
        "locale_provider": database.locale_provider,
        "locale": database.locale,
        "icu_rules": database.icu_rules,
        "tablespace": database.tablespace,
        "connection_limit": database.connection_limit,
        "allow_connections": database.allow_connections,
        "is_template": database.is_template,
        "comment": database.comment,
        "settings": [{"role": role, "setting": setting} for role, setting in database.settings],
        "grants": database.grants
        and [
            {"grantor": grantor, "grantee": grantee, "privilege": privilege, "grantable": grantable}
            for grantor, grantee, privilege, grantable in database.grants
        ],
    }


def _properties(fields: Fields) -> DatabaseProperties:
    grants = fields.optional_sections("grants")
    return DatabaseProperties(
        name=fields.text("name"),
        owner=fields.text("owner"),
        encoding=fields.text("encoding"),
        collate=fields.text("collate"),
        ctype=fields.text("ctype"),
        locale_provider=fields.text("locale_provider"),
        locale=fields.text("locale"),
        icu_rules=fields.text("icu_rules"),
        tablespace=fields.text("tablespace"),
        connection_limit=fields.integer("connection_limit", minimum=-2),
        allow_connections=fields.flag("allow_connections"),
        is_template=fields.flag("is_template"),
        comment=fields.optional_text("comment"),
        settings=tuple((item.text("role"), item.text("setting")) for item in fields.sections("settings")),
        grants=None
        if grants is None
        else tuple(
            (item.text("grantor"), item.text("grantee"), item.text("privilege"), item.flag("grantable"))
            for item in grants
        ),
    )


def _proof_values(proof: Proof) -> dict[str, object]:
    return {
        "verdict": proof.verdict.value,
        "at": moment_text(proof.at),
        "restore_s": proof.restore_s,
        "compare_s": proof.compare_s,
        "checked": list(proof.checked),
        "differences": list(proof.differences),
        "notes": list(proof.notes),
        "by": proof.by,
    }


def _proof(fields: Fields) -> Proof:
    verdict = fields.text("verdict")
    if verdict not in list(Verdict):
        raise Unreadable(f"the verdict {verdict!r} is not known here")
    return Proof(
        verdict=Verdict(verdict),
        at=fields.moment("at"),
        restore_s=fields.seconds("restore_s"),
        compare_s=fields.seconds("compare_s"),
        checked=fields.texts("checked"),
        differences=fields.texts("differences"),
        notes=fields.texts("notes"),
        by=fields.text("by"),
    )
