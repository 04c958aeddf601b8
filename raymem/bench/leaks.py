"""What remaining rows reveal of erased ones: two attacks on the states that an erasure leaves of a real model.

Passages of Python's language reference get a sentence with a name, a number and rare words planted, each sentence in
each passage. They are written to a bank and exactly the sentences are erased. Then two attacks guess from
the states that are left which sentence it was: a search with the candidates and the model, and a probe that was trained
on other passages.

Shape legend: `P` passages, `S` secrets, `N` documents (each secret in each passage), `T` rows, `D` hidden width.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymem.client.store import Bank, Store, connect
from raymem.config import ColdSettings, Settings
from raymem.encode.calibration import Calibration, Range
from raymem.lm.fingerprint import fingerprint
from raymem.lm.models import LanguageModel
from raymem.rows import Trace
from raymem.storage.store import ColdStore
from raymem.types import BankSpec, KeySpec

Report = Callable[[int, int], None]
Scope = Literal["rows", "run"]
Floats = NDArray[np.float64]
_PEOPLE = ("Ottoline Varga", "Bram Okonkwo", "Zdenka Quist", "Ignatius Pell")
_MORE = ("Thessaly Moreau", "Kwame Lindqvist", "Perpetua Shaw", "Yusuf Abernathy")
_ILLNESSES = ("brucellosis", "porphyria", "anthrax", "narcolepsy", "scleroderma", "leprosy", "tularemia", "glaucoma")
_STREETS = ("Quarry", "Tannery", "Obelisk", "Lavender", "Foundry", "Heron", "Gallows", "Viaduct")
# rows before a secret, so that the model has some context
_BEFORE = 40
_FOLDS = 4
_ERASED, _KEPT = 1.0, 9.0
_CHANCE_QUANTILE = 1e-3


@dataclass(frozen=True)
class LeakSizes:
    """How many passages and secrets, and how many rows after a secret's last one an attack looks."""

    passages: int = 32
    secrets: int = 8
    distances: tuple[int, ...] = (1, 8, 64, 256)
    layer: int = 26
    seed: int = 0


SMALL = LeakSizes(passages=12, secrets=4, distances=(1, 8))


@dataclass(frozen=True)
class Hit:
    """How an attack did at a distance: how often its first guess was right, and the area under its ROC curve."""

    top1: float
    auc: float


@dataclass(frozen=True)
class Leaks:
    """Both attacks by scope and distance; guessing is right in `chance` of the cases, at most `bound` by luck.

    The bound holds in 999 of 1,000 runs of as many guesses. "all" takes what is said at every distance together.
    `exposed_rows` is what the receipts said.
    """

    chance: float
    bound: float
    documents: int
    probe: dict[Scope, dict[str, Hit]]
    nearest: dict[Scope, dict[str, Hit]]
    exposed_rows: dict[Scope, int]


@dataclass(frozen=True)
class _Document:
    """One passage with one secret: its stream, its tokens, and where the secret's rows are."""

    passage: int
    secret: int
    tokens_T: Tensor
    start: int
    stop: int

    @property
    def stream(self) -> str:
        return f"p{self.passage}-s{self.secret}"


def run(
    model: LanguageModel, folder: Path, sizes: LeakSizes | None = None, report: Report = lambda done, total: None
) -> Leaks:
    """Write, erase and attack, with scope "rows" and with scope "run".

    Args:
        model: whose states are written.
        folder: an empty one, for the store.
        sizes: 32 passages with 8 secrets each by default.
        report: called with passes done and their number.
    """
    sizes = sizes or LeakSizes()
    secrets = [model.encode(text) for text in _secrets(sizes)]
    documents = list(_documents(model, secrets, sizes))
    settings = Settings(cold=ColdSettings(sync="none"))
    with connect(folder / "memory", settings=settings) as store:
        bank = _bank(store, model, sizes)
        for done, document in enumerate(documents):
            report(done, len(documents))
            _write(bank, model, document, sizes.layer)
        report(len(documents), len(documents))
        store.fork(bank.name, "bench/run")
        banks: dict[Scope, Bank] = {"run": store.bank("bench/run"), "rows": bank}
        receipts = {scope: each.erase(before=(_ERASED + _KEPT) / 2, scope=scope) for scope, each in banks.items()}
    asked = [_states(model, secret, sizes.layer) for secret in secrets]
    left = {scope: _left(folder / "memory", each.name) for scope, each in banks.items()}
    labels_N = np.array([document.secret for document in documents])
    passage_N = np.array([document.passage for document in documents])

    def attacked(scope: Scope, attack: Callable[[Floats], Floats]) -> dict[str, Hit]:
        said = {
            str(distance): attack(
                np.stack([_nearest_row(left[scope][each.stream], each, distance) for each in documents])
            )
            for distance in sizes.distances
        }
        said["all"] = np.mean(list(said.values()), axis=0)
        return {distance: _hit(said_NS, labels_N) for distance, said_NS in said.items()}

    return Leaks(
        chance=1 / sizes.secrets,
        bound=binomial_bound(len(documents), 1 / sizes.secrets) / len(documents),
        documents=len(documents),
        probe={scope: attacked(scope, lambda states_ND: _probe(states_ND, labels_N, passage_N)) for scope in banks},
        nearest={scope: attacked(scope, lambda states_ND: _nearness(states_ND, asked)) for scope in banks},
        exposed_rows={scope: receipt.exposed_rows for scope, receipt in receipts.items()},
    )


def binomial_bound(trials: int, chance: float) -> int:
    """The most guesses of so many that are right by luck in 999 of 1,000 runs."""
    left = 1.0
    for hits in range(trials + 1):
        left -= math.comb(trials, hits) * chance**hits * (1 - chance) ** (trials - hits)
        if left < _CHANCE_QUANTILE:
            return hits
    return trials


def ridge(train_ND: Floats, wanted_NS: Floats, test_MD: Floats, strength: float) -> Floats:
    """Ridge regression with an intercept: what it says of the test rows, [M, S]."""
    mean_D, mean_S = train_ND.mean(0), wanted_NS.mean(0)
    rows_ND = train_ND - mean_D
    # fewer documents than features: in the dual
    kernel_NN = rows_ND @ rows_ND.T + strength * np.eye(len(rows_ND))
    dual_NS = np.linalg.solve(kernel_NN, wanted_NS - mean_S)
    said_MS: Floats = (test_MD - mean_D) @ (rows_ND.T @ dual_NS) + mean_S
    return said_MS


def auc(scores_N: Floats, is_N: NDArray[np.bool_]) -> float:
    """How often one that is it has the higher score than one that isn't; ties count half."""
    yes_M, no_K = scores_N[is_N][:, None], scores_N[~is_N][None]
    return float(((yes_M > no_K) + 0.5 * (yes_M == no_K)).mean())


def _secrets(sizes: LeakSizes) -> list[str]:
    """Sentences of which no two share a name, a number or a rare word."""
    choose = random.Random(sizes.seed)
    people, illnesses, streets = (
        choose.sample(words, sizes.secrets) for words in ((*_PEOPLE, *_MORE), _ILLNESSES, _STREETS)
    )
    numbers = choose.sample(range(100, 1000), sizes.secrets)
    return [
        f" The patient {person} of {number} {street} Street has {illness}."
        for person, number, street, illness in zip(people, numbers, streets, illnesses, strict=True)
    ]


def _documents(model: LanguageModel, secrets: Sequence[Tensor], sizes: LeakSizes) -> Iterator[_Document]:
    for passage, tokens_T in enumerate(_passages(model, sizes)):
        for number, secret_T in enumerate(secrets):
            whole_T = torch.cat([tokens_T[:_BEFORE], secret_T, tokens_T[_BEFORE:]])
            yield _Document(passage, number, whole_T, _BEFORE, _BEFORE + len(secret_T))


def _passages(model: LanguageModel, sizes: LeakSizes) -> Iterator[Tensor]:
    """Pieces of the language reference, none of them twice, from topics in a seeded order."""
    from pydoc_data.topics import topics

    names, length, found = sorted(topics), _BEFORE + max(sizes.distances) + 1, 0
    random.Random(sizes.seed).shuffle(names)
    for name in names:
        tokens_T = model.encode(topics[name])
        for start in range(0, len(tokens_T) - length, length):
            if found == sizes.passages:
                return
            yield tokens_T[start : start + length]
            found += 1


def _bank(store: Store, model: LanguageModel, sizes: LeakSizes) -> Bank:
    ranges = {KeySpec(layers=(sizes.layer,)): Range(0.2, 0.95)}
    plain = Calibration(
        model=model.content_hash, layers=(sizes.layer,), mean_LD=torch.zeros(1, model.width), ranges=ranges
    )
    print_ = fingerprint(model, (sizes.layer,), store.put_calibration(plain))
    return store.create("bench/rows", BankSpec(kind="spalm", fingerprint=print_, budget_bytes=2**30))


def _write(bank: Bank, model: LanguageModel, document: _Document, layer: int) -> None:
    hidden_TLd = model.run(document.tokens_T, (layer,)).hidden_TLd
    cuts = (0, document.start, document.stop, len(document.tokens_T))
    for start, stop, time in zip(cuts, cuts[1:], (_KEPT, _ERASED, _KEPT), strict=False):
        piece = slice(start, stop)
        bank.write(Trace(hidden_TLd[piece], document.tokens_T[piece], document.stream, "r", start, time=time))


def _states(model: LanguageModel, secret_T: Tensor, layer: int) -> Floats:
    """What the model makes of a secret that is read alone; without the attention sink."""
    return np.asarray(model.run(secret_T, (layer,)).hidden_TLd[1:, 0].double().numpy())


def _left(folder: Path, name: str) -> dict[str, dict[int, Floats]]:
    """The states in a bank's journal, by stream and seq."""
    cold, found = ColdStore.open(str(folder), "none"), dict[str, dict[int, Floats]]()
    for rows in cold.journal(cold.catalog.get(name)).scan():
        states_TD = rows.hidden_TLD[:, 0].double().numpy()
        for stream, seq, state_D in zip(rows.streams, rows.seq_T.tolist(), states_TD, strict=True):
            found.setdefault(stream, {})[seq] = state_D
    return found


def _nearest_row(left: dict[int, Floats], document: _Document, distance: int) -> Floats:
    """The state that is left nearest to the row so far after the secret: without a later one, the last before it."""
    wanted = document.stop - 1 + distance
    assert not left.keys() & set(range(document.start, document.stop)), "the secret is still there"
    return left[min(left, key=lambda seq: abs(seq - wanted))]


def _probe(states_ND: Floats, labels_N: NDArray[np.int64], passage_N: NDArray[np.int64]) -> Floats:
    """What a linear probe says that was trained on other passages."""
    wanted_NS = np.eye(int(labels_N.max()) + 1)[labels_N]
    said_NS = np.zeros_like(wanted_NS)
    for fold in range(_FOLDS):
        held_N = passage_N % _FOLDS == fold
        train_MD = states_ND[~held_N]
        scale_D = train_MD.std(0) + 1e-6
        said_NS[held_N] = ridge(
            train_MD / scale_D, wanted_NS[~held_N], states_ND[held_N] / scale_D, strength=float(states_ND.shape[1])
        )
    return said_NS


def _nearness(states_ND: Floats, asked: Sequence[Floats]) -> Floats:
    """The cosine of each state with the nearest of each secret's, beside what it is for other documents."""
    mean_D = np.concatenate(asked).mean(0)
    rows_ND = _unit(states_ND - states_ND.mean(0))
    nearest_NS = np.stack([(rows_ND @ _unit(of_TD - mean_D).T).max(1) for of_TD in asked], axis=1)
    # a secret that all states are near to says nothing
    return np.asarray((nearest_NS - nearest_NS.mean(0)) / (nearest_NS.std(0) + 1e-9))


def _unit(rows_ND: Floats) -> Floats:
    return np.asarray(rows_ND / (np.linalg.norm(rows_ND, axis=1, keepdims=True) + 1e-12))


def _hit(said_NS: Floats, labels_N: NDArray[np.int64]) -> Hit:
    # numbers that are equal but for rounding are ties: the first of them is as good a guess as any
    said_NS = said_NS.round(9)
    curves = [auc(said_NS[:, secret], labels_N == secret) for secret in range(said_NS.shape[1])]
    return Hit(float((said_NS.argmax(1) == labels_N).mean()), float(np.mean(curves)))
