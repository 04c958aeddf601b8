"""The worker extension: attaches banks inside a vLLM worker; called with `llm.collective_rpc(...)`."""

from __future__ import annotations

import functools
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

from raymem.errors import ConfigError, RaymemError, Unsupported
from raymem.logs import get_logger
from raymem.serving.vllm import vllm_internals
from raymem.serving.vllm.connector import RaymemConnector
from raymem.serving.vllm.memory import MemoryMixer
from raymem.types import check_bank_name

if TYPE_CHECKING:
    from torch import Tensor

    from raymem.serving.vllm.follower import Follower

log = get_logger("raymem.vllm")


class MemoryReader:
    """Mixed into vLLM's worker by `worker_extension_cls`; each method answers from every worker of the engine.

    ::

        llm.collective_rpc("attach_bank", args=("research/alice",))
        llm.generate(prompt, SamplingParams(extra_args=raymem_params(read=["research/alice"])))
    """

    def attach_bank(self, name: str, store: str | None = None) -> dict[str, Any]:
        """Follow a bank in this worker; one that is attached already is brought up to date.

        Args:
            name: the bank.
            store: the cold store it lives in; by default the one that the connector writes to.

        Raises:
            BankNotFound, BankDetached: the bank is not there, or not attached to its store.
            FingerprintMismatch: the bank holds another model's states, or other layers.
            ConfigError: the connector writes through a gateway, so the cold store must be named.
            Unsupported: this vLLM's model runner is not the one that raymem knows.
        """
        return _memory_of(self).attach(check_bank_name(name), store)

    def attach_soon(self, name: str) -> dict[str, Any]:
        """As `attach_bank`, while steps go on: `loading` until it is called again after the bank was loaded.

        What `attach_bank` raises is `refused`, as data: vLLM passes errors on as text alone.
        """
        try:
            return _memory_of(self).attach_soon(check_bank_name(name))
        except RaymemError as error:
            return {"refused": error.to_wire()}

    def detach_bank(self, name: str) -> bool:
        """Stop following a bank and free its memory; say whether it was attached."""
        return _memory_of(self).detach(name)

    def rows_to_rebuild(self, name: str, store: str | None = None) -> dict[str, Any]:
        """Plan the requests that make the rows of a bank which this engine does not keep yet.

        `attach_rows` calls it, and sends them.

        Raises:
            BankNotFound, BankDetached: the bank is not there, or not attached to its store.
            FingerprintMismatch: it is another model's.
            ConfigError: the connector writes through a gateway, so the cold store must be named.
            Unsupported, UnsupportedModel: this engine can't attend to rows, or a bank of this kind keeps none.
        """
        from raymem.serving.vllm.rebuild import plan

        try:
            return plan(_attending(self), check_bank_name(name), store)
        except RaymemError as error:
            return {"refused": error.to_wire()}

    def rows_to_replace(self, name: str, store: str | None, rows: dict[str, Any]) -> dict[str, Any]:
        """Hold rows that were made of a bank, and make the request that attends to them in place of the bank's own.

        Raises:
            BankNotFound, BankDetached, FingerprintMismatch, ConfigError, Unsupported, UnsupportedModel: as
                `rows_to_rebuild`.
        """
        from raymem.serving.vllm.rebuild import replacement

        try:
            return replacement(_attending(self), check_bank_name(name), store, rows)
        except RaymemError as error:
            return {"refused": error.to_wire()}

    def rows_kept(self, name: str, store: str | None, part: int) -> Any:
        """Hand out the rows that this worker keeps of a bank, part by part; `rows_kept` of `attach.py` calls it.

        Raises:
            BankNotFound: the bank is not there. Unsupported: the rows are spread over several workers.
        """
        from raymem.serving.vllm.rebuild import kept_parts

        return kept_parts(_connector(alone=True), check_bank_name(name), store, part)

    def rows_to_release(self, name: str) -> dict[str, Any]:
        """Make the request that lets this engine forget a bank's rows; `detach_rows` calls it, and sends it."""
        from raymem.serving.vllm.rebuild import release

        try:
            return release(_connector(alone=True), check_bank_name(name))
        except RaymemError as error:
            return {"refused": error.to_wire()}

    def memory_stats(self) -> dict[str, Any]:
        """Return what was streamed, shed and mixed so far, and the position of each attached bank."""
        return _memory_of(self).stats()

    def flush_memory(self, timeout_s: float = 30.0) -> bool:
        """Wait until every row that has left the engine is in its bank; False when that took longer."""
        sender = _connector().sender
        return sender is None or sender.flush(timeout_s)


def _memory_of(worker: Any) -> _WorkerMemory:
    # vLLM refuses an extension whose attributes its workers have too, so this one sets a single name, on first use
    memory = getattr(worker, "raymem_memory", None)
    if memory is None:
        memory = worker.raymem_memory = _WorkerMemory(worker)
    assert isinstance(memory, _WorkerMemory)
    return memory


class _WorkerMemory:
    """The banks of one worker; from the first one on, a tap on its logits."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._banks: dict[str, Follower] = {}
        # one bank at a time: the engine's own threads come first
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="raymem-load")
        self._loading: dict[str, Future[Follower]] = {}
        self._tap: vllm_internals.LogitsTap | None = None
        self._mixer: MemoryMixer | None = None

    def attach(self, name: str, store: str | None) -> dict[str, Any]:
        from raymem.serving.vllm.follower import Follower

        if name in self._banks:
            self._banks[name].catch_up()
            return self._banks[name].stats()
        connector = _connector()
        return self._add(Follower(store or connector.cold_uri(), name, "cpu", connector.require))

    def attach_soon(self, name: str) -> dict[str, Any]:
        from raymem.serving.vllm.follower import Follower

        if name in self._banks:
            return self.attach(name, None)
        if name not in self._loading:
            connector = _connector()
            load = functools.partial(Follower, connector.cold_uri(), name, "cpu", connector.require)
            self._loading[name] = self._loader.submit(load)
        if not self._loading[name].done():
            return {"loading": True}
        return self._add(self._loading.pop(name).result())

    def _add(self, bank: Follower) -> dict[str, Any]:
        try:
            self._start_tap(_connector())
        except RaymemError:
            bank.close()
            raise
        self._banks[bank.name] = bank
        log.info("bank attached", bank=bank.name, **bank.stats())
        return bank.stats()

    def detach(self, name: str) -> bool:
        bank = self._banks.pop(name, None)
        if bank is not None:
            bank.close()
        return bank is not None

    def stats(self) -> dict[str, Any]:
        sender, read = _connector().sender, {}
        if self._mixer is not None and self._tap is not None:
            read = {**asdict(self._mixer.counters), "calls_unseen": self._tap.calls_unseen}
        return {
            "streamed": asdict(sender.stats()) if sender is not None else {},
            "read": read,
            "rows": _connector().kept_rows(),
            "banks": {name: bank.stats() for name, bank in self._banks.items()},
        }

    def _start_tap(self, connector: RaymemConnector) -> None:
        if self._tap is not None:
            return
        from raymem.lm.mixing import NEIGHBOURS, Mixer

        def change(step: vllm_internals.EngineStep, rows_R: Tensor, logits_RV: Tensor) -> Tensor:
            return memory.change(step, rows_R, logits_RV)

        def earlier(request: int, start: int, stop: int) -> Tensor:
            cache, group = connector.paged_states()
            return tap.earlier_states(request, start, stop, group, cache)

        tap = vllm_internals.LogitsTap(self._worker.model_runner, change, connector.rows_before)
        self._mixer = memory = MemoryMixer(
            self._banks,
            Mixer().mix,
            tap.request_args,
            earlier,
            allow=connector.config.check_reads,
            neighbours=NEIGHBOURS,
        )
        self._tap = tap


def _attending(worker: Any) -> RaymemConnector:
    """The connector of a worker that is about to keep rows; from now on it scores prompts without those before them."""
    connector = _connector(alone=True)
    vllm_internals.score_prompts_alone(worker.model_runner, connector.rows_before)
    return connector


def _connector(alone: bool = False) -> RaymemConnector:
    group = get_kv_transfer_group() if has_kv_transfer_group() else None
    if alone and not isinstance(group, RaymemConnector):
        raise Unsupported(
            f"this engine's KV connector is {type(group).__name__}; rows are attended where RaymemConnector is the "
            "only one, because another one may claim the same tokens: start the engine with LLM(**engine_args(store))"
        )
    # vLLM's MultiConnector keeps its connectors in `_connectors`
    for connector in (group, *getattr(group, "_connectors", ())):
        if isinstance(connector, RaymemConnector):
            return connector
    raise ConfigError(
        f"this engine's KV connector is {type(group).__name__}; memory is read from the layers that "
        "RaymemConnector extracts: start the engine with LLM(**raymem.serving.vllm.engine_args(store))"
    )
