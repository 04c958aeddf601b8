"""Value codes: the output that a memory of vectors is taught for a row, and how outputs are read as tokens.

Shape legend: `B` banks, `T` rows, `Q` queries, `V` output width, `S` slots of the token table, `k` candidates.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import pad

from raymem.errors import InvalidTrace
from raymem.memory.base import State, StateSpec, TensorSpec
from raymem.memory.key_reservoir import hash62
from raymem.memory.state import Batch


class ValueCode(ABC):
    """The value space of a memory: `width` outputs, a loss on them, and their reading.

    A row is kept as a small item (its vector, or its token) until its chunk is written.
    """

    width: int

    @abstractmethod
    def spec(self) -> StateSpec:
        """The code's own tensors, for one bank."""

    @abstractmethod
    def item_spec(self) -> TensorSpec:
        """One row's item."""

    @abstractmethod
    def items(self, batch: Batch) -> Tensor:
        """The items [B, T, ...] of a batch."""

    @abstractmethod
    def target(self, state: State, items_BT: Tensor, dtype: torch.dtype) -> Tensor:
        """Values [B, T, V] that the memory is taught for items."""

    @abstractmethod
    def decode(self, state: State, output_BQV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Blended values [B, Q, 0 or V], tokens [B, Q, k] and scores [B, Q, k] of outputs."""

    def enter(self, state: State, items_BT: Tensor, length_B: Tensor) -> tuple[State, Tensor | None]:
        """Enter a chunk's items before it is written: the code's own tensors after it, and outputs [B, V] to clear."""
        return {}, None

    def slope(self, state: State, output_BTV: Tensor, target_BTV: Tensor) -> Tensor:
        """Gradient of the loss in the outputs [B, T, V]; the loss is `|output - target|^2`, summed over features."""
        return 2 * (output_BTV - target_BTV)

    def loss(self, state: State, output_BTV: Tensor, items_BT: Tensor) -> Tensor:
        """Loss [B, T] of outputs on rows that have not been written."""
        return (output_BTV - self.target(state, items_BT, output_BTV.dtype)).square().sum(-1)


class VectorCode(ValueCode):
    """A row's value is the vector that came with it."""

    def __init__(self, width: int) -> None:
        self.width = width

    def spec(self) -> StateSpec:
        return {}

    def item_spec(self) -> TensorSpec:
        return TensorSpec((self.width,))

    def items(self, batch: Batch) -> Tensor:
        if batch.values_BTV is None:
            raise InvalidTrace(f"rows carry no values; this bank learns vectors of width {self.width}")
        return batch.values_BTV

    def target(self, state: State, items_BT: Tensor, dtype: torch.dtype) -> Tensor:
        return items_BT.to(dtype)

    def decode(self, state: State, output_BQV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        tokens = torch.full((*output_BQV.shape[:2], k), -1, device=output_BQV.device)
        return output_BQV, tokens, torch.full_like(tokens, float("-inf"), dtype=output_BQV.dtype)


class TokenCode(ValueCode):
    """A row's value is its next token; candidates are the tokens of a table of those seen.

    The table holds `slots` tokens; when it is full the token not written for longest makes room.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots

    def spec(self) -> StateSpec:
        slots = TensorSpec((self.slots,), torch.int64)
        return {"slot_token": slots, "slot_used": slots}

    def item_spec(self) -> TensorSpec:
        return TensorSpec((), torch.int64)

    def items(self, batch: Batch) -> Tensor:
        return batch.tokens_BT

    def enter(self, state: State, items_BT: Tensor, length_B: Tensor) -> tuple[State, Tensor | None]:
        tokens, used, cleared = seat(state["slot_token"], state["slot_used"], items_BT, length_B)
        return {"slot_token": tokens, "slot_used": used}, self.clears(cleared)

    def clears(self, changed_BS: Tensor) -> Tensor | None:
        """Outputs to clear where slots got another token."""
        return None

    @abstractmethod
    def scores(self, state: State, output_BQV: Tensor) -> Tensor:
        """The score of each slot's token [B, Q, S] by an output; -inf for a free slot."""

    def decode(self, state: State, output_BQV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.scores(state, output_BQV)
        best, slot = scores.sort(dim=-1, descending=True, stable=True)
        best, slot = best[..., :k], slot[..., :k]
        tokens = state["slot_token"][:, None].expand(*scores.shape).gather(-1, slot)
        missing = k - best.shape[-1]
        return output_BQV[..., :0], pad(tokens, (0, missing), value=-1), pad(best, (0, missing), value=float("-inf"))


class OneHotCode(TokenCode):
    """One output a slot, taught 1 for the row's token and 0 for the others under the squared loss."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.width = slots

    def clears(self, changed_BS: Tensor) -> Tensor | None:
        return changed_BS if bool(changed_BS.any()) else None

    def target(self, state: State, items_BT: Tensor, dtype: torch.dtype) -> Tensor:
        return (items_BT[..., None] == state["slot_token"][:, None]).to(dtype)

    def scores(self, state: State, output_BQV: Tensor) -> Tensor:
        return output_BQV.masked_fill((state["slot_token"] < 0)[:, None], float("-inf"))

    def loss(self, state: State, output_BTV: Tensor, items_BT: Tensor) -> Tensor:
        # a token without a slot counts as having one of output 0, which misses its target by 1
        known = self.target(state, items_BT, output_BTV.dtype)
        return (output_BTV - known).square().sum(-1) + 1 - known.sum(-1)


class SoftmaxCode(OneHotCode):
    """One logit a slot, taught by the row's cross-entropy; scores are log-probabilities over the used slots."""

    def slope(self, state: State, output_BTV: Tensor, target_BTV: Tensor) -> Tensor:
        return self.scores(state, output_BTV).exp() - target_BTV

    def scores(self, state: State, output_BQV: Tensor) -> Tensor:
        used_B1S = (state["slot_token"] >= 0)[:, None]
        # a bank without any token has no distribution: finite there, so that nothing turns into NaN
        least = torch.finfo(output_BQV.dtype).min
        logits = torch.log_softmax(output_BQV.masked_fill(~used_B1S, least), -1)
        return logits.masked_fill(~used_B1S, float("-inf"))

    def loss(self, state: State, output_BTV: Tensor, items_BT: Tensor) -> Tensor:
        # a token without a slot counts as having one of logit 0
        used_B1S = (state["slot_token"] >= 0)[:, None]
        match = items_BT[..., None] == state["slot_token"][:, None]
        known = match.any(-1)
        logits = output_BTV.masked_fill(~used_B1S, torch.finfo(output_BTV.dtype).min)
        total = torch.logsumexp(logits, -1)
        unseen = torch.logaddexp(total, torch.zeros_like(total))
        return torch.where(known, total - (output_BTV * match).sum(-1), unseen)


class SignCode(TokenCode):
    """A token's value is a seeded vector of signs, of unit length; a token's score is the product with it."""

    def __init__(self, slots: int, width: int) -> None:
        super().__init__(slots)
        self.width = width

    def target(self, state: State, items_BT: Tensor, dtype: torch.dtype) -> Tensor:
        bits = hash62(items_BT[..., None] * self.width + torch.arange(self.width, device=items_BT.device))
        signs = (((bits >> 30) & 1) * 2 - 1).to(dtype)
        return signs / math.sqrt(self.width)

    def scores(self, state: State, output_BQV: Tensor) -> Tensor:
        codes = self.target(state, state["slot_token"], output_BQV.dtype)
        return (output_BQV @ codes.mT).masked_fill((state["slot_token"] < 0)[:, None], float("-inf"))


def seat(token_BS: Tensor, used_BS: Tensor, tokens_BT: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give every token of a chunk a slot of the table; in a full table the token not written for longest loses its own.

    No slot that the chunk itself uses is taken from it.

    Args:
        token_BS: int64 `[B, S]` the token in each slot, -1 where free.
        used_BS: int64 `[B, S]` when a slot was last written, in writes since the start; 0 where free.
        tokens_BT: int64 `[B, T]` tokens of a chunk, T at most S.
        length_B: int64 `[B]` how many of them are real.

    Returns:
        Tokens and uses after the chunk, and bool `[B, S]` where a slot lost its token to another.
    """
    slots, step_T = token_BS.shape[1], torch.arange(tokens_BT.shape[1], device=token_BS.device)
    assert len(step_T) <= slots, "a chunk may have more tokens than the table has slots"
    real_BT = step_T < length_B[:, None]
    match_BTS = (tokens_BT[..., None] == token_BS[:, None]) & real_BT[..., None]
    known_BT = match_BTS.any(-1)
    same_BTT = tokens_BT[..., None] == tokens_BT[:, None]
    first_BT = same_BTT.to(torch.int8).argmax(-1)
    # free slots first, then by age; the chunk's own come last
    busy_BS = used_BS.masked_fill(match_BTS.any(1), torch.iinfo(torch.int64).max)
    by_age_BS = busy_BS.argsort(dim=1, stable=True)
    new_BT = real_BT & ~known_BT & (first_BT == step_T)
    taken_BT = by_age_BS.gather(1, (new_BT.cumsum(1) - 1).clamp_min(0)).gather(1, first_BT)
    slot_BT = torch.where(known_BT, match_BTS.to(torch.int8).argmax(-1), taken_BT).masked_fill(~real_BT, slots)
    written_BT = used_BS.amax(1, keepdim=True) + 1 + step_T
    used_after = pad(used_BS, (0, 1)).scatter_reduce(1, slot_BT, written_BT, "amax")[:, :slots]
    token_after = pad(token_BS, (0, 1)).scatter(1, slot_BT, tokens_BT)[:, :slots]
    return token_after, used_after, (token_after != token_BS) & (token_BS >= 0)
