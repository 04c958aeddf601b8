"""What a process holds doesn't grow with what it was asked."""

import os
import subprocess
import sys
from pathlib import Path

WRITES = """
import sys; sys.path.insert(0, sys.argv[2])
import conftest, psutil, raymem
from raymem import Settings, Trace
tiny = conftest.Tiny()
rows = tiny.trace(2000)
with raymem.connect(sys.argv[1], settings=Settings(cold={"sync": "none"})) as store:
    store.put_calibration(tiny.calibration)
    bank = store.create("lab/a", tiny.spec())
    for seq in range(900):
        if seq == 300:
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
    # LanceDB's caches without a limit took 43 kB a write; the rows' own log and state take about 3
    assert int(ran.stdout) / 600 < 20 * 1024
