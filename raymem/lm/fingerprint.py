"""The fingerprint of what a language model writes."""

from __future__ import annotations

from collections.abc import Sequence

from raymem.errors import InvalidSpec
from raymem.lm.identity import identity
from raymem.lm.models import LanguageModel, are_layers, model_path
from raymem.tensors import dtype_name
from raymem.types import Fingerprint


def fingerprint(model: LanguageModel, layers: Sequence[int], calibration: str = "") -> Fingerprint:
    """The fingerprint of a loaded model's rows.

    Args:
        model: as it is loaded: its dtype is the rows'.
        layers: 1-based, in the order in which traces carry them.
        calibration: a hash, or "" for the one that the store has.

    Raises:
        InvalidSpec: a layer that the model doesn't have.
    """
    _check_layers(layers, model.layers, model.folder.name)
    return Fingerprint.model_validate(
        {
            "model": model.folder.name,
            "content": model.content_hash,
            "layers": tuple(layers),
            "width": model.width,
            "dtype": dtype_name(model.dtype),
            "tokenizer": model.tokenizer_hash,
            "calibration": calibration,
            "legacy": model.legacy_hashes,
        }
    )


def fingerprint_of(name_or_path: str, layers: Sequence[int], calibration: str = "") -> Fingerprint:
    """The fingerprint of a model's rows in bfloat16, from its files alone: nothing is loaded.

    Args:
        name_or_path: see `raymem.lm.models.model_path`.
        layers: 1-based, in the order in which traces will carry them.
        calibration: a hash, or "" for the one that the store has.

    Raises:
        ModelNotFound: no such model. InvalidSpec: a layer that the model doesn't have.
        UnsupportedModel: of a family whose states raymem can't read.
    """
    folder = model_path(name_or_path)
    found = identity(folder)
    _check_layers(layers, found.depth, folder.name)
    return Fingerprint(
        model=folder.name,
        content=found.content,
        layers=tuple(layers),
        width=found.width,
        tokenizer=found.tokenizer,
        calibration=calibration,
        legacy=found.legacy,
    )


def _check_layers(layers: Sequence[int], depth: int, model: str) -> None:
    if not are_layers(layers, depth) or len(set(layers)) != len(layers):
        raise InvalidSpec(f"layers {layers!r}: {model} has layers 1 to {depth}; name each at most once")
