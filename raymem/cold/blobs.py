"""Blobs of a table, read into memory that is there already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymem.cold.tables import Tables

# what a column's field says, and the version of Lance's files that keeps its values beside the other columns: later
# ones keep them in a folder for each commit, which no clean-up removes
BLOB = {"lance-encoding:blob": "true"}
FILE_FORMAT = "2.1"
_FRAGMENT_BITS = 32
Views = Sequence[NDArray[np.uint8]]


@dataclass(frozen=True)
class Blob:
    """One value of a blob column: its bytes, and what puts them into arrays [size in all], one after another.

    Who reads one that was cut short finds other bytes at its end than were written: check them.
    """

    size: int
    read_into: Callable[[Views], None]


def find(
    tables: Tables, name: str, column: str, where: str, others: Sequence[str]
) -> list[tuple[dict[str, Any], Blob]]:
    """The rows of a table that match: their `others` columns, and the blob of each, not read yet.

    From a folder they are read without LanceDB, whose own two copies take twice as long as the reading.
    """
    dataset = tables.open(name).to_lance()
    scanner = dataset.scanner([*others, column], where, with_row_address=True, blob_handling="blobs_descriptions")
    rows = scanner.to_table().to_pylist()
    folder = tables.folder(name)
    if folder is None:
        # none at all is refused
        opened = dataset.take_blobs(column, addresses=[row["_rowaddr"] for row in rows]) if rows else []
        return [(row, Blob(file.size(), partial(_download, file))) for row, file in zip(rows, opened, strict=True)]
    paths = {part.fragment_id: folder / "data" / part.data_files()[0].path for part in dataset.get_fragments()}
    return [
        (
            row,
            Blob(
                row[column]["size"], partial(_read, paths[row["_rowaddr"] >> _FRAGMENT_BITS], row[column]["position"])
            ),
        )
        for row in rows
    ]


def _read(path: Path, position: int, views: Views) -> None:
    with path.open("rb") as file:
        file.seek(position)
        for view in views:
            file.readinto(view.data)


def _download(file: Any, views: Views) -> None:
    data = np.frombuffer(file.readall(), np.uint8)
    for view in views:
        view[:], data = data[: len(view)], data[len(view) :]
