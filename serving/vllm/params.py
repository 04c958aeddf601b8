"""What a user gives to vLLM: the engine's arguments, and each request's."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from raymem.errors import ConfigError, InvalidInput, Unauthorized
from raymem.types import check_bank_name, check_label

CONNECTOR = "RaymemConnector"
CONNECTOR_MODULE = "raymem.serving.vllm.connector"
READER = "raymem.serving.vllm.reader.MemoryReader"
METHOD = "extract_hidden_states"
# each bank of a request costs a search in every engine step
MOST_READS = 8

Globs = tuple[Annotated[str, Field(min_length=1, max_length=200)], ...]


class ConnectorConfig(BaseModel):
    """The connector's settings, as they stand in vLLM's `kv_connector_extra_config`.

    `store` is what `raymem.connect` takes, `cold` its keyword for a Ray cluster. `queue_bytes` bounds the rows that
    wait to be written, `batch_bytes` one batch of a bank; a batch waits `linger_s` for more rows. `retry_s` is how long
    one write is tried again, `flush_s` how long a shutdown waits. `write_banks` and `read_banks` are the banks that
    requests may touch, as globs like `research/*`: none unless they are named, because requests may come from anyone
    who reaches the server.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: str = Field(min_length=1)
    cold: str | None = None
    queue_bytes: int = Field(default=64 * 2**20, ge=1)
    batch_bytes: int = Field(default=8 * 2**20, ge=1)
    linger_s: float = Field(default=0.05, ge=0)
    retry_s: float = Field(default=5.0, ge=0)
    flush_s: float = Field(default=2.0, ge=0)
    write_banks: Globs = ()
    read_banks: Globs = ()

    @classmethod
    def parse(cls, extra: Mapping[str, Any]) -> ConnectorConfig:
        """Read the settings.

        Raises:
            ConfigError: an unknown key or a value out of range, naming it.
        """
        try:
            return cls.model_validate(dict(extra))
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, e['loc']))}={reprlib.repr(e['input'])}: {e['msg']}" for e in error.errors()
            )
            known = ", ".join(cls.model_fields)
            raise ConfigError(f"kv_connector_extra_config: {wrong}. Known keys: {known}") from error

    def check_write(self, bank: str) -> None:
        """Let a request write to a bank.

        Raises:
            Unauthorized: no glob of `write_banks` names it.
        """
        _check_allowed(bank, "write_banks", self.write_banks)

    def check_reads(self, banks: Iterable[str]) -> None:
        """Let a request read banks.

        Raises:
            Unauthorized: no glob of `read_banks` names one of them.
        """
        for bank in banks:
            _check_allowed(bank, "read_banks", self.read_banks)


def _check_allowed(bank: str, setting: str, globs: Globs) -> None:
    if not any(fnmatchcase(bank, glob) for glob in globs):
        raise Unauthorized(
            f"bank {bank!r} is not among this engine's {setting}, {list(globs)}, and requests may touch no other: "
            f"name it there, in kv_connector_extra_config or engine_args(…, {setting}=[…])"
        )


class Target(NamedTuple):
    """Where a request's rows go."""

    bank: str
    stream: str


def engine_args(store: str, layers: Sequence[int] = (26,), **settings: Any) -> dict[str, Any]:
    """Everything that `vllm.LLM(**...)` or `AsyncEngineArgs(**...)` needs to stream into banks and read from them.

    Requests may touch every bank, as suits a program that makes its requests itself: name `write_banks` and
    `read_banks` where they come from others.

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
    config = ConnectorConfig.parse({"store": store, "write_banks": ("*",), "read_banks": ("*",), **settings})
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
            "kv_connector_extra_config": config.model_dump(mode="json", exclude_none=True),
        },
        "worker_extension_cls": READER,
        "enforce_eager": True,
    }


def raymem_params(bank: str | None = None, stream: str | None = None, read: Sequence[str] = ()) -> dict[str, Any]:
    """The `extra_args` of a request's `SamplingParams`: which bank its states go to, which banks it reads.

    Args:
        bank: the bank that the request's hidden states stream into; none when None.
        stream: the line of thought they belong to; the bank's name when None.
        read: banks, attached to the engine, that are mixed into the request's logits; 8 at most.

    Raises:
        InvalidName: a bank or stream name that is not allowed.
        InvalidInput: too many banks to read.
    """
    extra: dict[str, Any] = {}
    if bank is not None:
        target = {"bank": check_bank_name(bank), "stream": check_label("stream", bank if stream is None else stream)}
        extra["kv_transfer_params"] = {"raymem": target}
    if read:
        extra["raymem"] = {"read": list(_distinct(read))}
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
        raise InvalidInput(
            f'kv_transfer_params["raymem"] is {reprlib.repr(asked)}; expected {{"bank": NAME, "stream": NAME}}'
        )
    bank = check_bank_name(asked["bank"])
    stream = asked.get("stream", bank)
    if not isinstance(stream, str):
        raise InvalidInput(f'kv_transfer_params["raymem"]["stream"] is {reprlib.repr(stream)}; expected a string')
    return Target(bank, check_label("stream", stream))


def banks_to_read(extra_args: Any) -> tuple[str, ...]:
    """Name the banks that a request's `extra_args` ask to read, each once; empty when it asks for none.

    Raises:
        InvalidInput: the request asked in a way that can't be followed, or for too many banks.
    """
    asked = extra_args.get("raymem") if isinstance(extra_args, Mapping) else None
    if not isinstance(asked, Mapping):
        return ()
    if set(asked) - {"read"}:
        raise InvalidInput(f'extra_args["raymem"] is {reprlib.repr(asked)}; expected {{"read": [BANK, …]}}')
    return _distinct(asked.get("read", ()))


def _distinct(banks: Any) -> tuple[str, ...]:
    if not isinstance(banks, list | tuple) or not all(isinstance(name, str) for name in banks):
        raise InvalidInput(f"banks to read are {reprlib.repr(banks)}; expected a list of names")
    names = tuple(dict.fromkeys(banks))
    if len(names) > MOST_READS:
        raise InvalidInput(f"{len(names)} banks to read; a request reads {MOST_READS} at most")
    return tuple(check_bank_name(name) for name in names)
