"""One answer of several: what a partitioned bank says, from what each of its partitions does.

Shape legend: `Q` queries, `P` partitions, `k` neighbours, `M` = P·k candidates, `V` value width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from raymem.bank.held import HeldColumns, HeldRows, HeldStates
from raymem.memory import blend
from raymem.memory.choice import FLOOR
from raymem.storage.erasure.reach import LISTED, beyond
from raymem.storage.history import common_tags
from raymem.types import AttendQuery, BankInfo, BankSpec, EraseReceipt, FileCheck, MemoryTokens, Readout

Columns = dict[str, Tensor]


def merge_readouts(answers: Mapping[int, Readout], spec: BankSpec, k: int, missing: Sequence[int] = ()) -> Readout:
    """The readout of a bank that holds the rows of all partitions: the k best, ties by (position, partition).

    A row on its way between two partitions may be in both answers: it counts once.

    Args:
        answers: of partitions, by their numbers; at least one, each with its k best.
        spec: the bank's.
        k: neighbours a query gets.
        missing: partitions that did not answer.
    """
    sources: dict[tuple[str, str], int] = {}
    parts = [_columns(answers[index], index, sources) for index in sorted(answers)]
    columns = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    found = _first_k(_ordered(columns), k)
    used, source_Qk = torch.unique(found["source"], return_inverse=True)
    absent, names = int((used < 0).sum()), list(sources)
    return Readout(
        values_QV=blend(spec.kind, spec.options, found["scores"], found["vectors"]),
        relevance_Q=torch.stack([readout.relevance_Q for readout in answers.values()]).amax(0),
        tokens_Qk=found["tokens"],
        scores_Qk=found["scores"],
        pos_Qk=found["pos"],
        seq_Qk=found["seq"],
        source_Qk=source_Qk - absent,
        sources=tuple(names[source] for source in used[absent:].tolist()),
        kind=spec.kind,
        partition_Qk=found["partition"],
        missing=tuple(missing),
    )


def merge_memories(answers: Mapping[int, MemoryTokens], query: AttendQuery, states: HeldStates) -> MemoryTokens:
    """The rows that a query chooses among those that each partition chose: their pieces compete with one another.

    A row on its way between two partitions may be in both answers: it counts once. Where the question has nothing to
    do with any partition nothing is chosen, though the rows of a small one would be.

    Args:
        answers: of partitions, by their numbers; at least one, with the states of their rows.
        query: what they were asked.
        states: how states are compared in this bank.
    """
    sources: dict[tuple[str, str], int] = {}
    parts, partitions = [], []
    for index, answer in sorted(answers.items()):
        assert answer.states_ND is not None
        number_S = torch.tensor([sources.setdefault(name, len(sources)) for name in answer.sources], dtype=torch.int64)
        run_N = number_S[answer.source_N]
        parts.append(HeldColumns(answer.states_ND, answer.tokens_N, run_N, answer.seq_N, answer.pos_N))
        partitions.append(torch.full_like(answer.pos_N, index))
    columns = HeldColumns(*(torch.cat(column) for column in zip(*parts, strict=True)))
    first_N = _firsts(columns.run_T, columns.seq_T)
    rows = HeldRows(HeldColumns(*(column[first_N] for column in columns)), list(sources))
    query_QD = None if query.hidden_QLD is None else states.unit(query.hidden_QLD)
    chosen, place_N = rows.choose(query, query_QD, next(iter(answers.values())).kind)
    best = max(answer.relevance for answer in answers.values())
    # a partition that chose nothing and matches somewhat is one that the floor kept out
    if best < FLOOR and any(answer.relevance > 0 and not len(answer) for answer in answers.values()):
        return _nothing(chosen, best)
    return dataclasses.replace(chosen, partition_N=torch.cat(partitions)[first_N][place_N], states_ND=None)


def _nothing(chosen: MemoryTokens, relevance: float) -> MemoryTokens:
    none_N = chosen.pos_N[:0]
    return MemoryTokens(none_N, none_N, none_N, none_N, (), relevance, chosen.kind, partition_N=none_N)


def combine(name: str, parts: Sequence[BankInfo]) -> BankInfo:
    """The line of a bank, from those of its partitions in their order."""
    nodes = {part.node for part in parts}
    return BankInfo(
        name=name,
        spec=parts[0].spec,
        state="hot" if all(part.state == "hot" for part in parts) else "cold",
        epoch=max(part.epoch for part in parts),
        owner=None,
        node=nodes.pop() if len(nodes) == 1 else None,
        rows=sum(part.rows for part in parts),
        bytes=sum(part.bytes for part in parts),
        attended_rows=sum(part.attended_rows for part in parts),
        attended_bytes=sum(part.attended_bytes for part in parts),
        tags=common_tags([part.tags for part in parts]),
        created=min(part.created for part in parts),
        pinned=all(part.pinned for part in parts),
        ttl_s=parts[0].ttl_s,
        partitions=tuple(parts),
    )


def one_receipt(name: str, id: str, receipts: Sequence[EraseReceipt]) -> EraseReceipt:
    """The receipt of an erasure in all partitions; `id` joins those of the receipts that are kept."""
    meant = [receipt for receipt in receipts if receipt.rows] or list(receipts[:1])
    after = [receipt.after for receipt in meant if receipt.after is not None]
    done = all(receipt.status == "complete" for receipt in meant)
    together = EraseReceipt(
        id=" ".join(receipt.id for receipt in meant),
        bank=name,
        bank_id=id,
        what=meant[0].what,
        rows=sum(receipt.rows for receipt in meant),
        generation=max(receipt.generation for receipt in meant),
        status="complete" if done else "pending",
        started=min(receipt.started for receipt in meant),
        before=_sum([receipt.before for receipt in meant]),
        after=_sum(after) if len(after) == len(meant) else None,
        proves=all(receipt.proves for receipt in meant),
        finished=max(receipt.finished or 0.0 for receipt in meant) if done else None,
        reason="; ".join(sorted({receipt.reason for receipt in meant if receipt.reason})),
        forks={fork: made for receipt in meant for fork, made in receipt.forks.items()},
        followed_rows=sum(receipt.followed_rows for receipt in meant),
        exposed_rows=sum(receipt.exposed_rows for receipt in meant),
        exposed=tuple(run for receipt in meant for run in receipt.exposed)[:LISTED],
        later_rows=sum(receipt.later_rows for receipt in meant),
        same_rows=sum(receipt.same_rows for receipt in meant),
    )
    # what no count says of each partition, then the counts of all together
    own = [words for receipt in meant for words in receipt.out_of_reach if words not in beyond(receipt)]
    return dataclasses.replace(together, out_of_reach=(*beyond(together), *dict.fromkeys(own)))


def _firsts(run_N: Tensor, seq_N: Tensor) -> Tensor:
    """The places of rows but those of a run and number that came before, in the order of their runs."""
    seen, kept = set[tuple[int, int]](), list[int]()
    for place, row in enumerate(zip(run_N.tolist(), seq_N.tolist(), strict=True)):
        if row not in seen:
            seen.add(row)
            kept.append(place)
    kept_N = torch.tensor(kept, dtype=torch.int64)
    return kept_N[run_N[kept_N].argsort(stable=True)]


def _sum(checks: Sequence[FileCheck]) -> FileCheck:
    columns = zip(*(dataclasses.astuple(check) for check in checks), strict=True)
    return FileCheck(*map(sum, columns))


def _columns(readout: Readout, index: int, sources: dict[tuple[str, str], int]) -> Columns:
    columns = {name: getattr(readout, f"{name}_Qk") for name in ("tokens", "scores", "pos", "seq", "source")}
    # a run that two partitions have rows of is one source; -1 stays what it is
    number_S = torch.tensor([*(sources.setdefault(name, len(sources)) for name in readout.sources), -1])
    columns["source"] = number_S[columns["source"]]
    columns["partition"] = torch.full_like(columns["pos"], index).masked_fill(columns["pos"] < 0, -1)
    return columns | {"vectors": readout.vectors_QkV}


def _ordered(columns: Columns) -> Columns:
    # they come in the order of partitions, and each sort keeps the order of what is equal
    columns = _taken(columns, columns["pos"].argsort(dim=1, stable=True))
    return _taken(columns, columns["scores"].argsort(dim=1, descending=True, stable=True))


def _first_k(columns: Columns, k: int) -> Columns:
    again_QM = _again(columns)
    found = _taken(columns, again_QM.to(torch.int8).argsort(dim=1, stable=True)[:, :k])
    absent_Qk = again_QM.sort(dim=1, stable=True).values[:, :k]
    for name in ("tokens", "pos", "seq", "source", "partition"):
        found[name] = found[name].masked_fill(absent_Qk, -1)
    return found | {"scores": found["scores"].masked_fill(absent_Qk, float("-inf"))}


def _again(columns: Columns) -> Tensor:
    """Which candidates are rows that came before, bool [Q, M]."""
    by_seq_QM = columns["seq"].argsort(dim=1, stable=True)
    by_row_QM = by_seq_QM.gather(1, columns["source"].gather(1, by_seq_QM).argsort(dim=1, stable=True))
    source_QM, seq_QM = (columns[name].gather(1, by_row_QM) for name in ("source", "seq"))
    same_QM = torch.zeros_like(source_QM, dtype=torch.bool)
    same_QM[:, 1:] = (source_QM[:, 1:] == source_QM[:, :-1]) & (seq_QM[:, 1:] == seq_QM[:, :-1])
    return torch.zeros_like(same_QM).scatter(1, by_row_QM, same_QM)


def _taken(columns: Columns, index_QM: Tensor) -> Columns:
    rows_Q1 = torch.arange(len(index_QM))[:, None]
    return {name: column[rows_Q1, index_QM] for name, column in columns.items()}
