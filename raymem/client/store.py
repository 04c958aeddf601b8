"""`connect()` gives a Store, a Store gives Banks: the verbs of a store, async and blocking."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, ParamSpec, Self

from pydantic import BeforeValidator

from raymem.client.bank import AsyncBank as AsyncBank
from raymem.client.bank import Bank as Bank
from raymem.client.bank import Blocking, Handle, LoopThread, blocking, checked
from raymem.config import Settings, check_key
from raymem.encode.calibration import Calibration
from raymem.errors import ConfigError
from raymem.inputs import (
    BankName,
    BankNames,
    FilePath,
    Flag,
    Label,
    Layers,
    Partitions,
    Place,
    Prefix,
    bank_name,
    instance,
    named,
    shown,
)
from raymem.memory.learned import Learned
from raymem.types import BankInfo, BankSpec, DrainReport, MergeReport, ShardInfo, SweepReport, check_spec

if TYPE_CHECKING:
    from raymem.client.bank import Backend

AnySpec = Annotated[BankSpec, BeforeValidator(check_spec)]
_Calibration = Annotated[Calibration, BeforeValidator(instance(Calibration))]
_Learned = Annotated[Learned, BeforeValidator(instance(Learned))]
_HTTP = ("http://", "https://")
P = ParamSpec("P")


def connect(
    uri: str | Path, *, cold: str | None = None, api_key: str | None = None, settings: Settings | None = None
) -> Store:
    """Open memory.

    Args:
        uri: a folder or object-store address (banks in this process), `"ray"` or `ray://host:port` (shards are actors
            of that Ray cluster), or `http://…` / `https://…` (through a gateway).
        cold: with Ray, the cold store that all nodes share.
        api_key: with HTTP, the key to send.
        settings: limits and sizes; read from file and environment by default.

    Raises:
        ConfigError: arguments that don't go together. BackendUnavailable: no Ray cluster or gateway there.
    """
    loop = LoopThread()
    try:
        store = loop.run(AsyncStore.connect(uri, cold=cold, api_key=api_key, settings=settings))
    except BaseException:
        loop.close()
        raise
    return Store(store, loop)


@checked
class AsyncStore:
    """Named memory banks, wherever they live; see `connect` for the addresses."""

    def __init__(self, backend: Backend) -> None:
        self._handle = Handle(backend)

    @property
    def backend(self) -> Backend:
        """What it works through; StoreClosed is raised where it can't be used, see `Handle`."""
        return self._handle.backend

    @classmethod
    async def connect(
        cls, uri: str | Path, *, cold: str | None = None, api_key: str | None = None, settings: Settings | None = None
    ) -> AsyncStore:
        """As `raymem.connect`, on the running event loop."""
        address = _check_address(uri, cold, api_key, settings)
        return cls(await _open_backend(address, cold, api_key, settings or Settings.load()))

    async def create(self, name: BankName, spec: AnySpec, *, partitions: Partitions = 1) -> AsyncBank:
        """Create a bank and attach it.

        Args:
            name: namespace/name.
            spec: what the bank is.
            partitions: over so many shards its rows are spread, a stream in one; each has the budget of the spec.

        Raises:
            InvalidName, InvalidSpec, BankExists, CalibrationNotFound: nothing was created.
            Unsupported: partitions of a kind that keeps no rows.
        """
        await self.backend.create(name, spec, partitions)
        return AsyncBank(self._handle, name)

    def bank(self, name: BankName) -> AsyncBank:
        """A handle on a bank; it is looked up on first use."""
        return AsyncBank(self._handle, named("name", bank_name, name))

    async def banks(self, prefix: Prefix = "") -> list[BankInfo]:
        """The catalog, by name; `prefix` may be a namespace with its slash."""
        return await self.backend.banks(prefix)

    async def delete(self, name: BankName, *, materialise: Flag = False) -> None:
        """Remove a bank with all its rows, snapshots and tags; its forks keep what they have with `materialise`.

        Raises:
            Conflict: it has forks, which read its rows, and `materialise` is False.
        """
        await self.backend.delete(name, materialise)

    async def fork(self, source: BankName, target: BankName, at: Place | None = None) -> AsyncBank:
        """Create a bank that begins with another's rows, up to a tag or position; no row is copied.

        It is attached if the source is, and goes its own way from there.

        Args:
            source: the bank to begin with; it may be written meanwhile, and may be a fork.
            target: the new bank's name.
            at: a tag or a position; the present position by default.

        Raises:
            BankExists, BankNotFound, TagNotFound, InvalidInput: nothing was created.
        """
        await self.backend.fork(source, target, at)
        return AsyncBank(self._handle, target)

    async def merge(
        self, target: BankName, sources: BankNames, *, rebuild: Flag = False, rename: Flag = True
    ) -> MergeReport:
        """Create a bank from the rows that several have now, in the order of their times.

        Args:
            target: the new bank's name.
            sources: banks of one spec; row kinds may differ in budget, and the new bank gets the sum.
            rebuild: make the state of the rows also where the kind could merge the states; some kinds need it.
            rename: put each bank's name before its streams (`alice/…`). Without, rows under the same name and with the
                same content are kept once, and of those with other content the first bank's: the report says which.

        Raises:
            Unsupported: banks of this kind don't merge without `rebuild`, and why.
            FingerprintMismatch, InvalidSpec: naming what differs. BankExists, BankNotFound: nothing was created.
        """
        return await self.backend.merge(target, list(sources), rebuild, rename)

    async def import_(self, path: FilePath, name: BankName) -> AsyncBank:
        """Create a bank from an exported file; it starts detached.

        Raises:
            Corrupt: the file is damaged or cut short; nothing was created.
        """
        await self.backend.import_(Path(path), name)
        return AsyncBank(self._handle, name)

    async def sweep(self, *, dry_run: Flag = False) -> SweepReport:
        """Delete tables that the catalog doesn't name, once they are old enough, and finish erasures cut short.

        Owners do so by themselves now and then.
        """
        return await self.backend.sweep(dry_run)

    async def put_calibration(self, calibration: _Calibration) -> str:
        """Keep a calibration in the store; return its hash."""
        return await self.backend.put_calibration(calibration)

    async def calibration(self, content: Label, layers: Layers) -> Calibration:
        """The store's calibration for a model's content hash and layers.

        Raises:
            CalibrationNotFound: naming the command that makes one.
        """
        return await self.backend.calibration(content, tuple(layers))

    async def put_params(self, learned: _Learned) -> str:
        """Keep weights that were trained elsewhere; return their name, `sha256:…`, for `BankSpec.params`."""
        return await self.backend.put_params(learned)

    async def params(self, params: Label) -> Learned:
        """The weights of that name.

        Raises:
            NotFound, Corrupt: the store has none, or their bytes don't have that hash.
        """
        return await self.backend.params(params)

    async def nodes(self) -> list[str]:
        """Where banks can live."""
        return await self.backend.nodes()

    async def shards(self) -> list[ShardInfo]:
        """The processes that banks are hot in, and the memory each has."""
        return await self.backend.shards()

    async def drain(self, node: Label, *, undo: Flag = False) -> DrainReport:
        """Move every bank away from a node, live; it takes no new ones until this is called with `undo`.

        Raises:
            InvalidInput: there is no such node. Conflict: no other node can take its banks.
        """
        return await self.backend.drain(node, undo)

    async def stats(self) -> dict[str, Any]:
        """Counters of the backend, its shards and their banks."""
        return await self.backend.stats()

    async def close(self) -> None:
        """Close: a local store flushes its banks, other backends disconnect. Closing twice is fine.

        Raises:
            StorageError: rows that were accepted with `durable=False` could not be written; everything else was closed.
        """
        await self._handle.close()


def opening(
    verb: Callable[Concatenate[AsyncStore, P], Coroutine[Any, Any, AsyncBank]],
) -> Callable[Concatenate[Store, P], Bank]:
    """As `blocking`, for a verb that gives a bank."""
    opened = blocking(verb)

    @functools.wraps(opened)
    def call(self: Store, /, *args: P.args, **kwargs: P.kwargs) -> Bank:
        return Bank(opened(self, *args, **kwargs), self._loop)

    call.__dict__["__signature__"] = inspect.signature(verb).replace(return_annotation="Bank")
    return call


class Store(Blocking[AsyncStore]):
    """Named memory banks, by verbs that block, for scripts and threads; a context manager that closes itself.

    Each verb is that of AsyncStore.
    """

    def __init__(self, store: AsyncStore, loop: LoopThread) -> None:
        super().__init__(store, loop)
        loop.close_with(store.close)

    create = opening(AsyncStore.create)
    fork = opening(AsyncStore.fork)
    import_ = opening(AsyncStore.import_)
    banks = blocking(AsyncStore.banks)
    delete = blocking(AsyncStore.delete)
    merge = blocking(AsyncStore.merge)
    sweep = blocking(AsyncStore.sweep)
    put_calibration = blocking(AsyncStore.put_calibration)
    calibration = blocking(AsyncStore.calibration)
    put_params = blocking(AsyncStore.put_params)
    params = blocking(AsyncStore.params)
    nodes = blocking(AsyncStore.nodes)
    shards = blocking(AsyncStore.shards)
    drain = blocking(AsyncStore.drain)
    stats = blocking(AsyncStore.stats)

    def bank(self, name: BankName) -> Bank:
        """As `AsyncStore.bank`."""
        return Bank(self._async.bank(name), self._loop)

    def close(self) -> None:
        """As `AsyncStore.close`; closing twice is fine."""
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_address(uri: object, cold: object, api_key: object, settings: object) -> str:
    """The address as text, if it and what comes with it go together.

    Raises:
        ConfigError: naming the value.
    """
    address = os.fspath(uri) if isinstance(uri, str | os.PathLike) else None
    if not isinstance(address, str) or not _is_text(address):
        raise ConfigError(f"uri is {shown(uri)}; give a folder, 'ray', or an http:// address")
    if cold is not None and not (isinstance(cold, str | os.PathLike) and _is_text(os.fspath(cold))):
        raise ConfigError(f"cold is {shown(cold)}; give text, without line breaks and other controls")
    # what it is must not be told: errors are logged
    if api_key is not None and not isinstance(api_key, str):
        raise ConfigError(f"the API key (api_key) is a {type(api_key).__name__}; give text")
    if api_key:
        check_key(api_key, "the API key (api_key)")
    if not isinstance(settings, Settings | None):
        raise ConfigError(f"settings are {shown(settings)}; give raymem.Settings")
    if api_key is not None and not address.startswith(_HTTP):
        raise ConfigError(f"api_key goes with an http:// address, not with {address!r}")
    if cold is not None and not _is_ray(address):
        raise ConfigError(f"cold={str(cold)!r} goes with 'ray'; {address!r} is its own cold store")
    return address


async def _open_backend(address: str, cold: str | None, api_key: str | None, settings: Settings) -> Backend:
    """The backend that an address means: the one place that names rooms above its own, each imported when asked for."""
    if address.startswith(_HTTP):
        from raymem.client.http import HttpBackend

        return await HttpBackend.connect(address, api_key, settings)
    if _is_ray(address):
        from raymem.actors.backend import RayBackend

        return await RayBackend.connect(address, None if cold is None else os.fspath(cold), settings)
    from raymem.client.local import LocalBackend

    return await asyncio.to_thread(LocalBackend, address, settings)


def _is_ray(address: str) -> bool:
    return address == "ray" or address.startswith("ray://")


def _is_text(given: str | bytes) -> bool:
    if not isinstance(given, str) or not given or any(each < " " or each == "\x7f" for each in given):
        return False
    try:
        # a folder's name may have bytes that are no text
        os.fsencode(given)
    except UnicodeEncodeError:
        return False
    return True
