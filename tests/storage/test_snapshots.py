"""A snapshot is whole or does not exist, and comes back bit for bit in another process."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from raymem.errors import Corrupt, StorageError
from raymem.storage import snapshots as snapshots_module
from raymem.storage.erasure.audit import ErasedRows, inspect
from raymem.storage.journal.tombstones import Tombstones
from raymem.storage.snapshots import Snapshots
from raymem.storage.store import ColdStore
from raymem.storage.sweeper import sweep
from raymem.storage.tables.files import Files
from raymem.storage.tables.tables import Tables
from raymem.types import BankSpec, Selection

DTYPES = [
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.complex64, torch.complex128,
]  # fmt: skip


@pytest.fixture
def snapshots(store: ColdStore, spec: BankSpec) -> Snapshots:
    return store.snapshots(store.catalog.create("lab/a", spec))


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def state() -> dict[str, torch.Tensor]:
    return {"keys_NK": torch.randn(7, 5), "count": torch.tensor(3)}


def test_a_bank_without_snapshots_has_none(snapshots: Snapshots):
    assert snapshots.latest() is None


def test_every_dtype_and_shape_comes_back_bit_for_bit(snapshots: Snapshots):
    tensors = {str(dtype): torch.randint(0, 2, (3, 5)).to(dtype) for dtype in DTYPES}
    tensors |= {
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(-0.0),
        "strided": torch.randn(6, 4).double().t(),
        "special": torch.tensor([math.nan, math.inf, -math.inf, -0.0]),
        "it's": torch.randn(2, 3, 4, requires_grad=True),
    }
    snapshots.save(41, tensors, {"nested": {"list": [1, "x", None]}})
    pos, back, meta = snapshots.latest(strict=True)
    assert (pos, meta) == (41, {"nested": {"list": [1, "x", None]}})
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(back[name]) == raw(tensor.detach()), name


def test_a_snapshot_of_nothing_is_a_snapshot(snapshots: Snapshots):
    snapshots.save(0, {}, {})
    assert snapshots.latest() == (0, {}, {})


@pytest.fixture(params=["folder", "store"])
def kept_in(request, monkeypatch: pytest.MonkeyPatch) -> str:
    """Read from files at hand, or through LanceDB as an object store is."""
    if request.param == "store":
        monkeypatch.setattr(Tables, "folder", lambda tables, name: None)
    return request.param


@pytest.mark.parametrize("part_bytes", [37, 4096, 2**22])
@pytest.mark.parametrize("last", [1, 30, 2 * 4096 - 877 % 4096, 9 * 4096 + 1])
@pytest.mark.usefixtures("kept_in")
def test_big_and_small_tensors_share_parts(snapshots, monkeypatch: pytest.MonkeyPatch, part_bytes: int, last: int):
    monkeypatch.setattr(snapshots_module, "_PART_BYTES", part_bytes)
    tensors = {
        name: torch.randint(0, 255, (size,), dtype=torch.uint8)
        for name, size in zip("abcdef", (1, 99, 0, 777 + 4096, 0, last), strict=True)
    }
    snapshots.save(1, tensors, {})
    _, back, _ = snapshots.latest(strict=True)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_the_newest_position_wins_and_old_ones_are_dropped(store: ColdStore, snapshots: Snapshots):
    for pos in (3, 9, 5, 9):
        snapshots.save(pos, {"x": torch.full((50_000,), float(pos))}, {"number": pos})
    assert [row["pos"] for row in snapshots._manifests()] == [9, 9]
    # two snapshots of 200 kB are left on disk
    assert store.tables.open(snapshots._name).stats()["total_bytes"] < 500_000
    folder = f"{store.uri}/{snapshots._name}.lance/data"
    assert sum(entry.stat().st_size for entry in os.scandir(folder)) < 500_000


def damage(store: ColdStore, snapshots: Snapshots, pos: int, column: str, value: object, start: int = 0) -> None:
    table = store.tables.open(snapshots._name)
    where = f"pos = {pos} AND start = {start}"
    (row,) = table.to_lance().to_table(filter=where, blob_handling="all_binary").to_pylist()
    table.delete(where)
    table.add(pa.Table.from_pylist([row | {column: value(row[column]) if callable(value) else value}], table.schema))


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    ("start", "column", "value"),
    [
        (0, "data", flipped),
        (0, "data", lambda data: data[:-1]),
        (0, "data", lambda data: data + b"x"),
        (0, "data", None),
        (0, "crc32c", None),
        (0, "start", 3),
        (100, "data", flipped),
        (100, "start", 200),
        (-1, "manifest", b"{}"),
        (-1, "manifest", None),
        (-1, "crc32c", None),
    ],
)
@pytest.mark.usefixtures("kept_in")
def test_a_corrupt_newest_snapshot_falls_back_to_the_one_before(
    store, snapshots, monkeypatch, caplog, start, column, value
):
    monkeypatch.setattr(snapshots_module, "_PART_BYTES", 100)
    first, second = state(), state()
    snapshots.save(5, first, {"n": 1})
    snapshots.save(8, second, {"n": 2})
    damage(store, snapshots, 8, column, value, start)
    pos, tensors, meta = snapshots.latest()
    assert (pos, meta, snapshots.fallbacks) == (5, {"n": 1}, 1)
    assert raw(tensors["keys_NK"]) == raw(first["keys_NK"])
    # the command line sends logs to stderr, for the whole process
    assert "snapshot passed over" in caplog.text
    with pytest.raises(Corrupt, match="lab/a"):
        snapshots.latest(strict=True)


def test_a_part_that_is_gone_is_missed(store: ColdStore, snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(snapshots_module, "_PART_BYTES", 100)
    for gone in (0, 100):
        snapshots.save(5, state(), {})
        store.tables.open(snapshots._name).delete(f"start = {gone}")
        with pytest.raises(Corrupt, match="lacks some of the 148 bytes"):
            snapshots.latest(strict=True)


def test_a_checksum_says_where(store: ColdStore, snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(snapshots_module, "_PART_BYTES", 10)
    snapshots.save(5, {"good": torch.zeros(3), "bad": torch.zeros(3)}, {})
    damage(store, snapshots, 5, "data", flipped, 20)
    with pytest.raises(Corrupt, match="from byte 20 on") as caught:
        snapshots.latest(strict=True)
    assert caught.value.details["start"] == 20
    assert snapshots.latest() is None


def test_a_file_that_is_cut_short_is_not_read_as_what_memory_held(store: ColdStore, snapshots: Snapshots):
    tensors = {"x": torch.randint(0, 255, (200_000,), dtype=torch.uint8)}
    snapshots.save(5, tensors, {})
    read = snapshots_module._read
    with pytest.MonkeyPatch.context() as patch:
        # all zeros would pass for what the file doesn't say
        patch.setattr(np, "empty", lambda *args: np.full(*args[:1], 0xA5, *args[1:]))
        assert torch.equal(snapshots.latest(strict=True)[1]["x"], tensors["x"])
        (path,) = sorted(Path(store.uri).glob("snapshots-*/data/*"), key=os.path.getsize)[1:]
        patch.setattr(snapshots_module, "_read", lambda *args: (os.truncate(path, 100_000), read(*args)))
        with pytest.raises(Corrupt, match="checksum"):
            snapshots.latest(strict=True)


def test_reads_that_come_in_pieces_are_put_together(snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch):
    tensors = {"x": torch.randint(0, 255, (50_001,), dtype=torch.uint8), "y": torch.randn(3)}
    snapshots.save(5, tensors, {})
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda handle, views, position: read(handle, [views[0][:777]], position))
    _, back, _ = snapshots.latest(strict=True)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("how", ["saves", "drop"])
def test_a_snapshot_that_is_being_read_may_be_dropped(store: ColdStore, snapshots: Snapshots, monkeypatch, how: str):
    tensors = {"x": torch.randint(0, 255, (9_000,), dtype=torch.uint8)}
    monkeypatch.setattr(snapshots_module, "_PART_BYTES", 1000)
    snapshots.save(5, tensors, {})
    monkeypatch.setattr(snapshots_module, "_READERS", 1)
    other, read, reads = store.snapshots(store.catalog.get("lab/a")), snapshots_module._read, []

    def meanwhile(*args) -> None:
        reads.append(args)
        if len(reads) == 3 and how == "drop":
            store.tables.drop(snapshots._name)
        elif len(reads) == 3:
            for pos in (6, 7):
                other.save(pos, {"x": torch.zeros(9)}, {})
        read(*args)

    monkeypatch.setattr(snapshots_module, "_read", meanwhile)
    pos, back, _ = snapshots.latest()
    assert (len(reads), pos, snapshots.fallbacks) == (9, 5, 0)
    assert torch.equal(back["x"], tensors["x"])


def test_who_looks_for_erased_rows_can_not_read_a_part_without_bytes(store: ColdStore, snapshots: Snapshots):
    looks = ErasedRows(store.catalog.get("lab/a").id, Selection(stream="s"), 0, Tombstones.of(range(3), 3))
    snapshots.save(5, {"memory.pos": torch.arange(5)}, {})
    check = inspect(Files(store.tables), looks)
    assert (check.found, check.unreadable) == (3, 0)
    damage(store, snapshots, 5, "data", None)
    assert inspect(Files(store.tables), looks).unreadable > 0


def cut_short(snapshots: Snapshots, pos: int) -> None:
    """Begin to save: the parts are written and synced, the manifest row is not."""

    def fail() -> None:
        raise OSError(28, "No space left on device", "somewhere")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshots_module, "_marker", lambda *args: fail())
        with pytest.raises(StorageError, match="No space left on device"):
            snapshots.save(pos, state(), {})
    assert len(snapshots.unfinished()) == 1


def test_a_snapshot_cut_short_does_not_exist(snapshots: Snapshots):
    snapshots.save(5, state(), {})
    cut_short(snapshots, 9)
    assert snapshots.latest(strict=True)[0] == 5


def test_parts_of_a_snapshot_cut_short_go_with_the_next_save_or_a_sweep(store: ColdStore, snapshots: Snapshots):
    def size() -> int:
        files = Files(store.tables)
        (table,) = [name for name in files.tables() if name.startswith("snapshots")]
        return sum(file.bytes for file in files.of(table) if file.holds_rows)

    snapshots.save(5, state(), {})
    cut_short(snapshots, 9)
    snapshots.save(10, state(), {})
    assert not snapshots.unfinished()
    whole = size()

    cut_short(snapshots, 12)
    assert size() > whole
    assert sweep(store, age_s=3600.0).unfinished == 0
    assert sweep(store, age_s=0.0, dry_run=True).unfinished == 1
    assert sweep(store, age_s=0.0).unfinished == 1
    assert not snapshots.unfinished()
    assert size() == whole
    assert snapshots.latest(strict=True)[0] == 10


def test_meta_must_be_plain(snapshots: Snapshots):
    with pytest.raises(ValueError, match="JSON"):
        snapshots.save(1, {}, {"x": math.nan})
    assert snapshots.latest() is None


def test_another_process_reads_the_same_bytes(store: ColdStore, journal, rows, worker):
    parts = rows(9, 0, values=3)
    journal.append(parts)
    tensors = {"w": torch.randn(5, 3).bfloat16(), "cov": torch.randn(2, 2).double()}
    store.snapshots(store.catalog.get("lab/a")).save(9, tensors, {"n": 1})
    said = json.loads(worker("read", store.uri, "lab/a").communicate(timeout=60)[0])
    assert said["crcs"] == parts.crc_T.tolist()
    assert (said["pos"], said["meta"]) == (9, {"n": 1})
    assert said["tensors"] == {name: tensor.view(torch.uint8).tolist() for name, tensor in tensors.items()}
