"""Attended memory beside the scheduler: which rows stand before a request's prompt, and what workers do for it.

A request that attends to N rows begins with N tokens that nothing is computed for: their blocks are claimed as if they
came from another cache, and workers fill them with rows. So attention, sampling, graphs and prefix caching stay as
they are. Its blocks are found again in the prefix cache only by requests with the same rows: the salt says which.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from typing import Any

from raymem.errors import InvalidInput, RaymemError
from raymem.logs import WarnOnce, get_logger
from raymem.serving.vllm import vllm_internals
from raymem.serving.vllm.orders import Order, listed, order_of
from raymem.serving.vllm.params import Attending, ConnectorConfig, Target, banks_to_attend
from raymem.serving.vllm.row_index import Chosen, RowIndex
from raymem.serving.vllm.row_store import Capture, Fill, Load
from raymem.serving.vllm.tracker import Tracker

log = get_logger("raymem.vllm")
# the question that rows are chosen for: the last so many tokens
_QUESTION = 128


@dataclass
class AttendCounters:
    """What requests attended to since the engine started."""

    requests_attended: int = 0
    rows_attended: int = 0
    choices_renewed: int = 0
    attends_refused: int = 0


@dataclass
class AttendStep:
    """What the workers do with rows in one step; `begun` are requests by how many rows stand before their prompt."""

    captures: list[Capture] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    begun: dict[str, int] = field(default_factory=dict)


@dataclass
class _Attended:
    """A request that attends: `asked_at` tokens were known when its rows were chosen, `blocks` hold them."""

    request: Any
    wish: Attending
    rows: Chosen
    asked_at: int
    # its blocks are no other's: they are changed while it runs, or its prompt is scored whole
    private: bool
    blocks: list[int] = field(default_factory=list)
    # the first position that workers have to fill; None when all are
    fill_from: int | None = None
    preemptions: int = 0

    @property
    def id(self) -> str:
        return str(self.request.request_id)


@dataclass
class _Captured:
    """A request whose rows are kept: `places` are their numbers in the chunk by their index among its tokens."""

    chunk: int
    order: Order
    places: dict[int, int]
    whole: bool = False


class Attender:
    """Claims and fills blocks for requests that attend to banks, and has workers keep the rows of attached ones.

    Args:
        config: which banks requests may attend to.
        index: what the workers keep.
        group: where the attention layers' keys and values lie in the paged cache, or why nothing can be attended.
        longest: the most tokens of a request.
        secret: what orders are signed with.
        scores: whether prompts can be scored behind rows.
        follow: called when rows come; begins to watch their stores.
    """

    def __init__(
        self,
        config: ConnectorConfig,
        index: RowIndex,
        group: vllm_internals.AttentionGroup | RaymemError,
        *,
        longest: int,
        secret: str,
        scores: bool,
        follow: Callable[[], None],
    ) -> None:
        self._config = config
        self._index = index
        self._refusal = group if isinstance(group, RaymemError) else None
        self._group, self._size = (0, 1) if isinstance(group, RaymemError) else (group.number, group.block_size)
        self._longest = longest
        self.secret = secret
        self._scores = scores
        self._follow = follow
        self._attended: dict[str, _Attended] = {}
        self._captured: dict[str, _Captured] = {}
        self._loads: list[Load] = []
        self._tracker = Tracker(self._group, self._size)
        self._begun: dict[str, int] = {}
        self._answers: dict[str, dict[str, Any]] = {}
        self._once = WarnOnce(log)
        self.counters = AttendCounters()

    def admit(self, request: Any) -> int:
        """Take in a new request that attends, or carries an order; return how many rows stand before its prompt."""
        wish: Attending | None = None
        try:
            order = order_of(request.kv_transfer_params, request.prompt_token_ids, self.secret)
            wish = None if order else banks_to_attend(request.kv_transfer_params)
            if (order or wish) and self._refusal:
                raise self._refusal
            if order:
                self._obey(request, order)
            elif wish:
                return self._attend(request, wish)
        except RaymemError as error:
            self._once.warn((error.code, error.message), "request attends to nothing", reason=error.message)
            self.counters.attends_refused += 1
            self._answers[request.request_id] = {"refused": error.message, "code": error.code}
            if wish is not None and wish.required:
                vllm_internals.end_at_once(request)
        return 0

    def claimed(self, request: Any, computed: int) -> int | None:
        """Tokens that come from memory, after so many from the prefix cache; None to be asked again."""
        found = self._attended.get(request.request_id)
        if found is None:
            return 0
        if found.private and request.num_preemptions > found.preemptions:
            # what it left in the prefix cache has been changed since
            found.preemptions = request.num_preemptions
            self._salt(found)
            return None
        return max(0, len(found.rows) - computed)

    def allocated(self, request: Any, block_ids: tuple[list[int], ...], loaded: int) -> None:
        """Note the blocks of a request that is about to run."""
        if found := self._attended.get(request.request_id):
            found.blocks = block_ids[self._group][: -(-len(found.rows) // self._size)]
            first = len(found.rows) - loaded if loaded else None
            # rows that went while it was preempted are in what it finds in the prefix cache
            found.fill_from = first if found.fill_from is None else found.fill_from
            self._begun[found.id] = len(found.rows)

    def step(self, scheduled: Any) -> AttendStep:
        """What workers do in a step."""
        dropped = self._index.take_dropped()
        running = scheduled.num_scheduled_tokens
        for found in self._attended.values():
            if dropped:
                self._replace(found, dropped)
            if found.wish.refresh and found.id in running and found.fill_from is None:
                self._renew(found)
        fills = [self._fill(found) for found in self._attended.values() if found.id in running]
        begun, self._begun = self._begun, {}
        loads, self._loads = self._loads, []
        return AttendStep(self._captures(scheduled), loads, [fill for fill in fills if fill], dropped, begun)

    def lose(self, chunks: Collection[int]) -> None:
        """Attend no longer to chunks that some worker hasn't got."""
        self._index.drop(chunks)

    def finish(self, request: Any) -> dict[str, Any] | None:
        """End a request; what its output says about it."""
        self._tracker.finish(request)
        self._attended.pop(request.request_id, None)
        captured = self._captured.pop(request.request_id, None)
        answer = self._answers.pop(request.request_id, None)
        if captured is not None and not captured.whole:
            self._index.drop([captured.chunk])
            answer = {"refused": "the request ended before its rows were kept", "code": "unavailable"}
        return None if answer is None else {"raymem": answer}

    def _obey(self, request: Any, order: Order) -> None:
        if order.do == "release":
            self._answers[request.request_id] = {"released": self._index.release(order.bank)}
            return
        load = order.do in ("load", "replace")
        at = listed(order.at)
        chunk = self._index.open(order, order.tokens if load else [request.prompt_token_ids[place] for place in at])
        self._follow()
        if load:
            # rows that were made of others are at no position
            pos = order.pos if order.do == "load" else []
            self._loads.append(Load(order.id, pos, chunk, order.staged))
            self._index.complete(chunk)
            self._answers[request.request_id] = {"loaded": len(order.tokens)}
            return
        # what comes from the prefix cache passes no layer
        request.skip_reading_prefix_cache = True
        places = {index: place for place, index in enumerate(at)}
        self._captured[request.request_id] = _Captured(chunk, order, places)
        self._tracker.admit(request, Target(order.bank, order.bank))
        self._answers[request.request_id] = {"captured": len(places)}

    def _attend(self, request: Any, wish: Attending) -> int:
        self._config.check_attends(wish.banks)
        vllm_internals.require_plain(request)
        if request.sampling_params.prompt_logprobs is not None and not self._scores:
            raise InvalidInput(
                "prompt_logprobs of a request that attends need vLLM's V1 model runner: start the engine with "
                "VLLM_USE_V2_MODEL_RUNNER=0, or leave them out"
            )
        left = self._longest - request.num_tokens
        # vLLM's servers ask for all that is left where a caller names no length: rows take half of it at most
        room = max(left - request.max_tokens, left // 2)
        if room < 1:
            raise InvalidInput(
                f"a prompt of {request.num_tokens} tokens leaves no room for rows in {self._longest}: shorten it"
            )
        question = list(request.all_token_ids[-_QUESTION:])
        rows = self._index.choose(wish.banks, min(wish.rows, room), question)
        answer = {"banks": list(wish.banks), "rows": len(rows), "relevance": round(rows.relevance, 4)}
        self._answers[request.request_id] = {"attended": answer}
        if not len(rows):
            return 0
        private = bool(wish.refresh) or request.skip_reading_prefix_cache
        found = _Attended(request, wish, rows, request.num_tokens + len(rows), private)
        vllm_internals.put_before(request, rows.tokens)
        # its salt is its own: there is nothing to find, and vLLM claims nothing for a request that doesn't look
        request.skip_reading_prefix_cache = False
        self._salt(found)
        self._attended[found.id] = found
        self.counters.requests_attended += 1
        self.counters.rows_attended += len(rows)
        return len(rows)

    def _salt(self, found: _Attended) -> None:
        given = found.request.cache_salt or ""
        key = uuid.uuid4().hex if found.private else found.rows.key
        # events of the cache publish it
        salt = hashlib.sha256(json.dumps([self.secret, key, given]).encode()).hexdigest()
        vllm_internals.set_salt(found.request, f"raymem {salt}")

    def _replace(self, found: _Attended, dropped: Collection[int]) -> None:
        """Put other rows in the place of those that are gone."""
        if set(dropped).isdisjoint(found.rows.chunks):
            return
        found.rows = found.rows.without(set(dropped))
        if found.blocks:
            found.fill_from = 0
        else:
            self._salt(found)

    def _renew(self, found: _Attended) -> None:
        """Choose rows for what was generated since the last time."""
        known = found.request.num_tokens
        if known - found.asked_at < found.wish.refresh:
            return
        found.asked_at = known
        question = list(found.request.all_token_ids[max(len(found.rows), known - _QUESTION) :])
        try:
            rows = self._index.choose(found.wish.banks, len(found.rows), question)
        except RaymemError as error:
            self._once.warn((error.code, error.message), "rows are not chosen anew", reason=error.message)
            return
        if len(rows) == len(found.rows) and rows.key != found.rows.key:
            found.rows, found.fill_from = rows, 0
            self.counters.choices_renewed += 1

    def _fill(self, found: _Attended) -> Fill | None:
        first, found.fill_from = found.fill_from, None
        if first is None:
            return None
        slots = [found.blocks[at // self._size] * self._size + at % self._size for at in range(first, len(found.rows))]
        return Fill(found.id, first, slots, found.rows.chunks[first:], found.rows.offsets[first:])

    def _captures(self, scheduled: Any) -> list[Capture]:
        found = []
        for part in self._tracker.step(scheduled):
            captured = self._captured.get(part.run)
            if captured is None:
                continue
            if not self._index.has(captured.chunk):
                # rows of it were erased, or attached again, since its pass began
                del self._captured[part.run]
                reason = f"rows of bank {captured.order.bank!r} changed while they were computed: attach it again"
                self._answers[part.run] = {"refused": reason, "code": "unavailable"}
                continue
            order, places = captured.order, captured.places
            at = [place for place in range(part.seq, part.seq + len(part.slots)) if place in places]
            if not at:
                continue
            slots = [part.slots[place - part.seq] for place in at]
            found.append(Capture(order.id, order.pos, captured.chunk, len(places), places[at[0]], at, slots))
            if places[at[-1]] == len(places) - 1:
                captured.whole = True
                self._index.complete(captured.chunk)
        return found

    def stats(self) -> dict[str, int]:
        """The counters."""
        return asdict(self.counters)
