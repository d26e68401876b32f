"""Where a cluster is recovered before it has its names: beside them, so that naming it is a rename.

Called by recover.py. What a killed recovery left is collected by the next one in the same place.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from backup_pipeline.domain.base_backup import BaseManifest
from backup_pipeline.engines.postgres.scratch import RECOVERY, end_cluster
from backup_pipeline.engines.postgres.unpack import Places, plan_places
from backup_pipeline.errors import Refused
from backup_pipeline.process import Identity
from backup_pipeline.spool import private_folder
from backup_pipeline.storage.files import sync_names

_LINKS = "pg_tblspc"


@dataclass(frozen=True)
class Workplace:
    """A cluster's own folder, and the places within folders of ours that it is unpacked to."""

    folder: Path
    inside: Places
    final: Places
    owner: Identity | None
    folders: Mapping[Path, Path]  # by what lies above a tablespace's name: ours on its file system

    def places_beside(self, number: int, link: BaseManifest) -> Places:
        """Where a link of a chain is unpacked: each part on the file system that it will be needed on."""
        name = f"link{number}"
        mapped = {
            oid: self.folders[place.parent] / f"{name}-{oid}"
            for oid, place in self.final.tablespaces.items()
            if place.parent in self.folders and any(oid == item.oid for item in link.tablespaces)
        }
        return plan_places(self.folder.parent / name, link.tablespaces, mapped)

    def take_names(self) -> None:
        """Give everything its name, durably, the data directory last. The server has ended.

        Raises Refused when a name was taken meanwhile; then nothing is left under any.
        """
        named: list[Path] = []
        try:
            for oid, place in self.final.tablespaces.items():
                if not place.parent.exists():
                    place.parent.mkdir(mode=0o700)
                    self._give(place.parent)
                self.inside.tablespaces[oid].rename(place)
                named.append(place)
                link = self.inside.data / _LINKS / str(oid)
                link.unlink()
                link.symlink_to(place)
                if self.owner is not None:
                    os.lchown(link, self.owner.uid, self.owner.gid)
            sync_names(self.inside.data / _LINKS)
            self.inside.data.rename(self.final.data)
            for parent in {place.parent for place in self.final.all}:
                sync_names(parent)
        except BaseException as error:
            for place in named:
                shutil.rmtree(place, ignore_errors=True)
            if isinstance(error, OSError):
                raise Refused(
                    f"the recovered cluster cannot take its place at {self.final.data}: {error.strerror}",
                    hint="Something came into being there meanwhile: name another directory.",
                ) from error
            raise

    def _give(self, path: Path) -> None:
        if self.owner is not None:
            os.chown(path, self.owner.uid, self.owner.gid)


@contextlib.contextmanager
def workplace(manifest: BaseManifest, final: Places, *, owner: Identity | None) -> Iterator[Workplace]:
    """Folders on the file systems of the names that are wanted, gone when the block is left."""
    with contextlib.ExitStack() as stack:

        def beside(parent: Path) -> Path:
            return stack.enter_context(
                private_folder(RECOVERY, parent=parent, mode=0o711, ending=end_cluster)
            )

        own = beside(final.data.parent)
        there = {place.parent for place in final.tablespaces.values() if place.parent.exists()}
        folders = {parent: beside(parent) for parent in sorted(there)}
        mapped = {
            oid: folders.get(place.parent, own / "tablespaces") / str(oid)
            for oid, place in final.tablespaces.items()
        }
        (own / "cluster").mkdir(mode=0o700)
        inside = plan_places(own / "cluster" / "data", manifest.tablespaces, mapped)
        yield Workplace(own / "cluster", inside, final, owner, folders)
