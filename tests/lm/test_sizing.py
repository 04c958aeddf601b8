"""What a budget buys: every kind fills it, and what is given up for it is what costs least."""

import pytest

from raymem.errors import InvalidSpec
from raymem.lm.sizing import options_for
from raymem.memory import build, kinds
from raymem.memory.base import Dims
from raymem.memory.rows import RowMemory

WIDTH = 576


def full(memory):
    """Bytes of a bank into which nothing more fits."""
    if isinstance(memory, RowMemory):
        return memory.capacity * sum(spec.nbytes for spec in memory.row_spec.values())
    return memory.nbytes(memory.empty())


@pytest.mark.parametrize("budget", [110_003, 1_000_000])
@pytest.mark.parametrize("kind", kinds())
def test_a_full_bank_comes_within_five_percent_of_its_budget_and_never_over(kind, budget):
    options = options_for(kind, Dims(WIDTH, 0), budget)
    held = full(build(kind, Dims(WIDTH, 0), options, budget))
    assert 0.95 * budget <= held <= budget


@pytest.mark.parametrize("kind", kinds())
def test_more_bytes_never_make_narrower_keys(kind):
    widths = [options_for(kind, Dims(WIDTH, 0), budget)["key_dims"] for budget in (120_000, 500_000, 3_000_000)]
    assert widths == sorted(widths)
    assert widths[0] == (48 if kind == "larimar" else 64)
    assert widths[-1] > widths[0]


def test_keys_are_as_wide_as_all_rows_leave_room_for():
    dims, budget, rows = Dims(WIDTH, 0), 1_000_000, 3000
    options = options_for("spalm", dims, budget, rows)
    wider = options | {"key_dims": options["key_dims"] + 1}
    assert build("spalm", dims, options, budget).capacity >= rows
    assert build("spalm", dims, wider, budget).capacity < rows


def test_keys_narrower_than_the_least_width_stay_as_they_are():
    assert options_for("ntm", Dims(24, 0), 150_000)["key_dims"] == 24


def test_a_budget_too_small_for_any_bank_and_an_unknown_kind_are_refused():
    with pytest.raises(InvalidSpec, match="budget_bytes=1000"):
        options_for("ntm", Dims(WIDTH, 0), 1000)
    with pytest.raises(InvalidSpec, match="spolm"):
        options_for("spolm", Dims(WIDTH, 0), 150_000)
