import base64
import tracemalloc
import zlib

import numpy as np
import pytest
import torch

from raymem.errors import Corrupt
from raymem.storage.journal.tombstones import Tombstones

TOMBSTONES = Tombstones.of([0, 1, 5, 6, 7, 9], end=10)
LEFT = [2, 3, 4, 8, 10, 11, 12]


def positions(tombstones: Tombstones) -> list[int]:
    return [pos for start, stop in tombstones.ranges_R2.tolist() for pos in range(start, stop)]


def test_rows_that_keep_every_position_but_the_erased_are_in_order():
    for first in range(len(LEFT)):
        for expect in range(LEFT[first - 1] + 1 if first else 0, LEFT[first] + 1):
            assert TOMBSTONES.wrong(torch.tensor(LEFT[first:]), expect) is None


@pytest.mark.parametrize("missing", range(len(LEFT) - 1))
def test_a_row_less_is_noticed_where_it_is_missing(missing):
    assert TOMBSTONES.wrong(torch.tensor(LEFT[:missing] + LEFT[missing + 1 :]), 0) == missing


@pytest.mark.parametrize("back", [0, 6, 9])
def test_an_erased_row_that_came_back_is_noticed(back):
    assert TOMBSTONES.wrong(torch.tensor(sorted([*LEFT, back])), 0) is not None


def test_rank_counts_the_rows_that_should_be_before():
    assert TOMBSTONES.rank(np.arange(14)).tolist() == [0, 0, 0, 1, 2, 3, 3, 3, 3, 4, 4, 5, 6, 7]


def test_the_next_row_is_the_first_that_was_not_erased():
    assert [TOMBSTONES.next(pos) for pos in (0, 1, 2, 5, 8, 9, 11)] == [2, 2, 2, 8, 8, 10, 11]


def test_two_erasures_add_up():
    both = TOMBSTONES | Tombstones.of([8, 12], end=13)

    assert positions(both) == [0, 1, 5, 6, 7, 8, 9, 12]
    assert both.end == 13


@pytest.mark.parametrize(
    "tombstones", [Tombstones(), TOMBSTONES, Tombstones(end=7), Tombstones.of(range(0, 9999, 3), 10_000)]
)
def test_what_is_written_down_reads_back(tombstones):
    again = Tombstones.decode(tombstones.encode())

    assert np.array_equal(again.ranges_R2, tombstones.ranges_R2)
    assert (again.end, len(again)) == (tombstones.end, len(tombstones))


def test_every_third_of_many_rows_is_a_short_record():
    # it travels in each of the table's manifests: a twentieth of a byte a row
    assert len(Tombstones.of(range(0, 300_000, 3), 300_000).encode()) < 300_000 / 20


@pytest.mark.parametrize("text", [b"", b"x", b"AAAA"])
def test_a_damaged_record_is_refused(text):
    with pytest.raises(Corrupt):
        Tombstones.decode(text)


def test_sets_of_positions_are_sets_of_positions():
    generator = np.random.default_rng(0)
    assert [len(Tombstones() | Tombstones()), len(Tombstones() - Tombstones()), len(Tombstones().spread(4))] == [
        0,
        0,
        0,
    ]
    for _ in range(200):
        mine, other = (set(generator.choice(30, generator.integers(0, 15), replace=False).tolist()) for _ in range(2))
        one, two, pos = Tombstones.of(mine, 30), Tombstones.of(other, 30), int(generator.integers(0, 31))
        assert positions(one | two) == sorted(mine | other)
        assert positions(one - two) == sorted(mine - other)
        assert positions(one.until(pos)) == sorted(each for each in mine if each < pos)
        assert one.spread(4) == sorted(mine)[:: max(1, -(-len(mine) // 4))]


def test_a_record_of_very_many_positions_takes_no_more_memory_than_its_ranges():
    many = Tombstones.of([3], 4) | Tombstones(np.array([[10, 2**52]]), 2**52)

    assert len(many - Tombstones.of([3, 20], 30)) == 2**52 - 11
    assert (len(many.until(2**51)), len(many.spread(16))) == (2**51 - 9, 16)
    assert len(Tombstones.decode(many.encode())) == len(many)


def record(*steps: int) -> bytes:
    return base64.b64encode(zlib.compress(np.array(steps, "<i8").tobytes()))


@pytest.mark.parametrize(
    "text",
    [
        record(-1, 2, 3),
        record(3, -2, 3),
        record(3, 0, 3),
        record(3, 1, 0, 1, 3),
        record(3, 1, -1),
        record(2**62, 2**62, 2**62),
        record(0, 2**53, 1),
        record(1, 2),
        record(),
        record(1, 2, 3)[:-4],
    ],
)
def test_positions_that_no_journal_has_are_refused(text):
    with pytest.raises(Corrupt):
        Tombstones.decode(text)


def test_a_record_unfolds_to_what_its_journal_can_need_and_no_further():
    bomb = base64.b64encode(zlib.compress(bytes(2**26), 9))
    tracemalloc.start()
    with pytest.raises(Corrupt, match="longer than the journal has rows for"):
        Tombstones.decode(bomb, most=18)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
