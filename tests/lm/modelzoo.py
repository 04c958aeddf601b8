"""Tiny models of real families with random weights, saved as their own save_pretrained saves them."""

from functools import cache
from pathlib import Path
from typing import Any

SPECIAL = ("<|start|>", "<|end|>")
VOCABULARY = 256 + len(SPECIAL)
LAYERS = 3

# what families call their sizes; each takes those that it knows
_SIZES = {
    **{"hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32},
    **{"num_hidden_layers": LAYERS, "n_layer": LAYERS, "n_layers": LAYERS, "num_layers": LAYERS},
    **{"num_attention_heads": 4, "n_head": 4, "n_heads": 4, "attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 8, "d_kv": 8, "rotary_dim": 4, "query_pre_attn_scalar": 8},
    **{"intermediate_size": 48, "n_inner": 48, "ffn_dim": 48, "dff": 48, "moe_intermediate_size": 24},
    **{"shared_expert_intermediate_size": 24, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4},
    **{"num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    **{"max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64, "sliding_window": 8},
    **{"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_LATENT = {"num_key_value_heads": 4, "head_dim": 4}
_OWN: dict[str, dict[str, Any]] = {
    "deepseek_v3": _LATENT,
    "glm4_moe_lite": _LATENT,
    "youtu": _LATENT,
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "num_heads": 4, "window_size": 4},
    "gemma4_text": {"global_head_dim": 8, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
    "gemma3": {
        "text_config": {name: _SIZES[name] for name in ("hidden_size", "num_hidden_layers", "intermediate_size")}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCABULARY}
        | {"max_position_embeddings": 64, "sliding_window": 8},
        "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 32}
        | {"num_attention_heads": 2, "patch_size": 16},
    },
}
# families whose sizes follow from others, or that refuse those
_LEFT_OUT = {
    "falcon": {"head_dim"},
    "gpt_neo": {"num_hidden_layers", "num_attention_heads"},
    "gemma4_text": {"head_dim"},
}


def tiny_config(family: str, **fields: Any) -> Any:
    """A config of a family with small sizes."""
    from transformers import AutoConfig

    base = AutoConfig.for_model(family)
    left_out = _LEFT_OUT.get(family, set()) | ({*_SIZES} if family == "gemma3" else set())
    sizes = {name: size for name, size in _SIZES.items() if name not in left_out and _has(base, name)}
    return type(base)(**sizes | _OWN.get(family, {}) | fields)


def tiny_model(family: str, **fields: Any) -> Any:
    """A model whose random weights are large enough to matter."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **fields))
    for weights in model.parameters():
        weights.data.normal_(0, 0.3)
    return model.eval().requires_grad_(False)


def save_tiny(folder: Path, family: str = "llama", **fields: Any) -> Path:
    """A folder with such a model, in bfloat16, and a tokenizer of bytes."""
    import torch

    from raymem.lm.identity import quiet_transformers

    with quiet_transformers():
        tiny_model(family, **fields).to(torch.bfloat16).save_pretrained(str(folder))
        byte_tokenizer().save_pretrained(str(folder))
    return folder


@cache
def byte_tokenizer() -> Any:
    """A tokenizer with one token for each byte, and special ones."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=SPECIAL[0], eos_token=SPECIAL[1])


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception as error:  # noqa: BLE001
        # a config of several layer kinds says so when asked for a size that they don't share
        return "per-layer" in str(error)
