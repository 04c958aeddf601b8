"""A bank's past: forget tags, go back, fork."""

from __future__ import annotations

from fastapi import APIRouter

from raymem.client import routes
from raymem.errors import (
    BankExists,
    BankNotFound,
    FingerprintMismatch,
    InvalidInput,
    InvalidName,
    InvalidSpec,
    StorageError,
    TagNotFound,
    Unsupported,
)
from raymem.serving.intake import Intake
from raymem.serving.routes.common import BankDep, NameDep, StoreDep, serve
from raymem.serving.schemas import Fork, Merge, Restore, Tag, Tags
from raymem.types import BankInfo, MergeReport, RestoreReport

router = APIRouter(tags=["history"], route_class=Intake)


@serve(router, routes.UNTAG, BankNotFound, InvalidName, TagNotFound, StorageError)
async def untag(bank: BankDep, body: Tag) -> Tags:
    """Forget a tag."""
    return Tags(tags=await bank.untag(body.tag))


@serve(router, routes.RESTORE, BankNotFound, InvalidInput, InvalidName, TagNotFound, StorageError)
async def restore(bank: BankDep, body: Restore) -> RestoreReport:
    """Go back to a tag or position; what came after stays in a bank of its own, which the answer names."""
    return await bank.restore(body.at)


@serve(
    router, routes.FORK, BankExists, BankNotFound, InvalidInput, InvalidName, TagNotFound, StorageError, status_code=201
)
async def fork(store: StoreDep, name: NameDep, body: Fork) -> BankInfo:
    """Create a bank that begins with this one's rows; none is copied."""
    return await (await store.fork(name, body.target, body.at)).info()


@serve(router, routes.MATERIALISE, BankNotFound, InvalidName, StorageError)
async def materialise(bank: BankDep) -> BankInfo:
    """Copy what a fork inherited into its own journal, so that it needs its parent no more."""
    return await bank.materialise()


@serve(
    router,
    routes.MERGE,
    *(BankExists, BankNotFound, FingerprintMismatch, InvalidName, InvalidSpec, StorageError, Unsupported),
    status_code=201,
)
async def merge(store: StoreDep, body: Merge) -> MergeReport:
    """Create a bank from the rows of several, in the order of their times."""
    return await store.merge(body.target, body.sources, rebuild=body.rebuild, rename=body.rename)
