"""Compressors turn a block of old rows into fewer: by pooling, selection, or learned convolutions.

Rae et al. 2019, "Compressive Transformers for Long-Range Sequence Modelling" (arXiv 1911.05507), section 3.2, where
they are `f_c: R^{n_s x d} -> R^{(n_s / c) x d}`.

Shape legend: `G` blocks, `S` rows of a block, `c` the ratio, `M = S / c` rows that a block becomes, `d` row width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, gelu, pad

CompressorName = Literal["mean", "max", "subsample", "most_used", "conv", "dilated_conv"]
_BLOCKS_AT_ONCE = 8
_DILATIONS = (1, 2)


class Compressor(nn.Module, ABC):
    """A compression function of ratio `c`.

    A pooling one makes a row of every c rows, which stands for all of their tokens and the mean of their vectors; a
    selecting one keeps some rows as they are, each with its own token and vector.
    """

    selects: ClassVar[bool] = False
    wants_use: ClassVar[bool] = False

    def __init__(self, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio

    @abstractmethod
    def forward(self, rows_GSd: Tensor, use_GS: Tensor | None = None) -> Tensor:
        """Rows `[G, S, d]` -> `[G, M, d]`; `use_GS` is the average attention that each row received."""

    def tokens(self, tokens_GS: Tensor, use_GS: Tensor | None = None) -> Tensor:
        """The tokens `[G, M, c]` (selected: `[G, M, 1]`) that each new row stands for."""
        return _grouped(tokens_GS, self.ratio)

    def vectors(self, values_GSV: Tensor, use_GS: Tensor | None = None) -> Tensor:
        """The vectors `[G, M, V]` that go with the new rows."""
        return mean_pool(values_GSV, self.ratio)


def mean_pool(rows_GSd: Tensor, ratio: int) -> Tensor:
    """Mean of every `ratio` rows, added up in their order whatever the number of blocks."""
    parts = _grouped(rows_GSd, ratio).unbind(2)
    return sum(parts[1:], parts[0]) / ratio


def _grouped(rows_GS: Tensor, ratio: int) -> Tensor:
    return rows_GS.reshape(len(rows_GS), -1, ratio, *rows_GS.shape[2:])


class Mean(Compressor):
    """Mean of every c rows."""

    def forward(self, rows_GSd: Tensor, use_GS: Tensor | None = None) -> Tensor:
        """See Compressor."""
        return mean_pool(rows_GSd, self.ratio)


class Max(Compressor):
    """Largest entry of every c rows."""

    def forward(self, rows_GSd: Tensor, use_GS: Tensor | None = None) -> Tensor:
        """See Compressor."""
        return _grouped(rows_GSd, self.ratio).amax(2)


class Selector(Compressor):
    """Base of those that keep some rows of a block, in their order."""

    selects = True

    @abstractmethod
    def picks(self, like_GS: Tensor, use_GS: Tensor | None) -> Tensor:
        """Indices `[G, M]` of the rows to keep, ascending; `like_GS` says how many there are."""

    def forward(self, rows_GSd: Tensor, use_GS: Tensor | None = None) -> Tensor:
        """See Compressor."""
        return rows_GSd.gather(1, self.picks(rows_GSd[..., 0], use_GS)[..., None].expand(-1, -1, rows_GSd.shape[2]))

    def tokens(self, tokens_GS: Tensor, use_GS: Tensor | None = None) -> Tensor:
        """See Compressor."""
        return tokens_GS.gather(1, self.picks(tokens_GS, use_GS))[..., None]

    def vectors(self, values_GSV: Tensor, use_GS: Tensor | None = None) -> Tensor:
        """See Compressor."""
        return self.forward(values_GSV, use_GS)


class Subsample(Selector):
    """The last of every c rows."""

    def picks(self, like_GS: Tensor, use_GS: Tensor | None) -> Tensor:
        """See Selector."""
        last_M = torch.arange(self.ratio - 1, like_GS.shape[1], self.ratio, device=like_GS.device)
        return last_M.expand(len(like_GS), -1)


class MostUsed(Selector):
    """The rows of a block that received most attention, the earlier of equals; `use_GS` is needed."""

    wants_use = True

    def picks(self, like_GS: Tensor, use_GS: Tensor | None) -> Tensor:
        """See Selector."""
        assert use_GS is not None, "the most used rows are chosen by their use"
        ranked_GS = use_GS.argsort(dim=1, descending=True, stable=True)
        return ranked_GS[:, : like_GS.shape[1] // self.ratio].sort(dim=1).values


class Conv(Compressor):
    """Convolution of kernel and stride c; starts as mean pooling, so that it is of use before it is trained."""

    def __init__(self, ratio: int, width: int) -> None:
        super().__init__(ratio)
        self.weight = nn.Parameter(torch.eye(width)[..., None].repeat(1, 1, ratio) / ratio)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, rows_GSd: Tensor, use_GS: Tensor | None = None) -> Tensor:
        """See Compressor."""
        return _in_equal_parts(self._convolve, rows_GSd)

    def _convolve(self, rows_GSd: Tensor) -> Tensor:
        weight, bias = self.weight.to(rows_GSd.dtype), self.bias.to(rows_GSd.dtype)
        return conv1d(rows_GSd.mT, weight, bias, stride=self.ratio).mT


class DilatedConv(Conv):
    """Residual convolutions of growing dilation over the block, then one of kernel and stride c; starts as the mean.

    It sees beyond c rows where a block is longer than that.
    """

    def __init__(self, ratio: int, width: int) -> None:
        super().__init__(ratio, width)
        self.weights = nn.ParameterList(torch.zeros(width, width, 3) for _ in _DILATIONS)
        self.biases = nn.ParameterList(torch.zeros(width) for _ in _DILATIONS)

    def _convolve(self, rows_GSd: Tensor) -> Tensor:
        for dilation, weight, bias in zip(_DILATIONS, self.weights, self.biases, strict=True):
            weight, bias = weight.to(rows_GSd.dtype), bias.to(rows_GSd.dtype)
            rows_GSd = rows_GSd + gelu(conv1d(rows_GSd.mT, weight, bias, padding=dilation, dilation=dilation)).mT
        return super()._convolve(rows_GSd)


def _in_equal_parts(function: Callable[[Tensor], Tensor], rows_GSd: Tensor) -> Tensor:
    # parts of one size: a product's rounding depends on its shape, and must not on how rows arrived
    padded = pad(rows_GSd, (0, 0, 0, 0, 0, -len(rows_GSd) % _BLOCKS_AT_ONCE))
    return torch.cat([function(part) for part in torch.split(padded, _BLOCKS_AT_ONCE)])[: len(rows_GSd)]


def compressor(name: CompressorName, ratio: int, width: int) -> Compressor:
    """The compression function `name` for rows of `width`."""
    plain: dict[str, type[Compressor]] = {"mean": Mean, "max": Max, "subsample": Subsample, "most_used": MostUsed}
    if name in plain:
        return plain[name](ratio)
    return Conv(ratio, width) if name == "conv" else DilatedConv(ratio, width)


class Projections(NamedTuple):
    """An attention layer's matrices, `[d, d_head]` each or `[heads, d, d_head]`; `row @ matrix`."""

    query: Tensor
    key: Tensor
    value: Tensor


def attention(queries_GQd: Tensor, rows_GSd: Tensor, projections: Projections) -> Tensor:
    """Content attention without positions `[G, Q, d_head]` (heads: `[G, heads, Q, d_head]`).

    Reference:
        1911.05507 algorithm 2: `softmax((h Q) (m K)^T / sqrt(d_k)) (m V)`.
    """
    if projections.query.dim() == 3:
        queries_GQd, rows_GSd = queries_GQd[:, None], rows_GSd[:, None]
    query, key = queries_GQd @ projections.query, rows_GSd @ projections.key
    return torch.softmax(query @ key.mT / key.shape[-1] ** 0.5, -1) @ (rows_GSd @ projections.value)


def attention_reconstruction_loss(
    compress: Callable[[Tensor], Tensor], hidden_GQd: Tensor, old_GSd: Tensor, projections: Projections
) -> Tensor:
    """Mean square difference between attention over the old rows and over the compressed ones.

    Only the compressor gets a gradient: hidden states, old rows and the projections are constants here.

    Reference:
        1911.05507 algorithm 2: `|Attn(h, old) - Attn(h, f_c(old))|^2`.
    """
    hidden, old = hidden_GQd.detach(), old_GSd.detach()
    fixed = Projections(*(matrix.detach() for matrix in projections))
    return (attention(hidden, old, fixed) - attention(hidden, compress(old), fixed)).square().mean()


def auto_encoding_loss(
    compress: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], old_GSd: Tensor
) -> Tensor:
    """Mean square difference between old rows and what a decoder makes of their compression.

    Compressor and decoder get gradients, the rows none.

    Reference:
        1911.05507 section 3.3: `|old - g(f_c(old))|^2`.
    """
    old = old_GSd.detach()
    return (old - decode(compress(old))).square().mean()
