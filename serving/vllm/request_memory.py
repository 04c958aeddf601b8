"""Memory for requests that come over HTTP: checked before they start, banks attached on first use.

It lives in the process that serves HTTP, and reaches the workers through `collective_rpc`. vLLM lets no connector
refuse a request, so what a caller must hear is decided here.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from raymem.client.store import AsyncStore
from raymem.errors import (
    BackendUnavailable,
    BankDetached,
    InvalidInput,
    NotFound,
    Overloaded,
    RaymemError,
    Unsupported,
)
from raymem.host.backend import detached
from raymem.serving.vllm.memory_field import FIELD, MemoryField
from raymem.serving.vllm.params import ConnectorConfig
from raymem.types import BankInfo, Fingerprint, check_bank_name

# how long the workers' banks, and a bank that was looked up, are taken to be as they were
_WORKERS_S, _LOOKED_UP_S = 1.0, 10.0
# how long a caller waits for a store that does not answer
_STORE_S = 3.0
# the least recently looked up bank is forgotten
_MOST_LOOKED_UP = 1024

Told = dict[str, Any]


class RequestMemory:
    """Prepares requests that ask for memory, and tells what they got.

    Args:
        config: the connector's settings: the store, and the banks that callers may touch.
        call: runs a method of `MemoryReader` in every worker and returns their answers.
        made_by: returns what makes this engine's rows; called on a thread, once. None for an engine that writes none.
    """

    def __init__(
        self,
        config: ConnectorConfig,
        call: Callable[..., Awaitable[list[Any]]],
        made_by: Callable[[], Fingerprint] | None,
    ) -> None:
        self.config = config
        self._call = call
        self._made_by = made_by
        self._fingerprint: asyncio.Task[Fingerprint] | None = None
        self._connecting = asyncio.Lock()
        self._store: AsyncStore | None = None
        self._looked_up: dict[str, tuple[float, BankInfo]] = {}
        self._attaching: dict[str, asyncio.Task[dict[str, Any]]] = {}
        self._workers: tuple[float, dict[str, dict[str, Any]]] = (float("-inf"), {})
        self.requests: Counter[str] = Counter()

    async def prepare(self, request: Any) -> Told | None:
        """Turn what an OpenAI request asks for into what the engine understands; None where it asks for nothing.

        Args:
            request: vLLM's request, validated; its `kv_transfer_params` are replaced.

        Raises:
            InvalidInput: the wish can't be followed. Unauthorized: the bank is not among those that callers may touch.
            BankNotFound, BankDetached, FingerprintMismatch, Unavailable: the bank can't serve, and the request requires
                that it does.
        """
        try:
            field = _asked(request)
            if field is None:
                return None
            self._check(request, field)
            told, kept = await self._serve(field)
        except RaymemError as error:
            self.requests["refused"] += 1
            self.requests[f"refused_{error.code}"] += 1
            raise
        self.requests["served"] += 1
        _hand_over(request, kept)
        return told

    async def attach(self, name: str) -> dict[str, Any]:
        """Attach a bank to the workers, or wait for an attach that is under way; return where it stands.

        Raises:
            Unauthorized: callers may not attach it. BankNotFound, BankDetached, FingerprintMismatch, Unavailable: the
                workers can't follow it. Overloaded: the attached banks take `attached_bytes` already.
        """
        self.config.check_attach(check_bank_name(name))
        return await self._attach(name)

    async def detach(self, name: str) -> bool:
        """Detach a bank from the workers; say whether it was attached.

        Raises:
            Unauthorized: callers may not detach it.
        """
        self.config.check_attach(check_bank_name(name))
        return any(await self._ask("detach_bank", name))

    async def banks(self) -> dict[str, dict[str, Any]]:
        """The attached banks that callers may touch: the rows that all workers have, their bytes together."""
        return {name: state for name, state in (await self._attached()).items() if self.config.may_touch(name)}

    async def stats(self) -> dict[str, Any]:
        """Counters of the workers, added up, and of the requests that came through here."""
        answers = await self._call("memory_stats")
        counters = [{name: answer.get(name, {}) for name in ("streamed", "read")} for answer in answers]
        return {**_added(counters), "requests": dict(self.requests)}

    async def close(self) -> None:
        """Close the store, if one was opened."""
        if self._store is not None:
            await self._store.close()

    def _check(self, request: Any, field: MemoryField) -> None:
        if field.write is not None:
            self.config.check_write(field.write)
            if getattr(request, "prompt_embeds", None) is not None:
                raise InvalidInput("a prompt of embeddings has no token ids to store: send the prompt as text or ids")
        self.config.check_reads(field.read)
        if self._made_by is None and (field.write is not None or field.read):
            raise Unsupported(
                f"{FIELD}.write and {FIELD}.read need hidden states, and this engine extracts none: start it without "
                "--attend-only, or with engine_args(…, stream=True)"
            )
        if getattr(request, "use_beam_search", False):
            raise InvalidInput(f"use_beam_search is true, and vLLM's beam search carries no {FIELD}: leave one out")

    async def _serve(self, field: MemoryField) -> tuple[Told, MemoryField]:
        """Look at each bank; return what to tell, and the wish without banks that can't serve."""
        told: Told = {}
        skipped: list[dict[str, Any]] = []
        if field.write is not None and await self._held(self._writable(field.write), field, field.write, skipped):
            told["write"] = {"bank": field.write, "stream": field.stream or field.write}
        for name in dict.fromkeys(field.read):
            if state := await self._held(self._readable(name), field, name, skipped):
                told.setdefault("read", []).append({"bank": name, "rows": state["rows"]})
        if skipped:
            told["skipped"] = skipped
            self.requests["skipped"] += len(skipped)
        return told, field.without(frozenset(skip["bank"] for skip in skipped))

    async def _held(
        self, found: Awaitable[Any], field: MemoryField, name: str, skipped: list[dict[str, Any]]
    ) -> Any | None:
        try:
            return await found
        except RaymemError as error:
            if field.required:
                raise
            skipped.append({"bank": name, "code": error.code, "message": error.message})
            return None

    async def _writable(self, name: str) -> BankInfo:
        info = await self._look_up(name)
        if info.state == "cold":
            raise detached(name)
        assert self._made_by is not None, "checked before"
        if self._fingerprint is None or (self._fingerprint.done() and self._fingerprint.exception()):
            self._fingerprint = asyncio.create_task(asyncio.to_thread(self._made_by))
        info.spec.fingerprint.accept(await asyncio.shield(self._fingerprint))
        return info

    async def _readable(self, name: str) -> dict[str, Any]:
        state = (await self._attached()).get(name)
        if state is None:
            if not self.config.attach_on_use:
                raise NotFound(
                    f"bank {name!r} is not attached to this engine, and attach_on_use is false: ask for one of "
                    "GET /v1/raymem/banks, or start the engine with attach_on_use"
                )
            state = await self._attach(name)
        if not state["live"]:
            raise BankDetached(
                f"bank {name!r} was detached from its store, or removed: attach it there, then ask again"
            )
        return state

    async def _look_up(self, name: str) -> BankInfo:
        looked, info = self._looked_up.pop(name, (float("-inf"), None))
        if info is None or time.monotonic() - looked > _LOOKED_UP_S:
            looked, info = time.monotonic(), await self._from_store(name)
        self._looked_up[name] = looked, info
        if len(self._looked_up) > _MOST_LOOKED_UP:
            del self._looked_up[next(iter(self._looked_up))]
        return info

    async def _from_store(self, name: str) -> BankInfo:
        try:
            async with asyncio.timeout(_STORE_S), self._connecting:
                if self._store is None:
                    self._store = await AsyncStore.connect(self.config.store, cold=self.config.cold)
                return await self._store.bank(name).info()
        except TimeoutError as error:
            raise BackendUnavailable(
                f"the store did not say within {_STORE_S:.0f} s whether bank {name!r} is there; try again, or send "
                f'"required": false to go on without it'
            ) from error

    async def _attach(self, name: str) -> dict[str, Any]:
        # callers that ask for it at the same time wait for one attach; it goes on when they leave
        if name not in self._attaching:
            self._attaching[name] = asyncio.create_task(self._load(name))
            self._attaching[name].add_done_callback(lambda _done: self._attaching.pop(name))
        return await asyncio.shield(self._attaching[name])

    async def _load(self, name: str) -> dict[str, Any]:
        held = await self._attached()
        taken = sum(state["bytes"] for state in held.values())
        if name not in held and taken >= self.config.attached_bytes:
            raise Overloaded(
                f"{len(held)} attached banks take {taken} bytes, and attached_bytes is {self.config.attached_bytes}: "
                "detach one (POST /v1/raymem/detach), or raise it",
                retry_after_s=1.0,
            )
        return _together(await self._ask("attach_told", name))

    async def _ask(self, method: str, name: str) -> list[Any]:
        answers = await self._call(method, name)
        self._workers = (float("-inf"), {})
        for answer in answers:
            if isinstance(answer, Mapping) and "refused" in answer:
                raise RaymemError.from_wire(answer["refused"])
        return answers

    async def _attached(self) -> dict[str, dict[str, Any]]:
        asked, banks = self._workers
        if time.monotonic() - asked > _WORKERS_S:
            answers = [answer["banks"] for answer in await self._call("memory_stats")]
            # a bank that some worker lacks is attached anew
            names = set.intersection(*(set(each) for each in answers))
            banks = {name: _together([each[name] for each in answers]) for name in sorted(names)}
            self._workers = time.monotonic(), banks
        return banks


def _asked(request: Any) -> MemoryField | None:
    asked = (request.model_extra or {}).get(FIELD)
    if "raymem" in (request.vllm_xargs or {}):
        raise InvalidInput(f"vllm_xargs names 'raymem', and carries no objects: say {FIELD} instead")
    params = MemoryField.of_params(request.kv_transfer_params)
    if asked is not None and params is not None:
        raise InvalidInput(f"{FIELD} and kv_transfer_params['raymem'] are both given; keep {FIELD}")
    return params if asked is None else MemoryField.parse(asked)


def _hand_over(request: Any, field: MemoryField) -> None:
    others = {name: value for name, value in (request.kv_transfer_params or {}).items() if name != "raymem"}
    request.kv_transfer_params = {**others, **field.params()} or None


def _together(states: list[dict[str, Any]]) -> dict[str, Any]:
    """One bank in several workers."""
    return {
        "live": all(state["live"] for state in states),
        "rows": min(state["rows"] for state in states),
        "bytes": sum(state["bytes"] for state in states),
        "behind": any(state["error"] for state in states),
    }


def _added(parts: list[Any]) -> Any:
    """Counters of the same names, added up at every depth."""
    if not all(isinstance(part, Mapping) for part in parts):
        return sum(parts)
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _added([part[name] for part in parts if name in part]) for name in names}
