"""Every family's states and logits are transformers' own, bit for bit."""

import pytest
import torch
from modelzoo import LAYERS, VOCABULARY, save_tiny, tiny_model

from raymem.lm.families import FAMILIES
from raymem.lm.models import LanguageModel
from raymem.lm.parts import parts_of

# what a head alone does not know: scales, caps, biases, projections, norms in other places
VARIANTS = {
    "cohere scaled": ("cohere", {"logit_scale": 0.25}),
    "falcon alibi": ("falcon", {"alibi": True, "parallel_attn": False}),
    "falcon new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma2 capped": ("gemma2", {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 2.0}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False}),
    "granite scaled": ("granite", {"logits_scaling": 5.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}),
    "llama yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}),
    "neox in sequence": ("gpt_neox", {"use_parallel_residual": False}),
    "opt projected": ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "stablelm in parallel": ("stablelm", {"use_parallel_residual": True}),
}
CASES = {family: (family, {}) for family in sorted(FAMILIES)} | VARIANTS


@pytest.mark.parametrize("case", CASES)
def test_states_and_logits_are_transformers_own(case):
    family, fields = CASES[case]
    model = tiny_model(family, **fields).to(torch.bfloat16)
    depth = model.config.get_text_config().num_hidden_layers
    parts = parts_of(model, depth)
    tokens = torch.randint(3, VOCABULARY, (33,))
    outputs = {}
    hooks = [block.register_forward_hook(keeping(outputs, n)) for n, block in enumerate(parts.blocks)]
    with torch.inference_mode():
        whole = model(tokens[None], use_cache=False, output_hidden_states=True)
        for hook in hooks:
            hook.remove()
        hidden_TLd, final_Td = parts.run(tokens, range(1, depth + 1))
        logits_TV = parts.logits(final_Td)
    assert torch.equal(logits_TV, whole.logits[0])
    assert logits_TV.float().std() > 0
    for layer in range(depth):
        assert torch.equal(hidden_TLd[:, layer], outputs[layer])
        # transformers shows the last one after the final norm
        if layer + 1 < depth:
            assert torch.equal(hidden_TLd[:, layer], whole.hidden_states[layer + 1][0])


def keeping(outputs, layer):
    def keep(_module, _inputs, output):
        outputs[layer] = (output if isinstance(output, torch.Tensor) else output[0])[0]

    return keep


@pytest.mark.parametrize("case", ["gpt2", "gemma2 capped", "cohere scaled", "opt projected", "bloom", "gemma3", "mpt"])
def test_a_saved_model_is_read_with_the_same_bits(case, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMEM_CACHE", str(tmp_path / "cache"))
    from transformers import AutoModelForCausalLM

    family, fields = CASES[case]
    model = LanguageModel.load(save_tiny(tmp_path / "model", family, **fields))
    tokens = model.encode("Whatever its family calls them.")
    hidden, final = model.run_cached(tokens, (1, LAYERS))
    logits, again = model.logits(final), model.run_cached(tokens, (1, LAYERS)).hidden_TLd
    plain = AutoModelForCausalLM.from_pretrained(str(tmp_path / "model"), dtype=torch.bfloat16)
    reference = plain.eval()(tokens[None], use_cache=False, output_hidden_states=True)
    assert torch.equal(logits, reference.logits[0])
    assert torch.equal(hidden[:, 0], reference.hidden_states[1][0])
    assert torch.equal(hidden, again)
    assert hidden.shape == (len(tokens), 2, model.width)


def test_parts_that_do_something_else_are_refused():
    from raymem.errors import UnsupportedModel

    with pytest.raises(UnsupportedModel, match="MambaForCausalLM"):
        parts_of(tiny_model("mamba"), LAYERS)
