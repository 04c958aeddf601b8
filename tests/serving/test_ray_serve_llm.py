"""Ray Serve LLM with memory, from the example's `serve run` file: the stock client, streamed, several at once."""

import asyncio
import importlib.util

import httpx
import pytest
from openai import APIStatusError, AsyncOpenAI
from small_banks import MODEL, make_banks

from raymem.serving.server import bind

pytestmark = [pytest.mark.vllm, pytest.mark.ray, pytest.mark.timeout(400)]

BANK = "team/notes"


@pytest.fixture(scope="module")
def url(root, tmp_path_factory):
    import ray
    from ray import serve

    uri = str(tmp_path_factory.mktemp("served") / "memory")
    make_banks(uri, {(26,): [BANK]})
    with bind("127.0.0.1", 0) as free:
        port = int(free.getsockname()[1])
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAYMEM_STORE", uri)
            serve.run(_app(root / "examples" / "ray_serve_llm.py"))
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        serve.shutdown()
        ray.shutdown()


def _app(file):
    spec = importlib.util.spec_from_file_location("ray_serve_llm", file)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example.app


async def chat(client, memory):
    content = "Tell me about the tide in my town."
    body = {"max_tokens": 30, "messages": [{"role": "user", "content": content}], "stream": True}
    stream = await client.chat.completions.create(model=MODEL, **body, extra_body={"memory": memory})
    told, text = [], ""
    async for chunk in stream:
        told += [chunk.memory] if "memory" in (chunk.model_extra or {}) else []
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    (memory_told,) = told
    return memory_told, text


async def test_the_memory_field_is_taken_told_and_refused_as_by_vllms_own_server(url):
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
        written = await asyncio.gather(*(chat(client, {"write": BANK, "stream": f"user{i}"}) for i in range(3)))
        assert [told["write"]["stream"] for told, _ in written] == ["user0", "user1", "user2"]
        assert len({text for _, text in written}) == 3
        # rows are written while answers go out; the replica follows them
        while (await chat(client, {"read": [BANK]}))[0]["read"][0]["rows"] <= 3 * 30:
            await asyncio.sleep(0.5)
        read = await asyncio.gather(*(chat(client, {"read": [BANK]}) for _ in range(3)))
        assert all(told["read"][0]["rows"] > 3 * 30 for told, _ in read)
        whole = await client.completions.create(
            model=MODEL, prompt="The tide", max_tokens=5, extra_body={"memory": {"read": [BANK]}}
        )
        assert whole.memory["read"][0]["bank"] == BANK
        attended = await asyncio.gather(*(chat(client, {"attend": [BANK], "rows": 128}) for _ in range(3)))
        assert all(told["attend"] == {"banks": [BANK], "asked": 128} for told, _ in attended)
        for memory, status in (({"read": ["team/nobody"]}, 404), ({"write": "secret/bank"}, 403), ({"reed": []}, 422)):
            with pytest.raises(APIStatusError) as refused:
                await chat(client, memory)
            assert refused.value.status_code == status
    assert httpx.get(f"{url}/models").json()["data"][0]["id"] == MODEL
