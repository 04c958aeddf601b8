"""Attended rows against transformers: rows at their own slots are the text that they were made of."""

from dataclasses import replace

import pytest
import torch
from modelzoo import save_tiny, tiny_config, tiny_model

from raymem import MemoryTokens
from raymem.errors import InvalidInput, UnsupportedModel
from raymem.lm.attending import (
    AttendedContext,
    Rope,
    attend_pass,
    dequantize,
    probed_rope,
    rebuild,
)
from raymem.lm.models import LanguageModel
from raymem.rows import quantize_rows

_MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 48}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SUPPORTED = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": 48}),
    "gemma": ("gemma", {}),
    "gemma3": ("gemma3_text", _MIXED),
    "phi, half of each head": ("phi", {}),
    "phi3": ("phi3", {"sliding_window": None}),
    "gpt_neox": ("gpt_neox", {}),
    "nanochat, the other way": ("nanochat", {}),
    "cohere, neighbours": ("cohere", {}),
    "cohere2, full layers unturned": ("cohere2", _MIXED),
    "glm, neighbours of half": ("glm", {}),
    "smollm3, layers unturned": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "llama3": (
        "llama",
        {"rope_parameters": _LLAMA3 | {"original_max_position_embeddings": 32, "rope_theta": 1e4}},
    ),
    "yarn": (
        "llama",
        {
            "rope_parameters": {
                **{"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4},
                "original_max_position_embeddings": 32,
            }
        },
    ),
}
TOKENS = torch.arange(3, 43) * 5 % 256
# float32 with another order of additions: logits of these models are about 1 to 30
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


def memory(keys, values, chosen=slice(None), **more):
    keys, values = keys[:, chosen], values[:, chosen]
    count = torch.arange(keys.shape[1])
    return MemoryTokens(count, count, count, count * 0, (("s", "r"),), 1.0, "spalm", keys, values, **more)


NOTHING = MemoryTokens(*[torch.zeros(0, dtype=torch.int64)] * 4, (), 0.0)


@pytest.fixture(scope="module", params=SUPPORTED)
def model(request, tmp_path_factory):
    family, fields = SUPPORTED[request.param]
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return LanguageModel.load(save_tiny(folder, family, **fields), torch.float32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return LanguageModel.load(save_tiny(tmp_path_factory.mktemp("llama") / "tiny"), torch.float32)


def test_rows_at_their_own_slots_are_the_text(model):
    whole = model.run(TOKENS, (1, 3))
    found = attend_pass(model, memory(*rebuild(model, TOKENS[:30])), TOKENS[30:], (1, 3))
    torch.testing.assert_close(model.logits(found.final_Td), model.logits(whole.final_Td[30:]), **CLOSE)
    torch.testing.assert_close(found.hidden_TLd, whole.hidden_TLd[30:], **CLOSE)
    # other rows are another text
    other = attend_pass(model, memory(*rebuild(model, TOKENS[:30].flip(0))), TOKENS[30:], (1, 3))
    assert not torch.allclose(other.final_Td, whole.final_Td[30:], **CLOSE)


def test_a_turned_row_is_the_row_of_its_slot(model):
    # the first layer's keys depend on token and position alone
    chosen = torch.tensor([0, 7, 8, 29])
    keys, _ = rebuild(model, TOKENS[:30])
    moved = model.rope.turn(keys[:, chosen], torch.arange(4) + 5)
    there, _ = rebuild(model, torch.cat([TOKENS[:5], TOKENS[chosen]]))
    torch.testing.assert_close(moved[0], model.rope.turn(there, torch.arange(9))[0, 5:], **CLOSE)


@pytest.mark.parametrize(
    ("family", "fields", "why"),
    [
        ("gpt2", {}, "no rotary"),
        ("bloom", {}, "no rotary"),
        ("opt", {}, "no rotary"),
        ("mpt", {}, "no rotary"),
        ("falcon", {"alibi": True}, "ALiBi"),
        ("deepseek_v3", {}, "latents"),
        ("gemma4_text", {}, "different widths"),
        ("hunyuan_v1_dense", {}, "scales keys"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
        (
            "phi3",
            {
                "rope_parameters": {
                    **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32},
                    **{"short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
                }
            },
            "'longrope'",
        ),
    ],
)
def test_models_whose_keys_cannot_be_moved_are_refused_by_name(family, fields, why):
    with pytest.raises(UnsupportedModel, match=rf"{family}.*{why}"):
        Rope.of(tiny_config(family, **fields))


def test_a_model_that_turns_otherwise_than_its_config_says_is_refused():
    model = tiny_model("llama")
    probed_rope(model)
    model.config.rope_parameters["rope_theta"] = 100.0
    with pytest.raises(UnsupportedModel, match="depend on positions in another way"):
        probed_rope(model)


def test_no_rows_change_nothing(llama):
    found, plain = attend_pass(llama, NOTHING, TOKENS, (2,)), llama.run(TOKENS, (2,))
    torch.testing.assert_close(found.final_Td, plain.final_Td, **CLOSE)


def test_a_text_read_in_parts_behind_one_memory_is_the_text_read_at_once(llama):
    rows = memory(*rebuild(llama, TOKENS[:20]))
    at_once = attend_pass(llama, rows, TOKENS[20:], (2,))
    context = AttendedContext(llama)
    parts = [context.extend(rows, part, (2,)) for part in TOKENS[20:].split(7)]
    torch.testing.assert_close(torch.cat([part.final_Td for part in parts]), at_once.final_Td, **CLOSE)


def test_a_text_goes_on_behind_more_or_fewer_rows(llama):
    keys, values = rebuild(llama, TOKENS[:20])
    context = AttendedContext(llama)
    context.extend(memory(keys, values, slice(0, 20)), TOKENS[20:26], (2,))
    found = context.extend(memory(keys, values, slice(0, 8)), TOKENS[26:28], (2,))
    # by hand: the eight rows, then the six tokens as they were computed behind twenty, moved to follow the eight
    whole_keys, whole_values = rebuild(llama, TOKENS[:26])
    chosen = torch.tensor([*range(8), *range(20, 26)])
    by_hand = attend_pass(llama, memory(whole_keys, whole_values, chosen), TOKENS[26:28], (2,))
    torch.testing.assert_close(found.final_Td, by_hand.final_Td, **CLOSE)


def test_rows_in_int8_are_within_half_a_step_and_answer_alike(llama):
    keys, values = rebuild(llama, TOKENS[:30])
    for rows in (keys, values):
        small, scales = quantize_rows(rows)
        assert small.dtype == torch.int8
        assert scales.shape == rows.shape[:3]
        assert ((dequantize(small, scales, torch.float32) - rows).abs() <= 0.5001 * scales[..., None]).all()
    small_keys, key_scales = quantize_rows(keys)
    small_values, value_scales = quantize_rows(values)
    rows = memory(small_keys, small_values, key_scales_LNH=key_scales, value_scales_LNH=value_scales)
    found = torch.log_softmax(llama.logits(attend_pass(llama, rows, TOKENS[30:], (2,)).final_Td), 1)
    exact = torch.log_softmax(llama.logits(attend_pass(llama, memory(keys, values), TOKENS[30:], (2,)).final_Td), 1)
    plain = torch.log_softmax(llama.logits(llama.run(TOKENS[30:], (2,)).final_Td), 1)
    assert (found - exact).abs().mean() < 0.05 * (plain - exact).abs().mean()
    zeros, no_scales = quantize_rows(torch.zeros(1, 2, 1, 4))
    assert not dequantize(zeros, no_scales, torch.float32).any()


def test_what_does_not_fit_is_refused_with_what_does(llama, tmp_path):
    keys, values = rebuild(llama, TOKENS[:30])
    with pytest.raises(InvalidInput, match="no keys and values"):
        attend_pass(llama, replace(memory(keys, values), keys_LNHd=None), TOKENS[30:], (2,))
    with pytest.raises(InvalidInput, match="no scales"):
        attend_pass(llama, memory(quantize_rows(keys)[0], quantize_rows(values)[0]), TOKENS[30:], (2,))
    with pytest.raises(InvalidInput, match="in 3 layers: attend to rows of the same model"):
        attend_pass(llama, memory(keys[:2], values[:2]), TOKENS[30:], (2,))
    with pytest.raises(InvalidInput, match="64 positions"):
        attend_pass(llama, memory(torch.cat([keys, keys], 1), torch.cat([values, values], 1)), TOKENS[30:], (2,))
    narrow = LanguageModel.load(save_tiny(tmp_path / "narrow", "mistral"), torch.float32)
    with pytest.raises(InvalidInput, match=r"9 rows.*sees 8 tokens"):
        attend_pass(narrow, memory(*rebuild(narrow, TOKENS[:9])), TOKENS[30:], (2,))


def test_memory_tokens_know_their_rows_and_bytes(llama):
    keys, values = rebuild(llama, TOKENS[:3])
    rows = memory(keys, values)
    assert len(rows) == 3
    assert rows.bytes == 4 * 3 * 8 + keys.nbytes + values.nbytes
    assert [(ref.stream, ref.run, ref.seq, ref.pos) for ref in rows.rows()] == [("s", "r", n, n) for n in range(3)]
