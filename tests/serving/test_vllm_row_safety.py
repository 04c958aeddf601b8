"""What must not happen to attended rows: be probed, come back, pile up, be forged."""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from row_parts import HEADS, LAYERS, SECRET, WIDTH, Cache, Scheduler, asks

from raymem.errors import TooLarge, Unavailable, Unsupported
from raymem.lm.attending import Rope
from raymem.serving.vllm import connector, reader, rebuild, vllm_internals
from raymem.serving.vllm.attach import _requests, _said
from raymem.serving.vllm.connector import LostChunks, RaymemConnector
from raymem.serving.vllm.endpoint import _refusing
from raymem.serving.vllm.orders import Order
from raymem.serving.vllm.row_store import Load, RowStore
from raymem.serving.vllm.row_watch import RowWatch


@pytest.fixture
def scheduler():
    made = Scheduler()
    made.attach("lab/a", range(20), range(100, 120))
    made.attach("lab/b", range(20), range(200, 220))
    return made


def test_rows_that_an_order_replaces_count_for_nothing_beside_it():
    scheduler = Scheduler(budget=100)
    scheduler.attach("lab/a", range(9), range(9))
    done, said = scheduler.attach("lab/a", range(8), range(8))
    assert (said, done.dropped) == ({"captured": 8}, [1])
    done, said = scheduler.attach("lab/a", range(10), range(10), generation=1)
    assert (said, done.dropped) == ({"captured": 10}, [2])
    assert scheduler.attach("lab/a", range(11), range(11), generation=2)[1]["code"] == "too_large"
    assert scheduler.admit(range(5), asks("lab/a", rows=20))[1] == 10


def test_no_other_request_finds_what_passes_leave_in_the_prefix_cache():
    order = Order(do="capture", bank="lab/a").signed([1], SECRET)
    prompts, _ = _requests({"requests": [([1], order), ([1], order)]})
    salts = {prompt["cache_salt"] for prompt in prompts}
    assert len(salts) == 2
    assert all(len(salt) == 32 for salt in salts)


def test_salts_say_nothing_of_the_secret(scheduler):
    request, _ = scheduler.admit(range(10), asks("lab/a", rows=8))
    assert SECRET not in request.cache_salt


def test_rows_that_are_erased_while_they_are_computed_are_not_kept():
    scheduler = Scheduler()
    order = Order(do="capture", bank="lab/a", pos=[(0, 8)], at=[(0, 8)])
    request, _ = scheduler.admit(range(8), {"kv_transfer_params": order.signed(range(8), SECRET)})
    new = SimpleNamespace(req_id=request.request_id, block_ids=(scheduler.begin(request),), num_computed_tokens=0)
    none = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
    counts = {request.request_id: 4}
    step = SimpleNamespace(scheduled_new_reqs=[new], scheduled_cached_reqs=none, num_scheduled_tokens=counts)
    assert len(scheduler.attender.step(step).captures) == 1
    scheduler.index.erased("lab/a", "", 1, torch.tensor([2]))
    rest = SimpleNamespace(
        req_ids=[request.request_id], new_block_ids=[None], num_computed_tokens=[4], resumed_req_ids=set()
    )
    step = SimpleNamespace(scheduled_new_reqs=[], scheduled_cached_reqs=rest, num_scheduled_tokens=counts)
    done = scheduler.attender.step(step)
    assert (done.captures, done.dropped) == ([], [1])
    with pytest.raises(Unavailable, match="changed while they were computed"):
        _said(scheduler.attender.finish(request))


def test_workers_sign_with_a_key_that_the_engine_hands_over_when_it_starts(scheduler, monkeypatch):
    first, second, front = (object.__new__(RaymemConnector) for _ in range(3))
    first.secret, second.secret, front.secret = "first", "second", "own"
    front._attender = scheduler.attender
    monkeypatch.setattr(connector, "has_kv_transfer_group", lambda: True)
    keys = {}
    for place, worker in ((1, second), (0, first)):
        monkeypatch.setattr(connector, "get_kv_transfer_group", lambda worker=worker: worker)
        keys[0, place] = worker.get_handshake_metadata()
    # one among several connectors
    assert front.get_handshake_metadata() is None
    assert "first" not in repr(keys)
    front.set_xfer_handshake_metadata_pp_aware({(0, 0): object()})
    assert scheduler.attender.secret == SECRET
    front.set_xfer_handshake_metadata_pp_aware(keys)
    for secret, there in ((SECRET, True), ("second", True), ("first", False)):
        order = Order(do="release", bank="lab/a").signed([0], secret)
        scheduler.admit([0], {"kv_transfer_params": order})
        assert ("lab/a" in scheduler.index.followed()) is there


def test_addresses_that_check_no_wish_refuse_one_however_it_is_given():
    async def plain(_request, _raw=None):
        return "answer"

    create = _refusing(plain, None)
    asked = {"raymem": {"attend": ["lab/a"]}}
    for fields in (
        {"model_extra": {"kv_transfer_params": asked}},
        {"model_extra": {}, "kv_transfer_params": asked},
        {"model_extra": {"memory": {}}},
    ):
        assert asyncio.run(create(SimpleNamespace(**fields))).error.type == "invalid_input"
    other = SimpleNamespace(model_extra={}, kv_transfer_params={"do_remote_decode": True})
    assert asyncio.run(create(other)) == "answer"


def test_what_has_ended_leaves_nothing_behind(scheduler):
    aborted, _ = scheduler.admit(range(10), asks("lab/a", rows=8, refresh=4))
    scheduler.begin(aborted)
    scheduler.step(aborted)
    waiting, _ = scheduler.admit(range(10), asks("lab/b", rows=8))
    order = Order(do="capture", bank="lab/c", pos=[(0, 8)], at=[(0, 8)])
    passing, _ = scheduler.admit(range(8), {"kv_transfer_params": order.signed(range(8), SECRET)})
    refused, _ = scheduler.admit(range(8), asks("lab/nowhere"))
    for request in (aborted, waiting, passing, refused):
        scheduler.attender.finish(request)
    scheduler.step()
    attender = scheduler.attender
    assert [attender._attended, attender._captured, attender._answers, attender._begun] == [{}] * 4
    assert not attender._loads


class Catalog:
    """Says of banks what a test has it say."""

    def __init__(self, **said):
        self.said = said

    def get(self, name):
        return self.said[name.replace("/", "_")]()


def test_the_watch_goes_on_whatever_one_bank_does(scheduler):
    scheduler.attach("lab/c", range(4), range(4))

    def gone():
        raise OSError("disk")

    def detached_meanwhile():
        scheduler.index.release("lab/b")
        return SimpleNamespace(id="", state="hot", generation=3)

    def attached_anew_meanwhile():
        scheduler.attach("lab/c", range(5), range(5), id="new")
        return SimpleNamespace(id="old", state="cold", generation=3)

    watch = RowWatch(scheduler.index, 60)
    catalog = Catalog(lab_a=gone, lab_b=detached_meanwhile, lab_c=attached_anew_meanwhile)
    none = SimpleNamespace(ranges_R2=torch.zeros(0, 2, dtype=torch.int64))
    journal = SimpleNamespace(tombstones=lambda: none)
    watch._stores[""] = SimpleNamespace(catalog=catalog, journal=lambda _entry: journal)
    watch.look()
    assert set(scheduler.index.followed()) == {"lab/a", "lab/c"}
    assert scheduler.admit(range(5), asks("lab/c", rows=20))[1] == 5


def test_rows_to_replace_prepare_the_worker_and_refuse_as_those_to_rebuild(monkeypatch):
    def refuse(*_):
        raise Unsupported("windows")

    prepared = []
    monkeypatch.setattr(reader, "_connector", lambda alone: SimpleNamespace(rows_before={}))
    monkeypatch.setattr(vllm_internals, "score_prompts_alone", lambda runner, before: prepared.append(runner))
    monkeypatch.setattr(rebuild, "replacement", refuse)
    worker = SimpleNamespace(model_runner="runner")
    plan = reader.MemoryReader.rows_to_replace(worker, "lab/a", None, {})
    assert prepared == ["runner"]
    with pytest.raises(Unsupported, match="windows"):
        _requests(plan)


def test_rows_that_wait_for_their_orders_are_bounded_counted_and_forgotten():
    keys_LNHd, values_LNHd = torch.randn(2, LAYERS, 3, HEADS, WIDTH)
    size = keys_LNHd.nbytes + values_LNHd.nbytes
    store = RowStore(Cache(), Rope(torch.zeros(LAYERS, 2)), 2 * size)
    for bank, name in (("lab/a", "s"), ("lab/a", "s"), ("lab/b", "t")):
        store.stage(bank, name, keys_LNHd, values_LNHd)
    assert store.stats()["staged_bytes"] == 2 * size
    with pytest.raises(TooLarge, match=f"the {2 * size} that wait.*rows_bytes is {2 * size}"):
        store.stage("lab/c", "u", keys_LNHd, values_LNHd)
    store.unstage("lab/a")
    assert store.stats()["staged_bytes"] == size
    store.stage("lab/c", "u", keys_LNHd, values_LNHd)
    # the order that finds nothing: its chunk is reported, and no chunk of zeros stays
    store.begin([], [], [], [Load("lab/a", [(0, 3)], 4, "s"), Load("lab/b", [(0, 3)], 5, "t")])
    assert (store.take_lost(), store.take_lost(), list(store._chunks)) == ([4], [], [5])
    assert store.stats()["staged_bytes"] == size


def test_rows_that_a_pass_did_not_show_are_lost_and_attended_no_longer():
    scheduler = Scheduler()
    done, _ = scheduler.attach("lab/a", range(8), range(8))
    store = RowStore(Cache(), Rope(torch.zeros(LAYERS, 2)), 10**6)
    store._cache.seen = lambda: None
    store.begin(done.captures, [], [])
    store.end()
    assert (store._chunks, store.stats()["chunks_lost"]) == ({}, 1)
    assert scheduler.admit(range(5), asks("lab/a", rows=8))[1] == 8
    found = LostChunks([7]).aggregate(LostChunks(store.take_lost()))
    assert found == LostChunks([1, 7])
    scheduler.attender.lose(found.chunks)
    assert scheduler.admit(range(5), asks("lab/a", rows=8))[1] == 0


def test_stored_rows_for_which_there_is_no_room_are_computed():
    rows = torch.zeros(LAYERS, 2, HEADS, WIDTH)
    store = RowStore(Cache(), Rope(torch.zeros(LAYERS, 2)), 2 * rows.nbytes)
    worker, found = SimpleNamespace(row_store=lambda: store), {"keys": rows, "values": rows}
    order = Order(do="capture", bank="lab/a", pos=[(0, 2)])
    assert rebuild._staged(worker, order, [1, 2], found).do == "load"
    assert rebuild._staged(worker, order.model_copy(update={"pos": [(2, 4)]}), [1, 2], found) is None
