"""A model's identity: hashes of what determines its states, from its files alone.

The content hash is over the weights as tensors and over the fields of the config that a pass depends on; the
tokenizer hash is over what turns text into ids. Neither depends on how the files are cut, named or ordered, on chat
templates, or on fields that only generation reads. Hashes are cached under a stamp of the files, so that weights are
read once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from raymem.errors import MissingExtra, ModelNotFound, UnsupportedModel
from raymem.lm.families import check_family
from raymem.lm.weights import TensorFacts, canonical, loaded_names, tensors_of, weight_files

# the prefix of hashes, which tells the schemes of hashing apart
SCHEME = "2:"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer_config.json",
)
_LEGACY_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json")
# fields that no pass in evaluation mode depends on; what isn't here counts
_IDLE_FIELDS = frozenset(
    {
        *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "transformers.js_config"),
        *("name_or_path", "use_cache", "return_dict", "output_hidden_states", "output_attentions", "torchscript"),
        *("output_router_logits", "gradient_checkpointing", "attn_implementation", "chunk_size_feed_forward"),
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
        *("tokenizer_class", "prefix", "initializer_range", "initializer_factor", "initializer_cutoff_factor"),
        *("router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise", "aux_loss_alpha", "pretraining_tp"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id"),
        *("mask_token_id", "decoder_start_token_id", "use_bfloat16", "pruned_heads", "summary_type"),
        *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_use_proj"),
    }
)
# families whose table of positions has a hole at the padding id
_PAD_MATTERS = frozenset({"xglm"})


class Identity(NamedTuple):
    """What a folder holds: hashes, sizes, and under which hashes raymem 0.1.0 and earlier knew the same files."""

    content: str
    tokenizer: str
    width: int
    depth: int
    legacy: tuple[str, str]


def cache_folder() -> Path:
    """The folder where raymem keeps what it can make again: `$RAYMEM_CACHE`, else `~/.cache/raymem`."""
    return Path(os.environ.get("RAYMEM_CACHE") or Path.home() / ".cache" / "raymem")


class Changes(NamedTuple):
    """What an engine changes of a folder's model: fields of the config, and other settings that states depend on."""

    config: Mapping[str, Any] = {}
    more: Mapping[str, Any] = {}


_AS_IT_IS = Changes()


def identity(folder: Path, changes: Changes = _AS_IT_IS) -> Identity:
    """The identity of a folder's model; takes a minute for 100 GB of weights, and is then cached.

    Args:
        folder: with config, weights and tokenizer.
        changes: none where the model is used as it is.

    Raises:
        ModelNotFound: a part is missing, or transformers can't read it. UnsupportedModel: naming the family.
        MissingExtra: transformers is not installed.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    versions = [_version(name) for name in ("transformers", "tokenizers")]
    said = ["identity", SCHEME, *versions, changes._asdict(), [_stamp(file) for file in files]]
    kept = _kept(json.dumps(said, sort_keys=True, default=str))
    known = _known(kept)
    if isinstance(known, dict):
        return Identity(**known | {"legacy": tuple(known["legacy"])})
    made = _identity(folder, changes)
    if said[-1] == [_stamp(file) for file in files if file.exists()]:
        write_atomically(kept, json.dumps(made._asdict()).encode())
    return made


def tokenizer_identity(folder: Path) -> tuple[str, str]:
    """The hash of a tokenizer, in a folder that need not hold a model, and that of raymem 0.1.0 and earlier.

    Raises:
        ModelNotFound: there is none that transformers can read.
    """
    return SCHEME + _hash(tokenizer_facts(load_tokenizer(folder))), _digest(_legacy_tokenizer(folder))


def load_config(folder: Path, changes: Mapping[str, Any] | None = None) -> Any:
    """The config as transformers reads it, with some fields changed.

    Raises:
        ModelNotFound: there is none that it can read. UnsupportedModel: of a family that raymem doesn't know.
    """
    from transformers import AutoConfig

    try:
        raw = json.loads((folder / "config.json").read_text())
        said = _merged(raw, changes or {}) if isinstance(raw, dict) else {}
        check_family(said, folder)
        family = said.pop("model_type")
        return type(AutoConfig.for_model(family)).from_dict(said)
    except UnsupportedModel:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelNotFound(
            f"transformers can't load {folder}/config.json ({type(error).__name__}: {str(error)[:200]}): "
            "give a folder that transformers' save_pretrained wrote"
        ) from error


def _merged(said: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    inside = {
        name: _merged(said[name], value)
        for name, value in changes.items()
        if isinstance(value, Mapping) and isinstance(said.get(name), dict)
    }
    return said | dict(changes) | inside


def config_facts(config: Any) -> dict[str, Any]:
    """The fields of a config that states depend on, where they are not its family's defaults."""
    default = type(config)().to_dict()
    found = config.to_dict()
    own = {name: value for name, value in found.items() if name not in default or default[name] != value}
    facts = _plain(own)
    assert isinstance(facts, dict)
    if config.model_type in _PAD_MATTERS:
        facts["pad_token_id"] = config.pad_token_id
    return facts | {"model_type": config.model_type}


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """What turns text into ids, without what turns them back, templates, padding and truncation."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        # no description of its rules: its class and its vocabulary are what there is
        return {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    said = json.loads(backend.to_str())
    model = said["model"]
    if "merges" in model:
        # older releases wrote a pair as one string
        model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return {name: said.get(name) for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file whole, or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.parent.stat().st_mode & 0o077:
        # passes hold states of texts: only their owner may read them
        file.parent.chmod(0o700)
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as stream:
        stream.write(content)
    os.replace(stream.name, file)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer as transformers reads it.

    Raises:
        ModelNotFound: there is none that it can read.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise ModelNotFound(f"no tokenizer in {folder}: expected tokenizer.json beside the weights")
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    # the Rust part raises bare exceptions of its own
    except Exception as error:
        raise ModelNotFound(
            f"transformers can't read the tokenizer in {folder} ({type(error).__name__}: {str(error)[:200]}): "
            "save it again with save_pretrained"
        ) from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and advice: raymem shows its own."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _identity(folder: Path, changes: Changes) -> Identity:
    try:
        config = load_config(folder, changes.config)
        names = loaded_names(_empty_model(config))
        tokenizer, legacy_tokenizer = tokenizer_identity(folder)
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"models are read with transformers, and {error.name!r} is not installed: `pip install 'raymem[lm]'`"
        ) from error
    facts = config_facts(config) | {f"changed: {name}": value for name, value in changes.more.items()}
    tensors = canonical([found for file in weight_files(folder) for found in _tensors(file)], names, folder)
    text = config.get_text_config()
    return Identity(
        content=SCHEME + _hash({"config": facts, "tensors": tensors}),
        tokenizer=tokenizer,
        width=int(text.hidden_size),
        depth=int(text.num_hidden_layers),
        legacy=(_digest(_legacy_weights(folder)), legacy_tokenizer),
    )


def _empty_model(config: Any) -> Any:
    """A model without weights: it knows what its tensors are called."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), quiet_transformers():
        return AutoModelForCausalLM.from_config(config)


def _tensors(file: Path) -> list[TensorFacts]:
    stamp = _stamp(file)
    kept = _kept(json.dumps(["tensors", SCHEME, stamp]))
    known = _known(kept)
    if isinstance(known, list):
        return [TensorFacts(name, dtype, tuple(shape), sha) for name, dtype, shape, sha in known]
    found = list(tensors_of(file))
    if _stamp(file) == stamp:
        write_atomically(kept, json.dumps(found).encode())
    return found


def _stamp(file: Path) -> list[Any]:
    found = file.stat()
    # a file that was changed in place with its time set back still has another ctime
    return [str(file.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _kept(said: str) -> Path:
    return cache_folder() / "digests" / hashlib.sha256(said.encode()).hexdigest()


def _known(kept: Path) -> Any:
    """What was kept there; None where nothing was, or what is there was damaged."""
    try:
        return json.loads(kept.read_text())
    except (OSError, ValueError):
        return None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _hash(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Fields that count, in one form: 10000 and 10000.0 are one number, an absent field and None one."""
    if isinstance(value, Mapping):
        named = {str(name): _plain(part) for name, part in value.items() if _counts(str(name))}
        return {name: part for name, part in named.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _counts(name: str) -> bool:
    idle = name.startswith("_") or name in _IDLE_FIELDS or name.endswith(("dropout", "pdrop", "dropout_prob"))
    return not idle and name not in _generation_fields()


@lru_cache
def _generation_fields() -> frozenset[str]:
    from transformers import GenerationConfig

    return frozenset(GenerationConfig().to_dict())


def _legacy_weights(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])


def _legacy_tokenizer(folder: Path) -> list[Path]:
    return [folder / name for name in _LEGACY_TOKENIZER if (folder / name).exists()]


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
