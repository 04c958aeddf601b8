"""The vLLM engine that tests share: what leaves it, what reaches the banks, how it is asked."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

import raymem
from raymem.encode.calibration import Calibration, Range, measured_keys
from raymem.lm.fingerprint import fingerprint_of
from raymem.lm.models import LanguageModel, model_path
from raymem.rows import Trace
from raymem.serving.vllm import engine_args, raymem_params
from raymem.storage.store import ColdStore
from raymem.types import BankSpec

MODEL = "smollm2-135m"
LAYERS = (15, 26)
LENGTH = 512
# tokens of one step
CHUNK = 64
# room for the longest request, and too little for six of half its length
NUM_BLOCKS = 40
BLOCK = 32
ROW_BYTES = len(LAYERS) * 576 * 2
# more than any test has under way at once, whatever the disk does, but for the one with a stuck bank
QUEUE_ROWS = 1000
PARTS = Path(__file__).parents[1] / "serving" / "vllm_parts"
NAMES = (
    "plain",
    "many",
    "again",
    "same",
    "tight",
    "edge",
    "late",
    "after",
    "last",
    "written",
    "read",
    "chat",
    "seen",
    "other-seen",
    "erased",
)
BANKS = ("stuck/one", "secret/bank", *(f"lab/{name}" for name in NAMES))
WINDOWS = {"lab/single": {"layers": (26,)}, "lab/window": {"layers": (26,), "function": "window", "window": 4}}


@dataclass
class Engine:
    """A running engine, its store, the file that holds writes to `stuck/one` up, and its model."""

    llm: Any
    uri: str
    gate: Path
    model: LanguageModel
    stopped: bool = False

    def run(self, prompts, bank=None, stream=None, **sampling):
        """Generate greedily with rows streaming to a bank; prompts are token ids."""
        extra = raymem_params(bank, stream, sampling.pop("read", ()))
        return self.draw(prompts, **{"temperature": 0.0, "ignore_eos": True, "extra_args": extra} | sampling)

    def draw(self, prompts, **sampling):
        """Generate with one set of sampling parameters for all prompts; `extra_args` says what raymem does."""
        from vllm import SamplingParams

        params = SamplingParams(**{"max_tokens": 16} | sampling)
        return self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)

    def call(self, name, *args, **kwargs):
        (answer,) = self.llm.collective_rpc(name, args=args, kwargs=kwargs)
        return answer

    def stats(self):
        """What the engine counts, after all rows were written."""
        # a draft that is accepted at a request's very end leaves one engine step later
        for _ in range(2):
            assert self.call("flush_memory", 60.0)
        return self.call("memory_stats")

    def streamed(self):
        return self.stats()["streamed"]

    def rows(self, bank) -> dict[str, list[tuple[int, int, torch.Tensor]]]:
        """A bank's rows by run, as the journal has them: seq, token, hidden states."""
        store = ColdStore.open(self.uri)
        rows: dict[str, list] = {}
        for part in store.journal(store.catalog.get(bank)).scan():
            for i, run in enumerate(part.runs):
                rows.setdefault(run, []).append((int(part.seq_T[i]), int(part.token_T[i]), part.hidden_TLD[i]))
        return rows

    def traces(self, bank) -> dict[str, Trace]:
        """The bank's rows by run; a row that is missing or there twice fails."""
        self.streamed()
        rows = self.rows(bank)
        for run, found in rows.items():
            assert [seq for seq, _, _ in found] == list(range(len(found))), run
        return {
            run: Trace(torch.stack([h for _, _, h in found]), torch.tensor([t for _, t, _ in found]), bank, run)
            for run, found in rows.items()
        }

    def tokens(self, text: str, count: int) -> list[int]:
        return self.model.encode(text)[:count].tolist()

    def shutdown(self) -> None:
        """End it; what asks for it next starts another."""
        self.stopped = True
        self.llm.llm_engine.engine_core.shutdown()


def inputs_of(output) -> list[int]:
    """Every token that was an input: all but the last one sampled."""
    return [*output.prompt_token_ids, *output.outputs[0].token_ids][:-1]


@contextmanager
def started(folder: Path) -> Iterator[Engine]:
    """An engine over a store with banks, of which `lab/read` has 400 rows and is attached."""
    from vllm import LLM

    model = LanguageModel.load(MODEL, torch.float32)
    uri, gate = str(folder / "memory"), folder / "gate"
    _make_banks(uri, model)
    with pytest.MonkeyPatch.context() as patch:
        # the engine's processes inherit both; they start here
        patch.setattr(sys, "path", [str(PARTS), *sys.path])
        patch.setenv("STUCK_BANKS_GATE", str(gate))
        reads = ["lab/read", "lab/plain", *WINDOWS]
        attends = [*(f"lab/{name}" for name in ("seen", "other-seen", "erased", "nowhere", "plain", "other"))]
        options = {
            "write_banks": ["lab/*", "stuck/*"],
            "read_banks": reads,
            "attend_banks": attends,
            "attend_floor": 0,
            "queue_bytes": QUEUE_ROWS * ROW_BYTES,
        }
        args = engine_args(uri, layers=LAYERS, **options)
        args["kv_transfer_config"] |= {"kv_connector": "GatedConnector", "kv_connector_module_path": "gated_connector"}
        llm = LLM(
            model=str(model_path(MODEL)),
            max_model_len=LENGTH,
            max_num_batched_tokens=CHUNK,
            max_num_seqs=64,
            max_logprobs=-1,
            block_size=BLOCK,
            num_gpu_blocks_override=NUM_BLOCKS,
            disable_log_stats=False,
            **args,
        )
    engine = Engine(llm, uri, gate, model)
    try:
        engine.run([engine.tokens(topics["string-methods"], 400)], "lab/read", max_tokens=1)
        engine.stats()
        assert engine.call("attach_bank", "lab/read")["rows"] == 400
        yield engine
    finally:
        if not engine.stopped:
            engine.shutdown()


def _make_banks(uri, model):
    states = model.run(model.encode(topics["booleans"]), LAYERS).hidden_TLd[1:]
    print_ = fingerprint_of(MODEL, LAYERS)
    other = fingerprint_of(MODEL, (20,))
    with raymem.connect(uri) as store:
        for layers, mean_LD in ((LAYERS, states.mean(0)), ((20,), torch.zeros(1, 576))):
            ranges = {key: Range(0.3, 0.9) for key in measured_keys(layers)}
            store.put_calibration(Calibration(model.content_hash, layers, mean_LD, ranges=ranges))
        for name in BANKS:
            store.create(name, BankSpec(kind="spalm", fingerprint=print_, key={"layers": (26,)}))
        for name, key in WINDOWS.items():
            store.create(name, BankSpec(kind="spalm", fingerprint=print_, key=key))
        store.create("lab/other", BankSpec(kind="spalm", fingerprint=other))
