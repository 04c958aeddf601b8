"""The folder that a cold store lies in, held open for as long as the store is.

LanceDB makes every folder that a path names and that isn't there. Through the path it would go on in an empty folder
under the old name once the store was renamed, removed or unmounted; through the open folder nothing can be made that
isn't in the store that was opened. What was opened also has an inode that no other folder can be given meanwhile.
"""

from __future__ import annotations

import fcntl
import os
import re
import weakref
from pathlib import Path

from raymem.errors import StorageError

_OPEN = "/proc/self/fd"
_NAMED = re.compile(rf"/?{_OPEN[1:]}/(\d+)")
_Id = tuple[int, int]


class Folder:
    """A folder as it was opened, and whether its path still leads there.

    Args:
        path: absolute.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._handles = [os.open(path, os.O_RDONLY | os.O_DIRECTORY)]
        self._pinned: dict[str, _Id] = {"": _id(os.fstat(self._handles[0]))}
        through = f"{_OPEN}/{self._handles[0]}"
        # where there is no /proc, what follows a check is not covered by it
        self.base = through if os.path.isdir(through) else path

    def pin(self, name: str) -> None:
        """Require that a folder inside stays the one that it is now."""
        self._handles.append(os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._handles[0]))
        self._pinned[name] = _id(os.fstat(self._handles[-1]))

    def close_with(self, user: object) -> None:
        """Close it once `user` is gone: a number that is given away must not be written to any more."""
        weakref.finalize(user, _close, self._handles).atexit = False

    def require(self) -> None:
        """Raise StorageError unless the path leads to the folder that was opened, and what was pinned is in it."""
        for name, id in self._pinned.items():
            where = os.path.join(self.path, name) if name else self.path
            try:
                found = _id(os.stat(where))
            except OSError as error:
                raise self._gone(f"{where} can't be found: {error.strerror}") from error
            if found != id:
                raise self._gone(f"{where} is another folder now")

    def _gone(self, why: str) -> StorageError:
        return StorageError(
            f"the cold store at {self.path} is not the one that was opened ({why}); nothing was acknowledged. it was "
            "renamed, removed, replaced or unmounted: put it back and try again, or connect to where it is now",
            reason=why,
        )


class Held:
    """A folder that is locked until it is let go, or its process and all that it forked have ended."""

    def __init__(self, path: Path) -> None:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._end = weakref.finalize(self, _let_go, handle, os.getpid())
        self._end.atexit = False

    def let_go(self) -> None:
        """Unlock it, also for children that have the handle."""
        self._end()


def is_held(path: Path) -> bool:
    """Whether a folder is locked; one that isn't there is not."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def named(text: str) -> str:
    """A text with the folder's present path where it has the handle's."""

    def path(found: re.Match[str]) -> str:
        try:
            return os.readlink(f"{_OPEN}/{found[1]}")
        except OSError:
            return found[0]

    return _NAMED.sub(path, text)


def _id(found: os.stat_result) -> _Id:
    return found.st_dev, found.st_ino


def _let_go(handle: int, pid: int) -> None:
    # the lock is the parent's, who goes on
    if pid == os.getpid():
        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def _close(handles: list[int]) -> None:
    for handle in handles:
        os.close(handle)
