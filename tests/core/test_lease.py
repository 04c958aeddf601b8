"""Hosts whose leases run out: in this process with a clock in hand, and in another that is really stopped."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import raymem
from raymem import Settings
from raymem.config import ColdSettings, HostSettings
from raymem.errors import Conflict, Moved, NotOwner
from raymem.host import host as host_module
from raymem.host import lease as lease_module
from raymem.host import ownership as ownership_module
from raymem.host.host import Host
from raymem.storage.store import ColdStore

SETTINGS = Settings(cold=ColdSettings(sync="none"), host=HostSettings(lease_s=1.0))


@pytest.fixture
def cold(tmp_path: Path, tiny) -> ColdStore:
    store = ColdStore.open(str(tmp_path / "memory"), "none")
    calibration = tiny.calibration
    store.calibrations.put(calibration.hash, calibration.model, calibration.layers, calibration.to_bytes())
    store.catalog.create("a/b", tiny.spec())
    return store


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    clock = [100.0]
    for module in (lease_module, ownership_module, host_module):
        monkeypatch.setattr(module, "clock", lambda: clock[0])
    return clock


@pytest.fixture
async def host(cold: ColdStore, now) -> AsyncIterator[Host]:
    made = Host(cold, SETTINGS, "one")
    await made.attach("a/b")
    yield made
    await made.close()


async def test_rows_committed_under_a_lease_that_ran_out_are_not_acknowledged(host, cold, now, tiny, monkeypatch):
    from raymem.bank.primary import Primary

    apply = Primary.apply

    def stopped_after_the_commit(self, pending):
        outcomes = apply(self, pending)
        now[0] += 1.1
        return outcomes

    with monkeypatch.context() as patch:
        patch.setattr(Primary, "apply", stopped_after_the_commit)
        with pytest.raises(NotOwner, match=r"one was silent .* lease of 1 s.*repeating a write is safe"):
            await host.write("a/b", tiny.trace(10))

    assert not host.has("a/b")
    await host.reopen("a/b")
    assert (await host.write("a/b", tiny.trace(10))).duplicates == 10


async def test_a_read_that_outlasts_the_lease_is_refused(host, cold, now, tiny, monkeypatch):
    from raymem.bank.primary import Primary

    await host.write("a/b", tiny.trace(10))
    read = Primary.read

    def stopped(self, *args):
        now[0] += 1.1
        return read(self, *args)

    monkeypatch.setattr(Primary, "read", stopped)
    with pytest.raises(NotOwner):
        await host.read("a/b", tiny.trace(2).hidden)


async def test_an_owner_whose_lease_ran_out_gives_every_bank_up_and_begins_anew(host, cold, now, tiny):
    cold.catalog.create("a/c", tiny.spec())
    await host.attach("a/c")
    first = cold.lease_table.list()
    now[0] += 1.1

    with pytest.raises(Moved):
        await host.read("a/b", tiny.trace(2).hidden)
    assert host.names() == []
    await host.reopen("a/b")

    assert host.names() == ["a/b"]
    again = cold.lease_table.list()
    assert [seen.owner for seen in again] == ["one"]
    assert again[0].id != first[0].id


async def test_a_bank_taken_meanwhile_stays_with_its_new_owner(host, cold, now, tiny):
    await host.write("a/b", tiny.trace(10))
    now[0] += 1.1
    other = Host(cold, SETTINGS, "two")
    await other.attach("a/b")

    with pytest.raises(Moved):
        await host.write("a/b", tiny.trace(10, seq=10))
    with pytest.raises(Moved) as moved:
        await host.reopen("a/b")
    assert moved.value.to == "two"
    assert (await other.write("a/b", tiny.trace(10, seq=10))).rows == 10
    await other.close()


async def test_a_host_that_closes_has_no_lease_left(host, cold):
    await host.close()

    assert cold.lease_table.list() == []


ELSEWHERE = """
import socket, sys, torch, raymem
socket.gethostname = lambda: "elsewhere"
from raymem import Settings
from raymem.config import ColdSettings, HostSettings
settings = Settings(cold=ColdSettings(sync="none"), host=HostSettings(lease_s=1.0))
with raymem.connect(sys.argv[1], settings=settings) as store:
    bank = store.bank("a/b")
    bank.attach()
    for line in sys.stdin:
        hidden = torch.full((1, 2, 24), 1.0).bfloat16()
        try:
            bank.read(hidden)
            print("heard", bank.write(raymem.Trace(hidden, torch.tensor([1]), "s", "else", int(line))).end, flush=True)
        except raymem.RaymemError as error:
            print("heard", error.code, flush=True)
"""


@pytest.fixture
def elsewhere(cold: ColdStore, root: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that believes to be another machine, with the bank; it writes row n when told n."""
    env = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", ELSEWHERE, cold.uri]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    yield process
    process.kill()
    process.communicate()


def _ask(process: "subprocess.Popen[str]", text: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{text}\n")
    process.stdin.flush()
    # between answers it also logs
    return next(line.split()[1] for line in process.stdout if line.startswith("heard"))


def test_another_machines_bank_is_refused_while_it_lives_and_taken_when_it_is_silent(elsewhere, cold, tiny):
    assert _ask(elsewhere, "0") == "1"
    with raymem.connect(cold.uri, settings=SETTINGS) as store:
        bank = store.bank("a/b")
        with pytest.raises(Conflict, match=r"is held by process .* on elsewhere"):
            bank.attach()
        assert _ask(elsewhere, "1") == "2"

        os.kill(elsewhere.pid, signal.SIGSTOP)
        began = time.monotonic()
        assert bank.attach().rows == 2
        assert time.monotonic() - began > 0.9
        assert bank.write(tiny.trace(5)).end == 7

        os.kill(elsewhere.pid, signal.SIGCONT)
        # neither an old answer nor an acknowledgement: it hears that somebody living has the bank
        assert _ask(elsewhere, "2") == "conflict"
        assert bank.info().rows == 7


async def test_a_lease_is_kept_by_a_host_with_nothing_to_do(cold):
    host = Host(cold, SETTINGS, "one")
    await host.attach("a/b")
    await asyncio.sleep(1.5)

    assert host.has("a/b")
    await host.close()
