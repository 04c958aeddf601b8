"""Attended memory: keys and values of tokens that a model has read, which its attention sees as if they came before.

Keys are kept position-free, turned back to position 0, and turned to their slot when attended: rotary position
embedding (Su et al. 2021, arXiv 2104.09864, equation 15) is a rotation by position, so that turning by a difference is
exact where frequencies are fixed.

Shape legend: L attention layers, N rows, H key and value heads, d head width, F frequencies, T new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raymem.errors import InvalidInput, UnsupportedModel
from raymem.types import MemoryTokens

if TYPE_CHECKING:
    from raymem.lm.models import LanguageModel, Pass

# families that turn neighbouring dimensions together; all others turn dimension i with i + F
_INTERLEAVED = frozenset({"cohere", "cohere2", "cohere2_moe", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "helium"})
# families whose layers of full attention don't turn keys, where other layers slide
_UNTURNED_FULL = frozenset({"cohere2", "cohere2_moe", "exaone4", "exaone_moe", "afmoe"})
# families that turn the other way round
_BACKWARDS = frozenset({"nanochat"})
_OTHERS = {
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe"), "it scales keys after turning them"),
    "gemma4_text": "its layers have heads of different widths",
}
# kinds of RoPE whose frequencies depend on no length
_FIXED = frozenset({"default", "linear", "llama3", "yarn"})
# a probe's tokens, by how much it shifts them, and which share of keys may differ: far under what another RoPE gives
_PROBE, _SHIFT, _TOLERANCE = 6, 11, 0.05


@dataclass(frozen=True)
class Rope:
    """A model's rotary position embedding.

    `frequencies_LF` are radians a position (float32), all 0 in layers that don't turn their keys; the first 2F
    dimensions of a head are turned: i with i + F, or neighbours where `interleaved`. `window` is the width in tokens of
    the sliding window that some layers have; None where all layers see everything.
    """

    frequencies_LF: Tensor
    interleaved: bool = False
    window: int | None = None

    @classmethod
    def of(cls, config: Any) -> Rope:
        """Read it from a config of transformers.

        Raises:
            UnsupportedModel: naming the family, and what about its positions is in the way.
        """
        text = config.get_text_config()
        family, depth = str(text.model_type), int(text.num_hidden_layers)
        _refuse_others(text, family)
        kinds = list(getattr(text, "layer_types", None) or [None] * depth)
        found = [_frequencies(text, family, kind) for kind in kinds]
        if len({len(frequencies_F) for frequencies_F in found}) > 1:
            raise _unsupported(family, "its layers turn different numbers of dimensions")
        frequencies_LF = torch.stack(found)
        turns = getattr(text, "no_rope_layers", None)
        if turns is not None:
            frequencies_LF = frequencies_LF * torch.tensor(turns, dtype=torch.float32)[:, None]
        if family in _UNTURNED_FULL and "sliding_attention" in kinds:
            frequencies_LF = frequencies_LF * torch.tensor([kind != "full_attention" for kind in kinds])[:, None]
        if family in _BACKWARDS:
            frequencies_LF = -frequencies_LF
        return cls(frequencies_LF, family in _INTERLEAVED, _window(text, kinds))

    def turn(self, keys_LNHd: Tensor, by_N: Tensor) -> Tensor:
        """Keys of rows that were moved by so many positions, computed in float32 and given in the keys' dtype.

        Args:
            keys_LNHd: of all layers.
            by_N: int64; a row's position to turn it there from position 0, or less than 0 to turn it back.

        Raises:
            InvalidInput: keys of another number of layers, or narrower than what is turned.
        """
        layers, width = len(self.frequencies_LF), 2 * self.frequencies_LF.shape[1]
        if len(keys_LNHd) != layers or keys_LNHd.shape[-1] < width:
            raise InvalidInput(
                f"keys are {list(keys_LNHd.shape)}; this model turns {width} dimensions in {layers} layers: "
                "attend to rows of the same model"
            )
        turned_LNHd = keys_LNHd.clone()
        for frequencies_F, keys_NHd, out_NHd in zip(
            self.frequencies_LF.to(keys_LNHd.device), keys_LNHd, turned_LNHd, strict=True
        ):
            angles_NF = by_N.to(keys_LNHd.device, torch.float32)[:, None] * frequencies_F
            cos_N1F, sin_N1F = angles_NF.cos()[:, None], angles_NF.sin()[:, None]
            first, second = self._pairs(width)
            a_NHF, b_NHF = keys_NHd[..., first].float(), keys_NHd[..., second].float()
            out_NHd[..., first] = (a_NHF * cos_N1F - b_NHF * sin_N1F).to(keys_LNHd.dtype)
            out_NHd[..., second] = (b_NHF * cos_N1F + a_NHF * sin_N1F).to(keys_LNHd.dtype)
        return turned_LNHd

    def _pairs(self, width: int) -> tuple[slice, slice]:
        if self.interleaved:
            return slice(0, width, 2), slice(1, width, 2)
        return slice(0, width // 2), slice(width // 2, width)


def probed_rope(model: Any) -> Rope:
    """A model's rotary embedding, checked by two passes over the same tokens at other positions.

    Args:
        model: of transformers.

    Raises:
        UnsupportedModel: it has none, or keys turned back aren't the same.
    """
    text = model.config.get_text_config()
    rope, family = Rope.of(model.config), str(text.model_type)
    # the first ids are often special tokens, whose states depend on the last bit
    ids_T = torch.arange(1, 1 + _PROBE) * (int(text.vocab_size) // (2 + _PROBE))
    found = []
    for shift in (0, _SHIFT):
        cache, positions_T = _empty_cache(), torch.arange(_PROBE) + shift
        with torch.inference_mode():
            model(input_ids=ids_T[None], position_ids=positions_T[None], past_key_values=cache, use_cache=True)
        keys_LNHd, _ = _rows(cache, family)
        found.append(rope.turn(keys_LNHd, -positions_T).float())
    plain_LNHd, shifted_LNHd = found
    apart_L = (plain_LNHd - shifted_LNHd).flatten(1).norm(dim=1) / plain_LNHd.flatten(1).norm(dim=1).clamp_min(1e-12)
    # rounding grows from layer to layer: of layers that turn alike the first one is compared
    firsts = {tuple(frequencies): layer for layer, frequencies in reversed([*enumerate(rope.frequencies_LF.tolist())])}
    for layer in firsts.values():
        if not float(apart_L[layer]) < _TOLERANCE:
            raise _unsupported(family, f"its keys depend on positions in another way (layer {layer + 1})")
    return rope


def rebuild(model: LanguageModel, tokens_T: Tensor) -> tuple[Tensor, Tensor]:
    """Keys, turned back to position 0, and values `[L, N, H, d]` of one causal pass over a run's tokens.

    They are in the model's dtype, and what an engine has in its cache after the same pass, up to the rounding of
    that dtype.

    Args:
        model: whose rows they are.
        tokens_T: of one run, from its first token on, int64.

    Raises:
        InvalidInput: no tokens, more than the model has positions for, or ids that it doesn't know.
        UnsupportedModel: its positions aren't those of a rotary embedding with fixed frequencies.
    """
    rope, cache = model.rope, _empty_cache()
    model.run(tokens_T, (1,), cache)
    keys_LNHd, values_LNHd = _rows(cache, model.folder.name)
    return rope.turn(keys_LNHd, -torch.arange(len(tokens_T))), values_LNHd


def attend_pass(model: LanguageModel, memory: MemoryTokens, tokens_T: Tensor, layers: Sequence[int]) -> Pass:
    """One pass over new tokens, whose every layer attends to a memory's rows.

    The rows take positions 0 to N - 1, the tokens those from N on.

    Args:
        model: the one that made the rows.
        memory: with keys and values; none of its rows changes nothing.
        tokens_T: int64.
        layers: which layers' outputs to keep, counted from 1.

    Raises:
        InvalidInput: rows of another model, without keys and values, more than a sliding window spans, or more rows and
            tokens than the model has positions for.
    """
    return AttendedContext(model).extend(memory, tokens_T, layers)


class AttendedContext:
    """Tokens that a model reads part by part, while the memory before them may be another for each part.

    A token's keys and values stay as they were computed, attending to the memory of its part, as in an engine that
    changes the rows of a request that it is serving.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model, self._rope = model, model.rope
        # of the tokens read so far; keys position-free
        self._keys_LNHd: Tensor | None = None
        self._values_LNHd: Tensor | None = None

    def extend(self, memory: MemoryTokens, tokens_T: Tensor, layers: Sequence[int]) -> Pass:
        """Read more tokens, behind this memory and the tokens before; see `attend_pass`."""
        if self._rope.window is not None and len(memory) > self._rope.window:
            raise InvalidInput(
                f"{len(memory)} rows, and a layer of {self._model.folder.name} sees {self._rope.window} tokens: "
                "attend to at most that many"
            )
        keys, values = [self._keys_LNHd], [self._values_LNHd]
        if len(memory):
            memory_keys_LNHd, memory_values_LNHd = full_rows(memory, self._model.dtype)
            keys, values = [memory_keys_LNHd, *keys], [memory_values_LNHd, *values]
        keys_LNHd, values_LNHd = _joined(keys), _joined(values)
        before = 0 if keys_LNHd is None else keys_LNHd.shape[1]
        cache = _empty_cache()
        if keys_LNHd is not None and values_LNHd is not None:
            _fill(cache, self._rope.turn(keys_LNHd, torch.arange(before)), values_LNHd)
        done = self._model.run(tokens_T, layers, cache)
        seen_LNHd, added_LNHd = (rows[:, before:] for rows in _rows(cache, self._model.folder.name))
        positions_T = torch.arange(before, before + len(tokens_T))
        self._keys_LNHd = _joined([self._keys_LNHd, self._rope.turn(seen_LNHd, -positions_T)])
        self._values_LNHd = _joined([self._values_LNHd, added_LNHd])
        return done


def full_rows(memory: MemoryTokens, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A memory's position-free keys and values `[L, N, H, d]` in this dtype, from whatever they are kept in.

    Raises:
        InvalidInput: it has none, or int8 ones without scales.
    """
    if memory.keys_LNHd is None or memory.values_LNHd is None:
        raise InvalidInput(f"these {len(memory)} memory tokens have no keys and values: rebuild them from their tokens")
    if memory.keys_LNHd.dtype != torch.int8:
        return memory.keys_LNHd.to(dtype), memory.values_LNHd.to(dtype)
    if memory.key_scales_LNH is None or memory.value_scales_LNH is None:
        raise InvalidInput("rows in int8 have no scales: send key_scales_LNH and value_scales_LNH too")
    keys_LNHd = dequantize(memory.keys_LNHd, memory.key_scales_LNH, dtype)
    return keys_LNHd, dequantize(memory.values_LNHd, memory.value_scales_LNH, dtype)


def dequantize(rows_LNHd: Tensor, scales_LNH: Tensor, dtype: torch.dtype) -> Tensor:
    """What `raymem.rows.quantize_rows` made, in a float dtype."""
    return (rows_LNHd.float() * scales_LNH[..., None]).to(dtype)


def _refuse_others(text: Any, family: str) -> None:
    if getattr(text, "kv_lora_rank", None):
        raise _unsupported(family, "it keeps latents in place of keys (MLA)")
    if getattr(text, "alibi", False) or not getattr(text, "rope_parameters", None):
        raise _unsupported(family, "it has no rotary position embedding (learned positions, ALiBi or none)")
    if family in _OTHERS:
        raise _unsupported(family, _OTHERS[family])


def _frequencies(text: Any, family: str, kind: str | None) -> Tensor:
    """Radians a position `[F]` of a layer of this kind."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    nested = "rope_type" not in text.rope_parameters and "rope_theta" not in text.rope_parameters
    said = text.rope_parameters.get(kind) if nested else text.rope_parameters
    if not said:
        raise _unsupported(family, f"layers of {kind or 'one kind'} have no rotary position embedding")
    name = said.get("rope_type", "default")
    if name not in _FIXED:
        raise _unsupported(family, f"its RoPE is {name!r}, whose frequencies change with length or axis")
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    turned = int(width * said.get("partial_rotary_factor", 1.0))
    if name == "default":
        exponents_F = torch.arange(0, turned, 2, dtype=torch.float32) / turned
        return torch.as_tensor(1.0 / said["rope_theta"] ** exponents_F)
    frequencies_F, _scale = ROPE_INIT_FUNCTIONS[name](text, torch.device("cpu"), layer_type=kind if nested else None)
    return torch.as_tensor(frequencies_F, dtype=torch.float32)


def _window(text: Any, kinds: Sequence[str | None]) -> int | None:
    """The sliding window that some layer has."""
    window = getattr(text, "sliding_window", None)
    slides = "sliding_attention" in kinds or kinds[0] is None
    if not window or not slides or getattr(text, "use_sliding_window", True) is False:
        return None
    return int(window)


def _unsupported(family: str, why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"models of the family {family!r} can't attend to memory: {why}. Use one whose keys are turned by a rotary "
        "embedding with fixed frequencies (llama, qwen, mistral, gemma, phi), or mix (bank.read)",
        family=family,
    )


def _empty_cache() -> Any:
    from transformers import DynamicCache

    # without a config: layers that slide keep all rows too
    return DynamicCache()


def _rows(cache: Any, name: str) -> tuple[Tensor, Tensor]:
    """A cache's keys, as they were turned, and values `[L, N, H, d]`."""
    shapes = {(tuple(layer.keys.shape), tuple(layer.values.shape)) for layer in cache.layers}
    if len(shapes) != 1:
        raise _unsupported(name, "its layers have keys and values of different shapes")
    keys, values = ([getattr(layer, part)[0] for layer in cache.layers] for part in ("keys", "values"))
    return torch.stack(keys).transpose(1, 2).contiguous(), torch.stack(values).transpose(1, 2).contiguous()


def _fill(cache: Any, keys_LNHd: Tensor, values_LNHd: Tensor) -> None:
    for place, (keys_NHd, values_NHd) in enumerate(zip(keys_LNHd, values_LNHd, strict=True)):
        cache.update(keys_NHd.transpose(0, 1)[None], values_NHd.transpose(0, 1)[None], place)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there, dim=1) if there else None
