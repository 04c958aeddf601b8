from pathlib import Path

import pytest
import torch
from modelzoo import save_tiny

from raymem import Calibration, KeySpec, Trace, connect
from raymem.encode.calibration import Range
from raymem.lm.models import content_hash

WIDTH = 24


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model of six layers."""
    monkeypatch.setenv("RAYMEM_CACHE", str(tmp_path / "cache"))
    return save_tiny(tmp_path / "tiny", hidden_size=WIDTH, num_hidden_layers=6)


@pytest.fixture
def store(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with the tiny model's calibration, named by RAYMEM_STORE."""
    ranges = {KeySpec(layers=(layer,)): Range(0.2, 0.95) for layer in (3, 5)}
    folder = tmp_path / "memory"
    with connect(folder) as opened:
        mean = torch.full((2, WIDTH), 0.5)
        opened.put_calibration(Calibration(model=content_hash(model), layers=(3, 5), mean_LD=mean, ranges=ranges))
    monkeypatch.setenv("RAYMEM_STORE", str(folder))
    # each command opens the store anew, and none of them is killed
    monkeypatch.setenv("RAYMEM_COLD__SYNC", "none")
    return folder


@pytest.fixture
def alice(raymem, store: Path, model: Path) -> str:
    """A bank of ten rows."""
    made = raymem("bank", "create", "lab/alice", "--model", model, "--layers", "3,5", "--key-layers", "5")
    assert made.code == 0, made.err
    with connect(store) as opened:
        hidden = (torch.randn(10, 2, WIDTH) + 0.5).bfloat16()
        opened.bank("lab/alice").write(Trace(hidden, torch.arange(10), "s", "r"))
    return "lab/alice"
