"""The domain of every argument that a caller may send, stated once.

Each domain is a function that returns the value as raymem uses it or raises InvalidInput, and a type for
signatures and for the gateway's JSON which carries that function. The client applies those of a verb to its arguments.
"""

from __future__ import annotations

import math
import operator
import os
import re
import typing
import unicodedata
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from raymem.errors import InvalidInput, InvalidName, InvalidSpec, InvalidTrace, NonFinite, TooLarge

if typing.TYPE_CHECKING:
    from raymem.types import Fingerprint

# what JSON carries everywhere without losing a digit; far inside the 64 bits of a journal's columns
COUNT_END = 2**53
# the year 10000
TIME_END = 253_402_300_800
LABEL_MAX = 256
MOST_PARTITIONS = 256
MOST_NEIGHBOURS = 4096
MOST_ATTENDED = 2**16
MOST_ASKED = 2**12
MOST_SOURCES = 1000

# what a message may carry, too
MOST_BYTES = 2**30

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
# a composed character has at most four
_DECOMPOSED = 4
_SURROGATE = re.compile(r"[\ud800-\udfff]")
# controls, halves of a pair, line and paragraph separators, and what turns the order of the text around it: a name must
# not look like another
_UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_LONGEST = 80

C = TypeVar("C")
Check = Callable[[Any], Any]


def shorten(text: str, limit: int = _LONGEST) -> str:
    """`text`, or its head and its length when it is longer than `limit`."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


def shown(value: object) -> str:
    """A value of any kind as an error names it: short, printable, with its type where that may be what is wrong."""
    if value is None or type(value) is bool:
        return str(value)
    if isinstance(value, str):
        return repr(shorten(value))
    kind = _kind(value)
    if isinstance(value, float | datetime):
        return f"{value} ({kind})"
    if isinstance(value, int):
        return str(value) if abs(value) < 2**128 else "a number of more than 38 digits"
    return kind


def label(value: object) -> str:
    """A stream, run or tag name in NFC: 1 to 256 characters of any script, without controls.

    Joiners and spaces of every kind are allowed; line separators, halves of a surrogate pair and what overrides the
    direction of text are not.

    Raises:
        InvalidName: naming the value (shortened) and the rule.
    """
    # of a subclass, an enumeration's member for one, what it is made of
    text = str.__str__(value) if isinstance(value, str) else ""
    if len(text) <= LABEL_MAX * _DECOMPOSED and not _UNFIT.search(text):
        name = text if text.isascii() else unicodedata.normalize("NFC", text)
        if 0 < len(name) <= LABEL_MAX:
            return name
    raise InvalidName(
        f"{shown(value)}; give 1 to {LABEL_MAX} characters without controls, line breaks and marks that turn the "
        "direction of text"
    )


def composed(text: str) -> str:
    """A label as two of the same text are compared; rows written by earlier versions may have another form."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def bank_name(value: object) -> str:
    """`namespace/name`.

    Raises:
        InvalidName: naming the value (shortened) and the rule.
    """
    text = _text(value, InvalidName)
    parts = text.split("/")
    if len(parts) != 2 or not all(map(_PART.fullmatch, parts)):
        raise InvalidName(
            f"bank name {shown(text)} must be namespace/name, each part 1 to 63 letters, digits, - or _, "
            "starting with a letter or digit; for example research/alice"
        )
    return text


def whole(value: object, first: int, last: int, error: type[InvalidInput] = InvalidInput) -> int:
    """A whole number from `first` to `last`; numpy's too, no bool, no float, no text.

    Raises:
        InvalidInput: or `error`, naming the value and the range.
    """
    try:
        if not (isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")):
            number = int(operator.index(value))  # type: ignore[arg-type]
            if first <= number <= last:
                return number
    except (TypeError, ValueError, RuntimeError):
        pass
    raise error(f"{shown(value)}; give a whole number from {first} to {last}")


def count(value: object) -> int:
    """A number of rows, or one of them: from 0 to 2**53.

    Raises:
        InvalidInput: naming the value and the range.
    """
    return whole(value, 0, COUNT_END)


def moment(value: object, error: type[InvalidInput] = InvalidInput) -> float:
    """A time as seconds since the epoch, before the year 10000; a datetime must name its zone.

    Raises:
        InvalidInput: or `error`, naming the value and the range.
    """
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise error(f"{shown(value)}, which names no time zone; give datetime.now(UTC) or seconds")
        value = value.timestamp()
    if type(value) is not bool and isinstance(value, Real):
        try:
            seconds = float(value)
        except (OverflowError, ValueError):
            seconds = math.inf
        if 0 <= seconds < TIME_END:
            return seconds
    raise error(f"{shown(value)}; give seconds since the epoch, from 0 to before {TIME_END} (year 10000)")


def lifetime(value: object) -> float | None:
    """How many seconds rows may live; None is for good.

    Raises:
        InvalidInput: naming the value and the range.
    """
    if value is None:
        return None
    try:
        if not isinstance(value, datetime) and (seconds := moment(value)) > 0:
            return seconds
    except InvalidInput:
        pass
    raise InvalidInput(f"{shown(value)}; rows may live for a number of seconds over 0, or for good: None")


def as_of(value: object) -> str | float | None:
    """A tag, a time in ISO 8601, seconds since the epoch or a datetime with its zone; None is now.

    Raises:
        InvalidName, InvalidInput: naming the value.
    """
    if value is None:
        return None
    return label(value) if isinstance(value, str) else moment(value)


def place(value: object) -> str | int:
    """A tag or a position.

    Raises:
        InvalidName, InvalidInput: naming the value.
    """
    return label(value) if isinstance(value, str) else count(value)


def flag(value: object) -> bool:
    """True or False, and nothing that only counts as such.

    Raises:
        InvalidInput: naming the value.
    """
    if isinstance(value, bool) or (type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")):
        return bool(value)
    raise InvalidInput(f"{shown(value)}; give True or False")


def prefix(value: object) -> str:
    """What names of banks begin with, "" for all.

    Raises:
        InvalidInput: naming the value.
    """
    text = _text(value, InvalidInput)
    if len(text) > LABEL_MAX or _UNFIT.search(text):
        raise InvalidInput(f"{shown(text)}; give the beginning of a bank's name, at most {LABEL_MAX} characters")
    return text


def path(value: object) -> Path:
    """The path of a file.

    Raises:
        InvalidInput: naming the value.
    """
    try:
        text = os.fspath(value)  # type: ignore[call-overload]
        if isinstance(text, str) and text and b"\0" not in os.fsencode(text):
            return Path(text)
    except (TypeError, UnicodeEncodeError):
        pass
    raise InvalidInput(f"{shown(value)}; give the path of a file, as text or a Path")


def target(value: object) -> Path:
    """The path of a file to write, in a folder that is there.

    Raises:
        InvalidInput: naming the value.
    """
    file = path(value)
    try:
        if file.parent.is_dir() and not file.is_dir():
            return file
    except OSError as error:
        raise InvalidInput(
            f"{shown(str(file))}: {error.strerror}; give the path of a file in a folder that is there"
        ) from error
    raise InvalidInput(f"{shown(str(file))}; give the path of a file in a folder that is there")


def bank_names(value: object) -> list[str]:
    """Names of different banks, at least one.

    Raises:
        InvalidInput, InvalidName: naming the value.
    """
    if not isinstance(value, list | tuple) or not 0 < len(value) <= MOST_SOURCES:
        many = f" of {len(value)}" if isinstance(value, list | tuple) else ""
        raise InvalidInput(f"{shown(value)}{many}; give a list of 1 to {MOST_SOURCES} bank names")
    names = [bank_name(name) for name in value]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidInput(f"a list that has {twice!r} twice; give different banks")
    return names


def layers(value: object) -> tuple[int, ...]:
    """Numbers of a model's layers, counted from 1.

    Raises:
        InvalidInput: naming the value.
    """
    if not isinstance(value, list | tuple) or not 0 < len(value) <= MOST_SOURCES:
        raise InvalidInput(f"{shown(value)}; give a list of a model's layers, counted from 1")
    return tuple(whole(layer, 1, COUNT_END) for layer in value)


def text(value: object, error: type[InvalidInput] = InvalidInput) -> str:
    """Text of any kind that can be sent.

    Raises:
        InvalidInput: or `error`, naming the value.
    """
    found = _text(value, error)
    if _SURROGATE.search(found):
        raise error(f"{shown(found)}; give text without lone surrogates")
    return found


def json_value(value: object, depth: int = 8) -> Any:
    """Plain data as JSON has it, numbers finite and integers within 2**53, nested at most `depth` deep.

    Raises:
        InvalidSpec: naming the value.
    """
    if value is None or type(value) is bool:
        return value
    if isinstance(value, str):
        return text(value, InvalidSpec)
    if depth and isinstance(value, dict):
        return {json_value(_text(key, InvalidSpec)): json_value(each, depth - 1) for key, each in value.items()}
    if depth and isinstance(value, list | tuple):
        return [json_value(each, depth - 1) for each in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, int):
        return whole(value, -COUNT_END, COUNT_END, InvalidSpec)
    raise InvalidSpec(f"{shown(value)}; give what JSON has: text, finite numbers, true, false, lists, maps of text")


def instance(kind: type[Any], error: type[InvalidInput] = InvalidInput) -> Check:
    """The check that a value is of one of raymem's own classes."""

    def check(value: object) -> Any:
        if not isinstance(value, kind):
            raise error(f"{shown(value)}; give a raymem.{kind.__name__}")
        return value

    return check


def _from_one(last: int) -> BeforeValidator:
    return BeforeValidator(partial(whole, first=1, last=last))


def _text(value: object, error: type[InvalidInput]) -> str:
    if not isinstance(value, str):
        raise error(f"{shown(value)}; give text")
    # of a subclass, an enumeration's member for one, what it is made of
    return str.__str__(value)


def _kind(value: object) -> str:
    of = type(value)
    name = of.__name__ if of.__module__ == "builtins" else f"{of.__module__}.{of.__name__}"
    return f"an {name}" if name[0] in "aeiouAEIOU" else f"a {name}"


# for signatures, and where JSON has the same: the gateway's schemas
Label = Annotated[str, BeforeValidator(label), Field(min_length=1, max_length=LABEL_MAX)]
BankName = Annotated[str, BeforeValidator(bank_name), Field(max_length=127)]
BankNames = Annotated[Sequence[str], BeforeValidator(bank_names), Field(min_length=1, max_length=MOST_SOURCES)]
Count = Annotated[int, BeforeValidator(count), Field(ge=0, le=COUNT_END)]
Neighbours = Annotated[int, _from_one(MOST_NEIGHBOURS), Field(ge=1, le=MOST_NEIGHBOURS)]
AttendedCount = Annotated[int, _from_one(MOST_ATTENDED), Field(ge=1, le=MOST_ATTENDED)]
Partitions = Annotated[int, _from_one(MOST_PARTITIONS), Field(ge=1, le=MOST_PARTITIONS)]
Flag = Annotated[bool, BeforeValidator(flag)]
Moment = Annotated[float, BeforeValidator(moment), Field(ge=0, lt=TIME_END)]
Lifetime = Annotated[float | None, BeforeValidator(lifetime)]
AsOf = Annotated[str | float | None, BeforeValidator(as_of)]
Place = Annotated[str | int, BeforeValidator(place)]
# for signatures alone
Prefix = Annotated[str, BeforeValidator(prefix)]
Layers = Annotated[tuple[int, ...], BeforeValidator(layers)]
TargetPath = Annotated[str | Path, BeforeValidator(target)]
FilePath = Annotated[str | Path, BeforeValidator(path)]
AnyMoment = Annotated[float | datetime, BeforeValidator(moment)]
AnyAsOf = Annotated[str | float | datetime | None, BeforeValidator(as_of)]


def named(name: str, check: Callable[..., Any], value: object, *more: Any) -> Any:
    """A value that was checked; an error says which argument it was. `more` is for the check."""
    try:
        return check(value, *more)
    except InvalidInput as error:
        said = error.message if error.message.startswith("bank name") else f"{name} is {error.message}"
        raise type(error)(said, **error.details) from None


def numbers(what: str, given: object, dtype: torch.dtype) -> Tensor:
    """A tensor, an array or nested lists of numbers as a dense tensor on the CPU, without gradients.

    A tensor of floats keeps its dtype and its strides, and nothing is copied that is there already; arrays and lists
    are cast to `dtype`. Where that is int64, only whole numbers are taken, and all are cast.

    Raises:
        InvalidTrace: no numbers, ragged lists, or a tensor that is sparse, nested, quantised or on the meta device.
        TooLarge: over 1 GiB.
    """
    found = given if isinstance(given, Tensor) else _from_array(what, given, dtype)
    if found.layout != torch.strided or found.is_nested or found.is_quantized or found.is_meta:
        kind = "quantised" if found.is_quantized else f"{found.layout} on {found.device}"
        raise InvalidTrace(f"{what} are a tensor that is {kind}; give a dense one: .to_dense(), .dequantize()")
    if found.nbytes > MOST_BYTES:
        raise TooLarge(f"{what} have {found.nbytes:,} bytes; give at most {MOST_BYTES:,} at once", limit=MOST_BYTES)
    found = found.detach().as_subclass(Tensor).cpu().resolve_conj().resolve_neg()
    if dtype != torch.int64:
        return found
    if found.dtype == torch.bool or found.is_floating_point() or found.is_complex():
        raise InvalidTrace(f"{what} are {found.dtype}; give whole numbers, such as torch.int64")
    return found.to(torch.int64)


def check_hidden(hidden: Tensor, fingerprint: Fingerprint) -> None:
    """Check hidden states [T, L, D] against a fingerprint: shape, dtype, finiteness.

    Raises:
        InvalidTrace, NonFinite: with the offending value and what was expected.
    """
    layers, width = len(fingerprint.layers), fingerprint.width
    if hidden.dim() != 3 or hidden.shape[1:] != (layers, width):
        raise InvalidTrace(
            f"hidden states are {list(hidden.shape)}; this bank holds [rows, {layers} layers, width {width}] "
            f"of {fingerprint.model}"
        )
    if str(hidden.dtype) != f"torch.{fingerprint.dtype}":
        raise InvalidTrace(
            f"hidden states are {hidden.dtype}; this bank holds {fingerprint.dtype}: cast before writing"
        )
    # NaN goes through both ends; no mask as large as the tensor is made
    if hidden.numel() and not torch.stack(torch.aminmax(hidden)).isfinite().all():
        bad = int((~torch.isfinite(hidden)).flatten(1).any(1).nonzero()[0])
        raise NonFinite(f"row {bad} holds NaN or Inf; it was refused whole, nothing was written")


def _from_array(what: str, given: object, dtype: torch.dtype) -> Tensor:
    kinds, kept = ("iu", np.int64) if dtype == torch.int64 else ("fiu", np.float32)
    if kept is np.int64 and isinstance(given, list | tuple) and any(isinstance(number, bool) for number in given):
        raise InvalidTrace(f"{what} are a list with True or False in it; give whole numbers")
    if given is None or isinstance(given, str | bytes | dict | set | frozenset):
        raise InvalidTrace(f"{what} are {shown(given)}; give a tensor, an array or lists of numbers")
    try:
        # a range may claim any length
        if isinstance(given, Sequence) and len(given) > MOST_BYTES:
            raise TooLarge(
                f"{what} have {len(given)} rows; give at most {MOST_BYTES:,} bytes at once", limit=MOST_BYTES
            )
        array = np.asarray(given)
    except TooLarge:
        raise
    # what an object's own way of becoming an array raises, too
    except (ValueError, TypeError, OverflowError, RuntimeError, AttributeError, LookupError, MemoryError) as error:
        raise InvalidTrace(f"{what} can't be made an array: {str(error)[:200]}; give lists of equal lengths") from error
    if array.nbytes > MOST_BYTES:
        raise TooLarge(f"{what} have {array.nbytes:,} bytes; give at most {MOST_BYTES:,} at once", limit=MOST_BYTES)
    # an empty list is an array of floats; jax's bfloat16 is of no kind that numpy knows
    if array.dtype.kind not in kinds and array.size and array.dtype.name != "bfloat16":
        raise InvalidTrace(f"{what} are {shown(given)} of {array.dtype}; give a tensor, an array or lists of numbers")
    if array.dtype == np.uint64 and kept is np.int64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise InvalidTrace(f"{what} hold {array.max()}; give numbers of at most 63 bits")
    with np.errstate(over="ignore"):
        # too large for a float32 is infinite, which a bank refuses
        found = torch.from_numpy(np.array(array, dtype=kept, order="C"))
    # numpy's strides of nothing are none that torch takes
    return found.to(dtype) if found.numel() else torch.zeros(found.shape, dtype=dtype)
