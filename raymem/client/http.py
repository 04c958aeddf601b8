"""The backend behind a gateway's address: each verb is one HTTP request."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import httpx
import torch
from pydantic import TypeAdapter
from torch import Tensor

from raymem import inputs
from raymem.client import routes, wire
from raymem.client.routes import Route
from raymem.config import GatewaySettings, Settings, check_key
from raymem.encode.calibration import Calibration
from raymem.errors import BackendUnavailable, InvalidInput, Overloaded, RaymemError, StorageError
from raymem.inputs import named
from raymem.memory.learned import Learned
from raymem.retry import retrying
from raymem.rows import AttendedRows, Trace
from raymem.types import (
    Ack,
    AttendedExtent,
    AttendQuery,
    BankInfo,
    BankSpec,
    DrainReport,
    EraseReceipt,
    MemoryTokens,
    MergeReport,
    MigrationReport,
    Readout,
    RebalanceReport,
    RestoreReport,
    Selection,
    ShardInfo,
    SweepReport,
)

N = TypeVar("N", Readout, MemoryTokens)
_INFO = TypeAdapter(BankInfo)
_INFOS = TypeAdapter(list[BankInfo])
_ACK = TypeAdapter(Ack)
_EXTENT = TypeAdapter(AttendedExtent)
_RECEIPT = TypeAdapter(EraseReceipt)
_RECEIPTS = TypeAdapter(list[EraseReceipt])
_SWEEP = TypeAdapter(SweepReport)
_REPORT = TypeAdapter(MigrationReport)
_REBALANCED = TypeAdapter(RebalanceReport)
_MERGED = TypeAdapter(MergeReport)
_RESTORED = TypeAdapter(RestoreReport)
_SHARDS = TypeAdapter(list[ShardInfo])
_DRAINED = TypeAdapter(DrainReport)
_CHUNK_BYTES = 2**20
# a connection is made or refused at once; an answer may take as long as a large bank takes to load
_TIMEOUT = httpx.Timeout(600.0, connect=10.0)


class HttpBackend:
    """Banks behind a gateway; a request that it refuses for now (429) is sent again for `gateway.retry_s` at most."""

    def __init__(self, client: httpx.AsyncClient, settings: GatewaySettings) -> None:
        self._client = client
        self._max_bytes = settings.max_body_bytes
        self._retry_s = settings.retry_s

    @classmethod
    async def connect(cls, address: str, api_key: str | None, settings: Settings) -> HttpBackend:
        """Open a gateway's address.

        Args:
            address: http://host:port or https://….
            api_key: sent with each request.
            settings: `gateway.max_body_bytes` bounds answers, `gateway.retry_s` how long a refusal is waited for.

        Raises:
            BackendUnavailable: nothing answers there, or no raymem gateway.
            ConfigError: the key can't be one.
        """
        headers = {b"Authorization": f"Bearer {check_key(api_key, 'the API key')}".encode()} if api_key else {}
        client = httpx.AsyncClient(base_url=address, headers=headers, timeout=_TIMEOUT)
        backend = cls(client, settings.gateway)
        try:
            await backend._check()
        except BaseException:
            await client.aclose()
            raise
        return backend

    async def create(self, name: str, spec: BankSpec, partitions: int) -> BankInfo:
        """Create a bank and attach it."""
        body = {"name": name, "spec": spec.model_dump(mode="json"), "partitions": partitions}
        return _INFO.validate_json(await self._call(routes.CREATE, json=body))

    async def info(self, name: str) -> BankInfo:
        """One bank's line."""
        return _INFO.validate_json(await self._call(routes.INFO, name))

    async def banks(self, prefix: str) -> list[BankInfo]:
        """The catalog's lines whose names begin with `prefix`."""
        return _INFOS.validate_json(await self._call(routes.BANKS, params={"prefix": prefix}))

    async def delete(self, name: str, materialise: bool) -> None:
        """Remove a bank."""
        await self._call(routes.DELETE, name, params={"materialise": str(materialise).lower()})

    async def write(self, name: str, trace: Trace, durable: bool) -> Ack:
        """Write a trace, as msgpack."""
        body = await asyncio.to_thread(wire.pack, trace, self._max_bytes)
        return await self._write(name, body, routes.MSGPACK, durable)

    async def write_many(self, name: str, traces: list[Trace], durable: bool = True) -> Ack:
        """Write many traces in one request, as an Arrow stream; the Ack is their sum."""
        given = [trace.checked(torch.float32) for trace in traces]
        body = await asyncio.to_thread(wire.traces_to_arrow, given)
        return await self._write(name, body, routes.ARROW, durable)

    async def read(
        self, name: str, hidden_QLD: Tensor, k: int, start: int, as_of: str | float | None, allow_partial: bool
    ) -> Readout:
        """Read a bank, in tensors both ways."""
        asked = {"hidden": hidden_QLD, "k": k, "start": start, "as_of": as_of, "allow_partial": allow_partial}
        return await self._asked(routes.READ, name, asked, Readout)

    async def attend(self, name: str, query: AttendQuery, as_of: str | float | None) -> MemoryTokens:
        """Choose rows to attend to, in tensors both ways."""
        return await self._asked(routes.ATTEND, name, {"query": query, "as_of": as_of}, MemoryTokens)

    async def put_rows(self, name: str, rows: AttendedRows) -> AttendedExtent:
        """Keep keys and values of rows."""
        body = await asyncio.to_thread(wire.pack, rows, self._max_bytes)
        answer = await self._call(routes.PUT_ROWS, name, content=body, headers={"Content-Type": routes.MSGPACK})
        return _EXTENT.validate_json(answer)

    async def recall(
        self, name: str, text: str, k: int, as_of: str | None = None, allow_partial: bool = False
    ) -> dict[str, Any]:
        """Ask a bank in text; the gateway's model reads it."""
        asked = named("text", inputs.text, text)
        body = {"text": asked, "k": k, "as_of": named("as_of", inputs.as_of, as_of), "allow_partial": allow_partial}
        return await self._json(routes.RECALL, name, json=body)

    async def attach(self, name: str, node: str | None) -> BankInfo:
        """Load a bank."""
        return _INFO.validate_json(await self._call(routes.ATTACH, name, json={"node": node}))

    async def detach(self, name: str) -> BankInfo:
        """Flush, snapshot, free."""
        return _INFO.validate_json(await self._call(routes.DETACH, name))

    async def migrate(self, name: str, to: str, partition: int | None) -> MigrationReport:
        """Move a bank to another node, or a partition of it."""
        body = {"to": to, "partition": partition}
        return _REPORT.validate_json(await self._call(routes.MIGRATE, name, json=body))

    async def grow(self, name: str, partitions: int) -> BankInfo:
        """Add empty partitions."""
        return _INFO.validate_json(await self._call(routes.GROW, name, json={"partitions": partitions}))

    async def rebalance(self, name: str) -> RebalanceReport:
        """Even out the partitions."""
        return _REBALANCED.validate_json(await self._call(routes.REBALANCE, name))

    async def pin(self, name: str, pinned: bool) -> BankInfo:
        """Keep a bank in memory when room is needed, or no longer."""
        return _INFO.validate_json(await self._call(routes.PIN, name, json={"pinned": pinned}))

    async def tag(self, name: str, tag: str) -> dict[str, int]:
        """Name the present position."""
        tags: dict[str, int] = (await self._json(routes.TAG, name, json={"tag": tag}))["tags"]
        return tags

    async def untag(self, name: str, tag: str) -> dict[str, int]:
        """Forget a tag."""
        tags: dict[str, int] = (await self._json(routes.UNTAG, name, json={"tag": tag}))["tags"]
        return tags

    async def restore(self, name: str, at: str | int) -> RestoreReport:
        """Go back to a tag or position."""
        return _RESTORED.validate_json(await self._call(routes.RESTORE, name, json={"at": at}))

    async def fork(self, source: str, target: str, at: str | int | None) -> BankInfo:
        """Create a fork."""
        return _INFO.validate_json(await self._call(routes.FORK, source, json={"target": target, "at": at}))

    async def materialise(self, name: str) -> BankInfo:
        """Give a fork a journal of its own."""
        return _INFO.validate_json(await self._call(routes.MATERIALISE, name))

    async def merge(self, target: str, sources: list[str], rebuild: bool, rename: bool) -> MergeReport:
        """Create a bank from several."""
        body = {"target": target, "sources": sources, "rebuild": rebuild, "rename": rename}
        return _MERGED.validate_json(await self._call(routes.MERGE, json=body))

    async def digest(self, name: str) -> str:
        """sha256 of the bank's state."""
        return str((await self._json(routes.DIGEST, name))["digest"])

    async def tokens(self, name: str, stream: str, run: str, seq_from: int, seq_to: int) -> Tensor:
        """Token ids of a run's rows."""
        params = {"stream": stream, "run": run, "seq_from": seq_from, "seq_to": seq_to}
        found = await self._json(routes.TOKENS, name, params=params)
        return torch.tensor(found["tokens"], dtype=torch.int64)

    async def export(self, name: str, path: Path) -> int:
        """Download a bank into a file that appears whole or not at all; return its bytes."""
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as out:
                part = Path(out.name)
                try:
                    await retrying(lambda: self._download(routes.EXPORT.url(name), out), Overloaded, self._retry_s)
                    out.flush()
                    os.replace(part, path)
                finally:
                    part.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"can't write {path}: {error}") from error
        return path.stat().st_size

    async def import_(self, path: Path, name: str) -> BankInfo:
        """Upload an exported file, piece by piece."""
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                headers = {"Content-Type": routes.BYTES, "Content-Length": str(size)}
                answer = await self._call(routes.IMPORT, name, content=_FileBytes(file), headers=headers)
        except OSError as error:
            raise InvalidInput(f"can't read {path}: {error}") from error
        return _INFO.validate_json(answer)

    async def erase(self, name: str, what: Selection, rebuild: bool) -> EraseReceipt:
        """Erase rows of a bank."""
        body = dataclasses.asdict(what) | {"rebuild": rebuild}
        # where runs were cut is for forks, which the gateway finds
        del body["starts"]
        return _RECEIPT.validate_json(await self._call(routes.ERASE, name, json=body))

    async def receipts(self, name: str, forget_names: bool) -> list[EraseReceipt]:
        """What was erased in a bank."""
        route = routes.FORGET_NAMES if forget_names else routes.RECEIPTS
        return _RECEIPTS.validate_json(await self._call(route, name))

    async def set_ttl(self, name: str, ttl_s: float | None) -> BankInfo:
        """Let rows expire."""
        return _INFO.validate_json(await self._call(routes.TTL, name, json={"ttl_s": ttl_s}))

    async def sweep(self, dry_run: bool) -> SweepReport:
        """Delete what the catalog doesn't name."""
        return _SWEEP.validate_json(await self._call(routes.SWEEP, params={"dry_run": str(dry_run).lower()}))

    async def put_calibration(self, calibration: Calibration) -> str:
        """Keep a calibration."""
        headers = {"Content-Type": routes.BYTES}
        kept = await self._json(routes.PUT_CALIBRATION, content=calibration.check().to_bytes(), headers=headers)
        return str(kept["hash"])

    async def calibration(self, content: str, layers: tuple[int, ...]) -> Calibration:
        """The store's calibration for a model's content hash and layers."""
        params = {"content": content, "layers": list(layers)}
        return Calibration.from_bytes(await self._call(routes.CALIBRATION, params=params))

    async def put_params(self, learned: Learned) -> str:
        """Keep weights."""
        headers = {"Content-Type": routes.BYTES}
        kept = await self._json(routes.PUT_PARAMS, content=learned.check().to_bytes(), headers=headers)
        return str(kept["params"])

    async def params(self, params: str) -> Learned:
        """Weights by their name."""
        return Learned.from_bytes(await self._call(routes.PARAMS, params={"params": params}), params)

    async def nodes(self) -> list[str]:
        """Where banks can live."""
        found: list[str] = (await self._json(routes.NODES))["nodes"]
        return found

    async def shards(self) -> list[ShardInfo]:
        """The processes behind the gateway that banks are hot in."""
        return _SHARDS.validate_json(await self._call(routes.SHARDS))

    async def drain(self, node: str, undo: bool) -> DrainReport:
        """Move every bank away from a node."""
        return _DRAINED.validate_json(await self._call(routes.DRAIN, json={"node": node, "undo": undo}))

    async def stats(self) -> dict[str, Any]:
        """The counters behind the gateway."""
        return await self._json(routes.STATS)

    async def close(self) -> None:
        """Drop the connections; the banks stay where they are."""
        await self._client.aclose()

    def abandon(self) -> None:
        """The connections went with their event loop."""

    async def _check(self) -> None:
        address = self._client.base_url
        fix = f"start one with `raymem serve` or correct the address {str(address)!r}"
        try:
            answer = await self._client.get(routes.HEALTH.path)
            service = answer.json().get("service") if answer.is_success else None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise BackendUnavailable(f"no gateway at {address}: {error or type(error).__name__}; {fix}") from error
        except (ValueError, AttributeError):
            service = None
        if service != "raymem":
            raise BackendUnavailable(f"what answers at {address} is no raymem gateway; {fix}")

    async def _write(self, name: str, body: bytes, kind: str, durable: bool) -> Ack:
        params = {"durable": str(durable).lower()}
        headers = {"Content-Type": kind}
        return _ACK.validate_json(await self._call(routes.WRITE, name, content=body, params=params, headers=headers))

    async def _asked(self, route: Route, name: str, question: dict[str, Any], noun: type[N]) -> N:
        """A question in tensors, and the noun that answers it."""
        body = wire.pack(question, self._max_bytes)
        headers = {"Content-Type": routes.MSGPACK, "Accept": routes.MSGPACK}
        answer = await self._call(route, name, content=body, headers=headers)
        try:
            found = wire.unpack(answer, self._max_bytes)
        except InvalidInput as error:
            # the caller did nothing wrong
            raise BackendUnavailable(f"{self._client.base_url} answered with this: {error.message}") from error
        if not isinstance(found, noun):
            raise BackendUnavailable(f"{self._client.base_url} answered {route.path} with a {type(found).__name__}")
        return found

    async def _json(self, route: Route, name: str = "", **request: Any) -> dict[str, Any]:
        found: dict[str, Any] = TypeAdapter(dict[str, Any]).validate_json(await self._call(route, name, **request))
        return found

    async def _call(self, route: Route, name: str = "", **request: Any) -> bytes:
        return await retrying(lambda: self._once(route, name, request), Overloaded, self._retry_s)

    async def _once(self, route: Route, name: str, request: dict[str, Any]) -> bytes:
        try:
            answer = await self._client.request(route.method, route.url(name), **request)
        except httpx.HTTPError as error:
            raise self._gone(error) from error
        if not answer.is_success:
            raise _error(answer)
        return answer.content

    async def _download(self, url: str, out: Any) -> None:
        try:
            async with self._client.stream("GET", url) as answer:
                if not answer.is_success:
                    await answer.aread()
                    raise _error(answer)
                async for chunk in answer.aiter_bytes(_CHUNK_BYTES):
                    await asyncio.to_thread(out.write, chunk)
        except httpx.HTTPError as error:
            raise self._gone(error) from error

    def _gone(self, error: httpx.HTTPError) -> BackendUnavailable:
        return BackendUnavailable(
            f"the gateway at {self._client.base_url} can't be reached: {error or type(error).__name__}; "
            "see whether `raymem serve` still runs there"
        )


def _error(answer: httpx.Response) -> RaymemError:
    try:
        return RaymemError.from_wire(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        what = f"{answer.url} answered {answer.status_code}: {answer.text[:200]!r}"
    # a proxy in front of the gateway can be too busy as well
    if answer.status_code == Overloaded.http_status:
        return Overloaded(what, retry_after_s=_retry_after_s(answer.headers.get("Retry-After", "")))
    return BackendUnavailable(what)


def _retry_after_s(said: str) -> float:
    # the other form, a date, needs two clocks that agree
    return float(said) if said.isdecimal() else 1.0


class _FileBytes:
    """A file's bytes, from its beginning each time that they are sent."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self._file.seek(0)
        while piece := await asyncio.to_thread(self._file.read, _CHUNK_BYTES):
            yield piece
