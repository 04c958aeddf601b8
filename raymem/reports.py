"""What verbs about banks and nodes answer: plain data; `raymem.types` has them too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttendedExtent:
    """How many rows of a bank have keys and values beside the journal, and the bytes of these."""

    rows: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class MigrationReport:
    """What a migration did: from where to where, rows moved, and for how long writes paused and the whole took."""

    bank: str
    source: str
    target: str
    rows: int
    pause_ms: float
    total_ms: float


@dataclass(frozen=True)
class RebalanceReport:
    """What a rebalancing did: streams and rows that moved, why others stayed, and for how long writes of one paused."""

    bank: str
    streams: int
    rows: int
    pause_ms: float
    total_ms: float
    failed: dict[str, str]


@dataclass(frozen=True)
class RestoreReport:
    """A bank that went back: the position it stands at, how many rows that took away, and the bank that still has them.

    `kept_as` is None where nothing had come after the position.
    """

    bank: str
    pos: int
    undone: int
    kept_as: str | None


@dataclass(frozen=True)
class ShardInfo:
    """A process that banks are hot in: `banks` are its own, `loaded` of them are in memory, where they take `bytes`.

    `memory_bytes` is what it may hold, None if nothing was set; `pinned_bytes` of that can't be freed for another bank.
    A `draining` one takes no new banks.
    """

    name: str
    node: str
    banks: int
    loaded: int
    bytes: int
    pinned_bytes: int
    memory_bytes: int | None
    draining: bool


@dataclass(frozen=True)
class DrainReport:
    """What emptying a node did: the moves, for banks that stayed why, and whether the node takes no new ones now."""

    node: str
    moved: tuple[MigrationReport, ...]
    failed: dict[str, str]
    total_ms: float
    draining: bool


@dataclass(frozen=True)
class MergeReport:
    """What a merge made: the bank, its rows, and for each source how many it gave and what its streams now begin with.

    `rule` is the kind's ("exact", "approximate", "refused"); `rebuilt` says that the state is made of the rows.
    `duplicates` are rows that two sources had with the same content, kept once. `conflicts` are rows under one name
    with other content, or out of order in their run: the first source's stayed, `conflict_rows` names some others.
    """

    bank: str
    rows: int
    sources: dict[str, int]
    streams: dict[str, str]
    rule: str
    rebuilt: bool
    duplicates: int
    conflicts: int
    conflict_rows: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileCheck:
    """What decoding every file left of a bank found: files and bytes read, finds, and files that can't be decoded.

    A find is a row of a data file, a name in a snapshot, or a row or a tail that a snapshot's tensors still hold.
    """

    files: int
    bytes: int
    found: int
    unreadable: int
