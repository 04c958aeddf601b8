"""Fitting a compressor: attention over compressed rows should equal attention over the rows.

Rae et al. 2019 (arXiv 1911.05507) section 3.3. The attention is the memory's own read, `softmax(beta cos)` over unit
rows, the projections being the identity.

Shape legend: `G` stretches, `L` old rows, `S` rows of a block, `Q` queries, `K` key width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from raymem.errors import InvalidInput
from raymem.memory.base import Memory
from raymem.memory.compressive import Compressive
from raymem.memory.compressors import (
    Compressor,
    Conv,
    Projections,
    attention_reconstruction_loss,
    auto_encoding_loss,
    compressor,
)
from raymem.memory.learned import of_memory
from raymem.train.data import Lessons, windows
from raymem.train.loop import Task, weights_of

Goal = Literal["attention", "auto_encoding"]
_BLOCKS, _QUERIES, _BATCH = 16, 64, 8
# a few thousand rows don't say enough to move a convolution's weights far
_NEAR = 0.03


class CompressiveTask(Task):
    """A convolution that compresses blocks of rows, in place of pooling.

    Args:
        memory: with a compressor that learns.
        lessons: rows.
        goal: the paper's better loss, "attention" reconstruction, or "auto_encoding".
    """

    metric = "loss of attention over compressed rows beside the rows themselves, mean pooling being 1; lower is better"

    def __init__(self, memory: Memory, lessons: Lessons, goal: Goal = "attention") -> None:
        self.memory, self.goal = cast(Compressive, memory), goal
        self._keys_NK = self.memory.project(lessons.rows.keys_NK)
        self._split, self._old = lessons.split, _BLOCKS * self.memory.block
        width = self.memory.key_dims
        eye = torch.eye(width)
        self._attention = Projections(eye * self.memory.how.strength * width**0.5, eye, eye)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self._decode = nn.Linear(width, self.memory.how.ratio * width)
        if lessons.held < self._old + _QUERIES:
            raise InvalidInput(
                f"{lessons.held} rows are held out and judging a compressor of blocks of {self.memory.block} needs "
                f"{self._old + _QUERIES}: write more text to the bank first"
            )
        self._start()

    def weights(self) -> dict[str, Tensor]:
        """The compressor's, and the decoder's where one is trained along."""
        found = weights_of(self.memory)
        if self.goal == "attention":
            return found
        return found | {f"decode.{name}": weight for name, weight in self._decode.named_parameters()}

    def loss(self, generator: torch.Generator) -> Tensor:
        """See Task."""
        last = self._split - self._old - _QUERIES
        starts = torch.randint(max(1, last + 1), (_BATCH,), generator=generator)
        if self.goal == "attention":
            weights = dict(self.memory.named_parameters())
            moved = torch.stack([(weights[name] - first).square().sum() for name, first in self._first.items()]).sum()
            return self._attention_loss(self.memory.compress, starts) / self._scale + _NEAR * moved
        blocks = windows(self._keys_NK, starts, self._old).reshape(-1, self.memory.block, self.memory.key_dims)
        return auto_encoding_loss(self.memory.compress, self._decoded, blocks)

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """See Task."""
        step = self._old + _QUERIES
        starts = torch.arange(self._split, len(self._keys_NK) - step + 1, step)
        how = (self.memory.how.ratio, self.memory.key_dims)
        others: dict[str, Compressor] = {
            "mean": compressor("mean", *how),
            "max": compressor("max", *how),
            "subsample": compressor("subsample", *how),
        }
        found = {name: float(self._attention_loss(by, starts)) for name, by in others.items()}
        trained = float(self._attention_loss(self.memory.compress, starts))
        return {"trained": trained / found["mean"]} | {name: loss / found["mean"] for name, loss in found.items()}

    def learned(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """See Task."""
        return of_memory(self.memory), {"compressor": self.memory.how.compressor}

    @torch.no_grad()
    def _start(self) -> None:
        """Begin as mean pooling or as subsampling, whichever loses less of the rows to learn from, and stay near it."""
        step, how = self._old + _QUERIES, (self.memory.how.ratio, self.memory.key_dims)
        starts = torch.arange(0, self._split - step + 1, step)
        mean, last = (self._attention_loss(compressor(name, *how), starts) for name in ("mean", "subsample"))
        if last < mean:
            weight = cast(Conv, self.memory.compress).weight
            weight.zero_()[..., -1] = torch.eye(len(weight))
        self._scale = float(torch.minimum(mean, last))
        self._first = {name: weight.clone() for name, weight in self.memory.named_parameters()}

    def _attention_loss(self, by: Compressor, starts_G: Tensor) -> Tensor:
        old = windows(self._keys_NK, starts_G, self._old)
        queries = windows(self._keys_NK, starts_G + self._old, _QUERIES)

        def compressed(rows_GLK: Tensor) -> Tensor:
            blocks = rows_GLK.reshape(-1, self.memory.block, rows_GLK.shape[-1])
            return normalize(by(blocks), dim=-1).reshape(len(rows_GLK), -1, rows_GLK.shape[-1])

        return attention_reconstruction_loss(compressed, queries, old, self._attention)

    def _decoded(self, compressed_GMK: Tensor) -> Tensor:
        return cast(Tensor, self._decode(compressed_GMK)).reshape(len(compressed_GMK), self.memory.block, -1)
