"""What is decided before a request reaches the engine, without an engine."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from raymem.errors import (
    BackendUnavailable,
    BankDetached,
    BankNotFound,
    InvalidInput,
    NotFound,
    Overloaded,
    Unauthorized,
    Unsupported,
)
from raymem.serving.vllm import raymem_params
from raymem.serving.vllm.memory_field import MemoryField
from raymem.serving.vllm.params import ConnectorConfig
from raymem.serving.vllm.request_memory import RequestMemory


class Workers:
    """Two workers that attach what they are asked for, but for `lab/none`."""

    def __init__(self):
        self.banks = [{}, {}]
        self.calls = []

    async def __call__(self, method, *args):
        self.calls.append(method)
        await asyncio.sleep(0)
        return [self._one(banks, method, *args) for banks in self.banks]

    def _one(self, banks, method, name=None):
        if method == "memory_stats":
            read = {"reads": 2, "missing": {"lab/x": 1}}
            return {"streamed": {"rows_seen": 1, "shed_by_code": {}}, "read": read, "banks": dict(banks)}
        if method == "detach_bank":
            return banks.pop(name, None) is not None
        if name == "lab/none":
            return {"refused": BankNotFound("no bank 'lab/none'").to_wire()}
        banks[name] = {"store": "/secret/path", "live": True, "rows": 5, "bytes": 10, "error": ""}
        return banks[name]


@pytest.fixture
def workers():
    return Workers()


@pytest.fixture
def make(workers, file_store, tiny):
    def make(fingerprint=lambda: tiny.fingerprint, **settings):
        own = {"write_banks": ["lab/*"], "read_banks": ["lab/*"], "attach_on_use": True}
        config = ConnectorConfig.parse({"store": file_store.stats()["cold"], **own, **settings})
        return RequestMemory(config, workers, fingerprint)

    return make


def request(memory=None, **fields):
    defaults = {
        "kv_transfer_params": None,
        "vllm_xargs": None,
        "model_extra": {} if memory is None else {"memory": memory},
    }
    return SimpleNamespace(**defaults | fields)


async def test_a_request_that_asks_for_nothing_is_not_touched(make, workers):
    for asked in (request(), request(kv_transfer_params={"do_remote_decode": True}), request(model_extra=None)):
        before = dict(vars(asked))
        assert await make().prepare(asked) is None
        assert vars(asked) == before
    assert workers.calls == []


async def test_what_is_asked_becomes_what_the_engine_reads_beside_other_connectors_params(make, file_store, tiny):
    file_store.create("lab/a", tiny.spec())
    asked = request({"write": "lab/a", "stream": "s", "read": ["lab/b"]}, kv_transfer_params={"do_remote_decode": True})
    memory = make()
    told = await memory.prepare(asked)
    assert told == {"write": {"bank": "lab/a", "stream": "s"}, "read": [{"bank": "lab/b", "rows": 5}]}
    own = raymem_params("lab/a", "s", ["lab/b"])["kv_transfer_params"]
    assert asked.kv_transfer_params == {"do_remote_decode": True, **own}
    # raw params are read the same way
    again = request(kv_transfer_params=json.loads(json.dumps(own)))
    assert await memory.prepare(again) == told
    assert memory.requests == {"served": 2}
    await memory.close()


async def test_a_bank_is_attached_once_for_all_that_ask_at_the_same_time_and_not_again(make, workers):
    memory = make()
    asked = [request({"read": ["lab/b"]}) for _ in range(20)]
    first = asyncio.create_task(memory.prepare(asked[0]))
    waiting = [asyncio.create_task(memory.prepare(each)) for each in asked[1:]]
    await asyncio.sleep(0)
    # a caller that leaves does not stop it
    first.cancel()
    await asyncio.gather(*waiting)
    assert workers.calls.count("attach_told") == 1
    assert await memory.prepare(request({"read": ["lab/b"]})) == {"read": [{"bank": "lab/b", "rows": 5}]}
    assert workers.calls.count("attach_told") == 1
    # one worker lost it
    workers.banks[1].clear()
    memory._workers = (float("-inf"), {})
    await memory.prepare(request({"read": ["lab/b"]}))
    assert workers.calls.count("attach_told") == 2


@pytest.mark.parametrize(
    ("memory", "error", "says"),
    [
        ({"read": ["lab/none"]}, BankNotFound, "lab/none"),
        ({"write": "lab/none"}, BankNotFound, "lab/none"),
        ({"read": ["x/a"]}, Unauthorized, "read_banks"),
        ({"write": "x/a"}, Unauthorized, "write_banks"),
        ({"read": ["lab/a"] * 2 + [f"lab/{i}" for i in range(9)]}, InvalidInput, "8 at most"),
        ({"read": [3]}, InvalidInput, r"memory\.read\.0 is 3"),
        ({"read": ("lab/a",)}, InvalidInput, r"memory\.read is"),
        ({"required": "no"}, InvalidInput, r"memory\.required is 'no'"),
        ({"write": "x" * 10**6}, InvalidInput, "namespace/name"),
        ({"y" * 10**6: 1}, InvalidInput, "memory has the keys write, stream"),
        ([], InvalidInput, r"memory is \[\]"),
    ],
)
async def test_a_wish_that_cannot_be_met_raises_with_the_value_in_short_and_is_counted(make, memory, error, says):
    prepared = make()
    with pytest.raises(error, match=says) as refused:
        await prepared.prepare(request(memory))
    assert len(str(refused.value)) < 500
    assert prepared.requests == {"refused": 1, f"refused_{refused.value.code}": 1}


async def test_an_engine_without_hidden_states_and_a_request_without_tokens_are_refused(make):
    for asked in ({"write": "lab/a"}, {"read": ["lab/b"]}):
        with pytest.raises(Unsupported, match="extracts none"):
            await make(None).prepare(request(asked))
    with pytest.raises(InvalidInput, match="embeddings"):
        await make().prepare(request({"write": "lab/a"}, prompt_embeds=b"x"))


async def test_a_bank_that_may_not_be_attached_is_read_only_where_it_is(make, workers):
    memory = make(attach_on_use=False)
    with pytest.raises(NotFound, match="not attached to this engine"):
        await memory.prepare(request({"read": ["lab/b"]}))
    for verb in (memory.attach, memory.detach):
        with pytest.raises(Unauthorized, match="attach_on_use"):
            await verb("lab/b")
    await workers("attach_told", "lab/b")
    memory._workers = (float("-inf"), {})
    assert await memory.prepare(request({"read": ["lab/b"]})) == {"read": [{"bank": "lab/b", "rows": 5}]}


async def test_attached_banks_are_bounded_in_bytes(make):
    memory = make(attached_bytes=20)
    await memory.attach("lab/a")
    with pytest.raises(Overloaded, match="take 20 bytes, and attached_bytes is 20"):
        await memory.attach("lab/b")
    # one that is there already is brought up to date
    assert (await memory.attach("lab/a"))["rows"] == 5
    assert await memory.detach("lab/a")
    await memory.attach("lab/b")


async def test_a_bank_that_died_in_the_workers_is_told(make, workers):
    memory = make()
    await memory.attach("lab/a")
    workers.banks[1]["lab/a"]["live"] = False
    with pytest.raises(BankDetached, match="was detached from its store"):
        await memory.prepare(request({"read": ["lab/a"]}))
    told = await memory.prepare(asked := request({"read": ["lab/a"], "required": False}))
    assert told["skipped"][0]["code"] == "bank_detached"
    assert asked.kv_transfer_params is None


async def test_what_callers_see_names_no_path_and_no_bank_that_they_may_not_touch(make, workers):
    memory = make()
    await memory.attach("lab/a")
    await workers("attach_told", "private/b")
    assert await memory.banks() == {"lab/a": {"live": True, "rows": 5, "bytes": 20, "behind": False}}
    stats = await memory.stats()
    assert stats["read"] == {"reads": 4, "missing": {"lab/x": 2}}
    assert stats["streamed"] == {"rows_seen": 2, "shed_by_code": {}}


async def test_a_store_that_is_down_refuses_or_lets_go_on_as_the_request_chose(make):
    memory = make(store="http://127.0.0.1:9")
    with pytest.raises(BackendUnavailable):
        await memory.prepare(request({"write": "lab/a"}))
    told = await memory.prepare(request({"write": "lab/a", "required": False}))
    assert told["skipped"][0] | {"message": ""} == {"bank": "lab/a", "code": "backend_unavailable", "message": ""}


def test_a_wish_without_some_banks_keeps_the_rest():
    field = MemoryField(write="lab/a", stream="s", read=["lab/a", "lab/b"])
    assert field.without(frozenset(["lab/a"])) == MemoryField(read=["lab/b"])
    assert field.without(frozenset()) == field
