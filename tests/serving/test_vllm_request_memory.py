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
    TooLarge,
    Unauthorized,
    Unsupported,
)
from raymem.serving.vllm import raymem_params
from raymem.serving.vllm.attach import AttachedRows
from raymem.serving.vllm.memory_field import MemoryField
from raymem.serving.vllm.params import ConnectorConfig
from raymem.serving.vllm.request_memory import Prepared, RequestMemory


class Workers:
    """Two workers that attach what they are asked for, but for `lab/none`."""

    def __init__(self):
        self.banks = [{}, {}]
        self.calls = []
        # answers before a bank is loaded
        self.slow = 0

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
        if self.slow:
            self.slow -= 1
            return {"loading": True}
        if name == "lab/none":
            return {"refused": BankNotFound("no bank 'lab/none'").to_wire()}
        banks[name] = {"store": "/secret/path", "live": True, "rows": 5, "bytes": 10, "error": ""}
        return banks[name]


@pytest.fixture
def workers():
    return Workers()


class Rows:
    """An engine that keeps the rows of banks with so many rows."""

    def __init__(self):
        self.banks = {}
        self.attached = []

    async def attach(self, name):
        self.attached.append(name)
        await asyncio.sleep(0)
        return AttachedRows(self.banks.setdefault(name, 3), *[0] * (len(AttachedRows._fields) - 1))

    async def detach(self, name):
        return self.banks.pop(name, None) is not None


@pytest.fixture
def rows():
    return Rows()


@pytest.fixture
def make(workers, rows, file_store, tiny):
    def make(fingerprint=lambda: tiny.fingerprint, **settings):
        own = {f"{verb}_banks": ["lab/*"] for verb in ("write", "read", "attend")} | {"attach_on_use": True}
        config = ConnectorConfig.parse({"store": file_store.stats()["cold"], **own, **settings})
        return RequestMemory(config, workers, fingerprint, rows, ["adapter"])

    return make


async def told(memory, asked):
    return (await memory.prepare(asked)).told


def request(memory=None, **fields):
    defaults = {
        "model": "m",
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
    expected = {"write": {"bank": "lab/a", "stream": "s"}, "read": [{"bank": "lab/b", "rows": 5}]}
    assert await told(memory, asked) == expected
    own = raymem_params("lab/a", "s", ["lab/b"])["kv_transfer_params"]
    assert asked.kv_transfer_params == {"do_remote_decode": True, **own}
    # raw params are read the same way
    again = request(kv_transfer_params=json.loads(json.dumps(own)))
    assert await told(memory, again) == expected
    assert memory.requests == {"served": 2}
    await memory.close()


async def test_a_bank_is_attached_once_for_all_that_ask_at_the_same_time_and_not_again(make, workers):
    memory = make()
    asked = [request({"read": ["lab/b"]}) for _ in range(20)]
    # one worker is later than the other
    workers.slow = 3
    first = asyncio.create_task(memory.prepare(asked[0]))
    waiting = [asyncio.create_task(memory.prepare(each)) for each in asked[1:]]
    await asyncio.sleep(0)
    # a caller that leaves does not stop it
    first.cancel()
    await asyncio.gather(*waiting)
    assert workers.calls.count("attach_soon") == 3
    assert await told(memory, request({"read": ["lab/b"]})) == {"read": [{"bank": "lab/b", "rows": 5}]}
    assert workers.calls.count("attach_soon") == 3
    # one worker lost it
    workers.banks[1].clear()
    memory._workers = (float("-inf"), {})
    await memory.prepare(request({"read": ["lab/b"]}))
    assert workers.calls.count("attach_soon") == 4


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
        ({"attend": ["x/a"]}, Unauthorized, "attend_banks"),
        ({"attend": ["lab/none"]}, BankNotFound, "lab/none"),
        ({"attend": ["lab/a"], "rows": 0}, InvalidInput, "rows"),
        ({"rows": 64}, InvalidInput, r"memory\.rows is 64 without memory\.attend"),
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
    for asked in ({"write": "lab/a"}, {"attend": ["lab/b"]}):
        with pytest.raises(InvalidInput, match="'adapter' changes"):
            await make().prepare(request(asked, model="adapter"))


async def test_a_bank_that_may_not_be_attached_is_read_only_where_it_is(make, workers):
    memory = make(attach_on_use=False)
    with pytest.raises(NotFound, match="not attached to this engine"):
        await memory.prepare(request({"read": ["lab/b"]}))
    for verb in (memory.attach, memory.detach):
        with pytest.raises(Unauthorized, match="attach_on_use"):
            await verb("lab/b")
    await workers("attach_soon", "lab/b")
    memory._workers = (float("-inf"), {})
    assert await told(memory, request({"read": ["lab/b"]})) == {"read": [{"bank": "lab/b", "rows": 5}]}


async def test_attached_banks_are_bounded_in_bytes(make):
    memory = make(attached_bytes=20)
    assert await memory.attach("lab/a", "read") == {"live": True, "rows": 5, "bytes": 20, "behind": False}
    with pytest.raises(Overloaded, match="take 20 bytes, and attached_bytes is 20"):
        await memory.attach("lab/b")
    # one that is there already is brought up to date
    assert (await memory.attach("lab/a", "read"))["rows"] == 5
    assert await memory.detach("lab/a")
    await memory.attach("lab/b", "read")


async def test_a_bank_that_died_in_the_workers_is_told(make, workers):
    memory = make()
    await memory.attach("lab/a", "read")
    workers.banks[1]["lab/a"]["live"] = False
    with pytest.raises(BankDetached, match="was detached from its store"):
        await memory.prepare(request({"read": ["lab/a"]}))
    skipped = (await told(memory, asked := request({"read": ["lab/a"], "required": False})))["skipped"]
    assert (skipped[0]["use"], skipped[0]["code"]) == ("read", "bank_detached")
    assert asked.kv_transfer_params is None


async def test_what_callers_see_names_no_path_and_no_bank_that_they_may_not_touch(make, workers):
    memory = make()
    await memory.attach("lab/a", "read")
    await workers("attach_soon", "private/b")
    assert await memory.banks() == {"lab/a": {"live": True, "rows": 5, "bytes": 20, "behind": False}}
    stats = await memory.stats()
    assert stats["read"] == {"reads": 4, "missing": {"lab/x": 2}}
    assert stats["streamed"] == {"rows_seen": 2, "shed_by_code": {}}


async def test_a_store_that_is_down_refuses_or_lets_go_on_as_the_request_chose(make):
    memory = make(store="http://127.0.0.1:9")
    with pytest.raises(BackendUnavailable):
        await memory.prepare(request({"write": "lab/a"}))
    (skipped,) = (await told(memory, request({"write": "lab/a", "required": False})))["skipped"]
    assert (skipped["bank"], skipped["code"]) == ("lab/a", "backend_unavailable")


async def test_rows_are_attached_on_first_use_and_again_when_the_bank_has_grown(make, rows, file_store, tiny):
    bank = file_store.create("lab/rows", tiny.spec())
    bank.write(tiny.trace(4))
    rows.banks["lab/rows"] = 4
    memory = make()
    wish = {"attend": ["lab/rows"], "rows": 64, "refresh": 8}
    answers = await asyncio.gather(*(told(memory, request(wish)) for _ in range(5)))
    assert answers == [{"attend": {"banks": ["lab/rows"], "asked": 64}}] * 5
    assert rows.attached == ["lab/rows"]
    asked = request(wish)
    await memory.prepare(asked)
    own = raymem_params(attend=["lab/rows"], rows=64, refresh=8, required=True)
    assert {"kv_transfer_params": asked.kv_transfer_params} == own
    assert (await memory.banks())["lab/rows"] == {"attended_rows": 4}
    # the next request finds that it has more, and does not wait for them
    bank.write(tiny.trace(4, seq=4))
    rows.banks["lab/rows"] = 8
    memory._looked_up.clear()
    await memory.prepare(request(wish))
    await asyncio.gather(*memory._attaching.values())
    assert rows.attached == ["lab/rows"] * 2
    assert (await memory.banks())["lab/rows"] == {"attended_rows": 8}
    bank.detach()
    memory._looked_up.clear()
    with pytest.raises(BankDetached):
        await memory.prepare(request(wish))
    await memory.close()


async def test_a_bank_whose_rows_do_not_fit_is_not_computed_again_for_each_request(make, rows, file_store, tiny):
    file_store.create("lab/large", tiny.spec())
    memory, wish = make(), {"attend": ["lab/large"]}

    async def refuse(name):
        rows.attached.append(name)
        raise TooLarge("rows_bytes is 10")

    attach, rows.attach = rows.attach, refuse
    for _ in range(3):
        with pytest.raises(TooLarge, match="rows_bytes is 10"):
            await memory.prepare(request(wish))
    assert rows.attached == ["lab/large"]
    # another bank makes room
    rows.attach = attach
    await memory.detach("lab/other")
    assert (await told(memory, request(wish)))["attend"]["banks"] == ["lab/large"]
    await memory.close()


async def test_what_the_engine_says_at_the_end_is_told_and_a_refusal_raises_where_memory_is_required(make, rows):
    memory = make()
    prepared = Prepared({"attend": {"banks": ["lab/a"], "asked": 512}}, required=True)
    attended = {"banks": ["lab/a"], "rows": 96, "relevance": 0.5}
    assert memory.conclude(prepared, [{"raymem": {"attended": attended}}]) == {"attend": attended}
    assert memory.conclude(prepared, [{"other": 1}]) == prepared.told
    refused = [{"raymem": {"refused": "no rows of bank 'lab/a'", "code": "bank_not_found"}}]
    with pytest.raises(BankNotFound, match="no rows"):
        memory.conclude(prepared, refused)
    (skipped,) = memory.conclude(prepared._replace(required=False), refused)["skipped"]
    assert skipped["use"] == "attend"


async def test_one_use_of_a_bank_may_fail_while_another_serves(make, file_store, tiny):
    file_store.create("lab/half", tiny.spec()).detach()
    memory = make()
    asked = request({"write": "lab/half", "stream": "s", "read": ["lab/half"], "required": False})
    answer = await told(memory, asked)
    assert (answer["read"], answer["skipped"][0]["use"]) == ([{"bank": "lab/half", "rows": 5}], "write")
    assert asked.kv_transfer_params == raymem_params(read=["lab/half"])["kv_transfer_params"]
    await memory.close()


@pytest.mark.parametrize(
    ("params", "says"),
    [({"order": {}, "signature": ""}, "order"), ({"capture": "lab/a"}, "capture"), ("lab/a", "expected")],
)
async def test_what_only_the_engine_itself_may_ask_for_is_refused(make, params, says):
    with pytest.raises(InvalidInput, match=says):
        await make().prepare(request(kv_transfer_params={"raymem": params}))


def test_raw_params_are_the_same_wish():
    field = MemoryField(write="lab/a", stream="s", read=["lab/b"], attend=["lab/c"], rows=64, refresh=8)
    assert MemoryField.of_params(field.params()) == field
