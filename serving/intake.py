"""How bodies are read: counted while they arrive, and checked for size and complexity before they are parsed."""

from __future__ import annotations

import asyncio
import functools
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import pydantic_core
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from raymem.client import routes
from raymem.config import GatewaySettings
from raymem.errors import InvalidInput, Overloaded, TooLarge
from raymem.host.host import caller
from raymem.serving.errors import NOT_HTTP, Carried

T = TypeVar("T")
# slow requests of one caller at a time: they take threads that all callers share, a recall takes the one model
SLOW_AT_ONCE = 2
# the longest command is a question of 100,000 characters, each escaped
_COMMAND_BYTES = 2**20
# smaller bodies are read on the event loop: a thread and back takes longer
_SMALL_BYTES = 2**16


class Complexity(NamedTuple):
    """How much JSON may hold: objects, lists and keys; values between commas; and keys alone."""

    structure: int
    values: int
    keys: int


# an object costs a hundred times as much as a number; one body blocks the interpreter for 0.1 s at most
COMMAND = Complexity(structure=2**13, values=2**14, keys=2**10)
ROWS = Complexity(structure=2**15, values=2**19, keys=2**6)


class Budget:
    """A limit on the bytes of bodies in memory at one time, of all callers and of each."""

    def __init__(self, settings: GatewaySettings) -> None:
        self._all = max(settings.max_held_bytes, settings.max_body_bytes)
        self._each = max(settings.max_held_bytes // 2, settings.max_body_bytes)
        self._held: dict[str, int] = {}

    @contextmanager
    def share(self, who: str) -> Iterator[Callable[[int], None]]:
        """Yield a function that takes bytes for a caller; the end of the block returns them all."""
        taken = 0

        def take(nbytes: int) -> None:
            nonlocal taken
            mine, held = self._held.get(who, 0), sum(self._held.values())
            if mine + nbytes > self._each or held + nbytes > self._all:
                raise Overloaded(
                    f"the gateway holds {held} bytes of bodies, {mine} of them yours; the limits are {self._all} and "
                    f"{self._each}: wait for some to finish",
                    retry_after_s=1.0,
                )
            self._held[who] = mine + nbytes
            taken += nbytes

        try:
            yield take
        finally:
            left = self._held.pop(who, 0) - taken
            if left > 0:
                self._held[who] = left


class Transfers:
    """A limit on concurrent uploads and downloads through a temporary file, of all callers and of each."""

    def __init__(self, in_all: int = 32, each: int = 8) -> None:
        self._in_all = in_all
        self._each = each
        self._running: Counter[str] = Counter()

    @contextmanager
    def one(self, who: str) -> Iterator[None]:
        """Hold a place while the block runs.

        Raises:
            Overloaded: there are too many.
        """
        if self._running.total() >= self._in_all or self._running[who] >= self._each:
            raise Overloaded(
                f"{self._running.total()} imports and exports are under way, {self._running[who]} of them yours; the "
                f"limits are {self._in_all} and {self._each}: wait for some to finish",
                retry_after_s=1.0,
            )
        self._running[who] += 1
        try:
            yield
        finally:
            self._running[who] -= 1
            # drops callers without a transfer
            self._running += Counter()


class BoundedRequest(Request):
    """A request whose body is counted while it arrives, and whose JSON is checked before it is parsed."""

    def __init__(self, request: Request, take: Callable[[int], None]) -> None:
        super().__init__(request.scope, request.receive)
        self._take = take

    async def body(self) -> bytes:
        """The whole body.

        Raises:
            Carried: TooLarge, Overloaded, or InvalidInput when the caller left.
        """
        if not hasattr(self, "_body"):
            self._body = await self._read()
        return self._body

    async def json(self) -> Any:
        """A command's body: JSON of little depth and few values.

        Raises:
            Carried: InvalidInput or TooLarge.
        """
        data = await self.body()
        try:
            if len(data) > _COMMAND_BYTES:
                raise TooLarge(f"a command has {_COMMAND_BYTES} bytes at most, and this has {len(data)}: send less")
            return parse(data, COMMAND)
        except InvalidInput as error:
            raise Carried(error) from error

    async def _read(self) -> bytes:
        kind = self.headers.get("content-type", "").split(";")[0].strip().lower()
        settings: GatewaySettings = self.app.state.settings
        limit = settings.max_json_bytes if "json" in kind else None
        chunks, size = [], 0
        try:
            async for chunk in self.stream():
                size += len(chunk)
                if limit is not None and size > limit:
                    raise TooLarge(
                        f"a body of JSON has {limit} bytes at most; send tensors as base64 or as {routes.MSGPACK}, "
                        "or raise gateway.max_json_bytes"
                    )
                self._take(len(chunk))
                chunks.append(chunk)
        except (TooLarge, Overloaded) as error:
            raise Carried(error) from error
        except ClientDisconnect as error:
            raise Carried(InvalidInput("the body ended before its end; send it again"), NOT_HTTP) from error
        return b"".join(chunks)


class Intake(APIRoute):
    """A route whose handler gets a `BoundedRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the handler so that it gets a `BoundedRequest`."""
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            budget: Budget = request.app.state.budget
            with budget.share(caller.get()) as take:
                return await handle(BoundedRequest(request, take))

        return handler


def parse(data: bytes, most: Complexity) -> Any:
    """JSON as plain data.

    Raises:
        InvalidInput: not JSON, not UTF-8, or with NaN or Infinity in it.
        TooLarge: see `check_json`.
    """
    check_json(data, most)
    try:
        return pydantic_core.from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidInput(f"body: not JSON: {str(error)[:200]}") from error


def check_json(data: bytes, most: Complexity) -> None:
    """Count what JSON holds without parsing it.

    Raises:
        TooLarge: more objects, lists, values or keys than `most` says.
    """
    bare = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    # each string is a key or a value, so quotes bound their number
    quotes = bare.count(b'"')
    if quotes <= 2 * (most.structure + most.values + 1):
        bare = b"".join(bare.split(b'"')[::2])
        keys, values = bare.count(b":"), bare.count(b",")
        structure = keys + bare.count(b"[") + bare.count(b"{")
        if structure <= most.structure and values <= most.values and keys <= most.keys:
            return
    raise TooLarge(
        f"JSON of more than {most.structure} lists and objects, {most.values} values or {most.keys} keys is not read; "
        f"send tensors as base64 or as {routes.MSGPACK}, and rows in several requests"
    )


# the interpreter parses one body at a time, so more threads would not be faster
_readers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="raymem-body")


async def read_aside(nbytes: int, read: Callable[..., T], *args: Any) -> T:
    """Run a function that parses or encodes a body of so many bytes, in a thread if the body is large."""
    if nbytes <= _SMALL_BYTES:
        return read(*args)
    return await asyncio.get_running_loop().run_in_executor(_readers, functools.partial(read, *args))
