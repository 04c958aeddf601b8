"""Models by name and path, and what their passes leave behind."""

import pytest
import torch
from modelzoo import save_tiny

from raymem.errors import InvalidInput, ModelNotFound
from raymem.lm.models import BUNDLED_MODEL, LanguageModel, content_hash, model_path, tokenizer_hash


@pytest.fixture(scope="module")
def model():
    return LanguageModel.load(BUNDLED_MODEL)


def test_a_folder_is_its_own_path(tmp_path):
    assert model_path(str(tmp_path)) == tmp_path


def test_an_unknown_model_is_named_with_what_there_is():
    with pytest.raises(ModelNotFound, match=r"no model 'gpt-17'.*smollm2-135m"):
        model_path("gpt-17")


def test_a_folder_without_a_model_says_what_is_missing(tmp_path):
    with pytest.raises(ModelNotFound, match=r"can't load .*config\.json"):
        LanguageModel.load(tmp_path)
    save_tiny(tmp_path / "tiny")
    (tmp_path / "tiny" / "model.safetensors").rename(tmp_path / "away")
    with pytest.raises(ModelNotFound, match="no weights"):
        content_hash(tmp_path / "tiny")
    (tmp_path / "away").rename(tmp_path / "tiny" / "model.safetensors")
    for file in (tmp_path / "tiny").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelNotFound, match="no tokenizer"):
        tokenizer_hash(tmp_path / "tiny")


def test_layers_are_counted_from_one_and_end_before_the_final_norm(model):
    tokens = model.encode("Layers are counted from one, and the last is before the norm.")
    done = model.run(tokens, (1, model.layers))
    reference = model._model(tokens[None], output_hidden_states=True)
    assert torch.equal(done.hidden_TLd[:, 0], reference.hidden_states[1][0])
    assert torch.equal(done.final_Td, reference.hidden_states[-1][0])
    assert torch.equal(model._model.model.norm(done.hidden_TLd[:, 1]), done.final_Td)


@pytest.mark.parametrize("layers", [(), (0,), (31,), (26, -1)])
def test_layers_that_are_not_there_are_refused(model, layers):
    with pytest.raises(InvalidInput, match="layers 1 to 30"):
        model.run(torch.tensor([1, 2]), layers)


def test_a_kept_pass_has_the_same_bits(model, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMEM_CACHE", str(tmp_path))
    tokens = model.encode("The same tokens, the same layers.")
    made = model.run_cached(tokens, (26,))
    kept = model.run_cached(tokens, (26,))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert all(torch.equal(a, b) for a, b in zip(made, kept, strict=True))
    assert torch.equal(model.logits(made.final_Td), model.logits(kept.final_Td))
    model.run_cached(tokens, (15,))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
