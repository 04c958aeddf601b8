"""Rows before prompts without an engine: vLLM's requests, a scheduler of a few lines, a cache that is a dictionary."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from row_parts import BLOCK, HEADS, LAYERS, LONGEST, SECRET, WIDTH, Cache, Scheduler, asks

import raymem
from raymem.errors import BankDetached, BankNotFound, FingerprintMismatch, TooLarge, Unavailable, Unsupported
from raymem.lm.attending import Rope
from raymem.rows import AttendedRows, RowFormat
from raymem.serving.vllm.attach import _said, rows_kept
from raymem.serving.vllm.orders import Order
from raymem.serving.vllm.rebuild import kept_parts, plan, replacement
from raymem.serving.vllm.row_store import Capture, Fill, Load, RowStore
from raymem.serving.vllm.row_watch import RowWatch
from raymem.tensors import dtype_name, to_bytes


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
        self.rows = RowStore(self.cache, Rope(torch.zeros(LAYERS, 2)), 10**6)
        self.scheduler = Scheduler()

    def row_store(self):
        return self.rows

    def cold_uri(self):
        return self.uri

    def row_format(self):
        return RowFormat(LAYERS, HEADS, WIDTH, "engine's", "float32")

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


@pytest.mark.parametrize(
    ("shape", "rope", "loaded"),
    [
        ((LAYERS, HEADS, WIDTH), "engine's", 30),
        ((LAYERS, HEADS, WIDTH), "another", 0),
        # a worker would take its share of them, and find nothing wrong
        ((LAYERS + 1, HEADS, WIDTH), "engine's", 0),
        ((LAYERS, HEADS + 1, WIDTH), "engine's", 0),
    ],
)
def test_kept_rows_of_another_rope_or_shape_are_computed_anew(worker, store, tiny, shape, rope, loaded):
    bank = store.create("lab/kept", tiny.spec("spalm"))
    bank.write(tiny.talk("c", 30))
    keys_LNHd, values_LNHd = torch.randn(2, shape[0], 30, *shape[1:])
    bank.put_rows(AttendedRows("c", "r1", 0, keys_LNHd, values_LNHd, rope=rope))
    assert worker.attach("lab/kept") == (30, 0, loaded, 30 - loaded)


def test_made_rows_of_another_shape_are_refused(worker):
    with pytest.raises(FingerprintMismatch, match="layers: the bank's have 3, these 2"):
        worker.replace("lab/told", *torch.randn(2, LAYERS + 1, 6, HEADS, WIDTH))
