"""Processes that own banks one after the other: starting, asking, killing, stopping and waking them."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from faultkit.preloaded import KIT, Forked

_OWNER = """
import asyncio, sys
from faultkit import owner
sys.stdout = sys.stderr
asyncio.run(owner.main(*sys.argv[1:]))
"""


class Dead(Exception):
    """The process has ended."""


class Refused(Exception):
    """The process answered with an error; `kind` is its class."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class Process:
    """One owner: commands by pipe, answers in any order."""

    def __init__(self, process: asyncio.subprocess.Process | Forked) -> None:
        self._process = process
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()
        self.ready = asyncio.Event()
        # set once others are asked in this one's place, dead or not
        self.retired = asyncio.Event()
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def start(cls, command: Sequence[str], log: Path, variables: Mapping[str, str]) -> "Process":
        """Start one; it opens the store with the first command."""
        path = os.pathsep.join([str(KIT), str(KIT.parents[1]), os.environ.get("PYTHONPATH", "")])
        with log.open("a") as file:
            return cls(
                await asyncio.create_subprocess_exec(
                    *command,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=file,
                    env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | variables,
                )
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, *command: Any) -> "asyncio.Future[Any]":
        """Send a command; the future has its answer, Refused or Dead."""
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        # nobody may be left to look at it
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        if self._process.stdin is None or self._process.returncode is not None or self._process.stdin.is_closing():
            self._end()
        else:
            self._process.stdin.write(json.dumps([number, command]).encode() + b"\n")
        return answer

    def signal(self, what: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(what)

    async def end(self) -> None:
        """Kill it and wait."""
        self.signal(signal.SIGKILL)
        await self._process.wait()
        await self._listening

    async def _listen(self) -> None:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            said = json.loads(line)
            if "ready" in said:
                self.ready.set()
                continue
            waiting = self._waiting.pop(said["id"], None)
            # given up as dead while this was on its way
            if waiting is None or waiting.done():
                continue
            if "error" in said:
                waiting.set_exception(Refused(said["error"], said["text"]))
            else:
                waiting.set_result(said["answer"])
        await self._process.wait()
        self._end()

    def _end(self) -> None:
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(Dead())
        self._waiting.clear()


class Fleet:
    """The present owner, and a spare that has its imports behind it."""

    def __init__(self, uri: str, plans: Path, mutation: str, lease_s: float) -> None:
        self._arguments = (uri, str(plans), mutation, str(lease_s))
        self.plans = plans
        self.current: Process
        self._spare: asyncio.Task[Process]
        self._all: list[Process] = []

    async def __aenter__(self) -> "Fleet":
        self._spare = asyncio.create_task(self._start())
        self.current = await self._spare
        self._spare = asyncio.create_task(self._start())
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self._spare
        for process in self._all:
            await process.end()

    async def replace(self) -> Process:
        """Let the spare take over; returns the old owner, which is left as it is."""
        old, self.current = self.current, await self._spare
        self._spare = asyncio.create_task(self._start())
        old.retired.set()
        return old

    async def _start(self) -> Process:
        # what it says when it is killed half-way is of interest only where the checker finds something
        with (self.plans / "owners.log").open("a") as log:
            process = Process(await Forked.start(_OWNER, list(self._arguments), log))
        self._all.append(process)
        await process.ready.wait()
        return process


async def lay_out(plans: Path, what: dict[str, Any], seconds: float) -> str | None:
    """Lay a plan out and wait until it fires; says where, or None and takes it back."""
    with tempfile.NamedTemporaryFile("w", dir=plans, suffix=".new", delete=False) as file:
        json.dump({"op": "any", "table": "", "skip": 0, "when": "before", "seconds": 0.0} | what, file)
    path = Path(file.name).rename(file.name.removesuffix(".new") + ".json")
    fired = path.with_suffix(".fired")
    for _ in range(int(seconds / 0.005)):
        if fired.exists():
            return str(json.loads(fired.read_text())["where"])
        await asyncio.sleep(0.005)
    path.unlink(missing_ok=True)
    return str(json.loads(fired.read_text())["where"]) if fired.exists() else None
