"""Memory in the logits: which rows of a step read which banks, with what queries, and what becomes of their logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from raymem.errors import InvalidInput, RaymemError, Unauthorized
from raymem.serving.vllm.belief import Belief
from raymem.serving.vllm.once import Once
from raymem.serving.vllm.params import banks_to_read
from raymem.types import Readout


class Bank(Protocol):
    """What is asked of an attached bank."""

    @property
    def live(self) -> bool: ...

    @property
    def window(self) -> int: ...

    def read(self, hidden_QLD: Tensor, k: int, start: int) -> Readout: ...


class Step(Protocol):
    """What is asked of a step, see `vllm_internals.Step`."""

    requests: list[str]
    starts: list[int]
    tokens_T: Tensor | None
    positions_T: Tensor

    def states_RLD(self, rows_R: Tensor) -> Tensor: ...


class Span(NamedTuple):
    """Consecutive rows of one request: `places` are their indices among the logits, `start` the first's position."""

    request: int
    places: Tensor
    rows: Tensor
    start: int


_MOST_MISSING = 64


@dataclass
class ReadCounters:
    """Since the reader was made: rows of logits that a bank was mixed into, and why others were not.

    `requests_refused` asked for banks in a way that can't be followed, for too many, or for one that the engine's
    `read_banks` does not name; they go on without memory. `missing` counts rows by bank, for the first 64 banks.
    """

    rows_mixed: int = 0
    reads: int = 0
    rows_without_bank: int = 0
    rows_failed: int = 0
    requests_refused: int = 0
    missing: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the counters as plain data."""
        return asdict(self)


class MemoryMixer:
    """Mixes attached banks into the logits of the requests that ask for them, and touches no others.

    How much a bank counts is learned by each request for itself, from the tokens whose logits vLLM computes.

    Args:
        banks: attached banks by name; may change between steps.
        blend: gets logits `[R, V]` float32 and what a bank answered, and returns new logits.
        request_args: a request's `extra_args`; None when there is no such request any more.
        allow: gets the banks that a request asks for; raises to refuse them.
        earlier_states: a request's states from the cache: (request index, start, stop) -> `[n, L, D]`.
        neighbours: how many candidates are asked of a bank.
    """

    def __init__(
        self,
        banks: Mapping[str, Bank],
        blend: Callable[[Tensor, Readout], Tensor],
        request_args: Callable[[str], Any],
        earlier_states: Callable[[int, int, int], Tensor],
        *,
        allow: Callable[[tuple[str, ...]], None] = lambda _banks: None,
        neighbours: int = 32,
    ) -> None:
        self._banks = banks
        self._blend = blend
        self._request_args = request_args
        self._earlier_states = earlier_states
        self._allow = allow
        self._neighbours = neighbours
        self._asked: dict[str, tuple[str, ...]] = {}
        self._beliefs: dict[str, dict[str, Belief]] = {}
        self._once = Once()
        self.counters = ReadCounters()

    def change(self, step: Step, rows_R: Tensor, logits_RV: Tensor) -> Tensor:
        """Return the logits to use: the very same tensor when no request of these rows reads."""
        mixed = logits_RV
        self._forget_finished(step)
        for span, names in self._readers(step, rows_R):
            for name in names:
                bank = self._banks.get(name)
                if bank is None or not bank.live:
                    self._miss(name, len(span.places))
                    continue
                if mixed is logits_RV:
                    # vLLM's sampler does the same next: rows that don't read keep their values bit for bit
                    mixed = logits_RV.to(torch.float32, copy=True)
                self._mix(mixed, span, name, bank, step)
        return mixed

    def _readers(self, step: Step, rows_R: Tensor) -> list[tuple[Span, tuple[str, ...]]]:
        owners_R = torch.searchsorted(torch.tensor(step.starts[1:]), rows_R, right=True)
        found = []
        for request in torch.unique(owners_R).tolist():
            names = self._asked_by(step.requests[request]) if request < len(step.requests) else ()
            if names:
                found.append((self._span(step, rows_R, owners_R, request), names))
        return found

    def _asked_by(self, request: str) -> tuple[str, ...]:
        # found out once, not in every step
        if request not in self._asked:
            self._asked[request] = self._wanted(request)
        return self._asked[request]

    def _wanted(self, request: str) -> tuple[str, ...]:
        try:
            banks = banks_to_read(self._request_args(request))
            self._allow(banks)
        except (InvalidInput, Unauthorized) as error:
            self._once.warn((error.code, str(error)), "request reads no memory", request=request, reason=str(error))
            self.counters.requests_refused += 1
            return ()
        return banks

    @staticmethod
    def _span(step: Step, rows_R: Tensor, owners_R: Tensor, request: int) -> Span:
        places = (owners_R == request).nonzero()[:, 0]
        rows = rows_R[places]
        return Span(request, places, rows, int(step.positions_T[rows[0]]))

    def _mix(self, logits_RV: Tensor, span: Span, name: str, bank: Bank, step: Step) -> None:
        try:
            states_QLD, start = self._queries(span, bank.window, step)
            answer = last(bank.read(states_QLD, self._neighbours, start), len(span.places))
            own_QV = logits_RV[span.places]
            mixed_QV = self._blend(own_QV, answer)
            logits_RV[span.places] = self._weigh(own_QV, mixed_QV, span, name, step)
        except RaymemError as error:
            # a request whose memory fails goes on without it
            self._once.warn((name, error.code), "read failed", bank=name, code=error.code, reason=str(error))
            self.counters.rows_failed += len(span.places)
            return
        self.counters.reads += 1
        self.counters.rows_mixed += len(span.places)

    def _weigh(self, own_QV: Tensor, mixed_QV: Tensor, span: Span, name: str, step: Step) -> Tensor:
        if step.tokens_T is None:
            return mixed_QV
        first, stop = int(span.rows[0]), step.starts[span.request + 1]
        tokens = step.tokens_T[first : min(first + len(span.rows) + 1, stop)].tolist()
        beliefs = self._beliefs.setdefault(step.requests[span.request], {})
        return beliefs.setdefault(name, Belief(self._neighbours)).logits(own_QV, mixed_QV, span.start, tokens)

    def _forget_finished(self, step: Step) -> None:
        # one that was preempted is in no step for a while, and comes back
        for request in self._asked.keys() - set(step.requests):
            if self._request_args(request) is None:
                del self._asked[request]
                self._beliefs.pop(request, None)

    def _queries(self, span: Span, window: int, step: Step) -> tuple[Tensor, int]:
        """Return the span's states, led by those that the first one's window reaches back to."""
        states_RLD = step.states_RLD(span.rows)
        start = max(0, span.start - window + 1)
        if start == span.start:
            return states_RLD, span.start
        first_row, first_position = step.starts[span.request], int(step.positions_T[step.starts[span.request]])
        parts = [states_RLD]
        if span.start > first_position:
            inside = max(start, first_position)
            rows = torch.arange(first_row + inside - first_position, first_row + span.start - first_position)
            parts.insert(0, step.states_RLD(rows))
        if start < first_position:
            earlier = self._earlier_states(span.request, start, min(span.start, first_position))
            parts.insert(0, earlier.to(states_RLD))
        return torch.cat(parts), start

    def _miss(self, name: str, rows: int) -> None:
        self._once.warn((name,), "bank is not attached here: requests go on without it", bank=name)
        self.counters.rows_without_bank += rows
        if name in self.counters.missing or len(self.counters.missing) < _MOST_MISSING:
            self.counters.missing[name] = self.counters.missing.get(name, 0) + rows


def last(readout: Readout, queries: int) -> Readout:
    """Return the answers to the last so many queries."""
    if len(readout.relevance_Q) == queries:
        return readout
    tensors = {name: value[-queries:] for name, value in vars(readout).items() if isinstance(value, Tensor)}
    return Readout(**(vars(readout) | tensors))
