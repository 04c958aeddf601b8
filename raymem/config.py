"""Settings: nested, typed, frozen; an unknown key is an error.

Read from a TOML file (`raymem.toml`, or `$RAYMEM_CONFIG`) and from environment variables, which win over the file:
`RAYMEM_GATEWAY__PORT` is `port` of the section `gateway`.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from raymem.errors import ConfigError
from raymem.kubernetes import is_service

PREFIX = "RAYMEM_"
# read elsewhere: where the file is, and where models are unpacked
_OTHER_VARIABLES = {"RAYMEM_CONFIG", "RAYMEM_CACHE", "RAYMEM_API_KEY", "RAYMEM_STORE"}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ColdSettings(_Section):
    """The durable store: when a commit is synced, and what happens after so many journal bytes or seconds.

    A bank's snapshot is due after `snapshot_bytes` or `snapshot_s`; its rows leave the log of its host for its own
    table after `settle_bytes` or `settle_s`, or when the log holds `log_bytes` of all banks.

    Owners look for expired rows every `expire_s` seconds; with `expire_scope` "run" a run goes from its first expired
    row on, as what follows was computed in its context. A table that the catalog doesn't name is deleted when nothing
    was written to it for `sweep_age_s`: less than the longest import, and a table may go while it is being made.
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


class HostSettings(_Section):
    """One process with banks: its threads, what a caller may have in flight, the bytes of one commit, its lease.

    Another process takes its banks over when it was silent for `lease_s` seconds. `past_bytes` bounds the banks kept as
    they were at earlier positions, for reads `as_of`. Banks that were not used for longest leave memory when those that
    are hot take more than `memory_bytes`, on a GPU `gpu_memory_bytes`.
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
    """Memory over HTTP. Loopback unless told otherwise; an empty `api_keys` leaves the door to loopback callers.

    A body has `max_body_bytes` at most, one in JSON `max_json_bytes`; all bodies that are held in memory at one time
    have `max_held_bytes`, those of one caller half of it or one body. A connection is dropped that keeps the gateway
    waiting for `wait_s` seconds: for the end of a request's head, or for bytes, sent or taken, at `min_rate` a second.
    When there are `max_connections`, the one that has kept the gateway waiting for longest makes room for the next.

    A client waits `retry_s` at most for a gateway that says that it has too much to do.
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
    api_keys: tuple[str, ...] = Field(default=(), repr=False)
    retry_s: float = Field(default=30.0, ge=0)
    model: str = "smollm2-135m"

    @field_validator("api_keys")
    @classmethod
    def _keys_are_keys(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
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


class Settings(_Section):
    """Everything that can be set."""

    cold: ColdSettings = ColdSettings()
    host: HostSettings = HostSettings()
    gateway: GatewaySettings = GatewaySettings()
    actors: ActorSettings = ActorSettings()

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
        data = _read_file(path, environ)
        for name, value in environ.items():
            known = name in _OTHER_VARIABLES or is_service(name, value)
            if name.startswith(PREFIX) and not known:
                _put(data, name, value)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(_explain(error, cls)) from error


def _read_file(path: str | Path | None, environ: Mapping[str, str]) -> dict[str, Any]:
    chosen = Path(path or environ.get("RAYMEM_CONFIG") or "raymem.toml")
    asked_for = path is not None or "RAYMEM_CONFIG" in environ
    if not chosen.exists() and not asked_for:
        return {}
    try:
        return tomllib.loads(chosen.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"can't read settings from {chosen}: {error}") from error


def _put(data: dict[str, Any], name: str, value: str) -> None:
    section, _, key = name.removeprefix(PREFIX).lower().partition("__")
    if not key:
        meant = next(
            (right for right in _spellings() if right.replace("__", "_") == name.upper()), f"{PREFIX}GATEWAY__PORT"
        )
        raise ConfigError(f"{name} is no setting; write {PREFIX}SECTION__KEY, for example {meant}")
    target = data.setdefault(section, {})
    target[key] = _keys(value) if key == "api_keys" else value


def _spellings() -> list[str]:
    sections = {name: field.annotation for name, field in Settings.model_fields.items()}
    return [
        f"{PREFIX}{section}__{key}".upper()
        for section, cls in sections.items()
        if isinstance(cls, type) and issubclass(cls, BaseModel)
        for key in cls.model_fields
    ]


def _keys(value: str) -> list[str]:
    # a variable that is set to nothing is how one takes the keys away
    return [key.strip() for key in value.split(",")] if value.strip() else []


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
