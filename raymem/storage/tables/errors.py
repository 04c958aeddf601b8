"""The one place where LanceDB's errors become raymem's."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from raymem.errors import Conflict, Corrupt, RaymemError, StorageError
from raymem.storage.tables.folder import named

_CONFLICT = re.compile(r"Incompatible transaction|[Cc]ommit conflict|concurrent writers|preempted by")
_MISSING = re.compile(r"Not found|was not found|does not exist|No such file")
_UNREACHABLE = re.compile(r"Generic (S3|GCS|MicrosoftAzure|HTTP)|timed? ?out|error sending request|[Cc]onnection", re.I)
_OS_ERROR = re.compile(r"os error (\d+)")
_SOURCE_LINE = re.compile(r",? ?/(root|rustc|home|usr)/\S+\.rs(:\d+)*")
# what a path that a damaged file names leads to, beside nothing: a folder, a name too long
_MISSING_OS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ENAMETOOLONG}


@contextmanager
def _panics() -> Iterator[None]:
    """Turn a panic of Rust into an error: as no Exception it would pass by whoever lets others wait for an outcome."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(f"LanceDB panicked: {error}") from error


@contextmanager
def writing(what: str, only: type[Exception] = Exception) -> Iterator[None]:
    """Turn whatever storage raises inside into Conflict (somebody else's commit was first) or StorageError.

    Keep the block around storage calls alone, or say `only` what they raise: no other error may pass for the store's.
    """
    try:
        with _panics():
            yield
    except RaymemError:
        raise
    except only as error:
        text = _text(error)
        if _CONFLICT.search(text):
            raise Conflict(f"{what}: another process committed first ({text})") from error
        raise _storage_error(what, text, "nothing was acknowledged") from error


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn whatever storage raises inside into StorageError (it can't be reached) or Corrupt (it can't be read)."""
    try:
        with _panics():
            yield
    except RaymemError:
        raise
    except Exception as error:
        text = _text(error)
        found = _OS_ERROR.search(text)
        if _UNREACHABLE.search(text) or (found and int(found[1]) not in _MISSING_OS):
            raise _storage_error(what, text, "nothing was changed") from error
        raise Corrupt(
            f"{what}: stored data can't be read ({text}); restore it from an export or a copy of the store",
            missing=bool(found or _MISSING.search(text)),
        ) from error


def _storage_error(what: str, text: str, state: str) -> StorageError:
    found = _OS_ERROR.search(text)
    reason = os.strerror(int(found[1])) if found else text
    return StorageError(
        f"{what}: {reason}; {state}. make room or repair the cold store, then try again",
        reason=reason,
    )


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return named(f"{error.strerror}: {error.filename or ''} (os error {error.errno})")
    # lance appends the place in its own source
    return named(_SOURCE_LINE.sub("", str(error)).strip()) or type(error).__name__
