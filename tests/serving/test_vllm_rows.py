"""Rows before prompts without an engine: vLLM's requests, a scheduler of a few lines, a cache that is a dictionary."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import raymem
from raymem.errors import BankDetached, BankNotFound, FingerprintMismatch, TooLarge, Unavailable, Unsupported
from raymem.lm.attending import Rope
from raymem.serving.vllm import reader, rebuild, vllm_internals
from raymem.serving.vllm.attach import _requests, _said, rows_kept
from raymem.serving.vllm.attend import Attender
from raymem.serving.vllm.connector import LostChunks
from raymem.serving.vllm.orders import Order, ranges
from raymem.serving.vllm.params import ConnectorConfig, raymem_params
from raymem.serving.vllm.rebuild import kept_parts, plan, replacement
from raymem.serving.vllm.row_index import RowIndex
from raymem.serving.vllm.row_store import Capture, Fill, Load, RowStore
from raymem.serving.vllm.row_watch import RowWatch
from raymem.serving.vllm.vllm_internals import AttentionGroup
from raymem.tensors import dtype_name, to_bytes

BLOCK, LONGEST, SECRET = 4, 64, "engine"
LAYERS, HEADS, WIDTH = 2, 1, 4


class Scheduler:
    """Admits requests, gives them blocks, and says what was scheduled."""

    def __init__(self, budget=10**6, refusal=None, scores=True, floor=0.0):
        self.index = RowIndex(budget, 10, floor=floor, ignored={0})
        config = ConnectorConfig(store="x", attend_banks=("lab/*",))
        group = refusal or AttentionGroup(0, BLOCK, 10, ())
        self.attender = Attender(
            config, self.index, group, longest=LONGEST, secret=SECRET, scores=scores, follow=lambda: None
        )
        self.blocks = 0
        self.requests = 0

    def request(self, tokens, params=None, **fields):
        from vllm import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.request import Request

        init_none_hash(sha256)
        self.requests += 1
        hasher = get_request_block_hasher(BLOCK, sha256)
        sampling = SamplingParams(**{"max_tokens": 6} | fields, extra_args=params)
        return Request(f"r{self.requests}", list(tokens), sampling, None, block_hasher=hasher)

    def admit(self, tokens, params=None, **fields):
        request = self.request(tokens, params, **fields)
        return request, self.attender.admit(request)

    def begin(self, request, hit=0):
        """Give a request its blocks, as many as its tokens take, after so many that the prefix cache had."""
        claimed = self.attender.claimed(request, hit)
        count = -(-request.num_tokens // BLOCK)
        table = list(range(self.blocks, self.blocks + count))
        self.blocks += count
        self.attender.allocated(request, (table,), claimed or 0)
        return table

    def step(self, *running, new=()):
        """One step: `new` are requests with their tables, `running` those that decode a token."""
        fresh = [SimpleNamespace(req_id=r.request_id, block_ids=(table,), num_computed_tokens=0) for r, table in new]
        cached = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
        counts = {r.request_id: r.num_tokens for r, _ in new} | {r.request_id: 1 for r in running}
        return self.attender.step(
            SimpleNamespace(scheduled_new_reqs=fresh, scheduled_cached_reqs=cached, num_scheduled_tokens=counts)
        )

    def attach(self, bank, pos, tokens, *, at=None, **fields):
        """Carry out an order to keep rows; return the step that computes them."""
        at = range(len(tokens)) if at is None else at
        order = Order(do="capture", bank=bank, pos=ranges(pos), at=ranges(at), **{"kind": "spalm"} | fields)
        request, _ = self.admit(tokens, {"kv_transfer_params": order.signed(tokens, SECRET)})
        done = self.step(new=[(request, self.begin(request))])
        return done, self.attender.finish(request)["raymem"]


def asks(*banks, **options):
    return raymem_params(attend=banks, **options)


@pytest.fixture
def scheduler():
    made = Scheduler()
    made.attach("lab/a", range(20), range(100, 120))
    made.attach("lab/b", range(20), range(200, 220))
    return made


def test_a_capture_lists_the_slots_of_the_rows_to_keep():
    done, said = Scheduler().attach("lab/a", [5, 6, 9], range(8), at=[2, 3, 7])
    assert said == {"captured": 3}
    assert done.captures == [Capture("", [(5, 7), (9, 10)], 1, 3, 0, [2, 3, 7], [2, 3, 7])]


def test_rows_stand_before_the_prompt_and_their_slots_are_filled(scheduler):
    request, before = scheduler.admit(range(10), asks("lab/a", rows=8))
    assert before == 8
    assert request.num_tokens == request.num_prompt_tokens == len(request.prompt_token_ids) == 18
    assert list(request.all_token_ids[8:]) == list(range(10))
    assert list(request.all_token_ids[:4]) == [100, 101, 102, 103]
    table = scheduler.begin(request)
    done = scheduler.step(request)
    (fill,) = done.fills
    assert (fill.first, fill.slots) == (0, [table[at // BLOCK] * BLOCK + at % BLOCK for at in range(8)])
    assert fill.chunks == [1] * 8
    assert fill.offsets[:4] == [0, 1, 2, 3]
    assert done.begun == {request.request_id: 8}
    assert scheduler.step(request).fills == []
    assert scheduler.attender.finish(request)["raymem"]["attended"]["rows"] == 8


def test_what_the_prefix_cache_had_is_not_filled_again(scheduler):
    request, _ = scheduler.admit(range(10), asks("lab/a", rows=8))
    scheduler.begin(request, hit=4)
    (fill,) = scheduler.step(request).fills
    assert (fill.first, len(fill.slots), len(fill.offsets)) == (4, 4, 4)
    whole, _ = scheduler.admit(range(10), asks("lab/a", rows=8))
    scheduler.begin(whole, hit=12)
    assert scheduler.step(whole).fills == []


def test_hashes_are_shared_by_the_same_rows_alone(scheduler):
    prompt = range(12)
    hashes = {
        name: scheduler.admit(prompt, params)[0].block_hashes
        for name, params in {
            "a": asks("lab/a", rows=8),
            "again": asks("lab/a", rows=8),
            "b": asks("lab/b", rows=8),
            "fewer": asks("lab/a", rows=4),
            "private": asks("lab/a", rows=8, refresh=2),
            "plain": None,
        }.items()
    }
    assert hashes["a"] == hashes["again"]
    seen = [each for name, found in hashes.items() if name != "again" for each in found]
    assert len(seen) == len(set(seen))
    # the very tokens, sent as a prompt
    rows = scheduler.admit(prompt, asks("lab/a", rows=8))[0].prompt_token_ids
    assert not set(scheduler.admit(rows)[0].block_hashes) & set(hashes["a"])


def test_a_bank_shows_its_rows_in_the_manner_of_its_kind(scheduler):
    for kind in ("spalm", "compressive", "ntm"):
        scheduler.attach(f"lab/{kind}", range(96), range(500, 596), kind=kind)
    rows = {
        kind: scheduler.admit([540, 541], asks(f"lab/{kind}", rows=36))[0] for kind in ("spalm", "compressive", "ntm")
    }
    tokens = {kind: [token - 500 for token in request.all_token_ids[:36]] for kind, request in rows.items()}
    assert tokens["spalm"] == [*range(4), *range(32, 64)]
    assert tokens["compressive"] != tokens["spalm"]
    assert {40, 41} <= set(tokens["ntm"])
    other = {kind: scheduler.admit([570], asks(f"lab/{kind}", rows=36))[0] for kind in rows}
    # whatever is asked, so that all who attend share the same blocks
    assert other["compressive"].cache_salt == rows["compressive"].cache_salt
    assert other["spalm"].cache_salt != rows["spalm"].cache_salt


def test_several_banks_get_equal_shares_in_order(scheduler):
    request, before = scheduler.admit(range(5), asks("lab/b", "lab/a", rows=9))
    assert before == 9
    assert [token // 100 for token in request.all_token_ids[:9]] == [2] * 5 + [1] * 4


def test_a_bank_that_has_nothing_to_do_with_the_question_is_not_attended():
    scheduler = Scheduler(floor=0.4)
    scheduler.attach("lab/a", range(64), range(100, 164))
    scheduler.attach("lab/b", range(64), range(200, 264))
    # the mark of a template counts for nothing
    about_a = [0, 0, 0, 0, 0, 110, 111, 112, 113, 7]
    request, before = scheduler.admit(about_a, asks("lab/b", "lab/a", rows=8))
    assert (before, {token // 100 for token in request.all_token_ids[:8]}) == (8, {1})
    assert scheduler.attender.finish(request)["raymem"]["attended"]["relevance"] > 0.4
    request, before = scheduler.admit([7, 8, 9, 110], asks("lab/b", "lab/a", rows=8))
    assert (before, request.num_tokens) == (0, 4)
    assert scheduler.attender.finish(request)["raymem"]["attended"]["rows"] == 0


def test_rows_are_chosen_anew_and_blocks_that_are_not_here_wait(scheduler):
    scheduler.attach("lab/long", range(96), range(500, 596))
    request, _ = scheduler.admit([540, 541], asks("lab/long", rows=36, refresh=3))
    scheduler.begin(request)
    (first,) = scheduler.step(request).fills
    request.append_output_token_ids([570, 571])
    assert scheduler.step(request).fills == []
    request.append_output_token_ids([572, 573, 574])
    # not scheduled: it may have been preempted
    assert scheduler.step().fills == []
    (second,) = scheduler.step(request).fills
    assert (first.offsets, second.offsets) == ([*range(4), *range(32, 64)], [*range(4), *range(64, 96)])
    assert (second.first, second.slots) == (0, first.slots)
    assert scheduler.attender.counters.choices_renewed == 1
    # what was asked for last time is still right
    request.append_output_token_ids([575, 576, 577])
    assert scheduler.step(request).fills == []


def test_a_preempted_private_request_gets_another_salt(scheduler):
    request, _ = scheduler.admit(range(10), asks("lab/a", rows=8, refresh=4))
    scheduler.begin(request)
    scheduler.step(request)
    salt = request.cache_salt
    request.num_preemptions += 1
    assert scheduler.attender.claimed(request, 8) is None
    assert request.cache_salt != salt
    table = scheduler.begin(request)
    (fill,) = scheduler.step(request).fills
    assert fill.slots[0] == table[0] * BLOCK


def test_erased_rows_give_way_in_running_requests_and_in_those_that_wait(scheduler):
    scheduler.attach("lab/a", range(20, 40), range(120, 140))
    running, _ = scheduler.admit(range(10), asks("lab/a", rows=40))
    waiting, _ = scheduler.admit(range(10), asks("lab/a", rows=40))
    assert running.cache_salt == waiting.cache_salt
    table = scheduler.begin(running)
    scheduler.step(running)
    scheduler.index.erased("lab/a", "", 1, torch.tensor([3]))
    done = scheduler.step(running)
    assert done.dropped == [1]
    (fill,) = done.fills
    assert fill.first == 0
    assert fill.slots[0] == table[0] * BLOCK
    assert set(fill.chunks) == {3}
    assert waiting.cache_salt != running.cache_salt
    scheduler.index.release("lab/a")
    (fill,) = scheduler.step(running).fills
    assert set(fill.chunks) == {-1}


def test_a_detached_removed_or_unknown_bank_is_refused_and_costs_nothing(scheduler):
    scheduler.index.set_live("lab/a", "", live=False)
    for bank, error in (("lab/a", BankDetached), ("lab/c", BankNotFound)):
        request, before = scheduler.admit(range(10), asks(bank))
        assert (before, list(request.all_token_ids), request.max_tokens) == (0, list(range(10)), 6)
        assert scheduler.attender.finish(request)["raymem"]["code"] == error.code
        request, _ = scheduler.admit(range(10), asks(bank, required=True))
        assert request.max_tokens == 1
    scheduler.index.set_live("lab/a", "", live=True)
    assert scheduler.admit(range(10), asks("lab/a", rows=8))[1] == 8


def test_rows_leave_room_for_the_answer(scheduler):
    assert scheduler.admit(range(LONGEST - 6), asks("lab/a", rows=16), max_tokens=2)[1] == 4
    # of a caller that names no length vLLM's servers ask for all that is left
    assert scheduler.admit(range(LONGEST - 6), asks("lab/a", rows=16), max_tokens=6)[1] == 3
    request, before = scheduler.admit(range(LONGEST - 1), asks("lab/a", rows=16))
    assert before == 0
    assert "no room" in scheduler.attender.finish(request)["raymem"]["refused"]


def test_a_scored_prompt_gets_rows_too_and_shares_nothing(scheduler):
    request, before = scheduler.admit(range(10), asks("lab/a", rows=8), prompt_logprobs=0)
    other, _ = scheduler.admit(range(10), asks("lab/a", rows=8), prompt_logprobs=0)
    assert before == 8
    assert not request.skip_reading_prefix_cache
    assert not set(request.block_hashes) & set(other.block_hashes)


def test_a_runner_whose_scores_cannot_be_told_apart_refuses_them():
    scheduler = Scheduler(scores=False)
    scheduler.attach("lab/a", range(20), range(20))
    request, before = scheduler.admit(range(10), asks("lab/a"), prompt_logprobs=0)
    assert before == 0
    assert "V1 model runner" in scheduler.attender.finish(request)["raymem"]["refused"]
    assert scheduler.admit(range(10), asks("lab/a", rows=8))[1] == 8


def test_a_model_that_cannot_attend_says_so():
    scheduler = Scheduler(refusal=Unsupported("windows"))
    request, before = scheduler.admit(range(10), asks("lab/a"))
    assert before == 0
    assert scheduler.attender.finish(request)["raymem"] == {"refused": "windows", "code": "unsupported"}


@pytest.mark.parametrize(
    "forged",
    [
        {"signature": "0" * 64},
        {"signature": "déjà"},
        {"signature": "\ud800"},
        {"signature": None},
        {"order": 3},
        {"order": {"do": "capture"}},
        {"order": {"do": "capture", "bank": "lab/a", "pos": [[0, "x"]]}},
    ],
)
def test_orders_that_the_engine_did_not_sign_are_refused(scheduler, forged):
    params = Order(do="release", bank="lab/a").signed([0], SECRET)
    params = {"raymem": {**params["raymem"], **forged}}
    request, before = scheduler.admit([0], {"kv_transfer_params": params})
    assert before == 0
    assert scheduler.attender.finish(request)["raymem"]["code"] in ("unauthorized", "invalid_input")
    assert scheduler.admit(range(10), asks("lab/a", rows=8))[1] == 8
    other = scheduler.admit([1], {"kv_transfer_params": Order(do="release", bank="lab/a").signed([0], SECRET)})[0]
    assert scheduler.attender.finish(other)["raymem"]["code"] == "unauthorized"


def test_a_request_that_ends_before_its_rows_are_kept_keeps_none():
    scheduler = Scheduler()
    order = Order(do="capture", bank="lab/a", pos=[(0, 8)], at=[(0, 8)])
    request, _ = scheduler.admit(range(8), {"kv_transfer_params": order.signed(range(8), SECRET)})
    assert "ended before" in scheduler.attender.finish(request)["raymem"]["refused"]
    assert scheduler.index.take_dropped() == [1]


def test_rows_over_the_budget_are_refused_with_the_sizes():
    scheduler = Scheduler(budget=100)
    scheduler.attach("lab/a", range(9), range(9))
    with pytest.raises(TooLarge, match=r"2 rows of bank 'lab/b'.*9 that are kept: rows_bytes is 100"):
        _said({"raymem": scheduler.attach("lab/b", range(2), range(2))[1]})
    with pytest.raises(Unavailable, match="did not answer"):
        _said(None)


def test_a_bank_that_was_made_anew_replaces_the_one_before(scheduler):
    done, _ = scheduler.attach("lab/a", range(5), range(300, 305), id="another")
    assert done.dropped == [1]
    assert scheduler.admit(range(10), asks("lab/a", rows=20))[1] == 5


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


class Cache:
    """The paged cache of a worker as a dictionary of slots."""

    def __init__(self):
        self.rows = {}
        self.wanted = None

    def write(self, keys_LNHd, values_LNHd, slots_N):
        for place, slot in enumerate(slots_N.tolist()):
            self.rows[slot] = keys_LNHd[:, place], values_LNHd[:, place]

    def own_share(self, rows_LNHd):
        return rows_LNHd

    def require_whole(self):
        pass

    def zeros(self, rows):
        return torch.zeros(LAYERS, rows, HEADS, WIDTH)

    def watch(self, slots_N):
        self.wanted = slots_N

    def seen(self):
        found = [self.rows[slot] for slot in self.wanted.tolist()]
        return torch.stack([keys for keys, _ in found], 1), torch.stack([values for _, values in found], 1)


def test_rows_of_a_store_are_kept_without_a_pass():
    scheduler = Scheduler()
    order = Order(do="load", bank="lab/a", id="a", pos=[(3, 6)], tokens=[7, 8, 9], staged="s", kind="spalm")
    request, _ = scheduler.admit([0], {"kv_transfer_params": order.signed([0], SECRET)})
    done = scheduler.step(new=[(request, scheduler.begin(request))])
    assert (done.loads, done.captures) == ([Load("a", [(3, 6)], 1, "s")], [])
    assert scheduler.attender.finish(request)["raymem"] == {"loaded": 3}
    asking, before = scheduler.admit(range(5), asks("lab/a", rows=9))
    assert (before, list(asking.all_token_ids[:3])) == (3, [7, 8, 9])
    store = RowStore(Cache(), Rope(torch.zeros(LAYERS, 2)), 10**6)
    keys_LNHd, values_LNHd = torch.randn(2, LAYERS, 3, HEADS, WIDTH)
    store.stage("lab/a", "s", keys_LNHd, values_LNHd)
    store.begin([], [Fill("r", 0, [5], [1], [2])], [], done.loads)
    assert torch.equal(store._cache.rows[5][1], values_LNHd[:, 2])
    ((pos, keys, _),) = store.rows_of("a", range(9))
    assert (pos, store.stats()["rows_loaded"]) == ([3, 4, 5], 3)
    assert torch.equal(keys, keys_LNHd)
    # another attach of the same rows, whose chunk takes the place of the first
    store.begin([], [Fill("r", 0, [6], [2], [2])], [1], [replace(done.loads[0], chunk=2)])
    assert torch.equal(store._cache.rows[6][1], values_LNHd[:, 2])
    assert (store.stats()["rows"], store.stats()["staged_bytes"], store.take_lost()) == (3, 0, [])
    with pytest.raises(FingerprintMismatch, match="another model"):
        store.stage("lab/a", "s", keys_LNHd[:1], values_LNHd[:1])


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
    connector, found = SimpleNamespace(row_store=lambda: store), {"keys": rows, "values": rows}
    order = Order(do="capture", bank="lab/a", pos=[(0, 2)])
    assert rebuild._staged(connector, order, [1, 2], found).do == "load"
    assert rebuild._staged(connector, order.model_copy(update={"pos": [(2, 4)]}), [1, 2], found) is None


def test_rows_made_of_a_bank_stand_in_its_place_until_something_is_erased():
    scheduler = Scheduler(floor=0.4)
    scheduler.attach("lab/a", range(20), range(100, 120))
    told = {"kind": "compressive", "tokens": [0] * 6, "about": [*range(100, 120)]}
    order = Order(do="replace", bank="lab/a", pos=[(0, 6)], staged="s", **told)
    request, _ = scheduler.admit([0], {"kv_transfer_params": order.signed([0], SECRET)})
    done = scheduler.step(new=[(request, scheduler.begin(request))])
    assert (done.dropped, done.loads) == ([1], [Load("", [], 2, "s")])
    asking, before = scheduler.admit([105, 106, 107], asks("lab/a", rows=9))
    assert (before, scheduler.admit([5, 6, 7], asks("lab/a", rows=9))[1]) == (6, 0)
    assert scheduler.admit([110, 111], asks("lab/a", rows=9))[0].cache_salt == asking.cache_salt
    # the bank's own rows again
    scheduler.attach("lab/a", range(20), range(100, 120))
    assert scheduler.admit([105], asks("lab/a", rows=50))[1] == 20
    scheduler.admit([0], {"kv_transfer_params": order.signed([0], SECRET)})
    scheduler.index.erased("lab/a", "", 1, torch.tensor([400]))
    assert scheduler.admit([105], asks("lab/a", rows=50))[1] == 0


def test_rows_that_were_kept_are_turned_to_the_slots_in_which_they_are_attended():
    rope, cache = Rope(torch.tensor([[1.0, 0.1]] * LAYERS)), Cache()
    store = RowStore(cache, rope, 10**6)
    plain_LNHd, values_LNHd = torch.randn(2, LAYERS, 6, HEADS, WIDTH)
    positions_N = torch.arange(6)
    store.begin([Capture("lab/a", [(0, 6)], 7, 6, 0, [0, 1, 2, 3], [10, 11, 12, 13])], [], [])
    cache.write(rope.turn(plain_LNHd, positions_N), values_LNHd, torch.arange(10, 16))
    store.end()
    store.begin([Capture("lab/a", [(0, 6)], 7, 6, 4, [4, 5], [14, 15])], [], [])
    store.end()
    assert store.kept("lab/a", range(9)) == set(range(6))
    assert store.stats()["rows"] == store.stats()["rows_captured"] == 6
    store.begin([], [Fill("r", 2, [40, 41, 42], [7, -1, 7], [5, 0, 1])], [])
    wanted_LNHd = rope.turn(plain_LNHd[:, [5, 1]], torch.tensor([2, 4]))
    torch.testing.assert_close(cache.rows[40][0], wanted_LNHd[:, 0])
    torch.testing.assert_close(cache.rows[42][0], wanted_LNHd[:, 1])
    assert not cache.rows[41][0].any()
    assert torch.equal(cache.rows[42][1], values_LNHd[:, 1])
    store.begin([], [], [7])
    assert (store.kept("lab/a", range(9)), store.stats()["rows"], store.stats()["bytes"]) == (set(), 0, 0)


class Worker:
    """What plans and carries out orders for the banks of a store, in place of a connector and its engine."""

    longest, secret = LONGEST, SECRET

    def __init__(self, uri):
        self.uri = uri
        self.cache = Cache()
        self.rows = RowStore(self.cache, Rope(torch.zeros(LAYERS, 2)))
        self.scheduler = Scheduler()

    def row_store(self):
        return self.rows

    def cold_uri(self):
        return self.uri

    def require_model(self, fingerprint):
        pass

    def attach(self, bank):
        """Make the rows that are missing; return how many the bank shows, were kept, loaded and computed."""
        planned = plan(self, bank, None)
        before = self.rows.stats()
        self.carry_out(planned)
        after = self.rows.stats()
        made = [after[name] - before[name] for name in ("rows_loaded", "rows_captured")]
        return (planned["rows"], planned["kept"], *made)

    def replace(self, bank, keys_LNHd, values_LNHd):
        kinds = [
            (dtype_name(each.dtype), list(each.shape), to_bytes(each).tobytes()) for each in (keys_LNHd, values_LNHd)
        ]
        tokens = [-1] * keys_LNHd.shape[1]
        self.carry_out(replacement(self, bank, None, {"keys": kinds[0], "values": kinds[1], "tokens": tokens}))

    def carry_out(self, planned):
        for tokens, params in planned["requests"]:
            request, _ = self.scheduler.admit(tokens, {"kv_transfer_params": params})
            done = self.scheduler.step(new=[(request, self.scheduler.begin(request))])
            assert "refused" not in self.scheduler.attender.finish(request)["raymem"]
            self.rows.begin(done.captures, done.fills, done.dropped, done.loads)
            for part in done.captures:
                self.cache.write(*torch.randn(2, LAYERS, len(part.slots), HEADS, WIDTH), torch.tensor(part.slots))
            self.rows.end()

    def kept(self, bank):
        """Stream, first number and length of what `rows_kept` gives."""
        llm = SimpleNamespace(collective_rpc=lambda name, args: [kept_parts(self, *args)])
        return sorted((rows.stream, rows.seq, len(rows)) for rows in rows_kept(llm, bank))


@pytest.fixture
def store(tmp_path, tiny):
    with raymem.connect(tmp_path / "memory") as opened:
        opened.put_calibration(tiny.calibration)
        yield opened


@pytest.fixture
def worker(tmp_path, store, tiny):
    bank = store.create("lab/told", tiny.spec("spalm"))
    for stream in "ab":
        bank.write(tiny.talk(stream, 20))
    made = Worker(str(tmp_path / "memory"))
    assert made.attach("lab/told") == (40, 0, 0, 40)
    assert made.kept("lab/told") == [("a", 0, 20), ("b", 0, 20)]
    return made


def test_rows_made_of_a_bank_are_not_handed_out_as_its_own(worker):
    worker.replace("lab/told", *torch.randn(2, LAYERS, 6, HEADS, WIDTH))
    assert worker.rows.stats()["rows"] == 6
    assert worker.kept("lab/told") == []
    assert worker.attach("lab/told") == (40, 0, 0, 40)
    assert worker.kept("lab/told") == [("a", 0, 20), ("b", 0, 20)]


def test_rows_of_a_bank_that_was_removed_are_not_those_of_the_next_of_its_name(worker, store, tiny):
    store.delete("lab/told")
    store.create("lab/told", tiny.spec("spalm")).write(tiny.talk("c", 30))
    assert worker.kept("lab/told") == []
    assert worker.attach("lab/told") == (30, 0, 0, 30)
    assert worker.kept("lab/told") == [("c", 0, 30)]


def test_rows_are_handed_out_without_the_passes_that_have_seen_what_was_erased(worker, store):
    store.bank("lab/told").erase(stream="a", run="r1", seq_from=3, seq_to=5)
    # though the scheduler has not noticed yet
    assert worker.kept("lab/told") == [("b", 0, 20)]
    RowWatch(worker.scheduler.index, 1).look()
    assert worker.attach("lab/told") == (38, 20, 0, 18)
    assert worker.kept("lab/told") == [("a", 0, 3), ("a", 5, 15), ("b", 0, 20)]
