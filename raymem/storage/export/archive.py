"""The zip around an exported file: opened with bounds, its members taken out as they were put in and not otherwise."""

from __future__ import annotations

import hashlib
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from raymem.errors import Corrupt, InvalidInput, TooLarge
from raymem.storage.export.manifest import JOURNAL, MANIFEST, MANIFEST_BYTES, MEMBERS, ExportManifest, parse

_CHUNK_BYTES = 2**20
# five members take a few hundred bytes
_DIRECTORY_BYTES = 2**17
# what zipfile raises of bytes that are no zip
_DAMAGE = (zipfile.BadZipFile, EOFError, LookupError, OverflowError, RuntimeError, ValueError, struct.error)


class _Bounded:
    """A file of which nothing is read in larger pieces than a sound one's directory has, until it is `open`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.is_open = False
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def read(self, size: int = -1) -> bytes:
        if self.is_open:
            return self._file.read(size)
        data = self._file.read(_DIRECTORY_BYTES + 1 if size < 0 else min(size, _DIRECTORY_BYTES + 1))
        if len(data) > _DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"its directory is over {_DIRECTORY_BYTES} bytes")
        return data

    def seekable(self) -> bool:
        return True


class Archive:
    """An exported file with a sound manifest, whose members have their listed sizes and are not compressed."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self._archive = archive
        self.path = path
        self._check_members()
        self.manifest = self._manifest()
        there = {info.filename for info in archive.infolist()} - {MANIFEST}
        if odd := there ^ set(self.manifest.members):
            raise self.corrupt(min(odd), "is in the manifest or in the file, and not in both")

    @property
    def rows_at_most(self) -> int:
        """How many rows a journal of so many bytes can have: 44 are numbers of each."""
        return sum(info.file_size for info in self._archive.infolist() if info.filename == JOURNAL) // 44

    def verify(self) -> None:
        """Read every member once.

        Raises:
            Corrupt: one has other bytes than the manifest says.
        """
        for name, expected in self.manifest.members.items():
            hashed, size = hashlib.sha256(), 0
            with self.open(name) as file, self.damaged(name):
                while chunk := file.read(_CHUNK_BYTES):
                    hashed.update(chunk)
                    size += len(chunk)
                    if size > expected.bytes:
                        break
            if (size, hashed.hexdigest()) != (expected.bytes, expected.sha256):
                raise self.corrupt(name, "does not match its hash in the manifest")

    def read(self, name: str, most: int) -> bytes:
        """A whole member.

        Raises:
            TooLarge: it is over `most` bytes. Corrupt: it can't be read.
        """
        if (size := self._archive.getinfo(name).file_size) > most:
            raise TooLarge(f"{name} in {self.path} has {size:,} bytes; the limit is {most:,}", size=size, limit=most)
        with self.open(name) as file, self.damaged(name):
            return file.read(most + 1)

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """A member as a file."""
        with self.damaged(name):
            file = self._archive.open(name)
        with file:
            yield file

    @contextmanager
    def damaged(self, name: str) -> Iterator[None]:
        """Tell what goes wrong while a member is read as damage of the file."""
        try:
            yield
        except OSError as error:
            raise InvalidInput(f"can't read {self.path}: {error}") from error
        except _DAMAGE as error:
            if isinstance(error, InvalidInput):
                raise
            raise self.corrupt(name, f"can't be read ({error})") from error

    def corrupt(self, member: str, why: str) -> Corrupt:
        """The error for a member that is not what it should be."""
        return Corrupt(f"{member} in {self.path} {why}; nothing was imported. export the bank again", member=member)

    def _check_members(self) -> None:
        seen: set[str] = set()
        for info in self._archive.infolist():
            name = info.filename
            if name in seen or name not in (MANIFEST, *MEMBERS):
                raise self.corrupt(ascii(name)[:80], "is there twice or is no part of an export")
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
                raise self.corrupt(name, "is compressed or encrypted, which no export is")
            seen.add(name)
        if MANIFEST not in seen:
            raise self.corrupt(MANIFEST, "is missing")

    def _manifest(self) -> ExportManifest:
        data = self.read(MANIFEST, MANIFEST_BYTES)
        # before it is parsed, when each takes twenty times its bytes: one a run, and a run has a row
        lists, most = data.count(b"[") + data.count(b"{"), 10_000 + self.rows_at_most
        if lists > most:
            raise self.corrupt(MANIFEST, f"has {lists} lists and objects, and the rows beside it can need {most}")
        try:
            return parse(data, str(self.path))
        except Corrupt as error:
            raise error if error.details.get("other_format") else self.corrupt(MANIFEST, error.message) from error


@contextmanager
def opened(path: Path) -> Iterator[Archive]:
    """An exported file, checked as far as that goes without reading its members.

    Raises:
        InvalidInput: it can't be opened. Corrupt: it is no export, or a damaged one. TooLarge: its manifest is.
    """
    try:
        raw = path.open("rb")
    except OSError as error:
        raise InvalidInput(f"can't read {path}: {error}") from error
    with raw:
        file = _Bounded(raw)
        try:
            archive = zipfile.ZipFile(file)
        except (*_DAMAGE, OSError) as error:
            raise Corrupt(
                f"the file in {path} is not a whole export ({error}); nothing was imported. export the bank again"
            ) from error
        file.is_open = True
        with archive:
            yield Archive(archive, path)
