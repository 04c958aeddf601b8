"""Relevance on a real model's states: what was stored, what is about the same, what is not, and an empty bank."""

from pathlib import Path

import pytest
import torch

from raymem import BankSpec, Trace, connect
from raymem.encode.fit import calibrate
from raymem.lm.contenders import Size, sized
from raymem.lm.fingerprint import fingerprint
from raymem.lm.models import BUNDLED_MODEL, LanguageModel
from raymem.memory import kinds

LAYER, TOKENS = 26, 600


@pytest.fixture(scope="module")
def read():
    """A calibrated store's ingredients, and states and tokens of a topic of Python's reference and of a licence."""
    from pydoc_data.topics import topics

    model = LanguageModel.load(BUNDLED_MODEL)
    calibration = calibrate(model, (LAYER,))
    plain = BankSpec(kind="spalm", fingerprint=fingerprint(model, (LAYER,), calibration.hash))
    licence = (Path(__file__).parents[2] / "LICENSE").read_text()
    found = []
    for text in (topics["typesmapping"], licence):
        tokens = model.encode(text)[:TOKENS]
        found.append((model.run_cached(tokens, (LAYER,)).hidden_TLd, tokens))
    return calibration, plain, found


@pytest.mark.parametrize("budget", [None, 150_000], ids=["default", "0.15MB"])
@pytest.mark.parametrize("kind", kinds())
def test_relevance_falls_from_stored_to_related_to_unrelated_and_is_nothing_when_empty(read, tmp_path, kind, budget):
    calibration, plain, ((topic, tokens), (licence, _)) = read
    (spec,) = sized((kind,), plain, calibration, Size(budget))
    half = TOKENS // 2
    with connect(tmp_path) as store:
        store.put_calibration(calibration)
        bank, empty = store.create("test/full", spec), store.create("test/empty", spec)
        bank.write(Trace(topic[:half], tokens[:half], "topic", "read"))
        # rows at the very start of a context are like those of any other
        asked = {"stored": topic[16:half], "related": topic[half:], "unrelated": licence[half:]}
        mean = {name: float(bank.read(rows, 8, start=16).relevance_Q.mean()) for name, rows in asked.items()}
        nothing = empty.read(topic[16:half], 8, start=16).relevance_Q
    assert mean["stored"] > mean["related"] + 0.2
    assert mean["related"] > mean["unrelated"] + 0.05
    assert torch.equal(nothing, torch.zeros_like(nothing))
