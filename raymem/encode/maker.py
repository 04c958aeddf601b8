"""One key function over one calibration: hidden states in, keys out.

Shape legend: `N` rows, `L` layers of the states, `D` hidden width, `K` key width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymem.encode import keys
from raymem.encode.calibration import Calibration
from raymem.errors import InvalidSpec
from raymem.types import KeySpec


class KeyMaker:
    """Turns hidden states into keys; holds no state of any run.

    Args:
        calibration: knows every layer of the key.
        key: the key function; empty `layers` means all of `layers`.
        layers: the layers that the states carry, in their order; the calibration's when not given.

    Raises:
        InvalidSpec: the key wants a layer that the states or the calibration don't have.
    """

    def __init__(self, calibration: Calibration, key: KeySpec, layers: Sequence[int] | None = None) -> None:
        carried = tuple(layers or calibration.layers)
        missing = [layer for layer in key.layers if layer not in carried]
        if missing:
            raise InvalidSpec(f"the key wants layers {missing}; the rows carry {list(carried)}: choose among those")
        if len(set(key.layers)) < len(key.layers):
            raise InvalidSpec(f"the key names layers {list(key.layers[:20])}, some twice: name each once")
        self.key = key.model_copy(update={"layers": key.layers or carried})
        self.window = 1 if key.function == "single" else key.window
        self.width = len(self.key.layers) * calibration.width
        self._picked = [carried.index(layer) for layer in self.key.layers]
        places = calibration.places(self.key.layers)
        self._mean_LD = calibration.mean_LD[places].numpy()
        whiten_LDD = calibration.whiten_LDD
        self._grid_LDD = None if whiten_LDD is None else keys.whitening_grid(whiten_LDD[places])

    def pick(self, hidden_NLD: Tensor) -> keys.Array:
        """The states of the key's layers, as numpy sees them."""
        bits_NLD = keys.to_bits(hidden_NLD)
        return bits_NLD if len(self._picked) == bits_NLD.shape[1] == 1 else bits_NLD[:, self._picked]

    def make(self, bits_NLD: keys.Array, ages_N: NDArray[np.int64], wanted_N: NDArray[np.int64]) -> Tensor:
        """Keys [wanted, K] of some rows, float32 and of unit length.

        Args:
            bits_NLD: picked states.
            ages_N: how far back each row's window may reach.
            wanted_N: indices of the rows to make keys of.
        """
        if self.window == 1:
            states_NLD = keys.centre(bits_NLD[wanted_N], self._mean_LD)
        else:
            states_NLD = keys.window_mean(keys.centre(bits_NLD, self._mean_LD), ages_N, self.window)[wanted_N]
        if self._grid_LDD is not None:
            states_NLD = keys.whiten(states_NLD, self._grid_LDD)
        return torch.from_numpy(keys.unit(states_NLD))

    def of_run(self, hidden_NLD: Tensor, start: int = 0) -> Tensor:
        """Keys [N, K] of consecutive states of one context; position 0, the attention sink, gives a row of zeros.

        Args:
            hidden_NLD: states of the carried layers.
            start: position of the first one in its context.
        """
        rows = len(hidden_NLD)
        index_N = np.arange(rows)
        sink_N = index_N == -start
        ages_N = keys.ages(index_N == 0, sink_N)
        keys_NK = self.make(self.pick(hidden_NLD), ages_N, index_N)
        keys_NK[torch.from_numpy(sink_N)] = 0
        return keys_NK
