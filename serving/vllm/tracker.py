"""Tracks, on the scheduler's side, which rows of which requests lie in the paged cache and have not been sent.

A row is sent in the step that computes it, unless its token is a draft. A draft's row is sent a step later, when the
scheduler has accepted the token, and never when it has rejected it. Positions count from the request's first token, so
a preempted request that computes its rows again sends only those that had not been sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from raymem.serving.vllm.params import Target


class Request(Protocol):
    """What the tracker reads of vLLM's `Request`."""

    request_id: str
    num_computed_tokens: int
    num_prompt_tokens: int
    all_token_ids: Sequence[int]

    @property
    def num_tokens(self) -> int:
        """Tokens known: the prompt and what was sampled and accepted."""


@dataclass(frozen=True)
class RunSlice:
    """Consecutive rows of one run: row `seq + i`, of token `tokens[i]`, lies in slot `slots[i]` of the paged cache."""

    bank: str
    stream: str
    run: str
    seq: int
    tokens: list[int]
    slots: list[int]


@dataclass
class _TrackedRun:
    request: Request
    target: Target
    # tokens before the prompt that no state is computed for
    before: int = 0
    sent: int = 0
    blocks: list[int] = field(default_factory=list)


class Tracker:
    """Tracks every opted-in request through chunked prefill, prefix-cache hits, decoding, preemption and its end."""

    def __init__(self, group: int, block_size: int) -> None:
        self._group = group
        self._block_size = block_size
        self._runs: dict[str, _TrackedRun] = {}
        self._ended: list[RunSlice] = []

    def admit(self, request: Request, target: Target, before: int = 0) -> None:
        """Track a request from now on, whose first `before` tokens are rows of memory and not its own."""
        self._runs[request.request_id] = _TrackedRun(request, target, before, sent=before)

    def step(self, scheduled: Any) -> list[RunSlice]:
        """List the rows that will stay in the cache when this `SchedulerOutput` has run."""
        computed = self._update_blocks(scheduled)
        slices, self._ended = self._ended, []
        for request_id, start in computed.items():
            run = self._runs[request_id]
            end = min(start + scheduled.num_scheduled_tokens.get(request_id, 0), run.request.num_tokens)
            slices += self._take(run, end)
        return slices

    def finish(self, request: Request) -> bool:
        """End a run; True when rows are left, so that its blocks must stay until the next step has run."""
        run = self._runs.pop(request.request_id, None)
        if run is None:
            return False
        # the last sampled token was never an input, so it has no row; an aborted request may have sampled none
        known = max(request.num_prompt_tokens, request.num_tokens - 1)
        left = self._take(run, min(request.num_computed_tokens, known))
        self._ended += left
        return bool(left)

    def _update_blocks(self, scheduled: Any) -> dict[str, int]:
        """Bring the block tables up to date; return how many tokens each run had computed before this step."""
        computed: dict[str, int] = {}
        for new in scheduled.scheduled_new_reqs:
            if run := self._runs.get(new.req_id):
                run.blocks = list(new.block_ids[self._group])
                computed[new.req_id] = new.num_computed_tokens
        cached = scheduled.scheduled_cached_reqs
        for request_id, blocks, start in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            if run := self._runs.get(request_id):
                added = [] if blocks is None else list(blocks[self._group])
                # after a preemption vLLM sends the whole table again
                run.blocks = added if request_id in cached.resumed_req_ids else run.blocks + added
                computed[request_id] = start
        return computed

    def _take(self, run: _TrackedRun, end: int) -> list[RunSlice]:
        start, size = run.sent, self._block_size
        if end <= start:
            return []
        run.sent = end
        slots = [run.blocks[row // size] * size + row % size for row in range(start, end)]
        tokens = list(run.request.all_token_ids[start:end])
        seq = start - run.before
        return [RunSlice(run.target.bank, run.target.stream, run.request.request_id, seq, tokens, slots)]
