"""A copy of a store that is open is a store of its own; what a full disk keeps from being said is seen all the same."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from faultkit import preloaded

import raymem
from raymem import Settings
from raymem.errors import Conflict, StorageError

SETTINGS = Settings()
WRITES = """
import sys, conftest, raymem
from raymem import Settings
with raymem.connect(sys.argv[1], settings=Settings()) as store:
    bank = store.bank("lab/a")
    tiny = conftest.Tiny()
    for seq in range(int(sys.argv[2]), int(sys.argv[2]) + 20, 4):
        bank.write(tiny.trace(4, seq=seq))
    print(bank.info().rows, bank.info().epoch)
"""


def _elsewhere(path: Path, seq: int) -> subprocess.CompletedProcess[str]:
    return preloaded.run(WRITES, str(path), str(seq))


def test_a_copy_of_a_hot_store_is_a_store_of_its_own(tmp_path: Path, tiny: Any):
    with raymem.connect(tmp_path / "m", settings=SETTINGS) as store:
        store.put_calibration(tiny.calibration)
        bank = store.create("lab/a", tiny.spec())
        bank.write(tiny.trace(10))
        for copy in ("copy", "other"):
            shutil.copytree(tmp_path / "m", tmp_path / copy)
        bank.write(tiny.trace(10, seq=10))
        # another process has the copy, and this one the other copy, while the original goes on
        ran = _elsewhere(tmp_path / "copy", 10)
        assert ran.stdout.split() == ["30", "2"], ran.stderr
        with raymem.connect(tmp_path / "other", settings=SETTINGS) as other:
            assert other.bank("lab/a").write(tiny.trace(3, seq=10)).end == 13
            assert bank.write(tiny.trace(10, seq=20)).end == 30
        assert bank.info().epoch == 1
        # the original is held as ever
        held = _elsewhere(tmp_path / "m", 30)
        assert held.returncode
        assert "is held by process" in held.stderr
        with raymem.connect(tmp_path / "m", settings=SETTINGS) as beside, pytest.raises(Conflict, match="is held by"):
            beside.bank("lab/a").write(tiny.trace(3, seq=30))
        assert bank.write(tiny.trace(10, seq=30)).end == 40
    for path, rows in (("m", 40), ("copy", 30), ("other", 13)):
        with raymem.connect(tmp_path / path, settings=SETTINGS) as again:
            assert len(again.bank("lab/a").tokens("s", "r", 0, 99)) == rows


def test_a_store_closed_on_a_full_disk_lets_its_banks_go_and_says_what_is_lost(tmp_path: Path, tiny: Any):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount one: {mounted.stderr.strip()}")
    try:
        store = raymem.connect(disk / "m", settings=SETTINGS)
        store.put_calibration(tiny.calibration)
        bank = store.create("lab/a", tiny.spec())
        bank.write(tiny.trace(10))
        ballast = disk / "ballast"
        with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            _fill(file)
        bank.write(tiny.trace(6, seq=10), durable=False)
        with pytest.raises(StorageError, match="6 rows that were accepted with durable=False could not be written"):
            store.close()
        store.close()
        ballast.unlink()
        # this process lives on, and another has the bank at once
        ran = _elsewhere(disk / "m", 10)
        assert ran.stdout.split()[0] == "30", ran.stderr
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def _fill(file: Any) -> None:
    while True:
        file.write(bytes(4096))
