"""Settings: nested, typed, frozen; an unknown key is an error.

`Settings.load` reads a TOML file (`raymem.toml`, or `$RAYMEM_CONFIG`) and environment variables, which win over the
file: `RAYMEM_GATEWAY__PORT` is `port` of the section `gateway`. `Settings(…)` reads neither.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from raymem.errors import ConfigError

PREFIX = "RAYMEM_"
# read elsewhere: the settings file, the folder of unpacked models, the command line's key and store
_OTHER_VARIABLES = {"RAYMEM_CONFIG", "RAYMEM_CACHE", "RAYMEM_API_KEY", "RAYMEM_STORE"}
# Kubernetes puts variables into every container for each Service: one named raymem gives
# RAYMEM_PORT=tcp://10.0.0.1:8765, RAYMEM_SERVICE_HOST and more. name and value together tell them from a misspelt
# setting. no Service's name ends with a hyphen, so RAYMEM_GATEWAY__PORT is never one of these
_SERVICE = r"RAYMEM(_+[A-Z0-9]+)*"
_PROTOCOL = r"(TCP|UDP|SCTP)"
_SERVICE_URL = re.compile(rf"{_SERVICE}_PORT(_\d+_{_PROTOCOL})?")
_SERVICE_ADDRESS = re.compile(rf"{_SERVICE}_(SERVICE_HOST|PORT_\d+_{_PROTOCOL}_ADDR)")
_SERVICE_PORT = re.compile(rf"{_SERVICE}_(SERVICE_PORT(_[A-Z0-9_]+)?|PORT_\d+_{_PROTOCOL}_PORT)")
_SERVICE_PROTOCOL = re.compile(rf"{_SERVICE}_PORT_\d+_{_PROTOCOL}_PROTO")
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_URL = re.compile(r"(tcp|udp|sctp)://(\[[0-9a-fA-F:.]+\]|[0-9.]+):\d{1,5}")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ColdSettings(_Section):
    """The durable store: whether commits are synced, and after how many journal bytes or seconds work is due.

    A bank's snapshot is due after `snapshot_bytes` or `snapshot_s`. Its rows are flushed from its host's log to its own
    table after `settle_bytes` or `settle_s`, or when the log holds `log_bytes` of all banks.

    Owners look for expired rows every `expire_s` seconds. With `expire_scope` "run", all rows of a run from its first
    expired one on are erased, as they were computed with it in context. The sweeper deletes a table that the catalog
    doesn't name when nothing was written to it for `sweep_age_s`; this must be longer than the longest import takes.

    Keys and values beside a bank's journal, which models attend to, take `attended_bytes` at most.
    """

    sync: Literal["disk", "none"] | None = None
    snapshot_bytes: int = Field(default=64 * 2**20, ge=2**10)
    expire_s: float = Field(default=600.0, gt=0)
    expire_scope: Literal["rows", "run"] = "rows"
    sweep_age_s: float = Field(default=3600.0, ge=0)
    snapshot_s: float = Field(default=600.0, gt=0)
    settle_bytes: int = Field(default=4 * 2**20, ge=1)
    settle_s: float = Field(default=60.0, gt=0)
    log_bytes: int = Field(default=64 * 2**20, ge=0)
    attended_bytes: int = Field(default=2**30, ge=0)


class HostSettings(_Section):
    """One process with banks: its threads, what a caller may have in flight, the bytes of one commit, its lease.

    Another process takes its banks over after `lease_s` seconds of silence. `past_bytes` bounds the earlier states of
    banks that are kept for reads `as_of`. When hot banks take more than `memory_bytes` (on a GPU `gpu_memory_bytes`),
    the least recently used ones leave memory.
    """

    threads: int = Field(default=4, ge=1, le=256)
    caller_requests: int = Field(default=256, ge=1)
    caller_bytes: int = Field(default=256 * 2**20, ge=1024)
    group_bytes: int = Field(default=32 * 2**20, ge=1024)
    lease_s: float = Field(default=9.0, ge=0.1, le=86400)
    past_bytes: int = Field(default=256 * 2**20, ge=0)
    memory_bytes: int | None = Field(default=None, ge=2**10)
    gpu_memory_bytes: int | None = Field(default=None, ge=2**10)
    partial_s: float = Field(default=2.0, gt=0)


class GatewaySettings(_Section):
    """Memory over HTTP. Loopback unless told otherwise; without `api_keys` only loopback callers are answered.

    A body has `max_body_bytes` at most, one in JSON `max_json_bytes`. All bodies in memory at one time have
    `max_held_bytes` at most; those of one caller half of that, or one body. The gateway drops a connection that keeps
    it waiting for `wait_s` seconds: for the end of a head, or for bytes, sent or taken, at `min_rate` a second.
    At `max_connections`, the connection that has kept the gateway waiting for longest is dropped for the next one.

    A client repeats a request that an overloaded gateway refused for `retry_s` at most.
    """

    # what pydantic says of a bad value must not show a key
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    host: str = "127.0.0.1"
    port: int = Field(default=8765, ge=0, le=65535)
    max_body_bytes: int = Field(default=512 * 2**20, ge=1024)
    max_json_bytes: int = Field(default=8 * 2**20, ge=1024)
    max_held_bytes: int = Field(default=2**30, ge=1024)
    max_connections: int = Field(default=1024, ge=8)
    wait_s: float = Field(default=10.0, gt=0)
    min_rate: int = Field(default=4096, ge=1)
    # in a variable they are comma-separated, not JSON
    api_keys: Annotated[tuple[str, ...], NoDecode] = Field(default=(), repr=False)
    retry_s: float = Field(default=30.0, ge=0)
    model: str = "smollm2-135m"

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        for number, key in enumerate(keys, 1):
            check_key(key, f"key {number} of {len(keys)}")
        return keys


def check_key(key: str, what: str) -> str:
    """Return an API key if it can be one; the error never shows it.

    Raises:
        ConfigError: it is empty, begins or ends with a blank, or has characters that can't be printed.
    """
    if not key:
        raise ConfigError(f"{what} is empty: remove the comma too much, or give the key a value")
    if key != key.strip():
        raise ConfigError(f"{what} begins or ends with a blank: remove it")
    if not key.isprintable():
        raise ConfigError(f"{what} has a character that can't be printed: use letters, digits and signs")
    return key


class ActorSettings(_Section):
    """Shard actors on a Ray cluster: how many a node gets, and what each asks of Ray."""

    shards_per_node: int = Field(default=1, ge=1, le=64)
    cpus_per_shard: float = Field(default=0.1, ge=0)
    gpus_per_shard: float = Field(default=0.0, ge=0)
    retry_s: float = Field(default=60.0, gt=0)


class Settings(BaseSettings):
    """Everything that can be set."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        case_sensitive=True,
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        env_nested_max_split=1,
    )

    cold: ColdSettings = ColdSettings()
    host: HostSettings = HostSettings()
    gateway: GatewaySettings = GatewaySettings()
    actors: ActorSettings = ActorSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read nothing for a `Settings(…)` that a program makes: `load` names its sources itself."""
        return (init_settings,)

    @classmethod
    def load(cls, path: str | Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
        """Settings from a TOML file and the environment.

        Args:
            path: the file; by default `$RAYMEM_CONFIG`, else `raymem.toml` in the working directory if there is one.
            environ: variables to read; the process's own by default.

        Raises:
            ConfigError: an unreadable file, an unknown key or a value that does not fit, naming it.
        """
        environ = os.environ if environ is None else environ
        chosen = Path(path or environ.get("RAYMEM_CONFIG") or "raymem.toml")
        try:
            # read here, as the library's own source skips pipes and folders
            wanted = path is not None or "RAYMEM_CONFIG" in environ or chosen.exists()
            data = tomllib.loads(chosen.read_text()) if wanted else {}
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"can't read settings from {chosen}: {error}") from error
        for section, values in _Environment(cls, environ)().items():
            # what is no section in the file is refused with the rest
            if isinstance(data.setdefault(section, {}), dict):
                data[section] |= values
        try:
            return cls(**data)
        except ValidationError as error:
            raise ConfigError(_explain(error, cls)) from error


class _Environment(EnvSettingsSource):
    """Variables that begin with `RAYMEM_`; one that names no setting is an error.

    Raises:
        ConfigError: a variable without a section and a key, with the spelling that was probably meant.
    """

    def __init__(self, cls: type[Settings], environ: Mapping[str, str]) -> None:
        super().__init__(cls)
        ours = {
            name.removeprefix(PREFIX).lower(): value
            for name, value in environ.items()
            if name.startswith(PREFIX) and name not in _OTHER_VARIABLES and not _is_service(name, value)
        }
        for name in ours:
            if not name.partition("__")[2]:
                right = {f"{section}_{key}": f"{section}__{key}" for section, keys in cls() for key, _ in keys}
                raise ConfigError(
                    f"{PREFIX}{name.upper()} is no setting; write {PREFIX}SECTION__KEY, for example "
                    f"{PREFIX}{right.get(name, 'gateway__port').upper()}"
                )
        self.env_vars = {f"{PREFIX}{name}": value for name, value in ours.items()}
        self._unknown = {name.partition("__")[0] for name in ours} - cls.model_fields.keys()

    def __call__(self) -> dict[str, Any]:
        found = super().__call__() | {section: {} for section in self._unknown}
        keys = found.get("gateway", {}).get("api_keys")
        if isinstance(keys, str):
            # an empty variable removes the keys that the file has
            found["gateway"]["api_keys"] = [key.strip() for key in keys.split(",")] if keys.strip() else []
        return found


def _is_service(name: str, value: str) -> bool:
    """Whether Kubernetes made a variable from a Service."""

    def is_address() -> bool:
        try:
            return bool(ip_address(value))
        except ValueError:
            return False

    # a Service may be called raymem-port-80-tcp: a name can be of two kinds, a value of one
    return bool(
        (_SERVICE_URL.fullmatch(name) and _URL.fullmatch(value))
        or (_SERVICE_ADDRESS.fullmatch(name) and is_address())
        or (_SERVICE_PORT.fullmatch(name) and _PORT.fullmatch(value))
        or (_SERVICE_PROTOCOL.fullmatch(name) and value in ("tcp", "udp", "sctp"))
    )


def _explain(error: ValidationError, cls: type[BaseModel]) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        # a secret must not travel in an error text
        shown = "" if "api_keys" in where else f"={first['input']!r}"
        return f"setting {where}{shown}: {first['msg']}"
    model: Any = cls
    for part in first["loc"][:-1]:
        model = model.model_fields[str(part)].annotation
    return f"unknown setting {where}; there is {', '.join(model.model_fields)}"
