"""Fitting a keep policy: keep the blocks that later rows will ask for, and no more than the budget says.

Chang and Ma 2021 (arXiv 2110.04821) train the policy with the model; here the model is frozen, and the policy is
trained for the memory's own prediction of later tokens. Gates are drawn; the straight-through estimator gives their
gradient.

Shape legend: `B` streams, `G` blocks, `S` rows of a block, `M` rows that it becomes, `m` tokens of such a row, `Q`
queries, `K` key width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from raymem.errors import InvalidInput
from raymem.memory import build
from raymem.memory.base import Memory
from raymem.memory.dct import Dct, KeepPolicy, budget_penalty, gated_attention, straight_through
from raymem.memory.learned import of_memory
from raymem.train.data import Lessons, hits, part_of, windows
from raymem.train.loop import Task, weights_of

_BLOCKS, _QUERIES, _BATCH = 32, 64, 8
_PENALTY = 5.0
_UNKNOWN = 1e-4
# the share of the rows that there are fine and coarse slots for where policies are compared
_ROOM = 32
_LEAST_ROOM = 8
# rows on which the threshold is set
_ROWS = 2048


class Stream(NamedTuple):
    """Blocks that leave the fine rows one after another, and rows that come later.

    `rows_BGSK` and `made_BGMK` unit, `tokens_BGS`, `made_tokens_BGMm`, `long_BG` mean length of the blocks' vectors or
    None, `queries_BQK` unit, `asked_BQ` their next tokens.
    """

    rows_BGSK: Tensor
    tokens_BGS: Tensor
    made_BGMK: Tensor
    made_tokens_BGMm: Tensor
    long_BG: Tensor | None
    queries_BQK: Tensor
    asked_BQ: Tensor


class DctTask(Task):
    """The network of the `learned` policy.

    Args:
        memory: of policy "learned".
        lessons: rows.
        keep_rate: the share of blocks to aim at.
    """

    metric = "next token among the best 8 candidates, memories with room for a part of the rows; higher is better"

    def __init__(self, memory: Memory, lessons: Lessons, keep_rate: float = 0.5) -> None:
        self.memory, self.lessons, self.keep_rate = cast(Dct, memory), lessons, keep_rate
        if self.memory.compress.wants_use:
            raise InvalidInput(
                "a keep policy is trained on blocks whose compression depends on them alone, and that of "
                "compressor='most_used' goes by attention: name a bank with another compressor"
            )
        self._keys_NK = normalize(self.memory.project(lessons.rows.keys_NK), dim=-1)
        self._block = self.memory.block

    def weights(self) -> dict[str, Tensor]:
        """See Task; a convolution is left as it is, training it is compressive's."""
        return {name: w for name, w in weights_of(self.memory).items() if name.startswith("policy.")}

    def loss(self, generator: torch.Generator) -> Tensor:
        """See Task."""
        length = _BLOCKS * self._block
        starts = torch.randint(max(1, self.lessons.split - length - _QUERIES + 1), (_BATCH,), generator=generator)
        stream = self._stream(starts)
        noise_BG = torch.rand(_BATCH, _BLOCKS, generator=generator).clamp(1e-6, 1 - 1e-6)
        gates_BG, logits_BG = self._decided(stream, noise_BG)
        strength, (banks, blocks, made) = self.memory.how.strength, stream.made_BGMK.shape[:3]
        scores = strength * stream.queries_BQK @ stream.made_BGMK.flatten(1, 2).mT
        gates_B1N = gates_BG[..., None].expand(banks, blocks, made).reshape(banks, 1, -1)
        weights_BQN = gated_attention(scores, gates_B1N)
        match = stream.asked_BQ[:, :, None, None] == stream.made_tokens_BGMm.flatten(1, 2)[:, None]
        p_BQ = (weights_BQN * match.float().mean(-1)).sum(-1)
        surprise = -(_UNKNOWN + (1 - _UNKNOWN) * p_BQ).log().mean()
        return surprise + _PENALTY * budget_penalty(logits_BG, self.keep_rate)

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """See Task."""
        count = len(self.lessons.rows)
        options = self.memory.dct.model_dump(exclude_none=True) | {
            "fine": min(self.memory.dct.fine, max(_LEAST_ROOM, count // _ROOM)),
            "coarse": min(self.memory.dct.coarse, max(_LEAST_ROOM, count // _ROOM)),
        }
        found = {}
        options.pop("threshold", None)
        learned = {"policy": "learned", "threshold": self._threshold()}
        for name, own in (("trained", learned), ("novelty", {"policy": "novelty"}), ("keep all", {"policy": "keep"})):
            found[name] = hits(self._like(options | own), self.lessons)
        return found

    def _like(self, options: dict[str, Any]) -> Dct:
        """A memory of other options with the policy's weights, if it has a policy that learns."""
        made = cast(Dct, build("dct", self.memory.dims, options, self.memory.budget_bytes)).requires_grad_(False)
        if made.policy is not None:
            assert self.memory.policy is not None
            made.policy.load_state_dict(self.memory.policy.state_dict())
        return made

    @torch.no_grad()
    def _threshold(self) -> float:
        """The score from which on the policy keeps `keep_rate` of the blocks to learn from."""
        rows = part_of(self.lessons.rows, max(0, self.lessons.split - _ROWS), self.lessons.split)
        options = self.memory.dct.model_dump(exclude_none=True) | {"log": len(rows) // self._block + 1}
        options |= {"fine": _LEAST_ROOM, "coarse": len(rows), "policy": "learned"}
        threshold = 0.0
        # novelty depends on what is kept: repeat with the threshold found
        for _ in range(2):
            memory = self._like(options | {"threshold": threshold})
            scores = [line.score for line in memory.decisions(memory.absorb(memory.empty(), rows))]
            threshold = float(torch.tensor(scores, dtype=torch.float64).quantile(1 - self.keep_rate))
        return threshold

    def learned(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """See Task."""
        return of_memory(self.memory), {"policy": "learned", "threshold": self._threshold()}

    @torch.no_grad()
    def _stream(self, starts_B: Tensor) -> Stream:
        length, rows = _BLOCKS * self._block, self.lessons.rows
        blocks = (_BATCH, _BLOCKS, self._block)
        keys = windows(self._keys_NK, starts_B, length).reshape(*blocks, -1)
        tokens = windows(rows.tokens_N, starts_B, length).reshape(blocks)
        made = normalize(self.memory.compress(keys.flatten(0, 1)), dim=-1)
        made_tokens = self.memory.compress.tokens(tokens.flatten(0, 1))
        long = None
        if rows.values_NV is not None and self.memory.dims.value:
            long = windows(rows.values_NV.norm(dim=-1), starts_B, length).reshape(blocks).mean(-1)
        return Stream(
            keys,
            tokens,
            made.unflatten(0, blocks[:2]),  # type: ignore[no-untyped-call]
            made_tokens.unflatten(0, blocks[:2]),  # type: ignore[no-untyped-call]
            long,
            windows(self._keys_NK, starts_B + length, _QUERIES),
            windows(rows.tokens_N, starts_B + length, _QUERIES),
        )

    def _decided(self, stream: Stream, noise_BG: Tensor) -> tuple[Tensor, Tensor]:
        """Gates and logits of the blocks, each seen with those before it that were kept."""
        policy, banks = cast(KeepPolicy, self.memory.policy), len(noise_BG)
        gates, logits = torch.zeros(banks, 0), []
        for g in range(_BLOCKS):
            mean = normalize(stream.rows_BGSK[:, g].mean(1), dim=-1)
            scalars = torch.stack(self._known(stream, gates.detach() > 0.5, g), -1)
            features = torch.cat([mean, stream.rows_BGSK[:, g, -1], scalars], -1)
            logits.append(policy(features))
            gates = torch.cat([gates, straight_through(logits[-1], noise_BG[:, g])[:, None]], 1)
        return gates, torch.stack(logits, 1)

    @torch.no_grad()
    def _known(self, stream: Stream, kept_Bg: Tensor, g: int) -> list[Tensor]:
        """Novelty, surprise and fill of block g, as the memory would find them."""
        banks, made = len(kept_Bg), stream.made_BGMK.shape[2]
        fill = (kept_Bg.sum(1) / (self.keep_rate * _BLOCKS)).clamp_max(1.0)
        if g == 0:
            first = torch.ones(banks)
            return [first, first if stream.long_BG is None else stream.long_BG[:, 0], fill]
        held_B1N = kept_Bg[..., None].expand(-1, -1, made).reshape(banks, 1, -1)
        before = stream.made_BGMK[:, :g].flatten(1, 2)
        cosines = (stream.made_BGMK[:, g] @ before.mT).masked_fill(~held_B1N, 0.0)
        novelty = 1 - cosines.amax(-1).clamp_min(0).mean(-1)
        if stream.long_BG is not None:
            return [novelty, stream.long_BG[:, g], fill]
        scores = (self.memory.how.strength * stream.rows_BGSK[:, g] @ before.mT).masked_fill(~held_B1N, -1e30)
        weights = torch.softmax(scores, -1) * held_B1N
        match = stream.tokens_BGS[:, g, :, None, None] == stream.made_tokens_BGMm[:, :g].flatten(1, 2)[:, None]
        p_BS = (weights * match.float().mean(-1)).sum(-1)
        surprise = (_UNKNOWN + (1 - _UNKNOWN) * p_BS).log().mean(1) / torch.tensor(_UNKNOWN).log()
        return [novelty, surprise, fill]
