import math
from collections.abc import Callable
from dataclasses import fields, replace

import msgpack
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymem.client.wire import pack, traces_from_arrow, traces_to_arrow, unpack
from raymem.client.wire_limits import check_msgpack
from raymem.errors import BankNotFound, Corrupt, InvalidInput, Overloaded, TooLarge
from raymem.rows import Trace
from raymem.tensors import TENSOR_DTYPES, to_bits
from raymem.types import Ack, BankInfo, BankSpec, Fingerprint, KeySpec, MigrationReport, Readout

FINGERPRINT = Fingerprint(model="tiny", content="c" * 64, layers=(3, 7), width=5, tokenizer="t" * 64)
SPEC = BankSpec(kind="spalm", fingerprint=FINGERPRINT, key=KeySpec(function="window"), options={"k": 8, "tau": [0.1]})


def raw(tensor: torch.Tensor) -> bytes:
    return to_bits(tensor.reshape(-1).view(torch.uint8)).tobytes()


def assert_same(one: object, other: object) -> None:
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert raw(one) == raw(other)
    elif isinstance(one, Trace | Readout):
        for item in fields(one):
            assert_same(getattr(one, item.name), getattr(other, item.name))
    else:
        assert one == other


MADE_BY = FINGERPRINT.model_copy(update={"content": "2:" + "d" * 64, "legacy": ("c" * 64, "t" * 64)})


def trace(rows: int = 7, seq: int = 0, *, values: bool = True, run: str = "r", dtype: str = "bfloat16") -> Trace:
    return Trace(
        hidden=torch.randn(rows, 2, 5).to(getattr(torch, dtype)),
        tokens=torch.arange(rows),
        stream="Ünïcode",
        run=run,
        seq=seq,
        values=torch.randn(rows, 3) if values else None,
        time=1_700_000_000.25,
    )


NOUNS = [
    trace(),
    trace(0, values=False),
    replace(trace(), fingerprint=MADE_BY),
    Ack(rows=5, duplicates=2, end=9, gaps=0, durable=True),
    Readout(torch.zeros(3, 0), torch.rand(3)),
    Readout(*(torch.rand(2, 3) for _ in range(7)), sources=(("a", "b"), ("c", "d"))),
    FINGERPRINT,
    SPEC,
    KeySpec(layers=(1,)),
    BankInfo("a/b", SPEC, "hot", 3, None, "node", 12, 34, {"before": 5}, 1.5),
    MigrationReport("a/b", "s0", "s1", 7, 1.5, 20.0),
]


@pytest.mark.parametrize("name", sorted(TENSOR_DTYPES))
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 5), (3, 7)], ids=str)
def test_a_tensor_of_every_dtype_keeps_its_bits(name: str, shape: tuple[int, ...]) -> None:
    dtype = TENSOR_DTYPES[name]
    size = math.prod(shape) * dtype.itemsize
    drawn = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
    tensor = drawn.view(dtype).reshape(shape)
    assert_same(unpack(pack(tensor)), tensor)


def test_every_dtype_that_torch_can_compute_with_is_carried() -> None:
    wanted = "bool bfloat16 complex32 complex64 complex128 float4_e2m1fn_x2 float16 float32 float64 float8_e4m3fn"
    wanted += " float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu int8 int16 int32 int64"
    assert set(wanted.split()) | {"uint8", "uint16", "uint32", "uint64"} <= set(TENSOR_DTYPES)


def test_a_tensor_that_is_a_view_arrives_as_its_values_alone() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    conjugate = torch.complex(base, base).conj()
    assert torch.equal(unpack(pack(base.T[1:3])), base.T[1:3])
    assert torch.equal(unpack(pack(conjugate)), conjugate)
    assert len(pack(base[0])) < 64


def test_what_arrives_can_be_written_to() -> None:
    arrived = unpack(pack(torch.zeros(3)))
    arrived += 1
    assert arrived.tolist() == [1, 1, 1]


@pytest.mark.parametrize("noun", NOUNS, ids=lambda noun: type(noun).__name__)
def test_nouns_come_back_as_themselves(noun: object) -> None:
    assert_same(unpack(pack(noun)), noun)
    assert_same(unpack(pack({"in": [noun]}))["in"][0], noun)


@pytest.mark.parametrize("error", [BankNotFound("no bank 'a/b'", bank="a/b"), Overloaded("full", retry_after_s=0.5)])
def test_errors_come_back_with_their_details(error: Exception) -> None:
    arrived = unpack(pack([error]))[0]
    assert (type(arrived), arrived.args, arrived.details) == (type(error), error.args, error.details)


SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.binary() | st.text()
)
KEYS = st.text().filter(lambda key: key != "$")


@given(st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=30))
def test_plain_data_comes_back_as_it_was(data: object) -> None:
    assert unpack(pack(data)) == data


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (np.float64(1), "numpy.float64"),
        (np.int32(1), "numpy.int32"),
        (np.zeros(3), "numpy.ndarray"),
        ({1: 2}, "map key 1"),
        ({"$": "Trace"}, "map key"),
        ({1, 2}, "builtins.set"),
        (2**64, "64 bits"),
        ("\ud800", "UTF-8"),
        (torch.zeros(2).to_sparse(), "sparse"),
    ],
    ids=str,
)
def test_what_can_not_be_sent_is_refused_by_name(bad: object, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        pack([bad])


def test_nesting_without_end_is_refused() -> None:
    data: list[object] = []
    data.append(data)
    with pytest.raises(InvalidInput, match="deep"):
        pack(data)


def test_both_sizes_are_named_when_a_message_is_too_large() -> None:
    data = pack(torch.zeros(1000))
    with pytest.raises(TooLarge, match="4,000 bytes; the limit is 100"):
        pack(torch.zeros(1000), max_bytes=100)
    with pytest.raises(TooLarge, match=f"{len(data):,} bytes; the limit is 3,999"):
        unpack(data, max_bytes=3_999)
    with pytest.raises(TooLarge, match="the limit is 10"):
        traces_from_arrow(traces_to_arrow([trace()]), max_bytes=10)


def tensor_bytes(head: object, body: bytes) -> bytes:
    packed = msgpack.packb(head)
    return msgpack.packb(msgpack.ExtType(1, len(packed).to_bytes(2, "little") + packed + body))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        pack(trace())[:-1],
        pack(None) + b"\0",
        msgpack.packb(msgpack.ExtType(2, b"")),
        msgpack.packb(msgpack.ExtType(1, b"")),
        b"\x91" * 100_000,
        tensor_bytes(["float33", [1]], b"1234"),
        tensor_bytes(["qint8", [4]], b"1234"),
        tensor_bytes(["float32", [2]], b"1234"),
        tensor_bytes(["float32", [-1]], b"1234"),
        tensor_bytes(["float32", [1.0]], b"1234"),
        tensor_bytes(["float32", [0, 2**62, 2**62]], b""),
        tensor_bytes(["bool", [4]], b"\0\1\2\3"),
        tensor_bytes("float32", b""),
    ],
    ids=lambda data: data[:24].hex(),
)
def test_a_malformed_message_is_corrupt(data: bytes) -> None:
    with pytest.raises(Corrupt):
        unpack(data)


ACK = {"$": "Ack", "rows": 1, "duplicates": 0, "end": 0, "gaps": 0, "durable": True}


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({b"bytes": 1}, "the key b'bytes'; give text"),
        ({"$": "Secret"}, "noun is 'Secret'"),
        ({"$": 5}, "noun is 5"),
        ({"$": ["Ack"]}, "noun is"),
        ({"$": "Ack", "rows": 1}, "Ack in a message.*duplicates"),
        (ACK | {"rows": "1"}, r"Ack\.rows is '1'; give int"),
        (ACK | {"rows": True}, r"Ack\.rows is True; give int"),
        (ACK | {"more": 1}, "Ack has no field 'more'"),
        ({"$": "KeySpec", "function": "guess"}, "KeySpec.*function"),
        ({"$": "KeySpec", "surprise": 1}, "KeySpec.*surprise"),
        ({"$": "RaymemError", "details": {"message": 1}}, "RaymemError"),
        ({"$": "RaymemError", "details": 1}, "RaymemError"),
        ({"deep": [{"$": "Trace", "hidden": [1.0], "tokens": 1, "stream": "s", "run": "r"}]}, r"Trace\.hidden is"),
    ],
    ids=str,
)
def test_a_sound_message_that_says_what_can_not_be_is_the_senders_mistake(message: object, told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        unpack(msgpack.packb(message))


def quietly(read: object, data: bytes) -> None:
    try:
        read(data, max_bytes=10_000)
    except (Corrupt, InvalidInput):
        pass


@given(st.binary(max_size=200))
@settings(max_examples=500, deadline=None)
def test_random_bytes_are_corrupt_and_nothing_worse(data: bytes) -> None:
    quietly(unpack, data)
    quietly(traces_from_arrow, data)


@given(st.sampled_from(NOUNS), st.data())
@settings(max_examples=500, deadline=None)
def test_a_damaged_message_is_corrupt_and_nothing_worse(noun: object, data: st.DataObject) -> None:
    quietly(unpack, damaged(pack(noun), data))


@given(st.data())
@settings(max_examples=500, deadline=None)
def test_a_damaged_stream_of_rows_is_corrupt_and_nothing_worse(data: st.DataObject) -> None:
    quietly(traces_from_arrow, damaged(traces_to_arrow([trace()]), data))


def damaged(good: bytes, data: st.DataObject) -> bytes:
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        bad[data.draw(st.integers(0, len(bad) - 1))] = data.draw(st.integers(0, 255))
    return bytes(bad[: data.draw(st.integers(0, len(bad)))]) if data.draw(st.booleans()) else bytes(bad)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_traces_come_back_from_arrow_bit_by_bit(dtype: str) -> None:
    sent = [
        trace(dtype=dtype),
        trace(4, run="other", dtype=dtype, values=False),
        trace(1, seq=9, run="other", dtype=dtype, values=False),
        trace(3, seq=2**40, dtype=dtype),
    ]
    for mine, arrived in zip(sent, traces_from_arrow(traces_to_arrow(sent)), strict=True):
        assert_same(mine, arrived)


def test_what_made_the_rows_travels_with_them() -> None:
    sent = [replace(trace(), fingerprint=MADE_BY), replace(trace(4, run="other"), fingerprint=MADE_BY)]
    assert [arrived.fingerprint for arrived in traces_from_arrow(traces_to_arrow(sent))] == [MADE_BY, MADE_BY]
    with pytest.raises(InvalidInput, match="different models"):
        traces_to_arrow([sent[0], trace(4, run="other")])


def test_traces_that_follow_each_other_arrive_as_one() -> None:
    first, second = trace(4), trace(3, seq=4)
    (arrived,) = traces_from_arrow(traces_to_arrow([first, second]))
    assert torch.equal(arrived.hidden, torch.cat([first.hidden, second.hidden]))


def test_traces_that_can_not_travel_together_are_refused() -> None:
    with pytest.raises(InvalidInput, match="different"):
        traces_to_arrow([trace(), trace(dtype="float32")])
    with pytest.raises(InvalidInput, match="at least one"):
        traces_to_arrow([])


def test_a_changed_row_in_an_arrow_stream_is_corrupt() -> None:
    sent = trace(40)
    data = bytearray(traces_to_arrow([sent]))
    place = bytes(data).index(to_bits(sent.hidden[20]).tobytes())
    data[place] ^= 1
    with pytest.raises(Corrupt, match="checksum"):
        traces_from_arrow(data)


def compressed(codec: str) -> bytes:
    table = pa.ipc.open_stream(traces_to_arrow([trace(1000)])).read_all()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def recast(change: Callable[[pa.Table], pa.Table]) -> bytes:
    table = change(pa.ipc.open_stream(traces_to_arrow([trace()])).read_all())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def words_as_dictionary(table: pa.Table) -> pa.Table:
    return table.set_column(2, "stream", table["stream"].combine_chunks().dictionary_encode())


UNFOLDING = [
    (compressed("zstd"), Corrupt, "without compression"),
    (compressed("lz4"), Corrupt, "without compression"),
    (recast(words_as_dictionary), Corrupt, "dictionary"),
    (recast(lambda table: table.append_column("more", pa.nulls(len(table)))), Corrupt, "columns"),
    (recast(lambda table: table.drop(["crc32c"])), Corrupt, "columns"),
    (recast(lambda table: table.replace_schema_metadata({"raymem.layers": "0"})), Corrupt, "columns"),
    (recast(lambda table: table.replace_schema_metadata({"raymem.layers": "9" * 5000})), Corrupt, "not an Arrow"),
]


@pytest.mark.parametrize(("data", "error", "said"), UNFOLDING)
def test_a_stream_that_would_unfold_is_refused_before_it_does(data, error, said) -> None:
    before = pa.total_allocated_bytes()
    with pytest.raises(error, match=said):
        traces_from_arrow(data)
    assert pa.total_allocated_bytes() == before


def test_a_stream_has_so_many_rows_and_batches_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    data = traces_to_arrow([trace(5, run=str(run)) for run in range(4)])
    assert len(traces_from_arrow(data)) == 4
    for name in ("MOST_ROWS", "MOST_BATCHES"):
        with monkeypatch.context() as patch:
            patch.setattr(f"raymem.client.wire_limits.{name}", 4)
            with pytest.raises(TooLarge, match="send several"):
                traces_from_arrow(data)


def test_a_stream_has_so_many_traces_and_a_small_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    one, four = traces_to_arrow([trace(4)]), traces_to_arrow([trace(1, run=str(run)) for run in range(4)])
    monkeypatch.setattr("raymem.client.wire_limits.MOST_TRACES", 3)
    assert len(traces_from_arrow(one)) == 1
    with pytest.raises(TooLarge, match="3 traces at most"):
        traces_from_arrow(four)
    # a fingerprint of two megabytes unfolded to two hundred
    long = b'{"model": [' + b"{}," * 700_000 + b"{}]}"
    said = recast(lambda table: table.replace_schema_metadata({**table.schema.metadata, "raymem.fingerprint": long}))
    with pytest.raises(TooLarge, match="schema"):
        traces_from_arrow(said)


FULL = [
    b"\xdd\x00\xff\xff\xff" + b"\x90" * 2**20,
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xdc\x00\xc8" + (b"\xdc\x00\xc8" + b"\x90" * 200) * 200,
]


@pytest.mark.parametrize("data", FULL)
def test_a_message_of_many_items_is_refused_before_they_are_made(data: bytes) -> None:
    with pytest.raises(TooLarge, match="256 items"):
        unpack(data, 2**30, 256)


@pytest.mark.parametrize("data", [b"", b"\xc6\xff\xff\xff\xff", b"\x91" * 40, b"\x01\x02", b"\xc1", b"\xda\x00"])
def test_a_message_that_does_not_hold_together_is_refused_by_its_outline(data: bytes) -> None:
    with pytest.raises(Corrupt):
        unpack(data, 2**30, 256)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(), inner, max_size=20),
    max_leaves=50,
)


@settings(max_examples=100, deadline=None)
@given(PLAIN, st.sampled_from([0, 1, 2, 3, 4, 8, 16, 17, 255, 256, 65536]))
def test_the_outline_of_every_message_is_read_as_msgpack_reads_it(data: object, size: int) -> None:
    packed = msgpack.packb([data, msgpack.ExtType(7, b"x" * size), b"x" * size, "x" * size])
    check_msgpack(memoryview(packed), 10_000)
    with pytest.raises(Corrupt):
        check_msgpack(memoryview(packed[:-1]), 10_000)
