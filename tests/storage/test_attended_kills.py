"""Kill -9 while keys and values are put or erased: all of a call's rows or none, and nothing stands in the way."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from row_putter import made

import raymem
from raymem import Settings
from raymem.config import ColdSettings
from raymem.storage.tables.files import Files

TABLES = "raymem.storage.tables.tables.Tables"
KEPT = "raymem.storage.attended.Attended"


@pytest.fixture(scope="module")
def die(root: Path) -> Iterator[Callable[..., int]]:
    """Run a verb in a process that kills itself at a step; return how it ended."""
    script, env = root / "tests" / "support" / "row_putter.py", os.environ | {"PYTHONPATH": str(root)}
    process = subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    assert process.stdin
    assert process.stdout
    stdin, stdout = process.stdin, process.stdout

    def run(*words: object) -> int:
        stdin.write(" ".join(map(str, words)) + "\n")
        stdin.flush()
        return int(stdout.readline())

    yield run
    process.kill()
    process.communicate()


@pytest.fixture
def folder(tmp_path: Path, tiny) -> Path:
    """A store with a bank of two runs, the first with keys and values."""
    with raymem.connect(tmp_path / "cold") as store:
        store.put_calibration(tiny.calibration)
        bank = store.create("lab/a", tiny.spec("spalm"))
        for stream in "ab":
            bank.write(tiny.talk(stream, 64))
        bank.put_rows(made("a", 64))
        bank.detach()
    return tmp_path / "cold"


def tables(store) -> set[str]:
    cold = store._async.backend.cold
    return {name for name in Files(cold.tables).tables() if name.startswith("attended-")}


@pytest.mark.parametrize(
    ("target", "when", "there"),
    [
        (f"{KEPT}._commit", "before", 64),
        (f"{KEPT}._make_durable", "before", 128),
    ],
)
def test_a_call_that_was_killed_kept_all_or_nothing(die, folder, tiny, target, when, there):
    assert die(folder, "put", target, when) == -9
    with raymem.connect(folder) as store:
        bank = store.bank("lab/a")
        bank.attach()
        assert bank.info().attended_rows == there
        asked = tiny.talk("a", 8)
        before = bank.attend(asked.hidden, asked.tokens, 300)
        assert (before.keys_LNHd is not None) == (there == 128)
        assert bank.put_rows(made("b", 64)).rows == 128
        assert bank.attend(asked.hidden, asked.tokens, 300).keys_LNHd.shape[1] == 128


@pytest.mark.parametrize(
    ("target", "when", "erased"),
    [
        (f"{KEPT}.rewrite", "after", False),
        # the switch has been made, the old table is still there
        (f"{TABLES}.drop", "before", True),
    ],
)
def test_an_erasure_that_was_killed_took_all_or_nothing(die, folder, target, when, erased):
    assert die(folder, "erase", target, when) == -9
    with raymem.connect(folder, settings=Settings(cold=ColdSettings(sweep_age_s=0.0))) as store:
        store.sweep()
        (receipt,) = store.bank("lab/a").receipts()
        bank = store.bank("lab/a")
        bank.attach()
        assert receipt.status == ("complete" if erased else "undone")
        assert bank.info().attended_rows == (0 if erased else 64)
        assert len(tables(store)) == 1
        if not erased:
            receipt = bank.erase(stream="a")
        assert (receipt.status, receipt.proves, receipt.after.found) == ("complete", True, 0)
        assert bank.info().attended_rows == 0
