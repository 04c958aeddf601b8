"""Choosing the rows that a model attends to, and keys and values kept for that, in one process with real LanceDB."""

import dataclasses

import pytest
import torch

from raymem import AttendedRows, Bank, MemoryTokens, Settings, Store, connect
from raymem.config import ColdSettings, HostSettings
from raymem.errors import (
    BankDetached,
    InvalidInput,
    InvalidTrace,
    NonFinite,
    Reassigned,
    TagNotFound,
    TooLarge,
    Unsupported,
)
from raymem.host.host import Host
from raymem.types import AttendedExtent

LAYERS, HEADS, WIDTH = 3, 2, 4
ROW_BYTES = 2 * LAYERS * HEADS * (WIDTH + 4)


def kv(count: int, seq: int = 0, *, stream: str = "s", run: str = "r") -> AttendedRows:
    generator = torch.Generator().manual_seed(sum(map(ord, stream + run)))
    keys, values = torch.randn(2, LAYERS, 512, HEADS, WIDTH, generator=generator)[:, :, seq : seq + count]
    return AttendedRows(stream, run, seq, keys, values, rope="theta=10000")


@pytest.fixture
def bank(file_store: Store, tiny, request) -> Bank:
    """Of three runs, 100 rows each, written in turns."""
    name = f"attend/b{abs(hash(request.node.nodeid))}"
    made = file_store.create(name, tiny.spec("spalm"))
    for seq in (0, 60):
        for stream in "abc":
            made.write(tiny.talk(stream, 60 if not seq else 40, seq=seq))
    return made


def query(tiny, stream: str = "b", seq: int = 64, rows: int = 8):
    trace = tiny.talk(stream, rows, seq=seq)
    return trace.hidden, trace.tokens


@pytest.mark.parametrize("method", ["fused", "states", "bm25"])
def test_the_piece_that_matches_is_chosen_whole_with_who_wrote_it(bank, tiny, method):
    hidden, tokens = query(tiny)
    found = bank.attend(hidden, tokens, rows=40, method=method)
    assert isinstance(found, MemoryTokens)
    rows = [(row.stream, row.seq) for row in found.rows()]
    # the first run's sinks, and of the run that matches the piece from 64 on
    assert rows[:4] == [("a", seq) for seq in range(4)]
    assert {("b", seq) for seq in range(64, 96)} <= set(rows)
    assert len(found) == 40
    whole = {stream: tiny.talk(stream, 100).tokens for stream in "abc"}
    assert found.tokens_N.tolist() == [int(whole[stream][seq]) for stream, seq in rows]
    assert found.kind == "spalm"
    assert found.keys_LNHd is None
    assert found.states_ND is None
    # a run's rows stand together, though their positions don't
    seqs = [seq for stream, seq in rows if stream == "b"]
    assert seqs == sorted(seqs)


def test_what_is_written_is_chosen_by_the_next_call(bank, tiny):
    hidden, tokens = query(tiny, "new", 0, 8)
    before = bank.attend(hidden, tokens, rows=40, method="states")
    bank.write(tiny.talk("new", 32))
    after = bank.attend(hidden, tokens, rows=40, method="states")
    assert ("new", "r1") not in before.sources
    assert sum(row.stream == "new" for row in after.rows()) == 32
    assert after.relevance > before.relevance


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"rows": 0}, InvalidInput, "rows is 0; give a whole number from 1"),
        ({"rows": 2**20}, InvalidInput, "rows is 1048576"),
        ({"layer": 4}, InvalidInput, "layer is 4; this bank has states of layers 3, 5"),
        ({"method": "best"}, InvalidInput, "method is 'best'; it is one of fused"),
        ({"queries": None, "tokens": None}, InvalidInput, "which chooses by hidden states or tokens"),
        ({"queries": None, "method": "states"}, InvalidInput, "which chooses by hidden states"),
        ({"tokens": None, "method": "bm25"}, InvalidInput, "which chooses by tokens"),
        ({"queries": torch.full((2, 2, 24), float("nan")).bfloat16()}, NonFinite, "NaN"),
        ({"queries": torch.zeros(2, 2, 23).bfloat16()}, InvalidTrace, "width 24"),
        ({"tokens": torch.zeros(2, 2, dtype=torch.int64)}, InvalidTrace, r"tokens are \[2, 2\]"),
        ({"tokens": torch.zeros(4097, dtype=torch.int64)}, TooLarge, "4097 tokens to choose by; give at most 4096"),
        ({"queries": torch.zeros(4097, 2, 24).bfloat16()}, TooLarge, "4097 hidden states to choose by"),
        ({"as_of": "never"}, TagNotFound, "no tag 'never'"),
    ],
)
def test_what_cannot_be_asked_is_refused_and_nothing_is_lost(bank, tiny, change, error, said):
    hidden, tokens = query(tiny)
    asked = {"queries": hidden, "tokens": tokens, "rows": 40, **change}
    with pytest.raises(error, match=said):
        bank.attend(asked.pop("queries"), asked.pop("tokens"), **asked)
    assert len(bank.attend(hidden, tokens, rows=400)) == 300


def test_rows_beyond_those_held_are_all_that_are_held(bank, tiny, file_store):
    assert len(bank.attend(None, query(tiny)[1], rows=5000)) == 300
    empty = file_store.create("attend/empty", tiny.spec("spalm"))
    assert len(empty.attend(*query(tiny))) == 0


def test_keys_and_values_come_with_the_rows_once_all_have_them(bank, tiny):
    hidden, tokens = query(tiny)
    for stream in "ab":
        kept = bank.put_rows(kv(100, stream=stream, run="r1"))
    assert kept == AttendedExtent(200, 200 * ROW_BYTES)
    info = bank.info()
    assert (info.attended_rows, info.attended_bytes) == (200, 200 * ROW_BYTES)
    found = bank.attend(hidden, tokens, rows=36)
    assert found.keys_LNHd.shape == (LAYERS, 36, HEADS, WIDTH)
    expected = {stream: kv(100, stream=stream, run="r1").checked() for stream in "ab"}
    for slot, row in enumerate(found.rows()):
        assert torch.equal(found.keys_LNHd[:, slot], expected[row.stream].keys_LNHd[:, row.seq])
        assert torch.equal(found.value_scales_LNH[:, slot], expected[row.stream].value_scales_LNH[:, row.seq])
    assert bank.attend(hidden, tokens, rows=36, fetch=False).keys_LNHd is None
    # of a run whose keys and values nothing kept
    assert bank.attend(*query(tiny, "c"), rows=36).keys_LNHd is None


def test_rows_come_without_keys_and_values_that_are_damaged_until_these_are_put_again(bank, tiny, file_store):
    asked = query(tiny, "a")
    bank.put_rows(kv(100, stream="a", run="r1"))
    cold = file_store._async.backend.cold
    cold.tables.open(f"attended-{cold.catalog.get(bank.name).id}").update("seq = 64", {"crc32c": 7})
    found = bank.attend(*asked, rows=36)
    assert len(found) == 36
    assert found.keys_LNHd is None
    bank.put_rows(kv(36, 64, stream="a", run="r1"))
    assert bank.attend(*asked, rows=36).keys_LNHd is not None


def test_a_past_a_fork_and_a_bank_that_went_back_have_their_rows(bank, tiny, file_store):
    bank.put_rows(kv(60, stream="a", run="r1"))
    bank.tag("first")
    bank.write(tiny.talk("late", 32))
    hidden, tokens = query(tiny, "late", 0)
    assert ("late", "r1") in bank.attend(hidden, tokens, rows=40).sources
    past = bank.attend(hidden, tokens, rows=40, as_of="first")
    assert ("late", "r1") not in past.sources
    fork = file_store.fork(bank.name, f"{bank.name}-fork", "first")
    assert fork.info().attended_rows == 60
    assert fork.attend(*query(tiny, "a", 0), rows=20).keys_LNHd is not None
    fork.materialise()
    assert fork.info().attended_rows == 60
    bank.restore("first")
    assert bank.info().attended_rows == 60
    assert bank.attend(*query(tiny, "a", 0), rows=20).keys_LNHd is not None


def test_keys_and_values_outlive_a_detach_and_go_with_erased_rows(bank, tiny):
    hidden, tokens = query(tiny)
    for stream in "abc":
        bank.put_rows(kv(100, stream=stream, run="r1"))
    before = bank.attend(hidden, tokens, rows=40)
    bank.detach()
    with pytest.raises(BankDetached):
        bank.attend(hidden, tokens)
    with pytest.raises(BankDetached):
        bank.put_rows(kv(1, stream="a", run="r1"))
    bank.attach()
    after = bank.attend(hidden, tokens, rows=40)
    assert torch.equal(before.pos_N, after.pos_N)
    assert torch.equal(before.keys_LNHd, after.keys_LNHd)

    receipt = bank.erase(stream="b")
    # in the journal, its log's file or both, and once beside it
    assert receipt.before.found >= 200
    assert (receipt.status, receipt.after.found, receipt.proves) == ("complete", 0, True)
    assert bank.info().attended_rows == 200
    left = bank.attend(hidden, tokens, rows=300)
    assert {source[0] for source in left.sources} == {"a", "c"}
    assert left.keys_LNHd.shape[1] == 200


def test_a_fork_loses_what_was_erased_in_its_parent(bank, tiny, file_store):
    bank.put_rows(kv(100, stream="a", run="r1"))
    fork = file_store.fork(bank.name, f"{bank.name}-fork")
    # inherited, and put once more
    fork.put_rows(kv(20, stream="a", run="r1"))
    bank.erase(stream="a")
    assert fork.info().attended_rows == 0
    assert fork.attend(*query(tiny, "a", 0), rows=300).sources == (("b", "r1"), ("c", "r1"))


def test_rows_that_a_bank_has_evicted_are_not_attended(tiny, file_store):
    spec = tiny.spec("spalm")
    small = file_store.create("attend/small", spec.model_copy(update={"budget_bytes": 8192}))
    small.write(tiny.talk("a", 400))
    small.write(tiny.talk("b", 40))
    found = small.attend(None, tiny.talk("a", 8).tokens, rows=1000)
    seqs = sorted(row.seq for row in found.rows() if row.stream == "a")
    # its newest, and the first of the run, which a model leans on
    assert seqs[:4] == [0, 1, 2, 3]
    assert seqs[4] > 100
    assert seqs[4:] == list(range(seqs[4], 400))
    assert sum(row.stream == "b" for row in found.rows()) == 40


@pytest.mark.parametrize("kind", ["compressive", "dct"])
def test_a_kind_that_compresses_shows_all_askers_the_same_rows(tiny, file_store, kind):
    options = {"fine": 40, "coarse": 80, "ratio": 4} | ({"policy": "keep"} if kind == "dct" else {})
    made = file_store.create(f"attend/{kind}", tiny.spec(kind, **options))
    made.write(tiny.talk("a", 500))
    one, other = (made.attend(*query(tiny, "a", seq), rows=200) for seq in (20, 480))
    assert torch.equal(one.pos_N, other.pos_N)
    # every fourth of the 320 rows behind coarse ones, the fine ones, and what stands for no row of the mechanism
    seqs = [row.seq for row in one.rows()]
    assert seqs[:4] == [0, 1, 2, 3]
    # of the fine ones two wait for their block, and the last row for the next token
    assert seqs[-43:] == list(range(457, 500))
    coarse = [seq for seq in seqs[4:] if seq < 457]
    assert len(coarse) == 80
    assert coarse == list(range(coarse[0], coarse[0] + 320, 4))
    # a state that was loaded shows the same
    made.detach()
    made.attach()
    assert torch.equal(made.attend(*query(tiny, "a", 20), rows=200).pos_N, one.pos_N)


def test_a_tape_shows_what_followed_a_match_and_a_ring_does_not(tiny, file_store):
    shown = {}
    for kind in ("dnc", "ntm"):
        made = file_store.create(f"attend/{kind}", tiny.spec(kind, slots=150))
        made.write(tiny.talk("a", 400))
        hidden, tokens = query(tiny, "a", 320, 1)
        shown[kind] = [row.seq for row in made.attend(hidden, tokens, rows=12, method="states").rows()]
        assert shown[kind][:4] == [0, 1, 2, 3]
        assert min(shown[kind][4:]) >= 249
        assert 320 in shown[kind]
    assert set(range(320, 328)) <= set(shown["dnc"])
    assert not set(range(320, 328)) <= set(shown["ntm"])


@pytest.mark.parametrize("kind", ["titans", "larimar"])
def test_a_kind_that_holds_no_rows_is_refused_by_name(tiny, file_store, kind):
    made = file_store.create(f"attend/{kind}", tiny.spec(kind))
    made.write(tiny.talk("a", 40))
    before = made.info().bytes
    with pytest.raises(Unsupported, match=f"a {kind} bank"):
        made.attend(*query(tiny))
    # nothing was read for it
    assert made.info().bytes == before


def test_pieces_of_all_partitions_compete(tiny, file_store):
    parts = file_store.create("attend/parts", tiny.spec("spalm"), partitions=3)
    for stream in "abcdef":
        parts.write(tiny.talk(stream, 64))
    for stream in ("e", "f"):
        hidden, tokens = query(tiny, stream, 32)
        found = parts.attend(hidden, tokens, rows=36)
        assert sum(row.stream == stream and row.seq >= 32 for row in found.rows()) == 32
        assert found.partition_N is not None
        assert found.keys_LNHd is None
    for stream in "abcdef":
        parts.put_rows(kv(64, stream=stream, run="r1"))
    assert parts.info().attended_rows == 6 * 64
    found = parts.attend(hidden, tokens, rows=36)
    for slot, row in enumerate(found.rows()):
        expected = kv(64, stream=row.stream, run="r1").checked().keys_LNHd[:, row.seq]
        assert torch.equal(found.keys_LNHd[:, slot], expected)


def test_a_stream_that_moves_takes_its_keys_and_values_along(tiny, file_store):
    parts = file_store.create("attend/moving", tiny.spec("spalm"), partitions=2)
    for stream in "abcd":
        parts.write(tiny.talk(stream, 100))
        # with a gap
        parts.put_rows(kv(40, stream=stream, run="r1"))
        parts.put_rows(kv(40, 60, stream=stream, run="r1"))
    parts.grow(3)
    assert parts.rebalance().streams >= 1
    assert parts.info().attended_rows == 4 * 80
    for stream in "abcd":
        asked = tiny.talk(stream, 8, seq=64)
        found = parts.attend(asked.hidden, asked.tokens, rows=36)
        for slot, row in enumerate(found.rows()):
            expected = kv(100, stream=row.stream, run="r1").checked().keys_LNHd[:, row.seq]
            assert torch.equal(found.keys_LNHd[:, slot], expected)


def test_rows_that_are_put_while_their_stream_moves_are_kept(tiny, file_store, monkeypatch):
    parts = file_store.create("attend/put-moving", tiny.spec("spalm"), partitions=2)
    for stream in "abcd":
        parts.write(tiny.talk(stream, 100))
        parts.put_rows(kv(100, stream=stream, run="r1"))
    parts.grow(3)
    backend, ends, pull, copy = file_store._async.backend, dict[str, int](), Host.pull, Host._pull_attended

    async def write_and_put(stream: str) -> None:
        seq = ends.setdefault(stream, 100)
        ends[stream] = seq + 10
        await backend.write(parts.name, tiny.talk(stream, 10, seq=seq), True)
        await backend.put_rows(parts.name, kv(10, seq, stream=stream, run="r1").checked())

    async def pulled(self, name, source, stream, start):
        found = await pull(self, name, source, stream, start)
        if not start:
            # after the first copy
            await write_and_put(stream)
        return found

    async def copied(self, name, source, stream, end):
        if stream not in ends:
            # the target has not seen these rows yet
            await write_and_put(stream)
        await copy(self, name, source, stream, end)

    monkeypatch.setattr(Host, "pull", pulled)
    monkeypatch.setattr(Host, "_pull_attended", copied)
    report = parts.rebalance()
    assert report.failed == {}
    assert report.streams == len(ends) >= 1
    assert set(ends.values()) == {120}
    assert parts.info().attended_rows == 400 + 20 * len(ends)
    # a caller that knew the old home asks again, and the old home takes none
    stream = next(iter(ends))
    assert parts.put_rows(kv(120, stream=stream, run="r1")).rows >= 120
    with pytest.raises(InvalidInput, match="stream 'new' has no row"):
        parts.put_rows(kv(1, stream="new", run="r1"))
    for part in parts.info().partitions:
        layout = backend.cold.partitions.get(parts.name)
        if part.name != backend.cold.partitions.part_of(layout, stream):
            with pytest.raises(Reassigned):
                file_store._loop.run(backend.put_rows_part(part.name, kv(1, stream=stream, run="r1").checked()))


def test_partitions_that_match_nothing_choose_nothing(tiny, file_store):
    whole = file_store.create("attend/whole", tiny.spec("spalm"))
    parts = file_store.create("attend/unlike", tiny.spec("spalm"), partitions=2)
    for bank in (whole, parts):
        # one that is like itself, and one of under four pieces
        for run in ("r1", "r2"):
            bank.write(dataclasses.replace(tiny.talk("a", 150), run=run))
        bank.write(tiny.talk("b", 40))
    hidden = tiny.trace(8, seed=5).hidden
    for method in ("states", "fused"):
        asked = {"rows": 40, "method": method, "fetch": False}
        assert len(whole.attend(hidden, None, **asked)) == 0
        found = parts.attend(hidden, None, **asked)
        assert len(found) == 0
        assert 0 < found.relevance < 0.7


def test_states_that_are_compared_count_as_memory(tiny, tmp_path):
    settings = Settings(host=HostSettings(memory_bytes=450_000), cold=ColdSettings(sync="none", attended_bytes=5000))
    with connect(tmp_path / "small", settings=settings) as store:
        store.put_calibration(tiny.calibration)
        bank = store.create("a/b", tiny.spec("spalm").model_copy(update={"budget_bytes": 60_000}))
        bank.write(tiny.talk("a", 400))
        before = bank.info().bytes
        bank.attend(*query(tiny, "a"), rows=16)
        held = bank.info().bytes - before
        assert held >= 400 * (2 * tiny.width + 8)
        with pytest.raises(TooLarge, match=r"cold\.attended_bytes"):
            bank.put_rows(kv(100, stream="a", run="r1"))
        assert bank.info().attended_rows == 0
        bank.write(tiny.talk("b", 3000))
        assert len(bank.attend(*query(tiny, "b"), rows=16)) == 16
        with pytest.raises(TooLarge, match=r"host\.memory_bytes"):
            bank.attend(*query(tiny, "a"), rows=16, layer=5)
        assert len(bank.attend(*query(tiny, "b"), rows=16)) == 16
