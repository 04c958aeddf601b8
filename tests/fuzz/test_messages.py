"""Mutated messages, to the codecs and through the gateway, beside a writer who does nothing wrong."""

import json
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import torch
from fuzzing import bounded, lasting, seeded
from hypothesis import given
from hypothesis import strategies as st

from raymem import BankSpec, KeySpec, Trace, connect
from raymem.client import routes, wire
from raymem.errors import Corrupt, InvalidInput

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


def test_mutated_bodies_are_refused_and_an_innocent_writer_loses_nothing(fuzzed: str, tiny: Any, good: Trace) -> None:
    chance = seeded(15)
    with connect(fuzzed) as store, httpx.Client(base_url=fuzzed) as attacker:
        spec = BankSpec(kind="spalm", fingerprint=tiny.fingerprint, key=KeySpec(layers=(5,)))
        mine, theirs = store.create("lab/innocent", spec), store.create("lab/attacked", spec)
        for number in lasting(150):
            kind = chance.choice(list(WRITES))
            body, path = mutated(WRITES[kind](good), chance), "write"
            if chance.random() < 0.3:
                kind, body, path = routes.MSGPACK, mutated(as_question(good), chance), "read"
            url = f"/v1/banks/{theirs.name}/{path}"
            answer = attacker.post(url, content=body, headers={"Content-Type": kind})
            assert answer.status_code < 500, (answer.text, kind, body)
            if number % 10 == 0:
                trace = tiny.trace(3, run=f"r{number}")
                assert mine.write(trace).rows == 3
        for run in range(0, number + 1, 10):
            kept = mine.tokens("s", f"r{run}", 0, 9)
            assert torch.equal(kept, tiny.trace(3, run=f"r{run}").tokens)
