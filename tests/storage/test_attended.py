"""Keys and values beside the journal: put, read back by position, inherited, erased, with the real LanceDB."""

import dataclasses
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from raymem.errors import Corrupt, FingerprintMismatch, InvalidInput, InvalidTrace, NonFinite, NotOwner, TooLarge
from raymem.rows import AttendedRows
from raymem.storage.attended import Attended
from raymem.storage.erasure import erase as erasure
from raymem.storage.history import fork_at, materialise
from raymem.storage.journal.journal import Journal
from raymem.storage.store import ColdStore
from raymem.storage.tables.files import Files
from raymem.types import AttendedExtent, Selection

LAYERS, HEADS, WIDTH = 3, 2, 4
ROW_BYTES = 2 * LAYERS * HEADS * (WIDTH + 4)
PLENTY = 2**30


def made(
    count: int, seq: int = 0, *, run: str = "r", seed: int = 0, heads: int = HEADS, **other: object
) -> AttendedRows:
    """Rows of one endless run per seed, from `seq` on."""
    drawn = torch.randn(2, 256, LAYERS, heads, WIDTH, generator=torch.Generator().manual_seed(seed))
    keys, values = drawn[:, seq : seq + count].transpose(1, 2)
    return AttendedRows("s", run, seq, keys, values, rope="theta=10000", **other)


Put = Callable[..., AttendedExtent]


@pytest.fixture
def kept(store: ColdStore, journal: Journal, rows) -> Attended:
    """Of a bank with 100 rows of run r, whose seq is the position, then 20 of run q."""
    journal.append(rows(100, 0))
    other = rows(20, 0, run="q")
    journal.append(type(other)(**{**vars(other), "pos_T": other.pos_T + 100}))
    return store.attended(journal.entry)


@pytest.fixture
def put(store: ColdStore, kept: Attended) -> Put:
    def call(rows: AttendedRows, most: int = PLENTY, *, int8: bool = True, into: Attended = kept) -> AttendedExtent:
        checked = rows.checked(int8=int8)
        journal = store.journal(into.entry)
        there = journal.positions(checked.stream, checked.run, checked.seq, checked.seq + len(checked))
        return into.put(checked, there, most)

    return call


def unpacked(found: dict[str, torch.Tensor], name: str = "key") -> torch.Tensor:
    return found[f"{name}s"] * found[f"{name}_scales"][..., None]


def test_rows_come_back_by_position_in_the_order_asked(kept, put):
    assert kept.extent() == AttendedExtent(0, 0)
    assert kept.get(torch.tensor([3])) is None
    assert put(made(100)) == AttendedExtent(100, 100 * ROW_BYTES)
    put(made(20, run="q", seed=1))

    found = kept.get(torch.tensor([99, 0, 110, 33]))
    assert found["keys"].dtype == torch.int8
    assert found["keys"].shape == (LAYERS, 4, HEADS, WIDTH)
    whole, other = made(100), made(20, seed=1)
    expected = torch.stack(
        [whole.values_LNHd[:, 99], whole.values_LNHd[:, 0], other.values_LNHd[:, 10], whole.values_LNHd[:, 33]], 1
    )
    # half a step of 127 to the largest of a head
    torch.testing.assert_close(unpacked(found, "value"), expected, atol=float(expected.abs().max()) / 254, rtol=0)
    assert not torch.equal(found["keys"][:, 0], found["keys"][:, 1])
    assert kept.get(torch.tensor([0, 5000])) is None


def test_bfloat16_is_kept_as_it_is(kept, put):
    put(made(33), int8=False)
    found = kept.get(torch.arange(33))
    assert found.keys() == {"keys", "values"}
    assert torch.equal(found["keys"], made(33).keys_LNHd.bfloat16())
    with pytest.raises(FingerprintMismatch, match="dtype: the bank's have 'bfloat16', these 'int8'"):
        put(made(33))


def test_a_row_that_is_given_again_takes_the_place_of_the_one_there(kept, put):
    put(made(40))
    # within a piece, over its end, and one that is new
    assert put(made(20, 30, seed=1)) == AttendedExtent(50, 50 * ROW_BYTES)
    found = kept.get(torch.arange(50))
    first, second = made(50).checked(), made(50, seed=1).checked()
    assert torch.equal(found["keys"][:, :30], first.keys_LNHd[:, :30])
    assert torch.equal(found["keys"][:, 30:], second.keys_LNHd[:, 30:])


def test_many_small_calls_leave_few_fragments(store, kept, put):
    for seq in range(40):
        put(made(1, seq))
    table = store.tables.open(f"attended-{kept.entry.id}").to_lance()
    assert len(table.get_fragments()) < 20
    assert torch.equal(kept.get(torch.arange(40))["keys"], made(40).checked().keys_LNHd)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (made(5, 98), InvalidInput, "row 100 of stream 's' run 'r' is not in bank lab/a"),
        (made(5, run="none"), InvalidInput, "row 0 of stream 's' run 'none'"),
        (made(5, heads=1), FingerprintMismatch, "heads: the bank's have 2, these 1"),
        (AttendedRows("s", "r", 0, made(5).keys_LNHd, made(5).values_LNHd, rope="yarn"), FingerprintMismatch, "rope"),
    ],
)
def test_rows_that_do_not_belong_are_refused_and_nothing_changes(kept, put, given, error, said):
    put(made(40))
    with pytest.raises(error, match=said):
        put(given)
    assert kept.extent().rows == 40


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"keys_LNHd": torch.zeros(3, 2, 2)}, InvalidTrace, r"keys are \[3, 2, 2\]"),
        ({"values_LNHd": torch.zeros(3, 4, 2, 4)}, InvalidTrace, r"values are torch.float32 \[3, 4, 2, 4\]"),
        ({"keys_LNHd": torch.full((3, 5, 2, 4), float("nan"))}, NonFinite, "keys hold NaN or Inf"),
        ({"key_scales_LNH": torch.zeros(3, 5, 2)}, InvalidTrace, "which come with"),
        ({"seq": -1}, InvalidTrace, "seq is -1"),
        ({"rope": ""}, InvalidTrace, "rope is ''; say how the model turns keys"),
        ({"keys_LNHd": torch.zeros(3, 5, 2, 4, dtype=torch.int64)}, InvalidTrace, "values are"),
    ],
)
def test_what_no_rows_can_be_is_refused(change, error, said):
    with pytest.raises(error, match=said):
        AttendedRows(**{**vars(made(5)), **change}).checked()


def test_a_bank_keeps_no_more_than_it_may(kept, put):
    put(made(40))
    with pytest.raises(TooLarge, match=r"raise cold\.attended_bytes") as refused:
        put(made(41), most=40 * ROW_BYTES)
    assert refused.value.details == {"needed": 41 * ROW_BYTES, "limit": 40 * ROW_BYTES}
    # in place of those that are there
    assert put(made(40, seed=1), most=40 * ROW_BYTES).rows == 40


def test_a_damaged_piece_is_noticed(store, kept, put):
    put(made(40))
    table = store.tables.open(f"attended-{kept.entry.id}")
    table.update("seq = 32", {"crc32c": 7})
    assert kept.get(torch.arange(32)) is not None
    with pytest.raises(Corrupt, match="rows from 32 on of run 'r'"):
        kept.get(torch.tensor([0, 35]))


def damage(store: ColdStore, kept: Attended) -> None:
    store.tables.open(f"attended-{kept.entry.id}").update("seq = 32", {"crc32c": 7})


def test_a_damaged_piece_is_repaired_by_putting_its_rows_again(store, kept, put):
    put(made(100))
    damage(store, kept)
    assert put(made(32, 32)).rows == 100
    assert torch.equal(kept.get(torch.arange(100))["keys"], made(100).checked().keys_LNHd)
    # what can't be read of it can't be kept either
    damage(store, kept)
    assert put(made(30, 32)).rows == 98
    assert kept.get(torch.tensor([62])) is None
    assert put(made(2, 62)).rows == 100


def test_a_damaged_piece_is_left_out_where_the_others_go_on(store, kept, put):
    put(made(100))
    damage(store, kept)
    none = store.attended(dataclasses.replace(kept.entry, generation=7))
    assert [(rows.seq, len(rows)) for rows in kept.of_stream("s", 90, none)] == [(0, 32), (64, 26)]
    # another that has all of it
    assert [*kept.of_stream("s", 90, kept)] == []
    _, receipt = erased(store, Selection("s", "r", 0, 10))
    assert receipt.status == "complete"
    present = store.attended(store.catalog.get("lab/a"))
    assert present.extent().rows == 58
    assert torch.equal(present.get(torch.arange(64, 100))["keys"], made(100).checked().keys_LNHd[:, 64:])


def during_the_commit(monkeypatch, happens: Callable[[], object]) -> None:
    commit = Attended._commit

    def then(self: Attended, *args: object, **kwargs: object) -> None:
        commit(self, *args, **kwargs)
        happens()

    monkeypatch.setattr(Attended, "_commit", then)


def test_a_bank_that_another_takes_over_during_a_put_keeps_its_rows(store, kept, put, monkeypatch):
    put(made(10))
    during_the_commit(monkeypatch, lambda: store.catalog.claim("lab/a", "another", kept.entry.epoch))
    with pytest.raises(NotOwner, match="has another owner since"):
        put(made(20))
    assert kept.extent().rows >= 10


def test_a_bank_that_is_removed_during_a_put_leaves_nothing(store, kept, put, monkeypatch):
    put(made(10))
    during_the_commit(monkeypatch, lambda: store.remove("lab/a"))
    with pytest.raises(NotOwner, match="removed or rewritten"):
        put(made(20))
    assert not list(Path(store.uri).glob("attended-*"))


def test_rows_that_are_put_again_and_again_take_bounded_space(store, kept, put, monkeypatch):
    monkeypatch.setattr("raymem.storage.attended._KEEP_VERSIONS", timedelta(0))
    monkeypatch.setattr("raymem.storage.attended._FRAGMENT_BYTES", 1)
    folder = Path(store.uri) / f"attended-{kept.entry.id}.lance" / "data"
    put(made(100))
    once = sum(file.stat().st_size for file in folder.iterdir())
    most = 0
    for seed in range(8):
        put(made(100, seed=seed))
        most = max(most, sum(file.stat().st_size for file in folder.iterdir()))
    assert most < 3.5 * once


def test_an_earlier_owner_keeps_nothing(store, kept, put):
    put(made(10))
    store.catalog.claim("lab/a", "another", kept.entry.epoch)
    with pytest.raises(NotOwner):
        put(made(20))
    assert kept.extent().rows == 10


def test_a_fork_has_its_parents_up_to_where_it_left_it(store, kept, put, spec):
    put(made(100))
    fork = fork_of(store, kept, 50)
    mine = store.attended(fork)
    assert mine.extent().rows == 50
    assert mine.get(torch.arange(51)) is None
    assert torch.equal(mine.get(torch.arange(50))["keys"], kept.get(torch.arange(50))["keys"])
    # its own stand before those, and the parent doesn't see them
    put(made(10, 40, seed=3), into=mine)
    assert torch.equal(mine.get(torch.arange(50))["keys"][:, 40:], made(50, seed=3).checked().keys_LNHd[:, 40:])
    assert torch.equal(kept.get(torch.arange(100))["keys"], made(100).checked().keys_LNHd)


def fork_of(store: ColdStore, kept: Attended, at: int):
    fork_at(store, "lab/a", "lab/fork", at)
    return store.catalog.get("lab/fork")


def test_what_a_fork_inherited_is_copied_with_its_rows(store, kept, put):
    put(made(100))
    fork = fork_of(store, kept, 50)
    put(made(4, 46, seed=3), into=store.attended(fork))
    own = store.attended(materialise(store, fork))
    store.tables.drop(f"attended-{kept.entry.id}")
    expected = made(50).checked().keys_LNHd.clone()
    expected[:, 46:] = made(50, seed=3).checked().keys_LNHd[:, 46:]
    assert torch.equal(own.get(torch.arange(50))["keys"], expected)
    assert own.extent().rows == 50


def erased(store: ColdStore, what: Selection):
    """As `raymem.bank.erase`, without a state."""
    entry = store.catalog.get("lab/a")
    evidence = erasure.find(store, entry, what.check())
    receipt = erasure.begin(store, entry, evidence)
    rewritten, evidence = erasure.rewrite(store, entry, evidence)
    erasure.switch(store, entry, rewritten)
    return receipt, erasure.finish(store, receipt, evidence)


@pytest.mark.parametrize("what", [Selection("s", "r", 10, 40), Selection("s", "q")])
def test_erased_rows_leave_no_keys_and_values(store, kept, put, what):
    put(made(100))
    put(made(20, run="q"))
    before = len(Files(store.tables).of(f"attended-{kept.entry.id}"))
    began, receipt = erased(store, what)
    gone = 30 if what.run == "r" else 20
    # once in the journal, and once here
    assert began.before.found == 2 * gone
    assert began.proves
    assert (receipt.status, receipt.rows, receipt.after.found, receipt.after.unreadable) == ("complete", gone, 0, 0)
    present = store.attended(store.catalog.get("lab/a"))
    assert before
    assert present.extent().rows == 120 - gone
    assert not list(Path(store.uri).glob(f"attended-{kept.entry.id}.lance"))
    stay = torch.tensor([pos for pos in range(100) if what.run != "r" or not 10 <= pos < 40])
    assert torch.equal(present.get(stay)["keys"], made(100).checked().keys_LNHd[:, stay])
    assert present.get(torch.tensor([20 if what.run == "r" else 105])) is None


def test_the_check_finds_keys_and_values_that_were_left(store, kept, put):
    put(made(100))
    table = f"attended-{kept.entry.id}"
    what = Selection("s", "r", 10, 40).check()
    evidence = erasure.find(store, store.catalog.get("lab/a"), what)
    store.tables.drop(f"journal-{kept.entry.id}")
    assert erasure.inspect(Files(store.tables), evidence).found == 30
    store.tables.drop(table)
    assert erasure.inspect(Files(store.tables), evidence).found == 0


def test_removing_a_bank_removes_them(store, kept, put):
    put(made(10))
    store.remove("lab/a")
    assert not list(Path(store.uri).glob("attended-*"))


def test_a_call_that_died_before_its_commit_left_nothing_that_stands_in_the_way(store, kept, put, monkeypatch):
    def die(*_: object, **__: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patched:
        # the table is there, and no row yet
        patched.setattr("raymem.storage.attended._batch", die)
        with pytest.raises(SystemExit):
            put(made(10))
    assert kept.extent() == AttendedExtent(0, 0)
    # not even its format stays
    assert put(made(10), int8=False).rows == 10
