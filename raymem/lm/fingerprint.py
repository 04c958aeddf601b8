"""The fingerprint of what a language model writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from raymem.errors import InvalidSpec, ModelNotFound
from raymem.lm.models import LanguageModel, content_hash, model_path, tokenizer_hash
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
            "dtype": str(model.dtype).removeprefix("torch."),
            "tokenizer": model.tokenizer_hash,
            "calibration": calibration,
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
    """
    folder = model_path(name_or_path)
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        width, depth = int(config["hidden_size"]), int(config["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelNotFound(
            f"{folder}/config.json does not say hidden_size and num_hidden_layers ({error!r}): "
            "give a folder that transformers' save_pretrained wrote"
        ) from error
    _check_layers(layers, depth, folder.name)
    return Fingerprint(
        model=folder.name,
        content=content_hash(folder),
        layers=tuple(layers),
        width=width,
        tokenizer=tokenizer_hash(folder),
        calibration=calibration,
    )


def _check_layers(layers: Sequence[int], depth: int, model: str) -> None:
    wrong = [layer for layer in layers if not 1 <= layer <= depth]
    if wrong or not layers or len(set(layers)) != len(layers):
        raise InvalidSpec(f"layers {list(layers)}: {model} has layers 1 to {depth}; name each at most once")
