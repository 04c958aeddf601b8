"""Training the gates that come with raymem: `python -m raymem.lm.tune TEXT… --kind spalm --out gates.json`.

Each text folder is a domain. A document is predicted with its own banks, with the next document's of its domain, and
with those of another domain: the last two teach the gate to leave a wrong memory alone. Several kinds joined by `+`
get one gate together. What is in the file already stays, so that gates can be trained one by one.

Shape legend: N predictions, F features, E experts.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from raymem import Bank, BankSpec, Store, connect
from raymem.encode.fit import calibrate
from raymem.lm.contenders import Contender, Size, ask, sized
from raymem.lm.fingerprint import fingerprint
from raymem.lm.gate import Gate, Prediction, gate_name, taus_of
from raymem.lm.mixing import NEIGHBOURS, evidence
from raymem.lm.models import BUNDLED_MODEL, LanguageModel
from raymem.lm.passes import Reading, read
from raymem.lm.text import find_documents
from raymem.memory import kinds as known_kinds

_STEPS = 400
_RATE = 0.05
_DECAY = 1e-4
# the weight of predictions with wrong memories together; those with the right one have 1
_WRONG_WEIGHT = 1.0

# of each domain, document and size, the banks
Memories = Sequence[Sequence[Sequence[Sequence[Bank]]]]


@dataclass(frozen=True)
class Lesson:
    """One document predicted with one memory; `weight` is its weight in the loss.

    `features_NF`; `found_NE` each expert's probability of the token that came; `own_N` the model's log-probability.
    """

    features_NF: Tensor
    found_NE: Tensor
    own_N: Tensor
    weight: float


def main(
    texts: Annotated[list[Path], typer.Argument(help="Folders of text files, one a domain.")],
    kind: Annotated[str, typer.Option(help="Kinds, `+` between those that share a gate; all: each kind.")] = "all",
    budgets: Annotated[str, typer.Option(help="What a bank may hold, in million bytes.")] = "0.15,1",
    out: Annotated[Path, typer.Option(help="Where the gates go.")] = Path("gates.json"),
    model: str = BUNDLED_MODEL,
    layer: int = 26,
    max_docs: Annotated[int, typer.Option(help="Of each folder, the first in name order.")] = 6,
) -> None:
    """Train gates and write them to a file beside those that it has."""
    loaded = LanguageModel.load(model)
    domains = [
        [read(loaded, document, (layer,), 4096, 256) for document in find_documents([folder], max_docs)]
        for folder in track(texts, "reading", console=Console(stderr=True))
    ]
    calibration = calibrate(loaded, (layer,))
    plain = BankSpec(kind="spalm", fingerprint=fingerprint(loaded, (layer,), calibration.hash))
    sizes = [Size(round(float(budget) * 1e6)) for budget in budgets.split(",")]
    for name in known_kinds() if kind == "all" else kind.split(","):
        kinds = tuple(name.split("+"))
        taught = [Contender(f"{place}", sized(kinds, plain, calibration, size)) for place, size in enumerate(sizes)]
        with tempfile.TemporaryDirectory() as folder, connect(folder) as store:
            store.put_calibration(calibration)
            gate = fit(list(lessons(loaded, domains, _remembered(store, domains, taught))), kinds)
        known = json.loads(out.read_text()) if out.exists() else {}
        out.write_text(json.dumps(dict(sorted((known | {gate_name(kinds): gate.to_json()}).items()))) + "\n")


def lessons(model: LanguageModel, domains: Sequence[Sequence[Reading]], memories: Memories) -> Iterator[Lesson]:
    """Predict every document with its own memories and two wrong ones of each size.

    Args:
        model: that read the documents.
        domains: what it read.
        memories: of each domain, its documents' banks.
    """
    for here, domain in enumerate(track(domains, "predicting", console=Console(stderr=True))):
        far = memories[(here + 1) % len(domains)]
        for place, reading in enumerate(domain):
            near = memories[here][(place + 1) % len(domain)]
            asked = [(banks, 1.0) for banks in memories[here][place]]
            asked += [(banks, _WRONG_WEIGHT / 2) for banks in (*near, *far[place % len(far)])]
            yield from _lessons(model, reading, asked)


def fit(lessons: list[Lesson], kinds: tuple[str, ...]) -> Gate:
    """The gate with the least weighted loss; every document counts the same."""
    features_NF, found_NE, own_N = (
        torch.cat([getattr(lesson, name) for lesson in lessons]) for name in ("features_NF", "found_NE", "own_N")
    )
    taus = tuple(tau for kind in kinds for tau in taus_of(kind))
    share_N = torch.cat([torch.full((len(item.own_N),), item.weight / len(item.own_N)) for item in lessons])
    share_N = share_N / share_N.sum()
    logs_NG = torch.cat([own_N[:, None], found_NE.clamp_min(1e-12).log()], dim=1)
    bias_G = torch.zeros(1 + len(taus))
    # start near the model's own answer
    bias_G[0] = 2.0
    start = (torch.zeros(1 + len(taus), features_NF.shape[1]), bias_G)
    weight_GF, bias_G = (tensor.requires_grad_() for tensor in start)
    gate = Gate(kinds, taus, features_NF.mean(0), features_NF.std(0).clamp_min(1e-6), weight_GF, bias_G)
    optimizer = torch.optim.Adam([weight_GF, bias_G], lr=_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, _STEPS)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        mixed_N = torch.logsumexp(logs_NG + gate.log_weights(features_NF), dim=1)
        loss = -(share_N * mixed_N).sum() + _DECAY * weight_GF.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return Gate(kinds, taus, gate.mean_F, gate.scale_F, weight_GF.detach(), bias_G.detach())


def _remembered(store: Store, domains: Sequence[Sequence[Reading]], taught: Sequence[Contender]) -> Memories:
    return [
        [
            [contender.write(store, f"{here}-{place}", reading) for contender in taught]
            for place, reading in enumerate(domain)
        ]
        for here, domain in enumerate(domains)
    ]


def _lessons(model: LanguageModel, reading: Reading, asked: Sequence[tuple[Sequence[Bank], float]]) -> Iterator[Lesson]:
    parts: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in asked]
    for window in reading.windows:
        own = Prediction(model.logits(window.final_Wd))
        own_N = own.log_probs(window.targets_W[:, None])[:, 0]
        for (banks, _), columns in zip(asked, parts, strict=True):
            readouts = ask(banks, window.hidden_WLd, NEIGHBOURS)
            found = evidence(own, readouts, [taus_of(readout.kind) for readout in readouts])
            hit_N1k = (found.tokens_Qk == window.targets_W[:, None])[:, None]
            columns.append((found.features_QF, (found.shares_QEk * hit_N1k).sum(-1), own_N))
    for (_, weight), columns in zip(asked, parts, strict=True):
        features_NF, found_NE, own_N = (torch.cat(column) for column in zip(*columns, strict=True))
        yield Lesson(features_NF, found_NE, own_N, weight)


if __name__ == "__main__":
    typer.run(main)
