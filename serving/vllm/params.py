"""What a user hands to vLLM: the engine's arguments, and each request's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raymem.errors import ConfigError, InvalidInput
from raymem.types import check_bank_name, check_label

CONNECTOR = "RaymemConnector"
CONNECTOR_MODULE = "raymem.serving.vllm.connector"
READER = "raymem.serving.vllm.reader.MemoryReader"
METHOD = "extract_hidden_states"


class ConnectorConfig(BaseModel):
    """The connector's settings, as they stand in vLLM's `kv_connector_extra_config`.

    `store` is what `raymem.connect` takes, `cold` its keyword for a Ray cluster. `queue_bytes` bounds the rows that
    wait to be written, `batch_bytes` one batch of a bank; a batch waits `linger_s` for company. `retry_s` is how long
    one write is tried again, `flush_s` how long a shutdown waits.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: str = Field(min_length=1)
    cold: str | None = None
    queue_bytes: int = Field(default=64 * 2**20, ge=1)
    batch_bytes: int = Field(default=8 * 2**20, ge=1)
    linger_s: float = Field(default=0.05, ge=0)
    retry_s: float = Field(default=5.0, ge=0)
    flush_s: float = Field(default=2.0, ge=0)

    @classmethod
    def parse(cls, extra: Mapping[str, Any]) -> ConnectorConfig:
        """Read the settings.

        Raises:
            ConfigError: an unknown key or a value out of range, naming it.
        """
        try:
            return cls.model_validate(dict(extra))
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors())
            known = ", ".join(cls.model_fields)
            raise ConfigError(f"kv_connector_extra_config: {wrong}. Known keys: {known}") from error


class Target(NamedTuple):
    """Where a request's rows go."""

    bank: str
    stream: str


def engine_args(store: str, layers: Sequence[int] = (26,), **settings: Any) -> dict[str, Any]:
    """Everything that `vllm.LLM(**...)` or `AsyncEngineArgs(**...)` needs to stream into banks and read from them.

    Args:
        store: what `raymem.connect` takes: a folder, "ray", or a gateway's URL.
        layers: 1-based decoder outputs to stream, those of the banks' fingerprint.
        settings: further fields of `ConnectorConfig`.

    Raises:
        ConfigError: an unknown setting, or layers that vLLM would reorder.
    """
    chosen = [int(layer) for layer in layers]
    if not chosen or min(chosen) < 1 or chosen != sorted(set(chosen)):
        raise ConfigError(
            f"layers {list(layers)!r} must be distinct, ascending and start at 1 or above: vLLM sorts them"
        )
    config = ConnectorConfig.parse({"store": store, **settings})
    return {
        "speculative_config": {
            "method": METHOD,
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": chosen}},
        },
        "kv_transfer_config": {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": CONNECTOR_MODULE,
            "kv_role": "kv_producer",
            "kv_connector_extra_config": config.model_dump(exclude_none=True),
        },
        "worker_extension_cls": READER,
        "enforce_eager": True,
    }


def raymem_params(bank: str | None = None, stream: str | None = None, read: Sequence[str] = ()) -> dict[str, Any]:
    """The `extra_args` of a request's `SamplingParams`: which bank its states go to, which banks it reads.

    Args:
        bank: the bank that the request's hidden states stream into; none when None.
        stream: the line of thought they belong to; the bank's name when None.
        read: banks, attached to the engine, that are mixed into the request's logits.

    Raises:
        InvalidName: a bank or stream name that is not allowed.
    """
    extra: dict[str, Any] = {}
    if bank is not None:
        target = {"bank": check_bank_name(bank), "stream": check_label("stream", bank if stream is None else stream)}
        extra["kv_transfer_params"] = {"raymem": target}
    if read:
        extra["raymem"] = {"read": [check_bank_name(name) for name in read]}
    return extra


def write_target(kv_transfer_params: Any) -> Target | None:
    """Read a request's write target; None for a request that did not opt in.

    Raises:
        InvalidInput: the request asked for streaming in a way that can't be followed.
    """
    asked = kv_transfer_params.get("raymem") if isinstance(kv_transfer_params, Mapping) else None
    if asked is None:
        return None
    if not isinstance(asked, Mapping) or set(asked) - {"bank", "stream"} or not isinstance(asked.get("bank"), str):
        raise InvalidInput(f'kv_transfer_params["raymem"] is {asked!r}; expected {{"bank": NAME, "stream": NAME}}')
    bank = check_bank_name(asked["bank"])
    stream = asked.get("stream", bank)
    if not isinstance(stream, str):
        raise InvalidInput(f'kv_transfer_params["raymem"]["stream"] is {stream!r}; expected a string')
    return Target(bank, check_label("stream", stream))


def banks_to_read(extra_args: Any) -> tuple[str, ...]:
    """Name the banks that a request's `extra_args` ask to read; empty when it asks for none."""
    asked = extra_args.get("raymem") if isinstance(extra_args, Mapping) else None
    banks = asked.get("read") if isinstance(asked, Mapping) else None
    return tuple(name for name in banks if isinstance(name, str)) if isinstance(banks, list | tuple) else ()
