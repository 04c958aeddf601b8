"""A seeded schedule: writers and an operator at work, one fault after the other, and what came of it."""

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faultkit import made
from faultkit.fleet import Dead, Fleet, Process, Refused, lay_out
from faultkit.gate import Gate, compare
from faultkit.ledger import Checker, Ledger, Verdict

# written and erased by the operator alone: its journal gets holes
PRIVATE = "lab/private"
BANKS = {"lab/rows": "spalm", "lab/deltas": "titans", "lab/more": "spalm"}
# rows of one run before the next one begins
_RUN_ROWS = 600
# no fault may keep a bank away for longer
_RECOVERY_S = 60.0
_LEASE_S = 1.5
# said while a bank changes hands or its storage fails: the writer tries again
PASSING = {
    *("Unavailable", "BackendUnavailable", "Moved", "NotOwner", "Conflict"),
    *("StorageError", "Overloaded", "BankDetached", "RaymemError"),
}

Places = Sequence[dict[str, Any]]
KINDS = ("kill", "kill", "now", "stop", "stop", "full", "fail", "slow")
PLACES: Places = [
    *({"op": "add", "table": table, "when": when} for table in ("journal", "log") for when in ("before", "after")),
    *({"op": "sync", "table": "journal", "when": when} for when in ("before", "after")),
    *({"op": op, "table": "", "when": when} for op in ("fence", "compact", "clean") for when in ("before", "after")),
    *({"op": "update", "table": "catalog", "when": when} for when in ("before", "after")),
    *({"op": "add", "table": "snapshots", "when": when} for when in ("before", "after")),
    # while a schedule runs, forks, merges and erasures alone make and drop journals
    *({"op": op, "table": "journal", "when": when} for op in ("create", "drop") for when in ("before", "after")),
    *({"op": "merge", "table": "catalog", "when": when} for when in ("before", "after")),
]


@dataclass
class Outcome:
    """What a schedule did."""

    faults: dict[str, int] = field(default_factory=dict)
    recoveries_s: list[float] = field(default_factory=list)
    # how often rows and states were compared
    comparisons: int = 0
    verdict: Verdict = field(default_factory=Verdict)

    @property
    def count(self) -> int:
        return sum(self.faults.values())


class Schedule:
    """Faults of one seed against one store."""

    def __init__(self, uri: str, scratch: Path, seed: int, mutation: str = "", lease_s: float | None = None) -> None:
        self.uri, self.scratch = uri, scratch
        self.random = random.Random(seed)
        self.ledger = Ledger()
        self.outcome = Outcome()
        self._plans = scratch / "plans"
        self._plans.mkdir(parents=True)
        self._mutation = mutation
        # every second schedule does without leases, for the fence alone must do
        self._lease_s = lease_s if lease_s is not None else _LEASE_S * (seed % 2)
        self._gate = Gate()
        self._stop = asyncio.Event()
        self._first_acks: dict[str, float] = {}
        self._began = 0.0

    async def run(self, faults: int, *, kinds: Sequence[str] = KINDS, places: Places = PLACES) -> Outcome:
        """Inject that many faults of some kinds at some places, then check."""
        made.open_cold(self.uri)
        checker = Checker(self.uri, self.ledger, self.scratch / "undisturbed")
        async with Fleet(self.uri, self._plans, self._mutation, self._lease_s) as fleet:
            for bank, kind in BANKS.items():
                await fleet.current.ask("create", bank, kind)
                self.ledger.kinds[bank] = kind
            await fleet.current.ask("create", PRIVATE, "spalm")
            work = [asyncio.create_task(self._write(fleet, bank, number)) for bank in BANKS for number in range(2)]
            work.append(asyncio.create_task(self._operate(fleet)))
            await self._recovered(fleet)
            self.outcome.recoveries_s.clear()
            while self.outcome.count < faults and not self.ledger.wrong:
                name = await self._fault(fleet, kinds, places)
                if name is not None and not self.ledger.wrong:
                    look = lambda: self._digests(fleet)  # noqa: E731
                    await compare(self._gate, checker, self.ledger, look, name, _RECOVERY_S)
            self._stop.set()
            await self._finish(work)
            digests = await self._digests(fleet)
        self.outcome.verdict = await asyncio.to_thread(checker.finish, digests)
        self.outcome.comparisons = checker.times
        return self.outcome

    async def _finish(self, work: list[asyncio.Task[None]]) -> None:
        # where the checker will complain anyway, nobody waits for writers that can't be served
        done, late = await asyncio.wait(work, timeout=0.5 if self.ledger.wrong else _RECOVERY_S)
        for task in late:
            task.cancel()
            self.ledger.wrong.append("a writer or the operator was never served again")
        for task in done:
            task.result()

    async def _write(self, fleet: Fleet, bank: str, number: int) -> None:
        for session in range(10_000):
            stream, run = f"agent-{number}", f"run-{number}-{session}"
            seq = 0
            while seq < _RUN_ROWS:
                if self._stop.is_set() or self.ledger.wrong:
                    return
                rows = self.random.choice([1, 3, 8, 40])
                async with self._gate.work():
                    await self._until_acknowledged(fleet, bank, (stream, run), seq, rows)
                seq += rows
                await asyncio.sleep(0.02)

    async def _until_acknowledged(self, fleet: Fleet, bank: str, run: tuple[str, str], seq: int, rows: int) -> None:
        self.ledger.send(bank, run, seq + rows)
        while True:
            owner = fleet.current
            asked = time.monotonic()
            answer = self._ask_write(owner, bank, run, seq, rows)
            retired = asyncio.create_task(owner.retired.wait())
            await asyncio.wait({answer, retired}, return_when=asyncio.FIRST_COMPLETED)
            retired.cancel()
            if answer.done() and answer.exception() is None:
                if asked > self._began and owner is fleet.current:
                    self._first_acks.setdefault(bank, time.monotonic())
                return
            if answer.done() and isinstance(error := answer.exception(), Refused) and error.kind not in PASSING:
                self.ledger.wrong.append(f"{bank}: {error}")
                return
            await asyncio.sleep(0.01)

    def _ask_write(self, owner: Process, bank: str, run: tuple[str, str], seq: int, rows: int) -> "asyncio.Future[Any]":
        answer = owner.ask("write", bank, *run, seq, rows)

        def note(done: "asyncio.Future[Any]") -> None:
            # also of a process that was stopped long ago: what it acknowledges must be there
            if not done.cancelled() and done.exception() is None:
                self.ledger.acknowledge(bank, run, seq + rows)

        answer.add_done_callback(note)
        return answer

    async def _operate(self, fleet: Fleet) -> None:
        """Someone who snapshots, detaches, forks, merges and erases all the while."""
        verbs = [self._snapshot, self._sleep, self._tag, self._fork, self._merge, self._erase]
        for number in range(100_000):
            if self._stop.is_set():
                break
            async with self._gate.work():
                await self.random.choice(verbs)(fleet, self.random.choice(sorted(BANKS)), number)
            await asyncio.sleep(0.1)
        for bank in BANKS:
            await self._try(fleet.current, "attach", bank)

    async def _snapshot(self, fleet: Fleet, bank: str, number: int) -> None:
        await self._try(fleet.current, "snapshot", bank)

    async def _sleep(self, fleet: Fleet, bank: str, number: int) -> None:
        await self._try(fleet.current, "detach", bank)
        # it would stay detached where the owner is lost in between
        while await self._try(fleet.current, "attach", bank) is None and not (self._stop.is_set() or self.ledger.wrong):
            await asyncio.sleep(0.05)

    async def _tag(self, fleet: Fleet, bank: str, number: int) -> None:
        await self._try(fleet.current, "tag", bank, "here")

    async def _fork(self, fleet: Fleet, bank: str, number: int) -> None:
        await self._try(fleet.current, "fork", bank, f"forks/{number}")
        if number % 2:
            await self._try(fleet.current, "delete", f"forks/{number}")

    async def _merge(self, fleet: Fleet, bank: str, number: int) -> None:
        await self._try(fleet.current, "merge", f"merged/{number}", ["lab/rows", "lab/more"])
        if number % 2:
            await self._try(fleet.current, "delete", f"merged/{number}")

    async def _erase(self, fleet: Fleet, bank: str, number: int) -> None:
        stream = f"secret-{number}"
        self.ledger.secret(PRIVATE, stream, 9)
        if await self._try(fleet.current, "write", PRIVATE, stream, "r", 0, 9) is None:
            return
        self.ledger.secret(PRIVATE, stream, 9, "kept")
        await self._try(fleet.current, "write", PRIVATE, "kept", f"run-{number}", 0, 3)
        self.ledger.secret(PRIVATE, stream, 9, "going")
        if await self._try(fleet.current, "erase", PRIVATE, stream) is not None:
            self.ledger.secret(PRIVATE, stream, 9, "gone")

    async def _try(self, owner: Process, *command: Any) -> Any:
        answer = owner.ask(*command)
        retired = asyncio.create_task(owner.retired.wait())
        await asyncio.wait({answer, retired}, return_when=asyncio.FIRST_COMPLETED)
        retired.cancel()
        with contextlib.suppress(Refused, Dead):
            return answer.result() if answer.done() else None
        return None

    async def _digests(self, fleet: Fleet) -> dict[str, str | None]:
        return {bank: await self._digest(fleet, bank) for bank in BANKS}

    async def _digest(self, fleet: Fleet, bank: str) -> str | None:
        until = time.monotonic() + _RECOVERY_S
        while time.monotonic() < until and not self.ledger.wrong:
            await self._try(fleet.current, "attach", bank)
            answer: str | None = await self._try(fleet.current, "digest", bank)
            if answer is not None:
                return answer
            # on a busy machine a lease may run out, and the owner takes the bank anew
            await asyncio.sleep(0.05)
        self.ledger.wrong.append(f"{bank}: its owner gives no digest")
        return None

    async def _fault(self, fleet: Fleet, kinds: Sequence[str], places: Places) -> str | None:
        """One fault, until all banks are written to again; its name, None if its place was never passed."""
        what = self.random.choice(kinds)
        place = self.random.choice(places)
        if what == "now":
            await asyncio.sleep(self.random.uniform(0, 0.1))
            self._began = time.monotonic()
            fleet.current.signal(signal.SIGKILL)
            name = "kill at any moment"
        else:
            # what was never written can't fail afterwards, what was can't meet a full disk
            when = {"full": "before", "fail": "after"}.get(what, place["when"])
            plan = place | {"do": what, "when": when, "skip": self.random.randrange(2), "seconds": 0.3}
            where = await lay_out(self._plans, plan, 1.5)
            if where is None:
                return None
            self._began = time.monotonic()
            name = f"{what} {plan['when']} {plan['op']} {plan['table']}".strip()
        if what in ("kill", "now"):
            await fleet.replace()
        old = await fleet.replace() if what == "stop" else None
        self.outcome.faults[name] = self.outcome.faults.get(name, 0) + 1
        await self._recovered(fleet)
        if old is not None:
            await self._wake(old)
        return name

    async def _wake(self, old: Process) -> None:
        """An owner that was stopped wakes up, and somebody still writes to it."""
        old.signal(signal.SIGCONT)
        run = ("late", f"run-{self.outcome.count}")
        late = []
        for bank in BANKS:
            self.ledger.send(bank, run, 5)
            late.append(self._ask_write(old, bank, run, 0, 5))
        await asyncio.wait(late, timeout=0.5)
        await old.end()

    async def _recovered(self, fleet: Fleet) -> None:
        self._first_acks.clear()
        self._began = began = self._began or time.monotonic()
        while len(self._first_acks) < len(BANKS) and not self.ledger.wrong:
            await asyncio.sleep(0.005)
            if time.monotonic() - began > _RECOVERY_S:
                missing = sorted(BANKS.keys() - self._first_acks.keys())
                self.ledger.wrong.append(f"{missing} took no write for {_RECOVERY_S:g} s after a fault")
        self.outcome.recoveries_s.append(max(self._first_acks.values(), default=began) - began)
