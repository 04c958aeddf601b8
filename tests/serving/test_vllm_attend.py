"""A real engine whose requests attend to banks: the rows, whose they are, and what goes wrong."""

import time
from dataclasses import replace
from pydoc_data.topics import topics

import pytest
import torch
from shared_engine import BLOCK, LAYERS, LENGTH

import raymem
from raymem.errors import BankNotFound
from raymem.lm.attending import attend_pass, rebuild
from raymem.memory.choice import Held, choose
from raymem.serving.vllm import attach_rows, detach_rows, raymem_params, replace_rows, rows_kept
from raymem.storage.store import ColdStore
from raymem.types import MemoryTokens

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

ROWS = 8 * BLOCK
# bf16 in the engine beside float32, over up to 30 layers
CLOSE = 0.12


def memory_of(model, tokens) -> MemoryTokens:
    keys_LNHd, values_LNHd = rebuild(model, torch.tensor(tokens))
    none_N = torch.zeros(len(tokens), dtype=torch.int64)
    return MemoryTokens(
        torch.arange(len(tokens)), torch.tensor(tokens), none_N, none_N, (), 1.0, "", keys_LNHd, values_LNHd
    )


def expected(model, rows, prompt, answer, chosen=slice(None)) -> list[float]:
    """Log-probabilities of an answer by transformers, with chosen ones of a text's rows before the prompt."""
    memory = memory_of(model, rows)
    memory = replace(
        memory,
        pos_N=memory.pos_N[chosen],
        keys_LNHd=memory.keys_LNHd[:, chosen],
        values_LNHd=memory.values_LNHd[:, chosen],
    )
    done = attend_pass(model, memory, torch.tensor([*prompt, *answer]), (26,))
    logits_TV = model.logits(done.final_Td[len(prompt) - 1 : -1])
    return torch.log_softmax(logits_TV.float(), -1).gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()


def attend(engine, prompts, banks, bank=None, read=(), **sampling):
    asked = {name: sampling.pop(name) for name in ("rows", "refresh", "required") if name in sampling}
    extra = raymem_params(bank, read=read, attend=banks, **({"rows": ROWS} | asked))
    return engine.draw(
        prompts, **{"temperature": 0.0, "ignore_eos": True, "logprobs": 0, "extra_args": extra} | sampling
    )


def plain(engine, prompts, **sampling):
    return engine.draw(prompts, **{"temperature": 0.0, "ignore_eos": True, "logprobs": 0} | sampling)


def tokens_of(output) -> list[int]:
    return list(output.outputs[0].token_ids)


def sampled(output) -> list[float]:
    pairs = zip(output.outputs[0].logprobs, tokens_of(output), strict=True)
    return [found[token].logprob for found, token in pairs]


def said(output) -> dict:
    return output.kv_transfer_params["raymem"]


@pytest.fixture(scope="module")
def texts(engine):
    """Two banks of as many rows, each a text that one request streamed."""
    found = {
        "lab/seen": engine.tokens(topics["string-methods"], ROWS),
        "lab/other-seen": engine.tokens(topics["typesseq"], ROWS),
    }
    for bank, tokens in found.items():
        engine.run([tokens], bank, max_tokens=1)
    engine.stats()
    for bank in found:
        assert attach_rows(engine.llm, bank)[:4] == (ROWS, 0, 0, ROWS)
    return found


@pytest.fixture(scope="module")
def prompt(engine):
    """What follows the first bank's text."""
    return engine.tokens(topics["string-methods"], ROWS + 60)[ROWS:]


def test_an_answer_with_attended_rows_is_that_of_transformers(engine, texts, prompt):
    for bank, rows in texts.items():
        (output,) = attend(engine, [prompt], [bank], max_tokens=8)
        found = said(output)["attended"]
        assert (found["banks"], found["rows"]) == ([bank], ROWS)
        assert 0 < found["relevance"] <= 1
        assert output.prompt_token_ids == prompt
        assert sampled(output) == pytest.approx(expected(engine.model, rows, prompt, tokens_of(output)), abs=CLOSE)
    (alone,) = plain(engine, [prompt], max_tokens=8)
    assert tokens_of(alone) != tokens_of(output)


def test_attaching_again_rebuilds_nothing(engine, texts):
    assert attach_rows(engine.llm, "lab/seen")[:4] == (ROWS, ROWS, 0, 0)


def test_rows_that_the_store_keeps_are_loaded_and_answer_the_same(engine, texts, prompt):
    cold = ColdStore.open(engine.uri)
    stored = cold.attended(cold.catalog.get("lab/other-seen"))
    for rows in rows_kept(engine.llm, "lab/other-seen"):
        stored.put(rows.checked(), {seq: seq for seq in range(ROWS)}, 10**9)
    assert detach_rows(engine.llm, "lab/other-seen") is True
    assert attach_rows(engine.llm, "lab/other-seen")[:4] == (ROWS, 0, ROWS, 0)
    (output,) = attend(engine, [prompt], ["lab/other-seen"], max_tokens=8)
    wanted = expected(engine.model, texts["lab/other-seen"], prompt, tokens_of(output))
    # the store keeps int8
    assert sampled(output) == pytest.approx(wanted, abs=2 * CLOSE)


def test_rows_made_of_a_bank_are_attended_in_its_place(engine, texts, prompt):
    places = torch.arange(0, ROWS, 4)
    whole = memory_of(engine.model, texts["lab/other-seen"])
    made = replace(
        whole,
        pos_N=torch.full_like(places, -1),
        tokens_N=torch.full_like(places, -1),
        keys_LNHd=whole.keys_LNHd[:, places],
        values_LNHd=whole.values_LNHd[:, places],
    )
    assert replace_rows(engine.llm, "lab/other-seen", made)[:4] == (len(places), 0, len(places), 0)
    (output,) = attend(engine, [prompt], ["lab/other-seen"], max_tokens=8)
    assert said(output)["attended"]["rows"] == len(places)
    wanted = expected(engine.model, texts["lab/other-seen"], prompt, tokens_of(output), places)
    assert sampled(output) == pytest.approx(wanted, abs=2 * CLOSE)
    assert sum(attach_rows(engine.llm, "lab/other-seen")[2:4]) == ROWS


def test_two_banks_never_share_blocks_and_the_same_rows_do(engine, texts, prompt):
    outputs = {bank: attend(engine, [prompt], [bank], max_tokens=4)[0] for bank in texts}
    again = {bank: attend(engine, [prompt], [bank], max_tokens=4)[0] for bank in texts}
    assert tokens_of(outputs["lab/seen"]) != tokens_of(outputs["lab/other-seen"])
    for bank in texts:
        assert again[bank].num_cached_tokens >= ROWS
        assert sampled(again[bank]) == pytest.approx(sampled(outputs[bank]), abs=CLOSE)


def test_requests_that_ask_for_nothing_are_the_same_bit_for_bit_beside_those_that_attend(engine, texts, prompt):
    from vllm import SamplingParams

    prompts = [prompt, prompt[:30], prompt[7:50]]
    params = {"temperature": 0.0, "ignore_eos": True, "logprobs": 5, "max_tokens": 12}
    extra = raymem_params(attend=["lab/seen"], rows=ROWS)
    mixed = [SamplingParams(**params, extra_args=extra if place % 2 else None) for place in range(6)]
    ids = [{"prompt_token_ids": prompts[place // 2]} for place in range(6)]
    beside = engine.llm.generate(ids, mixed, use_tqdm=False)
    alone = engine.llm.generate(ids[::2] * 2, SamplingParams(**params), use_tqdm=False)
    for found, wanted in zip(beside[::2], alone, strict=False):
        assert tokens_of(found) == tokens_of(wanted)
        assert found.kv_transfer_params is None
    assert tokens_of(beside[1]) != tokens_of(beside[0])


def test_several_at_once_sampled_streaming_and_mixing_too(engine, texts, prompt):
    prompts = [prompt[:20], prompt[5:40], prompt]
    seen = dict(temperature=1.0, seed=3, n=2, max_tokens=9)
    both = ["lab/seen", "lab/other-seen"]
    outputs = attend(engine, prompts, both, "lab/chat", read=["lab/read"], **seen)
    runs = list(engine.traces("lab/chat").values())
    for ids, output in zip(prompts, outputs, strict=True):
        for drawn in output.outputs:
            assert len(drawn.token_ids) == 9
            # the bank gets the request's own tokens, and no row of the banks that it attended to
            assert [*ids, *drawn.token_ids][:-1] in [run.tokens.tolist() for run in runs]
    (whole,) = attend(engine, [prompt], both, max_tokens=8)
    assert said(whole)["attended"]["rows"] == ROWS


def test_preempted_requests_get_their_rows_again(engine, texts, prompt):
    prompts, rows = [prompt[at : at + 20] for at in range(0, 42, 7)], 4 * BLOCK
    held = torch.tensor(texts["lab/seen"])
    before = preemptions(engine)
    outputs = attend(engine, prompts, ["lab/seen"], max_tokens=90, rows=rows)
    assert preemptions(engine) > before
    zeros, places = torch.zeros_like(held), torch.arange(len(held))
    for ids, output in zip(prompts, outputs, strict=True):
        # bf16 may decide between two tokens as it likes: what was said is scored
        chosen = choose(Held(None, held, zeros, places), None, torch.tensor(ids), rows, method="bm25").place_N
        wanted = expected(engine.model, texts["lab/seen"], ids, tokens_of(output), chosen)
        assert sampled(output) == pytest.approx(wanted, abs=2 * CLOSE)


def preemptions(engine) -> int:
    return metric(engine, "vllm:num_preemptions")


def metric(engine, name) -> int:
    (value,) = [found.value for found in engine.llm.get_metrics() if found.name == name]
    return value


def test_a_prompt_is_scored_with_rows_before_it(engine, texts, prompt):
    (output,) = attend(engine, [prompt], ["lab/seen"], max_tokens=1, prompt_logprobs=0)
    assert output.prompt_logprobs[0] is None
    scores = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
    wanted = expected(engine.model, texts["lab/seen"], prompt[:1], prompt[1:])
    assert scores == pytest.approx(wanted, abs=3 * CLOSE)
    assert sum(scores) == pytest.approx(sum(wanted), abs=CLOSE * len(scores) / 4)


@pytest.mark.parametrize(
    ("bank", "reason"),
    [
        ("lab/nowhere", "keeps no rows of bank 'lab/nowhere'"),
        ("secret/bank", "attend_banks"),
        ("lab/plain", "keeps no rows"),
    ],
)
def test_a_request_without_memory_is_the_plain_one_and_says_why(engine, texts, prompt, bank, reason):
    (output,), (wanted,) = attend(engine, [prompt], [bank], max_tokens=6), plain(engine, [prompt], max_tokens=6)
    assert reason in said(output)["refused"]
    assert (tokens_of(output), sampled(output)) == (tokens_of(wanted), sampled(wanted))
    (refused,) = attend(engine, [prompt], [bank], max_tokens=6, required=True)
    assert len(tokens_of(refused)) == 1
    assert said(refused)["code"] == said(output)["code"]


def test_rows_take_the_room_that_the_context_has_left(engine, texts):
    ids = engine.tokens(topics["operator-summary"], LENGTH - 101)
    (output,) = attend(engine, [ids], ["lab/seen"], max_tokens=50)
    assert said(output)["attended"]["rows"] == 51
    assert len(tokens_of(output)) == 50
    (full,) = attend(engine, [engine.tokens(topics["operator-summary"], LENGTH - 1)], ["lab/seen"], max_tokens=50)
    assert "no room" in said(full)["refused"]


def test_rows_are_chosen_anew_while_a_request_runs_and_after_an_erasure(engine, texts, prompt):
    old, new = engine.tokens(topics["for"], 150), engine.tokens(topics["while"], 150)
    with raymem.connect(engine.uri) as store:
        bank = store.bank("lab/erased")
        for stream, tokens in (("alice", old), ("bob", new)):
            states = torch.ones(len(tokens), len(LAYERS), 576).bfloat16()
            bank.write(raymem.Trace(states, torch.tensor(tokens), stream, stream))
        assert attach_rows(engine.llm, "lab/erased").rebuilt == 300
        renewed = metric(engine, "vllm:raymem_choices_renewed")
        told = {"max_tokens": 140, "allowed_token_ids": sorted(set(new) - set(old))}
        (output,) = attend(engine, [old[:40]], ["lab/erased"], refresh=8, rows=64, **told)
        assert len(tokens_of(output)) == 140
        assert metric(engine, "vllm:raymem_choices_renewed") > renewed
        bank.erase(stream="alice")
    time.sleep(2)
    (left,) = attend(engine, [prompt], ["lab/erased"], max_tokens=6)
    assert said(left)["attended"]["rows"] == 150
    assert sampled(left) == pytest.approx(expected(engine.model, new, prompt, tokens_of(left)), abs=CLOSE)
    assert attach_rows(engine.llm, "lab/erased")[:4] == (150, 150, 0, 0)
    assert detach_rows(engine.llm, "lab/erased") is True
    assert detach_rows(engine.llm, "lab/erased") is False
    (gone,) = attend(engine, [prompt], ["lab/erased"], max_tokens=6)
    assert said(gone)["code"] == "bank_not_found"


def test_rows_are_attended_after_a_request_was_aborted(engine, texts, prompt):
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=100, extra_args=raymem_params(attend=["lab/seen"], rows=ROWS, refresh=4))
    core = engine.llm.llm_engine
    name = core.add_request("999999", {"prompt_token_ids": prompt}, params)
    for _ in range(5):
        core.step()
    core.abort_request([name or "999999"])
    while core.has_unfinished_requests():
        core.step()
    (output,) = attend(engine, [prompt], ["lab/seen"], max_tokens=2)
    assert said(output)["attended"]["rows"] == ROWS


def test_a_bank_of_another_model_is_refused_when_its_rows_are_attached(engine, texts):
    with pytest.raises(BankNotFound, match="lab/nowhere"):
        attach_rows(engine.llm, "lab/nowhere")
