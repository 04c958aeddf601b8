"""Which rows read which bank, and with which states: no vLLM, banks that answer with what they were asked."""

from dataclasses import dataclass, field

import pytest
import torch

from raymem.errors import InvalidTrace, Unauthorized
from raymem.lm.mixing import Mixture
from raymem.serving.vllm.memory import MemoryMixer
from raymem.types import Readout

VOCABULARY = 7


def asks(banks):
    """The `extra_args` of a request that reads banks."""
    return {"kv_transfer_params": {"raymem": {"read": banks}}}


@dataclass
class EchoBank:
    """Answers with the query's own first number as value, so that a test sees which state was asked."""

    window: int = 1
    live: bool = True
    fails_on: float | None = None
    searches: int = 0
    asked: list[tuple[list[float], int]] = field(default_factory=list)

    def read(self, contexts, k):
        self.asked += [(hidden_QLD[:, 0, 0].tolist(), start) for hidden_QLD, start, _ in contexts]
        self.searches += 1
        states_QD = torch.cat([context.hidden_QLD[-context.queries :, 0] for context in contexts])
        if self.fails_on is not None and bool((states_QD == self.fails_on).any()):
            raise InvalidTrace("a state that can't be")
        return Readout(values_QV=states_QD[:, :1].float(), relevance_Q=torch.ones(len(states_QD)))


@dataclass
class FakeStep:
    """Requests with `lengths` rows each; a row's state is 100 times its request's number plus its position."""

    requests: list[str]
    lengths: list[int]
    firsts: list[int]
    tokens_T: torch.Tensor | None = None

    def __post_init__(self):
        self.starts = [0, *torch.tensor(self.lengths).cumsum(0).tolist()]
        ranges = [torch.arange(first, first + n) for first, n in zip(self.firsts, self.lengths, strict=True)]
        self.positions_T = torch.cat(ranges)
        owners = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))
        self._states_T = (100 * owners + self.positions_T).float()

    def states_RLD(self, rows_R):
        return self._states_T[rows_R][:, None, None].expand(-1, 1, 2)


def added(logits_RV, readout):
    """What a bank adds to the logits of all tokens."""
    assert logits_RV.dtype == torch.float32
    return all_tokens(logits_RV, logits_RV + readout.values_QV)


def all_tokens(own_QV, mixed_QV):
    """A mixture in which every token is a candidate."""
    rows_Q, none_Q = torch.arange(len(own_QV)), torch.zeros(len(own_QV))
    return Mixture(rows_Q, none_Q, none_Q, torch.arange(own_QV.shape[1]).expand(own_QV.shape), own_QV, mixed_QV)


def mixer(banks, reads, **options):
    def earlier(request, start, stop):
        return (100 * request + torch.arange(start, stop)).float()[:, None, None].expand(-1, 1, 2)

    return MemoryMixer(banks, added, lambda name: asks(reads.get(name, [])), earlier, **options)


def logits(rows):
    return torch.arange(rows * VOCABULARY).reshape(rows, VOCABULARY).bfloat16()


def test_without_a_reading_request_the_very_same_tensor_comes_back():
    step = FakeStep(["a", "b"], [2, 3], [5, 9])
    before = logits(2)
    memory = mixer({"lab/x": EchoBank()}, {})
    assert memory.change(step, torch.tensor([1, 4]), before) is before
    assert memory.counters.rows_mixed == 0


def test_only_the_rows_of_reading_requests_change_and_each_asks_with_its_own_state():
    step = FakeStep(["a", "b", "c"], [2, 3, 1], [5, 9, 40])
    bank = EchoBank()
    memory = mixer({"lab/x": bank}, {"b": ["lab/x"]})
    rows = torch.tensor([1, 3, 4, 5])
    before = logits(4)
    after = memory.change(step, rows, before)
    assert after.dtype == torch.float32
    assert torch.equal(after[[0, 3]], before[[0, 3]].float())
    assert torch.equal(after[1], before[1].float() + 110)
    assert torch.equal(after[2], before[2].float() + 111)
    assert bank.asked == [([110.0, 111.0], 10)]
    assert memory.counters.rows_mixed == 2


def test_each_request_learns_by_itself_what_a_bank_is_worth_and_is_forgotten_when_it_ends():
    def blend(logits_RV, readout):
        mixed = logits_RV.clone()
        mixed[:, 3] += 2.0
        return all_tokens(*(torch.log_softmax(rows, 1) for rows in (logits_RV, mixed)))

    reads = {name: asks(["lab/x"]) for name in ("a", "b")}
    memory = MemoryMixer({"lab/x": EchoBank()}, blend, reads.get, lambda *_: torch.zeros(0))
    flat = torch.zeros(8, VOCABULARY)
    # the bank says 3 all the time: a hears it, b something else
    tokens = torch.tensor([3, 3, 3, 3, 1, 1, 1, 1])
    after = memory.change(FakeStep(["a", "b"], [4, 4], [0, 0], tokens), torch.arange(8), flat)
    believed = torch.log_softmax(after, 1)[:, 3]
    assert believed[0] == believed[4]
    assert list(believed[:4]) == sorted(believed[:4])
    assert list(believed[4:]) == sorted(believed[4:], reverse=True)
    goes_on = memory.change(FakeStep(["b"], [1], [4], torch.tensor([1])), torch.tensor([0]), flat[:1])
    assert torch.log_softmax(goes_on, 1)[0, 3] < believed[7]
    # a waits, preempted; then it has ended
    assert set(memory._beliefs) == {"a", "b"}
    del reads["a"]
    memory.change(FakeStep(["b"], [1], [5], torch.tensor([1])), torch.tensor([0]), flat[:1])
    assert set(memory._beliefs) == {"b"}


def test_a_window_reaches_back_into_this_step_and_into_the_cache():
    bank = EchoBank(window=4)
    memory = mixer({"lab/x": bank}, {"a": ["lab/x"], "b": ["lab/x"]})
    step = FakeStep(["a", "b"], [3, 1], [8, 1])
    after = memory.change(step, torch.tensor([1, 2, 3]), logits(3))
    # a's rows 9 and 10: its window starts at 6, of which 6 and 7 are in the cache and 8 is of this step.
    # b's row 1: there is nothing before position 0
    assert bank.asked == [([6.0, 7.0, 8.0, 9.0, 10.0], 6), ([100.0, 101.0], 0)]
    assert torch.equal(after - logits(3).float(), torch.tensor([9.0, 10.0, 101.0])[:, None].expand(-1, VOCABULARY))


def test_several_banks_are_mixed_one_after_the_other():
    memory = mixer({"lab/x": EchoBank(), "lab/y": EchoBank()}, {"a": ["lab/x", "lab/y"]})
    after = memory.change(FakeStep(["a"], [1], [3]), torch.tensor([0]), logits(1))
    assert torch.equal(after, logits(1).float() + 6)


@pytest.mark.parametrize("banks", [{}, {"lab/x": EchoBank(live=False)}])
def test_a_bank_that_is_not_here_or_detached_leaves_the_logits_alone_and_is_counted(banks):
    memory = mixer(banks, {"a": ["lab/x"]})
    before = logits(2)
    assert memory.change(FakeStep(["a"], [2], [3]), torch.tensor([0, 1]), before) is before
    assert memory.counters.missing == {"lab/x": 2}


def test_a_read_that_fails_costs_the_memory_and_not_the_request():
    memory = mixer({"lab/x": EchoBank(fails_on=3.0)}, {"a": ["lab/x"]})
    after = memory.change(FakeStep(["a"], [1], [3]), torch.tensor([0]), logits(1))
    assert torch.equal(after, logits(1).float())
    assert memory.counters.rows_failed == 1


def test_requests_that_read_the_same_bank_share_a_search_and_not_its_failure():
    bank = EchoBank(fails_on=207.0)
    memory = mixer({"lab/x": bank}, {"a": ["lab/x"], "b": ["lab/x"], "c": ["lab/x"]})
    step = FakeStep(["a", "b"], [1, 2], [3, 9])
    after = memory.change(step, torch.arange(3), logits(3))
    assert bank.searches == 1
    assert torch.equal(after - logits(3).float(), torch.tensor([3.0, 109, 110])[:, None].expand(-1, VOCABULARY))
    # c's state is the one that can't be
    after = memory.change(FakeStep(["a", "b", "c"], [1, 1, 1], [4, 11, 7]), torch.arange(3), logits(3))
    assert torch.equal(after - logits(3).float(), torch.tensor([4.0, 111, 0])[:, None].expand(-1, VOCABULARY))
    assert (memory.counters.rows_mixed, memory.counters.rows_failed) == (5, 1)


def test_what_a_request_asks_is_looked_at_once_and_each_bank_is_read_once():
    asked, bank = [], EchoBank()

    def request_args(name):
        asked.append(name)
        return asks(["lab/x"] * 20_000)

    memory = MemoryMixer({"lab/x": bank}, added, request_args, lambda *_: None)
    for position in range(5):
        memory.change(FakeStep(["a"], [1], [position]), torch.tensor([0]), logits(1))
    assert len(bank.asked) == 5
    assert asked == ["a"]


def test_a_wish_that_is_refused_costs_the_memory_alone_is_counted_once_and_leaves_the_others_alone():
    def allow(banks):
        if "lab/secret" in banks:
            raise Unauthorized("not yours")

    reads = {"a": ["lab/x", "lab/secret"], "b": ["lab/x"], "c": [f"lab/{i}" for i in range(9)], "d": "lab/x"}
    bank = EchoBank()
    memory = mixer({"lab/x": bank, "lab/secret": EchoBank()}, reads, allow=allow)
    for position in range(3):
        step = FakeStep(["a", "b", "c", "d"], [1, 1, 1, 1], [position] * 4)
        after = memory.change(step, torch.arange(4), logits(4))
        assert torch.equal(after[[0, 2, 3]], logits(4)[[0, 2, 3]].float())
        assert not torch.equal(after[1], logits(4)[1].float())
    assert memory.counters.requests_refused == 3
    assert memory.counters.rows_mixed == len(bank.asked) == 3


def test_names_that_requests_make_up_are_not_remembered_for_ever(caplog):
    reads = {f"r{i}": [f"lab/b{i}"] for i in range(500)}
    args = {name: asks(banks) for name, banks in reads.items()}
    memory = MemoryMixer({}, added, args.get, lambda *_: None)
    for name in list(reads):
        memory.change(FakeStep([name], [2], [0]), torch.tensor([0, 1]), logits(2))
        del args[name]
    assert memory.counters.rows_without_bank == 1000
    assert len(memory.counters.missing) == 64
    # the last one's end shows with the next step
    assert set(memory._asked) == {"r499"}
    assert sum("not attached" in line for line in caplog.messages) == 64
