"""Making a commit survive power loss: LanceDB never calls fsync, so a folder's new files are synced here."""

from __future__ import annotations

import os
from pathlib import Path


class FolderSync:
    """Syncs what appeared in one table's folder since the last call; the first call syncs everything.

    The first call can't leave anything out: another process may have died between its commit and its sync.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[str, set[str]] = {}

    def sync(self) -> None:
        """Sync new files, then the folders that name them.

        Raises:
            OSError: a file could not be made durable.
        """
        folders = [self._folder, *(Path(entry.path) for entry in os.scandir(self._folder) if entry.is_dir())]
        changed = [folder for folder in folders if self._sync_files(folder)]
        for folder in changed:
            _fsync(folder)
        if len(self._seen) != len(folders) or self._folder in changed:
            _fsync(self._folder.parent)
        self._seen = {str(folder): self._seen.get(str(folder), set()) for folder in folders}

    def _sync_files(self, folder: Path) -> bool:
        with os.scandir(folder) as entries:
            present = {entry.name for entry in entries}
        new = present - self._seen.get(str(folder), set())
        for name in new:
            _fsync(folder / name)
        # only now: a failed sync must be tried again
        self._seen[str(folder)] = present
        return bool(new)


def _fsync(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        # a commit's temporary file, or one that a clean-up dropped
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
