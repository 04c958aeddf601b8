"""What a process holds doesn't grow with what it was asked."""

import asyncio
import os
import subprocess
import sys
import weakref
from collections import deque
from pathlib import Path

import pytest

from raymem import Settings
from raymem.errors import BankNotFound, Moved, NotOwner
from raymem.host.host import Host
from raymem.storage.store import ColdStore

WRITES = """
import sys; sys.path.insert(0, sys.argv[2])
import conftest, psutil, raymem
from raymem import Settings, Trace
tiny = conftest.Tiny()
rows = tiny.trace(1300)
with raymem.connect(sys.argv[1], settings=Settings(cold={"sync": "none"})) as store:
    store.put_calibration(tiny.calibration)
    bank = store.create("lab/a", tiny.spec())
    for seq in range(1300):
        if seq == 600:
            before = psutil.Process().memory_info().rss
        bank.write(Trace(rows.hidden[seq:seq+1], rows.tokens[seq:seq+1], "s", "r", seq, time=1.0))
    print(psutil.Process().memory_info().rss - before)
"""


def test_many_small_writes_leave_memory_flat(tmp_path: Path):
    tests = str(Path(__file__).parents[1])
    ran = subprocess.run(
        [sys.executable, "-c", WRITES, str(tmp_path / "m"), tests],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"MALLOC_ARENA_MAX": "2"},
    )
    # LanceDB's caches without a limit took 43 kB a write; the rows' own log and state take about 4, and what is
    # allocated once may come late
    assert int(ran.stdout) / 700 < 20 * 1024


def test_names_that_no_bank_has_are_forgotten(cold, bank_spec, make_trace):
    async def ask() -> None:
        host = Host(cold, Settings.load(environ={}), owner="me")
        for index in range(10_000):
            with pytest.raises(Moved):
                await host.read(f"lab/no{index}", make_trace(1).hidden) if index < 50 else host._owner(f"lab/no{index}")
        for index in range(100):
            for verb in (host.attach, host.reopen, host.detach):
                with pytest.raises((BankNotFound, Moved)):
                    await verb(f"lab/no{index}")
        for index in range(3):
            cold.catalog.create(f"lab/b{index}", bank_spec)
            await host.attach(f"lab/b{index}")
            await host.write(f"lab/b{index}", make_trace(4))
            await host.read(f"lab/b{index}", make_trace(2).hidden, as_of=99.0)
            await host.detach(f"lab/b{index}")
        held = (host._locks, host.past._making, host._owners, host._limiter._in_flight)
        assert [len(names) for names in held] == [0, 0, 0, 0]
        await host.close()

    asyncio.run(ask())


def names_held(host: object, name: str) -> int:
    """In how many containers of a host, or of what it is made of, a name is."""
    found, seen, left = 0, set(), [host]
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        found += isinstance(each, str) and each == name
        if isinstance(each, dict | weakref.WeakValueDictionary):
            left += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple | set | frozenset | deque):
            left += list(each)
        elif type(each).__module__.startswith("raymem.") and not isinstance(each, ColdStore | Settings):
            # a log that was lost is held until the next one is made
            left += [value for key, value in getattr(each, "__dict__", {}).items() if key != "ownership"]
    return found


async def test_the_memory_budget_forgets_banks_that_are_unknown_or_gone(cold, bank_spec, make_trace):
    host = Host(cold, Settings(host={"memory_bytes": 2**40}), owner="me")
    with pytest.raises(Moved):
        await host.write("lab/unknown", make_trace(1))
    with pytest.raises(Moved):
        await host.read("lab/unknown", make_trace(1).hidden)
    assert names_held(host, "lab/unknown") == 0
    for name in ("lab/removed", "lab/taken"):
        cold.catalog.create(name, bank_spec)
        await host.attach(name)
        await host.write(name, make_trace(4))
        assert names_held(host, name) > 0
    await host.discard("lab/removed")
    other = Host(ColdStore.open(cold.uri), Settings(), owner="you")
    await other.attach("lab/taken")
    with pytest.raises((Moved, NotOwner)):
        await host.write("lab/taken", make_trace(1, seq=4))
    with pytest.raises(Moved):
        await host.read("lab/taken", make_trace(1).hidden)
    assert [names_held(host, name) for name in ("lab/removed", "lab/taken")] == [0, 0]
    await other.close()
    await host.close()


async def test_the_point_in_time_cache_keeps_no_lock_of_a_bank_that_it_dropped(cold, bank_spec, make_trace):
    host = Host(cold, Settings(), owner="me")
    cold.catalog.create("lab/a", bank_spec)
    await host.attach("lab/a")
    await host.write("lab/a", make_trace(4))
    entry = cold.catalog.get("lab/a")
    for _ in range(3):
        await host.read("lab/a", make_trace(2).hidden, as_of=99.0)
        host.past.forget()
        assert names_held(host.past, entry.id) == 0
        assert len(host.past._making) == 0
    await host.close()
