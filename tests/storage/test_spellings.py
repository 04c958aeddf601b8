"""Rows that earlier versions took: labels in other Unicode forms, times that are none. Planted below the edge."""

import dataclasses
import json
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

import raymem
from raymem import BankSpec, Settings, Store, Trace
from raymem.config import ColdSettings
from raymem.errors import SequenceConflict
from raymem.rows import JournalRows
from raymem.storage.spellings import alike, has_others, same
from raymem.storage.store import ColdStore

NFC, NFD = "caf\u00e9", "cafe\u0301"
SETTINGS = Settings(cold=ColdSettings(sync="none"))
NOT_TIMES = [float("nan"), float("inf"), float("-inf"), -1e300, 1e300]


class Planted:
    """A store whose banks get rows that no version would take any more."""

    def __init__(self, folder: Path, tiny: Any) -> None:
        self.folder = folder
        self.tiny = tiny
        with self.open() as store:
            store.put_calibration(tiny.calibration)

    def open(self) -> Store:
        return raymem.connect(self.folder, settings=SETTINGS)

    def plant(self, name: str, *rows: tuple[Trace, list[float] | None], spec: BankSpec | None = None) -> None:
        """Make a detached bank whose journal holds these rows."""
        with self.open() as store:
            store.create(name, spec or self.tiny.spec()).detach()
        cold = ColdStore.open(str(self.folder))
        journal = cold.journal(cold.catalog.get(name))
        for trace, times in rows:
            made = JournalRows.of(trace, journal.end(), 0)
            if times is not None:
                made = dataclasses.replace(made, time_T=torch.tensor(times, dtype=torch.float64))
            journal.append(made)


@pytest.fixture
def planted(tmp_path: Path, tiny: Any) -> Planted:
    return Planted(tmp_path / "memory", tiny)


def test_rows_of_either_spelling_are_found_by_either(planted: Planted, tiny: Any):
    old, new = tiny.trace(9, stream=NFD, run="r1"), tiny.trace(4, stream=NFC, run="r2", seed=1)
    planted.plant("lab/a", (old, None), (new, None))
    with planted.open() as store:
        bank = store.bank("lab/a")
        for attached in (False, True):
            if attached:
                bank.attach()
            for stream in (NFC, NFD):
                assert torch.equal(bank.tokens(stream, "r1", 0, 99), old.tokens)
                assert torch.equal(bank.tokens(stream, "r2", 1, 3), new.tokens[1:3])
            assert bank.tokens("cafe", "r1", 0, 99).tolist() == []


def test_a_file_keeps_a_run_in_each_spelling_that_its_bank_has(planted: Planted, tiny: Any, tmp_path: Path):
    old, new = tiny.trace(9, stream=NFD, run="r1"), tiny.trace(4, stream=NFC, run="r1", seed=1)
    planted.plant("lab/a", (old, None), (new, None))
    with planted.open() as store:
        bank = store.bank("lab/a")
        bank.attach()
        bank.export(tmp_path / "a.raymem")
        copy = store.import_(tmp_path / "a.raymem", "lab/copy")
        copy.attach()
        assert copy.digest() == bank.digest()
        for stream in (NFC, NFD):
            assert torch.equal(copy.tokens(stream, "r1", 0, 99), bank.tokens(stream, "r1", 0, 99))
        again = copy.write(tiny.trace(4, stream=NFD, run="r1", seed=1))
        assert (again.rows, again.duplicates) == (0, 4)
        assert copy.erase(stream=NFD).rows == 13


@pytest.mark.parametrize("asked", [NFC, NFD])
@pytest.mark.parametrize("scope", ["rows", "run"])
def test_erasing_one_spelling_erases_the_other(planted: Planted, tiny: Any, asked: str, scope: Any):
    other = tiny.trace(5, stream="cafe", run="r1", seed=2)
    planted.plant("lab/a", (tiny.trace(9, stream=NFD, run="r1"), None), (other, None))
    with planted.open() as store:
        bank = store.bank("lab/a")
        bank.attach()
        bank.write(tiny.trace(4, stream=NFC, run="r2", seed=1))
        fork = store.fork("lab/a", "lab/fork")
        receipt = bank.erase(stream=asked, scope=scope)
        assert (receipt.rows, receipt.status, receipt.proves) == (13, "complete", True)
        for each in (bank, fork):
            assert each.info().rows == 5
            assert {row.stream for row in each.read(tiny.trace(4).hidden, 20).rows(2)} == {"cafe"}
            assert torch.equal(each.tokens("cafe", "r1", 0, 99), other.tokens)


def test_a_run_goes_on_under_the_name_that_it_has(planted: Planted, tiny: Any):
    planted.plant("lab/a", (tiny.trace(9, stream=NFD, run="r1"), None))
    for snapshot in (False, True):
        with planted.open() as store:
            bank = store.bank("lab/a")
            bank.attach()
            for stream in (NFC, NFD):
                again = bank.write(tiny.trace(9, stream=stream, run="r1"))
                assert (again.rows, again.duplicates) == (0, 9)
                with pytest.raises(SequenceConflict):
                    bank.write(tiny.trace(9, stream=stream, run="r1", seed=3))
            more = bank.write(tiny.trace(3, stream=NFC, run="r1", seq=9 + 3 * snapshot))
            assert (more.rows, more.duplicates, more.gaps) == (3, 0, 0)
            bank.detach()
    with planted.open() as store:
        assert torch.equal(store.bank("lab/a").tokens(NFC, "r1", 0, 99), tiny.trace(15).tokens)


def test_partitions_keep_a_stream_together_however_it_is_spelled(planted: Planted, tiny: Any):
    with planted.open() as store:
        bank = store.create("lab/parts", tiny.spec(), partitions=3)
        layout = store._async.backend._partitions.get("lab/parts")  # type: ignore[attr-defined]
        assign = store._async.backend._partitions.assign  # type: ignore[attr-defined]
        assignments = {stream: assign(layout, [stream])[stream].home for stream in ("x", NFD, NFC, "y")}
        assert assignments[NFC] == assignments[NFD] != assignments["x"]
        bank.write(tiny.trace(9, stream=NFC))
        assert torch.equal(bank.tokens(NFD, "r", 0, 99), tiny.trace(9).tokens)
        assert bank.erase(stream=NFD).rows == 9


def test_tags_are_found_by_any_spelling(planted: Planted, tiny: Any):
    planted.plant("lab/a", (tiny.trace(9), None))
    cold = ColdStore.open(str(planted.folder))
    cold.catalog.change(cold.catalog.get("lab/a"), tags=json.dumps({NFD: 5}))
    with planted.open() as store:
        bank = store.bank("lab/a")
        assert bank.tags() == {NFC: 5}
        assert store.fork("lab/a", "lab/b", at=NFD).info().rows == 5
        assert bank.tag("other") == {NFC: 5, "other": 9}
        assert bank.untag(NFD) == {"other": 9}


def test_conditions_hold_for_every_spelling():
    labels = ["K", "\u212a", "é", "e\u0301", "e", "caf\u00e9;", "cafe\u0301\u037e", "日", "a_b%", "a"]
    table = pa.table({"stream": labels})
    composed = pc.utf8_normalize(table["stream"], "NFC").to_pylist()
    assert composed == [unicodedata.normalize("NFC", label) for label in labels]
    for wanted in labels:
        assert has_others(wanted) or alike("stream", wanted) == f"stream = '{wanted}'"
        assert [label for label in labels if same(label, wanted)] == [
            label for label, name in zip(labels, composed, strict=True) if name == unicodedata.normalize("NFC", wanted)
        ]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("partitions", [1, 2])
def test_merging_ends_where_times_are_none(planted: Planted, tiny: Any, partitions: int):
    times = [NOT_TIMES[0], 5.0, *NOT_TIMES, 6.0, 4.0]
    planted.plant("lab/a", (tiny.trace(9, stream="a"), times))
    planted.plant("lab/b", (tiny.trace(9, stream="b", seed=1), times))
    with planted.open() as store:
        if partitions > 1:
            store.create("lab/c", tiny.spec(), partitions=partitions).write(tiny.trace(3, stream="c"))
        sources = ["lab/a", "lab/b", *(["lab/c"] if partitions > 1 else [])]
        report = store.merge("lab/all", sources)
        assert report.rows == 18 + 3 * (partitions > 1)
        for seed, source in enumerate("ab"):
            found = store.bank("lab/all").tokens(f"{source}/{source}", "r", 0, 99)
            assert torch.equal(found, tiny.trace(9, seed=seed).tokens)


def test_a_row_of_no_time_counts_as_old(planted: Planted, tiny: Any):
    traces = [tiny.trace(3, run=f"r{place}", seed=place) for place in range(len(NOT_TIMES))]
    late = dataclasses.replace(tiny.trace(3, run="late", seed=9), time=200.0)
    early = dataclasses.replace(tiny.trace(3, run="early", seed=8), time=100.0)
    odd = [(trace, [time] * 3) for trace, time in zip(traces, NOT_TIMES, strict=True)]
    planted.plant("lab/a", (early, None), *odd, (late, None))
    with planted.open() as store:
        bank = store.bank("lab/a")
        bank.attach()
        query = tiny.trace(4).hidden
        runs = {row.run for query_row in range(4) for row in bank.read(query, 64, as_of=150.0).rows(query_row)}
        assert runs == {"early", *(trace.run for trace in traces)}
        receipt = bank.erase(before=50.0)
        assert (receipt.rows, receipt.status, receipt.proves) == (15, "complete", True)
        assert bank.info().rows == 6
        assert bank.erase(before=0.0).rows == 0
