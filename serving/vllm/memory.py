"""Memory in the logits: which rows of a step read which banks, with what queries, and how that changes their logits.

Shape legend: R rows with logits, Q consecutive rows of one request, L layers, D width, V vocabulary, k candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from raymem.errors import InvalidInput, RaymemError, Unauthorized
from raymem.lm.trust import Trust, log_gains, weigh
from raymem.logs import WarnOnce, get_logger
from raymem.serving.vllm.params import banks_to_read
from raymem.serving.vllm.vllm_internals import EngineStep
from raymem.types import Readout

if TYPE_CHECKING:
    from raymem.serving.vllm.follower import Follower


log = get_logger("raymem.vllm")
_MOST_MISSING = 64
# rows whose odds are kept: a rejected draft comes again, and rows of a scored prompt come between others
_KEPT = 8
# vLLM drafts one token a step
_MAY_COME_AGAIN = 2


class RequestRows(NamedTuple):
    """Consecutive rows of one request: `places` are their indices among the logits, `start` the first's position."""

    request: int
    places: Tensor
    rows: Tensor
    start: int


@dataclass
class ReadCounters:
    """Rows of logits that a bank was mixed into since the reader was made, and why others were not.

    `requests_refused` counts requests whose banks are malformed, too many, or not among the engine's `read_banks`; they
    run without memory. `missing` counts rows by bank that is not attached, for the first 64 banks.
    """

    rows_mixed: int = 0
    reads: int = 0
    rows_without_bank: int = 0
    rows_failed: int = 0
    requests_refused: int = 0
    missing: dict[str, int] = field(default_factory=dict)


class Belief:
    """One request's trust in one bank: the odds before its last rows, and what each next token would add to them.

    Rows come in pieces, out of order, and a second time after a rejected draft.

    Args:
        candidates: the most tokens of a row that the bank makes likelier than the rest.
    """

    def __init__(self, candidates: int) -> None:
        self._candidates = candidates
        self._odds: dict[int, float] = {}
        self._gains: dict[int, tuple[Tensor, Tensor, float]] = {}

    def logits(self, own_QV: Tensor, mixed_QV: Tensor, start: int, tokens: list[int]) -> Tensor:
        """Log-probabilities `[Q, V]` of both, weighed by the odds before each row; equal rows stay equal.

        Args:
            own_QV: logits without the bank.
            mixed_QV: and with it.
            start: the first row's position.
            tokens: the rows' input tokens, and the one after them if it is known.
        """
        trust, known = Trust(), len(tokens) - 1
        trust.log_odds = self._before(start, tokens[0], trust.log_odds)
        following = torch.tensor(tokens[1:], dtype=torch.int64, device=own_QV.device)
        gains_Q = torch.zeros(len(own_QV), device=own_QV.device)
        gains_Q[:known] = _losses(own_QV[:known], following) - _losses(mixed_QV[:known], following)
        odds_Q = trust.observe(gains_Q)
        late = slice(-_MAY_COME_AGAIN, None)
        self._keep(start + len(own_QV), odds_Q[late], own_QV[late], mixed_QV[late])
        if known == len(own_QV):
            self._put(start + known, trust.log_odds)
        return weigh(own_QV, mixed_QV, odds_Q)

    def _before(self, position: int, token: int, prior: float) -> float:
        """The odds before a row: those of the row before it, updated by the token; else the latest that are known."""
        last = position - 1
        if last in self._odds and last in self._gains:
            tokens_k, gains_k, rest = self._gains[last]
            found = gains_k[tokens_k == token]
            return self._odds[last] + (float(found[0]) if len(found) else rest)
        earlier = [known for known in self._odds if known <= position]
        return self._odds[max(earlier)] if earlier else prior

    def _keep(self, end: int, odds_Q: Tensor, own_QV: Tensor, mixed_QV: Tensor) -> None:
        # every token that is no candidate loses the same share to the bank: its gain is the least one
        gains_QV = log_gains(own_QV, mixed_QV)
        best = gains_QV.topk(min(self._candidates, gains_QV.shape[1]), dim=1)
        rest_Q, positions = gains_QV.amin(1).tolist(), range(end - len(odds_Q), end)
        for row, (position, log_odds) in enumerate(zip(positions, odds_Q.tolist(), strict=True)):
            self._put(position, log_odds)
            self._gains[position] = best.indices[row].cpu(), best.values[row].cpu(), rest_Q[row]

    def _put(self, position: int, log_odds: float) -> None:
        self._odds.pop(position, None)
        self._odds[position] = log_odds
        while len(self._odds) > _KEPT:
            oldest = next(iter(self._odds))
            del self._odds[oldest]
            self._gains.pop(oldest, None)


class MemoryMixer:
    """Mixes attached banks into the logits of the requests that ask for them, and leaves all others unchanged.

    Each request learns for itself how far to trust a bank, from the tokens whose logits vLLM computes.

    Args:
        banks: attached banks by name; may change between steps.
        blend: gets logits `[R, V]` float32 and what a bank answered, and returns new logits.
        request_args: a request's `extra_args`; None when the request has ended.
        allow: gets the banks that a request asks for; raises to refuse them.
        earlier_states: reads a request's states from the cache: (request index, start, stop) -> `[n, L, D]`.
        neighbours: how many candidates are asked of a bank.
    """

    def __init__(
        self,
        banks: Mapping[str, Follower],
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
        self._once = WarnOnce(log)
        self.counters = ReadCounters()

    def change(self, step: EngineStep, rows_R: Tensor, logits_RV: Tensor) -> Tensor:
        """Return the logits to use: the very same tensor when no request of these rows reads."""
        mixed = logits_RV
        self._forget_finished(step)
        for part, names in self._readers(step, rows_R):
            for name in names:
                bank = self._banks.get(name)
                if bank is None or not bank.live:
                    self._miss(name, len(part.places))
                    continue
                if mixed is logits_RV:
                    # vLLM's sampler does the same next: rows that don't read keep their values bit for bit
                    mixed = logits_RV.to(torch.float32, copy=True)
                self._mix(mixed, part, name, bank, step)
        return mixed

    def _readers(self, step: EngineStep, rows_R: Tensor) -> list[tuple[RequestRows, tuple[str, ...]]]:
        owners_R = torch.searchsorted(torch.tensor(step.starts[1:]), rows_R, right=True)
        found = []
        for request in torch.unique(owners_R).tolist():
            names = self._asked_by(step.requests[request]) if request < len(step.requests) else ()
            if names:
                places = (owners_R == request).nonzero()[:, 0]
                rows = rows_R[places]
                found.append((RequestRows(request, places, rows, int(step.positions_T[rows[0]])), names))
        return found

    def _asked_by(self, request: str) -> tuple[str, ...]:
        # looked up once, not in every step
        if request not in self._asked:
            banks: tuple[str, ...] = ()
            try:
                banks = banks_to_read(self._request_args(request))
                self._allow(banks)
            except (InvalidInput, Unauthorized) as error:
                self._once.warn((error.code, str(error)), "request reads no memory", request=request, reason=str(error))
                self.counters.requests_refused += 1
                banks = ()
            self._asked[request] = banks
        return self._asked[request]

    def _mix(self, logits_RV: Tensor, part: RequestRows, name: str, bank: Follower, step: EngineStep) -> None:
        try:
            states_QLD, start = self._queries(part, bank.window, step)
            answer = last(bank.read(states_QLD, self._neighbours, start), len(part.places))
            own_QV = logits_RV[part.places]
            mixed_QV = self._blend(own_QV, answer)
            logits_RV[part.places] = self._weigh(own_QV, mixed_QV, part, name, step)
        except RaymemError as error:
            # a request whose memory fails runs on without it
            self._once.warn((name, error.code), "read failed", bank=name, code=error.code, reason=str(error))
            self.counters.rows_failed += len(part.places)
            return
        self.counters.reads += 1
        self.counters.rows_mixed += len(part.places)

    def _weigh(self, own_QV: Tensor, mixed_QV: Tensor, part: RequestRows, name: str, step: EngineStep) -> Tensor:
        if step.tokens_T is None:
            return mixed_QV
        first, stop = int(part.rows[0]), step.starts[part.request + 1]
        tokens = step.tokens_T[first : min(first + len(part.rows) + 1, stop)].tolist()
        beliefs = self._beliefs.setdefault(step.requests[part.request], {})
        return beliefs.setdefault(name, Belief(self._neighbours)).logits(own_QV, mixed_QV, part.start, tokens)

    def _forget_finished(self, step: EngineStep) -> None:
        # a preempted request is in no step for a while, and comes back
        for request in self._asked.keys() - set(step.requests):
            if self._request_args(request) is None:
                del self._asked[request]
                self._beliefs.pop(request, None)

    def _queries(self, part: RequestRows, window: int, step: EngineStep) -> tuple[Tensor, int]:
        """Return these rows' states, after those that the first row's key window reaches back to."""
        states_RLD = step.states_RLD(part.rows)
        start = max(0, part.start - window + 1)
        if start == part.start:
            return states_RLD, part.start
        first_row, first_position = step.starts[part.request], int(step.positions_T[step.starts[part.request]])
        parts = [states_RLD]
        if part.start > first_position:
            inside = max(start, first_position)
            rows = torch.arange(first_row + inside - first_position, first_row + part.start - first_position)
            parts.insert(0, step.states_RLD(rows))
        if start < first_position:
            earlier = self._earlier_states(part.request, start, min(part.start, first_position))
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


def _losses(logits_QV: Tensor, following_Q: Tensor) -> Tensor:
    return cross_entropy(logits_QV.float(), following_Q, reduction="none")
