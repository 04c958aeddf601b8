"""Empty banks for states of the bundled model, with a calibration of one text: enough to serve with, soon made."""

from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import torch

import raymem
from raymem.encode.calibration import Calibration, Range, measured_keys
from raymem.lm.fingerprint import fingerprint_of
from raymem.lm.models import LanguageModel
from raymem.types import BankSpec

MODEL = "smollm2-135m"


def make_banks(uri: str | Path, banks: dict[tuple[int, ...], Sequence[str]]) -> None:
    """Create banks in a store that is made here; their names by the layers that they hold."""
    model = LanguageModel.load(MODEL, torch.float32)
    tokens = model.encode(topics["booleans"])
    with raymem.connect(uri) as store:
        for layers, names in banks.items():
            mean_LD = model.run(tokens, layers).hidden_TLd[1:].mean(0)
            ranges = {key: Range(0.3, 0.9) for key in measured_keys(layers)}
            store.put_calibration(Calibration(model.content_hash, layers, mean_LD, ranges=ranges))
            for name in names:
                store.create(name, BankSpec(kind="spalm", fingerprint=fingerprint_of(MODEL, layers)))
