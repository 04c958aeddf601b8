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
# rows that a request attends to unless it says how many
ROWS = 512
# a longer wish is a mistake: no model here has that much context to give away
MOST_ROWS = 2**20

Globs = tuple[Annotated[str, Field(min_length=1, max_length=200)], ...]


class ConnectorConfig(BaseModel):
    """The connector's settings, as they stand in vLLM's `kv_connector_extra_config`.

    `store` is what `raymem.connect` takes, `cold` its keyword for a Ray cluster. `queue_bytes` bounds the rows that
    wait to be written, `batch_bytes` one batch of a bank; a batch waits `linger_s` for more rows. `retry_s` is how long
    one write is tried again, `flush_s` how long a shutdown waits. `write_banks`, `read_banks` and `attend_banks` are
    the banks that requests may touch, as globs like `research/*`: none unless they are named, because requests may come
    from anyone who reaches the server. `rows_bytes` bounds the attended rows that each worker keeps, `follow_s` is how
    long after an erasure its rows may still be attended, `attend_floor` the relevance from which on a bank is attended.
    With `attach_on_use` a bank that requests may read or attend is attached when one over HTTP first does, while the
    attached banks take less than `attached_bytes`, and callers may attach and detach it.
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
    attend_banks: Globs = ()
    rows_bytes: int = Field(default=2 * 2**30, ge=1)
    follow_s: float = Field(default=0.5, gt=0)
    attend_floor: float = Field(default=0.4, ge=0, le=1)
    attach_on_use: bool = False
    attached_bytes: int = Field(default=4 * 2**30, ge=1)

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

    def check_attends(self, banks: Iterable[str]) -> None:
        """Let a request attend to banks.

        Raises:
            Unauthorized: no glob of `attend_banks` names one of them.
        """
        for bank in banks:
            _check_allowed(bank, "attend_banks", self.attend_banks)

    def check_attach(self, bank: str) -> None:
        """Let a caller attach or detach a bank.

        Raises:
            Unauthorized: `attach_on_use` is false, or requests may neither read nor attend the bank.
        """
        if not self.attach_on_use:
            raise Unauthorized(
                f"bank {bank!r} can't be attached or detached here, as attach_on_use is false: set it in "
                "kv_connector_extra_config, or engine_args(…, attach_on_use=True)"
            )
        if not _names(self.attend_banks, bank):
            _check_allowed(bank, "read_banks", self.read_banks)

    def may_read(self, bank: str) -> bool:
        """Whether `check_reads` lets a bank pass."""
        return _names(self.read_banks, bank)

    def may_attend(self, bank: str) -> bool:
        """Whether `check_attends` lets a bank pass."""
        return _names(self.attend_banks, bank)

    def may_touch(self, bank: str) -> bool:
        """Whether callers may know that there is such a bank."""
        return _names((*self.write_banks, *self.read_banks, *self.attend_banks), bank)


def _names(globs: Globs, bank: str) -> bool:
    return any(fnmatchcase(bank, glob) for glob in globs)


def _check_allowed(bank: str, setting: str, globs: Globs) -> None:
    if not _names(globs, bank):
        raise Unauthorized(
            f"bank {bank!r} is not among this engine's {setting}, {list(globs)}, and requests may touch no other: "
            f"name it there, in kv_connector_extra_config or engine_args(…, {setting}=[…])"
        )


class Target(NamedTuple):
    """Where a request's rows go."""

    bank: str
    stream: str


class Attending(NamedTuple):
    """The banks that a request attends to, and how: see `raymem_params`."""

    banks: tuple[str, ...]
    rows: int = ROWS
    refresh: int = 0
    required: bool = False


def engine_args(store: str, layers: Sequence[int] = (26,), *, stream: bool = True, **settings: Any) -> dict[str, Any]:
    """Everything that `vllm.LLM(**...)` or `AsyncEngineArgs(**...)` needs to use banks.

    Requests may touch every bank, as suits a program that makes its requests itself: name `write_banks`, `read_banks`
    and `attend_banks` where they come from others.

    Args:
        store: what `raymem.connect` takes: a folder, "ray", or a gateway's URL.
        layers: 1-based decoder outputs to stream, those of the banks' fingerprint.
        stream: whether hidden states are extracted, which writing and mixing need. Without, requests can attend to
            banks, the speculative slot stays free, and the engine compiles.
        settings: further fields of `ConnectorConfig`.

    Raises:
        ConfigError: an unknown setting, or layers that vLLM would reorder.
    """
    chosen = [int(layer) for layer in layers]
    if not chosen or min(chosen) < 1 or chosen != sorted(set(chosen)):
        raise ConfigError(
            f"layers {list(layers)!r} must be distinct, ascending and start at 1 or above: vLLM sorts them"
        )
    every = ("*",)
    own = {"store": store, "write_banks": every, "read_banks": every, "attend_banks": every, "attach_on_use": True}
    config = ConnectorConfig.parse({**own, **settings})
    args: dict[str, Any] = {
        "kv_transfer_config": {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": CONNECTOR_MODULE,
            # a consumer frees blocks late, and lets missing embeddings pass. rows come in within a step
            "kv_role": "kv_producer",
            "kv_connector_extra_config": config.model_dump(mode="json", exclude_none=True),
        },
        "worker_extension_cls": READER,
    }
    if stream:
        args["speculative_config"] = {
            "method": METHOD,
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": chosen}},
        }
        args["enforce_eager"] = True
    return args


def raymem_params(
    bank: str | None = None,
    stream: str | None = None,
    read: Sequence[str] = (),
    *,
    attend: Sequence[str] = (),
    rows: int = ROWS,
    refresh: int = 0,
    required: bool = False,
) -> dict[str, Any]:
    """The `extra_args` of a request's `SamplingParams`: which bank its states go to, which banks it reads.

    Everything stands in `kv_transfer_params`, which vLLM's HTTP routes pass on too. The prompt stays as it is: the
    engine puts the rows before it.

    Args:
        bank: the bank that the request's hidden states stream into; none when None.
        stream: the line of thought they belong to; the bank's name when None.
        read: banks, attached to the engine, that are mixed into the request's logits; 8 at most.
        attend: banks whose rows the engine keeps, and that the request's attention sees; 8 at most.
        rows: how many rows it sees, of all banks together.
        refresh: after how many generated tokens the rows are chosen anew; 0 for never.
        required: end the request at once, rather than serve it without memory, where a bank can't be attended.

    Raises:
        InvalidName: a bank or stream name that is not allowed.
        InvalidInput: too many banks, or numbers out of range.
    """
    asked: dict[str, Any] = {}
    if bank is not None:
        label = bank if stream is None else stream
        asked |= {"bank": check_bank_name(bank), "stream": check_label("stream", label)}
    if read:
        asked["read"] = list(_distinct(read))
    if attend:
        wish = {"banks": list(attend), "rows": rows, "refresh": refresh, "required": required}
        found = _attending(wish)
        asked["attend"] = {**found._asdict(), "banks": list(found.banks)}
    return {"kv_transfer_params": {"raymem": asked}} if asked else {}


def write_target(kv_transfer_params: Any) -> Target | None:
    """Read a request's write target; None for a request that did not opt in.

    Raises:
        InvalidInput: the request asked for raymem in a way that can't be followed.
    """
    asked = _asked(kv_transfer_params)
    bank, stream = asked.get("bank"), asked.get("stream", asked.get("bank"))
    if bank is None and stream is None:
        return None
    if not isinstance(bank, str) or not isinstance(stream, str):
        raise InvalidInput(f'{_WHERE} is {reprlib.repr(asked)}; expected {{"bank": NAME, "stream": NAME}}')
    return Target(check_bank_name(bank), check_label("stream", stream))


def banks_to_read(extra_args: Any) -> tuple[str, ...]:
    """Name the banks that a request's `extra_args` ask to mix in, each once; empty when it asks for none.

    Raises:
        InvalidInput: the request asked in a way that can't be followed, or for too many banks.
    """
    given = extra_args.get("kv_transfer_params") if isinstance(extra_args, Mapping) else None
    return _distinct(_asked(given).get("read", ()))


def banks_to_attend(kv_transfer_params: Any) -> Attending | None:
    """Read what a request attends to; None for a request that attends to nothing.

    Raises:
        InvalidInput: the request asked in a way that can't be followed.
    """
    wish = _asked(kv_transfer_params).get("attend")
    return None if wish is None else _attending(wish)


_WHERE = 'kv_transfer_params["raymem"]'
# the last two are for orders.py
_KEYS = {"bank", "stream", "read", "attend", "order", "signature"}


def _asked(kv_transfer_params: Any) -> Mapping[str, Any]:
    """What a request asks of raymem; other connectors' parameters are left alone."""
    asked = kv_transfer_params.get("raymem") if isinstance(kv_transfer_params, Mapping) else None
    if asked is None:
        return {}
    if not isinstance(asked, Mapping) or set(asked) - _KEYS:
        known = '{"bank": NAME, "stream": NAME, "read": [BANK, …], "attend": {"banks": [BANK, …], "rows": N}}'
        raise InvalidInput(f"{_WHERE} is {reprlib.repr(asked)}; expected {known} or parts of it")
    return asked


def _attending(wish: Any) -> Attending:
    if not isinstance(wish, Mapping) or set(wish) - set(Attending._fields) or "banks" not in wish:
        known = '{"banks": [BANK, …], "rows": N, "refresh": TOKENS, "required": true}'
        raise InvalidInput(f'{_WHERE}["attend"] is {reprlib.repr(wish)}; expected {known}')
    found = Attending(**{**wish, "banks": _distinct(wish["banks"])})
    if not found.banks:
        raise InvalidInput(f'{_WHERE}["attend"]["banks"] is empty; name a bank, or leave attend out')
    for name, least, value in (("rows", 1, found.rows), ("refresh", 0, found.refresh)):
        if type(value) is not int or not least <= value <= MOST_ROWS:
            allowed = f"a whole number from {least} to {MOST_ROWS}"
            raise InvalidInput(f'{_WHERE}["attend"]["{name}"] is {reprlib.repr(value)}; expected {allowed}')
    if type(found.required) is not bool:
        raise InvalidInput(f'{_WHERE}["attend"]["required"] is {reprlib.repr(found.required)}; expected true or false')
    return found


def _distinct(banks: Any) -> tuple[str, ...]:
    if not isinstance(banks, list | tuple) or not all(isinstance(name, str) for name in banks):
        raise InvalidInput(f"banks to read are {reprlib.repr(banks)}; expected a list of names")
    names = tuple(dict.fromkeys(banks))
    if len(names) > MOST_READS:
        raise InvalidInput(f"{len(names)} banks to read; a request reads {MOST_READS} at most")
    return tuple(check_bank_name(name) for name in names)
