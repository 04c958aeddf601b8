"""The network between the two nodes of a cluster is cut, both sides live on with a directory each, and it is healed.

Run by `run_cut` in a network namespace of its own: python -m faultkit.cut STORE MUTATION. The store is a folder that
both machines see all the while, as over a storage network, or an S3 server that the cut takes from one of them.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from faultkit import made
from faultkit.fleet import KIT, Dead, Refused
from faultkit.ledger import Ledger, Verdict, check
from faultkit.net import ALONE, HERE, network
from faultkit.s3 import s3_server
from faultkit.schedule import PASSING
from faultkit.sides import Sides

# kind, and the node that has the bank before the cut
BANKS = {"cut/left": ("spalm", "left"), "cut/right": ("spalm", "right"), "cut/deltas": ("titans", "right")}
LEFT, RIGHT = "left", "right"
LEASE_S = 3.0
# Ray needs a while to hear that it is back, and longer where others need the processor
_RETRY_S = 90.0
_HEARS_S = 10.0


@dataclass
class Outcome:
    """What came of a cut.

    `directories` are the processes that answered on each side during the cut; `during` counts the rows acknowledged
    meanwhile, by side and bank; `looks` and `presses` say what reads and writes at the right shard alone came to, and
    `late` how many it answered once its bank was the left one's; `reads` is what the right client heard then, and
    `seconds` how long all took.
    """

    directories: dict[str, Any] = field(default_factory=dict)
    acknowledged: dict[str, int] = field(default_factory=dict)
    during: dict[str, int] = field(default_factory=dict)
    looks: dict[str, int] = field(default_factory=dict)
    presses: dict[str, int] = field(default_factory=dict)
    late: int = 0
    reads: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    verdict: Verdict = field(default_factory=Verdict)


class CutSchedule:
    """One cut: the right machine, with the directory, is cut from the left one, with Ray's head."""

    def __init__(self, uri: str, folder: Path, sides: Sides) -> None:
        self._uri = uri
        self._folder = folder
        self._sides = sides
        self._store_stays = "://" not in uri
        self._random = random.Random(1)
        self._stop = asyncio.Event()
        self._cut = self._taken = False
        self._acks: dict[tuple[str, str], float] = {}
        self._since = time.monotonic()
        self.ledger = Ledger({bank: kind for bank, (kind, _) in BANKS.items()})
        self.outcome = Outcome()

    async def run(self) -> Outcome:
        """Cut, look, heal, check."""
        await self._begin()
        work = [asyncio.create_task(self._write(side, bank)) for side in (LEFT, RIGHT) for bank in BANKS]
        try:
            await self._until("both sides write", self._served([LEFT, RIGHT], BANKS))
            await self._apart()
            await self._together()
        finally:
            self._stop.set()
            await asyncio.wait(work, timeout=_RETRY_S)
        digests = {bank: await self._sides.ask(LEFT, "digest", bank) for bank in BANKS}
        scratch = self._folder / "undisturbed"
        self.outcome.verdict = await asyncio.to_thread(check, self._uri, self.ledger, scratch, digests)
        return self.outcome

    async def _begin(self) -> None:
        made.open_cold(self._uri)
        await self._sides.start([LEFT, RIGHT])
        await self._sides.lead(RIGHT)
        await asyncio.gather(*(self._sides.ask(side, "connect", side) for side in (LEFT, RIGHT)))
        await asyncio.gather(*(self._sides.ask(LEFT, "create", bank, *place) for bank, place in BANKS.items()))
        await asyncio.gather(*(self._sides.ask(RIGHT, "directory", bank, True) for bank in BANKS))
        self._passed("started")

    async def _apart(self) -> None:
        self._sides.net.cut(RIGHT)
        self._cut, self._since = True, time.monotonic()
        alone = [asyncio.create_task(self._look()), asyncio.create_task(self._press())]
        await self._until("two directories answer", self._two_directories)
        await self._until("left writes to its bank", self._served([LEFT], ["cut/left"]))
        if self._store_stays:
            await self._until("right writes to its banks", self._served([RIGHT], ["cut/right", "cut/deltas"]))
            await self._stand_still()
        else:
            await self._until("left takes over", self._served([LEFT], BANKS))
        self._taken = True
        await self._read()
        self._cut = False
        await asyncio.wait(alone, timeout=_RETRY_S)

    async def _stand_still(self) -> None:
        """The right shard stops, as a machine that swaps does, for longer than its lease, and wakes."""
        shards = self._sides.pids(RIGHT, "ray::ShardActor")
        for shard in shards:
            os.kill(shard, signal.SIGSTOP)
        try:
            await self._until("left takes over", self._served([LEFT], BANKS))
        finally:
            for shard in shards:
                os.kill(shard, signal.SIGCONT)

    async def _read(self) -> None:
        """What the right client hears of the bank that it has lost, of another side's bank, and of the nodes."""
        commands: list[tuple[str, ...]] = [("read", "cut/right")]
        if self._store_stays:
            # these look into it
            commands += [("attach", "cut/left"), ("nodes",)]
        for answer in [self._sides.ask(RIGHT, *command) for command in commands]:
            try:
                self.outcome.reads.append(str(await asyncio.wait_for(answer, _RETRY_S)))
            except Refused as error:
                self.outcome.reads.append(error.kind)

    async def _look(self) -> None:
        """Read at the right shard alone, as who knows of no other one, for as long as the cut lasts."""
        while self._cut:
            await self._alone(self.outcome.looks, "look", "cut/right")

    async def _press(self) -> None:
        """Write there, in the same way."""
        run, seq = ("old", "run"), 0
        while self._cut:
            self.ledger.send("cut/right", run, seq + 3)
            if await self._alone(self.outcome.presses, "press", "cut/right", *run, seq, 3):
                seq += 3
                self.ledger.acknowledge("cut/right", run, seq)

    async def _alone(self, heard: dict[str, int], *command: Any) -> bool:
        kind = "answered"
        try:
            await self._sides.ask(RIGHT, *command)
            self.outcome.late += self._taken
        except Refused as error:
            kind = error.kind
        heard[kind] = heard.get(kind, 0) + 1
        await asyncio.sleep(0.1)
        return kind == "answered"

    async def _together(self) -> None:
        self._sides.net.heal(RIGHT)
        self._since = time.monotonic()
        # its node ends when it hears that it is dead, which takes as long as its last packet is repeated
        for _ in range(int(_HEARS_S / 0.1)):
            if not self._sides.pids(RIGHT, "raylet/raylet"):
                break
            await asyncio.sleep(0.1)
        self._passed("right was back as it was")
        await self._sides.renew(RIGHT)
        await self._until("both sides write again", self._served([LEFT, RIGHT], BANKS))

    async def _two_directories(self) -> bool:
        for side in (LEFT, RIGHT):
            pids = self._sides.pids(side, "ray::DirectoryActor")
            # the right one may not see the store any more
            if not pids or not await self._sides.answers(side, "directory", "cut/right", False):
                return False
            self.outcome.directories[side] = pids
        return True

    def _served(self, sides: Sequence[str], banks: Sequence[str]) -> Callable[[], bool]:
        """Whether writes that were sent from now on were acknowledged."""
        since = time.monotonic()
        return lambda: all(self._acks.get((side, bank), 0.0) > since for side in sides for bank in banks)

    async def _until(self, what: str, reached: Callable[[], bool] | Callable[[], Awaitable[bool]]) -> None:
        deadline = time.monotonic() + _RETRY_S
        while not (await found if isinstance(found := reached(), Awaitable) else found):
            if self.ledger.wrong or time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {_RETRY_S:g} s; {self.ledger.wrong}; {self.outcome}")
            await asyncio.sleep(0.05)
        self._passed(what)

    def _passed(self, what: str) -> None:
        now = time.monotonic()
        self.outcome.seconds[what] = round(now - self._since, 1)
        self._since = now

    async def _write(self, side: str, bank: str) -> None:
        """A run after the other, in a stream of this side's own."""
        for session in range(10_000):
            run, seq = f"run-{session}", 0
            while seq < 600 and not self._stop.is_set():
                rows = self._random.choice([1, 3, 8, 40])
                self.ledger.send(bank, (side, run), seq + rows)
                asked = time.monotonic()
                try:
                    await self._sides.ask(side, "write", bank, side, run, seq, rows)
                except (Refused, Dead) as error:
                    if isinstance(error, Refused) and error.kind not in PASSING:
                        self.ledger.wrong.append(f"{side} {bank}: {error}")
                else:
                    self.ledger.acknowledge(bank, (side, run), seq + rows)
                    self._acks[side, bank] = asked
                    self._count(side, bank, rows)
                    seq += rows
                await asyncio.sleep(0.1)

    def _count(self, side: str, bank: str, rows: int) -> None:
        for counts, key in ((self.outcome.acknowledged, side), (self.outcome.during, f"{side}: {bank}")):
            if counts is self.outcome.acknowledged or self._cut:
                counts[key] = counts.get(key, 0) + rows


def run_cut(store: str, mutation: str = "") -> Outcome:
    """One cut over "folder" or "s3", in a process and a network of its own."""
    path = os.pathsep.join([str(KIT), str(KIT.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [*ALONE, sys.executable, "-m", "faultkit.cut", store, mutation]
    variables = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    return Outcome(**said | {"verdict": Verdict(**said["verdict"])})


def main(store: str, mutation: str) -> None:
    """One cut; its outcome as a line of JSON."""

    async def schedule(uri: str, folder: Path) -> Outcome:
        sides = Sides(net, folder, uri, LEASE_S, mutation)
        try:
            return await CutSchedule(uri, folder, sides).run()
        finally:
            await sides.close()

    with contextlib.ExitStack() as stack:
        made_in = stack.enter_context(tempfile.TemporaryDirectory(prefix="raymem-cut-", ignore_cleanup_errors=True))
        net = stack.enter_context(network([LEFT, RIGHT]))
        bucket = stack.enter_context(s3_server(HERE)) if store == "s3" else made_in
        print(json.dumps(asdict(asyncio.run(schedule(f"{bucket}/memory", Path(made_in))))))


if __name__ == "__main__":
    main(*sys.argv[1:])
