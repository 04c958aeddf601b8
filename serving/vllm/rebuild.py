"""Which requests make the rows of a bank: its runs, read from its journal by a worker."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from raymem.bank.replica import Replica
from raymem.errors import FingerprintMismatch, TooLarge
from raymem.host.backend import detached
from raymem.lm.attending import dequantize
from raymem.logs import get_logger
from raymem.rows import RowFormat
from raymem.serving.vllm.orders import Order, listed, ranges
from raymem.storage.attended import Attended
from raymem.storage.store import ColdStore, Entry
from raymem.tensors import dtype_name, from_bytes, to_bytes
from raymem.types import AttendQuery

if TYPE_CHECKING:
    from raymem.serving.vllm.connector import RaymemConnector

log = get_logger("raymem.vllm")


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
    the store keeps are loaded: this worker holds them from now on. Those of another shape or RoPE are computed anew.

    Raises:
        BankNotFound, BankDetached, FingerprintMismatch, ConfigError, Unsupported, UnsupportedModel: see
            `MemoryReader.rows_to_rebuild`.
    """
    rows = connector.row_store()
    # of an earlier plan, whose orders may never come
    rows.unstage(name)
    cold, base = _base(connector, name, store)
    entry = cold.catalog.get(name)
    runs, shown = _runs(cold, entry), _shown(cold, entry)
    kept = rows.kept(entry.id, [at for run in runs for at in run.pos])
    stored, missing, requests = cold.attended(entry), shown - kept, []
    loads = _fits(stored, connector.row_format())
    for run in runs:
        for start in range(0, len(run.pos), connector.longest - 1):
            part = slice(start, start + connector.longest - 1)
            pos, tokens = run.pos[part], run.tokens[part]
            at = [place for place, position in enumerate(pos) if position in missing]
            if not at:
                continue
            order = base.model_copy(update={"at": ranges(at), "pos": ranges([pos[place] for place in at])})
            found = stored.get(torch.tensor(listed(order.pos))) if loads else None
            if found and (load := _staged(connector, order, [tokens[place] for place in at], found)):
                # any token does
                tokens, order = [0], load
            requests.append((tokens, order.signed(tokens, connector.secret)))
    return {"requests": requests, "rows": len(shown), "kept": len(shown & kept)}


def replacement(connector: RaymemConnector, name: str, store: str | None, rows: Mapping[str, Any]) -> dict[str, Any]:
    """The request that attends to rows made of a bank in place of its own, which this worker holds from now on.

    Args:
        connector: this worker's.
        name: the bank.
        store: where it lives; None for the connector's.
        rows: `keys` and `values` as dtype, shape and bytes, and their `tokens`, -1 for a row of several.

    Raises:
        TooLarge: they don't fit `rows_bytes`.
        BankNotFound, BankDetached, FingerprintMismatch, ConfigError, Unsupported, UnsupportedModel: see `plan`.
    """
    cold, base = _base(connector, name, store)
    runs = _runs(cold, cold.catalog.get(name))
    count = len(rows["tokens"])
    pair = [from_bytes(bytearray(blob), *kind) for *kind, blob in (rows["keys"], rows["values"])]
    wanted, (layers, _, heads, width) = connector.row_format(), pair[0].shape
    wanted._replace(layers=layers, heads=heads, width=width).require(wanted)
    staged = uuid.uuid5(uuid.NAMESPACE_OID, f"{base.id} {hashlib.sha256(rows['keys'][2]).hexdigest()}").hex
    connector.row_store().unstage(name)
    connector.row_store().stage(name, staged, *pair)
    order = base.model_copy(
        update={
            "do": "replace",
            # the same rows whatever is asked
            "kind": "compressive",
            "pos": ranges(range(count)),
            "tokens": [max(0, token) for token in rows["tokens"]],
            "staged": staged,
            "about": [token for run in runs for token in run.tokens],
        }
    )
    return {"requests": [([0], order.signed([0], connector.secret))], "rows": count, "kept": 0}


def kept_parts(connector: RaymemConnector, name: str, store: str | None, part: int) -> Any:
    """How many parts a bank's rows come in, for a part of -1; else that part, run by run, for `AttendedRows`.

    They are the rows of the bank's journal as it is now; rows that were made in their place are not given.

    Raises:
        Unsupported: other workers have some of the layers or heads. BankNotFound: the bank is not there.
    """
    cold = ColdStore.open(store or connector.cold_uri())
    entry, rope = cold.catalog.get(name).whole(), connector.row_format().rope
    names = {
        at: (run.stream, run.name, seq) for run in _runs(cold, entry) for at, seq in zip(run.pos, run.seq, strict=True)
    }
    parts = list(connector.row_store().rows_of(entry.id, names))
    if part < 0:
        return len(parts)
    found: list[dict[str, Any]] = []
    # rows may have been erased since the parts were counted
    if part >= len(parts):
        return found
    pos, *pair = parts[part]
    for first, last in _following([names[at] for at in pos]):
        stream, run, seq = names[pos[first]]
        tensors = [each[:, first:last] for each in pair]
        blobs = [(dtype_name(each.dtype), list(each.shape), to_bytes(each).tobytes()) for each in tensors]
        found.append({"stream": stream, "run": run, "seq": seq, "rope": rope, "tensors": blobs})
    return found


def release(connector: RaymemConnector, name: str) -> dict[str, Any]:
    """The request that lets the engine forget a bank's rows; those that wait for orders are forgotten now.

    Raises:
        Unsupported, UnsupportedModel: this engine can't attend to rows.
    """
    connector.row_store().unstage(name)
    # any token does
    return {"requests": [([0], Order(do="release", bank=name).signed([0], connector.secret))]}


def _fits(stored: Attended, wanted: RowFormat) -> bool:
    """Whether a store's keys and values are those of a model, in whatever dtype."""
    try:
        for form in stored.formats():
            form.require(wanted._replace(dtype=form.dtype))
    except FingerprintMismatch as error:
        log.warning("kept rows are computed anew", bank=stored.entry.name, reason=error.message)
        return False
    return True


def _staged(
    connector: RaymemConnector, order: Order, tokens: list[int], found: dict[str, torch.Tensor]
) -> Order | None:
    """The order that loads stored rows, which wait for it from now on; None where there is no room for them."""
    pairs = [found[name] for name in ("keys", "values")]
    if "key_scales" in found:
        scales = [found[name] for name in ("key_scales", "value_scales")]
        pairs = [dequantize(rows, scale, torch.float32) for rows, scale in zip(pairs, scales, strict=True)]
    # the same on all ranks of an engine, which each stage their share
    name = f"{order.id} {order.generation} {order.pos}"
    try:
        connector.row_store().stage(order.bank, name, *pairs)
    except TooLarge:
        # they are computed, if the budget has room for them
        return None
    return order.model_copy(update={"do": "load", "tokens": tokens, "staged": name})


def _base(connector: RaymemConnector, name: str, store: str | None) -> tuple[ColdStore, Order]:
    """A bank's store, and an order that says which bank it is."""
    uri = store or connector.cold_uri()
    cold = ColdStore.open(uri)
    entry = cold.catalog.get(name).whole()
    if entry.state == "cold":
        raise detached(name)
    connector.require_model(entry.spec.fingerprint)
    kind, generation = entry.spec.kind, entry.generation
    return cold, Order(do="capture", bank=name, store=uri, id=entry.id, kind=kind, generation=generation)


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
