"""The network that learns to use a DNC's memory: a controller, and the interface it drives `dnc.step` with.

Shape legend: `B` sequences, `T` steps, `I` inputs, `O` outputs, `W` word width, `R` read heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from raymem.memory.base import State
from raymem.memory.dnc import Interface, empty_slots, step


class DncCell(nn.Module):
    """LSTM controller with a DNC memory; its state is a value handed in and out.

    The controller sees its input and the last reads; its output joins what was just read. `masked` adds key masks,
    `deallocate` wipes freed slots, `sharp` sharpens links.

    Args:
        inputs: I, width of an input.
        outputs: O, width of an output.
        slots: N.
        word: W.
        heads: R.
        hidden: width of the controller.
        masked: learn which dimensions of a word a key is compared in.
        deallocate: multiply slots by their retention when they are freed.
        sharp: learn a power for the backward and forward weightings.

    Reference:
        Graves et al. 2016, Nature 538:471, Methods, "Controller network" and "Interface parameters"; the options are
        Csordás and Schmidhuber's (1904.10278).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        slots: int = 16,
        word: int = 16,
        heads: int = 4,
        hidden: int = 64,
        masked: bool = False,
        deallocate: bool = False,
        sharp: bool = False,
    ) -> None:
        super().__init__()
        self.slots, self.word, self.heads, self.deallocate = slots, word, heads, deallocate
        self.masked, self.sharp = masked, sharp
        self.controller = nn.LSTMCell(inputs + heads * word, hidden)
        self.interface = nn.Linear(hidden, sum(self._sizes()))
        self.output = nn.Linear(hidden + heads * word, outputs)

    def init_state(self, batch: int) -> State:
        """Zeros everywhere, controller included."""
        slots = empty_slots(batch, self.slots, self.word, self.heads, self.output.weight.dtype)
        zeros = slots["usage"].new_zeros(batch, self.controller.hidden_size)
        slots = {name: tensor.to(self.output.weight.device) for name, tensor in slots.items()}
        return slots | {"hidden": zeros.to(self.output.weight.device), "cell": zeros.to(self.output.weight.device)}

    def step(self, state: State, input_BI: Tensor) -> tuple[State, Tensor]:
        """One time step: the state after it, and the output `[B, O]`."""
        seen = torch.cat([input_BI, state["reads"].flatten(1)], -1)
        hidden, cell = self.controller(seen, (state["hidden"], state["cell"]))
        state = step(state, self.says(hidden), deallocate=self.deallocate) | {"hidden": hidden, "cell": cell}
        return state, self.output(torch.cat([hidden, state["reads"].flatten(1)], -1))

    def forward(self, inputs_BTI: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Outputs `[B, T, O]` of a sequence, and the state after it; from zeros without a state."""
        state = self.init_state(len(inputs_BTI)) if state is None else state
        outputs = []
        for input_BI in inputs_BTI.unbind(1):
            state, output = self.step(state, input_BI)
            outputs.append(output)
        return torch.stack(outputs, 1), state

    def says(self, hidden: Tensor) -> Interface:
        """The interface vector with its activations: oneplus strengths, sigmoid gates, softmax modes, linear words."""
        heads, word = self.heads, self.word
        parts = iter(self.interface(hidden).split(self._sizes(), -1))
        by_head = (len(hidden), heads, -1)
        return Interface(
            read_keys=next(parts).reshape(by_head),
            read_strengths=_oneplus(next(parts)),
            write_key=next(parts),
            write_strength=_oneplus(next(parts))[:, 0],
            erase=torch.sigmoid(next(parts)),
            write_vector=next(parts),
            free_gates=torch.sigmoid(next(parts)),
            allocation_gate=torch.sigmoid(next(parts))[:, 0],
            write_gate=torch.sigmoid(next(parts))[:, 0],
            modes=torch.softmax(next(parts).reshape(by_head), -1),
            read_masks=torch.sigmoid(next(parts)).reshape(len(hidden), heads, word) if self.masked else None,
            write_mask=torch.sigmoid(next(parts)) if self.masked else None,
            sharpness=_oneplus(next(parts)).reshape(by_head) if self.sharp else None,
        )

    def _sizes(self) -> list[int]:
        heads, word = self.heads, self.word
        sizes = [heads * word, heads, word, 1, word, word, heads, 1, 1, 3 * heads]
        return sizes + ([heads * word, word] if self.masked else []) + ([2 * heads] if self.sharp else [])


def _oneplus(x: Tensor) -> Tensor:
    return 1 + softplus(x)
