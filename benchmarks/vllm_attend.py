"""What attending to rows costs in vLLM, beside the same tokens as text: vllm_attend.py [ROWS] [--rounds N].

Prints the time to the first token, tokens a second of decoding, and how long a bank takes to attach.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import uuid
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

import raymem
from raymem.encode.calibration import Calibration, Range, measured_keys
from raymem.lm.fingerprint import fingerprint_of
from raymem.lm.models import LanguageModel, model_path
from raymem.rows import Trace
from raymem.serving.vllm import attach_rows, detach_rows, engine_args, raymem_params, rows_kept
from raymem.types import BankSpec

MODEL, LAYERS, BANK = "smollm2-135m", (26,), "bench/rows"
PROMPT, ANSWER, RUN_TOKENS = 64, 64, 1_000


def fill(uri: str, tokens: torch.Tensor) -> None:
    """Make a bank with these tokens, whose states say nothing: rows are made by the engine."""
    model = LanguageModel.load(MODEL)
    width = int(fingerprint_of(MODEL, LAYERS).width)
    with raymem.connect(uri) as store:
        ranges = {key: Range(0.3, 0.9) for key in measured_keys(LAYERS)}
        store.put_calibration(Calibration(model.content_hash, LAYERS, torch.zeros(1, width), ranges=ranges))
        bank = store.create(BANK, BankSpec(kind="spalm", fingerprint=fingerprint_of(MODEL, LAYERS)))
        for run, part in enumerate(tokens.split(RUN_TOKENS)):
            bank.write(Trace(torch.ones(len(part), 1, width).bfloat16(), part, "text", f"run{run}"))


def seconds(llm: Any, prompts: list[list[int]], tokens: int, params: dict[str, Any]) -> float:
    """Seconds that so many tokens for each prompt take; no prompt is in the prefix cache."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, extra_args=params or None)
    salted = [{"prompt_token_ids": prompt, "cache_salt": uuid.uuid4().hex} for prompt in prompts]
    started = time.perf_counter()
    llm.generate(salted, sampling, use_tqdm=False)
    return time.perf_counter() - started


def main() -> None:
    """Print the figures."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("rows", type=int, nargs="?", default=512)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--bank-tokens", type=int, default=10_000)
    asked = options.parse_args()
    rows, tokens = asked.rows, asked.bank_tokens
    from vllm import LLM

    text = " ".join(topics[name] for name in sorted(topics))
    ids = LanguageModel.load(MODEL).encode(text)[: tokens + PROMPT]
    with tempfile.TemporaryDirectory() as folder:
        uri = str(Path(folder) / "memory")
        fill(uri, ids[:tokens])
        llm = LLM(
            str(model_path(MODEL)),
            max_model_len=2048,
            kv_cache_memory_bytes=2**30,
            **engine_args(uri, stream=False, attend_floor=0),
        )
        done = attach_rows(llm, BANK)
        print(f"attach: {done.rebuilt} rows rebuilt in {done.seconds:.2f} s")
        with raymem.connect(uri) as store:
            for kept in rows_kept(llm, BANK):
                store.bank(BANK).put_rows(kept)
        detach_rows(llm, BANK)
        done = attach_rows(llm, BANK)
        print(f"attach: {done.loaded} rows loaded in {done.seconds:.2f} s")
        prompt, before = ids[tokens:].tolist(), ids[:rows].tolist()
        modes = {
            "text": (before + prompt, {}),
            "attend": (prompt, raymem_params(attend=[BANK], rows=rows)),
            "neither": (prompt, {}),
        }
        for size in (1, 8):
            first: dict[str, list[float]] = {name: [] for name in modes}
            speed: dict[str, list[float]] = {name: [] for name in modes}
            for _ in range(asked.rounds):
                for name, (sent, params) in modes.items():
                    began = seconds(llm, [sent] * size, 1, params)
                    first[name].append(began)
                    whole = seconds(llm, [sent] * size, ANSWER + 1, params)
                    speed[name].append(size * ANSWER / (whole - began))
            for name in modes:
                ratio = statistics.median(a / b for a, b in zip(first[name], first["text"], strict=True))
                faster = statistics.median(a / b for a, b in zip(speed[name], speed["text"], strict=True))
                begins, runs = statistics.median(first[name]), statistics.median(speed[name])
                print(f"{size} requests, {name}: first token {begins:.3f} s, {ratio:.2f} x text;", end=" ")
                print(f"{runs:.1f} tokens/s, {faster:.2f} x text")
        llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
