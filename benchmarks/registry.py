"""What is measured: operations and mechanisms, each with its peers in the same run and a check that they agree."""

from __future__ import annotations

import math
import sys
import warnings
from importlib.util import find_spec
from typing import Any

import small_tasks
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from raymem.bench.comparison import Benchmark, Comparison
from raymem.kernels.delta_update import chunk_delta_update, recurrent_delta_update, transition
from raymem.kernels.topk_cosine import topk_cosine
from raymem.kernels.vocab_scatter import vocab_scatter
from raymem.memory import build, kinds
from raymem.memory.base import Dims, EncodedRows, Memory
from raymem.memory.dnc_cell import DncCell
from raymem.memory.ntm_cell import NtmCell
from raymem.memory.quantize import STORED, pack, unpack


def _unit(*shape: int) -> Tensor:
    return normalize(torch.randn(*shape), dim=-1)


def _rows(count: int, width: int, vocabulary: int = 4000) -> EncodedRows:
    number = torch.arange(count)
    return EncodedRows(
        _unit(count, width), torch.randint(vocabulary, (count,)), None, number, number, torch.zeros_like(number)
    )


def search(rows: int, width: int, queries: int, dtype: str, k: int = 32) -> Comparison:
    """Exact top-k by cosine over packed rows; faiss and plain torch search float32 rows, or roughly in fewer bits."""
    packed, scale = pack(_unit(rows, width), STORED[dtype])
    order, asked, unit = torch.arange(rows), _unit(queries, width), unpack(packed, scale)
    runs: dict[str, Any] = {"raymem": lambda: topk_cosine(asked, packed, scale, order, k)}
    if packed.is_cuda:
        runs["raymem in torch"] = lambda: topk_cosine(asked, packed, scale, order, k, backend="torch")
    elif find_spec("faiss"):
        runs["faiss flat fp32"] = _faiss(unit, asked, k)
    else:
        print("search: faiss is not installed, so it is not among the peers", file=sys.stderr)
    runs["torch rough"] = lambda: _rough(asked, packed, scale, k)
    runs["torch fp32"] = lambda: (asked @ unit.T).topk(k)

    def check(found: dict[str, Any]) -> None:
        # a bfloat16 product rounds to 8 bits, operands and result
        close = {name: 1e-2 if name == "torch rough" else 1e-5 for name in found}
        for name, (scores, _) in found.items():
            torch.testing.assert_close(scores, found["raymem"][0], rtol=0, atol=close[name])

    return Comparison(runs, check, queries, "query")


def _faiss(unit: Tensor, asked: Tensor, k: int) -> Any:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    flat = faiss.IndexFlatIP(unit.shape[1])
    flat.add(unit.numpy())

    def run() -> tuple[Tensor, Any]:
        scores, index = flat.search(asked.numpy(), k)
        return torch.from_numpy(scores), index

    return run


def _rough(asked: Tensor, packed: Tensor, scale: Tensor, k: int) -> Any:
    """The fewest bits that torch multiplies rows in: TF32 on a GPU, bfloat16 for packed rows."""
    wide = packed.dtype == torch.float32
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    products = asked @ packed.T if wide else (asked.bfloat16() @ packed.bfloat16().T).float()
    torch.set_float32_matmul_precision(before)
    return (products * scale).topk(k)


def delta_update(steps: int, key: int, value: int, chunk: int = 32) -> Comparison:
    """The linear Titans recurrence with momentum and decay: by chunks, and token by token."""
    weight, moment = torch.zeros(1, key, value), torch.zeros(1, key, value)
    keys, values = _unit(1, steps, key), torch.randn(1, steps, value)
    gates = theta, eta, alpha = tuple(torch.full((1, steps), gate) for gate in (0.2, 0.5, 0.01))
    moves = transition(eta[:, :chunk], alpha[:, :chunk])

    def by_chunk() -> Tensor:
        state: tuple[Tensor, Tensor | None] = (weight, moment)
        for start in range(0, steps, chunk):
            part = slice(start, start + chunk)
            state = chunk_delta_update(*state, keys[:, part], values[:, part], theta[:, part], moves)[:2]
        return state[0]

    def by_token(backend: str) -> Any:
        return lambda: recurrent_delta_update(weight, moment, keys, values, gates, backend=backend)[0]

    def check(found: dict[str, Any]) -> None:
        for weights in found.values():
            torch.testing.assert_close(weights, found["torch token by token"], rtol=1e-4, atol=1e-4)

    runs = {"raymem by chunk": by_chunk, "torch token by token": by_token("torch")}
    if keys.is_cuda:
        runs = {"raymem token by token": by_token("triton"), **runs}
    return Comparison(runs, check, steps, "token")


def scatter(queries: int, k: int, vocabulary: int) -> Comparison:
    """Weights of neighbours summed by token; torch adds with atomics, in no fixed order."""
    tokens, weights = torch.randint(-1, vocabulary, (queries, k)), torch.softmax(torch.randn(queries, k), 1)

    def check(found: dict[str, Any]) -> None:
        torch.testing.assert_close(found["raymem"], found["torch scatter_add"], rtol=1e-5, atol=1e-6)

    runs = {
        "raymem": lambda: vocab_scatter(tokens, weights, vocabulary),
        "torch scatter_add": lambda: torch.zeros(queries, vocabulary).scatter_add_(
            1, tokens.clamp_min(0), weights * (tokens >= 0)
        ),
    }
    return Comparison(runs, check, queries, "query")


def titans_peer(steps: int, width: int) -> Comparison:
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
    x, memory = torch.randn(1, steps, width), _built("titans", Dims(width, width), options, 2**26)
    keys, values, tokens = peer.to_keys(x), peer.to_values(x), torch.zeros(1, steps, dtype=torch.int64)
    first = peer.memory_model_parameters[0].detach().reshape(1, width, width)

    def ours() -> Any:
        return memory.write(memory.init_state(1) | {"weight_0": first.clone()}, keys, values, tokens)

    def check(found: dict[str, Any]) -> None:
        got, expected = found["raymem"]["weight_0"], found["titans-pytorch"][1].states[0]["weights.0"]
        torch.testing.assert_close(got, expected.reshape(got.shape), rtol=1e-4, atol=1e-5)

    runs = {"raymem": ours, "titans-pytorch": lambda: peer(x)}
    return Comparison(runs, check, steps, "token")


def write(rows: int, width: int, budget: int) -> Comparison:
    """Absorbing rows, each kind in a bank of the same bytes; the baseline adds up their outer products."""
    taken = _rows(rows, width)
    runs: dict[str, Any] = {kind: _writing(kind, taken, width, budget) for kind in kinds()}
    runs["torch matmul"] = lambda: taken.keys_NK.T @ taken.keys_NK
    return Comparison(runs, _in_budget(budget), rows, "row")


def read(rows: int, width: int, budget: int, queries: int) -> Comparison:
    """Reading full banks of the same bytes; the baseline scores and ranks as many float32 keys as fit in them."""
    taken, asked = _rows(rows, width), _unit(queries, width)
    keys = taken.keys_NK[-(budget // (4 * width)) :]
    runs: dict[str, Any] = {kind: _reading(kind, taken, asked, budget) for kind in kinds()}
    runs["torch matmul"] = lambda: (asked @ keys.T).topk(min(32, len(keys)))

    def check(found: dict[str, Any]) -> None:
        for kind in kinds():
            # what was written comes back: every query is answered with something
            assert bool((found[kind].tokens_Qk[:, 0] >= 0).all()), kind

    return Comparison(runs, check, queries, "query")


def _built(kind: str, dims: Dims, options: dict[str, Any], budget: int) -> Memory:
    return build(kind, dims, options, budget).to(torch.get_default_device()).requires_grad_(False)


def _writing(kind: str, taken: EncodedRows, width: int, budget: int) -> Any:
    memory = _built(kind, Dims(width, 0), {}, budget)
    return lambda: memory.nbytes(memory.absorb(memory.empty(), taken))


def _reading(kind: str, taken: EncodedRows, asked: Tensor, budget: int) -> Any:
    memory = _built(kind, Dims(asked.shape[1], 0), {}, budget)
    state = memory.absorb(memory.empty(), taken)
    return lambda: memory.lookup(state, asked, 32)


def _in_budget(budget: int) -> Any:
    def check(found: dict[str, Any]) -> None:
        for kind in kinds():
            assert 0 < found[kind] <= budget, f"{kind} holds {found[kind]} of {budget} bytes"

    return check


def learn(length: int, batch: int) -> Comparison:
    """One training step on the copy task: the NTM's and the DNC's cells beside an LSTM."""
    with torch.device("cpu"):
        batch_drawn = small_tasks.copy(batch, length, torch.Generator().manual_seed(0))
    drawn = small_tasks.Batch(*(part.to(torch.get_default_device()) for part in batch_drawn))

    def step(model: nn.Module) -> Any:
        def once() -> float:
            with torch.enable_grad():
                model.zero_grad()
                loss = small_tasks.loss(model, drawn)
                loss.backward()  # type: ignore[no-untyped-call]
            return float(loss.detach())

        return once

    def check(found: dict[str, Any]) -> None:
        # untrained, each knows nothing: log 2 a bit
        assert all(abs(loss - math.log(2)) < 0.1 for loss in found.values()), found

    runs = {
        "ntm": step(NtmCell(9, 8, slots=128, word=16, hidden=64)),
        "dnc": step(DncCell(9, 8, slots=32, word=16, heads=1, hidden=64)),
        "torch LSTM": step(small_tasks.Lstm(9, 8, hidden=128)),
    }
    return Comparison(runs, check, 1, "update")


REGISTRY = [
    Benchmark(
        "search",
        search,
        [
            {"rows": 100_000, "width": 576, "queries": q, "dtype": d}
            for q in (1, 64)
            for d in ("float32", "bfloat16", "int8")
        ],
        {"rows": 700, "width": 63, "queries": 3, "dtype": "int8"},
    ),
    Benchmark(
        "delta_update",
        delta_update,
        [{"steps": 1024, "key": 256, "value": 256}, {"steps": 512, "key": 576, "value": 1024}],
        {"steps": 64, "key": 10, "value": 7},
    ),
    Benchmark(
        "vocab_scatter",
        scatter,
        [{"queries": q, "k": k, "vocabulary": 49_152} for q, k in ((1, 32), (64, 32), (64, 1024))],
        {"queries": 3, "k": 9, "vocabulary": 50},
    ),
    Benchmark("titans_peer", titans_peer, [{"steps": 256, "width": 64}], {"steps": 32, "width": 8}),
    Benchmark(
        "write",
        write,
        [{"rows": 3072, "width": 576, "budget": budget} for budget in (150_000, 1_000_000)],
        {"rows": 50, "width": 16, "budget": 30_000},
    ),
    Benchmark(
        "read",
        read,
        [{"rows": 3072, "width": 576, "budget": 1_000_000, "queries": queries} for queries in (1, 256)],
        {"rows": 50, "width": 16, "budget": 30_000, "queries": 2},
    ),
    Benchmark("learn", learn, [{"length": 20, "batch": 16}], {"length": 3, "batch": 2}),
]
