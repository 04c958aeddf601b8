"""What is measured: operations and mechanisms, each with its peers in the same run and a check that they agree."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from raymem.bench.contest import Bench, Contest
from raymem.kernels.delta_update import chunk_delta_update, recurrent_delta_update, transition
from raymem.kernels.topk_cosine import topk_cosine
from raymem.memory import build
from raymem.memory.base import Dims, Rows
from raymem.memory.packing import STORED, pack, unpack


def _unit(*shape: int) -> Tensor:
    return normalize(torch.randn(*shape), dim=-1)


def _rows(count: int, width: int, vocabulary: int = 4000) -> Rows:
    number = torch.arange(count)
    return Rows(
        _unit(count, width), torch.randint(vocabulary, (count,)), None, number, number, torch.zeros_like(number)
    )


def search(rows: int, width: int, queries: int, dtype: str, k: int = 32) -> Contest:
    """Exact top-k by cosine over packed rows; faiss and plain torch search float32 rows."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    packed, scale = pack(_unit(rows, width), STORED[dtype])
    order, asked, unit = torch.arange(rows), _unit(queries, width), unpack(packed, scale)
    flat = faiss.IndexFlatIP(width)
    flat.add(unit.numpy())

    def check(found: dict[str, Any]) -> None:
        scores = found["raymem"][0]
        torch.testing.assert_close(scores, torch.from_numpy(found["faiss flat fp32"][0]), rtol=0, atol=1e-5)
        torch.testing.assert_close(scores, found["torch fp32"][0], rtol=0, atol=1e-5)

    runs = {
        "raymem": lambda: topk_cosine(asked, packed, scale, order, k),
        "faiss flat fp32": lambda: flat.search(asked.numpy(), k),
        "torch fp32": lambda: (asked @ unit.T).topk(k),
    }
    return Contest(runs, check, queries, "queries")


def delta_update(steps: int, key: int, value: int, chunk: int = 32) -> Contest:
    """The linear Titans recurrence with momentum and decay: by chunks, and token by token."""
    weight, moment = torch.zeros(1, key, value), torch.zeros(1, key, value)
    keys, values = _unit(1, steps, key), torch.randn(1, steps, value)
    theta, eta, alpha = (torch.full((1, steps), gate) for gate in (0.2, 0.5, 0.01))
    moves = transition(eta[:, :chunk], alpha[:, :chunk])

    def by_chunk() -> Tensor:
        state: tuple[Tensor, Tensor | None] = (weight, moment)
        for start in range(0, steps, chunk):
            part = slice(start, start + chunk)
            state = chunk_delta_update(*state, keys[:, part], values[:, part], theta[:, part], moves)[:2]
        return state[0]

    def check(found: dict[str, Any]) -> None:
        torch.testing.assert_close(found["raymem"], found["token by token"], rtol=1e-4, atol=1e-4)

    by_token = lambda: recurrent_delta_update(weight, moment, keys, values, (theta, eta, alpha))[0]  # noqa: E731
    return Contest({"raymem": by_chunk, "token by token": by_token}, check, steps, "tokens")


def titans_peer(steps: int, width: int) -> Contest:
    """A linear memory with momentum and decay, one gradient a token, beside titans-pytorch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from titans_pytorch import MemoryMLP, NeuralMemory
    options = {"chunk": 16, "theta": 0.15 / width, "eta": 0.5, "alpha": torch.sigmoid(torch.tensor(-4.0)).item()}
    peer = NeuralMemory(
        dim=width, chunk_size=1, batch_size=1, model=MemoryMLP(width, depth=1), pre_rmsnorm=False, momentum=True,
        mem_model_norm_add_residual=False, default_step_transform_max_lr=0.3, init_adaptive_step_bias=0.0,
        init_decay_bias=-4.0, init_momentum_bias=0.0,
    ).requires_grad_(False)  # fmt: skip
    x, memory = torch.randn(1, steps, width), build("titans", Dims(width, width), options, 2**26)
    keys, values, tokens = peer.to_keys(x), peer.to_values(x), torch.zeros(1, steps, dtype=torch.int64)
    first = peer.memory_model_parameters[0].detach().reshape(1, width, width)

    def ours() -> Any:
        return memory.write(memory.init_state(1) | {"weight_0": first.clone()}, keys, values, tokens)

    def check(found: dict[str, Any]) -> None:
        got, expected = found["raymem"]["weight_0"], found["titans-pytorch"][1].states[0]["weights.0"]
        torch.testing.assert_close(got, expected.reshape(got.shape), rtol=1e-4, atol=1e-5)

    runs = {"raymem": ours, "titans-pytorch": lambda: peer(x)}
    return Contest(runs, check, steps, "tokens")


def write(kind: str, rows: int, width: int, **options: Any) -> Contest:
    """Absorbing one bank's rows."""
    memory, taken = build(kind, Dims(width, 0), options, 2**27).requires_grad_(False), _rows(rows, width)
    return Contest({"raymem": lambda: memory.absorb(memory.empty(), taken)}, lambda found: None, rows, "rows")


def read(kind: str, rows: int, width: int, queries: int, **options: Any) -> Contest:
    """Reading a bank that holds rows."""
    memory, asked = build(kind, Dims(width, 0), options, 2**27).requires_grad_(False), _unit(queries, width)
    state = memory.absorb(memory.empty(), _rows(rows, width))
    return Contest({"raymem": lambda: memory.lookup(state, asked, 32)}, lambda found: None, queries, "queries")


def _mechanism_sizes(rows: int, **more: int) -> list[dict[str, Any]]:
    return [
        {"kind": kind, "rows": rows, "width": 576, **more, **options}
        for kind, options in (("spalm", {}), ("spalm", {"key_dtype": "int8", "key_dims": 256}), ("titans", {}))
    ]


REGISTRY = [
    Bench(
        "search",
        search,
        [
            {"rows": 100_000, "width": 576, "queries": q, "dtype": d}
            for q in (1, 64)
            for d in ("float32", "bfloat16", "int8")
        ],
        {"rows": 700, "width": 63, "queries": 3, "dtype": "int8"},
    ),
    Bench(
        "delta_update",
        delta_update,
        [{"steps": 1024, "key": 256, "value": 256}, {"steps": 512, "key": 576, "value": 1024}],
        {"steps": 64, "key": 10, "value": 7},
    ),
    Bench("titans_peer", titans_peer, [{"steps": 256, "width": 64}], {"steps": 32, "width": 8}),
    Bench("write", write, _mechanism_sizes(3072), {"kind": "titans", "rows": 50, "width": 16}),
    Bench(
        "read",
        read,
        [*_mechanism_sizes(3080, queries=1), *_mechanism_sizes(3080, queries=256)],
        {"kind": "spalm", "rows": 50, "width": 16, "queries": 2},
    ),
]
