"""The model: what was sent and what was acknowledged, and the check of a store against it."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from faultkit import made

from raymem.bank.primary import Executor, Primary, run_now
from raymem.bank.replica import Replica
from raymem.errors import RaymemError
from raymem.rows import JournalRows
from raymem.storage.catalog import Entry
from raymem.storage.store import ColdStore
from raymem.storage.sweeper import sweep
from raymem.storage.tables.files import Files
from raymem.storage.tables.tables import journal_table, snapshot_table

Run = tuple[str, str]
# states that hold rows are the same bit by bit; of the others, a state cut at other places differs by rounding
ROW_KINDS = {"spalm"}
TOLERANCE = 1e-6


@dataclass
class Ledger:
    """Rows of each run count from 0: how many were sent and how many acknowledged, by bank."""

    kinds: dict[str, str] = field(default_factory=dict)
    sent: defaultdict[str, Counter[Run]] = field(default_factory=lambda: defaultdict(Counter))
    acknowledged: defaultdict[str, Counter[Run]] = field(default_factory=lambda: defaultdict(Counter))
    secrets: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def secret(self, bank: str, stream: str, rows: int, state: str = "sent") -> None:
        """A stream of one run that is to be erased: it is `sent`, `kept`, being erased (`going`) or `gone`."""
        self.secrets[bank, stream] = (rows, state)

    def send(self, bank: str, run: Run, end: int) -> None:
        """Rows before `end` are on their way."""
        self.sent[bank][run] = max(self.sent[bank][run], end)

    def acknowledge(self, bank: str, run: Run, end: int) -> None:
        """Rows before `end` were said to be durable."""
        self.acknowledged[bank][run] = max(self.acknowledged[bank][run], end)

    @property
    def rows(self) -> int:
        """All rows acknowledged."""
        return sum(sum(runs.values()) for runs in self.acknowledged.values())


# how many of a stream's n rows may be there
_ALLOWED = {
    "sent": lambda n: {0, n},
    "kept": lambda n: {n},
    "going": lambda n: {0, n},
    "gone": lambda n: {0},
}


@dataclass
class Verdict:
    """What a store has of what was acknowledged."""

    acknowledged: int = 0
    lost: int = 0
    doubled: int = 0
    fragments: int = 0
    details: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def require(self) -> None:
        """Raise AssertionError unless everything is as it must be."""
        assert (self.lost, self.doubled, self.wrong) == (0, 0, []), self


class Checker:
    """Compares a store with the ledger, as often as asked: an undisturbed run goes on beside the disturbed one.

    Args:
        uri: the store.
        ledger: what was sent and acknowledged.
        scratch: an empty folder for the undisturbed run.
    """

    def __init__(self, uri: str, ledger: Ledger, scratch: Path) -> None:
        self._uri = uri
        self._ledger = ledger
        self._clean = made.open_cold(str(scratch), "none")
        self._undisturbed: dict[str, Primary] = {}
        self.times = 0

    def compare(self, digests: dict[str, str | None]) -> Verdict:
        """Rows and state of each bank that is written to, while nobody writes.

        Args:
            digests: of banks, as their living owners gave them.
        """
        verdict = Verdict(acknowledged=self._ledger.rows)
        cold = ColdStore.open(self._uri)
        for bank in sorted(self._ledger.kinds):
            try:
                entry = cold.catalog.get(bank)
                rows = list(cold.journal(entry).scan())
                _check_rows(bank, rows, self._ledger, verdict)
                _check_state(cold, entry, self._follow(entry, rows, verdict), digests.get(bank), verdict)
                verdict.fragments = max(verdict.fragments, cold.journal(entry).stats()["fragments"])
            except RaymemError as error:
                verdict.lost += sum(self._ledger.acknowledged[bank].values())
                verdict.wrong.append(f"{bank} can't be read: {error}")
        names = [entry.name for entry in cold.catalog.list()]
        verdict.wrong += [f"the catalog has {name} twice" for name, times in Counter(names).items() if times > 1]
        self.times += 1
        return verdict

    def finish(self, digests: dict[str, str | None]) -> Verdict:
        """`compare`, and what else is in the store, once everybody has gone."""
        verdict = self.compare(digests)
        verdict.wrong = [*self._ledger.wrong, *verdict.wrong]
        _check_others(ColdStore.open(self._uri), self._ledger, verdict)
        return verdict

    def _follow(self, entry: Entry, parts: list[JournalRows], verdict: Verdict) -> Primary:
        """The undisturbed run, which writes the rows that it has not seen."""
        if entry.name not in self._undisturbed:
            fresh = self._clean.catalog.create(entry.name, entry.spec)
            claimed = self._clean.catalog.claim(entry.name, "undisturbed", fresh.epoch)
            self._undisturbed[entry.name] = Primary.open(self._clean, claimed)
        primary = self._undisturbed[entry.name]
        for part in parts:
            refused = [
                outcome
                for (stream, run), seq, rows in _pieces(part.since(primary.end))
                for outcome in run_now(primary.write([made.trace(stream, run, seq, rows)], Executor()))
                if isinstance(outcome, RaymemError)
            ]
            verdict.wrong += [f"{entry.name}: an undisturbed run refuses the journal's rows: {e}" for e in refused]
        primary.apply_queued()
        return primary


def check(uri: str, ledger: Ledger, scratch: Path, digests: dict[str, str | None] | None = None) -> Verdict:
    """Compare a store with the ledger once, when everybody has gone; see `Checker`."""
    return Checker(uri, ledger, scratch).finish(digests or {})


def _check_others(cold: ColdStore, ledger: Ledger, verdict: Verdict) -> None:
    """Forks and merged banks are whole, erased rows are gone, and no folder is left that no bank names."""
    for entry in cold.catalog.list():
        try:
            streams = Counter(stream for part in cold.journal(entry).scan() for stream in part.streams)
        except RaymemError as error:
            verdict.wrong.append(f"{entry.name} can't be read: {error}")
            continue
        for (bank, stream), (rows, state) in ledger.secrets.items():
            if bank == entry.name and streams[stream] not in _ALLOWED[state](rows):
                verdict.wrong.append(f"{bank} has {streams[stream]} of {rows} rows of {stream}, which is {state}")
    sweep(cold, 0.0)
    named = {
        table
        for entry in cold.catalog.list()
        for table in (journal_table(entry.id, entry.generation), snapshot_table(entry.id, entry.generation))
    }
    left = {name for name in Files(cold.tables).tables() if name.startswith(("journal-", "snapshots-"))} - named
    verdict.wrong += [f"the folder {name} is of no bank" for name in sorted(left)]


def _check_rows(bank: str, parts: list[JournalRows], ledger: Ledger, verdict: Verdict) -> None:
    there: defaultdict[Run, list[int]] = defaultdict(list)
    for part in parts:
        for stream, run, seq in zip(part.streams, part.runs, part.seq_T.tolist(), strict=True):
            there[stream, run].append(seq)
        _check_content(bank, part, verdict)
    for run in {*there, *ledger.acknowledged[bank]}:
        seqs, acknowledged = there[run], ledger.acknowledged[bank][run]
        verdict.doubled += len(seqs) - len(set(seqs))
        if missing := sorted(set(range(acknowledged)) - set(seqs)):
            verdict.lost += len(missing)
            verdict.details.append(f"{bank} {run}: rows {missing[0]} to {missing[-1]} of {acknowledged} are lost")
        if sorted(seqs) != seqs:
            verdict.wrong.append(f"{bank} {run} is out of order")
        if seqs and max(seqs) >= ledger.sent[bank][run]:
            verdict.wrong.append(f"{bank} {run} has row {max(seqs)}, which nobody sent")


def _check_content(bank: str, part: JournalRows, verdict: Verdict) -> None:
    start = 0
    for (stream, run), seq, rows in _pieces(part):
        expected = JournalRows.of(made.trace(stream, run, seq, rows), 0, 0).crc_T
        if not torch.equal(part.crc_T[start : start + rows], expected):
            verdict.wrong.append(f"{bank} {stream} {run}: rows from {seq} have other content")
        start += rows


def _pieces(part: JournalRows) -> Iterator[tuple[Run, int, int]]:
    """Stretches of consecutive rows of one run: the run, its first seq, and how many."""
    if not len(part):
        return
    start = 0
    seqs = part.seq_T.tolist()
    keys = list(zip(part.streams, part.runs, strict=True))
    for at in range(1, len(seqs) + 1):
        if at == len(seqs) or keys[at] != keys[start] or seqs[at] != seqs[at - 1] + 1:
            yield keys[start], seqs[start], at - start
            start = at


def _check_state(cold: ColdStore, entry: Entry, primary: Primary, digest: str | None, verdict: Verdict) -> None:
    recovered = Replica(cold, entry)
    recovered.recover()
    if entry.spec.kind in ROW_KINDS:
        for whose, found in (("recovered", recovered.digest()), ("live", digest)):
            if found is not None and found != primary.digest():
                verdict.wrong.append(f"{entry.name}: the {whose} state is not that of an undisturbed run")
        return
    expected = primary.tensors()
    for name, tensor in recovered.tensors().items():
        if not _close(tensor, expected[name]):
            verdict.wrong.append(f"{entry.name}: {name} of the recovered state is not that of an undisturbed run")


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    scale = expected.double().abs().max().item() if expected.numel() else 0.0
    return torch.allclose(found.double(), expected.double(), rtol=TOLERANCE, atol=TOLERANCE * scale)
