"""Flipped bytes, cut files and full disks: a clear error, and nothing else is lost."""

import contextlib
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from raymem.errors import CalibrationNotFound, Corrupt, StorageError
from raymem.storage.journal.journal import Journal
from raymem.storage.store import Calibrations, ColdStore
from raymem.storage.tables.disk import FolderSync
from raymem.storage.tables.tables import Tables
from raymem.types import BankSpec


def scanned(store: ColdStore) -> dict[str, object]:
    """Everything that the journal of lab/a says, times and epochs apart."""
    parts = list(store.journal(store.catalog.get("lab/a")).scan())
    tensors = {
        name: torch.cat([getattr(part, name) for part in parts]).tolist() for name in ("pos_T", "crc_T", "seq_T")
    }
    return tensors | {"names": [(part.streams, part.runs) for part in parts]}


def damaged(path: Path, generator: random.Random, times: int) -> Iterator[None]:
    """Flip a bit of a file, or cut it short; put it back afterwards."""
    whole = path.read_bytes()
    for number in range(times):
        broken = bytearray(whole)
        if number % 4 == 3:
            del broken[generator.randrange(len(whole)) :]
        else:
            broken[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(broken)
        yield
        path.write_bytes(whole)


def test_a_damaged_journal_is_called_corrupt_or_changes_nothing(
    store: ColdStore, journal: Journal, rows, capfd: pytest.CaptureFixture[str]
):
    for pos in range(0, 40, 20):
        journal.append(rows(20, pos, values=3))
    whole = scanned(store)
    folder = Path(store.uri) / f"journal-{store.catalog.get('lab/a').id}.lance"
    generator = random.Random(3)
    files = [*(folder / "data").iterdir(), max((folder / "_versions").glob("*.manifest"), key=os.path.getmtime)]
    errors = 0
    for path in sorted(files, key=os.path.getmtime):
        for _ in damaged(path, generator, 40):
            try:
                found = scanned(store)
            except Corrupt:
                errors += 1
            else:
                assert found == whole
    # rust says on stderr where it panicked
    capfd.readouterr()
    assert errors > 30
    assert scanned(store) == whole
    journal.append(rows(2, 40))


@pytest.mark.parametrize("in_folder", [True, False])
def test_a_damaged_snapshot_is_called_corrupt_or_changes_nothing(
    store: ColdStore, spec: BankSpec, monkeypatch, capfd: pytest.CaptureFixture[str], in_folder: bool
):
    if not in_folder:
        monkeypatch.setattr(Tables, "folder", lambda tables, name: None)
    snapshots = store.snapshots(store.catalog.create("lab/a", spec))
    tensors = {"small": torch.arange(3), "large": torch.randint(0, 255, (2001,), dtype=torch.uint8)}
    snapshots.save(5, tensors, {})
    data = sorted((Path(store.uri) / f"{snapshots._name}.lance" / "data").iterdir(), key=os.path.getsize)
    generator = random.Random(4)
    errors = 0
    for path in data:
        for _ in damaged(path, generator, 40):
            try:
                found = snapshots.latest(strict=True)
            except Corrupt:
                errors += 1
            else:
                assert found is not None
                assert all(torch.equal(found[1][name], tensor) for name, tensor in tensors.items())
    # rust says on stderr where it panicked
    capfd.readouterr()
    assert errors > 30
    assert snapshots.latest(strict=True) is not None


def test_a_damaged_row_is_named(store: ColdStore, journal: Journal, rows):
    journal.append(rows(9, 0))
    table = store.tables.open(f"journal-{store.catalog.get('lab/a').id}")
    table.update(where="pos = 8", values={"token": 0})
    found = journal.scan(stop=8)
    assert sum(map(len, found)) == 8
    with pytest.raises(Corrupt, match="position 8 does not match its checksum"):
        list(journal.scan())


def test_a_calibration_is_kept_once_and_checked(store: ColdStore):
    calibrations = store.calibrations
    calibrations.put("h'1", "model'", (3, 5), b"first")
    calibrations.put("h'1", "model'", (3, 5), b"second")
    calibrations.put("h2", "model'", (3, 5), b"newer")
    assert Calibrations(store.tables).get("h'1") == b"first"
    with pytest.raises(Corrupt, match=r"calibration h2 of this store can't be used.*raymem calibrate"):
        calibrations.find("model'", [3, 5])
    assert calibrations.find("model'", [5, 3]) is None
    with pytest.raises(CalibrationNotFound, match="raymem calibrate"):
        calibrations.get("h3")
    store.tables.open("calibrations").update(where="hash = 'h2'", values_sql={"data": "X'00'"})
    with pytest.raises(Corrupt, match="h2"):
        calibrations.get("h2")


def test_a_file_too_large_is_refused_and_the_bank_goes_on(tmp_path: Path, worker):
    said = worker("small_files", tmp_path / "store", "lab/a").communicate(timeout=60)[0].splitlines()
    assert said[0].startswith("storage_error append to bank lab/a: File too large; nothing was acknowledged")
    assert said[1] == "7"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"can't mount a small disk ({mounted.stderr.strip()}); the test with a file size limit stands in")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_full_disk_acknowledges_nothing_and_loses_nothing(small_disk: Path, spec: BankSpec, rows):
    store = ColdStore.open(str(small_disk / "store"))
    entry = store.catalog.create("lab/a", spec)
    journal, snapshots = store.journal(entry), store.snapshots(entry)
    journal.append(rows(50, 0))
    snapshots.save(50, {"x": torch.ones(10)}, {})
    filler = small_disk / "filler"
    fill(filler)
    for refused in (
        lambda: journal.append(rows(50, 50)),
        lambda: snapshots.save(60, {"x": torch.ones(10)}, {}),
        lambda: store.catalog.create("lab/b", spec),
        lambda: store.catalog.claim("lab/a", "me", 0),
    ):
        with pytest.raises(StorageError, match="No space left on device"):
            refused()
    # all of it can still be read
    assert sum(map(len, journal.scan())) == 50
    assert snapshots.latest(strict=True)[0] == 50
    assert [bank.name for bank in store.catalog.list()] == ["lab/a"]
    filler.unlink()
    journal.append(rows(7, 50))
    assert journal.end() == 57
    snapshots.save(57, {"x": torch.ones(10)}, {})
    assert store.catalog.claim("lab/a", "me", 0).epoch == 1


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The paths of what is synced from now on."""
    paths: set[str] = set()
    fsync = os.fsync

    def watch(handle: int) -> None:
        paths.add(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watch)
    return paths


def files_of(store: ColdStore) -> set[str]:
    """What a bank's journal is kept in, but marks: these are a name alone."""
    folder = Path(store.uri) / f"journal-{store.catalog.get('lab/a').id}.lance"
    return {str(path) for path in folder.rglob("*") if path.is_file() and path.suffix != ".synced"}


def test_a_fence_syncs_what_came_after_the_last_mark_alone(store: ColdStore, journal: Journal, rows, synced: set[str]):
    journal.append(rows(3, 0))
    before = files_of(store)
    synced.clear()
    store.journal(store.catalog.claim("lab/a", "you", 0)).fence()
    # the fence's own version and its transaction
    assert files_of(store) - before <= synced
    assert len(before & synced) == 0


def test_a_fence_syncs_all_of_a_table_whose_last_commit_has_no_mark(
    store: ColdStore, journal: Journal, rows, synced: set[str]
):
    journal.append(rows(3, 0))
    for mark in Path(store.uri).glob("journal-*/*.synced"):
        mark.unlink()
    before = files_of(store)
    synced.clear()
    store.journal(store.catalog.claim("lab/a", "you", 0)).fence()
    assert before <= synced


def test_a_commit_that_slips_in_before_a_fence_is_synced_by_it(
    store: ColdStore, journal: Journal, rows, synced: set[str], looked
):
    journal.append(rows(3, 0))
    before = files_of(store)

    def dies_before_its_sync() -> None:
        store.tables.open(f"journal-{journal.entry.id}").add(rows(2, 3).to_arrow())
        synced.clear()

    looked(dies_before_its_sync)
    later = store.journal(store.catalog.claim("lab/a", "you", 0))
    later.fence()
    assert later.end() == 5
    assert before < files_of(store) <= synced


def test_a_sync_takes_what_is_new_and_takes_it_again_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "t" / "data").mkdir(parents=True)
    (tmp_path / "t" / "data" / "one").touch()
    synced: list[str] = []
    fsync = os.fsync

    def watch(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        if path.endswith("broken"):
            raise OSError(5, "Input/output error", path)
        synced.append(os.path.relpath(path, tmp_path))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watch)
    folder = FolderSync(tmp_path / "t")
    folder.sync()
    assert sorted(synced) == [".", "t", "t/data", "t/data/one"]
    synced.clear()
    folder.sync()
    assert synced == []
    (tmp_path / "t" / "data" / "broken").touch()
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output"):
            folder.sync()
    (tmp_path / "t" / "data" / "broken").rename(tmp_path / "t" / "data" / "two")
    folder.sync()
    assert sorted(synced) == ["t/data", "t/data/two"]


@pytest.mark.parametrize("sync", ["disk", "none"])
def test_a_commit_is_synced_before_it_is_acknowledged_if_asked(
    tmp_path: Path, spec: BankSpec, rows, synced: set[str], sync
):
    store = ColdStore.open(str(tmp_path / "store"), sync=sync)
    journal = store.journal(store.catalog.create("lab/a", spec))
    journal.append(rows(3, 0))
    before = files_of(store)
    synced.clear()
    journal.append(rows(3, 3))
    new = files_of(store) - before
    assert len(new) >= 3
    folders = {str(Path(path).parent) for path in new}
    assert synced >= new | folders if sync == "disk" else not synced


def test_a_failed_sync_acknowledges_nothing_and_the_rows_are_found_again(journal: Journal, rows, monkeypatch):
    journal.append(rows(3, 0))

    def fail(handle: int) -> None:
        raise OSError(5, "Input/output error", "disk")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StorageError, match="Input/output error"):
            journal.append(rows(2, 3))
    # the commit is there all the same: whoever goes on must look first
    with pytest.raises(StorageError, match="ends at position 5, not 3: an earlier append was cut short"):
        journal.append(rows(2, 3))
    assert journal.find("s", "r", 3, 5) == dict(zip([3, 4], rows(2, 3).crc_T.tolist(), strict=True))
    journal.append(rows(1, 5))
    assert journal.end() == 6


def test_a_torn_commit_is_set_aside_unless_it_was_synced(store: ColdStore, journal: Journal, rows):
    journal.append(rows(3, 0))
    journal.append(rows(2, 3))
    folder = Path(store.uri) / f"journal-{store.catalog.get('lab/a').id}.lance"
    newest, before = sorted((folder / "_versions").glob("*.manifest"))[:2]
    assert [path.name for path in folder.glob("*.synced")] == [f"{newest.name}.synced"]
    whole = newest.read_bytes()
    newest.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Corrupt):
        journal.end()

    # as it is when the power fails between the commit and its sync
    (folder / f"{newest.name}.synced").rename(folder / f"{before.name}.synced")
    fresh = ColdStore.open(store.uri)
    found = fresh.journal(fresh.catalog.get("lab/a"))
    assert found.end() == 3
    found.append(rows(4, 3))
    assert [part.pos_T.tolist() for part in found.scan()] == [list(range(7))]
    assert (folder / f"{newest.name}.torn").exists()
