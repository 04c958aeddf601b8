"""Attaching a bank's rows to an engine from its front end: the engine reads the bank's runs once, and keeps the rows.

The rows are made by ordinary requests of one token each, so that they run beside others and cost what a prompt costs.
Rows whose keys and values the bank's store keeps are loaded instead.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from raymem.errors import RaymemError, TooLarge, Unavailable
from raymem.lm.attending import full_rows
from raymem.rows import AttendedRows
from raymem.tensors import dtype_name, from_bytes, to_bytes
from raymem.types import MemoryTokens

# passes that wait in the engine at a time: they go before other prompts that come later
_AT_ONCE = 16


class AttachedRows(NamedTuple):
    """What an attach did: the bank's rows in its journal, those kept before, loaded and rebuilt now, and seconds."""

    rows: int
    kept: int
    loaded: int
    rebuilt: int
    seconds: float


def attach_rows(llm: Any, bank: str, store: str | None = None) -> AttachedRows:
    """Let requests of a `vllm.LLM` attend to a bank; one that is attached already is brought up to date.

    Args:
        llm: started with `engine_args`.
        bank: attached to its store, of the engine's model.
        store: the cold store it lives in; by default the one that the connector writes to.

    Raises:
        TooLarge: its rows don't fit the engine's `rows_bytes`; the engine keeps those that do.
        Unavailable: the engine did not keep them.
        BankNotFound, BankDetached, FingerprintMismatch, ConfigError, Unsupported, UnsupportedModel: see
            `MemoryReader.rows_to_rebuild`.
    """
    started, plan = time.perf_counter(), llm.collective_rpc("rows_to_rebuild", args=(bank, store))[0]
    prompts, params = _requests(plan)
    outputs = llm.generate(prompts, params, use_tqdm=False) if prompts else []
    return _attached(plan, [output.kv_transfer_params for output in outputs], started)


async def attach_rows_async(engine: Any, bank: str, store: str | None = None) -> AttachedRows:
    """As `attach_rows`, of an asynchronous engine: vLLM's `AsyncLLM`, which its HTTP server calls the engine client."""
    started, plans = time.perf_counter(), await engine.collective_rpc("rows_to_rebuild", args=(bank, store))
    room = asyncio.Semaphore(_AT_ONCE)

    async def run(prompt: dict[str, Any], params: Any) -> dict[str, Any] | None:
        async with room:
            return await _run(engine, prompt, params)

    prompts, params = _requests(plans[0])
    answers = await asyncio.gather(*map(run, prompts, params))
    return _attached(plans[0], answers, started)


def replace_rows(llm: Any, bank: str, memory: MemoryTokens, store: str | None = None) -> AttachedRows:
    """Let requests of a `vllm.LLM` attend to rows that were made of a bank, in place of the bank's own.

    `raymem.lm.compacting.compacted` makes some. They are the same for all who attend to the bank, whatever is asked.
    When rows of the bank are erased, they are forgotten.

    Args:
        llm: started with `engine_args`.
        bank: attached to its store, of the engine's model.
        memory: with keys and values.
        store: the cold store that the bank lives in; by default the one that the connector writes to.

    Raises:
        InvalidInput: rows without keys and values. TooLarge, Exception: as `attach_rows`.
    """
    started = time.perf_counter()
    # the engine rounds them to what it computes in
    pair = full_rows(memory, torch.float32)
    blobs = [(dtype_name(rows.dtype), list(rows.shape), to_bytes(rows).tobytes()) for rows in pair]
    rows = {"keys": blobs[0], "values": blobs[1], "tokens": memory.tokens_N.tolist()}
    plan = llm.collective_rpc("rows_to_replace", args=(bank, store, rows))[0]
    prompts, params = _requests(plan)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return _attached(plan, [output.kv_transfer_params for output in outputs], started)


def rows_kept(llm: Any, bank: str, store: str | None = None) -> Iterator[AttendedRows]:
    """The keys and values that a `vllm.LLM` keeps of a bank, run by run, as `Bank.put_rows` takes them.

    A store that has them lets the next engine load them in place of computing them again.

    Raises:
        Exception: what a worker says: that the rows are spread over several, or that the bank is not there.
    """
    for part in range(llm.collective_rpc("rows_kept", args=(bank, store, -1))[0]):
        for found in llm.collective_rpc("rows_kept", args=(bank, store, part))[0]:
            keys_LNHd, values_LNHd = (from_bytes(bytearray(blob), *kind) for *kind, blob in found["tensors"])
            names = (found["stream"], found["run"], found["seq"])
            yield AttendedRows(*names, keys_LNHd, values_LNHd, rope=found["rope"])


def detach_rows(llm: Any, bank: str) -> bool:
    """Let a `vllm.LLM` forget a bank's rows; say whether it had some. Requests that attend to them see other rows."""
    prompts, params = _requests(llm.collective_rpc("rows_to_release", args=(bank,))[0])
    (output,) = llm.generate(prompts, params, use_tqdm=False)
    return _released(output.kv_transfer_params)


async def detach_rows_async(engine: Any, bank: str) -> bool:
    """As `detach_rows`, of an asynchronous engine."""
    plans = await engine.collective_rpc("rows_to_release", args=(bank,))
    prompts, params = _requests(plans[0])
    return _released(await _run(engine, prompts[0], params[0]))


def _requests(plan: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    from vllm import SamplingParams

    if refused := plan.get("refused"):
        raise RaymemError.from_wire(refused)
    # what a pass leaves in the prefix cache is found by no other request: its text may be private
    prompts = [{"prompt_token_ids": tokens, "cache_salt": uuid.uuid4().hex} for tokens, _ in plan["requests"]]
    extras = [{"kv_transfer_params": order} for _, order in plan["requests"]]
    params = [SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, extra_args=extra) for extra in extras]
    return prompts, params


async def _run(engine: Any, prompt: dict[str, Any], params: Any) -> dict[str, Any] | None:
    answer: dict[str, Any] | None = None
    async for output in engine.generate(prompt, params, f"raymem-{uuid.uuid4().hex}"):
        answer = output.kv_transfer_params or answer
    return answer


def _attached(plan: dict[str, Any], answers: Sequence[Any], started: float) -> AttachedRows:
    said = [_said(answer) for answer in answers]
    loaded, rebuilt = (sum(int(each.get(done, 0)) for each in said) for done in ("loaded", "captured"))
    return AttachedRows(plan["rows"], plan["kept"], loaded, rebuilt, time.perf_counter() - started)


def _released(answer: Any) -> bool:
    return bool(_said(answer)["released"])


def _said(answer: Any) -> dict[str, Any]:
    said: dict[str, Any] = (answer or {}).get("raymem", {"refused": "the engine's connector did not answer"})
    if reason := said.get("refused"):
        kind: type[RaymemError] = TooLarge if said.get("code") == TooLarge.code else Unavailable
        raise kind(reason)
    return said
