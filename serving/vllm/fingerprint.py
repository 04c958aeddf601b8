"""What an engine's rows are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raymem.errors import ConfigError
from raymem.lm.identity import Changes, identity, tokenizer_identity
from raymem.serving.vllm import vllm_internals as vllm_internals
from raymem.types import DTYPES, Fingerprint


def engine_fingerprint(vllm_config: Any, layers: tuple[int, ...]) -> Fingerprint:
    """Say what made an engine's rows; calibration and values are left to each bank.

    What the engine's arguments change in a model makes it another one: config fields, quantization, the cache's dtype.

    Raises:
        ModelNotFound: the model's files are not on this machine. UnsupportedModel: a family that raymem can't read.
        ConfigError: its hidden states are of a dtype that no bank holds, or changed in a way that has no name.
    """
    model = vllm_config.model_config
    dtype: Any = str(model.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigError(f"the engine computes in {dtype}; banks hold {', '.join(DTYPES)}: set dtype= to one of those")
    found = identity(vllm_internals.model_folder(vllm_config), _changes(vllm_config, dtype))
    tokenizer, legacy = found.tokenizer, found.legacy
    if model.tokenizer not in (None, model.model):
        tokenizer, legacy_tokenizer = tokenizer_identity(vllm_internals.tokenizer_folder(vllm_config))
        legacy = (legacy[0], legacy_tokenizer)
    return Fingerprint(
        model=str(model.model),
        content=found.content,
        layers=layers,
        width=int(model.get_hidden_size()),
        dtype=dtype,
        tokenizer=tokenizer,
        legacy=legacy,
    )


def _changes(vllm_config: Any, dtype: str) -> Changes:
    model, cache = vllm_config.model_config, vllm_config.cache_config
    overrides = model.hf_overrides or {}
    if not isinstance(overrides, Mapping):
        raise ConfigError(
            "hf_overrides is a function, and what it does to hidden states has no name: give the fields as a dict"
        )
    own = getattr(model.hf_config, "quantization_config", None)
    done = {
        # a checkpoint that is quantized says so in its config
        "quantization": None if own else model.quantization,
        "cache_dtype": None if cache.cache_dtype in ("auto", dtype) else cache.cache_dtype,
        "load_format": "dummy" if vllm_config.load_config.load_format == "dummy" else None,
        "hf_config_path": model.hf_config_path,
        "disable_sliding_window": model.disable_sliding_window or None,
        "model_class_overrides": model.model_class_overrides or None,
        "long_rope": _long_rope(model),
    }
    return Changes(dict(overrides), {name: value for name, value in done.items() if value is not None})


def _long_rope(model: Any) -> bool | None:
    """Whether rotary positions are stretched for every text: vLLM decides that by the longest that it allows."""
    rope = getattr(model.hf_text_config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
    return None if original is None or model.max_model_len <= original else True
