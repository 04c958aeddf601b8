"""Blobs of a table, read into memory that is there already."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymem.storage.tables.tables import Tables

# what a column's field says, and the version of Lance's files that keeps its values beside the other columns: later
# ones keep them in a folder for each commit, which no clean-up removes
BLOB = {"lance-encoding:blob": "true"}
FILE_FORMAT = "2.1"
# an address is a fragment's number and a row's in it
_ROW_BITS = 32
Views = Sequence[NDArray[np.uint8]]


@dataclass(frozen=True)
class Blob:
    """One value of a blob column: its bytes, and what puts them into arrays [size in all], one after another.

    Who reads one that was cut short finds other bytes at its end than were written: check them.
    """

    size: int
    read_into: Callable[[Views], None]


@contextmanager
def opened(
    tables: Tables, name: str, column: str, where: str, others: Sequence[str]
) -> Iterator[list[tuple[dict[str, Any], Blob]]]:
    """The rows of a table that match: their `others` columns, and the blob of each, to be read inside.

    In a folder that is done without LanceDB, whose own two copies take twice as long as the reading (ADR-9). What is
    open stays readable when somebody else drops it meanwhile.
    """
    dataset = tables.open(name).to_lance()
    scanner = dataset.scanner([*others, column], where, with_row_address=True, blob_handling="blobs_descriptions")
    rows = scanner.to_table().to_pylist()
    folder = tables.folder(name)
    with ExitStack() as files:
        blobs = _in_store(dataset, column, rows) if folder is None else _in_files(files, folder, dataset, column, rows)
        yield list(zip(rows, blobs, strict=True))


def _in_files(files: ExitStack, folder: Path, dataset: Any, column: str, rows: Sequence[dict[str, Any]]) -> list[Blob]:
    numbers = {row["_rowaddr"] >> _ROW_BITS for row in rows}
    paths = {number: folder / "data" / dataset.get_fragment(number).data_files()[0].path for number in numbers}
    handles = {number: files.enter_context(path.open("rb")).fileno() for number, path in paths.items()}
    return [
        Blob(row[column]["size"], partial(_read, handles[row["_rowaddr"] >> _ROW_BITS], row[column]["position"]))
        for row in rows
    ]


def _in_store(dataset: Any, column: str, rows: Sequence[dict[str, Any]]) -> list[Blob]:
    # none at all is refused
    found = dataset.take_blobs(column, addresses=[row["_rowaddr"] for row in rows]) if rows else []
    return [Blob(file.size(), partial(_download, file)) for file in found]


def _read(handle: int, position: int, views: Views) -> None:
    for view in views:
        rest = view.data
        while len(rest) and (count := os.preadv(handle, [rest], position)):
            rest, position = rest[count:], position + count


def _download(file: Any, views: Views) -> None:
    data = np.frombuffer(file.readall(), np.uint8)
    for view in views:
        view[:], data = data[: len(view)], data[len(view) :]
