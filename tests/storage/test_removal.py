"""A bank can always be removed, whatever its line, its state or its rows hold."""

import json
from pathlib import Path

import pytest
import torch

import raymem
from raymem.errors import BankNotFound, Corrupt, RaymemError

KINDS = ["larimar", "spalm", "titans"]


@pytest.fixture
def store(tmp_path, tiny):
    with raymem.connect(tmp_path / "memory") as opened:
        opened.put_calibration(tiny.calibration)
        yield opened


def cold(store):
    return store._async.backend.cold


def bank_of(store, tiny, kind="spalm", name="lab/a"):
    bank = store.create(name, tiny.spec(kind))
    bank.write(tiny.trace(40))
    return bank


def tables(store) -> set[str]:
    return {path.name for path in Path(cold(store).uri).iterdir() if path.name.startswith(("journal-", "snapshots-"))}


def spoil_line(store, **values):
    cold(store).tables.open("catalog").update(where="name = 'lab/a'", values=values)


def spoil_state(store):
    """A snapshot whose checksums hold and whose numbers mean nothing."""
    entry = cold(store).catalog.get("lab/a")
    pos, tensors, meta = cold(store).snapshots(entry).latest()
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = torch.full_like(tensor, float("nan"))
        elif not name.startswith("encoder."):
            tensors[name] = torch.full_like(tensor, torch.iinfo(tensor.dtype).min)
    cold(store).snapshots(entry).save(pos + 1, tensors, meta)


LINES = {
    "no spec": {"spec": "{"},
    "a spec of another time": {"spec": json.dumps({"kind": "nothing", "fingerprint": {}})},
    "an unknown kind": None,
    "tags that are none": {"tags": "[1]"},
    "an epoch at the end of numbers": {"epoch": 2**63 - 1},
    "a state that is none": {"state": "lukewarm"},
    "an owner that has ended": {"owner": "process 1 since 1.00 on nowhere as 00000000", "state": "hot"},
}


@pytest.mark.parametrize("what", LINES)
@pytest.mark.parametrize("hot", [True, False], ids=["hot", "cold"])
def test_a_bank_with_a_spoilt_line_goes_and_the_others_stay(store, tiny, what, hot):
    bank, other = bank_of(store, tiny), bank_of(store, tiny, name="lab/b")
    before = tables(store)
    other.detach()
    if not hot:
        bank.detach()
    values = LINES[what]
    if values is None:
        spec = json.loads(tiny.spec("spalm").model_dump_json()) | {"kind": "nothing"}
        values = {"spec": json.dumps(spec)}
    spoil_line(store, **values)
    # one spoilt line does not hide the others
    assert "lab/b" in {info.name for info in store.banks()}
    store.sweep()
    assert len(tables(store)) >= len(before)

    store.delete("lab/a")

    with pytest.raises(BankNotFound):
        store.bank("lab/a").info()
    assert [info.name for info in store.banks()] == ["lab/b"]
    assert len(tables(store)) == 2
    assert bank_of(store, tiny).info().rows == 40
    assert other.attach().rows == 40


def test_a_line_that_can_not_be_read_names_the_way_out(store, tiny):
    bank_of(store, tiny).detach()
    spoil_line(store, spec="{")
    with pytest.raises(Corrupt, match="raymem bank rm lab/a"):
        store.bank("lab/a").info()


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_nonsense_is_passed_over_and_made_of_the_rows(store, tiny, kind, tmp_path):
    bank = bank_of(store, tiny, kind)
    digest = bank.digest()
    bank.detach()
    spoil_state(store)

    with raymem.connect(tmp_path / "memory") as again:
        bank = again.bank("lab/a")
        bank.attach()
        assert bank.digest() == digest
        bank.detach()
        again.delete("lab/a")
        assert again.banks() == []


@pytest.mark.parametrize("hot", [True, False], ids=["hot", "cold"])
@pytest.mark.parametrize("what", ["journal", "snapshots"])
def test_a_bank_whose_files_are_torn_goes(store, tiny, what, hot, tmp_path):
    bank = bank_of(store, tiny, "larimar")
    bank.detach()
    if hot:
        bank.attach()
    for file in Path(cold(store).uri).glob(f"{what}-*.lance/**/*"):
        if file.is_file():
            file.write_bytes(b"nonsense")

    with raymem.connect(tmp_path / "other") as _:
        store.delete("lab/a")

    assert (store.banks(), tables(store)) == ([], set())


def test_a_bank_that_can_not_be_loaded_after_a_restart_goes(store, tiny, tmp_path):
    bank_of(store, tiny, "larimar")
    store.close()

    with raymem.connect(tmp_path / "memory") as again:
        cold(again).tables.open("calibrations").delete("true")
        with pytest.raises(RaymemError):
            again.bank("lab/a").read(tiny.trace(3).hidden)
        again.delete("lab/a")
        assert again.banks() == []


def test_a_bank_whose_state_can_not_be_written_is_detached_without(store, tiny, monkeypatch):
    from raymem.errors import StorageError
    from raymem.storage.snapshots import Snapshots

    bank = bank_of(store, tiny, "titans")
    digest = bank.digest()

    def full(*_):
        raise StorageError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(Snapshots, "save", full)
        assert bank.detach().state == "cold"
    bank.attach()
    assert bank.digest() == digest


def test_rows_that_lie_in_the_log_go_with_their_bank(store, tiny):
    """A removed bank's rows are in no file of the store."""
    bank_of(store, tiny)
    other = bank_of(store, tiny, name="lab/b")
    id = cold(store).catalog.get("lab/a").id
    log = next(path.stem for path in Path(cold(store).uri).glob("log-*"))
    assert cold(store).tables.open(log).search().where(f"bank = '{id}'").to_list()

    store.delete("lab/a")

    assert not cold(store).tables.open(log).search().where(f"bank = '{id}'").to_list()
    assert other.info().rows == 40
