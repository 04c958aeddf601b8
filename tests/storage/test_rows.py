"""Rows survive the way to Arrow and back bit for bit, and their checksums notice what does not."""

import dataclasses
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymem.errors import Corrupt
from raymem.rows import JournalRows, Trace, journal_schema

NAMES = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=9)
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(BITS.get(tensor.dtype, torch.int64))


def assert_same(left: JournalRows, right: JournalRows) -> None:
    for field in dataclasses.fields(JournalRows):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype, field.name
            assert torch.equal(bits(a), bits(b)), field.name
        else:
            assert a == b, field.name


@st.composite
def traces(draw: Any) -> Trace:
    rows, layers, width = draw(st.integers(1, 7)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 17]))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    hidden = torch.randn(rows, layers, width, generator=generator).to(dtype)
    # signed zeros and the smallest subnormal are the values a careless conversion loses
    edge = draw(st.sampled_from([0.0, -0.0, torch.finfo(dtype).smallest_normal / 4, torch.finfo(dtype).max]))
    hidden[0, 0, 0] = edge
    values = torch.randn(rows, draw(st.integers(0, 5)), generator=generator) if draw(st.booleans()) else None
    return Trace(
        hidden=hidden,
        tokens=torch.randint(0, 2**31, (rows,), generator=generator),
        stream=draw(NAMES),
        run=draw(NAMES),
        seq=draw(st.integers(0, 2**40)),
        values=values,
        time=draw(st.floats(0, 2e9)),
    )


@given(trace=traces(), pos=st.integers(0, 2**40))
@settings(max_examples=80, deadline=None)
def test_rows_come_back_from_arrow_bit_for_bit(trace: Trace, pos: int):
    rows = JournalRows.of(trace, pos, epoch=3)
    (back,) = JournalRows.from_arrow(rows.to_arrow())
    assert_same(rows, back.verify())


@given(traces(), traces())
@settings(max_examples=30, deadline=None)
def test_mixed_rows_are_cut_where_the_epoch_or_the_values_change(first: Trace, second: Trace):
    second = dataclasses.replace(second, hidden=first.hidden[:1], tokens=first.tokens[:1], values=None)
    end = len(first)
    parts = [JournalRows.of(first, 0, 1), JournalRows.of(second, end, 1), JournalRows.of(second, end + 1, 2)]
    back = JournalRows.from_arrow(pa.concat_tables([part.to_arrow() for part in parts]))
    assert sum(map(len, back)) == end + 2
    assert back[-1].epoch == 2
    assert_same(parts[-1], back[-1].verify())
    for piece in back:
        piece.verify()


def trace(rows: int = 5, **changes: Any) -> Trace:
    fields = {
        "hidden": torch.randn(rows, 2, 3).bfloat16(),
        "tokens": torch.arange(rows),
        "stream": "s",
        "run": "r",
        "values": torch.randn(rows, 4),
        "time": 1.5,
    }
    return Trace(**(fields | changes))


@pytest.mark.parametrize("change", ["hidden", "value", "token", "seq", "stream", "run"])
def test_verify_names_the_position_of_a_changed_row(change: str):
    rows = JournalRows.of(trace(), pos=40, epoch=1)
    changed = {
        "hidden": {"hidden_TLD": rows.hidden_TLD.clone()},
        "value": {"value_TV": rows.value_TV.clone()},
        "token": {"token_T": rows.token_T.clone()},
        "seq": {"seq_T": rows.seq_T.clone()},
        "stream": {"streams": [*rows.streams]},
        "run": {"runs": [*rows.runs]},
    }[change]
    (data,) = changed.values()
    if isinstance(data, list):
        data[3] = "x"
    else:
        data[3] += 1
    with pytest.raises(Corrupt, match="position 43") as caught:
        dataclasses.replace(rows, **changed).verify()
    assert caught.value.details["pos"] == 43


def test_a_checksum_depends_on_the_row_alone():
    whole = trace(rows=6)
    cut = {name: getattr(whole, name)[4:] for name in ("hidden", "tokens", "values")}
    tail = dataclasses.replace(whole, **cut, seq=4, time=9.0)
    assert torch.equal(JournalRows.of(whole, 0, 1).crc_T[4:], JournalRows.of(tail, 70, 2).crc_T)


def test_no_rows_at_all_make_an_empty_table():
    rows = JournalRows.of(trace(rows=0), pos=7, epoch=1)
    table = rows.to_arrow()
    assert table.schema.equals(journal_schema(torch.bfloat16, 2, 3), check_metadata=True)
    assert JournalRows.from_arrow(table) == []
