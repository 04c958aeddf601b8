"""All access to vLLM beyond its connector interface: found by feature, with an error that names what is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raymem.errors import ConfigError, ModelNotFound, Unsupported
from raymem.lm.identity import Changes, identity, tokenizer_identity
from raymem.serving.vllm.params import METHOD
from raymem.tensors import dtype_name
from raymem.types import DTYPES, Fingerprint


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


def mend_vllm() -> None:
    """Test, in a worker on a CPU, the parts of vLLM that differ from GPUs, and replace those that are wrong.

    Raises:
        Unsupported: sampled text would be garbage.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from raymem.serving.vllm.cpu_sampling import mend_sampler, mend_seeds

        mend_sampler()
        mend_seeds()


def writes_rows() -> bool:
    """Whether this worker is the one that writes: every tensor-parallel rank holds the same hidden states."""
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

    return bool(get_tensor_model_parallel_rank() == 0)


def model_folder(vllm_config: Any) -> Path:
    """Return the folder with the model's weights.

    Raises:
        ModelNotFound: the model is neither a local folder nor in the hub's cache.
    """
    config = vllm_config.model_config
    return _folder(str(config.model), config.revision)


def tokenizer_folder(vllm_config: Any) -> Path:
    """Return the folder with the tokenizer.

    Raises:
        ModelNotFound: it is neither a local folder nor in the hub's cache.
    """
    config = vllm_config.model_config
    return _folder(str(config.tokenizer), config.tokenizer_revision)


def _folder(name: str, revision: str | None) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise ModelNotFound(
            f"no local copy of model {name!r}: raymem hashes its weights for the fingerprint"
        ) from error


def engine_fingerprint(vllm_config: Any, layers: tuple[int, ...]) -> Fingerprint:
    """Return what made an engine's rows; each bank adds calibration and values.

    Engine arguments that change the states are part of it: config fields, quantization, the cache's dtype.

    Raises:
        ModelNotFound: the model's files are not on this machine. UnsupportedModel: a family that raymem can't read.
        ConfigError: its hidden states are of a dtype that no bank holds, or changed in a way that has no name.
    """
    model = vllm_config.model_config
    dtype: Any = dtype_name(model.dtype)
    if dtype not in DTYPES:
        raise ConfigError(f"the engine computes in {dtype}; banks hold {', '.join(DTYPES)}: set dtype= to one of those")
    found = identity(model_folder(vllm_config), _changes(vllm_config, dtype))
    tokenizer, legacy = found.tokenizer, found.legacy
    if model.tokenizer not in (None, model.model):
        tokenizer, legacy_tokenizer = tokenizer_identity(tokenizer_folder(vllm_config))
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
        # a quantized checkpoint names that in its config
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


class EngineStep:
    """What one forward pass of vLLM's V1 model runner computed, and for which requests.

    `states` are the extracted layers `[T, D]` each, `final_TD` the head's input, `positions_T` each row's place in
    its context, `tokens_T` the input tokens (None for a model that is fed embeddings). Request i's rows are `starts[i]`
    to `starts[i + 1]`; `sampled_N` are the rows that get logits.
    """

    def __init__(
        self, runner: Any, tokens_T: Tensor | None, positions_T: Tensor, final_TD: Tensor, states: list[Tensor]
    ) -> None:
        count = int(runner.input_batch.num_reqs)
        self.requests: list[str] = list(runner.input_batch.req_ids[:count])
        self.starts: list[int] = runner.query_start_loc.np[: count + 1].tolist()
        self.tokens_T = tokens_T
        self.positions_T = positions_T
        self.final_TD = final_TD
        self.states = states
        self.sampled_N: Tensor | None = None

    def rows_of(self, head_input: Tensor) -> Tensor | None:
        """Find which rows a call of `compute_logits` is about; None when it is about none of this step's.

        vLLM calls it with a copy of the sampled rows, or, for prompt log-probabilities, with a slice of the states.
        """
        final = self.final_TD
        if head_input.untyped_storage().data_ptr() == final.untyped_storage().data_ptr():
            first = (head_input.storage_offset() - final.storage_offset()) // final.stride(0)
            return torch.arange(first, first + len(head_input))
        if self.sampled_N is not None and len(self.sampled_N) == len(head_input):
            return self.sampled_N.to("cpu")
        return None

    def states_RLD(self, rows_R: Tensor) -> Tensor:
        """Return the extracted layers of some rows."""
        return torch.stack([layer[rows_R] for layer in self.states], dim=1)


class LogitsTap:
    """Sees each step of vLLM's V1 model runner and may change the logits that its model computes.

    Args:
        runner: the worker's `model_runner`.
        change: gets the step, the rows and their logits, and returns the logits to use.

    Raises:
        Unsupported: this vLLM's runner is another one.
    """

    def __init__(self, runner: Any, change: Callable[[EngineStep, Tensor, Tensor], Tensor]) -> None:
        _require_v1(runner)
        self._runner = runner
        self._change = change
        self._model = runner.model
        self._compute_logits = self._model.compute_logits
        self._prepare_inputs = runner._prepare_inputs
        self._step: EngineStep | None = None
        self._sampled_N: Tensor | None = None
        self.calls_unseen = 0
        self._model.register_forward_hook(self._after_forward, with_kwargs=True)
        self._model.compute_logits = self._logits
        runner._prepare_inputs = self._before_forward

    def request_args(self, request: str) -> Any:
        """Return a running request's `extra_args`."""
        state = self._runner.requests.get(request)
        return getattr(getattr(state, "sampling_params", None), "extra_args", None)

    def earlier_states(self, request: int, start: int, stop: int, group: int, cache: Tensor) -> Tensor:
        """Return the states `[n, L, D]` of a request's positions [start, stop) from the paged cache."""
        table = self._runner.input_batch.block_table[group].get_numpy_array()[request]
        size = cache.shape[2]
        slots_n = torch.tensor([int(table[at // size]) * size + at % size for at in range(start, stop)])
        return cache[slots_n // size, :, slots_n % size]

    def _before_forward(self, *args: Any, **kwargs: Any) -> Any:
        prepared = self._prepare_inputs(*args, **kwargs)
        self._sampled_N = prepared[0]
        # a pass that the hook does not see, as inside a full CUDA graph, must not reuse the step before it
        self._step = None
        return prepared

    def _after_forward(self, _model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        # a runner that extracts no layers returns a bare tensor
        if isinstance(output, tuple) and len(output) == 2 and kwargs.get("positions") is not None:
            final_TD, states = output
            self._step = EngineStep(self._runner, kwargs.get("input_ids"), kwargs["positions"], final_TD, list(states))
            self._step.sampled_N = self._sampled_N

    def _logits(self, head_input: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        logits: Tensor | None = self._compute_logits(head_input, *args, **kwargs)
        if logits is None:
            return None
        rows_R = None if self._step is None else self._step.rows_of(head_input)
        if self._step is None or rows_R is None:
            self.calls_unseen += 1
            return logits
        return self._change(self._step, rows_R, logits)


def _require_v1(runner: Any) -> None:
    wanted = ("model", "input_batch", "requests", "query_start_loc", "_prepare_inputs")
    missing = [name for name in wanted if not hasattr(runner, name)]
    if missing or not hasattr(runner.model, "compute_logits"):
        lacks = ", ".join(missing) or "compute_logits"
        raise Unsupported(
            f"{type(runner).__module__}.{type(runner).__name__} has no {lacks}: reading memory "
            "inside vLLM needs its V1 model runner, so start the engine with VLLM_USE_V2_MODEL_RUNNER=0"
        )
