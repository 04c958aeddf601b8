"""The demo's real parts: a gateway in a process of its own, and a vLLM engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from raymem.errors import BackendUnavailable

LAYERS = (26,)
MAX_TOKENS = 4096


# read by torch and vLLM. the engine's start-up output would bury the demo's own lines; its errors are raised anyway
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # in this process: two more would import torch and vLLM again, most of an engine's start
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


@contextmanager
def gateway(cold: Path, log: Path) -> Iterator[str]:
    """`raymem serve` over the running Ray cluster, its log in a file; yields its address.

    Raises:
        BackendUnavailable: it ended before it listened; the error quotes its log.
    """
    command = [str(Path(sys.executable).with_name("raymem")), "serve", "--store", "ray", "--cold", str(cold)]
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*command, "--port", "0", "--json"], stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        assert process.stdout is not None
        document = _first_document(process.stdout)
        if document is None:
            raise BackendUnavailable(f"the gateway ended before it listened: {log.read_text().strip()[-500:]}")
        yield str(document["url"])
    finally:
        process.terminate()
        process.wait(timeout=60)


def _first_document(lines: IO[str]) -> dict[str, Any] | None:
    text = ""
    for line in lines:
        text += line
        if line.startswith("}"):
            found: dict[str, Any] = json.loads(text)
            return found
    return None


class Engine:
    """A vLLM engine that streams into the banks behind a gateway."""

    def __init__(self, model: Path, store: str) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from vllm import LLM

            from raymem.serving.vllm.params import engine_args

            self._llm: Any = LLM(
                model=str(model),
                max_model_len=MAX_TOKENS,
                dtype="bfloat16",
                disable_log_stats=True,
                use_tqdm_on_load=False,
                **engine_args(store, LAYERS),
            )

    def read(self, token_ids: list[int], bank: str, stream: str, think: int) -> None:
        """Let an agent read a text and generate `think` tokens; its hidden states stream into the bank meanwhile."""
        from vllm import SamplingParams

        from raymem.serving.vllm.params import raymem_params

        params = SamplingParams(max_tokens=think, temperature=0.0, extra_args=raymem_params(bank, stream))
        self._llm.generate([{"prompt_token_ids": token_ids}], params, use_tqdm=False)
        self._llm.collective_rpc("flush_memory")

    def shed(self) -> int:
        """Traces that were not streamed because the queue was full."""
        return sum(int(stats["streamed"]["traces_shed"]) for stats in self._llm.collective_rpc("memory_stats"))

    def close(self) -> None:
        """End the engine, whose queued rows are written first."""
        self._llm.llm_engine.engine_core.shutdown()


@contextmanager
def watched(rows: Any, report: Any, total: int) -> Iterator[None]:
    """While the block runs, report twice a second how many rows are in the bank."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            report(min(rows(), total), total)

    thread = threading.Thread(target=watch, name="demo-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
