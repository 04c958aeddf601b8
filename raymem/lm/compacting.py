"""A text's rows compacted: so few that a model can attend to all that it read, whatever it is asked.

The rows depend on the text alone. All who attend to the bank see the same ones, and an engine holds them once.

Shape legend: `L` attention layers, `T` tokens of all runs, `N` rows, `H` key/value heads, `G` query heads that share
one, `R` reference tokens, `W` tokens of a reference window, `Q = R G` reference queries, `d` head width.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from raymem.errors import InvalidInput, UnsupportedModel
from raymem.memory.compress import Compaction, References, check_compaction, matched, pooled, spread_places
from raymem.types import MemoryTokens

if TYPE_CHECKING:
    from raymem.lm.models import LanguageModel

# windows whose tokens' queries a fit is for, as long as those that are predicted behind a memory
WINDOWS, WINDOW = 12, 256
# reference tokens for each row that is made, and at least
_TOKENS_A_ROW, _LEAST_TOKENS = 1.5, 192
_WATCHED = "raymem_watched"
# a model's attention is exchanged while a pass is watched
_watching = threading.Lock()


class _Window(NamedTuple):
    """Tokens [start, stop) of a run, which begins at place `before` of all; those of `token_R` are references."""

    run: int
    before: int
    start: int
    stop: int
    token_R: Tensor


class _Watched(NamedTuple):
    """A run as each layer's attention had it, turned to the run's own positions, float32.

    `queries_LRHGd` are scaled, of the tokens `token_R` alone; keys and values are of all.
    """

    token_R: Tensor
    queries_LRHGd: Tensor
    keys_LTHd: Tensor
    values_LTHd: Tensor


def compacted(
    model: LanguageModel,
    runs: Sequence[Tensor],
    rows: int,
    how: Compaction = "match",
    *,
    kept_T: Tensor | None = None,
    sinks: int = 4,
) -> MemoryTokens:
    """Memory tokens made of all rows of some runs, with keys and values in the model's dtype.

    Args:
        model: whose rows they are.
        runs: token ids of each run from its first token on, int64, in the order of the journal.
        rows: how many to make; runs with no more tokens give all of theirs.
        how: `subsample` keeps every c-th row, `mean` means of c rows, `match` fits rows to the model's own queries on
            these runs; see `raymem.memory.compress`. Rows that were made of several have position and token -1.
        kept_T: bool, of all runs' tokens: rows that the bank still has; the others are left out. None: all.
        sinks: how many of the first rows stay in any case.

    Raises:
        InvalidInput: no run, an unknown way, or a run that the model can't read in one pass.
        UnsupportedModel: the model has no rotary positions, or `match` can't see its queries.
    """
    check_compaction(how)
    if not runs or rows < 1:
        raise InvalidInput(f"{rows} rows of {len(runs)} runs: give at least one of each")
    tokens_T = torch.cat(list(runs))
    left_T = torch.arange(len(tokens_T)) if kept_T is None else torch.nonzero(kept_T)[:, 0]
    made = how != "subsample" and rows < len(left_T)
    place_N = left_T[spread_places(len(left_T), rows, sinks)]
    if made and how == "match":
        keys_LNHd, values_LNHd = _matched(model, runs, left_T, rows, sinks)
    else:
        both = _rebuilt(model, runs)
        keys_LNHd, values_LNHd = (pooled(each[:, left_T], rows, sinks) if made else each[:, place_N] for each in both)
    gone_N = torch.full_like(place_N, made, dtype=torch.bool)
    run_T = torch.cat([torch.full((len(ids_T),), number) for number, ids_T in enumerate(runs)])
    seq_T = torch.cat([torch.arange(len(ids_T)) for ids_T in runs])
    return MemoryTokens(
        pos_N=place_N.masked_fill(gone_N, -1),
        tokens_N=tokens_T[place_N].masked_fill(gone_N, -1),
        seq_N=seq_T[place_N].masked_fill(gone_N, -1),
        source_N=run_T[place_N],
        sources=tuple(("text", str(number)) for number in range(len(runs))),
        relevance=1.0,
        kind="compressive",
        keys_LNHd=keys_LNHd.to(model.dtype),
        values_LNHd=values_LNHd.to(model.dtype),
    )


def _rebuilt(model: LanguageModel, runs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    from raymem.lm.attending import rebuild

    keys, values = zip(*(rebuild(model, run_T) for run_T in runs), strict=True)
    return torch.cat(keys, 1), torch.cat(values, 1)


def _matched(
    model: LanguageModel, runs: Sequence[Tensor], left_T: Tensor, rows: int, sinks: int
) -> tuple[Tensor, Tensor]:
    """Position-free keys and values `[L, N, H, d]`, fitted head by head to the rows at the places `left_T`.

    Everything is turned as a window behind the rows sees it: the window's first token stands at position N, the last
    row's original at N - 1. Distances are those of the text, though its rows take fewer slots.
    """
    total, rope = sum(map(len, runs)), model.rope
    windows = reference_windows([len(run_T) for run_T in runs], rows)
    watched = [
        _watch(model, run_T, [window.token_R for window in windows if window.run == number])
        for number, run_T in enumerate(runs)
    ]
    before = itertools.accumulate([0, *map(len, runs)])
    keys_LTHd = torch.cat(
        [
            rope.turn(run.keys_LTHd, torch.full((run.keys_LTHd.shape[1],), first - total + rows))
            for run, first in zip(watched, before, strict=False)
        ],
        1,
    )[:, left_T]
    values_LTHd = torch.cat([run.values_LTHd for run in watched], 1)[:, left_T]
    near = [_near(rope, window, watched[window.run], rows) for window in windows]
    unseen_QT = _unseen(windows, near, total, sinks)[:, left_T]
    layers, _, heads, _ = keys_LTHd.shape
    made_keys, made_values = (keys_LTHd.new_empty(layers, rows, heads, keys_LTHd.shape[-1]) for _ in range(2))
    for layer, head in itertools.product(range(layers), range(heads)):
        queries_Qd, mass_Q, output_Qd = (
            torch.cat(part) for part in zip(*(window.of(layer, head) for window in near), strict=True)
        )
        references = References(queries_Qd, unseen_QT, mass_Q, output_Qd)
        rows_Td, values_Td = keys_LTHd[layer, :, head], values_LTHd[layer, :, head]
        made_keys[layer, :, head], made_values[layer, :, head] = matched(rows_Td, values_Td, references, rows, sinks)
    return rope.turn(made_keys, -torch.arange(rows)), made_values


class _Near(NamedTuple):
    """A window turned to stand behind the rows: its reference queries, and its own keys and values."""

    queries_LRHGd: Tensor
    place_R: Tensor
    keys_LWHd: Tensor
    values_LWHd: Tensor

    def of(self, layer: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[Q, d]`, and mass `[Q]` and output `[Q, d]` of their attention to the window's own tokens so far."""
        queries_RGd = self.queries_LRHGd[layer, :, head]
        scores_RGW = queries_RGd @ self.keys_LWHd[layer, :, head].T
        later_RW = torch.arange(scores_RGW.shape[-1]) > self.place_R[:, None]
        scores_RGW = scores_RGW.masked_fill(later_RW[:, None], -math.inf)
        output_RGd = torch.softmax(scores_RGW, -1) @ self.values_LWHd[layer, :, head]
        return queries_RGd.flatten(0, 1), scores_RGW.logsumexp(-1).flatten(), output_RGd.flatten(0, 1)


def _near(rope: Any, window: _Window, run: _Watched, rows: int) -> _Near:
    span, token_R = slice(window.start, window.stop), window.token_R
    moved = rows - window.start
    queries_LRHGd = run.queries_LRHGd[:, torch.searchsorted(run.token_R, token_R)]
    turned_LRqd = rope.turn(queries_LRHGd.flatten(2, 3), torch.full((len(token_R),), moved))
    keys_LWHd = rope.turn(run.keys_LTHd[:, span], torch.full((window.stop - window.start,), moved))
    place_R = token_R - window.start
    return _Near(turned_LRqd.reshape(queries_LRHGd.shape), place_R, keys_LWHd, run.values_LTHd[:, span])


def _unseen(windows: Sequence[_Window], near: Sequence[_Near], total: int, sinks: int) -> Tensor:
    """Bool `[Q, T]`: a window's own rows, which are not in memory while it is predicted."""
    parts = []
    for window, found in zip(windows, near, strict=True):
        unseen_T = torch.zeros(total, dtype=torch.bool)
        unseen_T[window.before + window.start : window.before + window.stop] = True
        unseen_T[:sinks] = False
        shape = found.queries_LRHGd.shape
        parts.append(unseen_T.expand(shape[1] * shape[3], -1))
    return torch.cat(parts)


def reference_windows(lengths: Sequence[int], rows: int) -> list[_Window]:
    """Windows evenly spread over runs of these lengths, and their reference tokens; a run's start is avoided.

    Args:
        lengths: of the runs, at least 1 each.
        rows: how many will be fitted.
    """
    ends, windows = list(itertools.accumulate(lengths)), dict[tuple[int, int], _Window]()
    each = math.ceil(max(_LEAST_TOKENS, _TOKENS_A_ROW * rows) / WINDOWS)
    for number in range(WINDOWS):
        place = int((number + 0.5) / WINDOWS * ends[-1])
        run = next(index for index, end in enumerate(ends) if place < end)
        length, before = lengths[run], ends[run] - lengths[run]
        first = min(WINDOW, length // 2)
        start = max(first, min(place - before, length - WINDOW))
        width = min(WINDOW, length - start)
        count = min(each, width)
        # windows differ in where their references stand
        token_R = start + ((torch.arange(count) + (number + 0.5) / WINDOWS) * (width / count)).long()
        windows.setdefault((run, start), _Window(run, before, start, start + width, token_R))
    return list(windows.values())


def _watch(model: LanguageModel, tokens_T: Tensor, references: Sequence[Tensor]) -> _Watched:
    """A pass over a run, with what every layer's attention is given: queries of these tokens, all keys and values.

    Raises:
        UnsupportedModel: its attention isn't run through transformers' interface.
    """
    token_R = torch.unique(torch.cat([tokens_T[:0], *references]))
    kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    with _watching, _exchanged(model._model, token_R, kept):
        model.run(tokens_T, (1,))
    if sorted(kept) != list(range(model.layers)):
        raise UnsupportedModel(
            f"{model.folder.name} ({type(model._model).__name__}): the queries of its layers can't be seen, so rows "
            "can't be matched to them: use subsample or mean"
        )
    queries, keys, values = (torch.stack(part).float() for part in zip(*(kept[n] for n in sorted(kept)), strict=True))
    # transformers keeps the function that filled it
    kept.clear()
    heads = keys.shape[1]
    queries_LRHGd = queries.reshape(len(queries), heads, -1, *queries.shape[2:]).permute(0, 3, 1, 2, 4)
    return _Watched(token_R, queries_LRHGd, keys.transpose(1, 2), values.transpose(1, 2))


@contextlib.contextmanager
def _exchanged(model: Any, token_R: Tensor, kept: dict[int, tuple[Tensor, Tensor, Tensor]]) -> Iterator[None]:
    """Have a model's attention keep what it is given, queries of these tokens alone, and do what it did."""
    from transformers import AttentionInterface, AttentionMaskInterface

    config = model.config.get_text_config()
    before = config._attn_implementation
    attentions, masks = AttentionInterface(), AttentionMaskInterface()

    def watching(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
        scaling = more.get("scaling")
        scaled = query[0][:, token_R] * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        kept[module.layer_idx] = (scaled, key[0], value[0])
        plain = attentions.get(before) or sys.modules[type(module).__module__].eager_attention_forward
        return plain(module, query, key, value, mask, **more)

    AttentionInterface.register(_WATCHED, watching)
    AttentionMaskInterface.register(_WATCHED, masks[before])
    config._attn_implementation = _WATCHED
    try:
        yield
    finally:
        config._attn_implementation = before
