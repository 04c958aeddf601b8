"""Dynamic Compressive Transformer memory: a policy decides which of the blocks that leave the fine rows to keep.

Chang and Ma 2021, "Dynamic Compressive Transformer" (arXiv 2110.04821): each block is kept in compressed form or
discarded, and what decides is trained with the model. The abstract fixes no more than that; features, policies and
budget are readings of it.

Shape legend: `B` banks, `G` blocks, `S` rows of a block, `M` rows that it becomes, `C` coarse slots, `L` entries of the
log, `K` key width, `F` features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, normalize

from raymem.errors import InvalidSpec
from raymem.memory.base import ROWS_END, Dims, MergeRule, Options, State, StateSpec, TensorSpec
from raymem.memory.compressive import Blocks, Compressive, CompressiveOptions
from raymem.memory.eviction import EvictionOptions, Places, make_room, policy_part, policy_spec
from raymem.memory.policies import Entries, Policy
from raymem.memory.slots import widened
from raymem.memory.state import put

KeepName = Literal["novelty", "surprise", "learned", "keep", "discard"]
_HIDDEN = 64
# a policy starts near the Compressive Transformer, which keeps everything
_FIRST_KEPT = 0.9
_THRESHOLDS: dict[str, float] = {"novelty": 0.2, "surprise": 0.5, "learned": 0.5, "keep": 0.0, "discard": math.inf}
# the chance that a memory gives a token which it does not know
_UNKNOWN = 1e-4


class DctOptions(CompressiveOptions, EvictionOptions):
    """Which blocks are kept: those whose score is at least `threshold`.

    The score is the block's `novelty` (1 - the highest cosine of its compressed rows with those kept, on average, 1
    where none is positive), its `surprise`, or what the `learned` policy gives it. `keep_rate` bounds the share of
    blocks kept since the start. `eviction` says which block makes room for one that is to be kept where there is none
    left; a block's key is then the mean of its compressed rows. The last `log` decisions can be seen.

    A block's surprise is the mean length of its rows' vectors, which are what their model did not predict. Where rows
    carry none it is the memory's own: `-log p` of the tokens that came, read from the rows kept, as a share of what a
    token costs that the memory does not know. Nothing has to be journaled for that beside what there is: a loss that
    the producer computed says less than the vector that it came from.

    The default novelty, 0.2, kept 0.73 of the blocks of five texts and answered a little better than keeping all (next
    token among the best 8 candidates in 0.361 of cases, 0.357; at 0.4 it was 0.345). The default of `learned` is 0.5,
    and so is that of `surprise` without vectors: of five texts of 3,072 tokens, in 0.02 MB, it kept 0.59 of the blocks
    and answered as novelty did, which kept 0.67 (0.567 both; keeping all 0.565). With vectors `surprise` has none.
    """

    policy: KeepName = "novelty"
    threshold: float | None = None
    keep_rate: float = Field(default=1.0, gt=0, le=1)
    log: int = Field(default=32, ge=1)


class Features(NamedTuple):
    """Features of a block when it leaves the fine rows, one block a bank.

    `mean_BK` and `last_BK` unit; `novelty_B` in [0, 1], `surprise_B` at least 0 (at most 1 where rows carry no
    vectors), `fill_B` the share of the coarse slots in use.
    """

    mean_BK: Tensor
    last_BK: Tensor
    novelty_B: Tensor
    surprise_B: Tensor
    fill_B: Tensor

    def scalars(self) -> Tensor:
        """`[B, 3]`: novelty, surprise, fill."""
        return torch.stack([self.novelty_B, self.surprise_B, self.fill_B], -1)

    def vector(self) -> Tensor:
        """All of them, `[B, 2 K + 3]`."""
        return torch.cat([self.mean_BK, self.last_BK, self.scalars()], -1)


class KeepPolicy(nn.Module):
    """A small network that gives each block the logit of being kept; untrained, it keeps all with p = 0.9."""

    def __init__(self, key_dims: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(2 * key_dims + 3, _HIDDEN),
                nn.Tanh(),
                nn.Linear(_HIDDEN, _HIDDEN),
                nn.Tanh(),
                nn.Linear(_HIDDEN, 1),
            )
        with torch.no_grad():
            last = list(self.layers.parameters())[-2:]
            last[0].zero_()
            last[1].fill_(math.log(_FIRST_KEPT / (1 - _FIRST_KEPT)))

    def forward(self, features: Tensor) -> Tensor:
        """Logits `[...]` of features `[..., F]`; see Features.vector."""
        logits: Tensor = self.layers(features.to(next(self.parameters()).dtype))
        return logits[..., 0]


class Decision(NamedTuple):
    """One line of the log: a block's number, its features, its score, and whether it was kept."""

    block: int
    novelty: float
    surprise: float
    fill: float
    score: float
    kept: bool


class Dct(Compressive):
    """A Compressive memory that only takes the blocks its policy keeps, so that it reaches further back.

    Decisions are thresholds and never drawn, so a stream gives one state. Merging is approximate: the policy decides
    anew about all compressed blocks, going by what they became, and the log starts anew with that. `policy` is the
    learned network, or None; the functions below train it.
    """

    kind: ClassVar[str] = "dct"
    merge_rule: ClassVar[MergeRule] = "approximate"
    options_type: ClassVar[type[Options]] = DctOptions
    learns: ClassVar[tuple[str, ...]] = ("compress", "policy", "rule")

    def __init__(self, dims: Dims, options: DctOptions, budget_bytes: int) -> None:
        self.dct = options
        super().__init__(dims, options, budget_bytes)
        self.made = self.block // options.ratio
        if self.rule is not None:
            # a policy evicts whole blocks
            self.coarse -= self.coarse % self.made
        if options.policy == "surprise" and options.threshold is None and dims.value:
            raise InvalidSpec(
                "policy='surprise' needs a threshold where rows carry vectors: their mean length from which on to keep"
            )
        self.policy = KeepPolicy(self.key_dims) if options.policy == "learned" else None
        self.threshold = _THRESHOLDS[options.policy] if options.threshold is None else options.threshold

    def coarse_spec(self) -> StateSpec:
        """One compressed slot, its block's number, and what the policy keeps of it, where a policy makes room."""
        spec = super().coarse_spec() | {"number": TensorSpec((), torch.int64, low=-1, high=ROWS_END)}
        return spec if self.rule is None else spec | policy_spec(self.rule)

    def coarse_order(self, state: State, bank: int) -> Tensor:
        """See Compressive."""
        if self.rule is None:
            return super().coarse_order(state, bank)
        number_C = state["cmem_number"][bank]
        return number_C.argsort(stable=True)[int((number_C < 0).sum()) :]

    def coarse_blocks(self, state: State, bank: int = 0) -> Tensor:
        """See Compressive: those that the policy kept."""
        number_C = state["cmem_number"][bank]
        found: Tensor = torch.unique(number_C[number_C >= 0])
        return found

    def fixed_spec(self) -> StateSpec:
        """Counters of blocks `seen` and `kept`, and the log."""
        log = self.dct.log
        return super().fixed_spec() | {
            "seen": TensorSpec((), torch.int64, low=0, high=ROWS_END),
            "log_block": TensorSpec((log,), torch.int64, low=-1, high=ROWS_END),
            "log_features": TensorSpec((log, 3)),
            "log_score": TensorSpec((log,)),
            "log_kept": TensorSpec((log,), torch.bool),
        }

    def start(self, banks: int) -> State:
        """Empty FIFOs and an empty log."""
        own = super().start(banks)
        return own | {name: own[name] - 1 for name in ("log_block", "cmem_number")}

    def admit(self, state: State, blocks: Blocks) -> State:
        """Decide block by block, each with the coarse memory that the ones before it left."""
        return self._weighed(state, blocks, self.compressed(blocks))

    def readmitted(self, state: State, new: State, states: Sequence[State]) -> State:
        """Decide again about compressed blocks of several banks: a block that another bank has too is not novel."""
        seen = torch.stack([state["seen"] for state in states]).sum(0) - new["token"].shape[1]
        real_BG = torch.ones_like(new["token"][..., 0, 0], dtype=torch.bool)
        return self._weighed(state | {"seen": seen}, Blocks(new, real_BG, None), new)

    def _weighed(self, state: State, blocks: Blocks, new: State) -> State:
        dtype = state["scope_scale"].dtype
        # unit length, and zeros where a slot is free: computed once, and updated with each block
        unit_BCK = normalize(state["cmem_key"].detach().to(dtype), dim=-1)
        for g in range(blocks.real_BG.shape[1]):
            block = {name: column[:, g : g + 1] for name, column in new.items()}
            rounded_BMK = block["key"][:, 0].detach().to(state["cmem_key"].dtype).to(dtype)
            new_BMK = normalize(rounded_BMK, dim=-1)
            known = self.features(state, blocks, unit_BCK, new_BMK, g)
            decided, (bank, slot_M) = self._decide(state, block, known, blocks.real_BG[:, g], unit_BCK)
            state = state | decided
            unit_BCK = unit_BCK.index_put_((bank[:, None], slot_M), new_BMK[bank][:, self.made - slot_M.shape[1] :])
        return {name: state[name] for name in self.own_spec() if not name.startswith("mem_")}

    def decisions(self, state: State, bank: int = 0) -> list[Decision]:
        """The newest entries of one bank's log, oldest first."""
        block_L = state["log_block"][bank]
        order = block_L.argsort(stable=True)[int((block_L < 0).sum()) :]
        columns = ("log_block", "log_features", "log_score", "log_kept")
        lines = zip(*(state[name][bank, order].tolist() for name in columns), strict=True)
        return [Decision(n, known[0], known[1], known[2], score, kept) for n, known, score, kept in lines]

    def features(self, state: State, blocks: Blocks, unit_BCK: Tensor, new_BMK: Tensor, g: int) -> Features:
        """Features of block `g` of each bank, given unit keys of the coarse slots and of the rows that it becomes."""
        dtype = state["scope_scale"].dtype
        rows_BSK = widened(blocks.rows["key"][:, g], dtype)
        if self.dims.value:
            surprise = blocks.rows["value"][:, g].norm(dim=-1).mean(-1)
        else:
            surprise = self._surprise(state, unit_BCK, normalize(rows_BSK, dim=-1), blocks.rows["token"][:, g])
        made = self.block // self.how.ratio
        fill = (state["kept"] * made / max(1, self.coarse)).clamp_max(1.0).to(dtype)
        mean, last = normalize(rows_BSK.mean(1), dim=-1), normalize(rows_BSK[:, -1], dim=-1)
        return Features(mean, last, _novelty(unit_BCK, new_BMK), surprise, fill)

    def _decide(
        self, state: State, block: State, known: Features, real_B: Tensor, unit_BCK: Tensor
    ) -> tuple[State, Places]:
        """Own tensors after one block a bank, and the coarse slots `[bank]`, `[bank, M]` that were taken."""
        score_B = self._score(known).detach()
        afford_B = state["kept"] < self.dct.keep_rate * (state["seen"] + 1)
        keep_B = (score_B >= self.threshold) & afford_B & real_B
        number_BGM = state["seen"][:, None, None].expand(block["token"].shape[:3])
        block = block | {"number": number_BGM}
        if self.rule is None or not self.coarse:
            after, taken = self.stored(state, block, keep_B[:, None]), self._next_slots(state, keep_B)
        else:
            after, taken = self._replaced(state, block, keep_B, unit_BCK, self.rule)
            keep_B = after["kept"] > state["kept"]
        bank = torch.nonzero(real_B)[:, 0]
        where = (bank, state["seen"][bank] % self.dct.log)
        entry = {
            "log_block": state["seen"],
            "log_features": known.scalars().detach(),
            "log_score": score_B,
            "log_kept": keep_B,
        }
        logged = {name: put(state[name], where, column[bank]) for name, column in entry.items()}
        return after | logged | {"seen": state["seen"] + real_B}, taken

    def _replaced(
        self, state: State, block: State, keep_B: Tensor, unit_BCK: Tensor, rule: Policy
    ) -> tuple[State, Places]:
        """The coarse memory after the policy evicted a block for the new one, or the new one itself."""

        def whole(column: Tensor) -> Tensor:
            return column.reshape(len(column), -1, self.made, *column.shape[2:])

        held = {name.removeprefix("cmem_"): column for name, column in state.items() if name.startswith("cmem_")}
        kept = {name: whole(column)[:, :, 0] for name, column in policy_part(held).items()}
        newcomer_BK = normalize(normalize(block["key"][:, 0].to(unit_BCK.dtype), dim=-1).mean(1), dim=-1)
        keys_BPK = normalize(whole(unit_BCK).mean(2), dim=-1)
        entries = Entries(keys_BPK, whole(held["number"])[:, :, 0], newcomer_BK, state["seen"])
        seen, (bank, place) = make_room(rule, kept, entries, keep_B)
        slot_M = place[:, None] * self.made + torch.arange(self.made, device=place.device)
        fresh = {f"policy_{name}": column.repeat_interleave(self.made, 1) for name, column in seen.items()}
        rows = {name: column[bank, 0] for name, column in block.items() if name not in fresh}
        where = (bank[:, None].expand_as(slot_M), slot_M)
        after = {f"cmem_{name}": put(held[name], where, column) for name, column in rows.items()}
        after |= {f"cmem_{name}": column for name, column in fresh.items()}
        kept_B = state["kept"].index_add(0, bank, torch.ones_like(bank))
        return after | {"kept": kept_B}, (bank, slot_M)

    def _next_slots(self, state: State, keep_B: Tensor) -> Places:
        bank = torch.nonzero(keep_B)[:, 0]
        row_M = torch.arange(self.made, device=bank.device)[max(0, self.made - self.coarse) :]
        return bank, (state["kept"][bank, None] * self.made + row_M) % max(1, self.coarse)

    def _surprise(self, state: State, unit_BCK: Tensor, unit_BSK: Tensor, tokens_BS: Tensor) -> Tensor:
        """Mean of `-log p(token)` of rows (of several tokens each, where they were compressed) under the coarse memory,
        over what it is for an unknown token.
        """
        if not self.coarse:
            return torch.ones_like(unit_BSK[:, 0, 0])
        held_B1C = (state["cmem_token"] >= 0).any(-1)[:, None]
        scores = (self.how.strength * unit_BSK @ unit_BCK.mT).masked_fill(~held_B1C, torch.finfo(unit_BCK.dtype).min)
        weights_BSC = torch.softmax(scores, -1) * held_B1C
        tokens_BSt = tokens_BS.flatten(2) if tokens_BS.dim() == 3 else tokens_BS[..., None]
        match = tokens_BSt[:, :, None, :, None] == state["cmem_token"][:, None, :, None]
        p_BSt = (weights_BSC[..., None] * match.to(weights_BSC.dtype).mean(-1)).sum(2)
        return (_UNKNOWN + (1 - _UNKNOWN) * p_BSt).log().mean((1, 2)) / math.log(_UNKNOWN)

    def _score(self, known: Features) -> Tensor:
        if self.policy is not None:
            return torch.sigmoid(self.policy(known.vector()))
        return known.surprise_B if self.dct.policy == "surprise" else known.novelty_B


def _novelty(unit_BCK: Tensor, new_BMK: Tensor) -> Tensor:
    if not unit_BCK.shape[1]:
        return torch.ones_like(new_BMK[:, 0, 0])
    return 1 - (unit_BCK @ new_BMK.mT).amax(1).clamp_min(0).mean(-1)


def reinforce_loss(logits: Tensor, kept: Tensor, advantage: Tensor, entropy_weight: float = 0.01) -> Tensor:
    """Mean of `-advantage log p(decision) - w H`, whose gradient is that of the expected reward.

    Args:
        logits: of keeping, `[...]`.
        kept: bool `[...]`, the decisions drawn.
        advantage: `[...]`, reward minus a baseline; no gradient goes through it.
        entropy_weight: of the bonus that keeps a policy from deciding too early.

    Reference:
        Williams 1992, REINFORCE; 2110.04821 trains its policy with the model.
    """
    surprise = binary_cross_entropy_with_logits(logits, kept.to(logits.dtype), reduction="none")
    entropy = binary_cross_entropy_with_logits(logits, torch.sigmoid(logits), reduction="none")
    return (advantage.detach() * surprise - entropy_weight * entropy).mean()


def straight_through(logits: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
    """Gates `[...]` of 0 or 1 with the gradient of a Gumbel-sigmoid; `noise` `[...]` is uniform in (0, 1)."""
    soft = torch.sigmoid((logits + torch.logit(noise)) / temperature)
    return (soft >= 0.5).to(soft.dtype) + (soft - soft.detach())


def gated_attention(logits: Tensor, gates: Tensor) -> Tensor:
    """Softmax over the last axis with the gates' logs added to the logits; a gate of 0 hides a row and still learns."""
    weights = (logits - logits.amax(-1, keepdim=True)).exp() * gates
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def budget_penalty(logits: Tensor, target: float) -> Tensor:
    """Square of how far the expected keep rate is from `target`."""
    return (torch.sigmoid(logits).mean() - target).square()
