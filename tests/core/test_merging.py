import dataclasses
import os

import pytest
import torch

from raymem import BankSpec, Store, Trace
from raymem.errors import (
    BankExists,
    BankNotFound,
    FingerprintMismatch,
    InvalidInput,
    InvalidName,
    InvalidSpec,
    StorageError,
    Unsupported,
)
from raymem.memory import keeps_rows, kinds, merge_rule
from raymem.rows import JournalRows
from raymem.storage.kway_merge import Tally, interleave, merged
from raymem.storage.store import ColdStore

# titans merges only where it is linear
OPTIONS = {"titans": {"depth": 1}}


def _at(trace: Trace, time: float) -> Trace:
    return dataclasses.replace(trace, time=time)


def _filled(store: Store, spec: BankSpec, make_trace) -> list[tuple[str, Trace]]:
    """Two banks written in turns; what was written where, in order of time."""
    alice, bob = (store.create(f"lab/{name}", spec) for name in ("alice", "bob"))
    written = []
    for step in range(6):
        for bank in (alice,) if step % 2 else (alice, bob):
            trace = make_trace(7, run=f"r{step}", seed=step % 2)
            bank.write(_at(trace, step))
            written.append((bank.name.partition("/")[2], _at(trace, step)))
    return written


@pytest.mark.parametrize("kind", kinds())
def test_a_merged_bank_is_one_that_was_written_in_the_order_of_times(store: Store, spec: BankSpec, make_trace, kind):
    spec = spec.model_copy(update={"kind": kind})
    written = _filled(store, spec, make_trace)
    report = store.merge("lab/all", ["lab/alice", "lab/bob"], rebuild=merge_rule(kind) != "exact")
    assert (report.rows, report.sources) == (63, {"lab/alice": 42, "lab/bob": 21})
    assert report.streams == {"lab/alice": "alice/", "lab/bob": "bob/"}
    assert (report.rule, report.rebuilt, report.conflicts) == (merge_rule(kind), True, 0)
    alone = store.create("lab/alone", spec)
    for name, trace in written:
        alone.write(dataclasses.replace(trace, stream=f"{name}/s"))
    all_ = store.bank("lab/all")
    assert all_.digest() == alone.digest()
    assert all_.info().spec.budget_bytes == spec.budget_bytes * (2 if keeps_rows(kind) else 1)
    assert all_.tokens("bob/s", "r2", 0, 9).tolist() == store.bank("lab/bob").tokens("s", "r2", 0, 9).tolist()


@pytest.mark.parametrize("kind", [kind for kind in kinds() if merge_rule(kind) == "approximate"])
def test_approximate_kinds_merge_their_states_and_keep_the_result(store: Store, spec: BankSpec, make_trace, kind):
    spec = spec.model_copy(update={"kind": kind, "options": OPTIONS.get(kind, {})})
    _filled(store, spec, make_trace)
    report = store.merge("lab/all", ["lab/alice", "lab/bob"])
    assert not report.rebuilt
    bank = store.bank("lab/all")
    assert bank.tags() == {"merged": 63}
    digest, readout = bank.digest(), bank.read(make_trace(5).hidden, 4)
    assert bool((readout.relevance_Q > 0).any())
    # runs go on where they ended, rows are known by their new names
    assert bank.write(_at(make_trace(7, stream="alice/s", run="r0", seed=0), 0.0)).duplicates == 7
    bank.write(make_trace(30, stream="new"))
    assert torch.equal(bank.read(make_trace(5).hidden, 4, as_of="merged").values_QV, readout.values_QV)
    bank.detach()
    fork = store.fork("lab/all", "lab/fork", "merged")
    fork.attach()
    assert fork.digest() == digest


@pytest.mark.parametrize("kind", ["ntm", "dnc", "titans"])
def test_kinds_that_do_not_merge_say_why_and_what_does(store: Store, spec: BankSpec, make_trace, kind):
    options = {"titans": {"depth": 2}}.get(kind, {})
    _filled(store, spec.model_copy(update={"kind": kind, "options": options}), make_trace)
    with pytest.raises(Unsupported, match=r"(can't be merged|linear).*rebuild=True"):
        store.merge("lab/all", ["lab/alice", "lab/bob"])
    assert [info.name for info in store.banks()] == ["lab/alice", "lab/bob"]
    assert store.merge("lab/all", ["lab/alice", "lab/bob"], rebuild=True).rebuilt


def test_rows_of_one_name_are_told_apart_by_content(store: Store, spec: BankSpec, make_trace):
    alice = store.create("lab/alice", spec)
    alice.write(make_trace(10))
    bob = store.fork("lab/alice", "lab/bob")
    alice.write(make_trace(5, seq=10))
    bob.write(make_trace(3, seq=10, seed=7))
    bob.write(make_trace(4, run="own"))
    report = store.merge("lab/all", ["lab/alice", "lab/bob"], rename=False)
    assert (report.rows, report.duplicates, report.conflicts) == (19, 10, 3)
    assert report.conflict_rows[0] == "lab/bob: stream 's' run 'r' row 10"
    everything = store.bank("lab/all")
    assert everything.tokens("s", "r", 0, 99).tolist() == alice.tokens("s", "r", 0, 99).tolist()
    assert everything.info().rows == 19
    # with names of their own nothing is left out
    assert store.merge("lab/named", ["lab/alice", "lab/bob"]).rows == 32


def test_what_differs_is_named_and_nothing_is_made(store: Store, spec: BankSpec, make_trace, fingerprint):
    store.create("lab/alice", spec).write(make_trace(3))
    store.create("lab/titans", spec.model_copy(update={"kind": "titans"}))
    store.create("lab/options", spec.model_copy(update={"options": {"tau": 0.5}}))
    store.create(
        "lab/model", spec.model_copy(update={"fingerprint": fingerprint.model_copy(update={"tokenizer": "x"})})
    )
    for source, error, named in (
        ("lab/titans", InvalidSpec, "kind: lab/alice has 'spalm', lab/titans has 'titans'"),
        ("lab/options", InvalidSpec, "tau"),
        ("lab/model", FingerprintMismatch, "tokenizer"),
        ("lab/alice", InvalidInput, "different banks"),
        ("lab/none", BankNotFound, "lab/none"),
    ):
        with pytest.raises(error, match=named):
            store.merge("lab/all", ["lab/alice", source])
    with pytest.raises(BankExists):
        store.merge("lab/titans", ["lab/alice"])
    with pytest.raises(InvalidInput):
        store.merge("lab/all", [])
    assert len(store.banks()) == 4


def test_names_say_the_namespace_where_the_bank_does_not_tell(store: Store, spec: BankSpec, make_trace):
    for name in ("a/alice", "b/alice"):
        store.create(name, spec).write(make_trace(3))
    assert store.merge("c/all", ["a/alice", "b/alice"]).streams == {"a/alice": "a/alice/", "b/alice": "b/alice/"}
    store.create("a/long", spec).write(make_trace(3, stream="x" * 255))
    with pytest.raises(InvalidName, match="256"):
        store.merge("c/long", ["a/long"])


def test_a_merge_that_fails_half_way_leaves_nothing(store: Store, spec: BankSpec, make_trace, monkeypatch):
    _filled(store, spec.model_copy(update={"kind": "larimar"}), make_trace)
    cold: ColdStore = store._async.backend.cold
    before = set(os.listdir(cold.uri))

    def full(*_args: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(cold.catalog, "_commit", full)
    with pytest.raises(StorageError):
        store.merge("lab/all", ["lab/alice", "lab/bob"])
    assert set(os.listdir(cold.uri)) == before
    assert len(store.banks()) == 2


def test_interleaving_keeps_each_journals_order_and_goes_by_time(make_trace):
    def rows(times: list[float], stream: str) -> list[JournalRows]:
        trace = make_trace(len(times), stream=stream)
        made = JournalRows.of(trace, 0, 0)
        made = dataclasses.replace(made, time_T=torch.tensor(times, dtype=torch.float64))
        return [made.part(0, 2), made.part(2, len(times))]

    sources = [rows([1, 5, 2, 6], "a"), rows([1, 1, 5, 9, 0], "b")]
    order = [(index, seq) for index, piece in interleave(sources) for seq in piece.seq_T.tolist()]
    assert order == [(0, 0), (1, 0), (1, 1), (0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (1, 4)]
    tables = list(merged(sources, ["x/a", "x/b"], ["a/", "b/"], Tally()))
    back = [part.verify() for table in tables for part in JournalRows.from_arrow(table)]
    assert [pos for part in back for pos in part.pos_T.tolist()] == list(range(9))
