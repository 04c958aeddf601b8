"""Telling a bank that went while it was used from one that is damaged: its tables are missing in both cases."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from raymem.errors import BankNotFound, Conflict, Corrupt, RaymemError, StorageError
from raymem.storage.catalog import Catalog
from raymem.storage.tables.tables import BANK_TABLE

C = TypeVar("C", bound=type[Any])


def what_went(catalog: Catalog, error: RaymemError) -> RaymemError | None:
    """Why a bank's table could not be used, if that is because of what another caller did; None if it is damage.

    Storage knows tables alone, so the error names them: by their names, or by the path of a file in one.
    """
    for found in BANK_TABLE.finditer(error.message):
        entry = catalog.by_id(found["id"])
        if entry is None:
            return BankNotFound("the bank was removed while it was used: list the banks, or create it again")
        if int(found["generation"] or 0) != entry.generation:
            return Conflict(f"rows of bank {entry.name} were erased or moved while it was used: do it again")
    return None


def telling(backend: C) -> C:
    """A class of backend whose verbs raise BankNotFound or Conflict where a bank that they use goes meanwhile.

    The backend has its store as `cold`.
    """
    for name, verb in list(vars(backend).items()):
        if inspect.iscoroutinefunction(verb) and not name.startswith("_"):
            setattr(backend, name, _telling(verb))
    return backend


def _telling(verb: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(verb)
    async def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await verb(self, *args, **kwargs)
        except (Corrupt, StorageError) as error:
            why = await asyncio.to_thread(what_went, self.cold.catalog, error)
            if why is None:
                raise
            raise why from error

    return told
