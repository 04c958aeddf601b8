"""SPALM: a datastore of (key, next token) with a short first-in-first-out cache and a learned gate.

Yogatama et al. 2021, "Adaptive Semiparametric Language Models" (arXiv 2102.02557); the datastore and the training-free
read are kNN-LM's (Khandelwal et al. 2020, arXiv 1911.00172).

Shape legend: `N` rows, `Q` queries, `K` key width, `V` value width, `D` model width, `k` neighbours.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from raymem.errors import InvalidTrace
from raymem.kernels.topk_cosine import topk_cosine
from raymem.memory.base import (
    ROWS_END,
    Dims,
    EncodedRows,
    Found,
    MergeRule,
    Options,
    Projection,
    Seed,
    State,
    StateSpec,
    TensorSpec,
)
from raymem.memory.eviction import EvictionOptions
from raymem.memory.quantize import STORED, KeyDtype, pack, unpack
from raymem.memory.rows import RowMemory, RowState

_TOKEN_MAX = torch.iinfo(torch.int32).max


class SpalmOptions(EvictionOptions):
    """How rows are kept and which of them stay.

    `key_dtype` and `key_dims` (None: the key's own width, else a projection drawn from `projection_seed`) trade bytes
    for precision. `eviction` says which row makes room in a full bank. The newest `n_short` rows, at most half of what
    there is room for, are the short-term memory: no eviction takes them. `tau` is the temperature of the blend of
    vector values, and 1/tau the strength with which "im" attends.

    Policies other than "fifo" take rows one by one: 0.2 ms each, and those that go by content a look at every key.
    """

    key_dtype: KeyDtype = "bfloat16"
    key_dims: int | None = Field(default=None, ge=1)
    projection_seed: Seed = 0
    n_short: int = Field(default=128, ge=0)
    tau: float = Field(default=0.08, gt=0)


class Spalm(RowMemory):
    """Every row is kept until the budget is full; then the one that the eviction policy picks goes.

    A read finds the k nearest rows by cosine, exactly, ties to the earlier row. Forgetting rows is exact, and so is
    merging, for a datastore is a set.
    """

    kind: ClassVar[str] = "spalm"
    merge_rule: ClassVar[MergeRule] = "exact"
    options_type: ClassVar[type[Options]] = SpalmOptions
    learns: ClassVar[tuple[str, ...]] = ("rule",)

    def __init__(self, dims: Dims, options: SpalmOptions, budget_bytes: int) -> None:
        width = options.key_dims or dims.key
        self._widths = (width, dims.value)
        self._stored = STORED[options.key_dtype]
        # first in, first out is what a ring of rows does without a policy
        rule = None if options.eviction == "fifo" else options.rule(width, 1 / options.tau)
        super().__init__(dims, options, budget_bytes, rule, options.n_short)
        self.spalm = options
        self.project = Projection(dims.key, options.key_dims, options.projection_seed)

    def columns_spec(self) -> StateSpec:
        """A packed key, its token (32 bits: 16 overflow on any modern vocabulary), where it came from, its vector."""
        key, value = self._widths
        spec = {
            "key": TensorSpec((key,), self._stored),
            "key_scale": TensorSpec((), low=0),
            "token": TensorSpec((), torch.int32, low=-1),
            "pos": TensorSpec((), torch.int64, low=0, high=ROWS_END),
            "seq": TensorSpec((), torch.int64, low=0, high=ROWS_END),
            "source": TensorSpec((), torch.int32, low=0),
        }
        return spec | ({"value": TensorSpec((value,), torch.bfloat16)} if value else {})

    def encode(self, rows: EncodedRows) -> State:
        """Project and pack the keys.

        Raises:
            InvalidTrace: a token id that 32 bits can't hold, or rows without the vectors that this bank keeps.
        """
        if len(rows) and int(rows.tokens_N.max()) > _TOKEN_MAX:
            raise InvalidTrace(f"token id {int(rows.tokens_N.max())} is over {_TOKEN_MAX}, the largest a bank keeps")
        key, scale = pack(self.project(rows.keys_NK.detach()), self._stored)
        columns = {
            "key": key,
            "key_scale": scale,
            "token": rows.tokens_N.to(torch.int32),
            "pos": rows.pos_N,
            "seq": rows.seq_N,
            "source": rows.source_N.to(torch.int32),
        }
        if not self.dims.value:
            return columns
        if rows.values_NV is None:
            raise InvalidTrace(
                f"rows carry no values; this bank keeps vectors of width {self.dims.value} with each row"
            )
        return columns | {"value": rows.values_NV.to(torch.bfloat16)}

    def units(self, columns: State) -> Tensor:
        """See RowMemory."""
        return unpack(columns["key"], columns["key_scale"])

    def lookup(self, state: RowState, queries_QK: Tensor, k: int, mask: Tensor | None = None) -> Found:
        """The k nearest rows, and their vectors blended by softmax(cosine / tau); see RowMemory.lookup."""
        columns, width = state.columns, self.dims.value
        queries = (queries_QK if self.project.identity else self.project(queries_QK)).float()
        keys, scale, order = (columns[name][: state.count] for name in ("key", "key_scale", "pos"))
        scores, index = topk_cosine(queries, keys, scale, order, k, mask=mask)
        tokens, pos, seq, source = (_pick(columns[name], index) for name in ("token", "pos", "seq", "source"))
        if width and state.count:
            vectors = columns["value"][index.clamp_min(0)]
        else:
            vectors = torch.zeros(*index.shape, width, dtype=torch.bfloat16)
        best = scores[:, 0] if k else scores.new_full((len(scores),), -1.0)
        return Found(
            values_QV=self.blend(self.spalm, scores, vectors),
            similarity_Q=best.clamp(-1, 1),
            tokens_Qk=tokens,
            scores_Qk=scores,
            pos_Qk=pos,
            seq_Qk=seq,
            source_Qk=source,
            vectors_QkV=vectors,
        )

    @staticmethod
    def blend(options: SpalmOptions, scores_Qk: Tensor, vectors_QkV: Tensor) -> Tensor:
        """The vectors weighted by softmax(score / tau); see RowMemory.blend."""
        weights_Qk = _softmax(scores_Qk / options.tau, scores_Qk > float("-inf"))
        return (weights_Qk[..., None] * vectors_QkV.float()).sum(1)


class SpalmGate(nn.Module):
    """The paper's read in front of a model's output layer: retrieved tokens' embeddings, mixed in by a learned gate.

    `m = sum_j softmax_j(E[y_j] . h) E[y_j]`, `g = sigmoid(w_g . h)`, `z = g * h + (1 - g) * m`, `p = softmax(z E^T)`.
    A row without neighbours has g = 1: the model's own answer, bitwise.

    Args:
        width: D, the model's hidden width.
        vector: one gate a dimension, as in the paper, or one for all.
        bias: of the gate before training; 2.0 starts near the model's own answer.

    Reference:
        Yogatama et al. 2021, section 3.3.
    """

    def __init__(self, width: int, *, vector: bool = True, bias: float = 2.0) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width if vector else 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, bias)

    def forward(self, hidden_QD: Tensor, tokens_Qk: Tensor, embedding_VD: Tensor) -> tuple[Tensor, Tensor]:
        """The state to put through the output layer [Q, D], and the gate [Q, D] or [Q, 1].

        Args:
            hidden_QD: top hidden states `[Q, D]`.
            tokens_Qk: int64 `[Q, k]` next tokens of the neighbours, -1 where absent.
            embedding_VD: output embedding `[V, D]`.
        """
        memory_QD = token_memory(hidden_QD, tokens_Qk, embedding_VD)
        absent_Q1 = (tokens_Qk < 0).all(1, keepdim=True)
        gate = torch.sigmoid(self.linear(hidden_QD)).masked_fill(absent_Q1, 1.0)
        mixed_QD = gate * hidden_QD + (1 - gate) * memory_QD
        return torch.where(absent_Q1, hidden_QD, mixed_QD), gate


def token_memory(hidden_QD: Tensor, tokens_Qk: Tensor, embedding_VD: Tensor) -> Tensor:
    """Attention of a state over the embeddings of retrieved next tokens `[Q, D]`; zeros where there are none.

    Reference:
        Yogatama et al. 2021, section 3.3: `m = sum_j softmax_j(E[y_j] . h) E[y_j]`.
    """
    embedded_QkD = embedding_VD[tokens_Qk.clamp_min(0)]
    weights_Qk = _softmax((embedded_QkD @ hidden_QD[..., None])[..., 0], tokens_Qk >= 0)
    return (weights_Qk[..., None] * embedded_QkD).sum(1)


def _softmax(scores_Qk: Tensor, present_Qk: Tensor) -> Tensor:
    # a row without any candidate gets zeros, not NaN
    weights = torch.softmax(scores_Qk.masked_fill(~present_Qk, torch.finfo(scores_Qk.dtype).min), dim=-1)
    return weights * present_Qk


def _pick(column_N: Tensor, index_Qk: Tensor) -> Tensor:
    if not len(column_N):
        return torch.full_like(index_Qk, -1)
    return torch.where(index_Qk >= 0, column_N[index_Qk.clamp_min(0)].long(), -1)
