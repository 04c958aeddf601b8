"""Differentiable Neural Computer: slots that are allocated, linked in the order of writing, and freed.

Graves et al. 2016, "Hybrid computing using a neural network with dynamic external memory" (Nature 538:471); the options
are those of Csordás and Schmidhuber 2019 (arXiv 1904.10278). The network that learns to use it is in dnc_cell.py.

Shape legend: `B` banks, `N` slots, `W` word width, `R` read heads, `Q` queries, `K` key width, `V` value width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from raymem.errors import Unsupported
from raymem.kernels.content_address import content_address
from raymem.kernels.link_update import link_update
from raymem.memory.base import ROWS_END, Dims, MergeRule, Options, Shown, State, StateSpec, TensorSpec, positions_of
from raymem.memory.eviction import EvictionOptions, Places, policy_spec
from raymem.memory.slots import CountedSlotOptions, RingMemory
from raymem.memory.state import Batch

BACKWARD, FORWARD, CONTENT = range(3)
_LEAST_MASS = 1e-12


class Interface(NamedTuple):
    """A controller's interface vector of one step; all activations are applied.

    `read_keys` [B, R, W], `read_strengths` [B, R] at least 1, `write_key` [B, W], `write_strength` [B] at least 1,
    `erase` [B, W] and gates in [0, 1], `write_vector` [B, W], `free_gates` [B, R], `allocation_gate` and `write_gate`
    [B], `modes` [B, R, 3] summing to 1 over backward, forward, content. Options: `read_masks` [B, R, W] and
    `write_mask` [B, W] in [0, 1], `sharpness` [B, R, 2] at least 1 of the backward and forward weightings.
    """

    read_keys: Tensor
    read_strengths: Tensor
    write_key: Tensor
    write_strength: Tensor
    erase: Tensor
    write_vector: Tensor
    free_gates: Tensor
    allocation_gate: Tensor
    write_gate: Tensor
    modes: Tensor
    read_masks: Tensor | None = None
    write_mask: Tensor | None = None
    sharpness: Tensor | None = None


def empty_slots(banks: int, slots: int, word: int, heads: int, dtype: torch.dtype = torch.float32) -> State:
    """Memory, usage, links, precedence, weightings and reads of zeros."""
    shapes = {
        "memory": (slots, word),
        "usage": (slots,),
        "link": (slots, slots),
        "precedence": (slots,),
        "write_weights": (slots,),
        "read_weights": (heads, slots),
        "reads": (heads, word),
    }
    return {name: torch.zeros(banks, *shape, dtype=dtype) for name, shape in shapes.items()}


def retention(free_gates_BR: Tensor, read_weights_BRN: Tensor) -> Tensor:
    """How much of each slot the free gates leave `[B, N]`: `psi = prod_r (1 - f_r w_r)`."""
    return (1 - free_gates_BR[..., None] * read_weights_BRN).prod(1)


def next_usage(usage_BN: Tensor, write_weights_BN: Tensor, retention_BN: Tensor) -> Tensor:
    """Usage `[B, N]` after the last write and this step's frees: `u = (u + w - u w) psi`.

    No gradient goes through the write weighting, as in the authors' own code.
    """
    written_BN = write_weights_BN.detach()
    return (usage_BN + written_BN - usage_BN * written_BN) * retention_BN


def allocation(usage_BN: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Weighting `[B, N]` of the free slots, least used first: `a[phi_j] = (1 - u[phi_j]) prod_{i<j} u[phi_i]`.

    Equal usages go in the order of the slots. `epsilon` keeps gradients alive and leaks as much into other slots; with
    0 a free slot takes everything.
    """
    raised_BN = epsilon + (1 - epsilon) * usage_BN
    ascending_BN, order_BN = raised_BN.sort(dim=-1, stable=True)
    before_BN = torch.cat([torch.ones_like(ascending_BN[:, :1]), ascending_BN.cumprod(-1)[:, :-1]], -1)
    return torch.zeros_like(usage_BN).scatter(-1, order_BN, (1 - ascending_BN) * before_BN)


def write(state: State, says: Interface, *, epsilon: float = 1e-6, deallocate: bool = False) -> State:
    """Free, allocate, write and link; `deallocate` also wipes what the free gates freed.

    Reference:
        Nature 538:471, Methods, "Dynamic memory allocation" and "Temporal memory linkage"; wiping is 1904.10278's.
    """
    kept_BN = retention(says.free_gates, state["read_weights"])
    usage = next_usage(state["usage"], state["write_weights"], kept_BN)
    mask = None if says.write_mask is None else says.write_mask[:, None]
    content = content_address(state["memory"], says.write_key[:, None], says.write_strength[:, None], mask)[:, 0]
    gate = says.allocation_gate[:, None]
    weights = says.write_gate[:, None] * (gate * allocation(usage, epsilon) + (1 - gate) * content)
    memory = state["memory"] * kept_BN[..., None] if deallocate else state["memory"]
    memory = memory * (1 - weights[..., None] * says.erase[:, None]) + weights[..., None] * says.write_vector[:, None]
    link, precedence = link_update(state["link"], state["precedence"], weights)
    return state | {
        "memory": memory,
        "usage": usage,
        "link": link,
        "precedence": precedence,
        "write_weights": weights,
    }


def read(state: State, says: Interface) -> State:
    """Move each head by links or content, and read the memory as it now is.

    Reference:
        Nature 538:471, Methods, "Read weighting": `w = pi_1 L^T w + pi_2 C + pi_3 L w`, here ordered backward, forward,
        content as in the authors' code.
    """
    last = state["read_weights"]
    backward, forward = last @ state["link"], last @ state["link"].mT
    if says.sharpness is not None:
        backward, forward = sharpened(backward, says.sharpness[..., 0]), sharpened(forward, says.sharpness[..., 1])
    content = content_address(state["memory"], says.read_keys, says.read_strengths, says.read_masks)
    modes = says.modes[..., None]
    weights = modes[:, :, BACKWARD] * backward + modes[:, :, FORWARD] * forward + modes[:, :, CONTENT] * content
    return state | {"read_weights": weights, "reads": weights @ state["memory"]}


def sharpened(weights: Tensor, power: Tensor) -> Tensor:
    """Weightings `[..., N]` to a power `[...]`, with the mass they had: weight that left the tape is not given back.

    Reference:
        Csordás and Schmidhuber (1904.10278) section 3.3, in log space.
    """
    mass = weights.sum(-1, keepdim=True)
    return mass * torch.softmax(power[..., None] * (weights + _LEAST_MASS).log(), -1)


def step(state: State, says: Interface, *, epsilon: float = 1e-6, deallocate: bool = False) -> State:
    """One step of the memory: write, then read."""
    return read(write(state, says, epsilon=epsilon, deallocate=deallocate), says)


def tape_step(state: State, words_BW: Tensor, freed_B: Tensor | None = None) -> State:
    """Write words by the full equations under the tape's script, which `Dnc` does in one go.

    The script is `g_w = g_a = 1`, `e = 1`, `epsilon = 0`; once every slot is used, a read head on slot `freed_B` (None:
    the oldest) frees it.
    """
    banks, slots, _ = state["memory"].shape
    ones, zeros = words_BW.new_ones(banks), words_BW.new_zeros(banks)
    usage = next_usage(state["usage"], state["write_weights"], torch.ones_like(state["usage"]))
    # the oldest slot in use is the one that was written after no other
    oldest = (usage - state["link"].sum(-1)).argmax(-1) if freed_B is None else freed_B
    says = Interface(
        read_keys=words_BW[:, None],
        read_strengths=ones[:, None],
        write_key=words_BW,
        write_strength=ones,
        erase=torch.ones_like(words_BW),
        write_vector=words_BW,
        free_gates=(usage.amin(-1) >= 1).to(words_BW.dtype)[:, None],
        allocation_gate=ones,
        write_gate=ones,
        modes=zeros[:, None, None].expand(-1, -1, 3),
    )
    head = torch.nn.functional.one_hot(oldest, slots).to(words_BW.dtype)[:, None]
    return write(state | {"read_weights": head}, says, epsilon=0.0)


class Replay(NamedTuple):
    """What followed a match, step by step: `tokens_QS` (-1 past the end of the tape), `mass_QS` the weight still on the
    tape, `values_QSV` blended vectors.
    """

    tokens_QS: Tensor
    mass_QS: Tensor
    values_QSV: Tensor


class DncOptions(CountedSlotOptions, EvictionOptions):
    """`sharpness` is the power that keeps a replay's weighting from blurring; 1 leaves it as it is.

    `eviction` says which slot a full tape frees for the next row; policies other than "fifo" take rows one by one.
    """

    sharpness: float = Field(default=1.0, ge=1)


class Dnc(RingMemory):
    """An episodic tape: each row takes a free slot, or that which the eviction policy frees; links remember the order.

    Under the tape's script all weightings are one-hot, so a slot's row of L has at most one 1, and `before` holds its
    place: the state takes N numbers instead of N². `dense` writes the full tensors out. Two tapes can't be merged, as
    they have no common order, and rows leave a tape only by rebuilding it from the journal.
    """

    kind: ClassVar[str] = "dnc"
    merge_rule: ClassVar[MergeRule] = "refused"
    options_type: ClassVar[type[Options]] = DncOptions
    learns: ClassVar[tuple[str, ...]] = ("rule",)
    piece: ClassVar[int] = 1

    def __init__(self, dims: Dims, options: DncOptions, budget_bytes: int) -> None:
        super().__init__(dims, options, budget_bytes)
        self.dnc = options
        evicts = options.eviction != "fifo"
        self.rule = options.rule(self.key_dims, options.strength) if evicts else None
        self.size_slots()

    def slot_spec(self) -> StateSpec:
        """A slot of the ring, and the slot written before it; its row's number where a policy asks for it."""
        spec = super().slot_spec() | {"before": TensorSpec((), torch.int32, low=-1)}
        if self.rule is None:
            return spec
        return spec | {"arrival": TensorSpec((), torch.int64, low=-1, high=ROWS_END)} | policy_spec(self.rule)

    def own_spec(self) -> StateSpec:
        """All slots, and the one written last where that is not told by the count of rows."""
        own = super().own_spec()
        # the number of slots is known here: places lie below it
        own["before"] = own["before"]._replace(high=self.slots - 1)
        return own | ({} if self.rule is None else {"last": TensorSpec((), torch.int32, low=-1, high=self.slots - 1)})

    def start(self, banks: int) -> State:
        """Free slots without links."""
        own = super().start(banks)
        return own | {name: own[name] - 1 for name in ("before", "last") if name in own}

    def write_batch(self, state: State, batch: Batch) -> State:
        """Allocate, write and link; see RingMemory."""
        if self.rule is not None:
            return self.write_each(state, batch, self.rule)
        own = super().write_batch(state, batch)
        bank_M, row_M, slot_M = self.places(state["count"], batch)
        number_M = state["count"][bank_M] + row_M
        linked_M = (number_M > 0) & (self.slots > 1)
        before = state["before"].index_put(
            (bank_M, slot_M), torch.where(linked_M, (number_M - 1) % self.slots, -1).to(torch.int32)
        )
        # the slot written after the one that was just overwritten has lost its predecessor
        oldest_B1 = ((state["count"] + batch.length_B) % self.slots)[:, None]
        return own | {"before": before.scatter(1, oldest_B1, -1)}

    def numbers(self, state: State) -> Tensor:
        """See SlotMemory."""
        return super().numbers(state) if self.rule is None else state["arrival"]

    def shown(self, state: State, pos_N: Tensor) -> Shown:
        """The rows whose slots are in use, each with the one that its link leads on to; see Memory.shown."""
        number_N, before_N = self.numbers(state)[0], state["before"][0].long()
        slot_M = number_N.argsort()[int((number_N < 0).sum()) :]
        held_M = positions_of(number_N[slot_M], int(state["count"]), pos_N)
        # rows that `pos_N` doesn't tell are the oldest
        slot_M = slot_M[len(slot_M) - len(held_M) :]
        index_N = torch.full_like(number_N, -1).scatter(0, slot_M, torch.arange(len(slot_M), device=slot_M.device))
        linked_M = torch.nonzero(before_N[slot_M] >= 0)[:, 0]
        from_M = index_N[before_N[slot_M[linked_M]]]
        next_M = torch.full_like(held_M, -1)
        next_M[from_M[from_M >= 0]] = linked_M[from_M >= 0]
        return Shown(held_M, held_M[:0], next_N=next_M)

    def replay(
        self, state: State, queries_BQK: Tensor, steps: int, direction: Literal["forward", "backward"] = "forward"
    ) -> Replay:
        """Find each query's slot by content, then walk the links: what came after, or before.

        The first step is the match itself. A weighting is moved as the read modes do, `L w` or `L^T w`.

        Args:
            state: of B banks.
            queries_BQK: `[B, Q, K]` unit queries.
            steps: S, how many slots to visit.
            direction: "forward" in the order of writing, "backward" against it.

        Returns:
            Fields as in Replay, with the bank in front.
        """
        weights = self.log_weights(state, self.project(queries_BQK).to(state["scope_scale"].dtype)).exp()
        visited = []
        for _ in range(steps):
            visited.append(weights)
            weights = self._moved(state["before"].long(), weights, direction)
        path_BQSN = torch.stack(visited, 2)
        mass = path_BQSN.sum(-1)
        tokens_BQSN = state["token"].long()[:, None, None].expand_as(path_BQSN)
        tokens = tokens_BQSN.gather(-1, path_BQSN.argmax(-1, keepdim=True))[..., 0]
        ended = path_BQSN.amax(-1) <= _LEAST_MASS
        values = path_BQSN @ state["value"][:, None] if self.dims.value else path_BQSN[..., :0]
        return Replay(tokens.masked_fill(ended, -1), mass, values)

    def dense(self, state: State) -> State:
        """Usage `[B, N]`, links `[B, N, N]` and precedence `[B, N]` after the last write, as the equations have it."""
        used = (state["token"] >= 0).to(state["scope_scale"].dtype)
        slots = torch.arange(self.slots, device=used.device)
        link = (state["before"][..., None] == slots).to(used.dtype)
        newest = self._last(state)[:, None] == slots
        return {"usage": used, "link": link, "precedence": newest.to(used.dtype) * used}

    def merge(self, states: Sequence[State]) -> State:
        """Refused.

        Raises:
            Unsupported: always.
        """
        raise Unsupported(
            "dnc banks can't be merged: two tapes have no common order; write both journals to a new bank"
        )

    def linked(self, own: State, where: Places) -> State:
        """`before` and `last` after slots were written: a slot that is overwritten loses its links both ways."""
        bank, slot = where
        before, last = own["before"].clone(), own["last"].clone()
        before[bank] = before[bank].masked_fill(before[bank] == slot[:, None], -1)
        before[bank, slot] = last[bank].masked_fill(last[bank] == slot, -1)
        last[bank] = slot.to(torch.int32)
        return {"before": before, "last": last}

    def _last(self, state: State) -> Tensor:
        """Slot `[B]` written last."""
        return (state["count"] - 1) % self.slots if self.rule is None else state["last"].long()

    def _moved(self, before_BN: Tensor, weights_BQN: Tensor, direction: Literal["forward", "backward"]) -> Tensor:
        linked_B1N = (before_BN >= 0)[:, None]
        source = before_BN.clamp_min(0)[:, None].expand_as(weights_BQN)
        if direction == "forward":
            moved = weights_BQN.gather(-1, source) * linked_B1N
        else:
            moved = torch.zeros_like(weights_BQN).scatter_add(-1, source, weights_BQN * linked_B1N)
        power = moved.new_full(moved.shape[:-1], self.dnc.sharpness)
        return moved if self.dnc.sharpness == 1 else sharpened(moved, power)
