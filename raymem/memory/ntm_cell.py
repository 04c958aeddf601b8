"""The network that learns to use an NTM's memory: a controller, and the heads it drives `ntm.step` with.

Shape legend: `B` sequences, `T` steps, `I` inputs, `O` outputs, `N` slots, `W` word width, `H` heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

from raymem.memory.base import State
from raymem.memory.ntm import Heads, step

# Collier and Beel's: keeps a run from going to NaN
_CLIP = 20.0
_FIRST_MEMORY = 1e-6
# a softmax with this at one slot puts nearly all weight there
_FOCUS = 10.0


class NtmCell(nn.Module):
    """LSTM controller with an NTM memory; its state is a value handed in and out.

    The controller sees its input and the last reads; reading comes before writing, and the output joins what was read.
    The memory starts at one small constant, first reads and weightings are learned, keys and what is added go through
    tanh, head parameters and outputs are clipped to ±20: the settings that train most reliably. All heads start at
    slot 0: a head that starts everywhere must first learn to be somewhere, which takes copying twice as long.

    Args:
        inputs: I, width of an input.
        outputs: O, width of an output.
        slots: N.
        word: W.
        readers: heads that read.
        writers: heads that write.
        hidden: width of the controller.
        reach: how many slots a head may move in a step, either way.

    Reference:
        NTM (1410.5401) section 3; initial values and clipping of Collier and Beel 2018 (1807.08518).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        slots: int = 128,
        word: int = 20,
        readers: int = 1,
        writers: int = 1,
        hidden: int = 100,
        reach: int = 1,
    ) -> None:
        super().__init__()
        self.slots, self.word, self.readers, self.writers = slots, word, readers, writers
        self.reach = reach
        heads = readers + writers
        self.controller = nn.LSTMCell(inputs + readers * word, hidden)
        self.interface = nn.Linear(hidden, heads * sum(self._sizes()) + writers * 2 * word)
        self.output = nn.Linear(hidden + readers * word, outputs)
        self.first_reads = nn.Parameter(torch.randn(readers, word))
        self.first_weights = nn.Parameter(_FOCUS * one_hot(torch.zeros(heads, dtype=torch.int64), slots).float())

    def init_state(self, batch: int) -> State:
        """The constant memory, the learned first reads and weightings, and a controller of zeros."""
        weights = torch.softmax(self.first_weights, -1).expand(batch, -1, -1)
        zeros = self.first_reads.new_zeros(batch, self.controller.hidden_size)
        return {
            "memory": self.first_reads.new_full((batch, self.slots, self.word), _FIRST_MEMORY),
            "read_weights": weights[:, : self.readers],
            "write_weights": weights[:, self.readers :],
            "reads": torch.tanh(self.first_reads).expand(batch, -1, -1),
            "hidden": zeros,
            "cell": zeros,
        }

    def step(self, state: State, input_BI: Tensor) -> tuple[State, Tensor]:
        """One time step: the state after it, and the output `[B, O]`."""
        seen = torch.cat([input_BI, state["reads"].flatten(1)], -1)
        hidden, cell = self.controller(seen, (state["hidden"], state["cell"]))
        state = step(state, *self.says(hidden)) | {"hidden": hidden, "cell": cell}
        output = self.output(torch.cat([hidden, state["reads"].flatten(1)], -1))
        return state, output.clamp(-_CLIP, _CLIP)

    def forward(self, inputs_BTI: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Outputs `[B, T, O]` of a sequence, and the state after it; from the first state without one."""
        state = self.init_state(len(inputs_BTI)) if state is None else state
        outputs = []
        for input_BI in inputs_BTI.unbind(1):
            state, output = self.step(state, input_BI)
            outputs.append(output)
        return torch.stack(outputs, 1), state

    def says(self, hidden: Tensor) -> tuple[Heads, Heads, Tensor, Tensor]:
        """Reading heads, writing heads, what they erase and what they add, with their activations."""
        drawn = self.interface(hidden).clamp(-_CLIP, _CLIP)
        written = self.writers * self.word
        heads, erase, add = drawn.split([(self.readers + self.writers) * sum(self._sizes()), written, written], -1)
        by_head = heads.reshape(len(hidden), -1, sum(self._sizes()))
        key, strength, gate, shift, sharpening = by_head.split(self._sizes(), -1)
        both = Heads(
            key=torch.tanh(key),
            strength=softplus(strength[..., 0]),
            gate=torch.sigmoid(gate[..., 0]),
            shift=torch.softmax(shift, -1),
            sharpening=1 + softplus(sharpening[..., 0]),
        )
        readers = Heads(*(part[:, : self.readers] for part in both))
        writers = Heads(*(part[:, self.readers :] for part in both))
        shape = (len(hidden), self.writers, self.word)
        return readers, writers, torch.sigmoid(erase).reshape(shape), torch.tanh(add).reshape(shape)

    def _sizes(self) -> list[int]:
        return [self.word, 1, 1, 2 * self.reach + 1, 1]
