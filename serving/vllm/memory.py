"""Memory in the logits: which rows of a step read which banks, with what queries, and how that changes their logits.

Shape legend: R rows with logits, Q consecutive rows of one request, L layers, D width, V vocabulary, k candidates.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from raymem.encode.keys import ContextRows
from raymem.errors import InvalidInput, RaymemError, Unauthorized
from raymem.lm.mixing import Mixture
from raymem.lm.trust import Trust
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
    banks: tuple[str, ...]


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
    """

    def __init__(self) -> None:
        self._odds: dict[int, float] = {}
        self._gains: dict[int, tuple[dict[int, float], float]] = {}

    def odds(self, found: Mixture, rows_F: Tensor, start: int, tokens: list[int], count: int) -> Tensor:
        """Log-odds `[F]` of the bank before each row that it answered.

        Args:
            found: the bank's mixture, of F of the rows.
            rows_F: which of them those are, ascending.
            start: the first row's position.
            tokens: the rows' input tokens, and the one after them if it is known.
            count: how many rows.
        """
        trust, known, gains = Trust(), len(tokens) - 1, torch.zeros(count)
        trust.log_odds = self._before(start, tokens[0], trust.log_odds)
        if followed := int((rows_F < known).sum()):
            first = rows_F[:followed].cpu()
            following = torch.tensor(tokens[1:])[first].to(found.tokens_Qk.device)
            gains[first] = found.of(slice(followed)).gains_of(following).cpu()
        odds_Q = trust.observe(gains)
        self._keep(start, odds_Q.tolist(), found.of(slice(-_MAY_COME_AGAIN, None)), rows_F[-_MAY_COME_AGAIN:].tolist())
        if known == count:
            self._put(start + known, trust.log_odds)
        return odds_Q[rows_F.cpu()].to(found.rest_Q.device)

    def _before(self, position: int, token: int, prior: float) -> float:
        """The odds before a row: those of the row before it, updated by the token; else the latest that are known."""
        last = position - 1
        if last in self._odds and last in self._gains:
            gains, rest = self._gains[last]
            return self._odds[last] + gains.get(token, rest)
        earlier = [known for known in self._odds if known <= position]
        return self._odds[max(earlier)] if earlier else prior

    def _keep(self, start: int, odds: list[float], found: Mixture, rows: list[int]) -> None:
        columns = [column.tolist() for column in (found.tokens_Qk, found.gains(), found.rest_Q)]
        answers = dict(zip(rows, zip(*columns, strict=True), strict=True))
        for row in range(max(0, len(odds) - _MAY_COME_AGAIN), len(odds)):
            self._put(start + row, odds[row])
            tokens, gains, rest = answers.get(row, ((), (), 0.0))
            self._gains[start + row] = dict(zip(tokens, gains, strict=True)), rest

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
        blend: gets logits `[R, V]` float32 and what a bank answered; returns None where it changes nothing.
        request_args: a request's `extra_args`; None when the request has ended.
        allow: gets the banks that a request asks for; raises to refuse them.
        earlier_states: reads a request's states from the cache: (request index, start, stop) -> `[n, L, D]`.
        neighbours: how many candidates are asked of a bank.
    """

    def __init__(
        self,
        banks: Mapping[str, Follower],
        blend: Callable[[Tensor, Readout], Mixture | None],
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
        readers = self._readers(step, rows_R)
        # each request's banks one after the other, and each bank once for all requests whose turn it is
        for turn in range(max((len(part.banks) for part in readers), default=0)):
            for name, parts in _by_bank(readers, turn).items():
                bank = self._banks.get(name)
                if bank is None or not bank.live:
                    self._miss(name, sum(len(part.places) for part in parts))
                    continue
                if mixed is logits_RV:
                    # vLLM's sampler does the same next: rows that don't read keep their values bit for bit
                    mixed = logits_RV.to(torch.float32, copy=True)
                self._mix(mixed, parts, name, bank, step)
        return mixed

    def _readers(self, step: EngineStep, rows_R: Tensor) -> list[RequestRows]:
        owners_R = torch.searchsorted(torch.tensor(step.starts[1:]), rows_R, right=True)
        found = []
        for request in torch.unique(owners_R).tolist():
            banks = self._asked_by(step.requests[request]) if request < len(step.requests) else ()
            if banks:
                places = (owners_R == request).nonzero()[:, 0]
                rows = rows_R[places]
                found.append(RequestRows(request, places, rows, int(step.positions_T[rows[0]]), banks))
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

    def _mix(self, logits_RV: Tensor, parts: list[RequestRows], name: str, bank: Follower, step: EngineStep) -> None:
        """Change the logits of some requests' rows in place, after one search for all of them."""
        try:
            answer = bank.read([self._queries(part, bank.window, step) for part in parts], self._neighbours)
            places_Q = torch.cat([part.places for part in parts])
            found = self._blend(logits_RV[places_Q], answer)
            if found is not None:
                found = self._weigh(found, parts, name, step)
                replace(found, rows_Q=places_Q.to(found.rows_Q.device)[found.rows_Q]).put(logits_RV)
        except RaymemError as error:
            if len(parts) > 1:
                # one request's states may be what failed
                for part in parts:
                    self._mix(logits_RV, [part], name, bank, step)
                return
            # a request whose memory fails runs on without it
            self._once.warn((name, error.code), "read failed", bank=name, code=error.code, reason=str(error))
            self.counters.rows_failed += len(parts[0].places)
            return
        self.counters.reads += len(parts)
        self.counters.rows_mixed += len(places_Q)

    def _weigh(self, found: Mixture, parts: list[RequestRows], name: str, step: EngineStep) -> Mixture:
        """Weigh each request's rows by what it has learned of the bank."""
        if step.tokens_T is None:
            return found
        counts = [len(part.places) for part in parts]
        firsts = [0, *accumulate(counts)]
        bounds = torch.searchsorted(found.rows_Q.cpu(), torch.tensor(firsts)).tolist()
        odds = []
        for part, count, first, (start, stop) in zip(parts, counts, firsts, pairwise(bounds), strict=False):
            begins, ends = int(part.rows[0]), step.starts[part.request + 1]
            tokens = step.tokens_T[begins : min(begins + count + 1, ends)].tolist()
            belief = self._beliefs.setdefault(step.requests[part.request], {}).setdefault(name, Belief())
            rows = slice(start, stop)
            odds.append(belief.odds(found.of(rows), found.rows_Q[rows] - first, part.start, tokens, count))
        return found.weighed(torch.cat(odds))

    def _forget_finished(self, step: EngineStep) -> None:
        # a preempted request is in no step for a while, and comes back
        for request in self._asked.keys() - set(step.requests):
            if self._request_args(request) is None:
                del self._asked[request]
                self._beliefs.pop(request, None)

    def _queries(self, part: RequestRows, window: int, step: EngineStep) -> ContextRows:
        """Return these rows' states, after those that the first row's key window reaches back to."""
        states_RLD = step.states_RLD(part.rows)
        start = max(0, part.start - window + 1)
        if start == part.start:
            return ContextRows(states_RLD, start, len(states_RLD))
        first_row, first_position = step.starts[part.request], int(step.positions_T[step.starts[part.request]])
        parts = [states_RLD]
        if part.start > first_position:
            inside = max(start, first_position)
            rows = torch.arange(first_row + inside - first_position, first_row + part.start - first_position)
            parts.insert(0, step.states_RLD(rows))
        if start < first_position:
            earlier = self._earlier_states(part.request, start, min(part.start, first_position))
            parts.insert(0, earlier.to(states_RLD))
        return ContextRows(torch.cat(parts), start, len(states_RLD))

    def _miss(self, name: str, rows: int) -> None:
        self._once.warn((name,), "bank is not attached here: requests go on without it", bank=name)
        self.counters.rows_without_bank += rows
        if name in self.counters.missing or len(self.counters.missing) < _MOST_MISSING:
            self.counters.missing[name] = self.counters.missing.get(name, 0) + rows


def _by_bank(readers: list[RequestRows], turn: int) -> dict[str, list[RequestRows]]:
    """The requests that have a bank in this place of their lists, by bank."""
    found: defaultdict[str, list[RequestRows]] = defaultdict(list)
    for part in readers:
        if turn < len(part.banks):
            found[part.banks[turn]].append(part)
    return found
