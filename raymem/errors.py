"""Everything raymem raises on purpose, in one tree.

::

    RaymemError
    ├── InvalidInput                what was sent can't be accepted; nothing was changed
    │   ├── InvalidName             a bank, stream, run or tag name
    │   ├── InvalidSpec             unknown kind, option or key function; impossible sizes
    │   ├── InvalidTrace            wrong shape, width or dtype
    │   │   └── NonFinite           NaN or Inf in a row
    │   ├── FingerprintMismatch     rows or queries of another model
    │   ├── UnsupportedModel        a language model whose states or logits raymem can't have
    │   └── TooLarge                over a size limit
    ├── ConfigError                 unknown or unusable setting
    │   └── StoreClosed             a handle that can't be used here: closed, forked, of another event loop
    ├── NotFound
    │   ├── BankNotFound
    │   ├── TagNotFound
    │   ├── CalibrationNotFound
    │   └── ModelNotFound
    ├── Conflict
    │   ├── BankExists
    │   ├── BankDetached            a write or read on a cold bank
    │   ├── SequenceConflict        the same (stream, run, seq) with other content
    │   └── NotOwner                another epoch owns the bank: this owner is fenced off
    ├── Unauthorized                no key, or one that doesn't open this bank
    ├── Unsupported                 this kind refuses the verb
    │   └── Partitioned             the verb needs one journal, and the bank is in partitions
    ├── Unavailable                 try again, or elsewhere
    │   ├── Overloaded              a bounded queue is full; `retry_after_s` says when
    │   ├── Moved                   the bank lives elsewhere; `to` says where
    │   ├── Reassigned              the stream lives in another partition, or is about to
    │   ├── BackendUnavailable      no Ray cluster, no gateway
    │   └── StorageError            the disk is full or the store failed; nothing was acknowledged
    ├── Corrupt                     a checksum, a length or a format did not hold
    ├── NotShared                   a node does not see the same cold store
    └── MissingExtra                an optional package is not installed
"""

from __future__ import annotations

from typing import Any, ClassVar


class RaymemError(Exception):
    """Base of all raymem errors: a sentence with the value and the fix, and machine-readable details."""

    code: ClassVar[str] = "raymem_error"
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.details)

    def to_wire(self) -> dict[str, Any]:
        """The error as plain data: code, message, details."""
        return {"code": self.code, "message": self.message, "details": self.details}

    @staticmethod
    def from_wire(data: dict[str, Any]) -> RaymemError:
        """Rebuild the error that `to_wire` wrote; an unknown code becomes a plain RaymemError."""
        cls = _by_code().get(str(data.get("code")), RaymemError)
        return cls(str(data.get("message", "unknown error")), **dict(data.get("details") or {}))


def _rebuild(cls: type[RaymemError], message: str, details: dict[str, Any]) -> RaymemError:
    return cls(message, **details)


def _by_code() -> dict[str, type[RaymemError]]:
    found: dict[str, type[RaymemError]] = {}
    todo: list[type[RaymemError]] = [RaymemError]
    while todo:
        cls = todo.pop()
        # Ray makes subclasses of its own on the fly, under the same code
        if "code" in vars(cls):
            found[cls.code] = cls
        todo.extend(cls.__subclasses__())
    return found


class InvalidInput(RaymemError, ValueError):
    """What was sent can't be accepted; nothing was changed."""

    code = "invalid_input"
    http_status = 422


class InvalidName(InvalidInput):
    """A bank, stream, run or tag name that is not allowed."""

    code = "invalid_name"


class InvalidSpec(InvalidInput):
    """An unknown kind, option or key function, or sizes that can't work."""

    code = "invalid_spec"


class InvalidTrace(InvalidInput):
    """Rows or queries of the wrong shape, width or dtype."""

    code = "invalid_trace"


class NonFinite(InvalidTrace):
    """NaN or Inf in a row."""

    code = "non_finite"


class FingerprintMismatch(InvalidInput):
    """Rows, queries or files made by another model, layer, tokenizer or calibration."""

    code = "fingerprint_mismatch"
    http_status = 409


class UnsupportedModel(InvalidInput):
    """A language model of a family whose states or logits raymem can't have."""

    code = "unsupported_model"


class TooLarge(InvalidInput):
    """Over a size limit."""

    code = "too_large"
    http_status = 413


class ConfigError(RaymemError, ValueError):
    """An unknown or unusable setting."""

    code = "config_error"


class StoreClosed(ConfigError):
    """A store's handle that can't be used: it is closed, its process ends, or this is a fork or another event loop."""

    code = "store_closed"


class NotFound(RaymemError, LookupError):
    """What was named does not exist."""

    code = "not_found"
    http_status = 404


class BankNotFound(NotFound):
    """No bank of that name in the catalog."""

    code = "bank_not_found"


class TagNotFound(NotFound):
    """The bank has no tag of that name."""

    code = "tag_not_found"


class CalibrationNotFound(NotFound):
    """The store has no calibration for this model and layers."""

    code = "calibration_not_found"


class ModelNotFound(NotFound):
    """No language model under that name or path."""

    code = "model_not_found"


class Conflict(RaymemError):
    """The request does not fit the present state."""

    code = "conflict"
    http_status = 409


class BankExists(Conflict):
    """A bank of that name is there already."""

    code = "bank_exists"


class BankDetached(Conflict):
    """The bank is cold: attach it first."""

    code = "bank_detached"


class SequenceConflict(Conflict):
    """The same (stream, run, seq) came with other content, or out of order."""

    code = "sequence_conflict"


class NotOwner(Conflict):
    """Another epoch owns the bank; this owner is fenced off for good."""

    code = "not_owner"


class Unauthorized(RaymemError):
    """No API key, or one that does not open this bank."""

    code = "unauthorized"
    http_status = 401


class Unsupported(RaymemError):
    """This kind of bank or this backend refuses the verb."""

    code = "unsupported"
    http_status = 409


class Partitioned(Unsupported):
    """The bank is in partitions, and what was asked needs one journal."""

    code = "partitioned"


class Unavailable(RaymemError):
    """Not now, or not here."""

    code = "unavailable"
    http_status = 503


class Overloaded(Unavailable):
    """A bounded queue is full; `details["retry_after_s"]` says when to come back."""

    code = "overloaded"
    http_status = 429

    @property
    def retry_after_s(self) -> float:
        """Seconds to wait before the next try."""
        return float(self.details.get("retry_after_s", 0.1))


class Moved(Unavailable):
    """The bank lives on another shard; `details["to"]` names it."""

    code = "moved"

    @property
    def to(self) -> str:
        """The shard that has the bank now."""
        return str(self.details.get("to", ""))


class Reassigned(Unavailable):
    """The stream's rows belong in another partition of the bank, or are just being handed over to it."""

    code = "reassigned"


class BackendUnavailable(Unavailable):
    """No Ray cluster or no gateway where one was expected."""

    code = "backend_unavailable"


class StorageError(Unavailable):
    """The disk is full or the cold store failed; nothing was acknowledged."""

    code = "storage_error"
    http_status = 507


class Corrupt(RaymemError):
    """A checksum, a length or a format did not hold."""

    code = "corrupt"
    http_status = 422


class NotShared(RaymemError):
    """A node does not see the same cold store as the others."""

    code = "not_shared"


class MissingExtra(RaymemError, ImportError):
    """An optional package is not installed."""

    code = "missing_extra"
    http_status = 503
