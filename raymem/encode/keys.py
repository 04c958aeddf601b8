"""From hidden states to unit keys: centre, mean over a window, whiten, scale to unit length.

Every sum is a fixed tree of elementwise additions, or exact in float64, so that a key has the same bits however its run
was cut into calls. A library's batched reduction or matmul does not promise that. The arithmetic is numpy's, whose
elementwise loops stay on one thread: beside a busy model, torch's thread barrier costs a hundred times the work of
1,000 rows.

Shape legend: `N` rows, `L` layers, `D` hidden width, `K` = L·D key width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymem.encode.calibration import Calibration
from raymem.errors import InvalidSpec
from raymem.tensors import to_bits
from raymem.types import KeySpec

Array = NDArray[Any]
Floats = NDArray[np.float32]

_LARGEST = np.float32(1e30)
_STATE_BITS = 20
_EXACT_BITS = 52


class ContextRows(NamedTuple):
    """Consecutive states `[Q, L, D]` of one context, the first at position `start`; the last `asked` are queries.

    The others are there for the windows of these. None: all are.
    """

    hidden_QLD: Tensor
    start: int = 1
    asked: int | None = None

    @property
    def queries(self) -> int:
        """How many of the states are queries."""
        return len(self.hidden_QLD) if self.asked is None else self.asked


class KeyMaker:
    """One key function over one calibration: hidden states in, keys out; holds no state of any run.

    Args:
        calibration: knows every layer of the key.
        key: the key function; empty `layers` means all of `layers`.
        layers: the layers that the states carry, in their order; the calibration's when not given.

    Raises:
        InvalidSpec: the key wants a layer that the states or the calibration don't have.
    """

    def __init__(self, calibration: Calibration, key: KeySpec, layers: Sequence[int] | None = None) -> None:
        carried = tuple(layers or calibration.layers)
        if missing := [layer for layer in key.layers if layer not in carried]:
            raise InvalidSpec(f"the key wants layers {missing}; the rows carry {list(carried)}: choose among those")
        if len(set(key.layers)) < len(key.layers):
            raise InvalidSpec(f"the key names layers {list(key.layers[:20])}, some twice: name each once")
        self.key = key.model_copy(update={"layers": key.layers or carried})
        self.window = 1 if key.function == "single" else key.window
        self.width = len(self.key.layers) * calibration.width
        self._picked = [carried.index(layer) for layer in self.key.layers]
        known = calibration.layers
        if missing := [layer for layer in self.key.layers if layer not in known]:
            raise InvalidSpec(
                f"layers {missing} are not in the calibration, which was made for {list(known)}; "
                "run `raymem calibrate` for them or choose among those"
            )
        places = [known.index(layer) for layer in self.key.layers]
        self._mean_LD = calibration.mean_LD[places].numpy()
        whiten_LDD = calibration.whiten_LDD
        self._grid_LDD = None if whiten_LDD is None else whitening_grid(whiten_LDD[places])

    def pick(self, hidden_NLD: Tensor) -> Array:
        """The states of the key's layers, as `to_bits` gives them."""
        bits_NLD = to_bits(hidden_NLD)
        return bits_NLD if len(self._picked) == bits_NLD.shape[1] == 1 else bits_NLD[:, self._picked]

    def make(self, bits_NLD: Array, ages_N: NDArray[np.int64], wanted_N: NDArray[np.int64]) -> Tensor:
        """Keys [wanted, K] of some rows, float32 and of unit length.

        Args:
            bits_NLD: picked states.
            ages_N: how far back each row's window may reach, see `ages`.
            wanted_N: indices of the rows to make keys of.
        """
        if self.window == 1:
            states_NLD = centre(bits_NLD[wanted_N], self._mean_LD)
        else:
            states_NLD = window_mean(centre(bits_NLD, self._mean_LD), ages_N, self.window)[wanted_N]
        if self._grid_LDD is not None:
            states_NLD = whiten(states_NLD, self._grid_LDD)
        return torch.from_numpy(unit(states_NLD))

    def of_run(self, hidden_NLD: Tensor, start: int = 0) -> Tensor:
        """Keys [N, K] of consecutive states of one context, the first at position `start`."""
        return self.of_contexts([ContextRows(hidden_NLD, start)])

    def of_contexts(self, contexts: Sequence[ContextRows]) -> Tensor:
        """Keys [Q, K] of the queries of some contexts; position 0, the attention sink, gives a row of zeros."""
        hidden_NLD = torch.cat([context.hidden_QLD for context in contexts]).cpu()
        lengths = [len(context.hidden_QLD) for context in contexts]
        index_N = np.concatenate([np.arange(length) for length in lengths])
        start_N, length_N, queries_N = (
            np.repeat(column, lengths)
            for column in ([each.start for each in contexts], lengths, [each.queries for each in contexts])
        )
        sink_N = index_N == -start_N
        wanted_Q = np.nonzero(index_N >= length_N - queries_N)[0]
        keys_QK = self.make(self.pick(hidden_NLD), ages(index_N == 0, sink_N), wanted_Q)
        keys_QK[torch.from_numpy(sink_N[wanted_Q])] = 0
        return keys_QK


def centre(bits_NLD: Array, mean_LD: Floats) -> Floats:
    """Hidden states (as `to_bits` gives them) minus the calibration's mean, in float32."""
    if bits_NLD.dtype == np.uint16:
        # bfloat16 is the upper half of a float32
        wide_NLD = bits_NLD.astype(np.uint32)
        wide_NLD <<= np.uint32(16)
        states_NLD: Floats = wide_NLD.view(np.float32)
    else:
        states_NLD = bits_NLD.astype(np.float32)
    states_NLD -= mean_LD
    # a finite state must not become an infinite window sum
    return np.clip(states_NLD, -_LARGEST, _LARGEST, out=states_NLD)


def ages(breaks_N: NDArray[np.bool_], sink_N: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many rows a trailing window may hold at each row, counting the row itself.

    Args:
        breaks_N: the row does not follow the one before it (another run, a gap).
        sink_N: the row is the attention sink at position 0: age 0, and its follower starts at 1.
    """
    index_N = np.arange(len(breaks_N))
    starts_N = breaks_N | sink_N
    starts_N[1:] |= sink_N[:-1]
    first_N = np.maximum.accumulate(np.where(starts_N, index_N, 0))
    return np.where(sink_N, 0, index_N - first_N + 1)


def window_mean(states_NLD: Floats, ages_N: NDArray[np.int64], window: int) -> Floats:
    """Mean of each row and the up to `window - 1` rows before it; rows of age 0 give zeros.

    Args:
        states_NLD: centred states.
        ages_N: how far back each row may look, see `ages`.
        window: rows, at least 1.
    """
    # sums of 1, 2, 4, … rows by doubling; a window is put together from its binary digits, newest rows first
    power_NLD = states_NLD * (ages_N > 0)[:, None, None]
    total_NLD: Floats | None = None
    taken, size = 0, 1
    while True:
        if window & size:
            part_NLD = _earlier(power_NLD, ages_N, taken)
            total_NLD = part_NLD if total_NLD is None else total_NLD + part_NLD
            taken += size
        if taken == window:
            break
        power_NLD = power_NLD + _earlier(power_NLD, ages_N, size)
        size *= 2
    assert total_NLD is not None
    return total_NLD / np.clip(ages_N, 1, window).astype(np.float32)[:, None, None]


def _earlier(rows_NLD: Floats, ages_N: NDArray[np.int64], back: int) -> Floats:
    """The row `back` places before each row, or zeros where that lies before its run's start."""
    if back == 0:
        return rows_NLD
    moved_NLD = np.zeros_like(rows_NLD)
    moved_NLD[back:] = rows_NLD[:-back]
    moved_NLD[ages_N <= back] = 0
    return moved_NLD


def whitening_grid(whiten_LDD: Tensor) -> NDArray[np.float64]:
    """A whitening matrix as whole numbers, small enough that `whiten` adds without rounding.

    The scale of each layer is lost: keys are made unit length afterwards.
    """
    exact_LDD = whiten_LDD.numpy().astype(np.float64)
    bits = _EXACT_BITS - _STATE_BITS - (exact_LDD.shape[-1] - 1).bit_length()
    largest_L11 = np.abs(exact_LDD).max((1, 2), keepdims=True)
    grid_LDD: NDArray[np.float64] = np.rint(exact_LDD / largest_L11 * 2.0**bits)
    return grid_LDD


def whiten(states_NLD: Floats, grid_LDD: NDArray[np.float64]) -> Floats:
    """States times the whitening matrix of their layer, up to a positive factor a row.

    States are rounded to 20 bits of their row's largest entry. Sums of such products fit float64 exactly, so any
    order of addition, hence any matmul, gives the same bits.
    """
    largest_NL1 = np.abs(states_NLD).max(-1, keepdims=True).astype(np.float64)
    exponent_NL1 = np.frexp(largest_NL1)[1]
    whole_LND = np.rint(np.ldexp(states_NLD.astype(np.float64), _STATE_BITS - exponent_NL1)).swapaxes(0, 1)
    white_NLD: Floats = np.matmul(whole_LND, grid_LDD).swapaxes(0, 1).astype(np.float32)
    return white_NLD


def unit(states_NLD: Floats) -> Floats:
    """Each layer scaled to unit length, layers side by side, the whole of unit length: [N, L·D].

    A row of zeros stays zeros: its cosine with everything is 0.
    """
    largest_NL1 = np.abs(states_NLD).max(-1, keepdims=True)
    scaled_NLD = states_NLD / np.where(largest_NL1 > 0, largest_NL1, np.float32(1))
    # a sum over the last axis by halving it
    square_NLD = scaled_NLD * scaled_NLD
    while (width := square_NLD.shape[-1]) > 1:
        half = width // 2
        folded_NLD = square_NLD[..., :half] + square_NLD[..., half : 2 * half]
        if width % 2:
            folded_NLD[..., :1] += square_NLD[..., -1:]
        square_NLD = folded_NLD
    length_NL1 = np.sqrt(square_NLD * np.float32(states_NLD.shape[1]))
    scaled_NLD /= np.where(length_NL1 > 0, length_NL1, np.float32(1))
    # adding zero turns -0 into 0: equal keys are equal bits
    scaled_NLD += np.float32(0)
    keys_NK: Floats = scaled_NLD.reshape(len(scaled_NLD), scaled_NLD.shape[1] * scaled_NLD.shape[2])
    return keys_NK
