"""What lies under a store's tables: its folder, syncs that make commits survive, and errors as raymem's.

LanceDB makes every folder that a path names and that isn't there. Through the path it would go on in an empty folder
under the old name once the store was renamed, removed or unmounted; through the open folder nothing can be made that
isn't in the store that was opened. What was opened also has an inode that no other folder can be given meanwhile.
LanceDB never calls fsync, so a folder's new files are synced here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raymem.errors import Conflict, Corrupt, RaymemError, StorageError
from raymem.logs import get_logger

_OPEN = "/proc/self/fd"
_OPENED = re.compile(rf"/?{_OPEN[1:]}/(\d+)")
_VERSIONS = "_versions"
# a manifest's last bytes
_END = b"LANC"
_MANIFEST, _MARK = ".manifest", ".synced"
_CONFLICT = re.compile(r"Incompatible transaction|[Cc]ommit conflict|concurrent writers|preempted by")
_MISSING = re.compile(r"Not found|was not found|does not exist|No such file")
_UNREACHABLE = re.compile(r"Generic (S3|GCS|MicrosoftAzure|HTTP)|timed? ?out|error sending request|[Cc]onnection", re.I)
_OS_ERROR = re.compile(r"os error (\d+)")
_SOURCE_LINE = re.compile(r",? ?/(root|rustc|home|usr)/\S+\.rs(:\d+)*")
# what a path that a damaged file names leads to, beside nothing: a folder, a name too long
_MISSING_OS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ENAMETOOLONG}
log = get_logger("raymem.durable")


class Folder:
    """A store's folder as it was opened, and whether its path still leads there.

    Args:
        path: absolute.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._handles = [os.open(path, os.O_RDONLY | os.O_DIRECTORY)]
        self._pinned = {"": os.fstat(self._handles[0])}
        through = f"{_OPEN}/{self._handles[0]}"
        # where there is no /proc, what follows a check is not covered by it
        self.base = through if os.path.isdir(through) else path

    def pin(self, name: str) -> None:
        """Require that a folder inside stays the one that it is now."""
        self._handles.append(os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=self._handles[0]))
        self._pinned[name] = os.fstat(self._handles[-1])

    def close_with(self, user: object) -> None:
        """Close it once `user` is gone: a number that is given away must not be written to any more."""
        weakref.finalize(user, _close, self._handles).atexit = False

    def require(self) -> None:
        """Raise StorageError unless the path leads to the folder that was opened, and what was pinned is in it."""
        for name, opened in self._pinned.items():
            where = os.path.join(self.path, name) if name else self.path
            try:
                found = os.stat(where)
            except OSError as error:
                raise self._gone(f"{where} can't be found: {error.strerror}") from error
            if not os.path.samestat(found, opened):
                raise self._gone(f"{where} is another folder now")

    def _gone(self, why: str) -> StorageError:
        return StorageError(
            f"the cold store at {self.path} is not the one that was opened ({why}); nothing was acknowledged. it was "
            "renamed, removed, replaced or unmounted: put it back and try again, or connect to where it is now",
            reason=why,
        )


class FolderLock:
    """A folder that is locked until it is released, or its process and all that it forked have ended."""

    def __init__(self, path: Path) -> None:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._end = weakref.finalize(self, _unlock, handle, os.getpid())
        self._end.atexit = False

    def release(self) -> None:
        """Unlock it, also for children that have the handle."""
        self._end()


def is_locked(path: Path) -> bool:
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


def _unlock(handle: int, pid: int) -> None:
    # the lock is the parent's, which goes on
    if pid == os.getpid():
        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def _close(handles: list[int]) -> None:
    for handle in handles:
        os.close(handle)


class FolderSync:
    """Syncs what appeared in one table's folder since the last call; the first call syncs everything.

    The first call can't leave anything out, unless `trust` says so: another process may have died between its commit
    and its sync. The newest version on disk has a mark beside it, made once all is synced that it needs: a torn one
    without it was never acknowledged, see `set_aside_torn`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # what each folder held, see `_contents`
        self._seen: dict[Path, dict[str, bool]] = {}
        self._marked: str | None = None
        self._trusted: str | None = None

    def trust(self) -> None:
        """Before a first call, take for synced what is there, if the newest version has a mark.

        Only for a writer that stops all others with the next version: what they have under way must never count. If
        others committed one meanwhile, `sync` sees so and syncs everything.
        """
        if self._seen or not self._folder.is_dir():
            return
        found = _contents(self._folder)
        versions = [name for name in found.get(self._folder / _VERSIONS, ()) if name.endswith(_MANIFEST)]
        newest = min(versions, default=None)
        if f"{newest}{_MARK}" in found[self._folder]:
            self._seen, self._trusted = found, newest

    def sync(self) -> None:
        """Sync new files, then the folders that name them, then put the mark beside the newest version.

        Raises:
            OSError: a file could not be made durable.
        """
        found = _contents(self._folder)
        # names count down, so that the newest comes first in a listing
        versions = [name for name in found.get(self._folder / _VERSIONS, ()) if name.endswith(_MANIFEST)]
        if (trusted := self._trusted) is not None:
            self._trusted = None
            # newer ones
            if sum(name < trusted for name in versions) > 1:
                self._seen = {}
        first = self._folder not in self._seen
        for folder, present in reversed(found.items()):
            seen = self._seen.get(folder, {})
            new = [name for name in present if name not in seen and not name.endswith(_MARK)]
            # of a large table there are thousands, and a Path takes a third as long to make as its file to sync
            prefix = f"{folder}{os.sep}"
            for name in new:
                if present[name]:
                    fsync(prefix + name)
            if new:
                fsync(folder)
            # only now: what failed must be tried again
            self._seen[folder] = present
        self._seen = found
        if first:
            fsync(self._folder.parent)
        newest = min(versions, default=None)
        if newest is None or newest == self._marked:
            return
        (self._folder / f"{newest}{_MARK}").touch()
        fsync(self._folder)
        for name in found[self._folder]:
            if name.endswith(_MARK) and name > f"{newest}{_MARK}":
                (self._folder / name).unlink(missing_ok=True)
        self._marked = newest


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
        newest = min((name for name in os.listdir(versions) if name.endswith(_MANIFEST)), default=None)
        if newest is None or any(name.endswith(_MARK) and name <= f"{newest}{_MARK}" for name in os.listdir(folder)):
            return False
        if (versions / newest).read_bytes().endswith(_END):
            return False
        os.rename(versions / newest, folder / f"{newest}.torn")
        os.fsync(handle)
    finally:
        os.close(handle)
    log.error("a commit that a power loss cut short was set aside; it was never acknowledged", table=folder.name)
    return True


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


def _contents(folder: Path) -> dict[Path, dict[str, bool]]:
    """What a table's folder and those in it hold, the table's first, and for each name whether it is a file."""
    found: dict[Path, dict[str, bool]] = {}
    folders = [folder]
    for each in folders:
        with os.scandir(each) as entries:
            found[each] = {entry.name: entry.is_file() for entry in entries}
        if each == folder:
            inside = [name for name, is_file in found[folder].items() if not is_file]
            # versions first: what a version needs, also another process's, was there before it and is listed after it
            folders += [folder / name for name in sorted(inside, key=_VERSIONS.__ne__)]
    return found


@contextmanager
def writing(what: str, only: type[Exception] = Exception) -> Iterator[None]:
    """Turn what storage raises inside into Conflict (another process committed first) or StorageError.

    Keep the block around storage calls alone, or say `only` what they raise: no other error may pass for the store's.
    """
    try:
        yield
    except RaymemError:
        raise
    except BaseException as error:
        if not (isinstance(error, only) or _is_panic(error)):
            raise
        text = _text(error)
        if _CONFLICT.search(text):
            raise Conflict(f"{what}: another process committed first ({text})") from error
        raise _storage_error(what, text, "nothing was acknowledged") from error


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what storage raises inside into StorageError (it can't be reached) or Corrupt (it can't be read)."""
    try:
        yield
    except RaymemError:
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or _is_panic(error)):
            raise
        text = _text(error)
        found = _OS_ERROR.search(text)
        if _UNREACHABLE.search(text) or (found and int(found[1]) not in _MISSING_OS):
            raise _storage_error(what, text, "nothing was changed") from error
        raise Corrupt(
            f"{what}: stored data can't be read ({text}); restore it from an export or a copy of the store",
            missing=bool(found or _MISSING.search(text)),
        ) from error


def _is_panic(error: BaseException) -> bool:
    # of Rust, no Exception: it would pass by all that let others wait for an outcome
    return type(error).__name__ == "PanicException"


def _storage_error(what: str, text: str, state: str) -> StorageError:
    found = _OS_ERROR.search(text)
    reason = os.strerror(int(found[1])) if found else text
    return StorageError(
        f"{what}: {reason}; {state}. make room or repair the cold store, then try again",
        reason=reason,
    )


def _text(error: BaseException) -> str:
    """What an error says, with the folder's present path where it has the handle's."""

    def path(found: re.Match[str]) -> str:
        try:
            return os.readlink(f"{_OPEN}/{found[1]}")
        except OSError:
            return found[0]

    if isinstance(error, OSError) and error.errno is not None:
        return _OPENED.sub(path, f"{error.strerror}: {error.filename or ''} (os error {error.errno})")
    # lance appends the place in its own source
    text = _OPENED.sub(path, _SOURCE_LINE.sub("", str(error)).strip()) or type(error).__name__
    return f"LanceDB panicked: {text}" if _is_panic(error) else text
