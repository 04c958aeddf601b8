"""Memory for requests that come over HTTP: checked before they start, banks attached on first use.

It lives in the process that serves HTTP, and reaches the workers through `collective_rpc`. vLLM lets no connector
refuse a request, so what a caller must hear is decided here.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from raymem.client.store import AsyncStore
from raymem.errors import (
    BackendUnavailable,
    BankDetached,
    InvalidInput,
    NotFound,
    Overloaded,
    RaymemError,
    TooLarge,
    Unsupported,
)
from raymem.host.backend import detached
from raymem.logs import get_logger
from raymem.serving.vllm.attach import AttachedRows
from raymem.serving.vllm.memory_field import FIELD, MemoryField
from raymem.serving.vllm.params import ConnectorConfig
from raymem.types import BankInfo, Fingerprint, check_bank_name

# how long the workers' banks, and a bank that was looked up, are taken to be as they were
_WORKERS_S, _LOOKED_UP_S = 1.0, 10.0
# after how long a bank whose rows did not fit is tried again
_AGAIN_S = 60.0
# how often workers are asked whether they have loaded a bank
_POLL_S = 0.05
# how long a caller waits for a store that does not answer
_STORE_S = 3.0
# the least recently looked up bank is forgotten
_MOST_LOOKED_UP = 1024

Told = dict[str, Any]
Use = Literal["read", "attend"]
log = get_logger("raymem.vllm")


class RowVerbs(Protocol):
    """What an engine does with the rows of a bank, see `raymem.serving.vllm.attach`."""

    async def attach(self, name: str) -> AttachedRows:
        """Keep a bank's rows, or those that it has got since."""
        ...

    async def detach(self, name: str) -> bool:
        """Forget them; say whether there were some."""
        ...


class Kept(NamedTuple):
    """A bank whose rows the engine keeps: when it was created, how many rows it said it had, how many are kept."""

    created: float
    said: int
    rows: int


class Prepared(NamedTuple):
    """A request that is ready for the engine: what its answer tells, and whether it required its memory."""

    told: Told
    required: bool


class RequestMemory:
    """Prepares requests that ask for memory, and tells what they got.

    Args:
        config: the connector's settings: the store, and the banks that callers may touch.
        call: runs a method of `MemoryReader` in every worker and returns their answers.
        made_by: returns what makes this engine's rows; called on a thread, once. None for an engine that writes none.
        rows: attaches and detaches the rows that requests attend to.
        adapters: the names of models that are LoRA adapters, as they are at the time.
    """

    def __init__(
        self,
        config: ConnectorConfig,
        call: Callable[..., Awaitable[list[Any]]],
        made_by: Callable[[], Fingerprint] | None,
        rows: RowVerbs,
        adapters: Collection[str] = (),
    ) -> None:
        self.config = config
        self._call = call
        self._made_by = made_by
        self._rows = rows
        self._adapters = adapters
        self._fingerprint: asyncio.Task[Fingerprint] | None = None
        self._connecting = asyncio.Lock()
        self._store: AsyncStore | None = None
        self._looked_up: dict[str, tuple[float, BankInfo]] = {}
        self._attaching: dict[str, asyncio.Task[Any]] = {}
        self._kept: dict[str, Kept] = {}
        self._too_large: dict[str, tuple[float, str]] = {}
        self._workers: tuple[float, dict[str, dict[str, Any]]] = (float("-inf"), {})
        self.requests: Counter[str] = Counter()

    async def prepare(self, request: Any) -> Prepared | None:
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
            self._count(error)
            raise
        self.requests["served"] += 1
        _hand_over(request, kept)
        return Prepared(told, field.required)

    def conclude(self, prepared: Prepared, heard: Sequence[Mapping[str, Any]]) -> Told:
        """What the answer of a request tells, with what the engine said when it ended.

        Args:
            prepared: as `prepare` returned it.
            heard: the `kv_transfer_params` of the engine's outputs, one of each prompt and answer.

        Raises:
            RaymemError: it could not attend, though the request required it.
        """
        told = dict(prepared.told)
        for said in (params["raymem"] for params in heard if "raymem" in params):
            if attended := said.get("attended"):
                told["attend"] = attended
            if "refused" in said:
                self._refuse(prepared, told, {"code": said.get("code"), "message": said["refused"]})
        return told

    def _refuse(self, prepared: Prepared, told: Told, refusal: dict[str, Any]) -> None:
        attend = told.pop("attend", {"banks": []})
        for name in attend["banks"]:
            # another front end may have detached it, or it is gone
            self._kept.pop(name, None)
            self._looked_up.pop(name, None)
        if prepared.required:
            error = RaymemError.from_wire(refusal)
            self._count(error)
            raise error
        skips = [{"bank": name, "use": "attend", **refusal} for name in attend["banks"]]
        told["skipped"] = [*told.get("skipped", ()), *skips]

    def _count(self, error: RaymemError) -> None:
        self.requests["refused"] += 1
        self.requests[f"refused_{error.code}"] += 1

    async def attach(self, name: str, use: Use | None = None) -> dict[str, Any]:
        """Attach a bank to the workers, or wait for an attach that is under way; return where it stands.

        Args:
            name: the bank.
            use: what for; everything that requests may do with it by default.

        Raises:
            Unauthorized: callers may not attach it. BankNotFound, BankDetached, FingerprintMismatch, Unavailable: the
                workers can't follow it. Overloaded: the attached banks take `attached_bytes` already.
        """
        self.config.check_attach(check_bank_name(name))
        state: dict[str, Any] = {}
        if use == "read" or (use is None and self.config.may_read(name) and self._made_by is not None):
            self.config.check_reads([name])
            state = await self._attach(name)
        if use == "attend" or (use is None and self.config.may_attend(name)):
            self.config.check_attends([name])
            state["attended_rows"] = (await self._attach_rows(name)).rows
        return state

    async def detach(self, name: str) -> bool:
        """Detach a bank from the workers; say whether it was attached.

        Raises:
            Unauthorized: callers may not detach it.
        """
        self.config.check_attach(check_bank_name(name))
        self._kept.pop(name, None)
        # there is room now
        self._too_large.clear()
        forgot = self.config.may_attend(name) and await self._rows.detach(name)
        return any(await self._ask("detach_bank", name)) or forgot

    async def banks(self) -> dict[str, dict[str, Any]]:
        """The attached banks that callers may touch: the rows that all workers have, their bytes together.

        Where requests may attend to a bank: the rows kept for that.
        """
        found = {name: dict(state) for name, state in (await self._attached()).items()}
        for name, kept in self._kept.items():
            found.setdefault(name, {})["attended_rows"] = kept.rows
        return {name: found[name] for name in sorted(found) if self.config.may_touch(name)}

    async def stats(self) -> dict[str, Any]:
        """Counters of the workers, added up, and of the requests that came through here."""
        answers = await self._call("memory_stats")
        counters = [{name: answer.get(name, {}) for name in ("streamed", "read", "rows")} for answer in answers]
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
        self.config.check_attends(field.attend)
        if self._made_by is None and (field.write is not None or field.read):
            raise Unsupported(
                f"{FIELD}.write and {FIELD}.read need hidden states, and this engine extracts none: start it without "
                "--attend-only, or with engine_args(…, stream=True)"
            )
        if request.model in self._adapters and (field.write is not None or field.attend):
            raise InvalidInput(
                f"the adapter {request.model!r} changes the model's states, and a bank holds the model's own: ask the "
                f"model itself, or leave {FIELD}.write and {FIELD}.attend out"
            )
        if getattr(request, "use_beam_search", False):
            raise InvalidInput(f"use_beam_search is true, and vLLM's beam search carries no {FIELD}: leave one out")

    async def _serve(self, field: MemoryField) -> tuple[Told, MemoryField]:
        """Look at each bank; return what to tell, and the wish without what can't be served."""
        skipped: list[dict[str, Any]] = []
        writes = await self._ready(self._writable, "write", field, skipped)
        reads = await self._ready(self._readable, "read", field, skipped)
        attends = await self._ready(self._attendable, "attend", field, skipped)
        told: Told = {}
        if writes:
            told["write"] = {"bank": field.write, "stream": field.stream or field.write}
        if reads:
            told["read"] = [{"bank": name, "rows": rows} for name, rows in reads.items()]
        if attends:
            # how many are seen, the engine says at the end
            told["attend"] = {"banks": list(attends), "asked": field.rows}
        if skipped:
            told["skipped"] = skipped
            self.requests["skipped"] += len(skipped)
        write, stream = (field.write, field.stream) if writes else (None, None)
        kept = {"write": write, "stream": stream, "read": list(reads), "attend": list(attends)}
        return told, field.model_copy(update=kept)

    async def _ready(
        self, ready: Callable[[str], Awaitable[int]], use: str, field: MemoryField, skipped: list[dict[str, Any]]
    ) -> dict[str, int]:
        """The banks of one use that can serve, and their rows."""
        asked, found = getattr(field, use) or (), {}
        for name in dict.fromkeys((asked,) if isinstance(asked, str) else asked):
            try:
                found[name] = await ready(name)
            except RaymemError as error:
                if field.required:
                    raise
                skipped.append({"bank": name, "use": use, "code": error.code, "message": error.message})
        return found

    async def _writable(self, name: str) -> int:
        info = await self._look_up(name)
        if info.state == "cold":
            raise detached(name)
        assert self._made_by is not None, "checked before"
        if self._fingerprint is None or (self._fingerprint.done() and self._fingerprint.exception()):
            self._fingerprint = asyncio.create_task(asyncio.to_thread(self._made_by))
        info.spec.fingerprint.accept(await asyncio.shield(self._fingerprint))
        return info.rows

    async def _readable(self, name: str) -> int:
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
        return int(state["rows"])

    async def _attendable(self, name: str) -> int:
        info = await self._look_up(name)
        if info.state == "cold":
            raise detached(name)
        kept = self._kept.get(name)
        if self.config.attach_on_use and kept is None:
            return (await self._attach_rows(name)).rows
        if kept is not None and (kept.created, kept.said) != (info.created, info.rows):
            # the request goes on with the rows that are there
            self._once(f"rows of {name}", lambda: self._load_rows(name))
        return info.rows

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
            async with asyncio.timeout(_STORE_S):
                async with self._connecting:
                    if self._store is None:
                        self._store = await AsyncStore.connect(self.config.store, cold=self.config.cold)
                return await self._store.bank(name).info()
        except TimeoutError as error:
            raise BackendUnavailable(
                f"the store did not say within {_STORE_S:.0f} s whether bank {name!r} is there; try again, or send "
                f'"required": false to go on without it'
            ) from error

    async def _attach(self, name: str) -> dict[str, Any]:
        state: dict[str, Any] = await asyncio.shield(self._once(f"bank {name}", lambda: self._load(name)))
        return state

    async def _attach_rows(self, name: str) -> Kept:
        kept: Kept = await asyncio.shield(self._once(f"rows of {name}", lambda: self._load_rows(name)))
        return kept

    def _once(self, key: str, load: Callable[[], Coroutine[Any, Any, Any]]) -> asyncio.Task[Any]:
        """One attach for all callers that ask for it at the same time; it goes on when they leave."""

        def done(task: asyncio.Task[Any]) -> None:
            del self._attaching[key]
            # callers that left ask for no error
            if not task.cancelled() and (error := task.exception()):
                log.warning("attach failed", what=key, reason=str(error))

        if key not in self._attaching:
            self._attaching[key] = asyncio.create_task(load())
            self._attaching[key].add_done_callback(done)
        return self._attaching[key]

    async def _load(self, name: str) -> dict[str, Any]:
        held = await self._attached()
        taken = sum(state["bytes"] for state in held.values())
        if name not in held and taken >= self.config.attached_bytes:
            raise Overloaded(
                f"{len(held)} attached banks take {taken} bytes, and attached_bytes is {self.config.attached_bytes}: "
                "detach one (POST /v1/raymem/detach), or raise it",
                retry_after_s=1.0,
            )
        states = await self._ask("attach_soon", name)
        while any("loading" in state for state in states):
            await asyncio.sleep(_POLL_S)
            states = await self._ask("attach_soon", name)
        return _together(states)

    async def _load_rows(self, name: str) -> Kept:
        info = await self._look_up(name)
        refused, message = self._too_large.get(name, (float("-inf"), ""))
        if time.monotonic() - refused < _AGAIN_S:
            raise TooLarge(message)
        try:
            attached = await self._rows.attach(name)
        except TooLarge as error:
            # each try computes rows, up to those that don't fit
            self._too_large[name] = time.monotonic(), error.message
            raise
        self._kept[name] = Kept(info.created, info.rows, attached.rows)
        return self._kept[name]

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
