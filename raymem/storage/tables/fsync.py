"""Making a commit survive power loss: LanceDB never calls fsync, so a folder's new files are synced here."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path

from raymem.logs import get_logger

_VERSIONS = "_versions"
# a manifest's last bytes
_END = b"LANC"
_MANIFEST, _MARK = ".manifest", ".synced"
log = get_logger("raymem.durable")


class FolderSync:
    """Syncs what appeared in one table's folder since the last call; the first call syncs everything.

    The first call can't leave anything out, unless `trust` says so: another process may have died between its commit
    and its sync. The newest version on disk has a mark beside it, made once all is synced that it needs: a torn one
    without it was never acknowledged, see `set_aside_torn`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[Path, set[str]] = {}
        self._marked: str | None = None
        self._trusted: str | None = None

    def trust(self) -> None:
        """Before a first call, take for synced what is there, if the newest version has a mark.

        Only for who stops all other writers with the next version: what they have under way must never count. If
        others committed one meanwhile, `sync` sees so and syncs everything.
        """
        newest = _newest(self._versions())
        if not self._seen and newest is not None and newest in _marks(self._folder):
            self._seen = {folder: set(_present(folder)) for folder in self._folders()}
            self._trusted = newest

    def sync(self) -> None:
        """Sync new files, then the folders that name them.

        Raises:
            OSError: a file could not be made durable.
        """
        if (trusted := self._trusted) is not None:
            self._trusted = None
            # names count down: these are newer
            if sum(name < trusted for name in self._versions()) > 1:
                self._seen = {}
        first = self._folder not in self._seen
        self._sync_folders(self._folders())
        if first:
            fsync(self._folder.parent)
        self._mark()

    def _versions(self) -> list[str]:
        versions = self._folder / _VERSIONS
        return _manifests(os.listdir(versions)) if versions.is_dir() else []

    def _folders(self) -> list[Path]:
        return [self._folder, *(Path(entry.path) for entry in os.scandir(self._folder) if entry.is_dir())]

    def _sync_folders(self, folders: list[Path]) -> None:
        for folder in reversed(folders):
            self._sync_folder(folder)
        self._seen = {folder: self._seen[folder] for folder in folders}

    def _mark(self) -> None:
        newest = _newest(self._seen.get(self._folder / _VERSIONS, set()))
        if newest is None or newest == self._marked:
            return
        (self._folder / f"{newest}{_MARK}").touch()
        fsync(self._folder)
        for older in _marks(self._folder):
            if older > newest:
                (self._folder / f"{older}{_MARK}").unlink(missing_ok=True)
        self._marked = newest

    def _sync_folder(self, folder: Path) -> None:
        present = _present(folder)
        new = present.keys() - self._seen.get(folder, set())
        # of a large table there are thousands, and a Path takes a third as long to make as its file to sync
        prefix = f"{folder}{os.sep}"
        for name in new:
            if present[name]:
                fsync(prefix + name)
        if new:
            fsync(folder)
        # only now: what failed must be tried again
        self._seen[folder] = set(present)


def _present(folder: Path) -> dict[str, bool]:
    """What a folder holds but marks, and whether it is a file."""
    with os.scandir(folder) as entries:
        return {entry.name: entry.is_file() for entry in entries if not entry.name.endswith(_MARK)}


def fsync(path: Path | str) -> None:
    """Sync one file or folder, if it is there."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        # a commit's temporary file, or one that a clean-up dropped
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def set_aside_torn(folder: Path) -> bool:
    """Make a table readable again whose newest commit a power loss cut short before its sync; say whether it did.

    LanceDB makes a version visible before anything of it is on disk, and can't open a table whose newest version is cut
    short. Without its mark that version was never acknowledged: the one before holds all that was. With a mark it was,
    and losing it silently is worse than an error.
    """
    versions = folder / _VERSIONS
    if not versions.is_dir():
        return False
    # while one process looks and renames, no other may put a sound version in the torn one's place
    handle = os.open(versions, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        newest = _newest(os.listdir(versions))
        if newest is None or any(mark <= newest for mark in _marks(folder)) or _is_whole(versions / newest):
            return False
        os.rename(versions / newest, folder / f"{newest}.torn")
        os.fsync(handle)
    finally:
        os.close(handle)
    log.error("a commit that a power loss cut short was set aside; it was never acknowledged", table=folder.name)
    return True


def _manifests(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.endswith(_MANIFEST)]


def _newest(names: Iterable[str]) -> str | None:
    # names count down, so that the newest comes first in a listing
    return min(_manifests(names), default=None)


def _marks(folder: Path) -> list[str]:
    return [name.removesuffix(_MARK) for name in os.listdir(folder) if name.endswith(_MARK)]


def _is_whole(path: Path) -> bool:
    return path.read_bytes().endswith(_END)
