"""Two agents on one vLLM engine: what one reads streams into a bank, and the bank helps the other predict.

Run: python examples/vllm_two_agents.py
"""

import math
import tempfile
from pydoc_data.topics import topics

from vllm import LLM, SamplingParams

import raymem
from raymem.encode.fit import calibrate
from raymem.lm.fingerprint import fingerprint
from raymem.lm.models import LanguageModel, model_path
from raymem.serving.vllm import engine_args, raymem_params

MODEL = "smollm2-135m"
LAYERS = (26,)
BANK = "lab/library"
TOPIC = "typesseq"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        text = prepare(folder)
        sizes = {"max_model_len": 1024, "kv_cache_memory_bytes": 2**30}
        llm = LLM(str(model_path(MODEL)), dtype="bfloat16", **sizes, **engine_args(folder, LAYERS))
        try:
            play(llm, text[:768], text[768:1024])
        finally:
            llm.llm_engine.engine_core.shutdown()


def prepare(folder: str) -> list[int]:
    """Make an empty bank for this model's states; return the token ids of a text."""
    model = LanguageModel.load(MODEL)
    with raymem.connect(folder) as store:
        store.put_calibration(calibrate(model, LAYERS))
        store.create(BANK, raymem.BankSpec(kind="spalm", fingerprint=fingerprint(model, LAYERS)))
    return model.encode(topics[TOPIC]).tolist()


def play(llm: LLM, seen: list[int], unseen: list[int]) -> None:
    reading = SamplingParams(max_tokens=1, extra_args=raymem_params(BANK, stream="agent-a"))
    llm.generate([{"prompt_token_ids": seen}], reading, use_tqdm=False)
    llm.collective_rpc("flush_memory")
    streamed = llm.collective_rpc("memory_stats")[0]["streamed"]
    print(f"agent A read {streamed['rows_written']} tokens into {BANK}, {streamed['rows_shed']} were shed")

    print(f"agent B without memory: perplexity {perplexity(llm, unseen):.2f}")
    (bank,) = llm.collective_rpc("attach_bank", args=(BANK,))
    print(f"with A's {bank['rows']} states in its logits: {perplexity(llm, unseen, read=[BANK]):.2f}")
    llm.collective_rpc("detach_bank", args=(BANK,))
    print(f"detached again: {perplexity(llm, unseen, read=[BANK]):.2f}")


def perplexity(llm: LLM, token_ids: list[int], read: list[str] | None = None) -> float:
    """Perplexity of a prompt, as vLLM computed it."""
    scoring = SamplingParams(max_tokens=1, prompt_logprobs=0, extra_args=raymem_params(read=read or ()))
    (output,) = llm.generate([{"prompt_token_ids": token_ids}], scoring, use_tqdm=False)
    pairs = zip(token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return math.exp(-sum(found[token].logprob for token, found in pairs) / (len(token_ids) - 1))


if __name__ == "__main__":
    main()
