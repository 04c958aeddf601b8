"""The scheduler side's book, driven with steps like vLLM's, without vLLM."""

from dataclasses import dataclass, field
from types import SimpleNamespace

from raymem.serving.vllm.params import Target
from raymem.serving.vllm.tracker import RunSlice, Tracker

BLOCK = 4
GROUP = 1
ALICE = Target("lab/alice", "alice")


@dataclass
class FakeRequest:
    """The four facts that the book reads of a request."""

    request_id: str
    prompt: list[int]
    output: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0

    @property
    def all_token_ids(self) -> list[int]:
        return self.prompt + self.output

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt)


def step(new=(), cached=(), resumed=(), scheduled=None):
    """A step's schedule: `new` and `cached` are (id, blocks, tokens computed), blocks of the hidden group alone."""
    both = {name: ([7, 7], blocks) for name, blocks, _ in (*new, *cached) if blocks is not None}
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, block_ids=both[name], num_computed_tokens=done) for name, _, done in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[name for name, _, _ in cached],
            new_block_ids=[both.get(name) for name, _, _ in cached],
            num_computed_tokens=[done for _, _, done in cached],
            resumed_req_ids=set(resumed),
        ),
        num_scheduled_tokens=scheduled or {},
    )


def started(request: FakeRequest) -> Tracker:
    tracker = Tracker(GROUP, BLOCK)
    tracker.admit(request, ALICE)
    return tracker


def rows(pieces: list[RunSlice]) -> list[tuple[int, int, int]]:
    return [row for p in pieces for row in zip(range(p.seq, p.seq + len(p.tokens)), p.tokens, p.slots, strict=True)]


def test_a_prompt_in_chunks_is_sent_chunk_by_chunk_from_its_own_blocks():
    request = FakeRequest("r", prompt=list(range(100, 107)))
    tracker = started(request)
    first = tracker.step(step(new=[("r", [9], 0)], scheduled={"r": 3}))
    second = tracker.step(step(cached=[("r", [2], 3)], scheduled={"r": 4}))
    assert rows(first) == [(0, 100, 36), (1, 101, 37), (2, 102, 38)]
    assert rows(second) == [(3, 103, 39), (4, 104, 8), (5, 105, 9), (6, 106, 10)]
    assert (second[0].bank, second[0].stream, second[0].run) == ("lab/alice", "alice", "r")


def test_a_prefix_hit_sends_the_cached_rows_too():
    tracker = started(FakeRequest("r", prompt=list(range(9))))
    sent = tracker.step(step(new=[("r", [5, 6, 7], 8)], scheduled={"r": 1}))
    assert [seq for seq, _, _ in rows(sent)] == list(range(9))
    assert rows(sent)[0][2] == 20
    assert rows(sent)[8][2] == 28


def test_a_drafted_row_waits_until_its_token_is_accepted():
    request = FakeRequest("r", prompt=[1, 2, 3])
    tracker = started(request)
    tracker.step(step(new=[("r", [0, 1], 0)], scheduled={"r": 3}))
    request.output.append(50)
    # two rows run: that of token 50 and that of a draft
    one = tracker.step(step(cached=[("r", None, 3)], scheduled={"r": 2}))
    assert rows(one) == [(3, 50, 3)]
    request.output += [51, 52]  # accepted, and sampled after it
    two = tracker.step(step(cached=[("r", None, 5)], scheduled={"r": 2}))
    assert rows(two) == [(4, 51, 4), (5, 52, 5)]
    request.output.append(53)  # the draft after 52 was rejected
    three = tracker.step(step(cached=[("r", None, 6)], scheduled={"r": 2}))
    assert rows(three) == [(6, 53, 6)]


def test_an_end_right_after_a_rejected_draft_leaves_nothing():
    request = FakeRequest("r", prompt=[1, 2, 3])
    tracker = started(request)
    tracker.step(step(new=[("r", [0], 0)], scheduled={"r": 3}))
    request.output, request.num_computed_tokens = [50], 3
    assert tracker.finish(request) is False
    assert tracker.step(step()) == []


def test_an_end_right_after_an_accepted_draft_keeps_the_blocks_for_one_more_step():
    request = FakeRequest("r", prompt=[1, 2, 3], output=[50])
    tracker = started(request)
    tracker.step(step(new=[("r", [3], 0)], scheduled={"r": 3}))
    tracker.step(step(cached=[("r", [8], 3)], scheduled={"r": 2}))
    request.output, request.num_computed_tokens = [50, 51, 52], 5
    assert tracker.finish(request) is True
    assert rows(tracker.step(step())) == [(4, 51, 32)]
    assert tracker.step(step()) == []


def test_a_stop_at_the_accepted_draft_itself_sends_no_row_for_the_last_token():
    request = FakeRequest("r", prompt=[1, 2, 3], output=[50])
    tracker = started(request)
    tracker.step(step(new=[("r", [3, 4], 0)], scheduled={"r": 3}))
    tracker.step(step(cached=[("r", None, 3)], scheduled={"r": 2}))
    request.output, request.num_computed_tokens = [50, 51], 5
    assert tracker.finish(request) is False


def test_a_preempted_request_sends_only_what_it_had_not_sent_from_its_new_blocks():
    request = FakeRequest("r", prompt=list(range(6)), output=[60])
    tracker = started(request)
    tracker.step(step(new=[("r", [0, 1], 0)], scheduled={"r": 6}))
    assert rows(tracker.step(step(cached=[("r", None, 6)], scheduled={"r": 2}))) == [(6, 60, 6)]
    request.output.append(61)
    # preempted here: its blocks went to somebody else. it comes back in two chunks, with other blocks
    assert tracker.step(step(cached=[("r", [10, 11], 0)], resumed=["r"], scheduled={"r": 5})) == []
    assert rows(tracker.step(step(cached=[("r", None, 5)], scheduled={"r": 4}))) == [(7, 61, 47)]


def test_a_resumed_request_that_comes_as_a_new_one_keeps_its_place():
    request = FakeRequest("r", prompt=list(range(6)))
    tracker = started(request)
    tracker.step(step(new=[("r", [0, 1], 0)], scheduled={"r": 6}))
    request.output.append(60)
    again = tracker.step(step(new=[("r", [4, 5], 4)], scheduled={"r": 3}))
    assert rows(again) == [(6, 60, 22)]


def test_an_abort_in_the_middle_of_the_prompt_sends_what_was_computed():
    request = FakeRequest("r", prompt=list(range(9)))
    tracker = started(request)
    tracker.step(step(new=[("r", [0, 1, 2], 0)], scheduled={"r": 5}))
    request.num_computed_tokens = 5
    assert tracker.finish(request) is False


def test_a_request_aborted_before_it_ran_and_one_that_did_not_opt_in_send_nothing():
    request = FakeRequest("r", prompt=[1, 2])
    tracker = started(request)
    assert tracker.finish(request) is False
    stranger = FakeRequest("s", prompt=[1, 2])
    assert tracker.step(step(new=[("s", [0], 0)], scheduled={"s": 2})) == []
    assert tracker.finish(stranger) is False
