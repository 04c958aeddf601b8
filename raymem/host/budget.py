"""The memory that a host's banks share: which of them leave it when another needs room."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping

from raymem.errors import TooLarge

# what banks were, all of it together: it takes memory beside the banks, and no bank can have this name
PAST = "the past"


class LruLimit:
    """A limit in bytes, and the order in which banks were used last.

    Args:
        owner: whose memory it is, for errors.
        limit: bytes that all banks may take together; None for no limit.
        setting: the setting that says so.
    """

    def __init__(self, owner: str, limit: int | None, setting: str) -> None:
        self.limit = limit
        self.evicted = 0
        self._owner = owner
        self._setting = setting
        self._turn = itertools.count()
        self._used: dict[str, int] = {}

    def touch(self, name: str) -> None:
        """A bank is being used."""
        self._used[name] = next(self._turn)

    def forget(self, name: str) -> None:
        """A bank has left memory."""
        self._used.pop(name, None)

    def is_short(self, loaded: Mapping[str, int]) -> bool:
        """Whether the banks that are loaded take more than they may."""
        return self.limit is not None and sum(loaded.values()) > self.limit

    def leaving(self, name: str, needed: int, loaded: Mapping[str, int], pinned: Collection[str]) -> list[str]:
        """The banks to free, least recently used first, so that one that takes `needed` bytes has room.

        Args:
            name: the bank that needs it, or PAST.
            needed: all of its bytes, also those that it has already.
            loaded: bytes of each bank in memory.
            pinned: banks that stay.

        Raises:
            TooLarge: it would not fit if all others left that may.
        """
        if self.limit is None:
            return []
        others = {other: size for other, size in loaded.items() if other != name}
        kept = sum(size for other, size in others.items() if other in pinned)
        if needed + kept > self.limit:
            what = "a bank as it was" if name == PAST else f"bank {name!r}"
            raise TooLarge(
                f"{what} takes {needed} bytes, and {self._owner} may hold {self.limit}, {kept} of them in pinned banks "
                f"or in this one: raise {self._setting}, unpin a bank there, or move this one where there is more room",
                needed=needed,
                limit=self.limit,
            )
        free = self.limit - sum(others.values())
        leaving = []
        for other in sorted(others.keys() - set(pinned), key=lambda other: self._used.get(other, -1)):
            if free >= needed:
                break
            leaving.append(other)
            free += others[other]
        return leaving
