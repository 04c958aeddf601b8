"""Calls to an actor by its name: its errors are raised as themselves, a dead actor raises BackendUnavailable."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import ray
from ray.exceptions import ActorHandleNotFoundError, RayError, RayTaskError

from raymem.errors import BackendUnavailable, RaymemError, StoreClosed

NAMESPACE = "raymem"


class Peer(Protocol):
    """An actor, wherever it runs."""

    @property
    def name(self) -> str:
        """Its name in the catalog and in Ray."""

    async def call(self, method: str, *args: Any) -> Any:
        """Run a method; its RaymemErrors are raised as themselves."""


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
        if not ray.is_initialized():
            # Ray would start a cluster of its own to find an actor
            raise StoreClosed(
                "this process is not connected to its Ray cluster any more: ray.shutdown() was called; connect again"
            )
        if self._handle is None:
            self._handle = await asyncio.to_thread(self._find)
        try:
            return await getattr(self._handle, method).remote(*args)
        except RayTaskError as error:
            # a RaymemError says enough; for any other error the remote traceback helps
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


async def ask(peer: Peer, method: str, *args: Any, timeout_s: float) -> Any:
    """Call a method that returns at once.

    Raises:
        BackendUnavailable: no answer in time; `details["silent"]` is True then, and the call may run later.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await peer.call(method, *args)
    except TimeoutError:
        raise BackendUnavailable(
            f"{peer.name} gave no answer within {timeout_s:g} s", shard=peer.name, silent=True
        ) from None


async def ask_all(
    peers: Sequence[Peer], method: str, *args: Any, timeout_s: float = 10.0
) -> dict[str, Any | RaymemError]:
    """Call a method of many actors at once; the error of one that fails or is silent takes its answer's place."""

    async def one(peer: Peer) -> Any | RaymemError:
        try:
            return await ask(peer, method, *args, timeout_s=timeout_s)
        except RaymemError as error:
            return error

    answers = await asyncio.gather(*map(one, peers))
    return {peer.name: answer for peer, answer in zip(peers, answers, strict=True)}


async def watched(peer: Peer, method: str, *args: Any, silence_s: float) -> Any:
    """Call a method that may take long, for as long as the actor answers other calls.

    Raises:
        BackendUnavailable: it was silent for `silence_s`; the call may run later.
    """
    answer = asyncio.ensure_future(peer.call(method, *args))
    try:
        while not (await asyncio.wait([answer], timeout=silence_s / 3))[0]:
            await ask(peer, "bytes", timeout_s=silence_s)
        return answer.result()
    finally:
        answer.cancel()
