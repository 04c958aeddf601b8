"""Texts as documents: the start is read and written to memory, the rest is then predicted in windows.

Shape legend: T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from raymem.errors import InvalidInput, NotFound

WRITTEN_SHARE = 0.75
LEAST_TOKENS = 64


@dataclass(frozen=True)
class Document:
    """One file's name and text."""

    name: str
    text: str


class TokenRange(NamedTuple):
    """Tokens [start, stop) of a document."""

    start: int
    stop: int


class Split(NamedTuple):
    """How a document is used: all its tokens, how many of them are written, and the windows predicted after them."""

    tokens_T: Tensor
    written: int
    windows: tuple[TokenRange, ...]


def find_documents(paths: Sequence[Path], max_docs: int) -> list[Document]:
    """Read the first files in name order; each is a document.

    Args:
        paths: files, and folders whose files are meant (hidden ones are left out).
        max_docs: how many to read.

    Raises:
        NotFound: a path that isn't there. InvalidInput: no file, or one that isn't UTF-8 text.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not path.exists():
            raise NotFound(f"no text at {path}: give a file, or a folder with text files")
        found.update(dict.fromkeys(_files(path) if path.is_dir() else [path]))
    if not found:
        raise InvalidInput(f"no files in {', '.join(map(str, paths)) or 'no paths'}: give at least one text file")
    return [_read(file) for file in sorted(found, key=lambda file: (file.name, str(file)))[:max_docs]]


def split(name: str, tokens_T: Tensor, max_tokens: int, window: int) -> Split:
    """Divide a document: the first 75 % of its first `max_tokens` tokens are written, the rest predicted in windows.

    Raises:
        InvalidInput: fewer than 64 tokens.
    """
    tokens_T = tokens_T[:max_tokens]
    total = len(tokens_T)
    if total < LEAST_TOKENS:
        raise InvalidInput(f"document {name!r} has {total} tokens; {LEAST_TOKENS} or more are needed: leave it out")
    written = int(total * WRITTEN_SHARE)
    spans = (TokenRange(start, min(start + window, total)) for start in range(written, total, window))
    # a window of one token has nothing to predict from
    return Split(tokens_T, written, tuple(span for span in spans if span.stop - span.start > 1))


def chunks(written: int, size: int) -> list[TokenRange]:
    """Whole chunks of `size` of the written tokens; one shorter chunk where they are fewer than `size`."""
    whole = [TokenRange(start, start + size) for start in range(0, written - size + 1, size)]
    return whole or [TokenRange(0, written)]


def _files(folder: Path) -> list[Path]:
    inside = (file for file in folder.rglob("*") if file.is_file())
    return [file for file in inside if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def _read(file: Path) -> Document:
    try:
        return Document(file.name, file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{file} is not UTF-8 text (byte {error.start}): convert it or leave it out") from error
    except OSError as error:
        raise InvalidInput(f"can't read {file}: {error.strerror}") from error
