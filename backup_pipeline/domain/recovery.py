"""Whether and how a backup can be restored. Pure: nothing here touches a server.

`plan_restore` holds a backup against facts about the target, which actions/restore.py gathered, and
gives either a plan to show or all reasons against it at once.
"""

from dataclasses import dataclass, field, replace
from datetime import datetime

from backup_pipeline.domain.backup import Backup, CatalogListing, Source, Verdict
from backup_pipeline.domain.choice import PROVEN, find
from backup_pipeline.domain.names import NAME_BYTES, cut_name
from backup_pipeline.domain.unfinished import is_temporary
from backup_pipeline.errors import Refused
from backup_pipeline.units import show_bytes, show_count, show_seconds

_PROTECTED = ("postgres", "template0", "template1")


@dataclass(frozen=True)
class RestoreRequest:
    """What the operator asked for; the defaults restore the newest proven backup into a new database."""

    backup: str = PROVEN  # an id, a stamp or the beginning of one, a time, "latest", "proven"
    into: str = ""  # the database to have in the end; "": a new name, or the live one with `replace`
    replace: bool = False  # the database may exist: then it is swapped for the restored one
    confirm: str = ""  # its name once more, typed, when it is to be replaced
    accept_failed: bool = False  # restore even what failed its proof
    create_roles: bool = False  # create those that are missing
    without_owners: bool = False  # leave out owners, grants and settings of roles, which may be missing


@dataclass(frozen=True)
class TargetFacts:
    """What was found where the backup is to be restored."""

    server: str  # as it is shown: no secret
    server_version: int  # server_version_num
    server_version_text: str
    client_version: int  # of pg_restore
    client_version_text: str
    databases: tuple[str, ...]
    live: str = ""  # the database that is replaced, and after which a new one is named; "": the backup's
    missing_roles: tuple[str, ...] = ()  # that the backup needs and the server lacks
    undescribed_roles: tuple[str, ...] = ()  # of those, what the backup's globals do not have either
    missing_extensions: tuple[str, ...] = ()
    missing_tablespaces: tuple[str, ...] = ()
    need_bytes: int | None = None  # None: not known, as with the next
    free_bytes: int | None = None
    sessions: int = 0  # in the database that would be replaced
    may_create: bool = True  # whether the role may create databases
    problems: tuple[tuple[str, str], ...] = ()  # (problem, fix) found by the one who asked
    notes: tuple[str, ...] = ()  # what is worth knowing, and no reason to refuse


@dataclass(frozen=True)
class RestorePlan:
    """What a restore will do, in `lines` to show; `warnings` are what it will not bring."""

    backup: Backup
    target: str  # the database that holds the backup in the end
    kept_name: str  # how the replaced database is called afterwards, to be shown; "" when none is replaced
    without_owners: bool
    without_tablespaces: bool
    left_out: tuple[str, ...]  # what the copy lacks, in sentences for the plan and for the result
    warnings: tuple[str, ...]
    lines: tuple[str, ...]


@dataclass
class _Findings:
    """What speaks against a restore, and what the operator should know."""

    against: list[tuple[str, str]] = field(default_factory=list)  # (problem, fix)
    warnings: list[str] = field(default_factory=list)

    def refuse(self, problem: str, fix: str) -> None:
        self.against.append((problem, fix))


def plan_restore(
    listing: CatalogListing, request: RestoreRequest, facts: TargetFacts, *, now: datetime
) -> RestorePlan:
    """The plan for a restore. `listing` holds the backups of the database in question.

    Raises BackupNotFound, or Refused with every reason and the fix for each.
    """
    backup = find(listing, request.backup)
    manifest = backup.manifest
    live = facts.live or (manifest.source.database.name if manifest else backup.id.database)
    target = request.into or (live if request.replace else _new_name(live, backup, facts.databases))
    replaces = target in facts.databases and request.replace
    found = _Findings(list(facts.problems))
    _check_verdict(backup, request, found)
    _check_target(target, request, facts, found)
    if manifest and manifest.engine != "postgresql":
        found.refuse(f"{backup.id} is a backup of {manifest.engine}, not of PostgreSQL", "Choose another.")
    elif manifest:
        _check_versions(manifest.source, facts, found)
    _check_roles(request, facts, found)
    _check_contents(facts, found)
    _check_space(facts, found)
    if found.against:
        raise _refusal(backup, target, found.against)
    if manifest:
        found.warnings += manifest.source.notes
    plan = RestorePlan(
        backup=backup,
        target=target,
        kept_name=f"{target}_before_<time>" if replaces else "",
        without_owners=request.without_owners or manifest is None,
        without_tablespaces=bool(facts.missing_tablespaces),
        left_out=_left_out(backup, request, target if replaces else ""),
        warnings=tuple(found.warnings),
        lines=(),
    )
    return replace(plan, lines=_lines(plan, facts, now))


def _check_verdict(backup: Backup, request: RestoreRequest, found: _Findings) -> None:
    if backup.verdict is Verdict.FAILED:
        differences = "; ".join(backup.proof.differences[:3]) if backup.proof else ""
        problem = f"the proof of {backup.id} failed" + (f": {differences}" if differences else "")
        if request.accept_failed:
            found.warnings.append(problem)
        else:
            found.refuse(problem, "Choose another backup, or accept a failed one if it is the last resort.")
    elif backup.unreadable_verdict:
        found.warnings.append(f"the verdict of {backup.id} cannot be read: {backup.unreadable_verdict}")
    elif backup.verdict is not Verdict.PROVEN:
        found.warnings.append(
            f"{backup.id} is {backup.verdict}: its contents were never compared with the source"
        )


def _check_target(target: str, request: RestoreRequest, facts: TargetFacts, found: _Findings) -> None:
    size_bytes = len(target.encode("utf-8", "replace"))
    if size_bytes > NAME_BYTES:
        problem = f"the name {target} has {size_bytes} bytes, PostgreSQL takes {NAME_BYTES}"
        found.refuse(problem, "Choose a shorter name.")
    if "\0" in target or target in _PROTECTED:
        found.refuse(f"{target!r} cannot be restored into", "Choose another name.")
    if is_temporary(target):
        found.refuse(f"{target} is what an unfinished database is called", "Choose another name.")
    if not facts.may_create:
        found.refuse(
            f"the role may not create databases on {facts.server}",
            "Grant it CREATEDB: ALTER ROLE … CREATEDB.",
        )
    if target not in facts.databases:
        return
    if not request.replace:
        found.refuse(
            f"{target} exists on {facts.server}",
            "Choose a name that is free, or ask for it to be replaced and type its name to confirm.",
        )
    elif request.confirm != target:
        typed = f"found {request.confirm!r}" if request.confirm else "nothing was typed"
        found.refuse(f"replacing {target} is not confirmed: {typed}", f"Type {target} to confirm.")


def _check_versions(source: Source, facts: TargetFacts, found: _Findings) -> None:
    if facts.server_version // 10000 < source.server_version // 10000:
        found.refuse(
            f"the dump is of PostgreSQL {source.server_version_text}, the target {facts.server_version_text}",
            f"Restore into PostgreSQL {source.server_version // 10000} or newer.",
        )
    if facts.client_version // 10000 < source.client_version // 10000:
        found.refuse(
            f"pg_dump {_major(source.client_version)} wrote it, pg_restore is {facts.client_version_text}",
            f"Use the client tools of PostgreSQL {_major(source.client_version)} or newer.",
        )


def _check_roles(request: RestoreRequest, facts: TargetFacts, found: _Findings) -> None:
    roles = ", ".join(facts.missing_roles)
    if not roles:
        return
    if request.create_roles:
        known = [role for role in facts.missing_roles if role not in facts.undescribed_roles]
        if known:
            found.warnings.append(f"these roles are created: {', '.join(known)}")
        if facts.undescribed_roles and not request.without_owners:
            unknown = ", ".join(facts.undescribed_roles)
            found.refuse(
                f"roles are missing on {facts.server} that the backup's globals do not have: {unknown}",
                "Create them there, or leave out owners and grants (--without-owners).",
            )
    elif request.without_owners:
        found.warnings.append(f"these roles are missing: {roles}")
    else:
        found.refuse(
            f"roles are missing on {facts.server}: {roles}",
            "Have them created (--create-roles), or create them from the backup's globals.",
        )


def _check_contents(facts: TargetFacts, found: _Findings) -> None:
    if facts.missing_extensions:
        found.refuse(
            f"extensions are not installed on {facts.server}: {', '.join(facts.missing_extensions)}",
            "Install their packages there.",
        )
    if facts.missing_tablespaces:
        missing = ", ".join(facts.missing_tablespaces)
        found.warnings.append(f"all goes to the default tablespace; missing here: {missing}")
    found.warnings += facts.notes


def _check_space(facts: TargetFacts, found: _Findings) -> None:
    needed, free = facts.need_bytes, facts.free_bytes
    if needed is not None and free is not None and free < needed:
        found.refuse(
            f"{show_bytes(needed)} are needed on {facts.server}, {show_bytes(free)} are free",
            "Make room there, or restore elsewhere.",
        )


def _left_out(backup: Backup, request: RestoreRequest, replaced: str) -> tuple[str, ...]:
    if backup.manifest is None:
        said = "a dump of an older layout: without owners and grants, all belongs to the role that restores"
        if not replaced:
            return (said,)
        lost = f"owner, grants, settings, comment and connection limit of {replaced} are not carried over"
        return said, f"{lost}: give them to the new database again"
    if request.without_owners:
        return (
            "owners, grants and settings of single roles are left out: all belongs to the role that restores",
        )
    return ()


def _refusal(backup: Backup, target: str, against: list[tuple[str, str]]) -> Refused:
    if len(against) == 1:
        return Refused(f"{backup.id} is not restored into {target}: {against[0][0]}", hint=against[0][1])
    return Refused(
        f"{backup.id} is not restored into {target}, for {len(against)} reasons",
        detail={f"reason {number}": problem for number, (problem, _) in enumerate(against, 1)},
        hint=" ".join(f"({number}) {fix}" for number, (_, fix) in enumerate(against, 1)),
    )


def _lines(plan: RestorePlan, facts: TargetFacts, now: datetime) -> tuple[str, ...]:
    backup, proof = plan.backup, plan.backup.proof
    age = show_seconds(max(0.0, (now - backup.taken_at).total_seconds()))
    verdict = (
        f"{proof.verdict} at {proof.at:%Y-%m-%dT%H:%M:%SZ} by {proof.by}" if proof else str(Verdict.NONE)
    )
    needed = facts.need_bytes
    free = (
        "free space is not known" if facts.free_bytes is None else f"{show_bytes(facts.free_bytes)} are free"
    )
    lines = [
        f"backup: {backup.id}, {backup.tier}, {show_bytes(backup.size_bytes)}, taken {age} ago",
        f"verdict: {verdict}",
    ]
    if backup.manifest:
        source = backup.manifest.source
        lines.append(f"from: {source.database.name} on PostgreSQL {source.server_version_text}")
    else:
        lines.append(f"from: {backup.imported_key}, a dump of an older layout")
    lines.append(f"into: a new database on {facts.server} ({facts.server_version_text})")
    if plan.kept_name:
        lines.append(
            f"then: {plan.target} becomes {plan.kept_name}, which stays, and the new database becomes "
            f"{plan.target}; {show_count(facts.sessions, 'session')} to be ended"
        )
    else:
        lines.append(f"then: it is named {plan.target}; no database that exists is touched")
    lines.append(f"space: {show_bytes(needed) if needed is not None else 'an unknown amount'} needed, {free}")
    if proof and proof.restore_s:
        lines.append(f"time: {show_seconds(proof.restore_s)}, as its proof measured")
    return (*lines, *(f"note: {line}" for line in (*plan.left_out, *plan.warnings)))


def _new_name(live: str, backup: Backup, taken: tuple[str, ...]) -> str:
    """`live` with the backup's time, numbered where that is taken."""
    suffix, number = f"_restored_{backup.id.stamp[:16].lower()}", 1
    while True:
        end = suffix if number == 1 else f"{suffix}_{number}"
        name = cut_name(live, NAME_BYTES - len(end)) + end
        if name not in taken:
            return name
        number += 1


def _major(version: int) -> int:
    return version // 10000
