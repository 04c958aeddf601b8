"""Mutated messages, to the codecs and through the gateway, beside a writer who does nothing wrong."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch
from fuzzing import bounded, lasting, seeded
from hypothesis import given
from hypothesis import strategies as st

from raymem import AttendedRows, BankSpec, KeySpec, MemoryTokens, Trace, connect
from raymem.client import attended_arrow, routes, wire
from raymem.errors import Corrupt, InvalidInput
from raymem.types import AttendQuery

MIB = 2**20


def as_json(trace: Trace) -> bytes:
    body = {"stream": trace.stream, "run": trace.run, "tokens": trace.tokens.tolist()}
    return json.dumps(body | {"hidden": trace.hidden.float().tolist()}).encode()


def as_question(trace: Trace) -> bytes:
    return wire.pack({"hidden": trace.hidden, "k": 3, "start": 1, "as_of": None, "allow_partial": False})


WRITES: dict[str, Callable[[Trace], bytes]] = {
    routes.JSON: as_json,
    routes.MSGPACK: wire.pack,
    routes.ARROW: lambda trace: wire.traces_to_arrow([trace]),
}
# what parsers trip over, in any of the three formats
DICTIONARY = [
    *(b"[", b"]", b"{", b"}", b'"', b"\\u0000", b"\\ud800", b"1e999", b"NaN", b"-", b"9" * 400, b"null", b"[" * 300),
    *(
        b"\x00",
        b"\xff",
        b"\x80",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
        b"\xc1",
    ),
    *(b"\x00" * 8, b"\xff" * 8, b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"\xff\xff\xff\xff\xff\xff\xff\x7f"),
]


def kept(trace: Trace) -> AttendedRows:
    keys, values = torch.arange(2 * 3 * 5 * 2 * 4).float().reshape(2, 3, 5, 2, 4)
    return AttendedRows(trace.stream, trace.run, 0, keys, values, rope="theta").checked()


def chosen(trace: Trace) -> bytes:
    found = MemoryTokens(*[torch.arange(5)] * 3, torch.zeros(5, dtype=torch.int64), (("s", "r"),), 0.5, "spalm")
    rows = kept(trace)
    tensors = {name: tensor for name, tensor in vars(rows).items() if isinstance(tensor, torch.Tensor)}
    return attended_arrow.memory_to_arrow(replace(found, **tensors))


# of attended rows: the message, and what reads it
ATTENDED: dict[str, tuple[Callable[[Trace], bytes], Callable[[bytes], object]]] = {
    "rows": (lambda trace: wire.pack(kept(trace)), lambda data: wire.unpack(data, MIB, 1024)),
    "rows as Arrow": (
        lambda trace: attended_arrow.rows_to_arrow(kept(trace)),
        lambda data: [rows.checked() for rows in attended_arrow.rows_from_arrow(data, MIB)],
    ),
    "chosen": (chosen, lambda data: attended_arrow.memory_from_arrow(data, MIB)),
}


def mutated(good: bytes, chance: random.Random) -> bytes:
    """One to four places changed: a bit, a piece, its length, its order."""
    data = bytearray(good)
    for _ in range(chance.randint(1, 4)):
        at, size = chance.randrange(len(data) + 1), chance.choice([1, 2, 4, 8, 64])
        match chance.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                del data[at : at + size]
            case 2:
                data[at:at] = chance.choice(DICTIONARY)
            case 3:
                word = chance.choice(DICTIONARY)
                data[at : at + len(word)] = word
            case 4:
                data[at:at] = data[at : at + size]
            case _:
                del data[at:]
    return bytes(data)


@pytest.fixture(scope="module")
def good(tiny: Any) -> Trace:
    return tiny.trace(5)


@pytest.mark.parametrize("kind", [routes.MSGPACK, routes.ARROW])
@bounded(300)
@given(seed=st.integers(0, 2**63))
def test_no_mutation_gets_past_the_codecs_as_something_else(kind: str, seed: int, good: Trace) -> None:
    data = mutated(WRITES[kind](good), random.Random(seed))
    try:
        if kind == routes.ARROW:
            wire.traces_from_arrow(data, MIB)
        else:
            wire.unpack(data, MIB, 1024)
    except (Corrupt, InvalidInput):
        pass


@pytest.mark.parametrize("what", ATTENDED)
@bounded(200)
@given(seed=st.integers(0, 2**63))
def test_no_mutation_of_attended_rows_gets_past_the_codecs(what: str, seed: int, good: Trace) -> None:
    write, read = ATTENDED[what]
    read(write(good))
    try:
        read(mutated(write(good), random.Random(seed)))
    except (Corrupt, InvalidInput):
        pass


def test_mutated_bodies_are_refused_and_an_innocent_writer_loses_nothing(fuzzed: str, tiny: Any, good: Trace) -> None:
    chance = seeded(15)
    with connect(fuzzed) as store, httpx.Client(base_url=fuzzed) as attacker:
        spec = BankSpec(kind="spalm", fingerprint=tiny.fingerprint, key=KeySpec(layers=(5,)))
        mine, theirs = store.create("lab/innocent", spec), store.create("lab/attacked", spec)
        for number in lasting(150):
            kind = chance.choice(list(WRITES))
            body, path = mutated(WRITES[kind](good), chance), "write"
            match chance.randrange(6):
                case 0:
                    kind, body, path = routes.MSGPACK, mutated(as_question(good), chance), "read"
                case 1:
                    query = wire.pack({"query": AttendQuery(good.hidden, good.tokens, 4), "as_of": None})
                    kind, body, path = routes.MSGPACK, mutated(query, chance), "attend"
                case 2:
                    kind = chance.choice([routes.MSGPACK, routes.ARROW])
                    write = ATTENDED["rows" if kind == routes.MSGPACK else "rows as Arrow"][0]
                    body, path = mutated(write(good), chance), "rows"
            url = f"/v1/banks/{theirs.name}/{path}"
            answer = attacker.post(url, content=body, headers={"Content-Type": kind})
            assert answer.status_code < 500, (answer.text, kind, body)
            if number % 10 == 0:
                trace = tiny.trace(3, run=f"r{number}")
                assert mine.write(trace).rows == 3
        for run in range(0, number + 1, 10):
            kept = mine.tokens("s", f"r{run}", 0, 9)
            assert torch.equal(kept, tiny.trace(3, run=f"r{run}").tokens)
