"""Slots that hold rows: what a row is made of, and how rows are put into them.

Shape legend: `B` banks, `T` rows, `M` rows put, `N` slots, `Q` queries, `k` candidates, `K` key width, `V` value width.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize, pad

from raymem.errors import InvalidTrace
from raymem.memory.base import Dims, Options, Seed, State
from raymem.memory.quantize import STORED, KeyDtype, pack
from raymem.memory.spec import StateSpec, TensorSpec
from raymem.memory.state import Batch

_TOKEN_MAX = torch.iinfo(torch.int32).max


class SlotOptions(Options):
    """How rows are kept and how sharply they are read.

    Keys are kept in `key_dtype`, of `key_dims` dimensions (None: their own width, else a projection drawn from
    `projection_seed`). `strength` is the beta of the content read.
    """

    strength: float = Field(default=16.0, gt=0)
    key_dtype: KeyDtype = "float32"
    key_dims: int | None = Field(default=None, ge=1)
    projection_seed: Seed = 0


def row_spec(dims: Dims, key_dims: int, key_dtype: KeyDtype, tokens: int | None = None) -> StateSpec:
    """Shapes and dtypes of one row: its key, its next token (or `tokens` of them), its vector if rows carry one."""
    token = TensorSpec(() if tokens is None else (tokens,), torch.int32, low=-1)
    spec = {"key": TensorSpec((key_dims,), STORED[key_dtype]), "token": token}
    return spec | ({"value": TensorSpec((dims.value,))} if dims.value else {})


def rows_of(batch: Batch, dims: Dims) -> State:
    """A batch as rows `[B, T, ...]`, keys still in full.

    Raises:
        InvalidTrace: a token id that 32 bits can't hold, or rows without the vectors that this bank keeps.
    """
    if int(batch.tokens_BT.max()) > _TOKEN_MAX:
        raise InvalidTrace(f"token id {int(batch.tokens_BT.max())} is over {_TOKEN_MAX}, the largest a bank keeps")
    rows = {"key": batch.keys_BTK, "token": batch.tokens_BT.to(torch.int32)}
    if not dims.value:
        return rows
    if batch.values_BTV is None:
        raise InvalidTrace(f"rows carry no values; this bank keeps vectors of width {dims.value} each")
    return rows | {"value": batch.values_BTV}


def narrowed(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys `[..., K]` as they are kept; only 8 bits change their type, so that a float64 state stays one."""
    return pack(keys, torch.int8)[0] if dtype == torch.int8 else keys


def widened(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Kept keys `[..., K]` in full; those of 8 bits are of unit length again."""
    return normalize(keys.to(dtype), dim=-1) if keys.dtype == torch.int8 else keys.to(dtype)


def put(column: Tensor, where: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
    """`column` `[B, N, ...]` with rows `[M, ...]` at the places `(bank, slot)`; in place when gradients are off."""
    rows = rows.to(column.dtype)
    return column.index_put(where, rows) if torch.is_grad_enabled() else column.index_put_(where, rows)


def answered(state: State, log_BQN: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """What slots of one token each answer: blended values [B, Q, V], tokens [B, Q, k] and their log-weights.

    Args:
        state: `token` `[B, N]`, and `value` `[B, N, V]` where rows carry vectors.
        log_BQN: logarithm of the read weighting, -inf where a slot holds nothing.
        k: candidates; absent ones are token -1 of weight -inf.
    """
    best, slot = log_BQN.topk(min(k, log_BQN.shape[-1]), dim=-1)
    token_BQN = state["token"].long()[:, None].expand_as(log_BQN)
    spare = (0, k - best.shape[-1])
    blended = log_BQN.exp() @ state["value"] if "value" in state else log_BQN[..., :0]
    return blended, pad(token_BQN.gather(-1, slot), spare, value=-1), pad(best, spare, value=float("-inf"))
