"""The sender thread with sinks that are slow, refuse, or break."""

import asyncio
import inspect
import threading
import time

import pytest
import torch

from raymem.errors import BankNotFound, ConfigError, Overloaded, StorageError, Unauthorized
from raymem.rows import Trace
from raymem.serving.vllm.params import ConnectorConfig
from raymem.serving.vllm.sender import QueuedRows, Sender
from raymem.serving.vllm.tracker import RunSlice

LAYERS, WIDTH = 2, 3
ROW_BYTES = LAYERS * WIDTH * 2


class Recorder:
    """A sink that keeps what it gets; `trouble` raises or waits before that."""

    def __init__(self, trouble=None):
        self.traces: list[tuple[str, Trace]] = []
        self.trouble = trouble
        self.tries = 0
        self.closed = False

    async def write(self, bank: str, trace: Trace) -> None:
        self.tries += 1
        if self.trouble is not None:
            outcome = self.trouble(bank, trace, self.tries)
            if inspect.isawaitable(outcome):
                await outcome
        self.traces.append((bank, trace))

    async def close(self) -> None:
        self.closed = True

    def rows(self, run: str) -> list[int]:
        return [trace.seq + i for _, trace in self.traces if trace.run == run for i in range(len(trace))]


async def opened(gate: threading.Event) -> None:
    while not gate.is_set():
        await asyncio.sleep(0.01)


def make(sink, **settings) -> Sender:
    return Sender(lambda: sink, ConnectorConfig(store="unused", **{"linger_s": 0.0, "retry_s": 2.0} | settings))


@pytest.fixture
def sender_of():
    made = []

    def build(sink, **settings):
        made.append(make(sink, **settings))
        return made[-1]

    yield build
    for sender in made:
        sender.close()


def piece(seq: int, rows: int, run: str = "r", bank: str = "lab/alice") -> RunSlice:
    return RunSlice(bank, "s", run, seq, list(range(1000 + seq, 1000 + seq + rows)), [])


def offer(sender: Sender, *pieces: RunSlice) -> list[bool]:
    took = [sender.reserve(p, len(p.tokens) * ROW_BYTES) for p in pieces]
    hidden = [torch.full((len(p.tokens), LAYERS, WIDTH), float(p.seq), dtype=torch.bfloat16) for p in pieces]
    sender.put(QueuedRows(p, h, lambda: None, 7.0) for p, h, ok in zip(pieces, hidden, took, strict=True) if ok)
    return took


def test_pieces_of_a_run_arrive_in_order_and_neighbours_as_one_trace(sender_of):
    sink = Recorder()
    sender = sender_of(sink, linger_s=0.05)
    offer(sender, piece(0, 5), piece(0, 2, run="q"), piece(5, 1))
    assert sender.flush(5)
    assert sink.rows("r") == list(range(6))
    assert sink.rows("q") == [0, 1]
    assert [len(trace) for _, trace in sink.traces] == [6, 2]
    trace = sink.traces[0][1]
    assert trace.tokens.tolist() == list(range(1000, 1006))
    assert trace.hidden[:, 0, 0].tolist() == [0.0] * 5 + [5.0]
    assert (trace.stream, trace.run, trace.seq, trace.time) == ("s", "r", 0, 7.0)
    stats = sender.stats()
    assert (stats.rows_seen, stats.rows_written, stats.rows_shed, stats.queue_bytes) == (8, 8, 0, 0)


def test_a_stuck_sink_never_delays_the_engine_and_the_run_is_shed_from_there_on(sender_of):
    gate = threading.Event()
    sink = Recorder(lambda *_: opened(gate))
    sender = sender_of(sink, queue_bytes=8 * ROW_BYTES)
    offer(sender, piece(0, 4))
    time.sleep(0.1)  # the first batch is in the sink's hands, and still counts
    waits = []
    for seq in range(4, 400):
        started = time.perf_counter()
        offer(sender, piece(seq, 1))
        waits.append(time.perf_counter() - started)
    # a lock held for microseconds. the machine's other work may hold one offer up, but not most of them
    assert sorted(waits)[len(waits) // 2] < 0.01
    assert max(waits) < 2.0
    gate.set()
    assert sender.flush(5)
    stats = sender.stats()
    assert stats.rows_seen == 400 == stats.rows_written + stats.rows_shed
    assert stats.traces_shed == 1
    assert stats.shed_by_code == {"queue_full": 1}
    # what is there is a beginning without a hole
    assert sink.rows("r") == list(range(stats.rows_written))
    assert stats.queue_bytes_max <= 8 * ROW_BYTES


def test_once_shed_a_run_stays_shed_although_there_is_room_again(sender_of):
    sink = Recorder()
    sender = sender_of(sink, queue_bytes=4 * ROW_BYTES)
    assert offer(sender, piece(0, 5)) == [False]
    assert sender.flush(5)
    assert offer(sender, piece(5, 1), piece(0, 1, run="q")) == [False, True]
    assert sender.flush(5)
    assert sink.rows("r") == []
    assert sender.stats().rows_shed == 6
    assert sender.stats().traces_shed == 1


def test_rows_written_before_the_shedding_are_counted_as_kept(sender_of):
    sink = Recorder()
    sender = sender_of(sink, queue_bytes=4 * ROW_BYTES)
    offer(sender, piece(0, 3))
    assert sender.flush(5)
    offer(sender, piece(3, 9))
    assert sender.stats().rows_kept == 3


def test_an_overloaded_bank_is_tried_again_after_the_time_it_named(sender_of):
    def busy(_bank, _trace, tries):
        if tries < 3:
            raise Overloaded("busy", retry_after_s=0.02)

    sink = Recorder(busy)
    sender = sender_of(sink)
    offer(sender, piece(0, 2))
    assert sender.flush(5)
    assert sink.rows("r") == [0, 1]
    assert sender.stats().retries == 2
    assert sender.stats().rows_written == 2


def test_retries_end_and_the_run_is_shed_with_the_stores_own_code(sender_of):
    def full(*_):
        raise StorageError("disk full")

    sender = sender_of(Recorder(full), retry_s=0.2)
    offer(sender, piece(0, 2))
    assert sender.flush(5)
    assert sender.stats().shed_by_code == {"storage_error": 1}
    assert sender.stats().retries > 0


@pytest.mark.parametrize(("error", "code"), [(BankNotFound("no bank"), "bank_not_found"), (OSError("wire"), "failed")])
def test_what_retrying_cannot_help_is_shed_at_once_and_other_banks_go_on(sender_of, error, code):
    def missing(bank, *_):
        if bank == "lab/gone":
            raise error

    sink = Recorder(missing)
    sender = sender_of(sink)
    offer(sender, piece(0, 2, run="a", bank="lab/gone"), piece(0, 3, run="b"))
    assert sender.flush(5)
    offer(sender, piece(2, 1, run="a", bank="lab/gone"))
    assert sink.rows("b") == [0, 1, 2]
    stats = sender.stats()
    assert stats.shed_by_code == {code: 1}
    assert (stats.rows_written, stats.rows_shed, stats.retries) == (3, 3, 0)


def test_a_sink_that_cannot_be_opened_sheds_and_does_not_raise():
    def broken():
        raise ConfigError("no such store")

    sender = Sender(broken, ConnectorConfig(store="x", linger_s=0.0))
    offer(sender, piece(0, 2))
    assert sender.flush(5)
    assert sender.stats().shed_by_code == {"config_error": 1}
    sender.close()


def test_closing_writes_what_is_queued_and_closes_the_sink():
    sink = Recorder()
    sender = make(sink, linger_s=0.05)
    offer(sender, piece(0, 4))
    sender.close()
    assert sink.rows("r") == [0, 1, 2, 3]
    assert sink.closed


def test_closing_keeps_its_deadline_and_counts_what_it_drops():
    gate = threading.Event()
    sender = make(Recorder(lambda *_: opened(gate)), flush_s=0.2, batch_bytes=1)
    offer(sender, piece(0, 1), piece(1, 5))
    started = time.monotonic()
    sender.close()
    # flush, closing the sink and joining the thread each wait 0.2 s once; without a deadline none would end
    assert time.monotonic() - started < 10.0
    assert sender.stats().rows_shed == 5
    assert sender.stats().shed_by_code == {"shutdown": 1}


def test_nothing_is_remembered_of_runs_that_have_ended(sender_of):
    sender = sender_of(Recorder(), queue_bytes=2 * ROW_BYTES)
    offer(sender, piece(0, 1), piece(0, 9, run="shed"))
    sender.end(["r", "shed", "unknown"])
    assert sender.flush(5)
    assert sender._runs == {}


def test_banks_that_have_no_rows_are_forgotten(sender_of):
    sender = sender_of(Recorder())
    for i in range(300):
        offer(sender, piece(0, 1, run=f"r{i}", bank=f"lab/b{i}"))
        sender.end([f"r{i}"])
    assert sender.flush(5)
    assert (sender._queues, sender._tasks, sender._runs) == ({}, {}, {})
    # and come back
    offer(sender, piece(0, 2, run="r", bank="lab/b0"))
    assert sender.flush(5)
    assert sender.stats().rows_written == 302


def test_requests_that_are_refused_are_all_counted_and_logged_once_for_each_reason(sender_of, caplog):
    sender = sender_of(Recorder())
    for i in range(1000):
        sender.refuse(f"r{i}", Unauthorized(f"bank 'lab/b{i % 200}' is not among"))
    assert sender.stats().requests_refused == 1000
    assert sum("does not stream" in line for line in caplog.messages) == 64
