"""Vector values of rows; the process that has the model makes them, as they need its head.

Shape legend: `T` rows, `V` vocabulary, `D` width of the output embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS_AT_ONCE = 64


def residual_values(logits_TV: Tensor, next_tokens_T: Tensor, embedding_VD: Tensor) -> Tensor:
    """Residuals of predictions in the output embedding: `E[next] - softmax(logits) @ E`, float32 [T, D].

    That is the one-hot next token minus the model's own distribution, times the embedding. Adding it to the head's
    input moves the logits towards the token that came; it is near zero where the model predicted that token. Softmax
    runs over 64 rows at a time, so no second [T, V] tensor is made.

    Args:
        logits_TV: the model's own predictions, any float dtype.
        next_tokens_T: the token that followed each row, int64; -1 where it is not known yet, which gives zeros.
        embedding_VD: the output embedding (`LanguageModel.embedding_Vd`).
    """
    embedding_VD = embedding_VD.float()
    values_TD = torch.zeros(len(logits_TV), embedding_VD.shape[1], device=embedding_VD.device)
    for start in range(0, len(logits_TV), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        expected_TD = logits_TV[rows].float().softmax(-1) @ embedding_VD
        known_T = next_tokens_T[rows] >= 0
        came_TD = embedding_VD[next_tokens_T[rows].clamp_min(0)]
        values_TD[rows] = torch.where(known_T[:, None], came_TD - expected_TD, 0.0)
    return values_TD
