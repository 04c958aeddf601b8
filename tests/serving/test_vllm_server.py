"""`raymem vllm serve`, as users have it: the stock openai client, chats streamed at the defaults, several at once."""

import asyncio
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import httpx
import pytest
from openai import APIError, APIStatusError, AsyncOpenAI
from small_banks import MODEL, make_banks

import raymem
from raymem.lm.models import LanguageModel
from raymem.serving.server import bind
from raymem.storage.store import ColdStore

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

USERS = [f"user{i}" for i in range(6)]
SIZES = ("--max-model-len", "1024", "--max-num-batched-tokens", "256", "--max-num-seqs", "16")


class Server(NamedTuple):
    url: str
    uri: str
    log: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    uri, log = str(folder / "memory"), folder / "log"
    names = [
        *(f"chats/{user}" for user in USERS),
        "chats/book",
        "chats/cold",
        "secret/bank",
        "team/gone",
        "team/notes",
        "team/seen",
    ]
    make_banks(uri, {(26,): names, (20,): ["chats/other"]})
    model = LanguageModel.load(MODEL)
    with raymem.connect(uri) as store:
        store.bank("chats/cold").detach()
        store.bank("team/gone").write(model.trace(topics["booleans"][:600], (26,), stream="s", run="r"))
    with bind("127.0.0.1", 0) as free:
        port = int(free.getsockname()[1])
    command = [sys.executable, "-m", "raymem.cli", "vllm", "serve", MODEL, "--store", uri, "--port", str(port), *SIZES]
    for setting in ("--write-banks", "--read-banks", "--attend-banks"):
        command += [setting, "chats/*", setting, "team/*"]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(process, url, log)
        yield Server(url, uri, log)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _wait(process, url, log: Path):
    deadline = time.monotonic() + 240
    while True:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)


@pytest.fixture
async def client(server):
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(
            AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=180)
        )


class Answer(NamedTuple):
    scores: list[float]
    text: str
    memory: object
    at_the_end: object


async def chat(client, user, memory=None, **more):
    """One streamed chat with nothing set but its length."""
    content = f"Hello, I am {user}. Tell me about the history of my town."
    body = {"max_tokens": 150, "messages": [{"role": "user", "content": content}]} | more
    extra = body.pop("extra_body", {}) | ({} if memory is None else {"memory": memory})
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    stream = await client.chat.completions.create(model=MODEL, logprobs=True, extra_body=extra, **body)
    scores, text, told, finished = [], "", [], None
    async for chunk in stream:
        told += [chunk.memory] if "memory" in (chunk.model_extra or {}) else []
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finished = choice.finish_reason or finished
            scores += [entry.logprob for entry in (choice.logprobs.content if choice.logprobs else None) or []]
    assert finished in ("stop", "length")
    # the first chunk and the one with the usage
    assert len(told) == 2 * (memory is not None or "kv_transfer_params" in extra)
    return Answer(scores, text, *(told or [None, None]))


async def get(client, path):
    return await client.get(f"/raymem/{path}", cast_to=object)


async def post(client, path, **body):
    return await client.post(f"/raymem/{path}", body=body, cast_to=object)


async def written(client):
    """What was streamed, once nothing waits any more."""
    while True:
        streamed = (await get(client, "stats"))["streamed"]
        if streamed["rows_seen"] == streamed["rows_written"] + streamed["rows_shed"]:
            return streamed
        await asyncio.sleep(0.1)


async def test_chats_at_the_defaults_side_by_side_are_language_and_each_in_its_own_bank(server, client):
    wishes = [chat(client, user, {"write": f"chats/{user}", "stream": user}) for user in USERS]
    # as other clients of vLLM ask
    raw = {"kv_transfer_params": {"raymem": {"bank": "chats/user0", "stream": "raw"}}}
    wishes += [chat(client, "raw", extra_body=raw, max_tokens=20), chat(client, "plain", max_tokens=20)]
    # a seed, and a prompt that comes in pieces: vLLM alone ends its engine here
    long = [{"role": "user", "content": topics["assignment"][:3000]}]
    wishes += [chat(client, "seeded", {"write": "chats/user0"}, seed=3, messages=long, max_tokens=20)]
    answers = await asyncio.gather(*wishes)
    streamed = await written(client)
    # about -2.7 for what this model says at length, -6.3 with vLLM's own CPU kernels; one answer alone may stray
    every = [score for answer in answers for score in answer.scores]
    assert sum(every) / len(every) > -4.5
    assert all(answer.text.strip() for answer in answers)
    assert len({answer.text for answer in answers}) == len(answers)
    assert (streamed["requests_refused"], streamed["rows_shed"], streamed["traces_shed"]) == (0, 0, 0)
    assert answers[0].memory == {"write": {"bank": "chats/user0", "stream": "user0"}}
    assert answers[-2].memory is None
    store = ColdStore.open(server.uri)
    for answer, user in zip(answers, USERS, strict=False):
        parts = list(store.journal(store.catalog.get(f"chats/{user}")).scan())
        streams = [stream for part in parts for stream in part.streams]
        # the prompt, and the answer but for its last token
        assert streams.count(user) > len(answer.scores)
    assert server.log.read_text().count("raymem's is used") == 2


def perplexity(answer):
    scores = [next(iter(found.values()))["logprob"] for found in answer.choices[0].prompt_logprobs[1:]]
    return math.exp(-sum(scores) / len(scores))


async def test_what_one_agent_wrote_is_read_by_others_at_once_each_from_its_own_bank(client):
    text = topics["typesseq"][:2400]
    ask = {"model": MODEL, "prompt": text, "max_tokens": 1}
    (first,) = (await client.completions.create(**ask, extra_body={"memory": {"write": "chats/book"}}),)
    assert first.memory == {"write": {"bank": "chats/book", "stream": "chats/book"}}
    rows = (await written(client), (await client.completions.create(**ask)).usage.prompt_tokens)[1]
    # nothing was attached by hand: the first request that reads a bank attaches it
    reads = [["chats/book"], ["chats/user1"], [], ["chats/book", "chats/user2"], ["chats/book"]]
    score = {"prompt_logprobs": 0}
    answers = await asyncio.gather(
        *(client.completions.create(**ask, extra_body={**score, "memory": {"read": read}}) for read in reads),
        client.completions.create(**ask, extra_body=score),
    )
    known, other, none, both, again, plain = map(perplexity, answers)
    assert none == plain
    assert known < 0.7 * plain
    assert other < 1.05 * plain
    assert max(known, both, again) < other
    assert "memory" not in answers[-1].model_extra
    assert answers[3].memory["read"][0] == {"bank": "chats/book", "rows": rows}
    banks = await get(client, "banks")
    assert set(banks) == {"chats/book", "chats/user1", "chats/user2"}
    assert banks["chats/book"]["rows"] == rows
    assert banks["chats/book"]["bytes"] > rows * 576
    # streamed, at temperature 1, while it writes to another bank
    wishes = [chat(client, user, {"read": ["chats/book"], "write": f"chats/{user}"}, max_tokens=40) for user in USERS]
    before = (await get(client, "stats"))["read"]["rows_mixed"]
    chats = await asyncio.gather(*wishes)
    assert all(each.memory["read"] == [{"bank": "chats/book", "rows": rows}] for each in chats)
    stats = await get(client, "stats")
    assert stats["read"]["rows_mixed"] - before >= sum(len(each.scores) for each in chats)
    assert stats["read"]["missing"] == {}


async def test_attention_sees_what_another_agent_wrote_streamed_and_at_once(server, client):
    text = topics["string-methods"]
    seen = await client.completions.create(
        model=MODEL, prompt=text[:2400], max_tokens=1, extra_body={"memory": {"write": "team/seen"}}
    )
    rows = seen.usage.prompt_tokens
    await written(client)
    ask = {"model": MODEL, "prompt": text[2400:3400], "max_tokens": 1}
    wishes = [{"attend": ["team/seen"], "rows": 256}, {"attend": ["team/seen"], "rows": 256, "read": ["team/seen"]}]
    # nothing was attached by hand: the first request waits until the engine has read the bank
    answers = await asyncio.gather(
        *(client.completions.create(**ask, extra_body={"prompt_logprobs": 0, "memory": wish}) for wish in wishes),
        client.completions.create(**ask, extra_body={"prompt_logprobs": 0}),
    )
    attended, both, plain = map(perplexity, answers)
    assert max(attended, both) < 0.9 * plain
    told = answers[0].memory["attend"]
    assert (told["banks"], told["rows"]) == (["team/seen"], 256)
    assert answers[0].usage.prompt_tokens == answers[2].usage.prompt_tokens
    assert (await get(client, "banks"))["team/seen"]["attended_rows"] == rows
    wish = {"attend": ["team/seen"], "rows": 128, "refresh": 16, "read": ["team/seen"]}
    about = [{"role": "user", "content": f"Explain this: {text[1700:2300]}"}]
    wishes = [chat(client, user, wish | {"write": f"chats/{user}"}, max_tokens=40, messages=about) for user in USERS]
    chats = await asyncio.gather(*wishes, chat(client, "plain", max_tokens=20))
    for each in chats[:-1]:
        assert each.memory["attend"] == {"banks": ["team/seen"], "asked": 128}
        assert each.at_the_end["attend"]["rows"] == 128
    # what has nothing to do with the bank attends to nothing, and is told
    answer = await chat(client, "ann", {"attend": ["team/seen"]}, max_tokens=2)
    assert answer.at_the_end["attend"]["rows"] == 0
    every = [score for each in chats for score in each.scores]
    assert sum(every) / len(every) > -4.5


async def test_a_bank_that_goes_while_it_is_attended_is_told_at_the_end_of_a_stream(server, client):
    wish = {"attend": ["team/gone"], "rows": 128}
    await chat(client, "ann", wish, max_tokens=2)
    with raymem.connect(server.uri) as store:
        store.delete("team/gone")
    # the engine notices within half a second; where a request enters, the bank is taken to be there for ten
    await asyncio.sleep(2)
    with pytest.raises(APIError, match="team/gone"):
        await chat(client, "ann", wish, max_tokens=2)
    # the next one hears it at once, and one that does not require memory goes on
    assert (await refusal(chat(client, "ann", wish, max_tokens=2)))[0] == 404
    answer = await chat(client, "ann", wish | {"required": False}, max_tokens=2)
    assert answer.memory["skipped"][0]["use"] == "attend"


async def refusal(asked):
    with pytest.raises(APIStatusError) as refused:
        await asked
    return refused.value.status_code, refused.value.body["message"]


@pytest.mark.parametrize(
    ("memory", "status", "says"),
    [
        ({"write": "chats/nobody"}, 404, "chats/nobody"),
        ({"read": ["chats/nobody"]}, 404, "chats/nobody"),
        ({"write": "secret/bank"}, 403, "'secret/bank' is not among this engine's write_banks"),
        ({"read": ["secret/bank"]}, 403, "read_banks"),
        ({"attend": ["secret/bank"]}, 403, "attend_banks"),
        ({"attend": ["chats/nobody"]}, 404, "chats/nobody"),
        ({"attend": ["chats/book"], "rows": -1}, 422, "rows"),
        ({"write": "chats/cold"}, 409, "attach it first"),
        ({"read": ["chats/cold"]}, 409, "attach it first"),
        ({"write": "chats/other"}, 409, "layers"),
        ({"read": ["chats/other"]}, 409, "layers"),
        ({"write": "chats/../secret"}, 422, "chats/../secret"),
        ({"reads": ["chats/book"]}, 422, "memory.reads is ['chats/book']"),
        ({"read": "chats/book"}, 422, "memory.read is 'chats/book'"),
        ({"stream": "ann"}, 422, "without memory.write"),
        ("chats/book", 422, "give an object"),
    ],
    ids=str,
)
async def test_a_wish_that_cannot_be_met_is_an_error_that_the_caller_hears(client, memory, status, says):
    ask = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    for stream in (False, True):
        got = await refusal(client.chat.completions.create(**ask, stream=stream, extra_body={"memory": memory}))
        assert got[0] == status
        assert says in got[1]


async def test_other_ways_to_ask_that_would_pass_in_silence_are_refused_too(client):
    ask = {"model": MODEL, "prompt": "Hello", "max_tokens": 1}
    for extra, says in [
        ({"kv_transfer_params": {"raymem": {"bnak": "chats/book"}}}, "bnak"),
        ({"kv_transfer_params": {"raymem": {"bank": "chats/book"}}, "memory": {"read": ["chats/book"]}}, "keep memory"),
        ({"vllm_xargs": {"raymem": "chats/book"}}, "say memory instead"),
        ({"memory": {"read": ["chats/book"]}, "use_beam_search": True, "n": 2}, "beam search"),
    ]:
        status, said = await refusal(client.completions.create(**ask, extra_body=extra))
        assert (status, says in said) == (422, True), said
    hello = [{"role": "user", "content": "Hello"}]
    body = {"model": MODEL, "max_tokens": 1, "memory": {"read": ["chats/book"]}}
    for path, text in [
        ("responses", {"input": "Hello"}),
        ("messages", {"messages": hello}),
        ("chat/completions/batch", {"messages": [hello]}),
    ]:
        status, said = await refusal(client.post(f"/{path}", body=body | text, cast_to=object))
        assert (status, "not by this address" in said) == (422, True), (path, said)


async def test_a_request_that_does_not_require_memory_goes_on_without_and_is_told(client):
    wish = {"read": ["chats/user1", "chats/nobody"], "write": "chats/cold", "required": False}
    answer = await chat(client, "ann", wish, max_tokens=5)
    assert [(skip["bank"], skip["code"]) for skip in answer.memory["skipped"]] == [
        ("chats/cold", "bank_detached"),
        ("chats/nobody", "bank_not_found"),
    ]
    assert [read["bank"] for read in answer.memory["read"]] == ["chats/user1"]
    assert "write" not in answer.memory
    # what is not allowed is refused all the same
    assert (await refusal(chat(client, "ann", wish | {"write": "secret/bank"})))[0] == 403


async def test_callers_attach_and_detach_what_they_may(client):
    state = await post(client, "attach", bank="chats/user3")
    assert state["live"]
    assert (await get(client, "banks"))["chats/user3"] == state
    assert await post(client, "detach", bank="chats/user3") is True
    assert "chats/user3" not in await get(client, "banks")
    assert await post(client, "detach", bank="chats/user3") is False
    assert (await refusal(post(client, "attach", bank="secret/bank")))[0] == 403
    assert (await refusal(post(client, "attach", bank="chats/nobody")))[0] == 404
    assert (await refusal(post(client, "attach", bank="chats")))[0] == 422
    assert (await refusal(post(client, "attach", name="chats/user3")))[0] == 400


async def test_the_examples_client_shows_what_memory_does(server, run_example, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/v1")
    printed = await asyncio.to_thread(run_example, "vllm_openai_client.py")
    scores = map(float, re.findall(r": perplexity (\d+\.\d\d)$", printed, re.M))
    without, mixed, attended, both = scores
    assert max(mixed, attended, both) < without
    assert "streamed with {'attend': {'banks': ['team/notes'], 'asked': 256}}" in printed
    assert "a bank that isn't there: 404" in printed


async def test_completions_with_stop_strings_and_several_answers(client):
    ask = {"prompt": "Once upon a time, in a small village,", "n": 3, "max_tokens": 60, "stop": ["."], "logprobs": 1}
    wish = {"write": "chats/user1", "read": ["chats/book"]}
    answer = await client.completions.create(model=MODEL, **ask, extra_body={"memory": wish})
    texts = [choice.text for choice in answer.choices]
    assert len(set(texts)) == 3
    assert not any("." in text for text in texts)
    every = [score for choice in answer.choices for score in choice.logprobs.token_logprobs]
    assert sum(every) / len(every) > -4.5
    assert answer.memory["read"][0]["bank"] == "chats/book"
