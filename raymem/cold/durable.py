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
        self._seen: dict[Path, set[str]] = {}

    def sync(self) -> None:
        """Sync new files, then the folders that name them.

        Raises:
            OSError: a file could not be made durable.
        """
        first = not self._seen
        folders = [self._folder, *(Path(entry.path) for entry in os.scandir(self._folder) if entry.is_dir())]
        for folder in reversed(folders):
            self._sync_folder(folder)
        if first:
            fsync(self._folder.parent)
        self._seen = {folder: self._seen[folder] for folder in folders}

    def _sync_folder(self, folder: Path) -> None:
        with os.scandir(folder) as entries:
            present = {entry.name: entry.is_file() for entry in entries}
        new = present.keys() - self._seen.get(folder, set())
        for name in new:
            if present[name]:
                fsync(folder / name)
        if new:
            fsync(folder)
        # only now: what failed must be tried again
        self._seen[folder] = set(present)


def fsync(path: Path) -> None:
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
