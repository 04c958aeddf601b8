"""Calling an actor by its name: errors arrive as themselves, a dead actor as BackendUnavailable."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import ray
from ray.exceptions import ActorHandleNotFoundError, RayError, RayTaskError

from raymem.errors import BackendUnavailable, RaymemError

NAMESPACE = "raymem"


class Peer(Protocol):
    """An actor, wherever it runs."""

    @property
    def name(self) -> str:
        """Its name in the catalog and in Ray."""

    async def call(self, method: str, *args: Any) -> Any:
        """Run a method; its RaymemErrors arrive as themselves."""


class Remote:
    """An actor of this raymem, found by name on first use and again after it was replaced."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._handle: Any = None

    async def call(self, method: str, *args: Any) -> Any:
        """Run a method and wait for what it returns.

        Raises:
            BackendUnavailable: the actor is not there, restarting, or died under the call, which may have run;
                `details["shard"]` names it, and `details["gone"]` is True if no actor has that name.
            RaymemError: what the method raised, as itself.
        """
        if self._handle is None:
            self._handle = await asyncio.to_thread(self._find)
        try:
            return await getattr(self._handle, method).remote(*args)
        except RayTaskError as error:
            # a RaymemError says all there is to say; of anything else the trace on the other side is worth having
            raise error.cause from (None if isinstance(error.cause, RaymemError) else error)
        except RayError as error:
            self._handle = None
            raise self._unavailable(str(error).splitlines()[0], gone=False) from error

    def _find(self) -> Any:
        try:
            return ray.get_actor(self.name, namespace=NAMESPACE)
        except (ValueError, ActorHandleNotFoundError) as error:
            raise self._unavailable("there is no such actor", gone=True) from error

    def _unavailable(self, why: str, *, gone: bool) -> BackendUnavailable:
        return BackendUnavailable(f"{self.name} does not answer: {why}", shard=self.name, gone=gone)


async def ask_all(
    remotes: Sequence[Peer], method: str, *args: Any, timeout_s: float = 10.0
) -> dict[str, Any | RaymemError]:
    """Call a method of many actors at once; one that fails or is silent leaves its error in place of an answer."""

    async def ask(remote: Peer) -> Any | RaymemError:
        try:
            async with asyncio.timeout(timeout_s):
                return await remote.call(method, *args)
        except TimeoutError:
            return BackendUnavailable(
                f"{remote.name} gave no answer within {timeout_s:g} s", shard=remote.name, silent=True
            )
        except RaymemError as error:
            return error

    answers = await asyncio.gather(*map(ask, remotes))
    return {remote.name: answer for remote, answer in zip(remotes, answers, strict=True)}
