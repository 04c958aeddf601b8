"""A seeded schedule against a real Ray cluster: shards, directory, raylets and gateway are killed or stopped."""

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
from faultkit import made
from faultkit.fleet import lay_out
from faultkit.gate import Gate, compare
from faultkit.ledger import Checker, Ledger
from faultkit.schedule import PASSING, Outcome

from raymem import AsyncStore, Settings
from raymem.actors import cluster
from raymem.actors.calls import NAMESPACE
from raymem.actors.cluster import LocalNodes, local_nodes
from raymem.config import ActorSettings, ColdSettings, HostSettings
from raymem.errors import RaymemError

KIT = Path(__file__).parents[1]
BANKS = {"ray/rows": "spalm", "ray/deltas": "titans", "ray/more": "spalm"}
LEASE_S = 3.0
SETTINGS = Settings(
    cold=ColdSettings(snapshot_bytes=8192), host=HostSettings(lease_s=LEASE_S), actors=ActorSettings(retry_s=40.0)
)
RECOVERY_S = 90.0
KINDS = (
    *("shard", "place", "place", "silent shard", "directory", "silent directory"),
    *("raylet", "cut", "gateway", "silent gateway"),
)
PLACES: Sequence[dict[str, Any]] = [
    {"op": op, "table": table, "when": when}
    for op, table in (("add", "journal"), ("add", "log"), ("fence", ""), ("update", "catalog"), ("add", "snapshots"))
    for when in ("before", "after")
]


@contextmanager
def sabotaged_nodes(plans: Path) -> Iterator[LocalNodes]:
    """Two Ray nodes whose workers look into a folder of plans before and after every write."""
    path = os.pathsep.join([str(KIT / "site"), str(KIT), str(KIT.parents[1]), os.environ.get("PYTHONPATH", "")])
    saved = {name: os.environ.get(name) for name in ("PYTHONPATH", "FAULTS_PLANS")}
    os.environ.update(PYTHONPATH=path, FAULTS_PLANS=str(plans))
    try:
        with local_nodes(2, cpus=1) as nodes:
            yield nodes
    finally:
        for name, value in saved.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


class Gateway:
    """`raymem serve` in a process of its own, in front of the cluster."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = 0
        self.url = ""
        self.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> None:
        command = [sys.executable, "-m", "raymem.cli", "serve", "--store", "ray", "--json", "--port", str(self._port)]
        with (self._folder / "gateway.log").open("a") as log:
            # a port that stays the same: clients come back to it
            environment = {name: value for name, value in os.environ.items() if name != "FAULTS_PLANS"}
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        assert self._process.stdout is not None
        said = ""
        while line := self._process.stdout.readline():
            said += line
            if line == "}\n":
                break
        self.url = json.loads(said)["url"]
        self._port = int(self.url.rpartition(":")[2])

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


class ClusterSchedule:
    """Faults of one seed against one cluster of this machine."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self.plans = folder / "plans"
        self.plans.mkdir(parents=True)
        self.uri = str(folder / "memory")
        self.random = random.Random(seed)
        self.ledger = Ledger(dict(BANKS))
        self.outcome = Outcome()
        self._gate = Gate()
        self._checker = Checker(self.uri, self.ledger, folder / "undisturbed")
        self._stop = asyncio.Event()
        self._acks: dict[str, float] = {}
        self._began = 0.0
        self._added = 2

    async def run(self, nodes: LocalNodes, kinds: Sequence[str]) -> Outcome:
        """Inject faults of these kinds, one after the other, then check."""
        made.open_cold(self.uri)
        store = await AsyncStore.connect("ray", cold=self.uri, settings=SETTINGS)
        for bank, kind in BANKS.items():
            await store.create(bank, made.spec(kind))
        gateway = await asyncio.to_thread(Gateway, self._folder)
        through = await AsyncStore.connect(gateway.url, settings=SETTINGS)
        try:
            await self._inject(kinds, nodes, gateway, store, through)
            digests = await _digests(store)
        finally:
            self._stop.set()
            gateway.kill()
        await through.close()
        self.outcome.verdict = await asyncio.to_thread(self._checker.finish, digests)
        self.outcome.comparisons = self._checker.times
        await store.close()
        return self.outcome

    async def _inject(
        self, kinds: Sequence[str], nodes: LocalNodes, gateway: Gateway, store: AsyncStore, through: AsyncStore
    ) -> None:
        work = [asyncio.create_task(self._write(store, bank, "direct")) for bank in BANKS]
        work += [asyncio.create_task(self._write(through, bank, "http")) for bank in BANKS]
        work.append(asyncio.create_task(self._operate(store)))
        await self._recovered()
        for kind in kinds:
            self._began = time.monotonic()
            name = await self._fault(kind, nodes, gateway, store)
            if name is None:
                continue
            self.outcome.faults[name] = self.outcome.faults.get(name, 0) + 1
            self.outcome.recoveries_s.append(await self._recovered())
            if not self.ledger.wrong:
                await compare(self._gate, self._checker, self.ledger, lambda: _digests(store), name, RECOVERY_S)
            if self.ledger.wrong:
                break
        self._stop.set()
        _, late = await asyncio.wait(work, timeout=0.5 if self.ledger.wrong else RECOVERY_S)
        self.ledger.wrong += [f"{task.get_name()} was never served again" for task in late]
        for task in late:
            task.cancel()

    async def _fault(self, kind: str, nodes: LocalNodes, gateway: Gateway, store: AsyncStore) -> str | None:
        match kind:
            case "shard":
                os.kill(await self._shard(store), signal.SIGKILL)
            case "place":
                place = self.random.choice(PLACES)
                where = await lay_out(self.plans, place | {"do": "kill", "skip": self.random.randrange(2)}, 5.0)
                return where and f"shard killed {place['when']} {place['op']} {place['table']}".strip()
            case "silent shard":
                await _freeze([await self._shard(store)], 1.5 * LEASE_S)
            case "directory":
                ray.kill(ray.get_actor(cluster.DIRECTORY, namespace=NAMESPACE), no_restart=False)
            case "silent directory":
                await _freeze([self._directory(nodes)], 3 * LEASE_S)
            case "raylet":
                nodes.kill(self._leave(nodes))
            case "cut":
                await self._cut(nodes)
            case "gateway":
                gateway.kill()
                await asyncio.to_thread(gateway.start)
            case "silent gateway":
                await _freeze([gateway.pid], 3 * LEASE_S)
        return kind

    def _directory(self, nodes: LocalNodes) -> int:
        """The process that Ray has named after the actor."""
        raylets = [psutil.Process(nodes.raylet(name)) for name in nodes.names]
        workers = [worker for raylet in raylets for worker in raylet.children(recursive=True)]
        return next(worker.pid for worker in workers if "ray::DirectoryActor" in worker.cmdline()[0])

    async def _shard(self, store: AsyncStore) -> int:
        for _ in range(200):
            shards = [shard for shard in (await store.stats())["shards"] if "pid" in shard]
            if shards:
                return int(self.random.choice(shards)["pid"])
            await asyncio.sleep(0.2)
        raise RuntimeError("no shard answers")

    def _leave(self, nodes: LocalNodes) -> str:
        """A node that is not the head, with another one started in its place."""
        name = f"node-{self._added}"
        self._added += 1
        nodes.add(f"node-{self._added}")
        return name

    async def _cut(self, nodes: LocalNodes) -> None:
        """One node neither hears nor says anything for longer than leases and Ray bear, and then is back."""
        name = self._leave(nodes)
        raylet = nodes.raylet(name)
        await _freeze([raylet, *(child.pid for child in psutil.Process(raylet).children(recursive=True))], 3 * LEASE_S)

    async def _write(self, store: AsyncStore, bank: str, stream: str) -> None:
        handle = store.bank(bank)
        for session in range(10_000):
            run, seq = f"run-{session}", 0
            while seq < 600:
                if self._stop.is_set() or self.ledger.wrong:
                    return
                rows = self.random.choice([1, 3, 8, 40])
                self.ledger.send(bank, (stream, run), seq + rows)
                asked = time.monotonic()
                try:
                    async with self._gate.work():
                        await handle.write(made.trace(stream, run, seq, rows))
                except RaymemError as error:
                    if type(error).__name__ not in PASSING:
                        self.ledger.wrong.append(f"{bank}: {type(error).__name__}: {error}")
                    await asyncio.sleep(0.05)
                    continue
                self.ledger.acknowledge(bank, (stream, run), seq + rows)
                seq += rows
                if asked > self._began:
                    self._acks.setdefault(f"{bank} {stream}", time.monotonic())
                await asyncio.sleep(0.05)

    async def _operate(self, store: AsyncStore) -> None:
        """Someone who moves banks, detaches and attaches them all the while."""
        while not self._stop.is_set():
            async with self._gate.work():
                bank = store.bank(self.random.choice(sorted(BANKS)))
                with contextlib.suppress(RaymemError):
                    if self.random.random() < 0.6:
                        await bank.migrate(self.random.choice(await store.nodes()))
                    else:
                        await bank.detach()
                await _attach(store, bank.name)
            await asyncio.sleep(0.3)
        for name in BANKS:
            await _attach(store, name)

    async def _recovered(self) -> float:
        """Wait until every bank took a write that was sent after the fault, directly and through the gateway."""
        self._acks.clear()
        began = self._began = self._began or time.monotonic()
        wanted = {f"{bank} {stream}" for bank in BANKS for stream in ("direct", "http")}
        while missing := sorted(wanted - self._acks.keys()):
            await asyncio.sleep(0.01)
            if self.ledger.wrong or time.monotonic() - began > RECOVERY_S:
                self.ledger.wrong.append(f"{missing} took no write for {time.monotonic() - began:.0f} s after a fault")
                return RECOVERY_S
        return max(self._acks.values()) - began


async def _attach(store: AsyncStore, name: str) -> None:
    with contextlib.suppress(RaymemError):
        if (await store.bank(name).info()).state == "cold":
            await store.bank(name).attach()


async def _digests(store: AsyncStore) -> dict[str, str | None]:
    for name in BANKS:
        await _attach(store, name)
    return {name: await store.bank(name).digest() for name in BANKS}


async def _freeze(pids: Sequence[int], seconds: float) -> None:
    for what in (signal.SIGSTOP, signal.SIGCONT):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, what)
        if what == signal.SIGSTOP:
            await asyncio.sleep(seconds)


def run_cluster(seed: int, kinds: Sequence[str]) -> Outcome:
    """One schedule on a cluster of its own."""
    with tempfile.TemporaryDirectory(prefix="raymem-faults-", ignore_cleanup_errors=True) as folder:
        schedule = ClusterSchedule(Path(folder), seed)
        with sabotaged_nodes(schedule.plans) as nodes:
            return asyncio.run(schedule.run(nodes, kinds))
