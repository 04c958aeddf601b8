"""What the route files share: the table's routes as decorators, and the bank that a path names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Path, Request

from raymem.client import routes
from raymem.client.routes import Route
from raymem.client.store import AsyncBank, AsyncStore
from raymem.config import GatewaySettings
from raymem.errors import BankNotFound, Conflict, RaymemError, Unsupported
from raymem.host.host import caller
from raymem.serving.errors import documented
from raymem.serving.intake import Transfers
from raymem.serving.recall import RecallModel

# a verb on a bank may find the bank gone, changed meanwhile, or of a kind that refuses it
_OF_A_BANK = (BankNotFound, Conflict, Unsupported)

_BYTES = {"content": {routes.BYTES: {"schema": {"type": "string", "format": "binary"}}}}
# for OpenAPI: a body that a route reads itself
BYTES_BODY = {"requestBody": {"required": True, **_BYTES}}

F = TypeVar("F", bound=Callable[..., Any])


def serve(router: APIRouter, route: Route, *errors: type[RaymemError], **options: Any) -> Callable[[F], F]:
    """Put a handler where the table says, with its errors documented."""
    named = "{bank}" in route.path
    every = (*errors, *(_OF_A_BANK if named else ()))
    told = documented(*every, elsewhere=named)
    return router.api_route(route.path, methods=[route.method], responses=told, **options)


async def get_turn(request: Request) -> asyncio.Semaphore:
    """The semaphore of a caller's slow requests; other callers have their own."""
    turn: asyncio.Semaphore = request.app.state.turns[caller.get()]
    return turn


def bank_name(
    namespace: Annotated[str, Path(examples=["research"])], bank: Annotated[str, Path(examples=["alice"])]
) -> str:
    """The bank that the path names."""
    return f"{namespace}/{bank}"


def _state(name: str) -> Any:
    """A dependency on what `create_app` keeps in the app's state."""

    def get(request: Request) -> Any:
        return getattr(request.app.state, name)

    return Depends(get)


StoreDep = Annotated[AsyncStore, _state("store")]
SettingsDep = Annotated[GatewaySettings, _state("settings")]
TransfersDep = Annotated[Transfers, _state("transfers")]
RecallModelDep = Annotated[RecallModel, _state("recall_model")]
TurnDep = Annotated[asyncio.Semaphore, Depends(get_turn)]
NameDep = Annotated[str, Depends(bank_name)]


def get_bank(store: StoreDep, name: NameDep) -> AsyncBank:
    """A handle on the bank that the path names."""
    return store.bank(name)


BankDep = Annotated[AsyncBank, Depends(get_bank)]
