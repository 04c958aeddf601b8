"""Which families of language models raymem reads: each has a test that holds its states and logits to transformers'."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raymem.errors import ModelNotFound, UnsupportedModel

# transformers' `model_type`: decoder-only, of attention layers that follow each other
FAMILIES = frozenset(
    """
    afmoe apertus arcee aria_text biogpt bitnet bloom codegen cohere cohere2 cohere2_moe ctrl cwm deepseek_v2
    deepseek_v3 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon flex_olmo gemma gemma2 gemma3
    gemma3_text gemma4_text glm glm4 glm4_moe glm4_moe_lite gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox
    gpt_neox_japanese gpt_oss gptj granite granitemoe granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe
    hyperclovax jais2 jetmoe llama minicpm3 minimax_m2 ministral ministral3 mistral mixtral modernbert-decoder mpt
    nanochat nemotron olmo olmo2 olmo3 olmoe openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe
    seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm youtu
    """.split()
)
_POPULAR = "llama, mistral, qwen3, gemma3, phi3, gpt_neox, gpt2, bloom, falcon"


def check_family(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse what raymem can't read, from what is written in a model's config.

    Raises:
        ModelNotFound: it names no family.
        UnsupportedModel: naming the family, or what else about the model is in the way.
    """
    family = config.get("model_type")
    if not isinstance(family, str):
        raise ModelNotFound(
            f"{folder}/config.json names no model_type: give a folder that transformers' save_pretrained wrote"
        )
    if family not in FAMILIES:
        raise UnsupportedModel(
            f"{folder.name} is a model of the family {family!r}, whose hidden states raymem can't read: encoders, "
            f"encoder-decoders, recurrent and multimodal models are refused; {len(FAMILIES)} decoder-only families are "
            f"read, among them {_POPULAR}",
            family=family,
        )
    if config.get("use_bidirectional_attention") or config.get("is_encoder_decoder"):
        raise UnsupportedModel(
            f"{folder.name} ({family!r}) looks at tokens that come later: raymem needs a causal model"
        )
    if (folder / "adapter_config.json").exists():
        raise UnsupportedModel(
            f"{folder} holds an adapter beside the model, which changes its states: merge it (peft's merge_and_unload) "
            "and save the result"
        )
