"""A disk that is really full, and has room again: nothing acknowledged is lost, and writing goes on."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from faultkit import made
from faultkit.ledger import Ledger, check

import raymem
from raymem import Settings
from raymem.errors import StorageError

BANK, RUN = "lab/a", ("agent", "run")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount one: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(disk: Path) -> Path:
    """A file that takes all that is left."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        _write_for_ever(file)
    return ballast


def _write_for_ever(file: IO[bytes]) -> None:
    while True:
        file.write(bytes(4096))


@pytest.mark.parametrize("kind", ["spalm", "titans"])
def test_a_full_disk_refuses_rows_and_loses_none(disk: Path, tmp_path: Path, kind: str):
    uri, ledger = str(disk / "memory"), Ledger({BANK: kind})
    made.open_cold(uri)
    with raymem.connect(uri, settings=Settings()) as store:
        bank = store.create(BANK, made.spec(kind))

        def write(start: int, rows: int) -> None:
            ledger.send(BANK, RUN, start + rows)
            bank.write(made.trace(*RUN, start, rows))
            ledger.acknowledge(BANK, RUN, start + rows)

        for start in range(0, 70, 7):
            write(start, 7)
        ballast = _fill(disk)
        for _ in range(3):
            with pytest.raises(StorageError, match="No space left"):
                write(70, 7)
        # what is there can be read meanwhile
        assert bank.info().rows == 70
        assert len(bank.read(made.trace(*RUN, 0, 5).hidden, 3).relevance_Q) == 5

        ballast.unlink()
        write(70, 7)
        write(77, 50)
        digest = bank.digest()
    check(uri, ledger, tmp_path / "undisturbed", {BANK: digest}).require()
