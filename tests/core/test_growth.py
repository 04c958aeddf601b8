"""What a process holds doesn't grow with what it was asked."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raymem import Settings
from raymem.errors import BankNotFound, Moved
from raymem.host.host import Host

WRITES = """
import sys; sys.path.insert(0, sys.argv[2])
import conftest, psutil, raymem
from raymem import Settings, Trace
tiny = conftest.Tiny()
rows = tiny.trace(2400)
with raymem.connect(sys.argv[1], settings=Settings(cold={"sync": "none"})) as store:
    store.put_calibration(tiny.calibration)
    bank = store.create("lab/a", tiny.spec())
    for seq in range(2400):
        if seq == 900:
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
    assert int(ran.stdout) / 1500 < 20 * 1024


def test_names_that_no_bank_has_are_forgotten(cold, bank_spec, make_trace):
    async def ask() -> None:
        host = Host(cold, Settings.load(environ={}), owner="me")
        for index in range(10_000):
            with pytest.raises(Moved):
                await host.read(f"lab/no{index}", make_trace(1).hidden) if index < 50 else host._worker(
                    f"lab/no{index}"
                )
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
        held = (host._locks, host.past._making, host._workers, host._limiter._in_flight)
        assert [len(names) for names in held] == [0, 0, 0, 0]
        assert set(host._space.room._used) <= {"the past"}
        await host.close()

    asyncio.run(ask())
