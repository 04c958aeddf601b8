from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

import raymem
from raymem import Bank, BankSpec, Readout, RowRef, Store
from raymem.errors import BankExists, BankNotFound, Conflict, InvalidInput, SequenceConflict, TagNotFound

KINDS = ["spalm", "titans", "larimar"]
# the same for every kind
one_kind = pytest.mark.parametrize("bank", ["spalm"], indirect=True)


@pytest.fixture(params=KINDS)
def bank(request: pytest.FixtureRequest, store: Store, spec: BankSpec) -> Bank:
    return store.create("lab/alice", spec.model_copy(update={"kind": request.param}))


def assert_same(got: Readout, expected: Readout) -> None:
    for name in ("values_QV", "relevance_Q", "tokens_Qk", "scores_Qk", "pos_Qk", "seq_Qk"):
        mine, theirs = getattr(got, name), getattr(expected, name)
        assert (mine is None) == (theirs is None), name
        assert mine is None or torch.equal(mine, theirs), name
    queries = range(len(got.relevance_Q))
    assert [got.rows(query) for query in queries] == [expected.rows(query) for query in queries]


@one_kind
def test_tags_are_listed_moved_and_forgotten(bank: Bank, make_trace):
    bank.write(make_trace(4))
    bank.tag("a")
    bank.tag("b")
    bank.write(make_trace(4, seq=4))
    bank.tag("a")
    assert bank.tags() == {"a": 8, "b": 4}
    assert bank.untag("b") == {"a": 8}
    with pytest.raises(TagNotFound, match=r"no tag 'b'; it has \['a'\]"):
        bank.untag("b")


def test_a_read_as_of_a_tag_is_the_read_of_then(bank: Bank, make_trace):
    queries = make_trace(6, seed=3).hidden
    empty = bank.read(queries, 5)
    bank.tag("empty")
    for part in range(4):
        bank.write(make_trace(10, seq=10 * part))
        bank.write(make_trace(7, run="other", seq=7 * part))
    then = bank.read(queries, 5, start=2)
    bank.tag("then")
    bank.write(make_trace(50, seq=40))
    bank.write(make_trace(50, seed=3, run="third"))
    assert_same(bank.read(queries, 5, start=2, as_of="then"), then)
    assert_same(bank.read(queries, 5, as_of="empty"), empty)
    assert not torch.equal(bank.read(queries, 5, start=2).relevance_Q, then.relevance_Q)


def test_a_read_as_of_a_tag_survives_eviction(store: Store, spec: BankSpec, make_trace):
    bank = store.create("lab/small", spec.model_copy(update={"budget_bytes": 4000}))
    bank.write(make_trace(50))
    then = bank.read(make_trace(50).hidden[40:], 5)
    bank.tag("then")
    bank.write(make_trace(200, run="other"))
    assert_same(bank.read(make_trace(50).hidden[40:], 5, as_of="then"), then)


def test_a_read_as_of_a_time_has_every_row_before_the_first_stamped_later(bank: Bank, make_trace):
    at = {10.0: bank.read(make_trace(5).hidden)}
    for moment in (100.0, 200.0, 150.0, 300.0):
        bank.write(_stamped(make_trace(9, run=str(moment)), moment))
        at[moment] = bank.read(make_trace(5).hidden)
    for asked, shown in ((99, 10.0), (100, 100.0), (199.5, 100.0), (200, 150.0), (250.0, 150.0), (1e11, 300.0)):
        assert_same(bank.read(make_trace(5).hidden, as_of=asked), at[shown])
    moment = datetime.fromtimestamp(250, UTC)
    for asked in (moment, moment.isoformat(), moment.isoformat().removesuffix("+00:00"), "250"):
        assert_same(bank.read(make_trace(5).hidden, as_of=asked), at[150.0])


@one_kind
def test_as_of_needs_a_tag_or_a_time(bank: Bank, make_trace):
    bank.tag("there")
    with pytest.raises(TagNotFound, match=r"no tag 'yesterday'.*\['there'\].*2026-01-31T12:00:00Z"):
        bank.read(make_trace(2).hidden, as_of="yesterday")


def test_past_states_are_bounded(tmp_path: Path, calibration, spec: BankSpec, make_trace):
    settings = raymem.Settings.model_validate({"host": {"past_bytes": 150_000}})
    with raymem.connect(tmp_path / "memory", settings=settings) as store:
        store.put_calibration(calibration)
        bank = store.create("lab/alice", spec)
        expected = {}
        for step in range(10):
            bank.write(make_trace(100, seq=100 * step))
            bank.tag(str(step))
            expected[str(step)] = bank.read(make_trace(3).hidden)
        for tag, readout in expected.items():
            assert_same(bank.read(make_trace(3).hidden, as_of=tag), readout)
        past = store._async.backend.host.past
        assert 0 < past.nbytes <= 150_000


def test_what_was_erased_is_not_in_the_past_either(store: Store, spec: BankSpec, make_trace):
    bank = store.create("lab/alice", spec)
    bank.write(make_trace(10, stream="mine"))
    bank.write(make_trace(10, stream="yours", seed=2))
    bank.tag("both")
    query = make_trace(8, seed=2).hidden[6:7]
    assert bank.read(query, 1, start=6, as_of="both").rows(0)[0].stream == "yours"
    bank.erase(stream="yours")
    assert store._async.backend.host.past.nbytes == 0
    assert {row.stream for row in bank.read(query, 9, start=6, as_of="both").rows(0)} == {"mine"}


def test_the_state_at_a_tag_is_kept_until_the_tag_goes(tmp_path: Path, calibration, spec: BankSpec, make_trace):
    with raymem.connect(tmp_path / "memory") as store:
        store.put_calibration(calibration)
        bank = store.create("lab/alice", spec.model_copy(update={"kind": "titans"}))
        cold = store._async.backend.cold

        def kept() -> set[int]:
            rows = cold.snapshots(cold.catalog.get("lab/alice"))._manifests()
            return {row["pos"] for row in rows}

        for step in range(5):
            bank.write(make_trace(10, seq=10 * step))
            bank.tag("first" if step == 0 else "moving")
        assert kept() == {10, 40, 50}
        bank.untag("first")
        bank.write(make_trace(10, seq=50))
        bank.detach()
        assert kept() == {50, 60}


def test_a_fork_begins_where_its_parent_was_and_goes_its_own_way(store: Store, bank: Bank, make_trace):
    bank.write(make_trace(20))
    bank.tag("here")
    digest, readout = bank.digest(), bank.read(make_trace(6).hidden)
    bank.write(make_trace(20, seq=20))
    fork = store.fork("lab/alice", "lab/bob", "here")
    assert (fork.info().rows, fork.info().state, fork.info().tags) == (20, "hot", {"here": 20})
    assert fork.digest() == digest
    assert_same(fork.read(make_trace(6).hidden), readout)
    # the same rows again, then other rows under the names that the parent gave to its own
    assert fork.write(make_trace(20)).duplicates == 20
    assert fork.write(make_trace(10, seq=20, seed=5)).end == 30
    with pytest.raises(SequenceConflict, match=r"row 3 .* other content"):
        fork.write(make_trace(1, seq=3, seed=5))
    assert bank.info().rows == 40
    assert fork.tokens("s", "r", 15, 25).tolist() == [
        *make_trace(20).tokens[15:].tolist(),
        *make_trace(25, seed=5).tokens[20:].tolist(),
    ]
    before = fork.digest()
    fork.detach()
    fork.attach()
    assert fork.digest() == before


def test_forks_of_forks_hold_what_their_line_held(store: Store, bank: Bank, make_trace):
    bank.write(make_trace(10))
    child = store.fork("lab/alice", "lab/child")
    child.write(make_trace(10, run="child"))
    grandchild = store.fork("lab/child", "lab/grandchild", 15)
    early = store.fork("lab/grandchild", "lab/early", 7)
    grandchild.write(make_trace(10, run="grandchild"))
    alone = store.create("lab/alone", bank.info().spec)
    alone.write(make_trace(10))
    alone.write(make_trace(5, run="child"))
    alone.write(make_trace(10, run="grandchild"))
    assert grandchild.digest() == alone.digest()
    assert (grandchild.info().rows, early.info().rows) == (25, 7)
    # a fork at a position that its parent inherited needs the parent no more
    grandchild.materialise()
    store.delete("lab/grandchild")
    store.delete("lab/child")
    assert early.read(make_trace(4).hidden).relevance_Q.shape == (4,)


def test_a_fork_takes_what_was_acknowledged_while_its_parent_is_written(store: Store, bank: Bank, make_trace):
    forks = []
    for step in range(5):
        end = bank.write(make_trace(8, seq=8 * step)).end
        forks.append((end, store.fork("lab/alice", f"lab/fork-{step}")))
        bank.write(make_trace(3, run=str(step)), durable=False)
    for end, fork in forks:
        assert end <= fork.info().rows <= end + 3


@one_kind
def test_a_fork_knows_where_and_what_it_may_be(store: Store, bank: Bank, make_trace):
    bank.write(make_trace(5))
    bank.tag("five")
    with pytest.raises(TagNotFound, match="no tag 'six'; its tags: five at 5"):
        store.fork("lab/alice", "lab/bob", "six")
    with pytest.raises(InvalidInput, match="position 6 is not in bank lab/alice, which has positions 0 to 5"):
        store.fork("lab/alice", "lab/bob", 6)
    with pytest.raises(BankExists):
        store.fork("lab/alice", "lab/alice")
    with pytest.raises(BankNotFound):
        store.fork("lab/none", "lab/bob")
    assert [info.name for info in store.banks()] == ["lab/alice"]
    assert store.fork("lab/alice", "lab/bob", 0).write(make_trace(5, seed=9)).end == 5


@pytest.mark.parametrize("hot", [True, False])
def test_a_parent_is_not_removed_under_its_forks(store: Store, bank: Bank, make_trace, hot):
    bank.write(make_trace(20))
    fork = store.fork("lab/alice", "lab/bob")
    fork.write(make_trace(7, run="own"))
    before = fork.digest()
    if not hot:
        fork.detach()
    with pytest.raises(Conflict, match=r"forks lab/bob.*materialise=True"):
        store.delete("lab/alice")
    assert bank.info().state == "hot"
    store.delete("lab/alice", materialise=True)
    assert [info.name for info in store.banks()] == ["lab/bob"]
    fork.attach()
    assert fork.digest() == before
    assert fork.write(make_trace(20)).duplicates == 20
    assert fork.write(make_trace(3, run="own", seq=7)).end == 30
    assert fork.read(make_trace(20).hidden[5:6], 1, start=5).rows(0) in ([RowRef("s", "r", 5, 5)], [])


def test_restoring_goes_back_and_loses_nothing(store: Store, bank: Bank, make_trace):
    bank.write(make_trace(10))
    bank.tag("good")
    good = bank.digest()
    bank.write(make_trace(10, seq=10))
    bank.tag("bad")
    bad = bank.digest()
    report = bank.restore("good")
    assert (report.pos, report.undone, report.kept_as) == (10, 10, "lab/alice-before-restore")
    assert (bank.info().rows, bank.tags(), bank.digest()) == (10, {"good": 10}, good)
    # a run goes on from where it was, with other rows
    assert bank.write(make_trace(5, seq=10, seed=4)).end == 15
    old = store.bank(report.kept_as)
    old.attach()
    assert (old.digest(), old.tags()) == (bad, {"good": 10, "bad": 20})
    assert old.write(make_trace(3, seq=20)).end == 23
    assert bank.restore(12).kept_as == "lab/alice-before-restore-2"
    assert bank.info().rows == 12
    assert bank.restore(12).kept_as is None
    with pytest.raises(TagNotFound, match="no tag 'bad'"):
        bank.restore("bad")
    assert bank.info().state == "hot"


def test_a_detached_bank_is_restored_detached(store: Store, bank: Bank, make_trace):
    bank.write(make_trace(10))
    bank.detach()
    assert bank.tag("end") == {"end": 10}
    assert bank.restore(4).undone == 6
    assert (bank.info().state, bank.info().rows) == ("cold", 4)


def test_a_fork_is_carried_away_whole(tmp_path: Path, store: Store, bank: Bank, make_trace):
    bank.write(make_trace(12))
    fork = store.fork("lab/alice", "lab/bob", 9)
    fork.write(make_trace(5, run="own"))
    fork.export(tmp_path / "bob.raymem")
    copy = store.import_(tmp_path / "bob.raymem", "lab/copy")
    copy.attach()
    assert copy.digest() == fork.digest()


def _stamped(trace: raymem.Trace, moment: float) -> raymem.Trace:
    return raymem.Trace(trace.hidden, trace.tokens, trace.stream, trace.run, trace.seq, time=moment)
