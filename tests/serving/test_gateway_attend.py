"""Attended rows over HTTP in each of its formats: JSON, msgpack and Arrow say the same."""

import base64

import httpx
import pytest
import torch

from raymem import AttendedRows, MemoryTokens, connect
from raymem.client import attended_arrow, routes, wire
from raymem.tensors import to_bytes
from raymem.types import AttendQuery


def kv(count: int, seq: int = 0, run: str = "r", dtype: torch.dtype = torch.float32) -> AttendedRows:
    keys, values = torch.randn(2, 3, 200, 2, 4, generator=torch.Generator().manual_seed(0))[:, :, seq : seq + count]
    return AttendedRows("s", run, seq, keys.to(dtype), values.to(dtype), rope="theta=10000")


@pytest.fixture
def bank(gateway, gateway_spec, bank_name, make_rows):
    with connect(gateway) as store:
        made = store.create(bank_name, gateway_spec)
        made.write(make_rows(90))
        yield made


@pytest.fixture
def ask(gateway, bank, make_rows):
    def post(path: str, body: bytes, kind: str = routes.MSGPACK, accept: str = routes.MSGPACK) -> httpx.Response:
        headers = {"Content-Type": kind, "Accept": accept}
        return httpx.post(f"{gateway}/v1/banks/{bank.name}/{path}", content=body, headers=headers)

    return post


def question(make_rows) -> bytes:
    trace = make_rows(9, seq=40)
    return wire.pack({"query": AttendQuery(trace.hidden, trace.tokens, 20), "as_of": None})


def test_three_formats_say_the_same(bank, ask, make_rows):
    bank.put_rows(kv(90))
    trace = make_rows(9, seq=40)
    there = bank.attend(trace.hidden, trace.tokens, 20)
    packed = wire.unpack(ask("attend", question(make_rows)).content)
    columns = attended_arrow.memory_from_arrow(ask("attend", question(make_rows), accept=routes.ARROW).content)
    assert isinstance(packed, MemoryTokens)
    for found in (packed, columns):
        for name, value in vars(there).items():
            other = getattr(found, name)
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    tensor = {"dtype": "bfloat16", "shape": [9, 2, 24], "base64": base64.b64encode(to_bytes(trace.hidden)).decode()}
    body = {"hidden": tensor, "tokens": trace.tokens.tolist(), "rows": 20}
    for hidden in (tensor, trace.hidden.float().tolist()):
        answer = httpx.Request("POST", "http://x", json=body | {"hidden": hidden}).content
        said = ask("attend", answer, routes.JSON, routes.JSON).json()
        assert said["relevance"] == pytest.approx(there.relevance)
        assert [(row["stream"], row["seq"], row["pos"]) for row in said["rows"]] == [
            (row.stream, row.seq, row.pos) for row in there.rows()
        ]
        assert [row["token"] for row in said["rows"]] == there.tokens_N.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 33])
def test_rows_as_arrow_are_the_rows(dtype, count):
    rows = kv(count, 5, dtype=dtype).checked(int8=dtype == torch.float32)
    (found,) = attended_arrow.rows_from_arrow(attended_arrow.rows_to_arrow(rows))
    assert (found.stream, found.run, found.seq, found.rope) == ("s", "r", 5, "theta=10000")
    assert found.tensors().keys() == rows.tensors().keys()
    for name, tensor in rows.tensors().items():
        assert torch.equal(found.tensors()[name], tensor)


def test_rows_are_put_as_msgpack_and_as_arrow(bank, ask):
    assert ask("rows", wire.pack(kv(40).checked())).json() == {"rows": 40, "bytes": 40 * 2 * 3 * 2 * 8}
    body = attended_arrow.rows_to_arrow(kv(60, 30).checked())
    assert ask("rows", body, routes.ARROW).json()["rows"] == 90
    assert bank.info().attended_rows == 90


@pytest.mark.parametrize(
    ("path", "body", "kind", "status", "code"),
    [
        ("attend", wire.pack({"query": 3}), routes.MSGPACK, 422, "invalid_input"),
        ("attend", wire.pack({"query": AttendQuery(None, None), "as_of": None}), routes.MSGPACK, 422, "invalid_input"),
        ("attend", b'{"rows": 0, "tokens": [1]}', routes.JSON, 422, "invalid_input"),
        ("attend", b'{"tokens": [1], "method": "best"}', routes.JSON, 422, "invalid_input"),
        ("attend", b'{"tokens": [1], "as_of": "never"}', routes.JSON, 404, "tag_not_found"),
        ("attend", b"", routes.ARROW, 422, "invalid_input"),
        ("rows", wire.pack({"rows": 3}), routes.MSGPACK, 422, "invalid_input"),
        ("rows", wire.pack(kv(5, 88).checked()), routes.MSGPACK, 422, "invalid_input"),
        ("rows", b"no stream", routes.ARROW, 422, "corrupt"),
        ("rows", b"{}", routes.JSON, 422, "invalid_input"),
    ],
)
def test_what_can_not_be_meant_is_refused(bank, ask, path, body, kind, status, code):
    answer = ask(path, body, kind)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert bank.info().attended_rows == 0
