"""A text's rows compacted: the model's own queries and rows, and what a model predicts behind fewer of them."""

import pytest
import torch
from modelzoo import save_tiny

from raymem.errors import InvalidInput
from raymem.lm.attending import attend_pass, rebuild
from raymem.lm.compacting import _watch, compacted, reference_windows
from raymem.lm.models import LanguageModel

TOKENS = torch.arange(3, 103) * 5 % 256
RUNS = [TOKENS[:37], TOKENS[37:38], TOKENS[38:]]
LONG = {"max_position_embeddings": 256}
FAMILIES = {"llama": {}, "qwen3": {}, "gemma3_text": {"sliding_window": 200}, "phi": {}, "cohere": {}}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return LanguageModel.load(save_tiny(folder, request.param, **LONG, **FAMILIES[request.param]), torch.float32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return LanguageModel.load(save_tiny(tmp_path_factory.mktemp("llama") / "tiny", **LONG), torch.float32)


def test_a_watched_pass_shows_what_attention_is_given_and_changes_nothing(model):
    before = model.run(TOKENS, (1, 2))
    seen = _watch(model, TOKENS, [torch.tensor([3, 9])])
    assert seen.queries_LRHGd.shape[1] == 2
    keys_LTHd, values_LTHd = rebuild(model, TOKENS)
    torch.testing.assert_close(seen.keys_LTHd, model.rope.turn(keys_LTHd, torch.arange(len(TOKENS))))
    assert torch.equal(seen.values_LTHd, values_LTHd)
    after = model.run(TOKENS, (1, 2))
    assert torch.equal(before.hidden_TLd, after.hidden_TLd)
    assert model._model.config._attn_implementation == "sdpa"


def test_queries_are_those_whose_scores_the_model_uses(llama):
    places = torch.arange(0, len(TOKENS), 3)
    seen = _watch(llama, TOKENS, [places[:10], places[5:]])
    assert torch.equal(seen.token_R, places)
    attention = llama._model.model.layers[1].self_attn
    given = []
    handle = attention.o_proj.register_forward_pre_hook(lambda _module, inputs: given.append(inputs[0][0]))
    llama.run(TOKENS, (1,))
    handle.remove()
    scores = torch.einsum("thgd,shd->hgts", seen.queries_LRHGd[1], seen.keys_LTHd[1])
    scores = scores.masked_fill(torch.arange(len(TOKENS)) > places[:, None], float("-inf"))
    output = torch.einsum("hgts,shd->thgd", torch.softmax(scores, -1), seen.values_LTHd[1])
    torch.testing.assert_close(output.flatten(1), given[0][places], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["subsample", "mean", "match"])
def test_no_fewer_rows_are_the_rows_themselves(llama, how):
    found = compacted(llama, RUNS, len(TOKENS), how)
    keys, values = zip(*(rebuild(llama, run) for run in RUNS), strict=True)
    assert torch.equal(found.keys_LNHd, torch.cat(keys, 1))
    assert torch.equal(found.values_LNHd, torch.cat(values, 1))
    assert torch.equal(found.tokens_N, TOKENS)
    assert found.pos_N.tolist() == list(range(100))
    assert found.seq_N[35:40].tolist() == [35, 36, 0, 0, 1]
    assert found.source_N[36:39].tolist() == [0, 1, 2]


@pytest.mark.parametrize("rows", [1, 4, 11, 99])
@pytest.mark.parametrize("how", ["subsample", "mean", "match"])
def test_rows_of_several_runs_become_so_many(llama, how, rows):
    found = compacted(llama, RUNS, rows, how)
    assert len(found) == rows
    layers, _, heads, width = rebuild(llama, RUNS[0])[0].shape
    assert found.keys_LNHd.shape == found.values_LNHd.shape == (layers, rows, heads, width)
    assert bool(found.keys_LNHd.isfinite().all() and found.values_LNHd.isfinite().all())
    assert bool((found.pos_N >= 0).all()) == (how == "subsample")
    assert bool((found.tokens_N >= 0).all()) == (how == "subsample")
    # the same rows for all who ask
    assert torch.equal(found.keys_LNHd, compacted(llama, RUNS, rows, how).keys_LNHd)


@pytest.mark.parametrize("rows", [12, 40])
def test_a_pass_behind_fitted_rows_is_nearer_to_one_behind_all(llama, rows):
    written, window = TOKENS[:80], TOKENS[80:]
    whole = llama.logits(llama.run(TOKENS, (1,)).final_Td[80:]).log_softmax(-1)

    def apart(how):
        found = attend_pass(llama, compacted(llama, [written], rows, how), window, (1,))
        return float((whole.exp() * (whole - llama.logits(found.final_Td).log_softmax(-1))).sum(-1).mean())

    assert apart("match") < apart("subsample")


def test_keys_stand_at_the_distances_of_the_text(llama):
    # half of the rows at the slots of all: an original row's key would be turned to another place
    found = compacted(llama, [TOKENS], 99, "match")
    keys_LTHd, _ = rebuild(llama, TOKENS)
    last = llama.rope.turn(found.keys_LNHd, torch.arange(99))[:, -1]
    expected = llama.rope.turn(keys_LTHd, torch.arange(100) - 1)[:, -1]
    # but for the bias, which is small where hardly a row is left out
    assert float((last - expected).norm() / expected.norm()) < 0.2


@pytest.mark.parametrize("lengths", [[1], [3, 1, 2], [100], [700, 5, 2000], [300] * 40])
def test_reference_windows_lie_within_their_runs(lengths):
    windows = reference_windows(lengths, 64)
    assert 1 <= len(windows) <= 12
    for window in windows:
        assert sum(lengths[: window.run]) == window.before
        assert 0 <= window.start < window.stop <= lengths[window.run]
        assert window.start <= int(window.token_R.min()) <= int(window.token_R.max()) < window.stop
        assert len(window.token_R.unique()) == len(window.token_R)


def test_wrong_wishes_are_named(llama):
    with pytest.raises(InvalidInput, match="0 rows of 1 runs"):
        compacted(llama, [TOKENS], 0)
    with pytest.raises(InvalidInput, match="5 rows of 0 runs"):
        compacted(llama, [], 5)
    with pytest.raises(InvalidInput, match="'max'; choose among"):
        compacted(llama, [TOKENS], 5, "max")
