"""How far an erasure reaches: what followed the rows in their runs, what tells of them, what is said of the rest."""

import dataclasses
import random
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import raymem
from raymem import Bank, KeySpec, Settings, Store, Trace
from raymem.config import ColdSettings
from raymem.errors import InvalidInput, RaymemError, StorageError
from raymem.memory import kinds
from raymem.storage.erasure import erase as erasure
from raymem.storage.erasure.reach import reach
from raymem.storage.store import ColdStore
from raymem.storage.tables.files import Files
from raymem.types import Exposed, Selection

SPAN = {"stream": "alice", "run": "r1", "seq_from": 5, "seq_to": 9}


def fill(bank: Bank, tiny, *cuts: tuple[int, int]) -> None:
    """Two streams of two runs, of which alice's first has only these rows."""
    for start, stop in cuts:
        bank.write(tiny.talk("alice", stop - start, seq=start))
    bank.write(tiny.talk("alice", 10, run="r2"))
    bank.write(tiny.talk("bob", 12))


def identities(cold: ColdStore, name: str) -> list[tuple[str, str, int]]:
    rows = cold.journal(cold.catalog.get(name)).scan()
    return [row for part in rows for row in zip(part.streams, part.runs, part.seq_T.tolist(), strict=True)]


def assert_reads_alike(one: Bank, other: Bank, queries: torch.Tensor) -> None:
    got, expected = one.read(queries, 8), other.read(queries, 8)
    for field in ("values_QV", "relevance_Q", "tokens_Qk", "scores_Qk", "seq_Qk", "source_Qk"):
        left, right = getattr(got, field), getattr(expected, field)
        assert left is right if right is None else torch.equal(left, right), field


# which rows go is found in the journal, whatever the kind
SCOPES = [*((kind, "rows") for kind in kinds()), ("spalm", "run"), ("titans", "run")]


@pytest.mark.parametrize(("kind", "scope"), SCOPES)
def test_the_bank_is_as_if_these_rows_had_never_been(store, tiny, kind, scope):
    bank, never = store.create("lab/a", tiny.spec(kind)), store.create("lab/never", tiny.spec(kind))
    fill(bank, tiny, (0, 33))
    fill(never, tiny, (0, 5), *([(9, 33)] if scope == "rows" else []))

    receipt = bank.erase(**SPAN, scope=scope, rebuild=True)

    assert (receipt.status, receipt.proves) == ("complete", True)
    assert (receipt.rows, receipt.followed_rows) == ((4, 0) if scope == "rows" else (28, 24))
    # the check knew all of them
    assert receipt.before.found >= receipt.rows > receipt.after.found == 0
    # row 4 was paired with the token of row 5: no kind may know it, by its value or by its key
    assert_reads_alike(bank, never, tiny.talk("alice", 33).hidden)
    # what comes next continues the run that is left
    next_seq = 33 if scope == "rows" else 5
    for each in (bank, never):
        assert each.write(dataclasses.replace(tiny.talk("dora", 9), stream="alice", seq=next_seq)).gaps == 0
    assert_reads_alike(bank, never, tiny.talk("dora", 9).hidden)


@pytest.mark.parametrize("function", ["window", "span"])
@pytest.mark.parametrize(("kind", "scope"), [("spalm", "rows"), ("titans", "run")])
def test_keys_of_many_rows_are_free_of_those_that_went(store, tiny, kind, function, scope):
    key = KeySpec(function=function, layers=(5,), window=4)
    spec = tiny.spec(kind).model_copy(update={"key": key})
    bank, never = store.create("lab/a", spec), store.create("lab/never", spec)
    fill(bank, tiny, (0, 33))
    fill(never, tiny, (0, 5), *([(9, 33)] if scope == "rows" else []))

    bank.erase(**SPAN, scope=scope, rebuild=True)

    assert_reads_alike(bank, never, tiny.talk("alice", 33).hidden)


def test_the_receipt_counts_what_stays_and_its_advice_removes_it(store, tiny, cold):
    bank = store.create("lab/a", tiny.spec())
    fill(bank, tiny, (0, 33))

    receipt = bank.erase(**SPAN)

    assert (receipt.exposed_rows, receipt.exposed) == (24, (Exposed("alice", "r1", 5, 24),))
    # r2 came after r1
    assert (receipt.later_rows, receipt.followed_rows) == (10, 0)
    said = "\n".join(receipt.out_of_reach)
    assert "hidden states of 24 later rows were computed with the erased text in their context" in said
    assert 'scope="run"' in said
    assert "10 rows came later in other runs of the same streams" in said
    assert "raymem cache clear" in said
    assert "weights" in said
    assert "the names of stream and run" in said
    assert bank.receipts() == [receipt]

    (run,) = receipt.exposed
    again = bank.erase(stream=run.stream, run=run.run, seq_from=run.seq_from, scope="run")

    assert (again.rows, again.exposed_rows, again.status) == (24, 0, "complete")
    assert "computed with the erased text" not in "\n".join(again.out_of_reach)
    assert sorted(identities(cold, "lab/a"))[:5] == [("alice", "r1", seq) for seq in range(5)]
    assert ("alice", "r1", 9) not in identities(cold, "lab/a")
    assert bank.erase(**SPAN, scope="run").rows == 0


def test_what_followed_rows_that_are_gone_goes_when_they_are_named_again(store, tiny, cold):
    bank = store.create("lab/a", tiny.spec())
    fill(bank, tiny, (0, 33))
    bank.erase(**SPAN)

    receipt = bank.erase(**SPAN, scope="run")

    assert (receipt.rows, receipt.followed_rows, receipt.status, receipt.proves) == (24, 24, "complete", True)


def test_the_check_fails_while_a_file_has_what_followed(store, tiny, cold, monkeypatch):
    bank = store.create("lab/a", tiny.spec())
    fill(bank, tiny, (0, 33))
    bank.erase(**SPAN)
    drop, id = cold.tables.__class__.drop, cold.catalog.get("lab/a").id
    with monkeypatch.context() as patched:
        kept = f"journal-{id}-{cold.catalog.get('lab/a').generation}"
        patched.setattr(cold.tables.__class__, "drop", lambda self, name: None if name == kept else drop(self, name))
        receipt = bank.erase(**SPAN, scope="run")

    # no row that is named is in it any more: only what followed
    assert (receipt.status, receipt.after.found) == ("pending", 24)
    assert [found.status for found in store.sweep().receipts] == ["complete"]


def test_no_row_follows_a_whole_stream_or_run(store, tiny):
    bank = store.create("lab/a", tiny.spec())
    fill(bank, tiny, (0, 33))

    run = bank.erase(stream="alice", run="r1")
    stream = bank.erase(stream="alice", scope="run")

    assert (run.rows, run.exposed_rows, run.later_rows) == (33, 0, 10)
    assert (stream.rows, stream.exposed_rows, stream.later_rows, stream.followed_rows) == (10, 0, 0, 0)
    assert any("still runs" in words for words in stream.out_of_reach)


def test_more_runs_than_are_listed_are_counted(store, tiny):
    bank = store.create("lab/a", tiny.spec())
    for run in range(70):
        bank.write(tiny.talk("alice", 3, run=f"r{run}", time=1.0))
        bank.write(tiny.talk("alice", 2, run=f"r{run}", seq=3, time=5.0))

    receipt = bank.erase(before=2.0)

    assert (receipt.rows, receipt.exposed_rows, len(receipt.exposed)) == (210, 140, 64)
    assert any("first 64 runs" in words for words in receipt.out_of_reach)


def test_rows_that_stay_under_another_name_are_counted(store, tiny):
    bank = store.create("lab/a", tiny.spec())
    for stream in ("alice", "bob"):
        bank.write(tiny.trace(20, stream=stream))

    receipt = bank.erase(stream="alice")

    assert (receipt.status, receipt.same_rows) == ("complete", 20)
    assert any("20 rows that stay are the same" in words for words in receipt.out_of_reach)


def test_an_erasure_cut_short_is_not_betrayed_by_rows_that_stay(store, tiny, monkeypatch):
    bank = store.create("lab/a", tiny.spec())
    for stream in ("alice", "bob"):
        bank.write(tiny.trace(20, stream=stream))
    with monkeypatch.context() as patched:
        patched.setattr(erasure, "finish", _fails)
        with pytest.raises(StorageError):
            bank.erase(stream="alice")

    assert [receipt.status for receipt in bank.receipts()] == ["pending"]
    assert [receipt.status for receipt in store.sweep().receipts] == ["complete"]


def _fails(*_: Any) -> None:
    raise StorageError("the disk is full")


def test_nothing_by_which_rows_would_be_known_outlives_the_check(store, tiny, cold):
    bank = store.create("lab/a", tiny.spec())
    fill(bank, tiny, (0, 33))
    bank.erase(**SPAN, scope="run")

    assert cold.tables.open("receipts").to_arrow()["evidence"].to_pylist() == [""]


def texts(cold: ColdStore, table: str) -> str:
    """All that the files of a table hold, decoded and as it lies there."""
    files = Files(cold.tables)
    found = []
    for file in files.of(table):
        found.append(Path("/", file.path).read_bytes().decode("latin-1"))
        if file.holds_rows:
            found += [str(batch.to_pydict()) for batch in files.rows(file)]
    return "\n".join(found)


def test_names_are_forgotten_and_found_again_by_who_knows_them(store, tiny, cold, monkeypatch):
    bank = store.create("lab/a", tiny.spec())
    fill(bank, tiny, (0, 33))
    bank.erase(**SPAN)
    bank.erase(stream="bob")
    bank.erase(before=2.0)
    assert "alice" in texts(cold, "receipts")
    # the versions before would stay for five minutes
    monkeypatch.setattr("raymem.storage.erasure.receipts._KEEP_VERSIONS", timedelta(milliseconds=1))

    one, other, third = bank.receipts(forget_names=True)

    assert bank.receipts() == [one, other, third]
    assert all(receipt.names_forgotten and receipt.exposed == () for receipt in (one, other, third))
    assert (one.exposed_rows, one.what.seq_from, third.what.stream) == (24, 5, None)
    assert one.what.stream != other.what.stream
    about = [
        [receipt.is_about(*name) for receipt in (one, other, third)] for name in (("alice",), ("bob",), ("carol",))
    ]
    assert about == [[True, False, False], [False, True, False], [False, False, False]]
    assert [one.is_about("alice", run) for run in ("r1", "r2")] == [True, False]
    assert other.is_about("bob", "r1")
    for receipt in (one, other, third):
        assert not any("the names of stream and run" in words for words in receipt.out_of_reach)
        assert not any("`exposed`" in words for words in receipt.out_of_reach)
    assert any("24 later rows" in words and "no longer names their runs" in words for words in one.out_of_reach)
    assert not any(name in texts(cold, "receipts") for name in ("alice", "bob", "'r1'"))
    # once is enough: the salt stays
    assert bank.receipts(forget_names=True) == [one, other, third]


def test_a_sweep_clears_the_receipts_of_what_they_no_longer_say(store, tiny, cold, monkeypatch):
    bank = store.create("lab/a", tiny.spec())
    fill(bank, tiny, (0, 33))
    bank.erase(stream="alice")
    bank.receipts(forget_names=True)
    assert "alice" in texts(cold, "receipts")
    monkeypatch.setattr("raymem.storage.erasure.receipts._KEEP_VERSIONS", timedelta(milliseconds=1))

    store.sweep(dry_run=True)
    assert "alice" in texts(cold, "receipts")
    store.sweep()

    assert "alice" not in texts(cold, "receipts")
    assert bank.receipts()[0].is_about("alice")


def test_an_open_receipt_keeps_the_names_that_it_needs(store, tiny, monkeypatch):
    bank = store.create("lab/a", tiny.spec())
    fill(bank, tiny, (0, 33))
    with monkeypatch.context() as patched:
        patched.setattr(erasure, "finish", _fails)
        with pytest.raises(StorageError):
            bank.erase(stream="alice")

    assert [receipt.names_forgotten for receipt in bank.receipts(forget_names=True)] == [False]
    assert [receipt.status for receipt in store.sweep().receipts] == ["complete"]
    assert [receipt.names_forgotten for receipt in bank.receipts(forget_names=True)] == [True]


@pytest.mark.parametrize("scope", ["row", "", None, 1, ["run"], "x" * 300])
def test_another_scope_is_refused(store, tiny, scope):
    bank = store.create("lab/a", tiny.spec())
    fill(bank, tiny, (0, 33))

    with pytest.raises(InvalidInput, match=r"'rows'.*'run'"):
        bank.erase(**SPAN, scope=scope)
    assert bank.info().rows == 55


# what a vector value is made of: the token that comes next
EMBEDDING = torch.randn(50, 24, generator=torch.Generator().manual_seed(3))


def vectors(tiny, store: Store, kind: str, name: str = "lab/v") -> Bank:
    spec = tiny.spec(kind)
    fingerprint = spec.fingerprint.model_copy(update={"values": "head"})
    return store.create(name, spec.model_copy(update={"fingerprint": fingerprint}))


def with_values(trace: Trace) -> Trace:
    following = torch.cat([trace.tokens[1:], trace.tokens[:1]])
    return dataclasses.replace(trace, values=EMBEDDING[following])


def holding(cold: ColdStore, vector: torch.Tensor) -> list[str]:
    """The files of the store, decoded and as they lie there, in which a vector's bytes are."""
    wanted, found, files = vector.float().numpy().tobytes(), [], Files(cold.tables)
    for table in files.tables():
        for file in files.of(table):
            if wanted in Path("/", file.path).read_bytes():
                found.append(file.path)
            if not file.holds_rows:
                continue
            for batch in files.rows(file):
                columns = [batch[name] for name in ("value", "data") if name in batch.schema.names]
                if any(wanted in _bytes(column) for column in columns):
                    found.append(file.path)
    return found


def _bytes(column: Any) -> bytes:
    listed = column.to_pylist()
    return b"".join(
        each if isinstance(each, bytes) else np.array(each, dtype=np.float32).tobytes() for each in listed if each
    )


@pytest.mark.parametrize(
    ("kind", "scope"), [("spalm", "rows"), ("spalm", "run"), ("larimar", "run"), ("titans", "rows")]
)
def test_the_vector_of_the_row_before_tells_nothing(store, tiny, cold, kind, scope):
    bank, never = vectors(tiny, store, kind), vectors(tiny, store, kind, "lab/never")
    trace = tiny.talk("alice", 33)
    # a token that comes once, so that its vector is nowhere else
    tokens = trace.tokens.clone()
    tokens[tokens == 7] = 8
    tokens[5] = 7
    trace = with_values(dataclasses.replace(trace, tokens=tokens))
    parts = {part: _rows(trace, *part) for part in ((0, 4), (4, 12), (12, 33), (9, 33))}
    for part in ((0, 4), (4, 12), (12, 33)):
        bank.write(parts[part])
    for part in [(0, 4), *([(9, 33)] if scope == "rows" else [])]:
        never.write(parts[part])
    bank.detach()
    assert len(holding(cold, EMBEDDING[7])) > 0

    receipt = bank.erase(**SPAN, scope=scope, rebuild=True)

    assert (receipt.status, receipt.proves) == ("complete", True)
    # row 4, too
    assert receipt.before.found >= receipt.rows == (5 if scope == "rows" else 29)
    assert ("alice", "r1", 4) not in identities(cold, "lab/v")
    bank.attach()
    bank.detach()
    assert holding(cold, EMBEDDING[7]) == []
    bank.attach()
    assert_reads_alike(bank, never, trace.hidden)


def _rows(trace: Trace, start: int, stop: int) -> Trace:
    piece = slice(start, stop)
    values = None if trace.values is None else trace.values[piece]
    return dataclasses.replace(
        trace, hidden=trace.hidden[piece], tokens=trace.tokens[piece], values=values, seq=trace.seq + start
    )


def test_the_row_before_goes_from_a_fork_that_inherited_it(store, tiny, cold):
    bank = vectors(tiny, store, "spalm")
    trace = with_values(tiny.talk("alice", 20))
    bank.write(_rows(trace, 0, 5))
    fork = store.fork(bank.name, "lab/fork")
    fork.attach()
    fork.write(_rows(trace, 5, 20))

    receipt = fork.erase(**SPAN)

    # row 4 is the parent's, which keeps it
    assert (receipt.status, receipt.rows) == ("complete", 5)
    assert any("bank lab/v, which this one began as" in words for words in receipt.out_of_reach)
    assert [seq for _, _, seq in identities(cold, "lab/fork")] == [*range(4), *range(9, 20)]
    assert [seq for _, _, seq in identities(cold, "lab/v")] == list(range(5))
    assert cold.catalog.get("lab/fork").parent is None


def test_what_followed_in_forks_goes_too(store, tiny, cold):
    bank = store.create("lab/a", tiny.spec())
    bank.write(tiny.talk("alice", 7))
    store.fork(bank.name, "lab/early")
    bank.write(tiny.talk("alice", 13, seq=7, time=1.5))
    store.fork(bank.name, "lab/late")
    store.fork("lab/late", "lab/grandchild")
    for name in ("lab/early", "lab/late", "lab/grandchild"):
        fork = store.bank(name)
        fork.attach()
        fork.write(tiny.talk("alice", 10, seq=7 if name == "lab/early" else 20, time=5.0))
        fork.write(tiny.talk("bob", 3, time=5.0))

    # of the row of a time: after it is gone from the parent no one can tell by it where the run was cut
    receipt = bank.erase(stream="alice", run="r1", seq_from=12, before=2.0, scope="run")

    assert (receipt.status, receipt.rows, receipt.what.starts) == ("complete", 8, ())
    assert set(receipt.forks) == {"lab/late", "lab/grandchild"}
    for name in ("lab/late", "lab/grandchild"):
        assert [seq for stream, _, seq in identities(cold, name) if stream == "alice"] == list(range(12))
        assert [found.status for found in store.bank(name).receipts()] == ["complete"]
        assert store.bank(name).info().rows == 15
    # it left before the rows that went, and has a run of its own
    assert [seq for stream, _, seq in identities(cold, "lab/early") if stream == "alice"] == list(range(17))


def test_a_fork_that_was_away_loses_what_followed_with_the_next_sweep(store, tiny, cold, monkeypatch):
    bank = store.create("lab/a", tiny.spec())
    bank.write(tiny.talk("alice", 20))
    fork = store.fork(bank.name, "lab/fork")
    fork.attach()
    fork.write(tiny.talk("alice", 10, seq=20, time=5.0))
    backend = store._async.backend
    ask = backend.ask

    async def refusing(name: str, verb: str, *args: Any) -> Any:
        if (name, verb) == ("lab/fork", "erase"):
            raise StorageError("its node is away")
        return await ask(name, verb, *args)

    with monkeypatch.context() as patched:
        patched.setattr(backend, "ask", refusing)
        receipt = bank.erase(stream="alice", before=2.0, scope="run")

    assert (receipt.status, receipt.rows) == ("pending", 20)
    assert len(identities(cold, "lab/fork")) == 10
    assert [found.status for found in store.sweep().receipts] == ["complete"]
    assert identities(cold, "lab/fork") == []
    # names are kept no longer than they are needed
    assert [found.what.starts for found in bank.receipts()] == [()]


def test_partitions_answer_as_one(store, tiny):
    bank = store.create("lab/parts", tiny.spec(), partitions=2)
    for stream in ("alice", "bob", "carol", "dave"):
        bank.write(tiny.talk(stream, 10))
        bank.write(tiny.talk(stream, 10, seq=10, time=5.0))

    rows = bank.erase(before=2.0)

    assert (rows.rows, rows.exposed_rows, len(rows.exposed), rows.status) == (40, 40, 4, "complete")
    assert any("hidden states of 40 later rows" in words for words in rows.out_of_reach)
    assert len(rows.out_of_reach) == len(set(rows.out_of_reach))
    assert bank.erase(stream="bob", run="r1", seq_from=0, scope="run").rows == 10
    assert bank.erase(stream="alice", scope="run").rows == 10
    assert bank.info().rows == 20


@pytest.mark.parametrize(("scope", "left"), [("rows", 12), ("run", 7)])
def test_rows_that_expire_take_along_what_followed_if_that_is_set(tiny, tmp_path, scope, left):
    quick = Settings(cold=ColdSettings(sync="none", expire_s=0.1, expire_scope=scope))
    with raymem.connect(tmp_path, settings=quick) as store:
        store.put_calibration(tiny.calibration)
        bank = store.create("lab/a", tiny.spec())
        bank.write(tiny.talk("alice", 20))
        bank.write(tiny.talk("alice", 5, seq=20, time=time.time()))
        bank.write(tiny.talk("bob", 7, time=time.time()))
        bank.set_ttl(3600)
        until = time.monotonic() + 30
        while bank.info().rows == 32 and time.monotonic() < until:
            time.sleep(0.02)

        assert bank.info().rows == left
        assert [receipt.what.scope for receipt in bank.receipts()] == [scope]


def test_the_reach_of_any_selection_is_that_of_a_plain_search(store, tiny, cold):
    choose, bank = random.Random(0), store.create("lab/a", tiny.spec())
    heads: dict[tuple[str, str], int] = {}
    there: list[tuple[str, str, int, float]] = []
    for _ in range(60):
        stream, run = choose.choice("abc"), choose.choice(("r1", "r2", "it's"))
        # now and then a gap
        seq, rows, moment = (
            heads.get((stream, run), 0) + choose.choice((0, 0, 0, 2)),
            choose.randint(1, 6),
            choose.random(),
        )
        bank.write(tiny.talk(stream, rows, run=run, seq=seq, time=moment))
        heads[stream, run] = seq + rows
        there += [(stream, run, seq + row, moment) for row in range(rows)]
    bank.detach()
    journal = cold.journal(cold.catalog.get("lab/a"))
    assert len(there) == journal.end()
    for _ in range(120):
        what = _anything(choose)
        vectors = choose.random() < 0.5
        got = reach(journal, what, vectors=vectors)
        gone, exposed, later = _plain(there, what, vectors)
        assert got.gone_T.tolist() == sorted(gone), what
        assert sum(run.rows for run in got.exposed) == exposed, what
        assert got.later == later, what


def _anything(choose: random.Random) -> Selection:
    stream = choose.choice(("a", "b", "c", None))
    run = choose.choice(("r1", "r2", "it's", None)) if stream else None
    seqs = sorted(choose.choices(range(40), k=2)) if run and choose.random() < 0.7 else [None, None]
    before = choose.random() if stream is None or choose.random() < 0.3 else None
    return Selection(stream, run, *seqs, before, choose.choice(("rows", "run")))


def _plain(there: list[tuple[str, str, int, float]], what: Selection, vectors: bool) -> tuple[set[int], int, int]:
    def is_named(stream: str, run: str, seq: int, moment: float) -> bool:
        wrong = (what.stream not in (None, stream), what.run not in (None, run), seq < (what.seq_from or 0))
        late = what.before is not None and moment >= what.before
        return not (any(wrong) or late or (what.seq_to is not None and seq >= what.seq_to))

    gone = {pos for pos, row in enumerate(there) if is_named(*row)}
    first: dict[tuple[str, str], int] = {}
    for pos in gone:
        first[there[pos][:2]] = min(there[pos][2], first.get(there[pos][:2], 10**6))
    if what.scope == "run":
        if what.run is not None and what.before is None:
            first[what.stream or "", what.run] = what.seq_from or 0
        gone |= {pos for pos, row in enumerate(there) if row[2] >= first.get(row[:2], 10**6)}
    if vectors:
        names = {there[pos][:3] for pos in gone}
        gone |= {pos for pos, (stream, run, seq, _) in enumerate(there) if (stream, run, seq + 1) in names}
    exposed = sum(row[2] > first.get(row[:2], 10**6) for pos, row in enumerate(there) if pos not in gone)
    began: dict[str, int] = {}
    for pos in gone:
        began[there[pos][0]] = min(pos, began.get(there[pos][0], 10**6))
    later = sum(row[:2] not in first and pos > began.get(row[0], 10**6) for pos, row in enumerate(there))
    return gone, exposed, later


def test_a_kind_that_can_not_take_rows_out_counts_what_would_follow(store, tiny):
    bank = store.create("lab/a", tiny.spec("titans"))
    fill(bank, tiny, (0, 33))

    with pytest.raises(RaymemError, match=r"28 rows.*rebuild"):
        bank.erase(**SPAN, scope="run")
