"""From matched rows to the pieces of text around them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from raymem.types import Readout, RowRef

# a matched row stands for the words around it: those it grew out of, and those that followed
BEFORE = 16
AFTER = 24
# a piece does not grow past this by joining neighbours: common words match everywhere
LONGEST = 128


@dataclass
class Piece:
    """Rows `seq_from` to `seq_to` (exclusive) of one run, and the matches inside them.

    `best` keeps, for each query, its relevance times its best cosine: their sum ranks the piece, so that one that
    answers many words of a question comes before one that shares a single common word with it.
    """

    stream: str
    run: str
    seq_from: int
    seq_to: int
    positions: set[int] = field(default_factory=set)
    score: float = -1.0
    relevance: float = 0.0
    best: dict[int, float] = field(default_factory=dict)

    @property
    def rank(self) -> tuple[float, float]:
        """Larger is better."""
        return sum(self.best.values()), self.score

    def add(self, match: Match) -> None:
        """Count a match in."""
        self.seq_to = min(self.seq_from + LONGEST, max(self.seq_to, match.row.seq + AFTER))
        self.positions.add(match.row.pos)
        self.score = max(self.score, match.score)
        self.relevance = max(self.relevance, match.relevance)
        self.best[match.query] = max(self.best.get(match.query, 0.0), match.relevance * match.score)


@dataclass(frozen=True)
class Match:
    """One row found by one query."""

    query: int
    row: RowRef
    score: float
    relevance: float


def pieces(readout: Readout, k: int) -> list[Piece]:
    """The k best pieces of text that a readout's rows point at, best first; neighbouring rows share a piece."""
    by_run: defaultdict[tuple[str, str], list[Match]] = defaultdict(list)
    for match in _matches(readout):
        by_run[match.row.stream, match.row.run].append(match)
    found = [piece for matches in by_run.values() for piece in _merge(matches)]
    return sorted(found, key=lambda piece: piece.rank, reverse=True)[:k]


def _matches(readout: Readout) -> list[Match]:
    assert readout.scores_Qk is not None
    relevance = readout.relevance_Q.tolist()
    return [
        Match(query, row, score, relevance[query])
        for query, scores in enumerate(readout.scores_Qk.tolist())
        for row, score in zip(readout.rows(query), scores, strict=False)
    ]


def _merge(matches: list[Match]) -> list[Piece]:
    found: list[Piece] = []
    for match in sorted(matches, key=lambda match: match.row.seq):
        row = match.row
        # neighbours whose windows overlap are one piece
        if not found or row.seq - BEFORE > found[-1].seq_to or row.seq >= found[-1].seq_from + LONGEST:
            # where pieces touch, no text is told twice
            start = found[-1].seq_to if found else 0
            found.append(Piece(row.stream, row.run, max(start, row.seq - BEFORE), row.seq + AFTER))
        found[-1].add(match)
    return found
