"""Calibrations: statistics of a model's states that turn states into keys and similarity into relevance.

Shape legend: `L` layers, `D` hidden width, `Q` queries.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raymem.errors import Corrupt, InvalidInput, InvalidSpec, RaymemError
from raymem.inputs import shown
from raymem.tensors import is_dense, read_object, read_safetensors, save_safetensors
from raymem.types import KeySpec

_FORMAT = "raymem-calibration-1"
_MOST_LAYERS = 256
_NAME_MAX = 1000
# states lie around 1 and in the worst known models around 10⁵; larger ones turn sums into Inf
_LARGEST = 1e12
# a whitening's scale is one over that of the states
_SMALLEST_SCALE, _LARGEST_SCALE = 1e-9, 1e9
_SKEW = 1e-3
# a cosine and its rounding: the range of equal texts ends a little over 1
_COSINE_MAX = 1.01


class Range(NamedTuple):
    """Best cosines of a key function: `lo` the 50th percentile of unrelated queries, `hi` the 99.9th of matching."""

    lo: float
    hi: float


@dataclass(frozen=True)
class Calibration:
    """Statistics of one model and some of its layers, made once from text that no bank holds; a value.

    `model` is the model's content hash, `layers` the 1-based layer ids, `mean_LD` float32, `whiten_LDD` float32 or
    None (the inverse square root of the covariance, shrunk by `shrink` towards its mean eigenvalue), `ranges` the
    cosines of related and unrelated queries under a few key functions, see `measured_keys`.
    """

    model: str
    layers: tuple[int, ...]
    mean_LD: Tensor
    whiten_LDD: Tensor | None = None
    shrink: float = 0.0
    ranges: Mapping[KeySpec, Range] = field(default_factory=dict)

    @cached_property
    def width(self) -> int:
        """The hidden width D."""
        return int(self.mean_LD.shape[1])

    @cached_property
    def hash(self) -> str:
        """SHA-256 over everything above: part of the fingerprint of the banks that use it."""
        head, tensors = self._parts()
        digest = hashlib.sha256(head.encode())
        for tensor in tensors.values():
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def range_of(self, key: KeySpec) -> Range:
        """The range of a key function, or of the nearest one measured.

        Of those of the same layers, that is the one whose window has the nearest logarithm: a single state counts as a
        window of 1, a span as a window. For layers that were not measured together it is the mean over the layers,
        since the cosine of a concatenation is the mean of theirs.

        Raises:
            InvalidSpec: the calibration does not know a layer of the key.
        """

        def window(of: KeySpec) -> int:
            return 1 if of.function == "single" else of.window

        layers = key.layers or self.layers
        measured = [known for known in self.ranges if sorted(known.layers) == sorted(layers)]
        if measured:
            return self.ranges[min(measured, key=lambda known: abs(math.log(window(known) / window(key))))]
        if len(layers) == 1:
            raise InvalidSpec(
                f"the calibration measured no keys of layers {list(layers)}; run `raymem calibrate` for them"
            )
        parts = [self.range_of(key.model_copy(update={"layers": (layer,)})) for layer in layers]
        return Range(*(sum(ends) / len(parts) for ends in zip(*parts, strict=True)))

    def check(self) -> Calibration:
        """Return this calibration if keys and relevance can be made with it.

        Raises:
            InvalidInput: naming the field, its value, and the command that makes another.
        """
        wrong = _wrong_fields(self) or _wrong_tensors(self) or _wrong_ranges(self)
        if wrong:
            raise InvalidInput(f"the calibration's {wrong}; make one with `raymem calibrate`")
        return self

    def to_bytes(self) -> bytes:
        """The calibration as one safetensors file that carries its own hash."""
        head, tensors = self._parts()
        return save_safetensors(tensors, {"format": _FORMAT, "head": head, "sha256": self.hash})

    @staticmethod
    def from_bytes(data: bytes) -> Calibration:
        """Read what `to_bytes` wrote.

        Raises:
            Corrupt: not such a file, or its contents do not match its hash.
        """
        metadata, tensors = read_safetensors(data, "the calibration")
        try:
            head = read_object(metadata.get("head"), "the calibration's head")
            found = _parsed(head, tensors)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
            if isinstance(error, RaymemError):
                raise Corrupt(f"not a calibration ({error.message[:200]}); make it again") from error
            raise Corrupt(f"not a calibration ({type(error).__name__}: {str(error)[:200]}); make it again") from error
        if metadata.get("format") != _FORMAT or found.hash != metadata.get("sha256"):
            raise Corrupt(
                f"a calibration of format {metadata.get('format')!r} does not match its hash "
                f"{str(metadata.get('sha256'))[:12]!r}; make it again"
            )
        return found

    def _parts(self) -> tuple[str, dict[str, Tensor]]:
        """The hashed parts: all but the tensors as JSON, and the tensors."""
        ranges = sorted([list(key.layers), key.function, key.window, *ends] for key, ends in self.ranges.items())
        head = {
            "model": self.model,
            "layers": self.layers,
            "width": self.width,
            "shrink": self.shrink,
            "ranges": ranges,
        }
        tensors = {"mean": self.mean_LD.contiguous()}
        if self.whiten_LDD is not None:
            tensors["whiten"] = self.whiten_LDD.contiguous()
        return json.dumps(head, sort_keys=True), tensors


def measured_keys(layers: tuple[int, ...]) -> list[KeySpec]:
    """The key functions whose ranges a calibration holds: single and window 8 of each layer, and of all layers."""
    choices = [(layer,) for layer in layers] + ([layers] if len(layers) > 1 else [])
    singles = [KeySpec(function="single", layers=choice, window=1) for choice in choices]
    return singles + [KeySpec(function="window", layers=choice, window=8) for choice in choices]


def _parsed(head: dict[str, Any], tensors: dict[str, Tensor]) -> Calibration:
    if odd := set(tensors) - {"mean", "whiten"}:
        raise ValueError(f"it has {str(sorted(odd))[:80]}, which no calibration has")
    ranges = {
        KeySpec.model_validate({"function": function, "layers": layers, "window": window}): Range(float(lo), float(hi))
        for layers, function, window, lo, hi in head["ranges"]
    }
    mean_LD, whiten_LDD = tensors["mean"], tensors.get("whiten")
    layers, width = tuple(head["layers"]), head["width"]
    if not all(type(number) is int for number in (*layers, width)):
        raise ValueError(f"layers {str(layers)[:80]} and width {str(width)[:80]} are whole numbers")
    for tensor, shape in [(mean_LD, (len(layers), width)), (whiten_LDD, (len(layers), width, width))]:
        if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.float32):
            raise ValueError(f"a tensor is {tensor.dtype} {list(tensor.shape)} where float32 {list(shape)} was said")
    return Calibration(head["model"], layers, mean_LD, whiten_LDD, head["shrink"], ranges)


def _wrong_fields(made: Calibration) -> str:
    named = isinstance(made.model, str) and 0 < len(made.model) <= _NAME_MAX and made.model.isprintable()
    if not named:
        return f"model is {str(made.model)[:80]!r}; expected a content hash"
    layers = made.layers
    whole = isinstance(layers, tuple) and all(type(layer) is int and layer > 0 for layer in layers)
    if not whole or not 0 < len(layers) <= _MOST_LAYERS or len(set(layers)) < len(layers):
        return f"layers are {str(layers)[:80]}; expected 1 to {_MOST_LAYERS} different numbers from 1 on"
    if isinstance(made.shrink, bool) or not isinstance(made.shrink, int | float) or not 0 <= made.shrink <= 1:
        return f"shrink is {str(made.shrink)[:80]}; expected 0 to 1"
    return ""


def _wrong_tensors(made: Calibration) -> str:
    mean, layers = made.mean_LD, len(made.layers)
    if not _is_plain(mean) or mean.dtype != torch.float32 or mean.dim() != 2 or len(mean) != layers:
        return f"mean is {_form(mean)}; expected float32 [{layers}, width]"
    if not made.width or not _within(mean, _LARGEST):
        return f"mean has width {made.width} and entries up to {_peak(mean)}; expected finite ones up to {_LARGEST:g}"
    whiten, shape = made.whiten_LDD, (layers, made.width, made.width)
    if whiten is None:
        return ""
    if not _is_plain(whiten) or whiten.dtype != torch.float32 or whiten.shape != shape:
        return f"whitening is {_form(whiten)}; expected float32 {list(shape)}"
    # the inverse root of a covariance: symmetric, and positive definite
    scale = whiten.diagonal(dim1=1, dim2=2)
    if not _within(whiten, _LARGEST_SCALE) or float(scale.min()) < _SMALLEST_SCALE:
        return (
            f"whitening has entries up to {_peak(whiten)} and a diagonal from {float(scale.min()):g} on; expected "
            f"{_SMALLEST_SCALE:g} to {_LARGEST_SCALE:g}"
        )
    if float((whiten - whiten.mT).abs().max()) > _SKEW * _peak(whiten):
        return "whitening is not symmetric"
    if bool(torch.linalg.cholesky_ex(whiten.double())[1].any()):
        return "whitening is not positive definite"
    return ""


def _wrong_ranges(made: Calibration) -> str:
    given: object = made.ranges
    if not isinstance(given, Mapping):
        return f"ranges are {shown(given)}; expected a map of key functions"
    for key, ends in given.items():
        if not isinstance(key, KeySpec) or not _is_range(ends):
            return f"ranges have {shown(ends)} for {shown(key)}; expected a KeySpec and two numbers"
        lo, hi = ends
        if not (-_COSINE_MAX <= lo < hi <= _COSINE_MAX):
            return (
                f"range of {key.function} keys of layers {list(key.layers)} is {lo} to {hi}; expected cosines, lo < hi"
            )
        if set(key.layers) - set(made.layers):
            return f"ranges are of layers {list(key.layers)}; it is made for {list(made.layers)}"
    singles = {key.layers for key in made.ranges}
    missing = [layer for layer in made.layers if (layer,) not in singles]
    return f"ranges lack layers {missing}" if missing else ""


def _is_range(ends: object) -> bool:
    return isinstance(ends, tuple) and len(ends) == 2 and all(isinstance(end, int | float) for end in ends)


def _is_plain(given: object) -> bool:
    return isinstance(given, Tensor) and is_dense(given) and not given.requires_grad


def _form(tensor: object) -> str:
    if not isinstance(tensor, Tensor):
        return shown(tensor)
    if not is_dense(tensor):
        return f"a tensor that is {tensor.layout} on {tensor.device}, or quantised"
    return f"{tensor.dtype} {list(tensor.shape)}" + (" with a gradient" if tensor.requires_grad else "")


def _peak(tensor: Tensor) -> float:
    return max(map(abs, map(float, torch.aminmax(tensor))), default=0.0) if tensor.numel() else 0.0


def _within(tensor: Tensor, most: float) -> bool:
    # aminmax gives NaN at both ends where an entry is NaN
    return not tensor.numel() or all(abs(float(end)) <= most for end in torch.aminmax(tensor))
