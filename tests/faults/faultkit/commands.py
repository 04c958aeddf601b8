"""How a process under test is told what to do: JSON lines on stdin, answers on stdout in any order."""

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from raymem.errors import RaymemError

# logs go to stdout by default, and answers must come alone
ANSWERS, sys.stdout = sys.stdout, sys.stderr
Run = Callable[..., Awaitable[Any]]


async def serve(begin: Callable[[], Awaitable[Run]]) -> None:
    """Answer commands until stdin ends; with the first one comes what runs them."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    run = None
    say({"ready": os.getpid()})
    running = set()

    async def answer(run: Run, number: int, command: list[Any]) -> None:
        try:
            say({"id": number, "answer": await run(*command)})
        except RaymemError as error:
            say({"id": number, "error": type(error).__name__, "text": str(error)})

    while line := await reader.readline():
        if run is None:
            run = await begin()
        task = asyncio.create_task(answer(run, *json.loads(line)))
        running.add(task)
        task.add_done_callback(running.discard)


def say(document: dict[str, Any]) -> None:
    print(json.dumps(document), file=ANSWERS, flush=True)
