"""Two agents on one vLLM server, with the stock openai client: what one reads, the other knows, with an empty prompt.

    raymem calibrate && raymem bank create team/notes --kind spalm
    raymem vllm serve smollm2-135m --max-model-len 1024
    python examples/vllm_openai_client.py

OPENAI_BASE_URL names another server; Ray Serve LLM (examples/ray_serve_llm.py) answers the same way.
"""

import math
import os
from pydoc_data.topics import topics

from openai import NotFoundError, OpenAI

MODEL, BANK = "smollm2-135m", "team/notes"
TEXT = topics["typesseq"]


def main() -> None:
    url = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
    client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))

    seen = client.completions.create(
        model=MODEL, prompt=TEXT[:2400], max_tokens=1, extra_body={"memory": {"write": BANK, "stream": "agent-a"}}
    )
    print(f"agent A read {seen.usage.prompt_tokens} tokens; {seen.memory}")

    print(f"agent B without memory: perplexity {perplexity(client, None):.2f}")
    print(f"with {BANK} in its logits: perplexity {perplexity(client, {'read': [BANK]}):.2f}")
    attend = {"attend": [BANK], "rows": 256}
    print(f"with 256 rows of it attended: perplexity {perplexity(client, attend):.2f}")
    print(f"with both: perplexity {perplexity(client, {**attend, 'read': [BANK]}):.2f}")

    question = [{"role": "user", "content": "What can be done with a list in Python?"}]
    stream = client.chat.completions.create(
        model=MODEL, messages=question, max_tokens=40, stream=True, extra_body={"memory": attend}
    )
    for chunk in stream:
        # the first chunk says what memory serves
        if told := (chunk.model_extra or {}).get("memory"):
            print(f"streamed with {told}:")
        for choice in chunk.choices:
            print(choice.delta.content or "", end="")
    print()

    try:
        perplexity(client, {"read": ["team/nobody"]})
    except NotFoundError as error:
        print(f"a bank that isn't there: {error.status_code}, {error.body['message']}")


def perplexity(client: OpenAI, memory: dict | None) -> float:
    """Perplexity of text that agent A has not read, as the server computed it."""
    extra = {"prompt_logprobs": 0} | ({} if memory is None else {"memory": memory})
    scored = client.completions.create(model=MODEL, prompt=TEXT[2400:3600], max_tokens=1, extra_body=extra)
    found = [next(iter(token.values()))["logprob"] for token in scored.choices[0].prompt_logprobs[1:]]
    return math.exp(-sum(found) / len(found))


if __name__ == "__main__":
    main()
