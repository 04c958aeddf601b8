"""A trained gate beside the best constant weight, in front of a real model and on text that it was not trained on."""

from typing import NamedTuple

import pytest
import torch

from raymem import BankSpec, connect
from raymem.encode.fit import calibrate
from raymem.lm.contenders import Contender
from raymem.lm.fingerprint import fingerprint
from raymem.lm.gate import Gate
from raymem.lm.models import BUNDLED_MODEL, LanguageModel
from raymem.lm.passes import read
from raymem.lm.text import Document
from raymem.lm.tune import Lesson, fit
from raymem.lm.tune import lessons as lessons_of

LAYER, TOKENS = 26, 1024


class Lessons(NamedTuple):
    """Documents predicted with the bank that holds their beginnings, and with the next document's."""

    memorised: list[Lesson]
    novel: list[Lesson]


@pytest.fixture(scope="module")
def lessons(tmp_path_factory) -> tuple[Lessons, Lessons]:
    from pydoc_data.topics import topics

    longest = sorted(topics, key=lambda name: -len(topics[name]))
    model = LanguageModel.load(BUNDLED_MODEL)
    calibration = calibrate(model, (LAYER,))
    who = Contender("spalm", (BankSpec(kind="spalm", fingerprint=fingerprint(model, (LAYER,), calibration.hash)),))

    def made(store, names) -> Lessons:
        readings = [read(model, Document(name, topics[name]), (LAYER,), TOKENS, TOKENS // 4) for name in names]
        banks = [[who.write(store, reading.name, reading)] for reading in readings]
        # of each document its own bank, the next one's, and that of another domain, of which there is none here
        told = list(lessons_of(model, [readings], [banks]))
        return Lessons(told[::3], told[1::3])

    with connect(str(tmp_path_factory.mktemp("store"))) as store:
        store.put_calibration(calibration)
        return made(store, longest[6:11]), made(store, longest[:4])


def joined(told: list[Lesson]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, and the probabilities of the tokens that came: the experts' and the model's own."""
    parts = ([getattr(one, name) for one in told] for name in ("features_NF", "found_NE", "own_N"))
    features, found, own = (torch.cat(part) for part in parts)
    return features, found, own.exp()


def best_constant(told: list[Lesson]) -> float:
    """Least loss of `(1 - weight) p_model + weight p_memory` over weights and temperatures, chosen with hindsight."""
    _, found, own = joined(told)
    mixed = ((1 - weight) * own[:, None] + weight * found for weight in torch.arange(0.0, 0.9, 0.02))
    return min(-share.log().mean(0).min().item() for share in mixed)


def gated(gate: Gate, told: list[Lesson]) -> tuple[float, float]:
    """Loss with the gate, and the mean weight that it leaves the model."""
    features, found, own = joined(told)
    weights = gate.log_weights(features).exp()
    return -(weights * torch.cat([own[:, None], found], 1)).sum(1).log().mean().item(), weights[:, 0].mean().item()


@pytest.mark.timeout(600)
def test_a_trained_gate_beats_the_best_constant_weight_and_trusts_memory_where_it_holds_the_text(lessons, figure):
    training, held_out = lessons
    gate = fit([*training.memorised, *training.novel], ("spalm",))
    both = held_out.memorised + held_out.novel
    for told, what in ((held_out.memorised, "the text's own bank"), (both, "own bank and another's")):
        baseline = {"best constant": best_constant(told), "no memory": -joined(told)[2].log().mean().item()}
        task = f"nats a token, unseen text, {what}"
        figure("spalm", task, gated(gate, told)[0], below=baseline["best constant"] - 0.01, baseline=baseline)
    model_share = {name: gated(gate, getattr(held_out, name))[1] for name in ("memorised", "novel")}
    figure(
        "spalm",
        "weight that the gate gives memory, text it holds",
        1 - model_share["memorised"],
        above=1.5 * (1 - model_share["novel"]),
        baseline={"text it does not hold": 1 - model_share["novel"]},
    )
