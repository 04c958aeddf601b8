"""Neural Turing Machine: a matrix of slots that heads find by content, or by moving on from where they were.

Graves, Wayne and Danihelka 2014, "Neural Turing Machines" (arXiv 1410.5401). The network that learns to use it is in
ntm_cell.py.

Shape legend: `B` banks, `N` slots, `W` word width, `H` heads, `S` shift range.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from raymem.errors import Unsupported
from raymem.kernels.content_address import content_address
from raymem.memory.base import Dims, MergeRule, State
from raymem.memory.slots import CountedSlotOptions, RingMemory

# far under any weight that matters, far over the smallest float32
_LEAST_WEIGHT = 1e-30


class Heads(NamedTuple):
    """A controller's output to its read heads, or to its write heads; all activations are applied.

    `key` [B, H, W], `strength` [B, H] at least 0, `gate` [B, H] in [0, 1], `shift` [B, H, 2 S + 1] summing to 1 over
    moves by -S to +S slots, `sharpening` [B, H] at least 1.
    """

    key: Tensor
    strength: Tensor
    gate: Tensor
    shift: Tensor
    sharpening: Tensor


def interpolated(content: Tensor, previous: Tensor, gate: Tensor) -> Tensor:
    """Weighting `g w^c + (1 - g) w_{t-1}`: by content, or where the head was.

    Reference:
        NTM (1410.5401) equation 7.
    """
    return gate[..., None] * content + (1 - gate[..., None]) * previous


def shifted(weights: Tensor, shift: Tensor) -> Tensor:
    """Weighting `[..., N]` moved around the ring by each offset of `shift` `[..., 2 S + 1]`; the last moves it by +S.

    Reference:
        NTM (1410.5401) equation 8: `w_i = sum_j w_j s((i - j) mod N)`.
    """
    reach = shift.shape[-1] // 2
    moved = [weights.roll(offset, -1) * shift[..., reach + offset, None] for offset in range(-reach, reach + 1)]
    return torch.stack(moved).sum(0)


def sharpened(weights: Tensor, power: Tensor) -> Tensor:
    """Weighting `w_i^gamma / sum_j w_j^gamma`, by logarithms: a power underflows, and its slope at 0 is no number.

    Reference:
        NTM (1410.5401) equation 9.
    """
    return torch.softmax(power[..., None] * weights.clamp_min(_LEAST_WEIGHT).log(), -1)


def address(memory_BNW: Tensor, heads: Heads, previous_BHN: Tensor) -> Tensor:
    """Each head's weighting `[B, H, N]`: content, interpolation, shift, sharpening.

    Reference:
        NTM (1410.5401) section 3.3, figure 2.
    """
    content = content_address(memory_BNW, heads.key, heads.strength)
    return sharpened(shifted(interpolated(content, previous_BHN, heads.gate), heads.shift), heads.sharpening)


def read(memory_BNW: Tensor, weights_BHN: Tensor) -> Tensor:
    """What each head reads `[B, H, W]`: `r = sum_i w_i M_i`.

    Reference:
        NTM (1410.5401) equation 2.
    """
    return weights_BHN @ memory_BNW


def write(memory_BNW: Tensor, weights_BHN: Tensor, erase_BHW: Tensor, add_BHW: Tensor) -> Tensor:
    """Memory after the heads wrote one after another: `M_i = M_i (1 - w_i e) + w_i a`.

    Reference:
        NTM (1410.5401) equations 3 and 4.
    """
    for weights, erase, add in zip(weights_BHN.unbind(1), erase_BHW.unbind(1), add_BHW.unbind(1), strict=True):
        memory_BNW = memory_BNW * (1 - weights[..., None] * erase[:, None]) + weights[..., None] * add[:, None]
    return memory_BNW


def step(state: State, readers: Heads, writers: Heads, erase_BHW: Tensor, add_BHW: Tensor) -> State:
    """One step of the memory: heads are placed and read first, on what the last step left; then it is written.

    `state` has `memory` [B, N, W], `read_weights` and `write_weights` [B, H, N], `reads` [B, H, W].
    """
    memory = state["memory"]
    read_weights = address(memory, readers, state["read_weights"])
    write_weights = address(memory, writers, state["write_weights"])
    return state | {
        "memory": write(memory, write_weights, erase_BHW, add_BHW),
        "read_weights": read_weights,
        "write_weights": write_weights,
        "reads": read(memory, read_weights),
    }


def ring_step(memory_BNW: Tensor, weights_BN: Tensor, words_BW: Tensor) -> tuple[Tensor, Tensor]:
    """Write words by the full equations under the ring's script, which `Ntm` does in one go.

    The script is `g = 0`, `s(+1) = 1`, `gamma = 1`, `e = 1`, `a` the word: the head moves on by one slot and replaces
    what it finds.
    """
    ones = weights_BN.new_ones(len(weights_BN), 1)
    onward = one_hot(torch.tensor(2, device=weights_BN.device), 3).to(weights_BN.dtype).expand(len(weights_BN), 1, 3)
    heads = Heads(key=words_BW[:, None], strength=ones, gate=0 * ones, shift=onward, sharpening=ones)
    weights = address(memory_BNW, heads, weights_BN[:, None])
    return write(memory_BNW, weights, torch.ones_like(words_BW)[:, None], words_BW[:, None]), weights[:, 0]


class Ntm(RingMemory):
    """A write head that moves on by one slot a row, and read heads that look everywhere by content.

    The ring overwrites its oldest row. The head's place is the count of rows, modulo the slots. Two banks can't be
    merged, since a slot is a place and its row's age is told by it; rows leave only by rebuilding a bank from its
    journal.
    """

    kind: ClassVar[str] = "ntm"
    merge_rule: ClassVar[MergeRule] = "refused"
    # neighbours of a slot that matches say what it is about: alone slots close half as much of the gap
    piece: ClassVar[int] = 8

    def __init__(self, dims: Dims, options: CountedSlotOptions, budget_bytes: int) -> None:
        super().__init__(dims, options, budget_bytes)
        self.size_slots()

    def pointer(self, state: State) -> Tensor:
        """The write head's weighting `[B, N]` after the last write, one-hot; before any, on the last slot."""
        return one_hot((state["count"] - 1) % self.slots, self.slots).to(state["scope_scale"].dtype)

    def merge(self, states: Sequence[State]) -> State:
        """Refused.

        Raises:
            Unsupported: always.
        """
        raise Unsupported("ntm banks can't be merged, their slots are places: write both journals to a new bank")
