"""Routes of whole banks: create, list, show, delete, move, tag, erase, export, import; and their history."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask

from raymem.client import routes
from raymem.errors import (
    BankDetached,
    BankExists,
    BankNotFound,
    CalibrationNotFound,
    Conflict,
    Corrupt,
    FingerprintMismatch,
    InvalidInput,
    InvalidName,
    InvalidSpec,
    NotOwner,
    StorageError,
    TagNotFound,
    Unsupported,
)
from raymem.host.host import caller
from raymem.serving.intake import Intake
from raymem.serving.routes.common import BYTES_BODY, BankDep, NameDep, StoreDep, TransfersDep, serve
from raymem.serving.schemas import (
    Attach,
    Create,
    Digest,
    Erase,
    Fork,
    Grow,
    Merge,
    Migrate,
    Pin,
    Restore,
    Tag,
    Tags,
    Ttl,
)
from raymem.types import BankInfo, EraseReceipt, MergeReport, MigrationReport, RebalanceReport, RestoreReport

router = APIRouter(tags=["banks"], route_class=Intake)
history = APIRouter(tags=["history"], route_class=Intake)


@serve(router, routes.BANKS)
async def banks(store: StoreDep, prefix: str = "") -> list[BankInfo]:
    """List the banks whose names begin with `prefix`, by name."""
    return await store.banks(prefix)


@serve(
    router,
    routes.CREATE,
    *(BankExists, CalibrationNotFound, InvalidName, InvalidSpec, StorageError, Unsupported),
    status_code=201,
)
async def create(store: StoreDep, body: Create) -> BankInfo:
    """Create a bank and attach it."""
    return await (await store.create(body.name, body.spec, partitions=body.partitions)).info()


@serve(router, routes.INFO, BankNotFound, InvalidName)
async def show(bank: BankDep) -> BankInfo:
    """Show one bank: its spec, where it is, its rows and tags."""
    return await bank.info()


@serve(router, routes.DELETE, BankNotFound, Conflict, InvalidName, StorageError, status_code=204)
async def delete(store: StoreDep, name: NameDep, materialise: bool = False) -> Response:
    """Remove a bank with all its rows, snapshots and tags; `materialise` first copies to its forks what they read."""
    await store.delete(name, materialise=materialise)
    return Response(status_code=204)


@serve(router, routes.ATTACH, BankNotFound, InvalidName, Corrupt, StorageError)
async def attach(bank: BankDep, body: Attach | None = None) -> BankInfo:
    """Load a bank from the cold store."""
    return await bank.attach(body.node if body else None)


@serve(router, routes.DETACH, BankNotFound, BankDetached, InvalidName, StorageError)
async def detach(bank: BankDep) -> BankInfo:
    """Settle a bank, write its state down, free its memory."""
    return await bank.detach()


@serve(router, routes.MIGRATE, BankNotFound, BankDetached, InvalidName, StorageError)
async def migrate(bank: BankDep, body: Migrate) -> MigrationReport:
    """Move a bank to another node while it is read, or one of its partitions."""
    return await bank.migrate(body.to, partition=body.partition)


@serve(router, routes.GROW, BankNotFound, InvalidName, StorageError, Unsupported)
async def grow(bank: BankDep, body: Grow) -> BankInfo:
    """Add empty partitions to a partitioned bank; no stream moves."""
    return await bank.grow(body.partitions)


@serve(router, routes.REBALANCE, BankNotFound, BankDetached, Conflict, InvalidName, StorageError, Unsupported)
async def rebalance(bank: BankDep) -> RebalanceReport:
    """Move streams between partitions until none has much more than its share of the rows."""
    return await bank.rebalance()


@serve(router, routes.PIN, BankNotFound, InvalidName, StorageError)
async def pin(bank: BankDep, body: Pin) -> BankInfo:
    """Keep a bank in memory when room is needed, or no longer."""
    return await (bank.pin() if body.pinned else bank.unpin())


@serve(router, routes.TAG, BankNotFound, InvalidName, StorageError)
async def tag(bank: BankDep, body: Tag) -> Tags:
    """Name the journal's present position."""
    return Tags(tags=await bank.tag(body.tag))


@serve(router, routes.ERASE, BankNotFound, InvalidName, NotOwner, StorageError, Unsupported)
async def erase(bank: BankDep, body: Erase) -> EraseReceipt:
    """Erase rows for good: a stream, a run, a few rows of it, or what is old. The receipt says how that is known."""
    return await bank.erase(**body.model_dump())


@serve(router, routes.RECEIPTS, InvalidName)
async def receipts(bank: BankDep) -> list[EraseReceipt]:
    """List the receipts of what was erased in a bank, oldest first; they outlive the bank."""
    return await bank.receipts()


@serve(router, routes.FORGET_NAMES, InvalidName, StorageError)
async def forget_names(bank: BankDep) -> list[EraseReceipt]:
    """Put salted digests for the names of streams and runs in receipts that are finished; list all receipts."""
    return await bank.receipts(forget_names=True)


@serve(router, routes.TTL, BankNotFound, InvalidName, NotOwner, StorageError)
async def set_ttl(bank: BankDep, body: Ttl) -> BankInfo:
    """Let rows expire that are older than so many seconds, or none."""
    return await bank.set_ttl(body.ttl_s)


@serve(router, routes.DIGEST, BankNotFound, BankDetached, InvalidName)
async def digest(bank: BankDep) -> Digest:
    """Hash the bank's whole state: equal digests mean byte-identical states."""
    return Digest(digest=await bank.digest())


@serve(router, routes.EXPORT, BankNotFound, InvalidName, StorageError, response_class=FileResponse)
async def export(bank: BankDep, transfers: TransfersDep) -> FileResponse:
    """Download a bank as one file."""
    with ExitStack() as held:
        held.enter_context(transfers.one(caller.get()))
        folder = held.enter_context(tempfile.TemporaryDirectory(prefix="raymem-export-"))
        file = Path(folder) / f"{bank.name.replace('/', '.')}.raymem"
        await bank.export(file)
        # the file goes, and its place, when the answer has been sent
        done = BackgroundTask(held.pop_all().close)
        return FileResponse(file, media_type=routes.BYTES, filename=file.name, background=done)


@serve(
    router,
    routes.IMPORT,
    *(BankExists, Corrupt, InvalidName, InvalidSpec, StorageError),
    status_code=201,
    openapi_extra=BYTES_BODY,
)
async def import_(store: StoreDep, name: NameDep, request: Request, transfers: TransfersDep) -> BankInfo:
    """Create a bank from an exported file, checked whole before anything becomes visible; it starts detached."""
    with transfers.one(caller.get()), tempfile.TemporaryDirectory(prefix="raymem-import-") as folder:
        file = Path(folder) / "bank.raymem"
        await _receive(request.stream(), file)
        return await (await store.import_(file, name)).info()


@serve(history, routes.UNTAG, BankNotFound, InvalidName, TagNotFound, StorageError)
async def untag(bank: BankDep, body: Tag) -> Tags:
    """Forget a tag."""
    return Tags(tags=await bank.untag(body.tag))


@serve(history, routes.RESTORE, BankNotFound, InvalidInput, InvalidName, TagNotFound, StorageError)
async def restore(bank: BankDep, body: Restore) -> RestoreReport:
    """Go back to a tag or position; what came after stays in a bank of its own, which the answer names."""
    return await bank.restore(body.at)


@serve(
    history,
    routes.FORK,
    BankExists,
    BankNotFound,
    InvalidInput,
    InvalidName,
    TagNotFound,
    StorageError,
    status_code=201,
)
async def fork(store: StoreDep, name: NameDep, body: Fork) -> BankInfo:
    """Create a bank that begins with this one's rows; none is copied."""
    return await (await store.fork(name, body.target, body.at)).info()


@serve(history, routes.MATERIALISE, BankNotFound, InvalidName, StorageError)
async def materialise(bank: BankDep) -> BankInfo:
    """Copy what a fork inherited into its own journal, so that it needs its parent no more."""
    return await bank.materialise()


@serve(
    history,
    routes.MERGE,
    *(BankExists, BankNotFound, FingerprintMismatch, InvalidName, InvalidSpec, StorageError, Unsupported),
    status_code=201,
)
async def merge(store: StoreDep, body: Merge) -> MergeReport:
    """Create a bank from the rows of several, in the order of their times."""
    return await store.merge(body.target, body.sources, rebuild=body.rebuild, rename=body.rename)


async def _receive(chunks: AsyncIterator[bytes], file: Path) -> None:
    try:
        with file.open("wb") as out:
            async for chunk in chunks:
                await asyncio.to_thread(out.write, chunk)
    except OSError as error:
        raise StorageError(f"can't keep the upload: {error}; free some space in {file.parent.parent}") from error
