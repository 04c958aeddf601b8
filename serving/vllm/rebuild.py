"""Which requests make the rows of a bank: its runs, read from its journal by a worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from raymem.bank.replica import Replica
from raymem.host.backend import detached
from raymem.lm.attending import dequantize
from raymem.serving.vllm.orders import Order, listed, ranges
from raymem.storage.store import ColdStore, Entry
from raymem.tensors import dtype_name, to_bytes
from raymem.types import AttendQuery

if TYPE_CHECKING:
    from raymem.serving.vllm.connector import RaymemConnector


@dataclass
class _Run:
    stream: str
    name: str
    pos: list[int] = field(default_factory=list)
    seq: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def plan(connector: RaymemConnector, name: str, store: str | None) -> dict[str, Any]:
    """The requests, as token ids and `kv_transfer_params`, how many `rows` the bank shows and how many are `kept`.

    Rows are those that the bank's mechanism lets attention see; they know what came before them in their run. A run
    that is longer than the engine's context is read in parts, each without the ones before. Rows whose keys and values
    the store keeps are loaded: this worker holds them from now on.

    Raises:
        BankNotFound, BankDetached, FingerprintMismatch, ConfigError, Unsupported, UnsupportedModel: see
            `MemoryReader.rows_to_rebuild`.
    """
    rows = connector.row_store()
    uri = store or connector.cold_uri()
    cold = ColdStore.open(uri)
    entry = cold.catalog.get(name).whole()
    if entry.state == "cold":
        raise detached(name)
    connector.require_model(entry.spec.fingerprint)
    base = Order(do="capture", bank=name, store=uri, id=entry.id, kind=entry.spec.kind, generation=entry.generation)
    stored, kept, requests = cold.attended(entry), rows.kept(name), []
    shown = _shown(cold, entry)
    missing = shown - kept
    runs = _runs(cold, entry)
    for run in runs:
        for start in range(0, len(run.pos), connector.longest - 1):
            part = slice(start, start + connector.longest - 1)
            pos, tokens = run.pos[part], run.tokens[part]
            at = [place for place, position in enumerate(pos) if position in missing]
            if not at:
                continue
            order = base.model_copy(update={"at": ranges(at), "pos": ranges([pos[place] for place in at])})
            if found := stored.get(torch.tensor(listed(order.pos))):
                # any token does
                tokens, order = [0], _staged(connector, order, [tokens[place] for place in at], found)
            requests.append((tokens, order.signed(tokens, connector.secret)))
    return {"requests": requests, "rows": len(shown), "kept": len(shown & kept)}


def kept_parts(connector: RaymemConnector, name: str, store: str | None, part: int) -> Any:
    """How many parts a bank's rows come in, for a part of -1; else that part, run by run, for `AttendedRows`.

    Raises:
        Unsupported: other workers have some of the layers or heads. BankNotFound: the bank is not there.
    """
    parts = list(connector.row_store().rows_of(name))
    if part < 0:
        return len(parts)
    pos, *pair = parts[part]
    cold = ColdStore.open(store or connector.cold_uri())
    names = {
        at: (run.stream, run.name, seq)
        for run in _runs(cold, cold.catalog.get(name))
        for at, seq in zip(run.pos, run.seq, strict=True)
    }
    found: list[dict[str, Any]] = []
    for first, last in _following([names[at] for at in pos]):
        stream, run, seq = names[pos[first]]
        tensors = [rows[:, first:last] for rows in pair]
        blobs = [(dtype_name(rows.dtype), list(rows.shape), to_bytes(rows).tobytes()) for rows in tensors]
        found.append({"stream": stream, "run": run, "seq": seq, "tensors": blobs})
    return found


def release(connector: RaymemConnector, name: str) -> dict[str, Any]:
    """The request that lets the engine forget a bank's rows."""
    # any token does
    return {"requests": [([0], Order(do="release", bank=name).signed([0], connector.secret))]}


def _staged(connector: RaymemConnector, order: Order, tokens: list[int], found: dict[str, torch.Tensor]) -> Order:
    pairs = [found[name] for name in ("keys", "values")]
    if "key_scales" in found:
        scales = [found[name] for name in ("key_scales", "value_scales")]
        pairs = [dequantize(rows, scale, torch.float32) for rows, scale in zip(pairs, scales, strict=True)]
    # the same on all ranks of an engine, which each stage their share
    name = f"{order.id} {order.generation} {order.pos}"
    connector.row_store().stage(name, *pairs)
    return order.model_copy(update={"do": "load", "tokens": tokens, "staged": name})


def _shown(cold: ColdStore, entry: Entry) -> set[int]:
    """Positions of the rows that attention may see."""
    replica = Replica(cold, entry)
    replica.recover()
    every = AttendQuery(None, rows=max(1, replica.pos), method="recent", fetch=False)
    return set(replica.attend(every).pos_N.tolist())


def _following(names: list[tuple[str, str, int]]) -> list[tuple[int, int]]:
    """Which of these rows follow one another in a run, as ranges of their indices."""
    after = [0, *(at for at in range(1, len(names)) if names[at] != (*names[at - 1][:2], names[at - 1][2] + 1))]
    return list(zip(after, [*after[1:], len(names)], strict=True))


def _runs(cold: ColdStore, entry: Entry) -> list[_Run]:
    runs: dict[tuple[str, str], _Run] = {}
    for rows in cold.journal(entry).scan():
        columns = (rows.pos_T.tolist(), rows.seq_T.tolist(), rows.token_T.tolist())
        for stream, name, pos, seq, token in zip(rows.streams, rows.runs, *columns, strict=True):
            run = runs.setdefault((stream, name), _Run(stream, name))
            run.pos.append(pos)
            run.seq.append(seq)
            run.tokens.append(token)
    return list(runs.values())
