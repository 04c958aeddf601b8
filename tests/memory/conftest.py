"""The kinds under test, in the variants worth it, and rows to feed them. A new kind joins by being in `kinds()`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.functional import normalize

from raymem.memory import build, kinds
from raymem.memory.base import Dims, EncodedRows, Memory

# one width for both, as in a bank: vectors live in the space of the output embedding
KEY = VALUE = 24

# beside each kind's defaults: other storage, other forms of learning, other values
VARIANTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "compressive-conv": ("compressive", {"compressor": "conv", "key_dims": 15}, 0),
    "compressive-dilated": ("compressive", {"compressor": "dilated_conv", "block": 8, "ratio": 2}, 0),
    "compressive-max-bfloat16": ("compressive", {"compressor": "max", "ratio": 3, "key_dtype": "bfloat16"}, 0),
    "compressive-mean-vectors": ("compressive", {"compressor": "mean", "strength": 30.0}, VALUE),
    "compressive-most-used-int8": ("compressive", {"compressor": "most_used", "block": 12, "key_dtype": "int8"}, 0),
    "dct-keep-mean": ("dct", {"policy": "keep", "compressor": "mean"}, 0),
    "dct-learned": ("dct", {"policy": "learned", "keep_rate": 0.5, "key_dtype": "int8", "key_dims": 15}, 0),
    "dct-lru": ("dct", {"eviction": "lru", "block": 8, "compressor": "mean", "fine": 30, "coarse": 40}, 0),
    "dct-surprise": ("dct", {"policy": "surprise", "compressor": "mean", "threshold": 0.9}, 0),
    "dct-surprise-vectors": ("dct", {"policy": "surprise", "threshold": 4.9, "log": 8, "strength": 30.0}, VALUE),
    "dnc-int8-projected": ("dnc", {"key_dtype": "int8", "key_dims": 15}, 0),
    "dnc-im-int8": ("dnc", {"eviction": "im", "key_dtype": "int8", "key_dims": 15}, 0),
    "dnc-vectors": ("dnc", {"slots": 37}, VALUE),
    "larimar-filter": ("larimar", {"addressing": "gaussian_filter", "memory_rows": 31, "filter_width": 0.1}, 0),
    "larimar-float32": ("larimar", {"cross_dtype": "float32", "key_dims": 15}, 0),
    "larimar-vectors": ("larimar", {"ridge": 0.1}, VALUE),
    "lemn-fifo-vectors": ("lemn", {"policy": "fifo", "strength": 30.0}, VALUE),
    "lemn-im-int8": ("lemn", {"policy": "im", "key_dtype": "int8", "key_dims": 15}, 0),
    "ntm-bfloat16": ("ntm", {"key_dtype": "bfloat16"}, 0),
    "ntm-vectors": ("ntm", {"strength": 30.0}, VALUE),
    "spalm-float32": ("spalm", {"key_dtype": "float32"}, 0),
    "spalm-int8-projected": ("spalm", {"key_dtype": "int8", "key_dims": 15}, 0),
    "spalm-lru-int8": ("spalm", {"eviction": "lru", "n_short": 40, "key_dtype": "int8"}, 0),
    "spalm-vectors": ("spalm", {}, VALUE),
    "titans-onehot": ("titans", {"values": "onehot", "chunk": 5, "key_dims": 15}, 0),
    "titans-vectors": ("titans", {"eta": 0.3, "theta": 0.2, "alpha": 0.01, "chunk": 7}, VALUE),
    "titans-vectors-by-token": ("titans", {"eta": 0.3, "theta": 0.2, "chunk": 1}, VALUE),
    "titans-signs-deep": (
        "titans",
        {
            "values": "signs",
            "depth": 2,
            "expansion": 1.0,
            "code_width": 48,
            "gradient": "chunk",
            "chunk": 3,
            "clip": 3.0,
        },
        0,
    ),
}


class Case(NamedTuple):
    """A kind with options, small enough that a few hundred rows fill it."""

    name: str
    kind: str
    options: dict[str, Any]
    value: int
    budget: int = 12_000

    def build(self, budget: int | None = None) -> Memory:
        memory = build(self.kind, Dims(KEY, self.value), self.options, budget or self.budget)
        return memory.requires_grad_(False)

    def rows(self, count: int, start: int = 0, vocabulary: int = 50) -> EncodedRows:
        return make_rows(count, start, value=self.value, vocabulary=vocabulary)


CASES = [Case(kind, kind, {}, 0) for kind in kinds()] + [Case(name, *rest) for name, rest in VARIANTS.items()]


def make_rows(count: int, start: int = 0, *, key: int = KEY, value: int = 0, vocabulary: int = 50) -> EncodedRows:
    """Rows `start` to `start + count` of one endless stream: a row depends on its number alone."""
    numbers = range(start, start + count)
    drawn = [torch.Generator().manual_seed(number) for number in numbers]
    keys = [torch.randn(key, generator=generator) for generator in drawn]
    values = [torch.randn(value, generator=generator) for generator in drawn]
    tokens = [int(torch.randint(vocabulary, (1,), generator=generator)) for generator in drawn]
    return EncodedRows(
        normalize(torch.stack(keys) if keys else torch.empty(0, key), dim=1),
        torch.tensor(tokens, dtype=torch.int64),
        (torch.stack(values) if values else torch.empty(0, value)) if value else None,
        torch.tensor(numbers, dtype=torch.int64),
        torch.tensor([number // 2 for number in numbers], dtype=torch.int64),
        torch.tensor([number % 3 for number in numbers], dtype=torch.int64),
    )


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    """Each kind and variant in turn."""
    return request.param


@pytest.fixture(scope="session")
def cases() -> list[Case]:
    """All kinds and variants."""
    return CASES


@pytest.fixture(scope="session")
def rows_of() -> Callable[..., EncodedRows]:
    """`make_rows`."""
    return make_rows
