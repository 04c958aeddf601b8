"""Training the gates that come with raymem: `python -m raymem.lm.tune TEXT… --out gates.json`.

Each text folder is a domain. A document is predicted with its own bank, with the next document's of its domain, and
with one of another domain: the last two teach the gate to leave a wrong memory alone.

Shape legend: N predictions, F features, E experts.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from raymem import Bank, BankSpec, Store, Trace, connect
from raymem.encode.fit import calibrate
from raymem.lm.fingerprint import fingerprint
from raymem.lm.gate import TAUS, Gate, family_of, features, shares
from raymem.lm.mixing import NEIGHBOURS
from raymem.lm.models import BUNDLED_MODEL, LanguageModel
from raymem.lm.passes import CachedModel, Reading, read
from raymem.lm.text import find_documents

# one kind of each family teaches its gate
TEACHERS = {"rows": "spalm", "states": "titans"}
_STEPS = 400
_RATE = 0.05
_DECAY = 1e-4


@dataclass(frozen=True)
class Lesson:
    """One document predicted with one bank; `weight` is what all of it counts for.

    `features_NF`; `found_NE` each expert's probability of the token that came; `own_N` the model's log-probability.
    """

    features_NF: Tensor
    found_NE: Tensor
    own_N: Tensor
    weight: float


def main(
    texts: Annotated[list[Path], typer.Argument(help="Folders of text files, one a domain.")],
    out: Annotated[Path, typer.Option(help="Where the gates go.")] = Path("gates.json"),
    model: str = BUNDLED_MODEL,
    layer: int = 26,
    max_docs: int = 12,
    wrong_weight: Annotated[float, typer.Option(help="What wrong memory counts for beside the right one.")] = 1.0,
) -> None:
    """Train a gate for each family of banks and write both to a file."""
    cached = CachedModel(LanguageModel.load(model))
    domains = [
        [read(cached, document, (layer,), 4096, 256) for document in find_documents([folder], max_docs)]
        for folder in track(texts, "reading", console=Console(stderr=True))
    ]
    calibration = calibrate(cached.model, (layer,))
    print_ = fingerprint(cached.model, (layer,), calibration.hash)
    gates = {}
    with tempfile.TemporaryDirectory() as folder, connect(folder) as store:
        store.put_calibration(calibration)
        for family, kind in TEACHERS.items():
            lessons = lessons_of(cached, store, BankSpec(kind=kind, fingerprint=print_), domains, wrong_weight)
            gates[family] = fit(lessons, TAUS[family])
    out.write_text(json.dumps({family: gate.to_json() for family, gate in gates.items()}) + "\n")


def lessons_of(
    model: CachedModel, store: Store, spec: BankSpec, domains: list[list[Reading]], wrong_weight: float
) -> list[Lesson]:
    """Predict every document with its own bank and two wrong ones."""
    banks = [
        [_filled(store, f"{spec.kind}/{here}-{place}", spec, reading) for place, reading in enumerate(domain)]
        for here, domain in enumerate(domains)
    ]
    found: list[Lesson] = []
    for here, domain in enumerate(track(domains, spec.kind, console=Console(stderr=True))):
        far = banks[(here + 1) % len(banks)]
        for place, reading in enumerate(domain):
            found.append(lesson(model, reading, banks[here][place], 1.0))
            for bank in (banks[here][(place + 1) % len(domain)], far[place % len(far)]):
                found.append(lesson(model, reading, bank, wrong_weight / 2))
    return found


def lesson(model: CachedModel, reading: Reading, bank: Bank, weight: float) -> Lesson:
    """What a bank says before each predicted token of a document."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for window in reading.windows:
        readout = bank.read(window.hidden_WLd, NEIGHBOURS, start=0)
        targets_N = window.targets_W
        taus = TAUS[family_of(readout)]
        log_probs_NV = torch.log_softmax(model.model.logits(window.final_Wd).float(), dim=-1)
        assert readout.scores_Qk is not None
        assert readout.tokens_Qk is not None
        hit_N1k = (readout.tokens_Qk == targets_N[:, None])[:, None]
        found_NE = (shares(readout.scores_Qk.float(), taus) * hit_N1k).sum(-1)
        own_N = log_probs_NV.gather(1, targets_N[:, None])[:, 0]
        parts.append((features(log_probs_NV, readout, taus), found_NE, own_N))
    features_NF, found_NE, own_N = (torch.cat(column) for column in zip(*parts, strict=True))
    return Lesson(features_NF, found_NE, own_N, weight)


def fit(lessons: list[Lesson], taus: tuple[float, ...]) -> Gate:
    """The gate with the least weighted loss; every document counts the same."""
    features_NF, found_NE, own_N = (
        torch.cat([getattr(lesson, name) for lesson in lessons]) for name in ("features_NF", "found_NE", "own_N")
    )
    share_N = torch.cat([torch.full((len(item.own_N),), item.weight / len(item.own_N)) for item in lessons])
    share_N = share_N / share_N.sum()
    logs_NG = torch.cat([own_N[:, None], found_NE.clamp_min(1e-12).log()], dim=1)
    outputs = 1 + len(taus)
    bias_G = torch.zeros(outputs)
    # start near the model's own answer
    bias_G[0] = 2.0
    start = (torch.zeros(outputs, features_NF.shape[1]), bias_G)
    weight_GF, bias_G = (tensor.requires_grad_() for tensor in start)
    gate = Gate(taus, features_NF.mean(0), features_NF.std(0).clamp_min(1e-6), weight_GF, bias_G)
    optimizer = torch.optim.Adam([weight_GF, bias_G], lr=_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, _STEPS)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        mixed_N = torch.logsumexp(logs_NG + gate.log_weights(features_NF), dim=1)
        loss = -(share_N * mixed_N).sum() + _DECAY * weight_GF.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return Gate(gate.taus, gate.mean_F, gate.scale_F, weight_GF.detach(), bias_G.detach())


def _filled(store: Store, name: str, spec: BankSpec, reading: Reading) -> Bank:
    bank = store.create(name, spec)
    bank.write(Trace(reading.written_TLd, reading.split.tokens_T[: reading.split.written], reading.name[:128], "read"))
    return bank


if __name__ == "__main__":
    typer.run(main)
