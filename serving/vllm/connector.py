"""The KV connector: streams hidden states of opted-in requests from a running vLLM engine to their banks.

vLLM makes one beside the scheduler, which tracks the rows, and one in each worker, which copies the rows off the device
and hands them to the sender. Requests that attend to banks begin with rows that the workers keep. It never waits for a
bank.
"""

from __future__ import annotations

import secrets
import threading
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from prometheus_client import Counter
from torch import Tensor
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from raymem.errors import ConfigError, InvalidInput, RaymemError, Unauthorized
from raymem.logs import WarnOnce, get_logger
from raymem.rows import RowFormat
from raymem.serving.vllm import vllm_internals
from raymem.serving.vllm.attend import Attender, AttendStep
from raymem.serving.vllm.params import ConnectorConfig, write_target
from raymem.serving.vllm.row_index import RowIndex
from raymem.serving.vllm.row_store import RowStore
from raymem.serving.vllm.row_watch import RowWatch
from raymem.serving.vllm.sender import QueuedRows, RowCopier, Sender, Sink
from raymem.serving.vllm.tracker import RunSlice, Tracker
from raymem.serving.vllm.vllm_internals import AttentionGroup
from raymem.types import Fingerprint

log = get_logger("raymem.vllm")


# the counters that vLLM's log line and Prometheus show: those that only grow
_SHOWN = {
    "rows_written": "Hidden-state rows written to banks.",
    "rows_shed": "Hidden-state rows that were not written.",
    "traces_shed": "Requests whose stream was cut short.",
    "requests_refused": "Requests to stream that were refused.",
    "retries": "Writes to banks that were tried again.",
    "requests_attended": "Requests that attended to banks.",
    "rows_attended": "Rows of banks that requests attended to.",
    "choices_renewed": "Times that a running request's rows were chosen anew.",
    "attends_refused": "Requests that attended to nothing though they asked.",
}


@dataclass
class StepMetadata(KVConnectorMetadata):
    """What the scheduler's side tells the workers' in each step: the rows to send and attend to, whom it refused."""

    slices: list[RunSlice] = field(default_factory=list)
    refused: list[tuple[str, RaymemError]] = field(default_factory=list)
    rows: AttendStep = field(default_factory=AttendStep)


@dataclass
class OrderKey(KVConnectorHandshakeMetadata):
    """What a worker signs orders with; the scheduler's side gets it when the engine starts, and nothing logs it."""

    secret: str = field(repr=False)


@dataclass
class LostChunks(KVConnectorWorkerMetadata):
    """What a worker tells the scheduler's side after a step: chunks that some worker hasn't got."""

    chunks: list[int]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> LostChunks:
        """Those of both."""
        assert isinstance(other, LostChunks)
        return LostChunks(sorted({*self.chunks, *other.chunks}))


class RaymemConnector(KVConnectorBase_V1, SupportsHMA):
    """Streams the layers that `extract_hidden_states` extracts into raymem banks, and lets requests attend to banks.

    Without that speculative method requests can attend, and nothing streams.

    Raises:
        ConfigError: a setting is unknown, or the model does not have these layers.
        Unsupported: this vLLM would sample garbage beside that method.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self.layers = vllm_internals.streamed_layers(vllm_config)
        self.config = ConnectorConfig.parse(self._kv_transfer_config.kv_connector_extra_config)
        self._group, self._block_size = vllm_internals.hidden_group(kv_cache_config) if self.layers else (0, 1)
        self._tracker = Tracker(self._group, self._block_size)
        self._attention = vllm_internals.attention_group(vllm_config, kv_cache_config)
        self._rows: RowStore | None = None
        self._attender: Attender | None = None
        # signs orders
        self.secret = secrets.token_hex(32)
        if role is KVConnectorRole.SCHEDULER:
            self._say_policy()
            self._attender = self._make_attender()
        elif self.layers:
            vllm_internals.mend_vllm()
        # rows before the prompts of requests that run here
        self.rows_before: dict[str, int] = {}
        self._refused: list[tuple[str, RaymemError]] = []
        self._once = WarnOnce(log)
        self._fingerprint: Fingerprint | None = None
        self._hashing = threading.Lock()
        self._cache: Tensor | None = None
        self._copier: RowCopier | None = None
        self._finished: set[str] = set()
        self._reported: dict[str, int] = {}
        self.sender: Sender | None = None

    @property
    def requires_kv_delivery(self) -> bool:
        """Rows are sent in the step that computes them, so a preemption undoes nothing."""
        return False

    def open_sink(self) -> Sink:
        """Connect to the store; called on the sender's thread, when there is something to write."""
        # the scheduler and vLLM's front end load this module too, without a store
        from raymem.serving.vllm.sink import StoreSink

        return StoreSink(self.config, self.require, self.made_by)

    @property
    def longest(self) -> int:
        """The most tokens of a request, its answer included."""
        return int(self._vllm_config.model_config.max_model_len)

    def made_by(self) -> Fingerprint:
        """Return what makes this engine's rows; the model is hashed once.

        Raises:
            ModelNotFound, UnsupportedModel, ConfigError: as `engine_fingerprint`.
        """
        with self._hashing:
            if self._fingerprint is None:
                self._fingerprint = vllm_internals.engine_fingerprint(self._vllm_config, self.layers)
            return self._fingerprint

    def require(self, bank: Fingerprint) -> None:
        """Refuse a bank of another model, other layers or another dtype.

        Raises:
            FingerprintMismatch: naming every field that differs. ConfigError: this engine extracts no states.
        """
        if not self.layers:
            raise vllm_internals.nothing_extracted(self._vllm_config)
        bank.accept(self.made_by())

    def require_model(self, bank: Fingerprint) -> None:
        """Refuse a bank of another model; of which layers its states are says nothing about keys and values.

        Raises:
            FingerprintMismatch: naming every field that differs.
        """
        made = vllm_internals.engine_fingerprint(self._vllm_config, bank.layers)
        bank.accept(made.model_copy(update={"dtype": bank.dtype}))

    def cold_uri(self) -> str:
        """Return the cold store behind the store that is written to.

        Raises:
            ConfigError: the settings name only a gateway or a cluster.
        """
        uri = self.config.cold or self.config.store
        if uri == "ray" or uri.startswith(("ray://", "http://", "https://")):
            raise ConfigError(
                f"a bank is followed from its cold store, and {uri!r} does not say where that is: name it"
            )
        return uri

    def paged_states(self) -> tuple[Tensor, int]:
        """Return the paged cache of hidden states and the index of its group."""
        assert self._cache is not None, "asked before vLLM registered its caches"
        return self._cache, self._group

    # on the scheduler's side

    def _say_policy(self) -> None:
        names = ("write_banks", "read_banks", "attend_banks")
        allowed = {name: list(getattr(self.config, name)) for name in names}
        if any(allowed.values()):
            log.info("requests may touch these banks", **allowed)
        else:
            log.warning(f"requests may touch no bank: name {', '.join(names)} in kv_connector_extra_config", **allowed)

    def _make_attender(self) -> Attender:
        row_bytes = self._attention.row_bytes if isinstance(self._attention, AttentionGroup) else 1
        ignored = vllm_internals.special_tokens(self._vllm_config) if self.config.attend_banks else frozenset()
        index = RowIndex(self.config.rows_bytes, row_bytes, floor=self.config.attend_floor, ignored=ignored)
        self._watch = RowWatch(index, self.config.follow_s)
        return Attender(
            self.config,
            index,
            self._attention,
            longest=self.longest,
            secret=self.secret,
            scores=vllm_internals.scores_prompts(self._vllm_config),
            follow=self._watch.start,
        )

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        # the front end carries out the first worker's plans
        first = metadata[min(metadata)]
        if isinstance(first, OrderKey):
            assert self._attender is not None, "asked on a worker's side"
            self.secret = self._attender.secret = first.secret

    def on_new_request(self, request: Any) -> None:
        assert self._attender is not None, "asked on a worker's side"
        before = self._attender.admit(request)
        try:
            target = write_target(request.kv_transfer_params)
            if target is None:
                return
            if request.prompt_token_ids is None:
                raise InvalidInput("a prompt of embeddings has no token ids to store: send the prompt as text or ids")
            if request.lora_request is not None:
                raise InvalidInput(
                    f"the adapter {request.lora_request.lora_name!r} changes the model's hidden states, and the bank "
                    "holds the model's own: send the request without it, or serve the merged model"
                )
            self.config.check_write(target.bank)
            if not self.layers:
                raise vllm_internals.nothing_extracted(self._vllm_config)
        except (InvalidInput, Unauthorized, ConfigError) as error:
            if self.layers:
                self._refused.append((request.request_id, error))
            else:
                # no worker has a sender that would say so
                self._once.warn((error.code, str(error)), "request does not stream", reason=str(error))
        else:
            self._tracker.admit(request, target, before)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        refused, self._refused = self._refused, []
        assert self._attender is not None, "asked on a worker's side"
        return StepMetadata(self._tracker.step(scheduler_output), refused, self._attender.step(scheduler_output))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self._attender is not None, "asked on a worker's side"
        return self._tracker.finish(request), self._attender.finish(request)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self._attender is not None, "asked on a worker's side"
        return self._attender.claimed(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self._attender is not None, "asked on a worker's side"
        self._attender.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def update_connector_output(self, connector_output: Any) -> None:
        lost = connector_output.kv_connector_worker_meta
        if isinstance(lost, LostChunks):
            assert self._attender is not None, "asked on a worker's side"
            self._attender.lose(lost.chunks)

    # in each worker

    def get_handshake_metadata(self) -> OrderKey | None:
        # beside other connectors nothing is attended, and a MultiConnector would hand this to them
        alone = has_kv_transfer_group() and get_kv_transfer_group() is self
        return OrderKey(self.secret) if alone else None

    def build_connector_worker_meta(self) -> LostChunks | None:
        lost = [] if self._rows is None else self._rows.take_lost()
        return LostChunks(lost) if lost else None

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        if not self.layers:
            return
        width = int(self._vllm_config.model_config.get_hidden_size())
        self._cache = vllm_internals.hidden_cache(kv_caches, self._block_size, len(self.layers), width)
        if vllm_internals.writes_rows():
            self._copier = RowCopier(self._cache)
            self.sender = Sender(self.open_sink, self.config)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMetadata)
        rows = connector_metadata.rows
        self.rows_before |= rows.begun
        # here and not in `start_load_kv`, which runs after the pass unless a request begins
        if rows.captures or rows.fills or rows.dropped or rows.loads:
            self.row_store().begin(rows.captures, rows.fills, rows.dropped, rows.loads)

    def row_store(self) -> RowStore:
        """The rows that this worker keeps.

        Raises:
            Unsupported, UnsupportedModel: this engine can't attend to rows.
        """
        if self._rows is None:
            if isinstance(self._attention, RaymemError):
                raise self._attention
            cache = vllm_internals.AttentionCache(self._vllm_config, self._attention.layer_names)
            rope = vllm_internals.rope_of(self._vllm_config, cache.numbers)
            self._rows = RowStore(cache, rope, self.config.rows_bytes)
        return self._rows

    def row_format(self) -> RowFormat:
        """What keys and values of rows of this engine's model are.

        Raises:
            UnsupportedModel: this engine can't attend to rows.
        """
        return vllm_internals.row_format(self._vllm_config)

    def kept_rows(self) -> dict[str, int]:
        """What this worker keeps of banks."""
        return {} if self._rows is None else self._rows.stats()

    def wait_for_save(self) -> None:
        if self._rows is not None:
            self._rows.end()
        if self._copier is None or self.sender is None or not self.has_connector_metadata():
            return
        rows = self._get_connector_metadata()
        assert isinstance(rows, StepMetadata)
        for request, error in rows.refused:
            self.sender.refuse(request, error)
        self._send(self._copier, self.sender, rows.slices)
        # after the rows: a run's last ones may come in the same step that reports its end
        self.sender.end(self._finished)
        self._finished = set()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        for request in finished_req_ids:
            self.rows_before.pop(request, None)
        # other ranks send nothing, so they track no runs
        if self.sender is not None:
            self._finished |= finished_req_ids
        if not self.has_connector_metadata():
            return None, None
        rows = self._get_connector_metadata()
        assert isinstance(rows, StepMetadata)
        # every rank reports: vLLM waits for all of them before it frees the blocks
        return {part.run for part in rows.slices} & finished_req_ids or None, None

    def get_kv_connector_stats(self) -> RaymemStats | None:
        now, before = self._counted(), self._reported
        self._reported = now
        gained = {name: gain for name in _SHOWN if (gain := now.get(name, 0) - before.get(name, 0))}
        return RaymemStats(data=gained) if gained else None

    def _counted(self) -> dict[str, int]:
        if self._attender is not None:
            return asdict(self._attender.counters)
        return {} if self.sender is None else asdict(self.sender.stats())

    def shutdown(self) -> None:
        if self._attender is not None:
            self._watch.close()
        if self.sender is not None:
            self.sender.close()
            self.sender = None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    @staticmethod
    def _send(copier: RowCopier, sender: Sender, slices: list[RunSlice]) -> None:
        """Copy the rows for which the queue has room, in one transfer, and queue them."""
        taken = [part for part in slices if sender.reserve(part, len(part.tokens) * copier.row_bytes)]
        if not taken:
            return
        rows_TLD, ready = copier.copy([slot for part in taken for slot in part.slots])
        copies = torch.split(rows_TLD, [len(part.tokens) for part in taken])
        now = time.time()
        sender.put([QueuedRows(part, copy, ready, now) for part, copy in zip(taken, copies, strict=True)])

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> RaymemStats:
        return RaymemStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> RaymemPromMetrics:
        return RaymemPromMetrics(*args)


class RaymemStats(KVConnectorStats):
    """What the shown counters gained in one interval."""

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def is_empty(self) -> bool:
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, gain in other.data.items():
            self.data[name] = self.data.get(name, 0) + gain
        return self

    def reduce(self) -> dict[str, int | float]:
        return {f"raymem_{name}": value for name, value in self.data.items()}


class RaymemPromMetrics(KVConnectorPromMetrics):
    """One Prometheus counter for each of `_SHOWN`, per engine."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        make = self._counter_cls
        families = {
            name: make(name=f"vllm:raymem_{name}", documentation=text, labelnames=self._labelnames)
            for name, text in _SHOWN.items()
        }
        self._counters: dict[tuple[int, str], Counter] = {
            (engine, name): family.labels(*labels)
            for name, family in families.items()
            for engine, labels in self.per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, gain in transfer_stats_data.items():
            self._counters[engine_idx, name].inc(gain)
