"""All access to vLLM beyond its connector interface: found by feature, with an error that names what is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raymem.errors import ConfigError, InvalidInput, ModelNotFound, RaymemError, Unsupported, UnsupportedModel
from raymem.lm.attending import Rope
from raymem.lm.identity import Changes, identity, tokenizer_identity
from raymem.lm.rebuilding import rope_name
from raymem.rows import RowFormat
from raymem.serving.vllm.params import METHOD
from raymem.tensors import dtype_name
from raymem.types import DTYPES, Fingerprint


def streamed_layers(vllm_config: Any) -> tuple[int, ...]:
    """Return the layers that `extract_hidden_states` was asked for; none for an engine that extracts nothing.

    Raises:
        ConfigError: they are layers the model does not have.
    """
    speculative = vllm_config.speculative_config
    if getattr(speculative, "method", None) != METHOD:
        return ()
    layers = tuple(getattr(speculative.draft_model_config.hf_config, "eagle_aux_hidden_state_layer_ids", None) or ())
    deepest = int(vllm_config.model_config.get_total_num_hidden_layers())
    if not layers or min(layers) < 1 or max(layers) > deepest or list(layers) != sorted(set(layers)):
        raise ConfigError(
            f"eagle_aux_hidden_state_layer_ids is {list(layers)}; choose distinct ascending layers from 1 to {deepest}"
        )
    return layers


def nothing_extracted(vllm_config: Any) -> ConfigError:
    """What to tell those who want hidden states of an engine that extracts none."""
    method = getattr(vllm_config.speculative_config, "method", None)
    return ConfigError(
        f"speculative_config's method is {method!r}, and hidden states come from {METHOD!r}: start the engine with "
        "LLM(**raymem.serving.vllm.engine_args(store, layers=(26,))), or set "
        f'speculative_config={{"method": "{METHOD}", "num_speculative_tokens": 1, "draft_model_config": '
        '{"hf_config": {"eagle_aux_hidden_state_layer_ids": [26]}}}'
    )


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


class AttentionGroup(NamedTuple):
    """The group of the paged cache that holds the attention layers' keys and values: `row_bytes` is one token's."""

    number: int
    block_size: int
    row_bytes: int
    layer_names: tuple[str, ...]


def attention_group(vllm_config: Any, kv_cache_config: Any) -> AttentionGroup | RaymemError:
    """Find where attended rows go; what to say where this model or engine can't attend to rows."""
    try:
        rope_of(vllm_config, ())
        return _attention_group(vllm_config, kv_cache_config)
    except (Unsupported, UnsupportedModel) as error:
        return error


def rope_of(vllm_config: Any, layers: Sequence[int]) -> Rope:
    """How these layers of the engine's model, counted from 0, turn their keys by position.

    Raises:
        UnsupportedModel: not as attended rows need it.
    """
    rope = Rope.of(vllm_config.model_config.hf_config)
    return replace(rope, frequencies_LF=rope.frequencies_LF[list(layers)])


def row_format(vllm_config: Any) -> RowFormat:
    """What keys and values of rows of the engine's model are, of all layers and heads, in the model's dtype.

    Raises:
        UnsupportedModel: see `rope_of`.
    """
    model = vllm_config.model_config
    rope = Rope.of(model.hf_config)
    heads, width = model.get_total_num_kv_heads(), model.get_head_size()
    return RowFormat(len(rope.frequencies_LF), heads, width, rope_name(rope), dtype_name(model.dtype))


def _attention_group(vllm_config: Any, kv_cache_config: Any) -> AttentionGroup:
    from vllm.model_executor.models.utils import extract_layer_index
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.request import Request

    # a draft model's layers come after the model's own: rows are not theirs
    depth = int(vllm_config.model_config.get_total_num_hidden_layers())
    found = {
        name: (number, getattr(group.kv_cache_spec, "kv_cache_specs", {}).get(name, group.kv_cache_spec))
        for number, group in enumerate(kv_cache_config.kv_cache_groups)
        for name in group.layer_names
        if not _is_hidden_layer(name) and extract_layer_index(name) < depth
    }
    numbers = {number for number, _ in found.values()}
    kinds = {type(spec).__name__ for _, spec in found.values()}
    windows = {spec.sliding_window for _, spec in found.values() if getattr(spec, "sliding_window", None)}
    if kinds != {FullAttentionSpec.__name__} or windows or len(numbers) != 1:
        raise Unsupported(
            f"this model's cache is made of {sorted(kinds)} with windows {sorted(windows)}; rows are attended where "
            "all layers have full attention: mix banks in with read=[…] instead"
        )
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    if parallel.data_parallel_size > 1 or parallel.decode_context_parallel_size > 1:
        raise Unsupported(
            "rows are kept by one engine whose ranks see all positions: start one without data or context parallelism"
        )
    if cache.cache_dtype not in ("auto", dtype_name(vllm_config.model_config.dtype)):
        raise Unsupported(
            f"the cache is kept in {cache.cache_dtype}; rows are attended as they were computed: "
            "set kv_cache_dtype=auto"
        )
    graphs = getattr(vllm_config.compilation_config, "cudagraph_mode", None)
    if graphs is not None and graphs.mixed_mode().name == "FULL":
        raise Unsupported(
            "CUDA graphs of whole prompts hide the keys and values that they compute: "
            "set cudagraph_mode=FULL_AND_PIECEWISE"
        )
    missing = [name for name in ("update_block_hashes",) if not hasattr(Request, name)]
    if missing:
        raise Unsupported(f"vLLM's Request has no {', '.join(missing)}: this vLLM is another one than raymem knows")
    specs = [spec for _, spec in found.values()]
    row_bytes = sum(spec.page_size_bytes // spec.block_size for spec in specs)
    return AttentionGroup(numbers.pop(), int(specs[0].block_size), int(row_bytes), tuple(found))


def special_tokens(vllm_config: Any) -> frozenset[int]:
    """The ids of a model's special tokens; none where the engine has no tokenizer."""
    model = vllm_config.model_config
    if model.skip_tokenizer_init:
        return frozenset()
    from vllm.tokenizers.registry import cached_tokenizer_from_config

    return frozenset(int(token) for token in cached_tokenizer_from_config(model).all_special_ids)


def require_plain(request: Any) -> None:
    """Refuse to put rows before a request for which that means something else.

    Raises:
        InvalidInput: saying what about it is in the way.
    """
    wrong = {
        "a prompt of embeddings": request.prompt_token_ids is None or request.prompt_embeds is not None,
        "images or sound in its prompt": bool(request.mm_features),
        "a LoRA adapter, which changes keys and values": request.lora_request is not None,
        "an input that goes on": bool(request.resumable),
        "no text to generate": request.pooling_params is not None,
    }
    for what, found in wrong.items():
        if found:
            raise InvalidInput(f"a request with {what} attends to no bank: send a prompt of text or token ids")


def put_before(request: Any, tokens: list[int]) -> None:
    """Let a request of which nothing was computed begin with these tokens; `set_salt` goes with it."""
    # the front end keeps the prompt as it was sent
    request.prompt_token_ids = [*tokens, *request.prompt_token_ids]
    request._all_token_ids[:0] = tokens
    request.num_prompt_tokens += len(tokens)


def set_salt(request: Any, salt: str) -> None:
    """Let a request share blocks with those of the same salt alone."""
    request.cache_salt = salt
    request.block_hashes.clear()
    request.update_block_hashes()


def end_at_once(request: Any) -> None:
    """Let a request end with its first token: vLLM lets no connector refuse one."""
    request.max_tokens = 1


def scores_prompts(vllm_config: Any) -> bool:
    """Whether a prompt can be scored behind rows: `score_prompts_alone` knows this engine's runner."""
    return not vllm_config.use_v2_model_runner


def score_prompts_alone(runner: Any, rows_before: Mapping[str, int]) -> None:
    """Leave rows of memory out of `prompt_logprobs`: nothing was computed for them, and vLLM would hand out noise."""
    computed = getattr(runner, "_get_prompt_logprobs_dict", None)
    if computed is None or getattr(computed, "raymem", False):
        return

    def cut(*args: Any, **kwargs: Any) -> Any:
        found = computed(*args, **kwargs)
        for name, scores in found.items():
            before = rows_before.get(name, 0)
            if scores is not None and before:
                found[name] = scores._replace(
                    logprob_token_ids=scores.logprob_token_ids[before:],
                    logprobs=scores.logprobs[before:],
                    selected_token_ranks=scores.selected_token_ranks[before:],
                )
        return found

    cut.raymem = True  # type: ignore[attr-defined]
    runner._get_prompt_logprobs_dict = cut


class AttentionCache:
    """The paged keys and values of a worker's attention layers, written and seen through the backend's own update.

    Args:
        vllm_config: the engine's.
        names: the layers of the attention group; those of other pipeline stages are left out.

    Raises:
        Unsupported: a layer's backend has no such update.
    """

    def __init__(self, vllm_config: Any, names: Sequence[str]) -> None:
        from vllm.model_executor.models.utils import extract_layer_index

        self._parallel = vllm_config.parallel_config
        layers = vllm_config.compilation_config.static_forward_context
        found = sorted((extract_layer_index(name), layers[name]) for name in names if name in layers)
        self.numbers = [number for number, _ in found]
        self._layers = [layer for _, layer in found]
        for layer in self._layers:
            backend = layer.get_attn_backend()
            if layer.head_size_v != layer.head_size:
                raise Unsupported(f"heads of {layer.head_size} with values of {layer.head_size_v} can't be attended")
            if backend.forward_includes_kv_cache_update or not hasattr(layer.impl, "do_kv_cache_update"):
                raise Unsupported(
                    f"attention backend {backend.get_name()} has no update of its cache apart from its forward pass: "
                    "choose another one with attention_backend=…"
                )
        self._wanted_N: Tensor | None = None
        self._index_N: Tensor | None = None
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._watching = False

    def write(self, keys_LNHd: Tensor, values_LNHd: Tensor, slots_N: Tensor) -> None:
        """Write turned keys, and values, of all layers into slots."""
        for layer, keys_NHd, values_NHd in zip(self._layers, keys_LNHd, values_LNHd, strict=True):
            cache = layer.kv_cache
            here = [each.to(cache.device) for each in (keys_NHd, values_NHd, slots_N)]
            layer.impl.do_kv_cache_update(layer, here[0], here[1], cache, here[2])

    def own_share(self, rows_LNHd: Tensor) -> Tensor:
        """Of a whole model's keys or values those of this rank's layers and heads."""
        from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

        heads, own = rows_LNHd.shape[2], self._layers[0].num_kv_heads
        ranks = get_tensor_model_parallel_world_size()
        # where there are more ranks than heads, several have the same one
        first = get_tensor_model_parallel_rank() * max(heads, own) // ranks if heads != own else 0
        return rows_LNHd[self.numbers][:, :, first : first + own]

    def require_whole(self) -> None:
        """Refuse where other ranks have some of the layers or heads.

        Raises:
            Unsupported: they do.
        """
        if self._parallel.tensor_parallel_size * self._parallel.pipeline_parallel_size > 1:
            raise Unsupported("rows are spread over several workers; keep them from an engine of one")

    def zeros(self, rows: int) -> Tensor:
        """Keys or values `[L, N, H, d]` of no token."""
        layer = self._layers[0]
        return torch.zeros(len(self._layers), rows, layer.num_kv_heads, layer.head_size, dtype=layer.kv_cache.dtype)

    def watch(self, slots_N: Tensor) -> None:
        """Keep what the next pass writes into these slots."""
        if not self._watching:
            for place, layer in enumerate(self._layers):
                layer.impl.do_kv_cache_update = self._watched(place, layer.impl.do_kv_cache_update)
            self._watching = True
        self._wanted_N, self._index_N, self._seen = slots_N, None, {}

    def seen(self) -> tuple[Tensor, Tensor] | None:
        """Turned keys and values `[L, N, H, d]` of the watched slots, on the host; watching ends.

        None where a layer wrote its cache unseen: a full CUDA graph, replayed, calls no backend.
        """
        self._wanted_N = None
        seen, self._seen = self._seen, {}
        if len(seen) < len(self._layers):
            return None
        pairs = [seen[place] for place in range(len(self._layers))]
        return torch.stack([keys for keys, _ in pairs]), torch.stack([values for _, values in pairs])

    def _watched(self, place: int, update: Callable[..., None]) -> Callable[..., None]:
        def watched(layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slots_T: Tensor) -> None:
            if self._wanted_N is not None:
                rows_N = self._rows(slots_T)
                self._seen[place] = key[rows_N].cpu(), value[rows_N].cpu()
            update(layer, key, value, kv_cache, slots_T)

        return watched

    def _rows(self, slots_T: Tensor) -> Tensor:
        """Which rows of this pass go to the watched slots; the same in all layers."""
        if self._index_N is None:
            assert self._wanted_N is not None
            ascending_T, order_T = torch.sort(slots_T)
            wanted_N = self._wanted_N.to(slots_T)
            found_N = torch.searchsorted(ascending_T, wanted_N).clamp(max=len(slots_T) - 1)
            assert torch.equal(ascending_T[found_N], wanted_N), "rows to keep are not in this pass"
            self._index_N = order_T[found_N]
        return self._index_N


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
    its text, which begins after the rows of memory (`rows_before`, by request), `tokens_T` the input tokens (None for a
    model that is fed embeddings). Request i's rows are `starts[i]` to `starts[i + 1]`; `sampled_N` are the rows that
    get logits.
    """

    def __init__(
        self,
        runner: Any,
        tokens_T: Tensor | None,
        positions_T: Tensor,
        outputs: tuple[Tensor, Sequence[Tensor]],
        rows_before: Mapping[str, int],
    ) -> None:
        count = int(runner.input_batch.num_reqs)
        self.requests: list[str] = list(runner.input_batch.req_ids[:count])
        self.starts: list[int] = runner.query_start_loc.np[: count + 1].tolist()
        self.tokens_T = tokens_T
        self.positions_T = self._in_text(positions_T, rows_before)
        self.final_TD, self.states = outputs
        self.sampled_N: Tensor | None = None

    def _in_text(self, positions_T: Tensor, rows_before: Mapping[str, int]) -> Tensor:
        shifted = [(place, rows) for place, name in enumerate(self.requests) if (rows := rows_before.get(name, 0))]
        if shifted:
            positions_T = positions_T.clone()
        for place, rows in shifted:
            positions_T[self.starts[place] : self.starts[place + 1]] -= rows
        return positions_T

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
        rows_before: rows of memory before the texts of running requests.

    Raises:
        Unsupported: this vLLM's runner is another one.
    """

    def __init__(
        self, runner: Any, change: Callable[[EngineStep, Tensor, Tensor], Tensor], rows_before: Mapping[str, int]
    ) -> None:
        _require_v1(runner)
        self._rows_before = rows_before
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
        batch = self._runner.input_batch
        table = batch.block_table[group].get_numpy_array()[request]
        size, before = cache.shape[2], self._rows_before.get(batch.req_ids[request], 0)
        slots_n = torch.tensor(
            [int(table[at // size]) * size + at % size for at in range(start + before, stop + before)]
        )
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
            self._step = EngineStep(
                self._runner, kwargs.get("input_ids"), kwargs["positions"], output, self._rows_before
            )
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
