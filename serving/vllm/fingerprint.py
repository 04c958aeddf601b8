"""What an engine's rows are made of, compared with what a bank holds."""

from __future__ import annotations

from typing import Any

from raymem.errors import ConfigError
from raymem.lm.models import content_hash, tokenizer_hash
from raymem.serving.vllm import insides
from raymem.types import DTYPES, Fingerprint


def engine_fingerprint(vllm_config: Any, layers: tuple[int, ...]) -> Fingerprint:
    """Say what made an engine's rows; calibration and values are left to each bank.

    Raises:
        ModelNotFound: the model's files are not on this machine.
        ConfigError: its hidden states are of a dtype that no bank holds.
    """
    folder = insides.model_folder(vllm_config)
    dtype: Any = str(vllm_config.model_config.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ConfigError(f"the engine computes in {dtype}; banks hold {', '.join(DTYPES)}: set dtype= to one of those")
    return Fingerprint(
        model=str(vllm_config.model_config.model),
        content=content_hash(folder),
        layers=layers,
        width=int(vllm_config.model_config.get_hidden_size()),
        dtype=dtype,
        tokenizer=tokenizer_hash(folder),
    )


def require_same(bank: Fingerprint, engine: Fingerprint) -> None:
    """Refuse a bank that holds other states than the engine computes.

    Raises:
        FingerprintMismatch: naming every field that differs.
    """
    # the name is a label, and calibration and value space are the bank's own choice: the rest must agree
    own = {"model": bank.model, "calibration": bank.calibration, "values": bank.values}
    bank.require(engine.model_copy(update=own))
