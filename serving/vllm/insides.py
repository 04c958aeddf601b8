"""Everything that reaches into vLLM beyond its connector contract, looked up by feature and refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from raymem.errors import ConfigError, ModelNotFound
from raymem.serving.vllm.params import METHOD


def streamed_layers(vllm_config: Any) -> tuple[int, ...]:
    """Return the layers that `extract_hidden_states` was asked for.

    Raises:
        ConfigError: the engine runs without that speculative method, or with layers the model does not have.
    """
    speculative = vllm_config.speculative_config
    method = getattr(speculative, "method", None)
    if method != METHOD:
        raise ConfigError(
            f"speculative_config's method is {method!r}, and RaymemConnector reads hidden states from {METHOD!r}: "
            "start the engine with LLM(**raymem.serving.vllm.engine_args(store, layers=(26,))), or set "
            f'speculative_config={{"method": "{METHOD}", "num_speculative_tokens": 1, "draft_model_config": '
            '{"hf_config": {"eagle_aux_hidden_state_layer_ids": [26]}}}'
        )
    layers = tuple(getattr(speculative.draft_model_config.hf_config, "eagle_aux_hidden_state_layer_ids", None) or ())
    deepest = int(vllm_config.model_config.get_total_num_hidden_layers())
    if not layers or min(layers) < 1 or max(layers) > deepest or list(layers) != sorted(set(layers)):
        raise ConfigError(
            f"eagle_aux_hidden_state_layer_ids is {list(layers)}; choose distinct ascending layers from 1 to {deepest}"
        )
    return layers


def hidden_group(kv_cache_config: Any) -> tuple[int, int]:
    """Return index and block size of the cache group that holds the hidden states."""
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        if any(_is_hidden_layer(name) for name in group.layer_names):
            return index, int(group.kv_cache_spec.block_size)
    names = [name for group in kv_cache_config.kv_cache_groups for name in group.layer_names]
    raise ConfigError(f"no cache-only layer for hidden states among {names}: this vLLM lays its cache out differently")


def hidden_cache(kv_caches: dict[str, Tensor], block_size: int, layers: int, width: int) -> Tensor:
    """Return the paged cache of hidden states, `[blocks, layers, block_size, width]`.

    Raises:
        ConfigError: its shape is not the one that the rows' slots were computed for.
    """
    found = [cache for name, cache in kv_caches.items() if _is_hidden_layer(name)]
    shapes = [tuple(cache.shape[1:]) for cache in found]
    if shapes != [(layers, block_size, width)]:
        raise ConfigError(
            f"expected one cache of hidden states [blocks, {layers}, {block_size}, {width}], found {shapes} "
            "per block: this vLLM lays its cache out differently"
        )
    return found[0]


def _is_hidden_layer(name: str) -> bool:
    return "cache_only_layers" in name


def writes_rows() -> bool:
    """Whether this worker is the one that writes: every tensor-parallel rank holds the same hidden states."""
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    return bool(get_tensor_model_parallel_rank() == 0)


def model_folder(vllm_config: Any) -> Path:
    """Return the folder with the model's weights and tokenizer.

    Raises:
        ModelNotFound: the model is neither a local folder nor in the hub's cache.
    """
    name = str(vllm_config.model_config.model)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=vllm_config.model_config.revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise ModelNotFound(
            f"no local copy of model {name!r}: raymem hashes its weights for the fingerprint"
        ) from error
