import asyncio
import itertools
import sys

import httpx
import pytest
import torch

from raymem import BankSpec, KeySpec, Readout, Settings, Trace, connect
from raymem.client.local import LocalBackend
from raymem.config import HostSettings
from raymem.encode.fit import bundled_texts, fit, read_sample
from raymem.errors import FingerprintMismatch, MissingExtra, TooLarge
from raymem.lm.fingerprint import fingerprint
from raymem.lm.models import LanguageModel
from raymem.serving.recall import AFTER, BEFORE, LONGEST, MAX_TOKENS, RecallModel, _candidates, find_passages

FACT = "The locker code assigned to Miriam is 4817, and she keeps the spare key under the blue flower pot."
STORY = (
    "The harbour was quiet that morning, and the fishing boats lay in a row along the old stone wall. "
    "A baker carried warm bread across the square while the church bells rang for the first time. "
    f"{FACT} "
    "Far out at sea a storm was gathering, and the lighthouse keeper wrote its bearing into his log. "
    "By noon the market had filled with farmers, and nobody looked at the sky any more."
)
UNRELATED = "Quarterly revenue of the semiconductor division rose by twelve percent."


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.load("smollm2-135m")


@pytest.fixture(scope="module")
def told(tmp_path_factory, run_gateway, model):
    """A gateway whose banks were told the story: one that keeps rows, one that keeps a state, one of another model."""
    texts = bundled_texts()[:8]
    layers = (1,)
    calibration = fit(model.content_hash, layers, read_sample(model, layers, texts))
    tokens = model.encode(STORY)
    trace = Trace(model.run(tokens, layers).hidden_TLd.clone(), tokens, "diary", "monday")
    mark = fingerprint(model, layers)
    settings = Settings(host=HostSettings(partial_s=0.5))
    with run_gateway(tmp_path_factory.mktemp("recall") / "memory", settings) as url:
        with connect(url) as store:
            store.put_calibration(calibration)
            for kind in ("spalm", "titans"):
                spec = BankSpec(kind=kind, fingerprint=mark, key=KeySpec(function="window", window=8))
                store.create(f"lab/{kind}", spec).write(trace)
            spec = spec.model_copy(update={"kind": "spalm"})
            store.create("lab/parts", spec, partitions=2).write(trace)
            other = mark.model_copy(update={"tokenizer": "another"})
            store.create("lab/other", BankSpec(kind="spalm", fingerprint=other))
        yield url


def ask(url: str, bank: str, text: str, k: int = 3, **more: bool) -> httpx.Response:
    return httpx.post(f"{url}/v1/banks/lab/{bank}/recall", json={"text": text, "k": k} | more, timeout=60)


def test_a_question_finds_the_words_that_were_written(told, model):
    answer = ask(told, "spalm", "The locker code assigned to Miriam is").json()
    best = answer["spans"][0]
    assert answer["provenance"]
    assert "4817" in best["text"]
    assert (best["stream"], best["run"]) == ("diary", "monday")
    where = slice(best["seq_from"], best["seq_to"])
    assert model.tokenizer.decode(model.encode(STORY)[where].tolist()) == best["text"]
    # one run was written, so a row's position is its seq
    assert all(best["seq_from"] <= position < best["seq_to"] for position in best["positions"])
    assert best["score"] > 0.9
    assert answer["spans"] == sorted(answer["spans"], key=lambda span: -span["relevance"])


def test_what_was_never_written_is_less_relevant(told):
    known, unknown = (ask(told, "spalm", text).json()["relevance"] for text in (FACT, UNRELATED))
    assert known > 0.8
    assert unknown < 0.5


def test_a_kind_without_rows_says_so_and_offers_words(told):
    answer = ask(told, "titans", FACT).json()
    assert (answer["provenance"], answer["spans"]) == (False, [])
    assert 0 < len(answer["candidates"]) <= 3
    assert answer["relevance"] > ask(told, "titans", UNRELATED).json()["relevance"]


def test_recall_goes_without_a_partition_that_is_late_where_that_is_allowed(told, raymem, monkeypatch):
    read, late = LocalBackend.read_part, asyncio.Event

    async def stalled(self, name, *args):
        if name.endswith(".p1"):
            await late().wait()
        return await read(self, name, *args)

    question = "The locker code assigned to Miriam is"
    whole = ask(told, "parts", question).json()
    assert ("4817" in whole["spans"][0]["text"], whole["missing"]) == (True, [])
    monkeypatch.setattr(LocalBackend, "read_part", stalled)

    some = ask(told, "parts", question, allow_partial=True).json()
    said = raymem("recall", "lab/parts", question, "-k", 3, "--allow-partial", "--store", told, "--json").json

    assert some == said
    assert (some["missing"], some["spans"]) == ([1], whole["spans"])
    assert "no answer from partition 1" in raymem("recall", "lab/parts", FACT, "--allow-partial", "--store", told).out


def test_another_models_bank_is_refused(told):
    answer = ask(told, "other", FACT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "fingerprint_mismatch")
    assert "gateway.model" in answer.json()["error"]["message"]


def test_a_text_that_is_no_question_is_refused(model):
    reader = RecallModel("smollm2-135m")
    reader._model = model
    with pytest.raises(TooLarge, match=str(MAX_TOKENS)):
        reader.states("word " * (MAX_TOKENS + 1), fingerprint(model, (1,)))
    with pytest.raises(FingerprintMismatch, match="smollm2-135m"):
        reader.states("hello", fingerprint(model, (1,)).model_copy(update={"content": "another"}))


def test_without_transformers_the_extra_is_named(monkeypatch, tiny):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"raymem\[lm\]") as caught:
        RecallModel("smollm2-135m").states("hello", tiny.fingerprint)
    assert caught.value.http_status == 503


def rows_found(*found: tuple[int, int, float]) -> Readout:
    """A readout of one neighbour a query: source, seq, score."""
    source, seq, score = (torch.tensor(column)[:, None] for column in zip(*found, strict=True))
    return Readout(
        **{"values_QV": torch.zeros(len(found), 0), "relevance_Q": torch.full((len(found),), 0.5)},
        **{"tokens_Qk": torch.zeros_like(seq), "scores_Qk": score, "source_Qk": source, "seq_Qk": seq, "pos_Qk": seq},
        sources=(("s", "one"), ("s", "two")),
    )


def test_neighbouring_rows_share_a_passage_and_runs_do_not():
    found = find_passages(rows_found((0, 100, 0.9), (0, 110, 0.8), (0, 500, 0.7), (1, 105, 0.6)), k=9)
    assert [(passage.run, passage.seq_from, passage.seq_to) for passage in found] == [
        ("one", 100 - BEFORE, 110 + AFTER),
        ("one", 500 - BEFORE, 500 + AFTER),
        ("two", 105 - BEFORE, 105 + AFTER),
    ]
    assert found[0].positions == {100, 110}
    assert found[0].score == pytest.approx(0.9)


def test_a_passage_stays_short_and_none_overlaps_its_neighbour():
    found = sorted(
        find_passages(rows_found(*((0, seq, 0.9) for seq in range(0, 1000, 7))), k=99), key=lambda it: it.seq_from
    )
    assert all(passage.seq_to - passage.seq_from <= LONGEST for passage in found)
    assert all(one.seq_to <= other.seq_from for one, other in itertools.pairwise(found))
    assert all(passage.seq_from <= seq < passage.seq_to for passage in found for seq in passage.positions)
    assert found[0].seq_from == 0


def test_places_without_a_candidate_are_left_out(model):
    reader = RecallModel("smollm2-135m")
    reader._model = model
    readout = Readout(
        values_QV=torch.zeros(2, 0),
        relevance_Q=torch.zeros(2),
        tokens_Qk=torch.tensor([[9, -1], [9, 4]]),
        scores_Qk=torch.tensor([[0.25, float("-inf")], [0.5, 0.125]]),
    )
    assert [(it.token, it.score) for it in _candidates(readout, reader, 5)] == [(9, 0.5), (4, 0.125)]
