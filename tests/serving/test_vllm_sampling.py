"""What a streaming and reading engine samples, held to the distribution that its model and a request's settings give.

The engine says, token by token, what the model made of the text so far: raw log-probabilities. What vLLM documents to
be done with them before a token is drawn is done here again, in numpy. Where the drawn token falls in that distribution
is then uniform between 0 and 1, whatever the text was: tokens of all positions and prompts go into one chi-square.
"""

import re
import time
from collections import Counter
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from scipy.stats import chi2, chisquare
from shared_engine import CHUNK, LAYERS, inputs_of

from raymem.serving.vllm import raymem_params

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

# so many likeliest tokens are listed for each position: the rest is one lump
LISTED = 400
LISTING = {"logprobs": LISTED, "flat_logprobs": True, "detokenize": False}
BINS = 10
ANSWER = 10
# a right engine fails once in a million runs; a wrong one never comes near it
SURE = 1e-6

SETTINGS = {
    "defaults": {},
    "cold": {"temperature": 0.3},
    "seeded": {"temperature": 1.0, "seed": 0},
    "top-p": {"top_p": 0.8},
    "top-k": {"top_k": 20},
    "all cutoffs": {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 0},
    "penalties": {"temperature": 0.8, "presence_penalty": 0.7, "frequency_penalty": 0.5},
    "repetition": {"temperature": 0.8, "repetition_penalty": 1.3, "top_k": 100},
}
USES = {
    "plain": {},
    "streaming": {"bank": "lab/written"},
    "mixing": {"read": ["lab/read"]},
    "both": {"bank": "lab/written", "read": ["lab/read"]},
}


def placed(raw, token, rng, seen, sampling, offset):
    """Where in the distribution a drawn token lies, 0 to 1; None for one that could not have been drawn.

    `raw` are log-probabilities by token, `seen` the prompt and the answer so far, `offset` what is missing to logits.
    """
    ids, raw_logits = np.array(list(raw)), np.array(list(raw.values()), dtype=np.float64) + offset
    prompt, answer = seen
    penalty, warmth = sampling.get("repetition_penalty", 1.0), sampling.get("temperature", 1.0)
    repeated = np.isin(ids, [*prompt, *answer])
    punished = np.where(raw_logits > 0, raw_logits / penalty, raw_logits * penalty)
    logits = np.where(repeated, punished, raw_logits)
    counts = Counter(answer)
    times = np.array([counts[int(i)] for i in ids])
    logits -= sampling.get("frequency_penalty", 0.0) * times + sampling.get("presence_penalty", 0.0) * (times > 0)
    # what is not listed is taken for as likely as the last that is, which matters little where it matters at all
    rest = max(0.0, 1.0 - sum(np.exp(list(raw.values()))))
    rest *= np.exp(min(raw.values()) * (1 / warmth - 1) + offset / warmth)
    return _place(ids, logits / warmth, rest, token, rng, sampling)


def _place(ids, logits, rest, token, rng, sampling):
    top_k, top_p = sampling.get("top_k", 0), sampling.get("top_p", 1.0)
    order = np.argsort(-logits, kind="stable")
    ids, logits = ids[order], logits[order]
    top = logits[0]
    weights = np.exp(logits - top)
    rest = rest * np.exp(-top)
    if top_k:
        # ties with the last one stay
        weights[logits < logits[min(top_k, len(logits)) - 1]] = 0.0
        rest = 0.0
    if top_p < 1:
        before = np.cumsum(weights) - weights
        weights[before >= top_p * (weights.sum() + rest)] = 0.0
        rest = 0.0
    whole = weights.sum() + rest
    at = np.flatnonzero(ids == token)
    if not len(at):
        return (weights.sum() + rng.random() * rest) / whole if rest else None
    # of tokens that are equally likely, as bfloat16 makes many, any may come first
    same = np.abs(logits - logits[at[0]]) < 1e-6
    mass = weights[same].sum()
    if mass == 0.0:
        return None
    return (weights[: np.flatnonzero(same)[0]].sum() + rng.random() * mass) / whole


def places(engine, outputs, sampling, reads, rng):
    """The places of all drawn tokens of some requests, by their position in the answer."""
    found = []
    for output in outputs:
        prompt = output.prompt_token_ids
        for answer in output.outputs:
            # what memory was mixed into are log-probabilities: nothing is missing to logits
            needed = "repetition_penalty" in sampling and not reads
            offsets = _offsets(engine, prompt, answer.token_ids) if needed else [0.0] * len(answer.token_ids)
            for i, token in enumerate(answer.token_ids):
                raw = _listed(answer.logprobs, i)
                seen = (prompt, answer.token_ids[:i])
                found.append((i, placed(raw, token, rng, seen, sampling, offsets[i])))
    return found


def _listed(logprobs, position):
    part = slice(logprobs.start_indices[position], logprobs.end_indices[position])
    # the drawn token comes first, and again among the likeliest
    return dict(zip(logprobs.token_ids[part], logprobs.logprobs[part], strict=True))


def _offsets(engine, prompt, answer):
    tokens = torch.tensor([*prompt, *answer])
    final_Td = engine.model.run(tokens, LAYERS).final_Td[len(prompt) - 1 : -1]
    return torch.logsumexp(engine.model.logits(final_Td), 1).tolist()


def chance(found):
    """How likely places as uneven as these are for a right engine."""
    counts = np.histogram(found, bins=BINS, range=(0, 1))[0]
    expected = len(found) / BINS
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum(), BINS - 1))


WRONG = [
    ({}, {"temperature": 0.7}),
    ({"temperature": 0.3}, {}),
    ({"top_p": 0.8}, {}),
    ({"top_k": 20}, {}),
    ({"presence_penalty": 2.0}, {}),
    ({"frequency_penalty": 1.0}, {}),
    ({"repetition_penalty": 1.5}, {}),
]


@pytest.mark.parametrize(("asked", "done"), WRONG)
def test_the_measure_itself_passes_what_is_right_and_sees_what_is_not(asked, done):
    rng = np.random.default_rng(0)
    found = {"right": [], "wrong": []}
    for _ in range(1000):
        logits = 2 * rng.standard_normal(40)
        offset = float(np.log(np.exp(logits).sum()))
        # what was said before are likely tokens, as in a text
        before = np.argsort(-logits)[:6].tolist()
        seen = (before[:3], before[3:] * 2)
        raw = dict(enumerate((logits - offset).tolist()))
        for name, settings in (("right", asked), ("wrong", done)):
            token = draw(logits, seen, settings, rng)
            found[name].append(placed(raw, token, rng, seen, asked, offset))
    assert None not in found["right"]
    assert chance(found["right"]) > SURE
    possible = [place for place in found["wrong"] if place is not None]
    assert len(possible) < 0.99 * len(found["wrong"]) or chance(possible) < SURE


def draw(logits, seen, settings, rng):
    """A token drawn as vLLM documents it, token by token and without numpy's short cuts."""
    prompt, answer = seen
    values = {token: float(value) for token, value in enumerate(logits)}
    for token in set(prompt) | set(answer):
        penalty = settings.get("repetition_penalty", 1.0)
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    for token in set(answer):
        values[token] -= settings.get("presence_penalty", 0.0)
        values[token] -= settings.get("frequency_penalty", 0.0) * answer.count(token)
    ranked = sorted(values, key=values.get, reverse=True)[: settings.get("top_k", len(values))]
    weights = [np.exp(values[token] / settings.get("temperature", 1.0)) for token in ranked]
    kept, mass = [], 0.0
    for token, weight in zip(ranked, weights, strict=True):
        if mass >= settings.get("top_p", 1.0) * sum(weights):
            break
        kept.append((token, weight))
        mass += weight
    return int(rng.choice([token for token, _ in kept], p=[weight / mass for _, weight in kept]))


@pytest.fixture(scope="module")
def drawn(engine):
    """Requests with all settings and uses side by side: their tokens' places, by use, setting and position."""
    from vllm import SamplingParams

    # the second makes a model repeat itself, so that drafts are accepted
    texts = ["Once upon a time, in a small village,", "again " * 12]
    prompts = [engine.model.encode(text).tolist() for text in texts]
    asked, params, ids = [], [], []
    for use, extra in USES.items():
        for name, sampling in SETTINGS.items():
            for prompt in prompts:
                # the same seed twice would be the same token twice
                seed = {"seed": 10 * len(asked)} if "seed" in sampling else {}
                asked.append((use, name))
                own = sampling | seed | {"extra_args": raymem_params(**extra)}
                # requests that read take the most time
                own["n"] = 2 if "read" in extra else 4
                params.append(SamplingParams(max_tokens=ANSWER, ignore_eos=True, **LISTING, **own))
                ids.append({"prompt_token_ids": prompt})
    outputs = engine.llm.generate(ids, params, use_tqdm=False)
    found, rng = {}, np.random.default_rng(0)
    for key, output in zip(asked, outputs, strict=True):
        use, name = key
        found.setdefault(key, []).extend(places(engine, [output], SETTINGS[name], "read" in USES[use], rng))
    return found


def assert_even(found):
    impossible = [i for i, place in found if place is None]
    # a cutoff may fall differently on sums that were rounded differently
    assert len(impossible) <= 0.005 * len(found), f"{len(impossible)} of {len(found)} tokens can't have been drawn"
    p = chance([place for _, place in found if place is not None])
    print(f"chance {p:.3f} of {len(found)} tokens")
    assert p > SURE


@pytest.mark.parametrize("setting", SETTINGS)
def test_tokens_are_drawn_as_the_settings_say(drawn, setting):
    assert_even([found for key, places in drawn.items() if key[1] == setting for found in places])


@pytest.mark.parametrize("use", USES)
def test_tokens_are_drawn_right_whatever_raymem_does(drawn, use):
    assert_even([found for key, places in drawn.items() if key[0] == use for found in places])


@pytest.mark.parametrize("position", [0, 1, 2, ANSWER - 1])
def test_tokens_of_every_position_are_drawn_right(drawn, position):
    assert_even([found for places in drawn.values() for found in places if found[0] == position])


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_first_tokens_of_many_seeds_have_the_models_own_frequencies(engine, temperature):
    prompt = engine.tokens("The three of them went to the", 20)
    (whole,) = engine.draw([prompt], max_tokens=1, logprobs=-1, flat_logprobs=True, detokenize=False, temperature=0.0)
    raw = _listed(whole.outputs[0].logprobs, 0)
    assert len(raw) == 49152
    weights = {token: np.exp(logprob / temperature) for token, logprob in raw.items()}
    scale, count = sum(weights.values()), 400
    extra = raymem_params("lab/written")
    (output,) = engine.draw([prompt], n=count, max_tokens=1, seed=1000, temperature=temperature, extra_args=extra)
    found = Counter(answer.token_ids[0] for answer in output.outputs)
    # a bin is expected to hold 5 at least, and all other tokens are one
    often = [token for token, weight in weights.items() if count * weight / scale >= 5]
    expected = [count * weights[token] / scale for token in often]
    counts = [found[token] for token in often]
    p = chisquare([*counts, count - sum(counts)], [*expected, count - sum(expected)]).pvalue
    print(f"chance {p:.3f} of {count} first tokens in {len(often) + 1} bins")
    assert len(often) >= 2
    assert p > SURE


def runs(engine, bank):
    """The tokens of each run, in order."""
    return [[token for _, token, _ in rows] for rows in engine.rows(bank).values()]


def test_chat_at_the_defaults_and_long_answers_are_drawn_right_and_in_the_bank_to_the_end(engine):
    from vllm import SamplingParams

    subjects = ("a fox", "the sea", "rain")
    talks = [[{"role": "user", "content": f"Tell me a long story about {what}."}] for what in subjects]
    params = SamplingParams(max_tokens=200, extra_args=raymem_params("lab/chat"), **LISTING)
    outputs = engine.llm.chat(talks, params, use_tqdm=False)
    assert_even(places(engine, outputs, {}, reads=False, rng=np.random.default_rng(0)))
    engine.stats()
    rows = runs(engine, "lab/chat")
    for output in outputs:
        assert inputs_of(output) in rows


def test_what_bounds_an_answer_holds_for_tokens_that_are_drawn(engine):
    prompt = engine.tokens("Question: is the sky blue? Answer:", 20)
    extra = raymem_params("lab/chat")
    only = engine.tokens(" yes no maybe", 3)
    (bound,) = engine.draw([prompt], allowed_token_ids=only, n=4, max_tokens=20, extra_args=extra)
    assert {token for answer in bound.outputs for token in answer.token_ids} <= set(only)
    (stopped,) = engine.draw([prompt], stop=["e"], max_tokens=200, extra_args=extra)
    assert "e" not in stopped.outputs[0].text
    assert stopped.outputs[0].finish_reason == "stop"
    (clean,) = engine.draw([prompt], bad_words=[" the", "the"], n=4, max_tokens=60, temperature=0.5, extra_args=extra)
    assert not any(re.search(r"\bthe\b", answer.text) for answer in clean.outputs)
    (longer,) = engine.draw([prompt], min_tokens=40, max_tokens=40, n=4, temperature=1.3, extra_args=extra)
    assert {len(answer.token_ids) for answer in longer.outputs} == {40}
    engine.stats()
    # vLLM looks for stop strings outside of its engine, which goes on until it is told: there may be more rows
    said = inputs_of(stopped)
    assert any(tokens[: len(said)] == said for tokens in runs(engine, "lab/chat"))


def test_structured_output_keeps_its_grammar_when_it_is_drawn(engine):
    from vllm.sampling_params import StructuredOutputsParams

    prompts = [engine.tokens(f"A number with eight digits, like {i}:", 20) for i in (11111111, 77777777, 12345678)]
    grammar = StructuredOutputsParams(regex="[0-9]{8}")
    extra = raymem_params("lab/chat", read=["lab/read"])
    for output in engine.draw(prompts, structured_outputs=grammar, n=4, max_tokens=30, extra_args=extra):
        for answer in output.outputs:
            assert re.fullmatch("[0-9]{8}", answer.text)


@pytest.mark.parametrize("refused", [{"min_p": 0.1}, {"logit_bias": {5: 1.0}}])
def test_what_vllm_cannot_do_beside_extraction_it_refuses(engine, refused):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="not yet supported with speculative decoding"):
        engine.draw([[1, 2, 3]], **refused)


def test_a_seeded_request_whose_prompt_comes_in_pieces_says_the_same_each_time(engine):
    long, short = engine.tokens(topics["string-methods"], 3 * CHUNK - 11), engine.tokens("Once upon a time", 5)
    seeded = {"seed": 5, "max_tokens": 12, "extra_args": raymem_params("lab/chat")}
    (first,) = engine.draw([long], **seeded)
    others = engine.draw([short, long, short], **seeded)
    assert others[1].outputs[0].token_ids == first.outputs[0].token_ids


def test_a_bank_that_requests_may_not_touch_gets_no_row_and_the_others_lose_none(engine):
    from vllm import SamplingParams

    before = engine.stats()["streamed"]
    prompt = {"prompt_token_ids": engine.tokens(topics["lists"], 30)}
    banks = ["secret/bank", "lab/chat", "secret/bank", "laboratory/x"]
    params = [SamplingParams(max_tokens=5, ignore_eos=True, extra_args=raymem_params(bank)) for bank in banks]
    outputs = engine.llm.generate([prompt] * len(banks), params, use_tqdm=False)
    after = engine.stats()["streamed"]
    assert all(len(output.outputs[0].token_ids) == 5 for output in outputs)
    assert after["requests_refused"] - before["requests_refused"] == 3
    assert after["rows_written"] - before["rows_written"] == 34
    assert inputs_of(outputs[1]) in runs(engine, "lab/chat")
    assert engine.rows("secret/bank") == {}


def test_reads_that_are_not_allowed_or_too_many_cost_the_memory_alone(engine):
    from vllm import SamplingParams

    before = engine.stats()["read"]
    ids = engine.tokens(topics["string-methods"], 60)
    prompt = {"prompt_token_ids": ids}
    asked = [["lab/written"], [f"lab/{i}" for i in range(20_000)], ["lab/read"], ["lab/read"] * 20_000, 7, []]

    def score(read):
        extra = {"kv_transfer_params": {"raymem": {"read": read}}}
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, extra_args=extra)
        started = time.perf_counter()
        (output,) = engine.llm.generate([prompt], params, use_tqdm=False)
        scores = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
        return scores, time.perf_counter() - started

    forbidden, many, read, repeated, nonsense, plain = (score(read) for read in asked)
    assert forbidden[0] == many[0] == nonsense[0] == plain[0]
    assert repeated[0] == read[0] != plain[0]
    # 13 s when each name was a read
    assert repeated[1] < 5
    after = engine.stats()["read"]
    assert after["requests_refused"] - before["requests_refused"] == 3
