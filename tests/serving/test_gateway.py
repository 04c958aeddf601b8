import asyncio
import base64
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from raymem import Calibration, KeySpec, Store, Trace, connect
from raymem.client import wire
from raymem.client.http import HttpBackend
from raymem.errors import (
    BankDetached,
    BankExists,
    BankNotFound,
    CalibrationNotFound,
    Corrupt,
    InvalidInput,
    InvalidSpec,
    InvalidTrace,
    NonFinite,
    SequenceConflict,
    StorageError,
)

KINDS = ["spalm", "titans"]


@pytest.fixture
def store(gateway):
    with connect(gateway) as opened:
        yield opened


@pytest.fixture(params=KINDS)
def bank(request, store: Store, gateway_spec, bank_name):
    return store.create(bank_name, gateway_spec.model_copy(update={"kind": request.param}))


@pytest.fixture
def rows_bank(store: Store, gateway_spec, bank_name):
    return store.create(bank_name, gateway_spec)


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return (one is None and other is None) or (one is not None and other is not None and torch.equal(one, other))


def test_a_bank_lives_its_whole_life_over_http(store, bank, make_rows, tmp_path):
    trace = make_rows(37)
    assert (bank.write(trace).rows, bank.write(trace).duplicates) == (37, 37)
    before, readout = bank.digest(), bank.read(trace.hidden[3:9], k=4, start=3)
    assert bank.info().rows == 37
    assert bank.info().state == "hot"
    assert bank.tag("first") == {"first": 37}
    assert bank.tokens("s", "r", 3, 8).tolist() == trace.tokens[3:8].tolist()

    assert bank.detach().state == "cold"
    with pytest.raises(BankDetached):
        bank.write(make_rows(1, seq=37))
    assert bank.attach().state == "hot"
    assert bank.digest() == before
    assert bank.migrate("local").rows == 0

    file = tmp_path / "bank.raymem"
    assert bank.export(file) == file.stat().st_size
    copy = store.import_(file, f"{bank.name}-copy")
    copy.attach()
    again = copy.read(trace.hidden[3:9], k=4, start=3)
    assert copy.digest() == before
    assert same(again.values_QV, readout.values_QV)
    assert same(again.tokens_Qk, readout.tokens_Qk)
    assert same(again.relevance_Q, readout.relevance_Q)

    assert {bank.name, copy.name} <= {info.name for info in store.banks("lab/")}
    store.delete(copy.name)
    with pytest.raises(BankNotFound):
        copy.info()


def test_a_readout_over_http_has_every_tensor_of_the_local_one(rows_bank, make_rows):
    trace = make_rows(20)
    rows_bank.write(trace)
    readout = rows_bank.read(trace.hidden[5:8], k=3, start=5)
    assert readout.tokens_Qk is not None
    assert readout.tokens_Qk[:, 0].tolist() == trace.tokens[6:9].tolist()
    assert (readout.rows(0)[0].seq, readout.rows(0)[0].stream) == (5, "s")
    assert readout.relevance_Q.tolist() == [1.0, 1.0, 1.0]


def test_many_traces_travel_as_one_arrow_stream(gateway, rows_bank, make_rows):
    traces = [make_rows(5, run="a"), make_rows(7, run="b", seed=1), make_rows(3, run="a", seq=5)]
    body = wire.traces_to_arrow(traces)
    sent = httpx.post(
        f"{gateway}/v1/banks/{rows_bank.name}/write",
        content=body,
        headers={"Content-Type": "application/vnd.apache.arrow.stream"},
    )
    assert sent.json() == {"rows": 15, "duplicates": 0, "end": 15, "gaps": 0, "durable": True}
    assert rows_bank.tokens("s", "a", 0, 99).tolist() == make_rows(8, run="a").tokens.tolist()


async def test_the_client_sends_many_traces_at_once_and_again_without_harm(gateway, rows_bank, make_rows):
    from raymem.config import Settings

    backend = await HttpBackend.connect(gateway, None, Settings())
    traces = [make_rows(5, run="a"), make_rows(7, run="b")]
    first, second = [await backend.write_many(rows_bank.name, traces) for _ in range(2)]
    await backend.close()
    assert (first.rows, first.duplicates, second.rows, second.duplicates) == (12, 0, 0, 12)


def test_a_large_answer_is_not_written_as_json(gateway, rows_bank, make_rows):
    rows_bank.write(make_rows(40))
    raw = base64.b64encode(make_rows(40).hidden.contiguous().view(torch.uint8).numpy().tobytes()).decode()
    asked = {"hidden": {"dtype": "bfloat16", "shape": [40, 2, 24], "base64": raw}, "k": 4096}
    url = f"{gateway}/v1/banks/{rows_bank.name}/read"
    told = httpx.post(url, json=asked)
    assert told.status_code == 413
    assert "Accept: application/msgpack" in told.json()["error"]["message"]
    found = wire.unpack(httpx.post(url, json=asked, headers={"Accept": "application/msgpack"}).content)
    assert found.tokens_Qk.shape == (40, 4096)
    assert len(httpx.post(url, json=asked | {"k": 1600}).json()["neighbours"]) == 40


def test_people_write_and_read_in_json(gateway, rows_bank, make_rows):
    trace = make_rows(9)
    url = f"{gateway}/v1/banks/{rows_bank.name}"
    lists = {"stream": "s", "run": "r", "tokens": trace.tokens.tolist(), "hidden": trace.hidden.float().tolist()}
    assert httpx.post(f"{url}/write", json=lists).json()["rows"] == 9

    raw = base64.b64encode(trace.hidden[4:5].contiguous().view(torch.uint8).numpy().tobytes()).decode()
    packed = {"dtype": "bfloat16", "shape": [1, 2, 24], "base64": raw}
    answer = httpx.post(f"{url}/read", json={"hidden": packed, "k": 2, "start": 4}).json()
    best = answer["neighbours"][0][0]
    assert (best["stream"], best["run"], best["seq"], best["pos"]) == ("s", "r", 4, 4)
    assert best["token"] == int(trace.tokens[5])
    assert answer["relevance"] == [1.0]


def test_lists_and_tensors_write_the_same_bank(gateway, store, gateway_spec, bank_name, make_rows):
    trace = make_rows(9)
    one, other = (store.create(f"{bank_name}{number}", gateway_spec) for number in (1, 2))
    one.write(trace)
    body = {
        **{"stream": trace.stream, "run": trace.run, "time": trace.time, "tokens": trace.tokens.tolist()},
        "hidden": trace.hidden.float().tolist(),
    }
    httpx.post(f"{gateway}/v1/banks/{other.name}/write", json=body).raise_for_status()
    assert one.digest() == other.digest()


@pytest.mark.parametrize("way", ["json", "msgpack", "arrow"])
def test_rows_of_another_layer_are_refused_however_they_come(gateway, rows_bank, make_rows, tiny, way):
    made = tiny.fingerprint.model_copy(update={"layers": (1, 5)})
    trace = replace(make_rows(4), fingerprint=made)
    body = {"stream": "s", "run": "r", "tokens": trace.tokens.tolist(), "hidden": trace.hidden.float().tolist()}
    sent = {
        "json": lambda: httpx.post(f"{url}/write", json=body | {"fingerprint": made.model_dump(mode="json")}),
        "msgpack": lambda: httpx.post(f"{url}/write", content=wire.pack(trace), headers=_of("msgpack")),
        "arrow": lambda: httpx.post(
            f"{url}/write", content=wire.traces_to_arrow([trace]), headers=_of("vnd.apache.arrow.stream")
        ),
    }
    url = f"{gateway}/v1/banks/{rows_bank.name}"
    answer = sent[way]()
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "fingerprint_mismatch")
    assert "layers: bank has (3, 5), got (1, 5)" in answer.json()["error"]["message"]
    assert rows_bank.info().rows == 0
    rows_bank.write(replace(trace, fingerprint=tiny.fingerprint))
    assert rows_bank.info().rows == 4


def test_states_of_another_model_are_refused_where_they_say_so(gateway, rows_bank, make_rows, tiny):
    url, body = f"{gateway}/v1/banks/{rows_bank.name}/read", {"hidden": make_rows(2).hidden.float().tolist()}
    for other, status in (({}, 200), ({"content": "another"}, 409), ({"layers": [5, 3]}, 409)):
        made = tiny.fingerprint.model_dump(mode="json") | other
        assert httpx.post(url, json=body | {"fingerprint": made}).status_code == status


def _of(kind: str) -> dict[str, str]:
    return {"Content-Type": f"application/{kind}"}


def test_an_undurable_write_arrives(rows_bank, make_rows):
    assert not rows_bank.write(make_rows(4), durable=False).durable
    assert rows_bank.detach().rows == 4


@pytest.mark.parametrize("rows", [0, 1])
def test_empty_and_one_row_writes_are_fine(bank, make_rows, rows):
    assert bank.write(make_rows(rows)).rows == rows


def test_a_query_of_no_states_is_answered(gateway, rows_bank):
    answer = httpx.post(f"{gateway}/v1/banks/{rows_bank.name}/read", json={"hidden": []})
    assert answer.json() == {"relevance": [], "values": [], "neighbours": [], "partial": False, "missing": []}


def test_a_calibration_comes_back_as_it_went(store):
    found = store.calibration("content", (3, 5))
    assert isinstance(found, Calibration)
    assert store.put_calibration(found) == found.hash
    with pytest.raises(CalibrationNotFound, match="raymem calibrate"):
        store.calibration("another", (3,))


def test_the_gateway_says_how_it_is(gateway, rows_bank, make_rows):
    rows_bank.write(make_rows(6))
    assert httpx.get(f"{gateway}/healthz").json()["service"] == "raymem"
    assert httpx.get(f"{gateway}/readyz").json()["status"] == "ready"
    assert httpx.get(f"{gateway}/v1/nodes").json() == {"nodes": ["local"]}
    assert httpx.get(f"{gateway}/v1/stats").json()["shards"][0]["banks"][rows_bank.name]["rows"] == 6
    page = httpx.get(f"{gateway}/metrics").text
    assert f'raymem_bank_rows{{bank="{rows_bank.name}",shard="0"}} 6.0' in page
    assert 'raymem_requests_total{method="POST",route="/v1/banks/{namespace}/{bank}/write",status="200"}' in page


def test_errors_arrive_as_the_classes_that_they_were(store, rows_bank, gateway_spec, make_rows):
    rows_bank.write(make_rows(5))
    with pytest.raises(BankExists, match=rows_bank.name):
        store.create(rows_bank.name, gateway_spec)
    with pytest.raises(SequenceConflict):
        rows_bank.write(make_rows(5, seed=1))
    with pytest.raises(BankNotFound, match="lab/nobody"):
        store.bank("lab/nobody").info()
    with pytest.raises(InvalidSpec, match="spolm"):
        store.create("lab/new", gateway_spec.model_copy(update={"kind": "spolm"}))
    with pytest.raises(InvalidTrace, match="float32"):
        rows_bank.write(Trace(make_rows(2).hidden.float(), make_rows(2).tokens, "s", "x"))
    with pytest.raises(InvalidInput, match="node"):
        rows_bank.migrate("mars")
    assert rows_bank.info().rows == 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_refused_and_changes_nothing(rows_bank, make_rows, bad):
    rows_bank.write(make_rows(4))
    before, trace = rows_bank.digest(), make_rows(4, seq=4)
    trace.hidden[2, 1, 7] = bad
    with pytest.raises(NonFinite, match="row 2"):
        rows_bank.write(trace)
    assert rows_bank.digest() == before


def test_a_damaged_upload_creates_nothing(store, rows_bank, make_rows, tmp_path):
    rows_bank.write(make_rows(30))
    rows_bank.export(tmp_path / "whole.raymem")
    whole = (tmp_path / "whole.raymem").read_bytes()
    (tmp_path / "cut.raymem").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Corrupt):
        store.import_(tmp_path / "cut.raymem", "lab/cut")
    with pytest.raises(BankNotFound):
        store.bank("lab/cut").info()


def test_an_export_that_fails_leaves_the_old_file_and_no_scraps(store, tmp_path):
    file = tmp_path / "bank.raymem"
    file.write_text("older")
    with pytest.raises(BankNotFound):
        store.bank("lab/nobody").export(file)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("bank.raymem", "older")]


async def test_an_upload_onto_a_full_disk_says_so():
    from raymem.serving.routes.banks import _receive

    async def chunks():
        yield b"x" * 100

    with pytest.raises(StorageError, match="No space left"):
        await _receive(chunks(), Path("/dev/full"))


def test_files_that_cannot_be_opened_are_named(store, rows_bank):
    missing = Path("no") / "such" / "folder.raymem"
    with pytest.raises(InvalidInput, match=r"folder\.raymem"):
        rows_bank.export(missing)
    with pytest.raises(InvalidInput, match=r"folder\.raymem"):
        store.import_(missing, "lab/other")


def test_key_functions_and_options_survive_the_way(store, gateway_spec, bank_name):
    spec = gateway_spec.model_copy(
        update={"key": KeySpec(function="window", layers=(3, 5), window=6), "options": {"n_short": 5}}
    )
    assert (
        store.create(bank_name, spec).info().spec.model_copy(update={"fingerprint": gateway_spec.fingerprint}) == spec
    )


async def test_slow_requests_of_one_caller_take_turns(tmp_path, monkeypatch):
    from raymem.client.store import AsyncBank, AsyncStore
    from raymem.config import Settings
    from raymem.serving.app import create_app

    running = most = 0

    async def tokens(*_args):
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(20):
            await asyncio.sleep(0)
        running -= 1
        return torch.tensor([1, 2])

    store = await AsyncStore.connect(tmp_path / "memory")
    monkeypatch.setattr(AsyncBank, "tokens", tokens)
    app = create_app(store, Settings(gateway={"api_keys": ("a", "b")}))
    app.state.store = store
    url = "http://gateway/v1/banks/lab/x/tokens?stream=s&run=r&seq_from=0&seq_to=2"
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
        for keys, at_once in (("a", 2), ("ab", 4)):
            most = 0
            asked = [client.get(url, headers={"Authorization": f"Bearer {key}"}) for key in keys for _ in range(10)]
            assert {(await answer).text for answer in asyncio.as_completed(asked)} == {'{"tokens":[1,2]}'}
            assert most == at_once
    await store.close()
