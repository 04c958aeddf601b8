"""What a model is called: what determines its states changes its hashes, and nothing else does."""

import json
import os
import shutil

import pytest
import torch
from modelzoo import SPECIAL, VOCABULARY, save_tiny
from safetensors.torch import load_file, save_file

from raymem.errors import Corrupt, ModelNotFound, UnsupportedModel
from raymem.lm.families import FAMILIES
from raymem.lm.fingerprint import fingerprint_of
from raymem.lm.identity import Changes, identity
from raymem.lm.models import LanguageModel

TEXT = "What is <|start|> a memory?"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYMEM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("zoo") / "plain")


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("zoo") / "untied", tie_word_embeddings=False)


@pytest.fixture
def copied(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "copied")


def edit(folder, name, **fields):
    said = json.loads((folder / name).read_text()) | fields
    (folder / name).write_text(json.dumps({key: value for key, value in said.items() if value is not ...}))


def states(folder):
    model = LanguageModel.load(folder)
    return model.forward(model.encode(TEXT)[:48], (1, 3))


STATES_CHANGE = {
    "rope scaling": {
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    },
    "rope theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "norm eps": {"rms_norm_eps": 1e-2},
    "activation": {"hidden_act": "gelu"},
    "key heads": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
}


@pytest.mark.parametrize("fields", STATES_CHANGE.values(), ids=STATES_CHANGE)
def test_the_same_weights_under_another_config_are_another_model(plain, copied, fields):
    edit(copied, "config.json", **fields)
    assert identity(copied).content != identity(plain).content
    assert identity(copied).legacy == identity(plain).legacy
    assert not torch.equal(states(copied)[0], states(plain)[0])


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gemma2", {"final_logit_softcapping": 7.0}),
        ("gemma2", {"sliding_window": 3}),
        ("cohere", {"logit_scale": 3.0}),
        ("granite", {"logits_scaling": 9.0}),
        ("granite", {"embedding_multiplier": 9.0}),
        ("mistral", {"sliding_window": 2}),
        ("xglm", {"pad_token_id": 9}),
    ],
    ids=str,
)
def test_fields_of_other_families_that_change_states_or_logits_count(tmp_path, family, fields):
    first = save_tiny(tmp_path / "first", family)
    other = shutil.copytree(first, tmp_path / "other")
    edit(other, "config.json", **fields)
    assert identity(first).content != identity(other).content
    same = [torch.equal(a, b) for a, b in zip(states(first), states(other), strict=True)]
    assert not all(same)


def test_passes_of_two_configs_are_kept_apart(plain, copied):
    edit(copied, "config.json", **STATES_CHANGE["rope scaling"])
    found = []
    for folder in (plain, copied):
        model = LanguageModel.load(folder)
        found.append(model.run_cached(model.encode(TEXT)[:48], (3,)).hidden_TLd)
    assert not torch.equal(*found)


STATES_STAY = {
    "labels": {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}},
    "generation": {"temperature": 0.2, "max_length": 99, "bos_token_id": 5, "eos_token_id": [2, 7], "pad_token_id": 3},
    "bookkeeping": {"_name_or_path": "elsewhere", "transformers_version": "4.40.0", "architectures": ["Other"]},
    "dropout": {"attention_dropout": 0.3, "initializer_range": 0.5},
    "outputs": {"use_cache": False, "output_hidden_states": True},
    "dtype": {"dtype": None, "torch_dtype": "bfloat16"},
    "defaults made explicit": {"attention_bias": False, "mlp_bias": False, "head_dim": 8, "rms_norm_eps": 1e-06},
    "defaults left out": {"attention_bias": ..., "mlp_bias": ..., "head_dim": ..., "hidden_act": ..., "use_cache": ...},
    "whole numbers": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
    "rope as of old": {"rope_parameters": ..., "rope_theta": 10000.0, "rope_scaling": None},
}


@pytest.mark.parametrize("fields", STATES_STAY.values(), ids=STATES_STAY)
def test_what_no_state_depends_on_counts_for_nothing(plain, copied, fields):
    edit(copied, "config.json", **fields)
    assert identity(copied)[:4] == identity(plain)[:4]
    assert all(torch.equal(a, b) for a, b in zip(states(copied), states(plain), strict=True))


def in_shards(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors, reverse=True)
    parts = {"a-1.safetensors": names[::2], "a-2.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file, {"format": "pt", "made": "elsewhere"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def in_one_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def whole_state_dict(folder):
    """What `torch.save(model.state_dict())` writes: tied tensors under both names."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def with_leftovers(folder):
    """Buffers that older releases kept, and files that nothing loads."""
    tensors = load_file(folder / "model.safetensors")
    tensors |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "never.loaded": torch.ones(3)}
    save_file(dict(reversed(tensors.items())), folder / "model.safetensors", {"format": "pt"})
    (folder / "training_args.bin").write_bytes(b"settings")
    save_file({"other": torch.ones(2)}, folder / "optimizer.safetensors")
    (folder / "README.md").write_text("# a model")


def without_prefix(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): part for name, part in tensors.items()}, folder / "model.safetensors")


WAYS = [in_shards, in_one_pickle, whole_state_dict, with_leftovers, without_prefix]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_how_weights_are_kept_counts_for_nothing(plain, untied, tmp_path, way, tied):
    first = plain if tied else untied
    copied = shutil.copytree(first, tmp_path / "copied")
    way(copied)
    if way is not without_prefix:
        assert all(torch.equal(a, b) for a, b in zip(states(copied), states(first), strict=True))
    assert identity(copied)[:4] == identity(first)[:4]


def test_gpt2_weights_of_old_pickles_are_the_same_model(tmp_path):
    first = save_tiny(tmp_path / "first", "gpt2")
    copied = shutil.copytree(first, tmp_path / "copied")
    tensors = {name.removeprefix("transformer."): part for name, part in load_file(first / "model.safetensors").items()}
    tensors |= {f"h.{n}.attn.bias": torch.ones(1, 1, 64, 64).tril().bool() for n in range(3)}
    tensors |= {f"h.{n}.attn.masked_bias": torch.tensor(-1e4) for n in range(3)}
    (copied / "model.safetensors").unlink()
    torch.save(tensors, copied / "pytorch_model.bin")
    assert identity(copied)[:4] == identity(first)[:4]
    assert all(torch.equal(a, b) for a, b in zip(states(copied), states(first), strict=True))


def test_other_weights_are_another_model_whatever_the_clock_says(plain, copied):
    file = copied / "model.safetensors"
    before, times = identity(copied).content, file.stat()
    tensors = load_file(file)
    tensors["model.norm.weight"][3] += 1
    # the same size and times: only what the system notes by itself tells
    with file.open("r+b") as stream:
        from safetensors.torch import save

        stream.write(save(tensors, {"format": "pt"}))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == times.st_size
    assert identity(copied).content not in (before, identity(plain).content)


def test_hashes_are_kept_and_not_made_twice(copied, monkeypatch):
    known = identity(copied)
    monkeypatch.setattr("raymem.lm.identity.tensors_of", None)
    monkeypatch.setattr("raymem.lm.identity._identity", None)
    assert identity(copied) == known


TOKENS_STAY = {
    "chat template": ("tokenizer_config.json", {"chat_template": "{{ messages }}"}),
    "model_max_length": ("tokenizer_config.json", {"model_max_length": 77, "padding_side": "left"}),
    "padding and truncation": (
        "tokenizer.json",
        {
            "padding": {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0}
            | {"pad_type_id": 0, "pad_token": SPECIAL[1]},
            "truncation": {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0},
        },
    ),
    "decoder": ("tokenizer.json", {"decoder": {"type": "Fuse"}}),
}


@pytest.mark.parametrize(("file", "fields"), TOKENS_STAY.values(), ids=TOKENS_STAY)
def test_what_does_not_make_ids_counts_for_nothing(plain, copied, file, fields):
    edit(copied, file, **fields)
    (copied / "chat_template.jinja").write_text("{% for m in messages %}{{ m }}{% endfor %}")
    assert identity(copied)[:4] == identity(plain)[:4]
    assert torch.equal(LanguageModel.load(copied).encode(TEXT), LanguageModel.load(plain).encode(TEXT))


ADDED = {"id": VOCABULARY, "content": "memory", "special": False, "single_word": False} | dict.fromkeys(
    ("lstrip", "rstrip", "normalized"), False
)


@pytest.mark.parametrize(
    "fields",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"added_tokens": [ADDED]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_makes_ids_counts(plain, copied, fields):
    edit(copied, "tokenizer.json", **fields)
    assert identity(copied).tokenizer != identity(plain).tokenizer
    assert identity(copied).content == identity(plain).content


def test_another_vocabulary_counts(plain, copied):
    said = json.loads((copied / "tokenizer.json").read_text())
    vocab = said["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (copied / "tokenizer.json").write_text(json.dumps(said))
    assert identity(copied).tokenizer != identity(plain).tokenizer


def test_an_engines_changes_count(plain):
    plain_id = identity(plain)
    changed = identity(plain, Changes(more={"quantization": "fp8"}))
    assert changed.content != plain_id.content
    assert changed.tokenizer == plain_id.tokenizer


def test_a_field_that_an_engine_sets_is_the_model_with_that_field(plain, copied):
    edit(copied, "config.json", rms_norm_eps=1e-2)
    assert identity(plain, Changes({"rms_norm_eps": 1e-2})).content == identity(copied).content
    assert identity(plain, Changes({"use_cache": False})) == identity(plain)


@pytest.mark.parametrize(
    "family", ["bert", "t5", "bart", "mamba", "rwkv", "recurrent_gemma", "llava", "whisper", "no-such-family"]
)
def test_families_that_are_not_read_are_named_before_anything_is_made(raymem, tmp_path, monkeypatch, family):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": family, "hidden_size": 8, "num_hidden_layers": 2}))
    with pytest.raises(UnsupportedModel, match=f"'{family}'.*llama"):
        fingerprint_of(str(folder), (1,))
    with pytest.raises(UnsupportedModel, match=f"'{family}'"):
        LanguageModel.load(folder)
    text = tmp_path / "text.txt"
    text.write_text("word " * 100)
    store = tmp_path / "memory"
    for command in (
        ("calibrate", "--model", folder, "--layers", "1", "--store", store),
        ("bank", "create", "lab/a", "--model", folder, "--layers", "1", "--store", store),
        ("eval", "lm", "--text", text, "--model", folder),
    ):
        said = raymem(*command)
        assert said.code == 1
        assert f"'{family}'" in said.err
    assert not store.exists()


def test_models_that_look_ahead_or_have_an_adapter_beside_them_are_refused(copied):
    edit(copied, "config.json", use_bidirectional_attention=True)
    with pytest.raises(UnsupportedModel, match="come later"):
        identity(copied)
    edit(copied, "config.json", use_bidirectional_attention=False)
    (copied / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match="adapter"):
        identity(copied)


def test_a_model_without_all_its_weights_is_refused(untied, tmp_path):
    copied = shutil.copytree(untied, tmp_path / "copied")
    tensors = load_file(copied / "model.safetensors")
    # the head is missing, as where the model under a causal one was saved
    del tensors["lm_head.weight"]
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    for look in (identity, LanguageModel.load):
        with pytest.raises(ModelNotFound, match=r"lm_head\.weight"):
            look(copied)


@pytest.mark.parametrize("content", [b"", b"weights", b"\xff" * 100, (50).to_bytes(8, "little") + b"{" * 60])
def test_weights_that_are_none_are_named(copied, content):
    (copied / "model.safetensors").write_bytes(content)
    with pytest.raises((Corrupt, ModelNotFound), match=r"model\.safetensors|can't load"):
        identity(copied)
    with pytest.raises((Corrupt, ModelNotFound)):
        LanguageModel.load(copied)


def test_an_index_that_reaches_out_of_its_folder_is_refused(copied):
    (copied / "model.safetensors").rename(copied.parent / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelNotFound, match=r"\.\./model\.safetensors|names"):
        identity(copied)


def test_popular_families_are_read():
    assert {"llama", "gpt2", "bloom", "falcon", "gemma3", "qwen3", "mixtral", "phi3", "opt", "mpt"} <= FAMILIES
    assert SPECIAL[0] in TEXT
